"""What follows the model: steps that change or judge a proposed mask before it is merged and written."""
