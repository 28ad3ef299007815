"""Differentiable all-to-all in chunks, so that one chunk travels while the experts run on another.

A `ChunkedAllToAll` sends rows in C chunks, each with an asynchronous all-to-all. An MoE layer has
two of them:

    dispatch.scatter      splits one tensor and starts all chunks; each is waited for when needed
    combine.send_chunk    starts one chunk as soon as the experts have computed it
    combine.gather        waits for all chunks, which form one tensor

`scatter` and `send_chunk` + `gather` are each other's gradient. A row's gradient returns to its
sender, in the same chunk. So backward needs no separate schedule: it is the forward pass, mirrored.

A layer's timeline with C = 2 chunks: "+" starts a chunk's all-to-all, "-" waits for it, and the bar
between them is the transfer. E0 and E1 are the experts' forward on each chunk, D0 and D1 their
input rows' gradients, W their weight gradients (`moe.delayed_wgrad`):

    forward, time from left to right
      dispatch 0           +=========-
      dispatch 1                +==============-
      experts                          E0        E1
      combine 0                           +==============-
      combine 1                                     +=========-
      events               +d0  +d1  -d0  +c0  -d1  +c1  -c0  -c1

    backward
      combine_backward 0   +===================-
      combine_backward 1        +====-
      experts                          D1        D0      W
      dispatch_backward 1                 +========================-
      dispatch_backward 0                           +=========-
      events               +c0  +c1  -c1  +d1  -c0  +d0  W    -d0  -d1

Legend: N rows sent by this rank, R rows received, P ranks on the axis, C chunks.

FENCE: do not reorder the autograd function calls in this file or in the dispatchers.
The backward timeline relies on two autograd properties:
  - Among the ready nodes, the engine runs the one created last in forward. So every rank starts
    backward with chunk C - 1. Ranks that start collectives in different orders would deadlock.
  - A node runs only after all users of its outputs. Only for this reason, the functions return
    empty tensors ("order tokens"): they carry no data, they are graph edges that keep a wait behind
    its start.
Tried with torch 2.13; tests/distributed/test_overlap.py holds the order of events
(test_chunks_overlap_experts_and_wgrads_run_last).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.autograd.function import once_differentiable

from moe_dist.distributed.buffer_pool import pooled_empty
from moe_dist.distributed.collectives import call_options
from moe_dist.distributed.flight_recorder import CollectiveCall
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
    """Exchanges rows between an axis's ranks; differentiable.

    Every rank must make the call, even with zero rows to send or to receive. Backward is an
    all-to-all too.

    Args:
        x_N: Rows sorted by destination rank, (N, ...).
        send_P: Rows for each rank.
        receive_P: Rows from each rank.
        axis: The participating ranks.
        label: Name for the flight recorder and the byte counts.
        comm_dtype: Wire dtype for floating-point rows; None: `x_N`'s dtype.

    Returns:
        The received rows by sender, (R, ...), in `x_N`'s dtype.
    """
    (wait,) = ChunkedAllToAll([(send_P, receive_P)], axis, label, comm_dtype).scatter(x_N)
    return wait()


class ChunkedAllToAll:
    """An all-to-all in chunks: either `scatter`, or `send_chunk` for each chunk and then `gather`.

    Create a new instance for each forward pass and its backward pass. The module docstring has a
    timeline.
    """

    def __init__(
        self,
        chunks: list[tuple[list[int], list[int]]],
        axis: Axis,
        label: CommLabel,
        comm_dtype: torch.dtype | None = None,
    ) -> None:
        """Prepares the transfer; nothing is sent yet.

        Args:
            chunks: For each chunk, the number of rows sent to each rank and received from each
                rank.
            axis: The participating ranks.
            label: Name for the forward calls; backward calls have `label.backward()`.
            comm_dtype: Wire dtype for floating-point rows; None: the rows' dtype.
        """
        backward_chunks = [(receive_P, send_P) for send_P, receive_P in chunks]
        self.num_chunks = len(chunks)
        self.forward_direction = _Direction(chunks, axis, label, comm_dtype)
        self.backward_direction = _Direction(backward_chunks, axis, label.backward(), comm_dtype)

    def scatter(self, x_N: torch.Tensor) -> list[Callable[[], torch.Tensor]]:
        """Splits rows into chunks and starts all of them.

        Args:
            x_N: Rows sorted by chunk, then by destination rank, (N, ...).

        Returns:
            For each chunk, a function that waits for it and returns its rows by sender, (R, ...).
            Call each function once.
        """
        tokens = _StartScatter.apply(x_N, self)
        return [partial(_WaitChunk.apply, token, self, c) for c, token in enumerate(tokens)]

    def send_chunk(self, c: int, x_N: torch.Tensor) -> torch.Tensor:
        """Starts one chunk's all-to-all.

        Args:
            c: Chunk index.
            x_N: Its rows by destination rank, (N, ...).

        Returns:
            An order token: an empty tensor to keep the call's place in the autograd graph; pass
                it to `gather`.
        """
        return _StartChunk.apply(x_N, self, c)

    def gather(self, tokens: list[torch.Tensor]) -> torch.Tensor:
        """Waits for all chunks.

        Args:
            tokens: Each `send_chunk` call's order token, by chunk.

        Returns:
            The received rows by chunk, then by sender, (R, ...).
        """
        return _WaitAll.apply(self, *tokens)


@dataclass
class _ChunkInFlight:
    """A started all-to-all. It keeps both buffers alive until the wait."""

    call: CollectiveCall
    sent_N: torch.Tensor
    received_R: torch.Tensor


class _Direction:
    """The all-to-all calls in one direction, forward or backward, without autograd."""

    def __init__(
        self,
        chunks: list[tuple[list[int], list[int]]],
        axis: Axis,
        label: CommLabel,
        comm_dtype: torch.dtype | None,
    ) -> None:
        self.chunks = chunks
        self.axis = axis
        self.label = label
        self.comm_dtype = comm_dtype
        self.sent_rows_C = [sum(send_P) for send_P, _ in chunks]
        self.received_rows_C = [sum(receive_P) for _, receive_P in chunks]
        self.dtype: torch.dtype | None = None  # the rows' dtype before the cast to comm_dtype
        self.in_flight: dict[int, _ChunkInFlight] = {}
        self.received: torch.Tensor | None = None  # one buffer for all chunks' rows

    def start(self, c: int, x_N: torch.Tensor) -> None:
        """Starts chunk `c`'s all-to-all."""
        send_P, receive_P = self.chunks[c]
        self.dtype = x_N.dtype
        if self.comm_dtype is not None and x_N.is_floating_point():
            x_N = x_N.to(self.comm_dtype)
        if self.received is None:
            self.received = pooled_empty(sum(self.received_rows_C), *x_N.shape[1:], like=x_N)
        bytes_per_row = x_N.element_size() * x_N[:1].numel() if len(x_N) else 0
        self.axis.record_bytes(self.label, [rows * bytes_per_row for rows in send_P])
        x_N = x_N.contiguous()
        x_R = self.received.split(self.received_rows_C)[c]
        start = partial(
            dist.all_to_all_single, x_R, x_N, receive_P, send_P, **call_options(self.axis)
        )
        call = self.axis.flight_recorder.start_call(
            self.label, self.axis.ranks, start, send_P, receive_P
        )
        self.in_flight[c] = _ChunkInFlight(call, x_N, x_R)

    def start_all(self, x_N: torch.Tensor) -> None:
        """Starts all chunks; the rows are sorted by chunk."""
        for c, chunk_N in enumerate(x_N.split(self.sent_rows_C)):
            self.start(c, chunk_N)

    def wait(self, c: int) -> torch.Tensor:
        """Waits for chunk `c` and returns its rows by sender, (R, ...)."""
        chunk = self.in_flight.pop(c)
        self.axis.flight_recorder.wait_for(chunk.call)
        if not self.in_flight:
            self.received = None
        return chunk.received_R.to(self.dtype)

    def wait_all(self) -> torch.Tensor:
        """Waits for all chunks and returns their rows by chunk, then by sender, (R, ...)."""
        received = self.received
        assert received is not None
        for c in range(len(self.chunks)):
            self.wait(c)
        return received.to(self.dtype)


