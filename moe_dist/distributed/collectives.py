"""Collectives in a training step, including the all-to-all for row counts.

The rows themselves are sent in `chunked_all_to_all`; nothing else calls `dist.all_to_all_single`.

Each call has a `CommLabel`. Bytes sent to other ranks are counted by the label's place and
direction; a reduction counts the bytes a ring sends, averaged over the ranks. The axis's flight
recorder lists every call by its label.

Legend: E global experts, e this rank's experts, P ranks on the axis.
"""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from moe_dist.distributed.labels import CommLabel
from moe_dist.distributed.mesh import Axis, Mesh

ALL_RANKS_SUM = CommLabel("all ranks", "sum")
ALL_RANKS_GATHER = CommLabel("all ranks", "gather")
CORPUS_TIMEOUT = timedelta(days=7)  # rank 0 may read a large corpus while the other ranks wait

Group = dist.ProcessGroup
T = TypeVar("T")


def all_to_all_counts(count_E: torch.Tensor, axis: Axis, label: CommLabel) -> torch.Tensor:
    """Exchanges each rank's row counts per expert.

    Args:
        count_E: This rank's row count for each global expert, int64.
        axis: The expert-parallel ranks.
        label: Name for the flight recorder and the byte counts.

    Returns:
        Rows this rank will receive for each local expert, by sender: (P, e), int64.
    """
    count_Pe = torch.empty_like(count_E)
    axis.record_bytes(label, [count_E.nbytes // axis.size] * axis.size)

    def start() -> Any:
        return dist.all_to_all_single(count_Pe, count_E.contiguous(), **call_options(axis))

    _run_blocking(axis, label, start)
    return count_Pe.view(axis.size, -1)


def call_options(axis: Axis) -> dict[str, Any]:
    """Returns the keyword arguments for every torch.distributed call on an axis."""
    return {"group": axis.group, "async_op": True}


def _run_blocking(axis: Axis, label: CommLabel, start: Callable[[], Any]) -> None:
    """Starts a collective under the flight recorder and waits for it."""
    call = axis.flight_recorder.start_call(label, axis.ranks, start)
    axis.flight_recorder.wait_for(call)


def all_reduce_sum(x: torch.Tensor, axis: Axis, label: CommLabel | None = None) -> torch.Tensor:
    """Sums a tensor over an axis's ranks, in place. Not differentiable.

    Args:
        x: This rank's addend; becomes the sum.
        axis: The ranks to sum over.
        label: Name for the flight recorder and the byte counts; None: bytes are not counted.

    Returns:
        `x`.
    """
    return _all_reduce(x, axis, label, dist.ReduceOp.SUM)


def all_reduce_max(x: torch.Tensor, axis: Axis, label: CommLabel | None = None) -> torch.Tensor:
    """Takes each element's maximum over an axis's ranks, in place.

    Args:
        x: This rank's values; become the maxima.
        axis: The ranks to compare.
        label: Name for the flight recorder and the byte counts; None: bytes are not counted.

    Returns:
        `x`.
    """
    return _all_reduce(x, axis, label, dist.ReduceOp.MAX)


def _all_reduce(x: torch.Tensor, axis: Axis, label: CommLabel | None, op: Any) -> torch.Tensor:
    if axis.size > 1:

        def start() -> Any:
            return dist.all_reduce(x, op, **call_options(axis))

        _run_blocking(axis, label or ALL_RANKS_SUM, start)
    if label:
        axis.record_ring_bytes(label, 2 * x.nbytes * (axis.size - 1) // axis.size)
    return x


def reduce_sum(x: torch.Tensor, axis: Axis, owner: int, label: CommLabel) -> None:
    """Sums a tensor over an axis's ranks, in place on one rank.

    Args:
        x: This rank's addend; becomes the sum on `owner`, and is undefined on the other ranks.
        axis: The ranks to sum over.
        owner: Axis index of the rank that receives the sum.
        label: Name for the flight recorder and the byte counts.
    """
    if axis.size == 1:
        return

    def start() -> Any:
        return dist.reduce(x, group_dst=owner, **call_options(axis))

    _run_blocking(axis, label, start)
    axis.record_ring_bytes(label, x.nbytes * (axis.size - 1) // axis.size)


def broadcast(x: torch.Tensor, axis: Axis, owner: int, label: CommLabel) -> None:
    """Copies one rank's tensor to all ranks on an axis, in place.

    Args:
        x: The tensor to send on `owner`; overwritten on the other ranks.
        axis: The participating ranks.
        owner: Axis index of the sender.
        label: Name for the flight recorder and the byte counts.
    """
    if axis.size == 1:
        return

    def start() -> Any:
        return dist.broadcast(x, group_src=owner, **call_options(axis))

    _run_blocking(axis, label, start)
    axis.record_ring_bytes(label, x.nbytes * (axis.size - 1) // axis.size)


def all_reduce_shared(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Sums a tensor over ranks for a loss term computed on every rank; backward is the identity.

    The loss contains the term once, not once per rank, so each addend gets the sum's gradient
    unchanged. A plain all-reduce's backward would multiply it by the number of ranks.

    Args:
        x: This rank's addend.
        axis: The ranks to sum over.

    Returns:
        The sum, a new tensor.
    """
    return _AllReduceShared.apply(x, axis)


class _AllReduceShared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: Axis) -> torch.Tensor:
        return all_reduce_sum(x.clone(), axis)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad: torch.Tensor) -> tuple:
        return grad[0], None


def all_gather(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Concatenates all ranks' tensors, of equal shape, along the first dimension."""
    parts = [torch.empty_like(x) for _ in range(axis.size)]

    def start() -> Any:
        return dist.all_gather(parts, x.contiguous(), **call_options(axis))

    _run_blocking(axis, ALL_RANKS_GATHER, start)
    return torch.cat(parts)


def copy_to_owners(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Copies a replicated tensor; each rank uses its own part of the copy.

    Backward sums the gradient over the ranks.
    """
    return _CopyToOwners.apply(x, axis)


class _CopyToOwners(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: Axis) -> torch.Tensor:
        ctx.axis = axis
        return x.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad: torch.Tensor) -> tuple:
        return all_reduce_sum(grad[0].clone(), ctx.axis), None


class StatReducer:
    """Sums statistics over a mesh's ranks, for balance losses."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh

    def over_data(self, x: torch.Tensor) -> torch.Tensor:
        """Sums over all ranks, because each rank has different tokens."""
        return all_reduce_shared(x, self.mesh.dp)

    def over_replicas(self, x: torch.Tensor) -> torch.Tensor:
        """Sums over the replicas of this rank's experts, because each received different rows."""
        return all_reduce_shared(x, self.mesh.expert_dp)

    def over_expert_shards(self, x: torch.Tensor) -> torch.Tensor:
        """Sums over the expert shards."""
        return all_reduce_shared(x, self.mesh.ep)

    def to_expert_shards(self, x: torch.Tensor) -> torch.Tensor:
        """Returns `x`; each rank uses the part for its experts."""
        return copy_to_owners(x, self.mesh.ep)


def barrier_without_timeout() -> None:
    """Blocks until all ranks have made this call, however long it takes."""
    run_on_main(lambda: None)


def run_on_main(make: Callable[[], T], group: Group | None = None) -> T:
    """Runs a function on the main rank and sends its result to all ranks.

    Args:
        make: The function; its result must be picklable. Other ranks do not call it.
        group: The process group in which the other ranks wait. None: a new group without a
            practical timeout, because the mesh's timeout is for steps and `make` may read a large
            corpus.

    Returns:
        `make`'s result, on every rank.

    Raises:
        ValueError: `make` raised it; on every rank.
        OSError: `make` raised it; on every rank.
    """
    waiting = group or dist.new_group(backend="gloo", timeout=CORPUS_TIMEOUT)
    message: list[Any] = [None, None]  # the result, the error
    if dist.get_rank() == 0:
        try:
            message[0] = make()
        except (ValueError, OSError) as error:
            message[1] = error
    dist.broadcast_object_list(message, src=0, group=waiting)
    result, error_on_main = message
    if error_on_main is not None:
        raise error_on_main
    return result


def all_gather_objects(local: T, group: Group) -> list[T]:
    """Gathers one picklable object per rank; returns them by rank, on every rank."""
    objects: list[Any] = [None] * group.size()
    dist.all_gather_object(objects, local, group=group)
    return objects
