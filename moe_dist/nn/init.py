"""Initial weights, drawn from a key: seed, parameter name and, for experts, global expert id.

Every layout therefore starts from the same weights. A parameter's attribute `init_bound` is the
bound of its uniform distribution; `engine.parallelize` draws the weights.
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
    """Sets a parameter's `init_bound`, also if a library created it, and returns the parameter."""
    p.init_bound = bound
    return p


def init_bounds(model: nn.Module) -> dict[str, float]:
    """Returns each parameter's bound by name."""
    named: Iterable[tuple[str, Any]] = model.named_parameters()
    return {name: p.init_bound for name, p in named}


@torch.no_grad()
def init_parameter(
    p: nn.Parameter, name: str, bound: float, seed: int, expert_ids: range | None = None
) -> None:
    """Fills a parameter in place with random numbers that depend only on the key.

    Args:
        p: The parameter.
        name: Its name in the model, a part of the key.
        bound: The numbers are drawn from U(-bound, bound).
        seed: The run's seed, a part of the key.
        expert_ids: Global expert ids along the first dimension; each is a part of its slice's key.
            None: the parameter is not a stack of experts.
    """
    if expert_ids is None:
        _fill(p, bound, seed, name)
        return
    for i, expert_id in enumerate(expert_ids):
        _fill(p[i], bound, seed, name, expert_id)


def _fill(x: torch.Tensor, bound: float, *key: int | str) -> None:
    """Fills a tensor from U(-bound, bound); draws in float64 for every dtype."""
    generator = prng.generator(*key)
    for chunk in x.view(-1).split(ELEMENTS_PER_CHUNK):
        drawn = torch.empty(chunk.shape, dtype=torch.float64)
        chunk.copy_(drawn.uniform_(-bound, bound, generator=generator))
