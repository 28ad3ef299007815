"""Balance losses on sums over a balance group.

Legend: G balance groups, E experts (e of them on this rank).
"""

from collections.abc import Callable

import torch


def _alone(x_G: torch.Tensor) -> torch.Tensor:
    return x_G


def cv_squared(
    x_Ge: torch.Tensor, num_experts: int | None = None, owners: Callable[[torch.Tensor], torch.Tensor] = _alone
) -> torch.Tensor:
    """Squared coefficient of variation over experts (G,): population variance / mean² (Shazeer et al. 2017, Eq. 7).

    Where the experts lie on several ranks, `owners` sums over those and `num_experts` counts them all. A group without
    a token has sums of zero, which are even: its value is 0.
    """
    num_experts = num_experts or x_Ge.shape[1]
    mean_G = owners(x_Ge.sum(1)) / num_experts
    # the derivative of the variance by the mean is zero over all experts, though not over each owner's
    variance_G = owners((x_Ge - mean_G.detach()[:, None]).square().sum(1)) / num_experts
    some_G = mean_G > 0
    return torch.where(some_G, variance_G / torch.where(some_G, mean_G.square(), 1), 0)
