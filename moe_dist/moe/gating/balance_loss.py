"""Balance losses, computed from sums per balance group.

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
        x_Ge: One number >= 0 per balance group and expert on this rank.
        num_experts: E. None: this rank has all experts.
        over_expert_shards: Sums over the ranks that together hold all experts.

    Returns:
        The population variance divided by the squared mean (G,), in `x_Ge`'s dtype; 0 for a group
        without tokens, whose numbers are all 0 and therefore even.
    """
    num_experts = num_experts or x_Ge.shape[1]
    mean_G = over_expert_shards(x_Ge.sum(1)) / num_experts
    # The mean is detached: the variance's derivative with respect to the mean is zero over all
    # experts, but this rank's part is not.
    deviation_Ge = x_Ge - mean_G.detach()[:, None]
    variance_G = over_expert_shards(deviation_Ge.square().sum(1)) / num_experts
    has_tokens_G = mean_G > 0
    return torch.where(has_tokens_G, variance_G / torch.where(has_tokens_G, mean_G.square(), 1), 0)


def switch_balance(probability_GE: torch.Tensor, chosen_GE: torch.Tensor) -> torch.Tensor:
    """Returns the balance loss E sum_i m_i P_i for each group (Fedus et al. 2021, Eq. 4).

    m_i is expert i's share of all choices, P_i its mean probability. Only P has a gradient.

    Args:
        probability_GE: The gate's probabilities, summed over tokens.
        chosen_GE: How often each expert was chosen.

    Returns:
        (G,), without a loss weight: 1 if m and P are even, 0 for a group without tokens.
    """
    # each token's probabilities sum to 1
    tokens_G1 = probability_GE.detach().sum(1, keepdim=True)
    choices_G1 = chosen_GE.sum(1, keepdim=True)
    m_GE = chosen_GE / torch.where(choices_G1 > 0, choices_G1, 1)
    p_GE = probability_GE / torch.where(tokens_G1 > 0, tokens_G1, 1)
    return probability_GE.shape[1] * (m_GE * p_GE).sum(1)
