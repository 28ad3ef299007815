"""Balance losses on sums over a balance group.

Legend: G balance groups, E experts (e of them on this rank).
"""

from collections.abc import Callable

import torch


def _identity(x_G: torch.Tensor) -> torch.Tensor:
    return x_G


def cv_squared(
    x_Ge: torch.Tensor,
    num_experts: int | None = None,
    owners: Callable[[torch.Tensor], torch.Tensor] = _identity,
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


def switch_balance(probability_GE: torch.Tensor, chosen_GE: torch.Tensor) -> torch.Tensor:
    """E sum_i m_i P_i (G,), 1 where both are even (Fedus et al. 2021, Eq. 4).

    m_i, the part of all choices that expert i is, from how often each was chosen; P_i, its mean probability, from sums
    of probabilities over tokens. Only P carries a gradient. The value of a group without a token is 0.
    """
    tokens_G1 = probability_GE.detach().sum(
        1, keepdim=True
    )  # every token's probabilities add up to 1
    choices_G1 = chosen_GE.sum(1, keepdim=True)
    m_GE = chosen_GE / torch.where(choices_G1 > 0, choices_G1, 1)
    p_GE = probability_GE / torch.where(tokens_G1 > 0, tokens_G1, 1)
    return probability_GE.shape[1] * (m_GE * p_GE).sum(1)
