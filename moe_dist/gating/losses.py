"""Balance losses on sums over a balance group.

Legend: G balance groups, E experts.
"""

import torch


def cv_squared(x_GE: torch.Tensor) -> torch.Tensor:
    """Squared coefficient of variation over experts (G,): population variance / mean² (Shazeer et al. 2017, Eq. 7).

    A group without a token has sums of zero, which are even: its value is 0.
    """
    mean_G = x_GE.mean(1)
    variance_G = (x_GE - mean_G[:, None]).square().mean(1)
    some_G = mean_G > 0
    return torch.where(some_G, variance_G / torch.where(some_G, mean_G.square(), 1), 0)