class _StartScatter(torch.autograd.Function):
    """Forward starts all chunks; backward waits for all gradients."""

    @staticmethod
    def forward(ctx: Any, x_N: torch.Tensor, exchange: ChunkedAllToAll) -> tuple[torch.Tensor, ...]:
        ctx.exchange = exchange
        exchange.forward_direction.start_all(x_N)
        return tuple(x_N.new_empty(0) for _ in range(exchange.num_chunks))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *token_grads: torch.Tensor) -> tuple:
        return ctx.exchange.backward_direction.wait_all(), None


class _WaitChunk(torch.autograd.Function):
    """Forward waits for one chunk; backward starts its gradient."""

    @staticmethod
    def forward(ctx: Any, token: torch.Tensor, exchange: ChunkedAllToAll, c: int) -> torch.Tensor:
        ctx.exchange = exchange
        ctx.c = c
        return exchange.forward_direction.wait(c)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads_R: torch.Tensor) -> tuple:
        (grad_R,) = grads_R
        ctx.exchange.backward_direction.start(ctx.c, grad_R)
        return grad_R.new_empty(0), None, None


class _StartChunk(torch.autograd.Function):
    """Forward starts one chunk; backward waits for its gradient."""

    @staticmethod
    def forward(ctx: Any, x_N: torch.Tensor, exchange: ChunkedAllToAll, c: int) -> torch.Tensor:
        ctx.exchange = exchange
        ctx.c = c
        exchange.forward_direction.start(c, x_N)
        return x_N.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *token_grads: torch.Tensor) -> tuple:
        return ctx.exchange.backward_direction.wait(ctx.c), None, None


class _WaitAll(torch.autograd.Function):
    """Forward waits for all chunks; backward starts all gradients."""

    @staticmethod
    def forward(ctx: Any, exchange: ChunkedAllToAll, *tokens: torch.Tensor) -> torch.Tensor:
        ctx.exchange = exchange
        return exchange.forward_direction.wait_all()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads_R: torch.Tensor) -> tuple:
        (grad_R,) = grads_R
        ctx.exchange.backward_direction.start_all(grad_R)
        return None, *(grad_R.new_empty(0) for _ in range(ctx.exchange.num_chunks))
