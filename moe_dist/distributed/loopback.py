"""A rank of an expert-parallel axis by itself: what others would send to it is what it sends itself.

For times and memory of a rank's work, not for results: it has the rows of a rank of that layout, about as many as the
others would send and as uneven from step to step, in the same calls. It can wait in each for the ranks that there are.
"""

import dataclasses
from typing import Any

import torch
import torch.distributed as dist

from moe_dist.distributed.collectives import all_reduce_sum
from moe_dist.distributed.mesh import Axis, Mesh


def loopback_mesh(mesh: Mesh, ep: int, index: int, waits: bool = False) -> Mesh:
    """`mesh` with this process as rank `index` of an `ep` axis whose other ranks do not exist. `waits`: in each call
    for the ranks of `mesh`."""
    return dataclasses.replace(
        mesh, ep=Axis(ep, index, LoopbackProcessGroup(index, ep, mesh.dp if waits else None))
    )


class LoopbackProcessGroup(dist.ProcessGroup):
    """Of its own rank. `there`: ranks that make the same calls, which wait for each other."""

    def __init__(self, rank: int, size: int, there: Axis | None) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]
        self.index, self.number, self.there = rank, size, there

    def alltoall_base(  # type: ignore[override]
        self,
        out: torch.Tensor,
        into: torch.Tensor,
        out_splits: list[int],
        in_splits: list[int],
        options: Any,
    ) -> dist.Work:
        """Every rank sends what this one sends itself, or as much of it as there is room for."""
        if self.there:
            all_reduce_sum(torch.zeros(1, device=into.device), self.there)
        here = into.split(in_splits or [len(into) // self.number] * self.number)[self.index]
        for part in out.split(out_splits or [len(out) // self.number] * self.number):
            n = min(len(part), len(here))
            part[:n] = here[:n]
            part[n:] = 0
        return CompletedWork()

    def allreduce(self, tensors: Any, options: Any = None) -> dist.Work:  # type: ignore[override]
        return CompletedWork()


class CompletedWork(dist.Work):
    def wait(self, timeout: Any = None) -> bool:
        return True
