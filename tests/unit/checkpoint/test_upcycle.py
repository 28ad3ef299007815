"""The noise keys of a run that grows twice."""

import torch

from moe_dist.checkpoint.upcycle import Upcycling


def test_second_growth_uses_new_noise() -> None:
    """Two experts become four, and those eight: no two are equal."""
    experts = torch.ones(2, 3, 5)
    for number in (4, 8):
        grown = torch.empty(number, 3, 5)
        Upcycling(2, 0.1, seed=0).fill(grown, experts, range(0), "w", perturb=True)
        experts = grown
    assert all(
        not torch.equal(experts[i], experts[j])
        for i in range(8)
        for j in range(i)
        if (i, j) != (4, 0)
    )
