"""Tasks: each has a model, batches, a loss and metrics."""
