"""Parameters that know how they start, so that every layout starts from the same weights.

Legend: a stacked parameter has experts (global ids) along its first dimension.
"""

from collections.abc import Iterable

import torch
from torch import nn

from moe_dist import keyed


def parameter(*shape: int, bound: float) -> nn.Parameter:
    """A parameter of `shape`, not yet filled, that `initialize` draws from U(-bound, bound)."""
    return with_bound(nn.Parameter(torch.empty(*shape)), bound)


def with_bound(p: nn.Parameter, bound: float) -> nn.Parameter:
    """Tells `initialize` the bound of a parameter that another library made."""
    p.init_bound = bound  # type: ignore[attr-defined]
    return p


def initialize(named: Iterable[tuple[str, nn.Parameter]], seed: int, expert_ids: range | None = None) -> None:
    """Fills parameters in place, keyed by (seed, name), and by the global expert id where they are stacked experts.

    `expert_ids`: global ids of the rows of the first dimension, None for parameters that are not stacked.
    """
    for name, p in named:
        bound = p.init_bound  # type: ignore[attr-defined]
        rows = [(p, (seed, name))] if expert_ids is None else [(p[i], (seed, name, e)) for i, e in enumerate(expert_ids)]
        for part, key in rows:
            drawn = torch.empty(part.shape, dtype=torch.float64)
            part.detach().copy_(drawn.uniform_(-bound, bound, generator=keyed.generator(*key)))
