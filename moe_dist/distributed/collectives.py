"""Everything ranks say to each other during a step; the only user of `all_to_all` in the package.

Each call carries a `CommLabel`. Bytes sent to other ranks are counted by its place and direction, those of a reduction
as a ring sends them, the mean of the ranks. The flight recorder of the axis lists every call under its label.

Legend: N rows sent by this rank, R rows received, E global experts, e experts of this rank, P ranks of the axis.
"""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from moe_dist.distributed.labels import CommLabel
from moe_dist.distributed.mesh import Axis, Mesh

Group = dist.ProcessGroup
T = TypeVar("T")


def all_to_all_counts(count_E: torch.Tensor, axis: Axis, label: CommLabel) -> torch.Tensor:
    """Tells every rank how many rows it will get for each of its experts. Returns count_Pe (int64), by sender."""
    count_Pe = torch.empty_like(count_E)
    axis.record_bytes(label, [count_E.nbytes // axis.size] * axis.size)
    _run_blocking(
        axis,
        label,
        lambda: dist.all_to_all_single(count_Pe, count_E.contiguous(), **_call_options(axis)),
    )
    return count_Pe.view(axis.size, -1)


def _run_blocking(axis: Axis, label: CommLabel, start: Callable[[], Any]) -> None:
    """One that is waited for at once."""
    axis.flight_recorder.wait_for(axis.flight_recorder.start_call(label, axis.ranks, start))


def _call_options(axis: Axis) -> dict[str, Any]:
    """What every call of torch gets."""
    return {"group": axis.group, "async_op": True}


def all_reduce_sum(x: torch.Tensor, axis: Axis, label: CommLabel | None = None) -> torch.Tensor:
    """In-place sum over the ranks of the axis; returns `x`. Not differentiable."""
    return _reduce(x, axis, label, dist.ReduceOp.SUM)


def all_reduce_max(x: torch.Tensor, axis: Axis, label: CommLabel | None = None) -> torch.Tensor:
    """In place, the largest of each element over the ranks of the axis; returns `x`."""
    return _reduce(x, axis, label, dist.ReduceOp.MAX)


def _reduce(x: torch.Tensor, axis: Axis, label: CommLabel | None, op: Any) -> torch.Tensor:
    if axis.size > 1:
        _run_blocking(
            axis,
            label or CommLabel("all ranks", "sum"),
            lambda: dist.all_reduce(x, op, **_call_options(axis)),
        )
    if label:
        axis.record_ring_bytes(label, 2 * x.nbytes * (axis.size - 1) // axis.size)
    return x


def reduce_sum(x: torch.Tensor, axis: Axis, owner: int, label: CommLabel) -> None:
    """In place on rank `owner` of the axis, the sum over its ranks; on the others `x` is of no use afterwards."""
    if axis.size > 1:
        _run_blocking(axis, label, lambda: dist.reduce(x, group_dst=owner, **_call_options(axis)))
        axis.record_ring_bytes(label, x.nbytes * (axis.size - 1) // axis.size)


def broadcast(x: torch.Tensor, axis: Axis, owner: int, label: CommLabel) -> None:
    """In place, the `x` of rank `owner` of the axis, on each of its ranks."""
    if axis.size > 1:
        _run_blocking(
            axis, label, lambda: dist.broadcast(x, group_src=owner, **_call_options(axis))
        )
        axis.record_ring_bytes(label, x.nbytes * (axis.size - 1) // axis.size)


def all_reduce_shared(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Sum over ranks, from which every rank computes one and the same term of the loss.

    That term exists once, not once per rank, so its gradient goes back to each addend unchanged: backward is the
    identity, where a plain all-reduce would multiply it by the number of ranks.
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
    """The parts of all ranks of the axis, equal in shape, one after the other along the first dimension."""
    parts = [torch.empty_like(x) for _ in range(axis.size)]
    _run_blocking(
        axis,
        CommLabel("all ranks", "gather"),
        lambda: dist.all_gather(parts, x.contiguous(), **_call_options(axis)),
    )
    return torch.cat(parts)


def copy_to_owners(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """A value that every rank of the axis has, of which each uses a part of its own: backward sums over the ranks."""
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
    """What balance losses need of other ranks, on a mesh."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh

    def over_data(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over all ranks: every rank has tokens of its own."""
        return all_reduce_shared(x, self.mesh.dp)

    def over_replicas(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks that hold the same experts: each got rows from an expert-parallel set of its own."""
        return all_reduce_shared(x, self.mesh.expert_dp)

    def over_expert_shards(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks that together hold all experts."""
        return all_reduce_shared(x, self.mesh.ep)

    def to_expert_shards(self, x: torch.Tensor) -> torch.Tensor:
        """`x` itself, of which each owner uses the part of its own experts."""
        return copy_to_owners(x, self.mesh.ep)


def barrier_without_timeout() -> None:
    """Waits until all ranks are here, for as long as it takes."""
    run_on_main(lambda: None)


def run_on_main(make: Callable[[], T], group: Group | None = None) -> T:
    """What `make` returns on the main rank, on every rank (any picklable object); no other rank calls it.

    Raises its ValueError or OSError on every rank. The others wait in `group`; without one, in a group of their own for
    as long as it takes, which may be a pass over a big corpus: the mesh's timeout is for steps.
    """
    waiting = group or dist.new_group(backend="gloo", timeout=timedelta(days=7))
    told: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            told[0] = make()
        except (ValueError, OSError) as error:
            told[1] = error
    dist.broadcast_object_list(told, src=0, group=waiting)
    if told[1] is not None:
        raise told[1]
    return told[0]


def all_gather_objects(mine: T, group: Group) -> list[T]:
    """What each rank of the group has (any picklable object), in the order of ranks, on every rank."""
    told: list[Any] = [None] * group.size()
    dist.all_gather_object(told, mine, group=group)
    return told
