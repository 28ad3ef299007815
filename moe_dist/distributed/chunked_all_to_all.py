"""Differentiable all-to-all in chunks."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from moe_dist.distributed.buffer_pool import pooled_empty
from moe_dist.distributed.collectives import _call_options
from moe_dist.distributed.labels import CommLabel
from moe_dist.distributed.mesh import Axis


def all_to_all_rows(
    x_N: torch.Tensor,
    send_P: list[int],
    receive_P: list[int],
    axis: Axis,
    label: CommLabel,
    comm_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Sends `send_P[p]` consecutive rows to rank p and returns the rows received, by sender; differentiable.

    Rows may have any trailing shape. Zero rows anywhere are fine: every rank always makes the call, both ways.
    """
    (x_R,) = ChunkedAllToAll([(send_P, receive_P)], axis, label, comm_dtype).scatter(x_N)
    return x_R()


class ChunkedAllToAll:
    """Rows that travel to the ranks of an axis in pieces, one under way while another is used; differentiable.

    `out`, where the rows are one tensor here and come out in pieces, and `into`, where they are pieces here and come
    out as one, are each other's gradient. Autograd runs what was called last first, so all orders turn round by
    themselves: a piece's gradient leaves as soon as it is there, and is waited for where the forward piece left.
    """

    def __init__(
        self,
        chunks: list[tuple[list[int], list[int]]],
        axis: Axis,
        label: CommLabel,
        comm_dtype: torch.dtype | None = None,
    ) -> None:
        """Of each piece the rows to each rank, and from each. `wire`: a dtype that floating-point rows travel in."""
        self.chunks, self.axis, self.label, self.comm_dtype = chunks, axis, label, comm_dtype
        back = [(receive, send) for send, receive in chunks]
        self.forward_direction, self.backward_direction = (
            _Direction(self),
            _Direction(self, back, label.backward()),
        )

    def scatter(self, x_N: torch.Tensor) -> list[Callable[[], torch.Tensor]]:
        """All pieces leave. Each is waited for, and returned (R, ...), by a call."""
        return [
            partial(_WaitChunk.apply, sign, self, c)
            for c, sign in enumerate(_StartScatter.apply(x_N, self))
        ]

    def send_chunk(self, c: int, x_R: torch.Tensor) -> torch.Tensor:
        """Piece c leaves. Returns a sign of it, for `whole`."""
        return _StartChunk.apply(x_R, self, c)

    def gather(self, signs: list[torch.Tensor]) -> torch.Tensor:
        """All pieces, one after the other (N, ...), waited for."""
        return _WaitAll.apply(self, *signs)


class _Direction:
    """One way across."""

    def __init__(
        self, crossing: ChunkedAllToAll, pieces: Any = None, label: CommLabel | None = None
    ) -> None:
        self.axis, self.comm_dtype = crossing.axis, crossing.comm_dtype
        self.chunks, self.label = pieces or crossing.chunks, label or crossing.label
        self.in_flight: dict[int, Any] = {}
        self.received: torch.Tensor | None = None  # of all pieces

    def start(self, c: int, x_N: torch.Tensor) -> None:
        (send_P, receive_P), self.dtype = self.chunks[c], x_N.dtype
        if self.comm_dtype is not None and x_N.is_floating_point():
            x_N = x_N.to(self.comm_dtype)
        if self.received is None:
            self.received = pooled_empty(
                sum(sum(receive) for _, receive in self.chunks), *x_N.shape[1:], like=x_N
            )
        bytes_per_row = x_N.element_size() * x_N[:1].numel() if len(x_N) else 0
        self.axis.record_bytes(self.label, [n * bytes_per_row for n in send_P])
        x_N, x_R = (
            x_N.contiguous(),
            self.received.split([sum(receive) for _, receive in self.chunks])[c],
        )
        start = partial(
            dist.all_to_all_single, x_R, x_N, receive_P, send_P, **_call_options(self.axis)
        )
        call = self.axis.flight_recorder.start_call(
            self.label, self.axis.ranks, start, send_P, receive_P
        )
        self.in_flight[c] = call, x_N, x_R  # which live until then

    def start_all(self, x_N: torch.Tensor) -> None:
        for c, x in enumerate(x_N.split([sum(send) for send, _ in self.chunks])):
            self.start(c, x)

    def wait(self, c: int) -> torch.Tensor:
        call, _, x_R = self.in_flight.pop(c)
        self.axis.flight_recorder.wait_for(call)
        if not self.in_flight:
            self.received = None
        return x_R.to(self.dtype)

    def wait_all(self) -> torch.Tensor:
        got = self.received
        assert got is not None
        for c in range(len(self.chunks)):
            self.wait(c)
        return got.to(self.dtype)


class _StartScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_N: torch.Tensor, crossing: ChunkedAllToAll) -> tuple[torch.Tensor, ...]:
        ctx.crossing = crossing
        crossing.forward_direction.start_all(x_N)
        return tuple(x_N.new_empty(0) for _ in crossing.chunks)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *signs: torch.Tensor) -> tuple:
        return ctx.crossing.backward_direction.wait_all(), None


class _WaitChunk(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sign: torch.Tensor, crossing: ChunkedAllToAll, c: int) -> torch.Tensor:
        ctx.crossing, ctx.c = crossing, c
        return crossing.forward_direction.wait(c)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_R: torch.Tensor) -> tuple:
        ctx.crossing.backward_direction.start(ctx.c, grad_R[0])
        return grad_R[0].new_empty(0), None, None


class _StartChunk(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_R: torch.Tensor, crossing: ChunkedAllToAll, c: int) -> torch.Tensor:
        ctx.crossing, ctx.c = crossing, c
        crossing.forward_direction.start(c, x_R)
        return x_R.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *sign: torch.Tensor) -> tuple:
        return ctx.crossing.backward_direction.wait(ctx.c), None, None


class _WaitAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, crossing: ChunkedAllToAll, *signs: torch.Tensor) -> torch.Tensor:
        ctx.crossing = crossing
        return crossing.forward_direction.wait_all()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_N: torch.Tensor) -> tuple:
        ctx.crossing.backward_direction.start_all(grad_N[0])
        return None, *(grad_N[0].new_empty(0) for _ in ctx.crossing.chunks)
