"""Imports that the ranks of tests need, done once in the process that forks them (conftest.py)."""

import torch.distributed.checkpoint  # noqa: F401

import moe_dist.optim.compiled_loops
import moe_dist.verify.certificate  # noqa: F401
from moe_dist.engine.deepspeed import import_deepspeed

import_deepspeed()
