"""Other ways of refining, to compare with: without a model (`classical`), or without showing it the mask (`grid`)."""
