"""Tasks: a model, its batches, its loss and its metrics."""
