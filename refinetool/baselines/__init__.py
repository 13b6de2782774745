"""Baselines to compare with: without a model (`classical`), or with a model that does not see the mask (`grid`)."""
