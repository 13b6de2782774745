"""Training of the reference encoder (VRP-SAM) by episodes: a class, a target image, and annotated reference images."""
