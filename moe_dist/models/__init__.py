"""Models: plain modules that know nothing of ranks."""
