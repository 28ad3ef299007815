"""Loopback process group: every receive buffer is filled with the rows this rank sends to itself.

With it, one process acts as a rank on a larger expert-parallel axis, to measure time and memory
(the results are meaningless). The rank receives about as many rows as from real peers, as uneven
from step to step, in the same collectives. In each collective it can also wait for existing ranks.
"""

import dataclasses
from typing import Any

import torch
import torch.distributed as dist

from moe_dist.distributed.collectives import all_reduce_sum
from moe_dist.distributed.mesh import Axis, Mesh


def loopback_mesh(mesh: Mesh, ep: int, index: int, waits: bool = False) -> Mesh:
    """Copies a mesh and replaces its `ep` axis by a loopback.

    Args:
        mesh: The existing ranks' mesh.
        ep: The axis's size; the other ranks do not exist.
        index: This process's index along the axis.
        waits: If True, each all-to-all also waits for the ranks in `mesh`.

    Returns:
        The new mesh.
    """
    group = LoopbackProcessGroup(index, ep, mesh.dp if waits else None)
    return dataclasses.replace(mesh, ep=Axis(ep, index, group))


class LoopbackProcessGroup(dist.ProcessGroup):
    """A process group with one existing rank."""

    def __init__(self, rank: int, size: int, barrier_axis: Axis | None) -> None:
        """Creates the group.

        Args:
            rank: This process's index.
            size: Ranks on the axis.
            barrier_axis: Existing ranks with the same calls; they wait for each other in each call.
                None: no rank waits.
        """
        super().__init__(rank, size)  # type: ignore[call-arg]
        self.index = rank
        self.num_ranks = size
        self.barrier_axis = barrier_axis

    def alltoall_base(  # type: ignore[override]
        self,
        out: torch.Tensor,
        into: torch.Tensor,
        out_splits: list[int],
        in_splits: list[int],
        options: Any,
    ) -> dist.Work:
        """Fills each rank's part of `out` with the rows for this rank, cut or padded with zeros."""
        if self.barrier_axis:
            all_reduce_sum(torch.zeros(1, device=into.device), self.barrier_axis)
        even_in = [len(into) // self.num_ranks] * self.num_ranks
        even_out = [len(out) // self.num_ranks] * self.num_ranks
        own = into.split(in_splits or even_in)[self.index]
        for part in out.split(out_splits or even_out):
            n = min(len(part), len(own))
            part[:n] = own[:n]
            part[n:] = 0
        return CompletedWork()

    def allreduce(self, tensors: Any, options: Any = None) -> dist.Work:  # type: ignore[override]
        """Leaves the tensors as they are."""
        return CompletedWork()


class CompletedWork(dist.Work):
    """A completed collective's handle."""

    def wait(self, timeout: Any = None) -> bool:
        """Returns True."""
        return True
