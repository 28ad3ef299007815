"""Delays weight gradients until the gradients of the rows have been sent.

In backward, other ranks need the gradients of the rows, and no rank needs the gradients of this
rank's expert weights. So the weight gradients are computed while the rows' gradients travel, which
hides the all-to-all behind them (Lancet, Jiang et al. 2024; Megatron-Core's `delay_wgrad_compute`).

    forward    start dispatch ... split weights ... chunk 0 arrives, runs ... chunk 1 arrives, runs
    ... backward   ... wait for rows  <- form dW here <- send dx of chunk 0 <- ... <- send dx of
    chunk 1

Autograd runs the nodes of a graph in the reverse order of their creation. The weights are split
(`_SplitStacks`) after the rows' dispatch has started and before the first chunk arrives. Its
backward therefore runs after the last gradient of the rows has been sent and before any is waited
for.

Legend: e experts on this rank, along the first dimension of each stack of weights.
"""

from collections.abc import Callable
from typing import Any

import torch

from moe_dist.distributed.buffer_pool import pooled_empty

# grad_fn(out) -> the gradient of one chunk of a stack of weights, written to `out` unless it is
# None
GradFn = Callable[[torch.Tensor | None], torch.Tensor]
# defer(s, grad_fn): the gradient of this chunk of stack s is `grad_fn`'s, to be computed later
DeferGrad = Callable[[int, GradFn], None]


class DelayedWeightGrads:
    """Stacks of expert weights, split into chunks whose gradients may be computed later.

    Attributes:
        sizes: Number of experts in each chunk.
        num_stacks: Number of stacks.
        deferred: (chunk, stack) -> the backward pass that deferred it, and the function to call.
    """

    def __init__(self, sizes: list[int], *stacks: torch.Tensor) -> None:
        """Splits the stacks.

        Args:
            sizes: Number of experts in each chunk.
            *stacks: Weights with this rank's experts along the first dimension.
        """
        self.sizes = sizes
        self.num_stacks = len(stacks)
        self.deferred: dict[tuple[int, int], tuple[int, GradFn]] = {}
        self._chunks: tuple[torch.Tensor, ...] = _SplitStacks.apply(self, *stacks)

    def chunk(self, c: int) -> tuple[torch.Tensor, ...]:
        """Returns chunk `c` of every stack."""
        return self._chunks[c * self.num_stacks : (c + 1) * self.num_stacks]

    def defer(self, c: int, s: int, grad_fn: GradFn) -> None:
        """Registers, in backward, a function that computes the gradient of `chunk(c)[s]` later."""
        self.deferred[c, s] = (_graph_task_id(), grad_fn)


# FENCE. `torch._C._current_graph_task_id` is private; tried with torch 2.11 and 2.13, held by
# test_overlap.py and test_experts.py. It tells backward passes apart: a gradient that was
# deferred in a backward pass that never reached the stacks (it was stopped, or needed no weights)
# must not be used by a later one.
def _graph_task_id() -> int:
    """Returns the number of the backward pass that is running."""
    return torch._C._current_graph_task_id()


class _SplitStacks(torch.autograd.Function):
    """Splits stacks into chunks; its backward computes the gradients that were deferred."""

    @staticmethod
    def forward(
        ctx: Any, owner: DelayedWeightGrads, *stacks: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Returns all stacks of chunk 0, then all of chunk 1, and so on; views."""
        ctx.set_materialize_grads(False)
        # not `owner` itself: its chunks hold this node, and Python's garbage collector does not see
        # a reference cycle through C++
        ctx.deferred = owner.deferred
        ctx.sizes = owner.sizes
        ctx.stacks = stacks
        split_stacks = [stack.split(owner.sizes) for stack in stacks]
        chunks: list[torch.Tensor] = []
        for c in range(len(owner.sizes)):
            chunks += [split[c] for split in split_stacks]
        return tuple(chunks)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple:
        """Returns the gradient of every stack, assembled from its chunks."""
        stack_grads = [_stack_grad(ctx, s, grads) for s in range(len(ctx.stacks))]
        return None, *stack_grads


def _stack_grad(ctx: Any, s: int, grads: tuple[torch.Tensor | None, ...]) -> torch.Tensor:
    """Returns the gradient of stack `s`, from accumulated and from deferred gradients."""
    stack = ctx.stacks[s]
    num_stacks = len(ctx.stacks)
    if len(ctx.sizes) == 1:
        grad_fn = _take_deferred(ctx.deferred, 0, s)
        if grad_fn is not None:
            return grad_fn(None)
        grad = grads[s]
        return torch.zeros_like(stack) if grad is None else grad
    whole = pooled_empty(*stack.shape, like=stack)
    for c, chunk in enumerate(whole.split(ctx.sizes)):
        grad_fn = _take_deferred(ctx.deferred, c, s)
        grad = grads[c * num_stacks + s]
        if grad_fn is not None:
            grad_fn(chunk)
        elif grad is not None:
            chunk.copy_(grad)
        else:
            chunk.zero_()
    return whole


def _take_deferred(
    deferred: dict[tuple[int, int], tuple[int, GradFn]], c: int, s: int
) -> GradFn | None:
    """Removes and returns a chunk's deferred function, None if there is none."""
    task_id, grad_fn = deferred.pop((c, s), (None, None))
    return grad_fn if task_id == _graph_task_id() else None
