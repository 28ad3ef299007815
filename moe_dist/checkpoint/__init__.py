"""A run's checkpoints: written by all ranks on any layout, and read on any other layout.

`saver` writes, `loader` reads, `manifest` seals and finds checkpoints; `format` has the format.

Functions that need torch.distributed.checkpoint or torch.distributed.tensor import it when called.
The import takes 1.6 CPU seconds; a run spends them at its first checkpoint, not before its first
step.
"""
