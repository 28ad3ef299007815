"""Noisy top-k gating (Shazeer et al. 2017, section 2.1 and Appendix A).

Legend: T tokens, D width, E experts, K chosen, G balance groups.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from moe_dist.moe.gating.balance_loss import cv_squared
from moe_dist.moe.routing import (
    GateStats,
    Routing,
    build_routing,
    capacity_mask,
    sum_by_group,
    sum_chosen_by_group,
)
from moe_dist.nn import token_noise
from moe_dist.nn.init import uniform_parameter
from moe_dist.nn.token_context import TokenContext


class Projection(nn.Module):
    """x @ w in float32 or wider (a router in bf16 diverges: Fedus et al. 2021, Table 2), w starting at zero.

    A module of its own because ZeRO 3 brings a parameter back for backward at the output of the module that holds it,
    where that output is a tensor.
    """

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__()
        self.w_DE = uniform_parameter(dim, num_experts, bound=0.0)

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        return x_TD.to(wide) @ self.w_DE.to(wide)


class NoisyTopK(nn.Module):
    """Chooses the `k` highest of noisy logits; the weights are the softmax over those `k` alone.

    Both matrices start at zero: no signal, noise of deviation softplus(0) = ln 2, so an even load (Appendix A). With
    k = 1 the weight is 1 whatever the logits are, and only the balance losses have a gradient (section 2.1 takes k > 1
    for that reason): `config.check` refuses it, and `softmax_topk.SoftmaxTopK` is the gate that learns at k = 1.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int,
        *,
        noise: bool = True,
        capacity_factor: float | None = None,
        importance_loss_weight: float = 0.1,
        load_loss_weight: float = 0.1,
    ) -> None:
        """Raises ValueError where k is not in 1..num_experts."""
        super().__init__()
        if not 1 <= k <= num_experts:
            raise ValueError(f"k={k} experts per token: must be 1 to num_experts={num_experts}")
        self.num_experts, self.k, self.noise, self.capacity_factor = (
            num_experts,
            k,
            noise,
            capacity_factor,
        )
        self.importance_loss_weight, self.load_loss_weight = (
            importance_loss_weight,
            load_loss_weight,
        )
        self.w_gate = Projection(dim, num_experts)
        self.w_noise = Projection(dim, num_experts)
        self.select: SelectExperts = top_k_plus_one

    def forward(self, x_TD: torch.Tensor, ctx: TokenContext) -> tuple[Routing, GateStats]:
        clean_TE = self.w_gate(x_TD)
        std_TE = noise_std(self.w_noise(x_TD)) if self.noise and ctx.train else None
        expert_E = torch.arange(self.num_experts, device=x_TD.device)
        chosen_TK, gate_TK, load_TE = route_noisy(
            clean_TE, std_TE, self.k, expert_E, ctx, self.select
        )
        keep_TK = capacity_mask(chosen_TK, self.capacity_factor, ctx, self.num_experts)
        dropped = ctx.valid_T.sum() * self.k - keep_TK.sum()
        importance_GE = sum_chosen_by_group(chosen_TK, gate_TK, self.num_experts, ctx)
        if load_TE is None:
            load_GE = sum_chosen_by_group(
                chosen_TK, torch.ones_like(gate_TK), self.num_experts, ctx
            )
        else:
            load_GE = sum_by_group(load_TE, ctx)
        stats = GateStats(importance_GE, load_GE, dropped)
        return build_routing(chosen_TK, gate_TK, keep_TK, self.num_experts), stats

    def balance_loss(self, importance_GE: torch.Tensor, load_GE: torch.Tensor) -> torch.Tensor:
        """importance_loss_weight CV(Importance)² + load_loss_weight CV(Load)² (Eqs. 7 and 11) of sums over all ranks, then over groups."""
        return (
            self.importance_loss_weight * cv_squared(importance_GE)
            + self.load_loss_weight * cv_squared(load_GE)
        ).sum()


def noise_std(x_TE: torch.Tensor) -> torch.Tensor:
    """Softplus (Eq. 4), held above 1e-6: it underflows below -100, and Eq. 9 divides by it."""
    return F.softplus(x_TE).clamp_min(1e-6)


# pick(score_TE, k, expert_E, ctx) -> the k scores that win and the best that does not (T, k + 1), and their columns
SelectExperts = Callable[
    [torch.Tensor, int, torch.Tensor, TokenContext], tuple[torch.Tensor, torch.Tensor]
]


def top_k_plus_one(
    score_TE: torch.Tensor, k: int, expert_E: torch.Tensor, ctx: TokenContext
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k + 1 highest scores (k where there are only k experts) and their columns."""
    return score_TE.topk(min(k + 1, score_TE.shape[1]), dim=1)


def route_noisy(
    clean_TE: torch.Tensor,
    std_TE: torch.Tensor | None,
    k: int,
    expert_E: torch.Tensor,
    ctx: TokenContext,
    select: SelectExperts,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Choices (T, K), their weights (T, K) and each token's part of the load (T, E), from clean logits.

    `std_TE` scales the noise. None for none, and then for the load too: Eq. 9 is 1 of what is chosen, else 0.
    `expert_E`: global ids, by which noise is keyed; (E,), or (T, E) where
    rows choose among different experts.
    """
    # Eq. 4
    score_TE = (
        clean_TE
        if std_TE is None
        else clean_TE + token_noise.token_normal(ctx, "gate", expert_E, clean_TE.dtype) * std_TE
    )
    top_TK, expert_TK = select(score_TE, k, expert_E, ctx)
    gate_TK = top_TK[:, :k].softmax(1)  # Eqs. 3 and 5: all others are -inf before the softmax
    chosen_TK = expert_TK[:, :k]
    load_TE = None if std_TE is None else probability_in_top_k(clean_TE, std_TE, chosen_TK, top_TK)
    return chosen_TK, gate_TK, load_TE


def probability_in_top_k(
    clean_TE: torch.Tensor, std_TE: torch.Tensor, chosen_TK: torch.Tensor, top_TK: torch.Tensor
) -> torch.Tensor:
    """P(x, i): the chance that expert i is among the top k if only its own noise were drawn again (Eqs. 8 and 9).

    `top_TK` holds the k + 1 highest scores (k where there are only k experts, and then every P is 1). The k-th highest
    score without i is the (k+1)-th of all where i is in the top k, else the k-th. Which is so is told by the choice,
    not by comparing scores: of two equal ones only one was chosen, and its gradient goes another way.
    """
    k = chosen_TK.shape[1]
    if top_TK.shape[1] == k:
        return torch.ones_like(clean_TE)
    kth, next_best = top_TK[:, k - 1 : k], top_TK[:, k : k + 1]
    in_top_TE = torch.zeros_like(clean_TE, dtype=torch.bool).scatter(1, chosen_TK, True)
    threshold_TE = torch.where(in_top_TE, next_best, kth)
    return torch.special.ndtr((clean_TE - threshold_TE) / std_TE)
