"""Makes training examples: packs images, and samples crops, coarse masks and prompts from them."""
