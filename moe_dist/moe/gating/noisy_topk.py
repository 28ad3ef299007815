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

# select(score_TE, k, expert_E, ctx) -> the k chosen scores and the next best (T, k + 1), and their
# columns
SelectExperts = Callable[
    [torch.Tensor, int, torch.Tensor, TokenContext], tuple[torch.Tensor, torch.Tensor]
]


class Projection(nn.Module):
    """A linear map without bias in float32 or wider; its weights start at zero.

    A router in bf16 diverges (Fedus et al. 2021, Table 2). The map is a separate module for ZeRO 3,
    which gathers a module's parameters for backward at its output, if the output is a tensor.
    """

    def __init__(self, dim: int, num_experts: int) -> None:
        """Creates the matrix (dim, num_experts)."""
        super().__init__()
        self.w_DE = uniform_parameter(dim, num_experts, bound=0.0)

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        """Returns x @ w (T, E)."""
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        return x_TD.to(wide) @ self.w_DE.to(wide)


class NoisyTopK(nn.Module):
    """A gate that chooses the k highest noisy logits; gate weights are the softmax over these k.

    Both matrices start at zero: no signal, and noise with standard deviation softplus(0) = ln 2, so
    the load is even (Appendix A). At k = 1 the gate weight is always 1, and only the balance losses
    have a gradient (section 2.1 therefore requires k > 1). So `config.validate` refuses k = 1; use
    `SoftmaxTopK` there.
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
        """Creates the gate.

        Args:
            dim: Layer width.
            num_experts: Experts, or expert groups, over all ranks.
            k: Experts, or expert groups, per token.
            noise: If True, adds noise in training (Eq. 4).
            capacity_factor: Expert capacity relative to an even load. None: nothing is dropped.
            importance_loss_weight: w_importance in Eq. 7.
            load_loss_weight: w_load in Eq. 11.

        Raises:
            ValueError: k is not in 1..num_experts.
        """
        super().__init__()
        if not 1 <= k <= num_experts:
            raise ValueError(f"k={k} experts per token: must be 1 to num_experts={num_experts}")
        self.num_experts = num_experts
        self.k = k
        self.noise = noise
        self.capacity_factor = capacity_factor
        self.importance_loss_weight = importance_loss_weight
        self.load_loss_weight = load_loss_weight
        self.w_gate = Projection(dim, num_experts)
        self.w_noise = Projection(dim, num_experts)
        self.select: SelectExperts = top_k_plus_one

    def forward(self, x_TD: torch.Tensor, ctx: TokenContext) -> tuple[Routing, GateStats]:
        """Assigns tokens to experts.

        Args:
            x_TD: Tokens (T, D).
            ctx: Their context.

        Returns:
            The assignments, and sums per balance group: importance (Eq. 6) and load (Eq. 10).
        """
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
            ones_TK = torch.ones_like(gate_TK)
            load_GE = sum_chosen_by_group(chosen_TK, ones_TK, self.num_experts, ctx)
        else:
            load_GE = sum_by_group(load_TE, ctx)
        stats = GateStats(importance_GE, load_GE, dropped)
        return build_routing(chosen_TK, gate_TK, keep_TK, self.num_experts), stats

    def balance_loss(self, importance_GE: torch.Tensor, load_GE: torch.Tensor) -> torch.Tensor:
        """Returns the balance loss from the importance and load sums (Eqs. 7 and 11).

        Args:
            importance_GE: Sums over all ranks' tokens.
            load_GE: Sums over all ranks' tokens.

        Returns:
            w_importance CV(Importance)² + w_load CV(Load)², summed over balance groups; a scalar.
        """
        importance_loss_G = self.importance_loss_weight * cv_squared(importance_GE)
        load_loss_G = self.load_loss_weight * cv_squared(load_GE)
        return (importance_loss_G + load_loss_G).sum()


def noise_std(x_TE: torch.Tensor) -> torch.Tensor:
    """Returns softplus(x) (Eq. 4), at least 1e-6, because Eq. 9 divides by it."""
    return F.softplus(x_TE).clamp_min(1e-6)


def top_k_plus_one(
    score_TE: torch.Tensor, k: int, expert_E: torch.Tensor, ctx: TokenContext
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the k + 1 highest scores (k if there are only k experts), and their columns.

    The extra score is for the load (Eq. 9). `expert_E` and `ctx` are for a replacement that replays
    recorded choices (`verify.choice_replay`).
    """
    return score_TE.topk(min(k + 1, score_TE.shape[1]), dim=1)


def route_noisy(
    clean_TE: torch.Tensor,
    std_TE: torch.Tensor | None,
    k: int,
    expert_E: torch.Tensor,
    ctx: TokenContext,
    select: SelectExperts,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Chooses experts by noisy scores.

    Args:
        clean_TE: Logits without noise.
        std_TE: The noise's standard deviation. None: no noise.
        k: Choices per token.
        expert_E: The columns' global expert ids, int64, which key the noise; (T, E) if rows choose
            among different experts.
        ctx: The tokens' context.
        select: Selects the best scores.

    Returns:
        The choices (T, K), their gate weights (T, K), and each token's part in the load (T, E)
        (Eq. 9). Without noise the load is None: Eq. 9 is 1 for chosen experts and 0 for others.
    """
    score_TE = clean_TE
    if std_TE is not None:  # Eq. 4
        normal_TE = token_noise.token_normal(ctx, "gate", expert_E, clean_TE.dtype)
        score_TE = clean_TE + normal_TE * std_TE
    top_TK, expert_TK = select(score_TE, k, expert_E, ctx)
    gate_TK = top_TK[:, :k].softmax(1)  # Eqs. 3 and 5: all others are -inf before the softmax
    chosen_TK = expert_TK[:, :k]
    load_TE = None
    if std_TE is not None:
        load_TE = probability_in_top_k(clean_TE, std_TE, chosen_TK, top_TK)
    return chosen_TK, gate_TK, load_TE


def probability_in_top_k(
    clean_TE: torch.Tensor, std_TE: torch.Tensor, chosen_TK: torch.Tensor, top_TK: torch.Tensor
) -> torch.Tensor:
    """Returns P(x, i): the probability that expert i is in the top k if its noise is drawn again.

    Eqs. 8 and 9. The threshold for expert i is the k-th highest score without i: the (k + 1)-th of
    all scores if i was chosen, else the k-th. `chosen_TK` decides this, not a comparison: if only
    one of two equal scores was chosen, their gradients take different paths.

    Args:
        clean_TE: Logits without noise.
        std_TE: The noise's standard deviation.
        chosen_TK: The choices, int64.
        top_TK: The k + 1 highest scores; k if there are only k experts, and then every P is 1.

    Returns:
        (T, E)
    """
    k = chosen_TK.shape[1]
    if top_TK.shape[1] == k:
        return torch.ones_like(clean_TE)
    kth_T1 = top_TK[:, k - 1 : k]
    next_best_T1 = top_TK[:, k : k + 1]
    in_top_TE = torch.zeros_like(clean_TE, dtype=torch.bool).scatter(1, chosen_TK, True)
    threshold_TE = torch.where(in_top_TE, next_best_T1, kth_T1)
    return torch.special.ndtr((clean_TE - threshold_TE) / std_TE)
