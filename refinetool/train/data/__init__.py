"""Makes training examples: packs pictures, and samples crops, coarse masks and prompts from them."""
