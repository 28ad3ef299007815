"""Gradients of weights that wait until those of the rows have left.

In backward other ranks wait for the gradients of rows, and nobody for those of weights: these are formed while rows
travel (Lancet, Jiang et al. 2024). Autograd runs what was called last first. So weights that are sliced after the rows
departed, and before the first of them arrived, get their gradients between the two in reverse: when the rows' last
gradients have left, and before they are waited for.

Legend: e experts of this rank, along the first dimension of each stack.
"""

from collections.abc import Callable
from typing import Any

import torch

from moe_dist.memory import empty

Form = Callable[..., None]  # form(*gradients): writes those of one part of every stack
PutOff = Callable[[Form], None]


class Later:
    """Stacks in consecutive parts, whose gradients are put off."""

    def __init__(self, sizes: list[int], *stacks: torch.Tensor) -> None:
        """`sizes`: of the parts, in experts."""
        self.sizes, self.number = sizes, len(stacks)
        self.forms: dict[int, Form] = {}
        self.slices: tuple[torch.Tensor, ...] = _Slices.apply(self, *stacks)

    def part(self, i: int) -> tuple[torch.Tensor, ...]:
        """Of every stack."""
        return self.slices[i * self.number : (i + 1) * self.number]

    def put_off(self, i: int, form: Form) -> None:
        """To be called in backward in place of returning gradients of `part(i)`."""
        self.forms[i] = form


class _Slices(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, later: Later, *stacks: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        # not `later` itself: its slices hold this node, and Python does not see a cycle through C++
        ctx.forms, ctx.sizes, ctx.number, ctx.stacks = later.forms, later.sizes, later.number, stacks
        return tuple(t for part in zip(*(s.split(later.sizes) for s in stacks), strict=True) for t in part)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple:
        wholes = [empty(*s.shape, like=s) for s in ctx.stacks]
        for i, parts in enumerate(zip(*(w.split(ctx.sizes) for w in wholes), strict=True)):
            if form := ctx.forms.pop(i, None):
                form(*parts)
                continue
            for part, grad in zip(parts, grads[i * ctx.number : (i + 1) * ctx.number], strict=True):
                part.zero_() if grad is None else part.copy_(grad)
        return None, *wholes
