"""Trains the embedded model and IoU adapters."""
