"""Everything ranks say to each other during a step; the only user of `all_to_all` in the package.

Each exchange call carries a label (site, direction): `site` is the use of a layer, `direction` is "counts",
"dispatch" or "combine", and ":grad" marks the way back in backward; (module, "rows") labels rows of a vocabulary,
("experts", "gradients") and ("experts", "weights") what replicas of experts tell each other. Bytes sent to other ranks
are counted under it, those of a reduction as a ring sends them, the mean of the ranks. Every call is in the `record`
of the axis, under it or by its name.

Legend: N rows sent by this rank, R rows received, E global experts, e experts of this rank, P ranks of the axis.
"""

from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from moe_dist.memory import empty
from moe_dist.parallel.mesh import Axis, Mesh

Label = tuple[int | str, str]
Group = dist.ProcessGroup
T = TypeVar("T")


def all_to_all_counts(count_E: torch.Tensor, axis: Axis, site: int) -> torch.Tensor:
    """Tells every rank how many rows it will get for each of its experts. Returns count_Pe (int64), by sender."""
    count_Pe = torch.empty_like(count_E)
    axis.count((site, "counts"), [count_E.nbytes // axis.size] * axis.size)
    _call(axis, (site, "counts"), lambda: dist.all_to_all_single(count_Pe, count_E.contiguous(), **_of(axis)))
    return count_Pe.view(axis.size, -1)


def all_to_all_rows(
    x_N: torch.Tensor,
    send_P: list[int],
    receive_P: list[int],
    axis: Axis,
    label: Label,
    wire: torch.dtype | None = None,
) -> torch.Tensor:
    """Sends `send_P[p]` consecutive rows to rank p and returns the rows received, by sender; differentiable.

    Rows may have any trailing shape. Zero rows anywhere are fine: every rank always makes the call, both ways.
    """
    (x_R,) = Crossing([(send_P, receive_P)], axis, label, wire).out(x_N)
    return x_R()


def _call(axis: Axis, label: Label, start: Callable[[], Any]) -> None:
    """One that is waited for at once."""
    axis.record.wait(axis.record.begin(label, axis.ranks, start))


def _of(axis: Axis) -> dict[str, Any]:
    """What every call of torch gets."""
    return {"group": axis.group, "async_op": True}


class Crossing:
    """Rows that travel to the ranks of an axis in pieces, one under way while another is used; differentiable.

    `out`, where the rows are one tensor here and come out in pieces, and `into`, where they are pieces here and come
    out as one, are each other's gradient. Autograd runs what was called last first, so all orders turn round by
    themselves: a piece's gradient leaves as soon as it is there, and is waited for where the forward piece left.
    """

    def __init__(
        self, pieces: list[tuple[list[int], list[int]]], axis: Axis, label: Label, wire: torch.dtype | None = None
    ) -> None:
        """Of each piece the rows to each rank, and from each. `wire`: a dtype that floating-point rows travel in."""
        self.pieces, self.axis, self.label, self.wire = pieces, axis, label, wire
        back = [(receive, send) for send, receive in pieces]
        self.there, self.back = _Way(self), _Way(self, back, (label[0], f"{label[1]}:grad"))

    def out(self, x_N: torch.Tensor) -> list[Callable[[], torch.Tensor]]:
        """All pieces leave. Each is waited for, and returned (R, ...), by a call."""
        return [partial(_Arrive.apply, sign, self, c) for c, sign in enumerate(_Depart.apply(x_N, self))]

    def into(self, c: int, x_R: torch.Tensor) -> torch.Tensor:
        """Piece c leaves. Returns a sign of it, for `whole`."""
        return _Leave.apply(x_R, self, c)

    def whole(self, signs: list[torch.Tensor]) -> torch.Tensor:
        """All pieces, one after the other (N, ...), waited for."""
        return _Land.apply(self, *signs)


class _Way:
    """One way across."""

    def __init__(self, crossing: Crossing, pieces: Any = None, label: Label | None = None) -> None:
        self.axis, self.wire = crossing.axis, crossing.wire
        self.pieces, self.label = pieces or crossing.pieces, label or crossing.label
        self.under_way: dict[int, Any] = {}
        self.got: torch.Tensor | None = None  # of all pieces

    def start(self, c: int, x_N: torch.Tensor) -> None:
        (send_P, receive_P), self.dtype = self.pieces[c], x_N.dtype
        if self.wire is not None and x_N.is_floating_point():
            x_N = x_N.to(self.wire)
        if self.got is None:
            self.got = empty(sum(sum(receive) for _, receive in self.pieces), *x_N.shape[1:], like=x_N)
        bytes_per_row = x_N.element_size() * x_N[:1].numel() if len(x_N) else 0
        self.axis.count(self.label, [n * bytes_per_row for n in send_P])
        x_N, x_R = x_N.contiguous(), self.got.split([sum(receive) for _, receive in self.pieces])[c]
        start = partial(dist.all_to_all_single, x_R, x_N, receive_P, send_P, **_of(self.axis))
        call = self.axis.record.begin(self.label, self.axis.ranks, start, send_P, receive_P)
        self.under_way[c] = call, x_N, x_R  # which live until then

    def start_all(self, x_N: torch.Tensor) -> None:
        for c, x in enumerate(x_N.split([sum(send) for send, _ in self.pieces])):
            self.start(c, x)

    def wait(self, c: int) -> torch.Tensor:
        call, _, x_R = self.under_way.pop(c)
        self.axis.record.wait(call)
        if not self.under_way:
            self.got = None
        return x_R.to(self.dtype)

    def wait_all(self) -> torch.Tensor:
        got = self.got
        assert got is not None
        for c in range(len(self.pieces)):
            self.wait(c)
        return got.to(self.dtype)


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_N: torch.Tensor, crossing: Crossing) -> tuple[torch.Tensor, ...]:
        ctx.crossing = crossing
        crossing.there.start_all(x_N)
        return tuple(x_N.new_empty(0) for _ in crossing.pieces)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *signs: torch.Tensor) -> tuple:
        return ctx.crossing.back.wait_all(), None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sign: torch.Tensor, crossing: Crossing, c: int) -> torch.Tensor:
        ctx.crossing, ctx.c = crossing, c
        return crossing.there.wait(c)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_R: torch.Tensor) -> tuple:
        ctx.crossing.back.start(ctx.c, grad_R[0])
        return grad_R[0].new_empty(0), None, None


