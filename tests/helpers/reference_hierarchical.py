"""The hierarchical mixture of experts of Shazeer et al. 2017, Appendix B, slow and obvious.

For every token a loop over groups, and in it a loop over the experts of the group, written from
Eqs. 12 to 14; gates and drawn noise are given as plain tensors, and autograd gives every gradient.

Legend: T tokens, D width, a groups, b experts per group, E = a b experts, n things to choose from,
    G balance groups.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from reference import Expert, cv_squared, probability, softplus


@dataclass(frozen=True)
class Gates:
    """The primary gate chooses `k` groups, and the secondary gate of each of those `k` experts."""

    w_gate_Da: torch.Tensor
    w_noise_Da: torch.Tensor
    w_gate_aDb: torch.Tensor
    w_noise_aDb: torch.Tensor
    k: int
    noise_Ta: torch.Tensor | None  # N(0, 1) of the primary gate; None: no noise
    noise_TE: torch.Tensor | None  # and of the secondary gates
    valid_T: Sequence[bool]  # False: padding
    balance_group_T: Sequence[int]
    num_balance_groups: int
    importance_loss_weight: float = 0.1
    load_loss_weight: float = 0.1


@dataclass(frozen=True)
class HierarchicalLayer:
    """The result of one use of the layer, over all tokens."""

    y_TD: torch.Tensor
    balance_loss: torch.Tensor  # sum over balance groups
    importance_GE: torch.Tensor  # Importance_H
    load_GE: torch.Tensor  # Load_H
    rows_E: list[int]  # tokens that reach each expert
    groups_T: list[list[int]]  # groups that each token is sent to


def hierarchical_moe(x_TD: torch.Tensor, gates: Gates, expert: Expert) -> HierarchicalLayer:
    """Eqs. 12 to 14; the balance losses are Eqs. 7 and 11 over all E experts."""
    a, _, b = gates.w_gate_aDb.shape
    zero = x_TD.new_zeros(())
    every_G = range(gates.num_balance_groups)
    importance_GE = [[zero for _ in range(a * b)] for _ in every_G]
    load_prim_Ga = [[zero for _ in range(a)] for _ in every_G]  # Load_prim(X)_i
    load_GE = [[zero for _ in range(a * b)] for _ in every_G]  # Load_i(X^(i))_j
    tokens_Ga = [[0 for _ in range(a)] for _ in every_G]  # |X^(i)|
    rows_E = [0 for _ in range(a * b)]
    y_TD, groups_T = [], []
    for t, x_D in enumerate(x_TD):
        y_D, groups = 0 * x_D, []
        if gates.valid_T[t]:
            group = gates.balance_group_T[t]
            noise_a = None if gates.noise_Ta is None else gates.noise_Ta[t]
            g_prim_a, p_prim_a = noisy_top_k(
                x_D @ gates.w_gate_Da, x_D @ gates.w_noise_Da, noise_a, gates.k
            )
            for i in range(a):
                load_prim_Ga[group][i] = load_prim_Ga[group][i] + p_prim_a[i]
                if g_prim_a[i] == 0:
                    continue  # x is not in X^(i)
                groups.append(i)
                tokens_Ga[group][i] += 1
                noise_b = None if gates.noise_TE is None else gates.noise_TE[t, i * b : (i + 1) * b]
                g_b, p_b = noisy_top_k(
                    x_D @ gates.w_gate_aDb[i], x_D @ gates.w_noise_aDb[i], noise_b, gates.k
                )
                for j in range(b):
                    ij = i * b + j
                    load_GE[group][ij] = load_GE[group][ij] + p_b[j]
                    if g_b[j] == 0:
                        continue
                    rows_E[ij] += 1
                    y_D = y_D + g_prim_a[i] * g_b[j] * expert(ij, t, x_D)  # Eq. 12
                    importance_GE[group][ij] = (
                        importance_GE[group][ij] + g_prim_a[i] * g_b[j]
                    )  # Eq. 13
        y_TD.append(y_D)
        groups_T.append(groups)
    balance_loss, load_h_GE = zero, []
    for group in every_G:
        load_h_E = load_h(load_prim_Ga[group], load_GE[group], tokens_Ga[group])
        balance_loss = balance_loss + gates.importance_loss_weight * cv_squared(
            importance_GE[group]
        )
        balance_loss = balance_loss + gates.load_loss_weight * cv_squared(load_h_E)
        load_h_GE.append(torch.stack(load_h_E))
    return HierarchicalLayer(
        y_TD=torch.stack(y_TD),
        balance_loss=balance_loss,
        importance_GE=torch.stack([torch.stack(row) for row in importance_GE]),
        load_GE=torch.stack(load_h_GE),
        rows_E=rows_E,
        groups_T=groups_T,
    )


def noisy_top_k(
    clean_n: torch.Tensor, raw_std_n: torch.Tensor, noise_n: torch.Tensor | None, k: int
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """G(x)_i (Eqs. 3 to 5) and P(x, i) (Eqs. 8 and 9) of one token, for every i."""
    std_n = softplus(raw_std_n)
    h_n = clean_n if noise_n is None else clean_n + noise_n * std_n
    every, zero = range(len(h_n)), h_n.new_zeros(())
    chosen = sorted(every, key=lambda i: -h_n[i].item())[:k]
    total = sum(h_n[i].exp() for i in chosen)
    g_n = [h_n[i].exp() / total if i in chosen else zero for i in every]
    if noise_n is None:
        return g_n, [zero + float(i in chosen) for i in every]
    return g_n, [probability(clean_n, std_n, h_n, k, i) for i in every]


def load_h(
    load_prim_a: list[torch.Tensor], load_E: list[torch.Tensor], tokens_a: list[int]
) -> list[torch.Tensor]:
    """Load_prim(X)_i Load_i(X^(i))_j / |X^(i)| (Eq. 14) for every expert; 0 where no token chose
    the group.
    """
    b = len(load_E) // len(load_prim_a)
    return [
        load_prim_a[n // b] * load_E[n] / tokens_a[n // b]
        if tokens_a[n // b] > 0
        else torch.zeros_like(load_E[n])
        for n in range(len(load_E))
    ]
