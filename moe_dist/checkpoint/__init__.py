"""Checkpoints of a run: written by all ranks on any layout, and read on any other layout.

Functions that need torch.distributed.checkpoint or torch.distributed.tensor import them when they
are called. The import takes 1.6 CPU seconds, which a run then spends at its first checkpoint and
not before its first step.
"""