class _Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_R: torch.Tensor, crossing: Crossing, c: int) -> torch.Tensor:
        ctx.crossing, ctx.c = crossing, c
        crossing.there.start(c, x_R)
        return x_R.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *sign: torch.Tensor) -> tuple:
        return ctx.crossing.back.wait(ctx.c), None, None


class _Land(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, crossing: Crossing, *signs: torch.Tensor) -> torch.Tensor:
        ctx.crossing = crossing
        return crossing.there.wait_all()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_N: torch.Tensor) -> tuple:
        ctx.crossing.back.start_all(grad_N[0])
        return None, *(grad_N[0].new_empty(0) for _ in ctx.crossing.pieces)


def sum_over(x: torch.Tensor, axis: Axis, label: Label | None = None) -> torch.Tensor:
    """In-place sum over the ranks of the axis; returns `x`. Not differentiable."""
    return _reduce(x, axis, label, dist.ReduceOp.SUM)


def any_over(x: torch.Tensor, axis: Axis, label: Label | None = None) -> torch.Tensor:
    """In place, the largest of each element over the ranks of the axis; returns `x`."""
    return _reduce(x, axis, label, dist.ReduceOp.MAX)


def _reduce(x: torch.Tensor, axis: Axis, label: Label | None, op: Any) -> torch.Tensor:
    if axis.size > 1:
        _call(axis, label or ("all ranks", "sum"), lambda: dist.all_reduce(x, op, **_of(axis)))
    if label:
        axis.count_ring(label, 2 * x.nbytes * (axis.size - 1) // axis.size)
    return x


def sum_to(x: torch.Tensor, axis: Axis, owner: int, label: Label) -> None:
    """In place on rank `owner` of the axis, the sum over its ranks; on the others `x` is of no use afterwards."""
    if axis.size > 1:
        _call(axis, label, lambda: dist.reduce(x, group_dst=owner, **_of(axis)))
        axis.count_ring(label, x.nbytes * (axis.size - 1) // axis.size)


def from_owner(x: torch.Tensor, axis: Axis, owner: int, label: Label) -> None:
    """In place, the `x` of rank `owner` of the axis, on each of its ranks."""
    if axis.size > 1:
        _call(axis, label, lambda: dist.broadcast(x, group_src=owner, **_of(axis)))
        axis.count_ring(label, x.nbytes * (axis.size - 1) // axis.size)


def shared_sum(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """Sum over ranks, from which every rank computes one and the same term of the loss.

    That term exists once, not once per rank, so its gradient goes back to each addend unchanged: backward is the
    identity, where a plain all-reduce would multiply it by the number of ranks.
    """
    return _SharedSum.apply(x, axis)


class _SharedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: Axis) -> torch.Tensor:
        return sum_over(x.clone(), axis)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad: torch.Tensor) -> tuple:
        return grad[0], None


def gather(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """The parts of all ranks of the axis, equal in shape, one after the other along the first dimension."""
    parts = [torch.empty_like(x) for _ in range(axis.size)]
    _call(axis, ("all ranks", "gather"), lambda: dist.all_gather(parts, x.contiguous(), **_of(axis)))
    return torch.cat(parts)


def from_owners(x: torch.Tensor, axis: Axis) -> torch.Tensor:
    """A value that every rank of the axis has, of which each uses a part of its own: backward sums over the ranks."""
    return _FromOwners.apply(x, axis)


class _FromOwners(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, axis: Axis) -> torch.Tensor:
        ctx.axis = axis
        return x.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad: torch.Tensor) -> tuple:
        return sum_over(grad[0].clone(), ctx.axis), None


class Sums:
    """What balance losses need of other ranks, on a mesh."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh

    def everyone(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over all ranks: every rank has tokens of its own."""
        return shared_sum(x, self.mesh.dp)

    def replicas(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks that hold the same experts: each got rows from an expert-parallel set of its own."""
        return shared_sum(x, self.mesh.edp)

    def owners(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks that together hold all experts."""
        return shared_sum(x, self.mesh.ep)

    def from_owners(self, x: torch.Tensor) -> torch.Tensor:
        """`x` itself, of which each owner uses the part of its own experts."""
        return from_owners(x, self.mesh.ep)


def meet() -> None:
    """Waits until all ranks are here, for as long as it takes."""
    from_main(lambda: None)


def from_main(make: Callable[[], T], group: Group | None = None) -> T:
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


def from_all(mine: T, group: Group) -> list[T]:
    """What each rank of the group has (any picklable object), in the order of ranks, on every rank."""
    told: list[Any] = [None] * group.size()
    dist.all_gather_object(told, mine, group=group)
    return told
