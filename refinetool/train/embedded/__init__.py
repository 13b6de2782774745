"""Trains the embedded model. Start with `run`."""

from refinetool.train.embedded.run import train_embedded

__all__ = ["train_embedded"]
