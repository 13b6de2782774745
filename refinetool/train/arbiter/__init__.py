"""Training of the arbiter, which settles contests between the objects of an image. Start with `run`."""
