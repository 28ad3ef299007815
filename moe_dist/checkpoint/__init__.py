"""State of a run on disk: written by all ranks on any layout, read on any other.

Functions that need torch.distributed.checkpoint and torch.distributed.tensor import them when they are called: that
takes 1.6 CPU seconds, which a run spends at its first checkpoint and not before its first step.
"""
