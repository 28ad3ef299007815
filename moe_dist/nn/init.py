"""Initial weights that follow from a parameter's name and, for experts, the global expert id.

Every layout therefore starts from the same weights. A parameter stores the bound of its uniform
distribution as the attribute `init_bound`; `engine.parallelize` fills it.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from moe_dist.nn import prng

ELEMENTS_PER_CHUNK = 2**22


def uniform_parameter(*shape: int, bound: float) -> nn.Parameter:
    """Returns an unfilled parameter; `init_parameter` draws it from U(-bound, bound)."""
    return set_init_bound(nn.Parameter(torch.empty(*shape)), bound)


def set_init_bound(p: Any, bound: float) -> nn.Parameter:
    """Sets the bound of a parameter, also of one that a library created, and returns it."""
    p.init_bound = bound
    return p


def init_bounds(model: nn.Module) -> dict[str, float]:
    """Returns the bound of every parameter by name."""
    named: Iterable[tuple[str, Any]] = model.named_parameters()
    return {name: p.init_bound for name, p in named}


@torch.no_grad()
def init_parameter(
    p: nn.Parameter, name: str, bound: float, seed: int, expert_ids: range | None = None
) -> None:
    """Fills a parameter in place.

    Args:
        p: The parameter.
        name: Its name in the model, a part of the key.
        bound: Bound of the uniform distribution.
        seed: Seed of the run, a part of the key.
        expert_ids: Global ids along the first dimension, a part of the key. None: it is not
            stacked.
    """
    if expert_ids is None:
        _fill(p, bound, seed, name)
        return
    for i, expert_id in enumerate(expert_ids):
        _fill(p[i], bound, seed, name, expert_id)


def _fill(x: torch.Tensor, bound: float, *key: int | str) -> None:
    """Draws a tensor from U(-bound, bound) in float64, whatever its dtype."""
    generator = prng.generator(*key)
    for chunk in x.view(-1).split(ELEMENTS_PER_CHUNK):
        drawn = torch.empty(chunk.shape, dtype=torch.float64)
        chunk.copy_(drawn.uniform_(-bound, bound, generator=generator))
