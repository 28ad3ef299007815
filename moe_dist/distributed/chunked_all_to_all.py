"""Differentiable all-to-all in chunks."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from moe_dist.distributed.buffer_pool import empty
from moe_dist.distributed.collectives import Label, _of
from moe_dist.distributed.mesh import Axis


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
