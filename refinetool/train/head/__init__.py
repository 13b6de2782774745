"""Trains heads on frozen SAM 2 models. Start with `run`."""

from refinetool.train.head.run import train_head

__all__ = ["train_head"]
