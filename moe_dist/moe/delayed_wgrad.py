"""Delays weight gradients until the row gradients have been sent.

In backward, other ranks need this rank's row gradients, but not its expert-weight gradients. So
the weight gradients are computed while the row gradients travel, which hides the all-to-all
(Lancet, Jiang et al. 2024; Megatron-Core's `delay_wgrad_compute`).

Autograd runs nodes in the reverse order of their creation. The dispatcher therefore splits the
weights (`_SplitStacks`) between the start of the dispatch and the first wait. Each line below is
one step in forward and its counterpart in backward:

    forward, read downward                 backward, read upward
    start the dispatch of all chunks       wait for the row gradients of all chunks
    split the weights                      compute dW, while the row gradients travel
    wait for chunk 0, run its experts      compute dx of chunk 0, start to send it
    wait for chunk 1, run its experts      compute dx of chunk 1, start to send it

`distributed.chunked_all_to_all` has the timeline with the collectives.

Legend: e experts on this rank, along the first dimension of each weight stack.
"""

from collections.abc import Callable
from typing import Any

import torch

from moe_dist.distributed.buffer_pool import pooled_empty

# grad_fn(out) -> the gradient for one chunk of a weight stack, written to `out` if that is given
GradFn = Callable[[torch.Tensor | None], torch.Tensor]
# defer(s, grad_fn): registers `grad_fn`, to compute the gradient for this chunk of stack s later
DeferGrad = Callable[[int, GradFn], None]


class DelayedWeightGrads:
    """Expert weight stacks, split into chunks whose gradients can be computed later.

    Attributes:
        sizes: Experts per chunk.
        num_stacks: Number of stacks.
        deferred: (chunk, stack) -> (id of the backward pass, `grad_fn`).
    """

    def __init__(self, sizes: list[int], *stacks: torch.Tensor) -> None:
        """Splits the stacks.

        Args:
            sizes: Experts per chunk.
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
        """Registers, in backward, `grad_fn`, to compute the gradient of `chunk(c)[s]` later."""
        self.deferred[c, s] = (_graph_task_id(), grad_fn)


# FENCE. `torch._C._current_graph_task_id` is private; tried with torch 2.11 and 2.13, held by
# test_overlap.py and test_experts.py. It distinguishes backward passes: if a pass deferred
# a gradient but never reached the stacks (it was stopped, or needed no weights), a later pass must
# not use that gradient.
def _graph_task_id() -> int:
    """Returns the id of the running backward pass."""
    return torch._C._current_graph_task_id()


class _SplitStacks(torch.autograd.Function):
    """Splits stacks into chunks; its backward computes the deferred gradients."""

    @staticmethod
    def forward(
        ctx: Any, owner: DelayedWeightGrads, *stacks: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Returns views: chunk 0 of all stacks, then chunk 1 of all stacks, and so on."""
        ctx.set_materialize_grads(False)
        # `owner` itself is not stored: its chunks hold this node, and Python's garbage collector
        # does not see a reference cycle through C++
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
        """Returns every stack's gradient, assembled from its chunks."""
        stack_grads = [_stack_grad(ctx, s, grads) for s in range(len(ctx.stacks))]
        return None, *stack_grads


def _stack_grad(ctx: Any, s: int, grads: tuple[torch.Tensor | None, ...]) -> torch.Tensor:
    """Returns stack `s`'s gradient, from its chunks' deferred or accumulated gradients."""
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
    """Removes and returns a chunk's `grad_fn`, None if this backward pass has deferred none."""
    task_id, grad_fn = deferred.pop((c, s), (None, None))
    return grad_fn if task_id == _graph_task_id() else None
