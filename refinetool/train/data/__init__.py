"""Training examples: packed pictures, and the sampler that makes crops, coarse masks and prompts of them."""
