"""Refines data sets: on threads, in order, with a journal. Start with `run`."""
