"""Balance losses, from sums over a balance group.

Legend: G balance groups, E experts over all ranks, e experts on this rank.
"""

from collections.abc import Callable

import torch


def _identity(x_G: torch.Tensor) -> torch.Tensor:
    return x_G


def cv_squared(
    x_Ge: torch.Tensor,
    num_experts: int | None = None,
    over_expert_shards: Callable[[torch.Tensor], torch.Tensor] = _identity,
) -> torch.Tensor:
    """Returns the squared coefficient of variation over experts (Shazeer et al. 2017, Eq. 7).

    Args:
        x_Ge: A number for each balance group and each expert of this rank, 0 or more.
        num_experts: E. None: the experts of this rank are all.
        over_expert_shards: Sums over the ranks that together hold all experts.

    Returns:
        The population variance divided by the squared mean (G,), in the dtype of `x_Ge`. A group
        without a token has sums of zero, which are even: its value is 0.
    """
    num_experts = num_experts or x_Ge.shape[1]
    mean_G = over_expert_shards(x_Ge.sum(1)) / num_experts
    # The derivative of the variance with respect to the mean is zero over all experts, though not
    # over those of one rank: so the mean is detached.
    deviation_Ge = x_Ge - mean_G.detach()[:, None]
    variance_G = over_expert_shards(deviation_Ge.square().sum(1)) / num_experts
    has_tokens_G = mean_G > 0
    return torch.where(has_tokens_G, variance_G / torch.where(has_tokens_G, mean_G.square(), 1), 0)


def switch_balance(probability_GE: torch.Tensor, chosen_GE: torch.Tensor) -> torch.Tensor:
    """Returns the balance loss E sum_i m_i P_i of each group (Fedus et al. 2021, Eq. 4).

    m_i is expert i's share of all choices and P_i its mean probability. Only P carries a gradient.

    Args:
        probability_GE: Sums of the gate's probabilities over tokens.
        chosen_GE: How often each expert was chosen.

    Returns:
        (G,), without a weight: 1 if m and P are even, 0 for a group without a token.
    """
    # the probabilities of a token sum to 1
    tokens_G1 = probability_GE.detach().sum(1, keepdim=True)
    choices_G1 = chosen_GE.sum(1, keepdim=True)
    m_GE = chosen_GE / torch.where(choices_G1 > 0, choices_G1, 1)
    p_GE = probability_GE / torch.where(tokens_G1 > 0, tokens_G1, 1)
    return probability_GE.shape[1] * (m_GE * p_GE).sum(1)
