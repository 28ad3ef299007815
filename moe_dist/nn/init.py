"""Parameters that know how they start, so that every layout starts from the same weights.

Legend: a stacked parameter has experts (global ids) along its first dimension.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from moe_dist.nn import prng

ELEMENTS_PER_CHUNK = 2**22


def uniform_parameter(*shape: int, bound: float) -> nn.Parameter:
    """A parameter of `shape`, not yet filled, that `init_parameter` draws from U(-bound, bound)."""
    return set_init_bound(nn.Parameter(torch.empty(*shape)), bound)


def set_init_bound(p: Any, bound: float) -> nn.Parameter:
    """Tells `init_parameter` the bound of a parameter that another library made."""
    p.init_bound = bound
    return p


def init_bounds(model: nn.Module) -> dict[str, float]:
    """The bound of every parameter, by name."""
    named: Iterable[tuple[str, Any]] = model.named_parameters()
    return {name: p.init_bound for name, p in named}


@torch.no_grad()
def init_parameter(
    p: nn.Parameter, name: str, bound: float, seed: int, expert_ids: range | None = None
) -> None:
    """Fills `p` in place, keyed by (seed, name), and by the global expert id where it is a stack of experts.

    `expert_ids`: global ids along the first dimension, None for a parameter that is not stacked.
    """
    parts = (
        [(p, (name,))]
        if expert_ids is None
        else [(p[i], (name, e)) for i, e in enumerate(expert_ids)]
    )
    for part, key in parts:
        generator = prng.generator(seed, *key)
        for chunk in part.view(-1).split(ELEMENTS_PER_CHUNK):  # in float64, whatever `p` is
            drawn = torch.empty(chunk.shape, dtype=torch.float64)
            chunk.copy_(drawn.uniform_(-bound, bound, generator=generator))
