"""Many samples: on threads, with a journal, in order. Start with `run`."""
