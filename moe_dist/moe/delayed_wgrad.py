"""Gradients of weights that wait until those of the rows have left.

In backward other ranks wait for the gradients of rows, and nobody for those of weights: these are formed while rows
travel (Lancet, Jiang et al. 2024). Autograd runs what was called last first. So weights that are sliced after the rows
departed, and before the first of them arrived, get their gradients between the two in reverse: when the rows' last
gradients have left, and before they are waited for.

Legend: e experts of this rank, along the first dimension of each stack.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from moe_dist.distributed.buffer_pool import pooled_empty

# form(out) -> the gradient of one part of a stack, in `out` where that is given
GradFn = Callable[[torch.Tensor | None], torch.Tensor]
DeferGrad = Callable[[int, GradFn], None]  # defer(s, form): of stack s


@dataclass(frozen=True)
class ExpertChunk:
    """Some experts of a module, called as the module is (`dispatch.exchange.ExpertModule`)."""

    run: Callable[..., tuple[torch.Tensor, Any]]
    needs_context: bool

    def __call__(self, x_TD: torch.Tensor, routing: Any, ctx: Any) -> tuple[torch.Tensor, Any]:
        return self.run(x_TD, routing, ctx)


class DelayedWeightGrads:
    """Stacks in consecutive parts, whose gradients may be put off."""

    def __init__(self, sizes: list[int], *stacks: torch.Tensor) -> None:
        """`sizes`: of the parts, in experts."""
        self.sizes, self.num_stacks = sizes, len(stacks)
        self.deferred: dict[
            tuple[int, int], tuple[int, GradFn]
        ] = {}  # part, stack -> of which backward, form
        self.slices: tuple[torch.Tensor, ...] = _SplitStacks.apply(self, *stacks)

    def chunk(self, i: int) -> tuple[torch.Tensor, ...]:
        """Of every stack."""
        return self.slices[i * self.num_stacks : (i + 1) * self.num_stacks]

    def defer(self, i: int, s: int, form: GradFn) -> None:
        """To be called in backward in place of returning the gradient of `part(i)[s]`."""
        self.deferred[i, s] = _graph_task_id(), form


def _graph_task_id() -> int:
    """Which one is running: what an earlier one put off, that never came as far as the stacks, is not a later one's."""
    return torch._C._current_graph_task_id()


class _SplitStacks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, later: DelayedWeightGrads, *stacks: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        # not `later` itself: its slices hold this node, and Python does not see a cycle through C++
        ctx.forms, ctx.sizes, ctx.number, ctx.stacks = (
            later.deferred,
            later.sizes,
            later.num_stacks,
            stacks,
        )
        return tuple(
            t for part in zip(*(s.split(later.sizes) for s in stacks), strict=True) for t in part
        )

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple:
        wholes = []
        for s, stack in enumerate(ctx.stacks):
            whole = pooled_empty(*stack.shape, like=stack) if len(ctx.sizes) > 1 else None
            for i, part in enumerate([None] if whole is None else whole.split(ctx.sizes)):
                grad, (backward, form) = (
                    grads[i * ctx.number + s],
                    ctx.forms.pop((i, s), (None, None)),
                )
                if backward == _graph_task_id():
                    grad = form(part)
                elif grad is None:
                    grad = torch.zeros_like(stack) if part is None else part.zero_()
                elif part is not None:
                    part.copy_(grad)
            wholes.append(grad if whole is None else whole)
        return None, *wholes
