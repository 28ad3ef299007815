"""A rank of an expert-parallel axis by itself: what others would send to it is what it sends itself.

For times and memory of a rank's work, not for results: it has the rows of a rank of that layout, about as many as the
others would send and as uneven from step to step, in the same calls.
"""

import dataclasses
from typing import Any

import torch
import torch.distributed as dist

from moe_dist.parallel.mesh import Axis, Mesh


def alone(mesh: Mesh, ep: int, index: int) -> Mesh:
    """`mesh` with this process as rank `index` of an `ep` axis whose other ranks do not exist."""
    return dataclasses.replace(mesh, ep=Axis(ep, index, _Echo(index, ep)))


class _Echo(dist.ProcessGroup):
    """Of its own rank; calls return at once."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]
        self.index, self.number = rank, size

    def alltoall_base(  # type: ignore[override]
        self, out: torch.Tensor, into: torch.Tensor, out_splits: list[int], in_splits: list[int], options: Any
    ) -> dist.Work:
        """Every rank sends what this one sends itself, or as much of it as there is room for."""
        here = into.split(in_splits or [len(into) // self.number] * self.number)[self.index]
        for part in out.split(out_splits or [len(out) // self.number] * self.number):
            n = min(len(part), len(here))
            part[:n] = here[:n]
            part[n:] = 0
        return _Done()

    def allreduce(self, tensors: Any, options: Any = None) -> dist.Work:  # type: ignore[override]
        return _Done()


class _Done(dist.Work):
    def wait(self, timeout: Any = None) -> bool:
        return True
