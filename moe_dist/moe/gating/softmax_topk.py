"""The router of WideNet (Xue et al. 2021): the top k of a softmax over all experts, with expert capacity.

Legend: T tokens, D width, E experts, K chosen, G balance groups.
"""

import torch
from torch import nn

from moe_dist.moe.gating.balance_loss import switch_balance
from moe_dist.moe.gating.noisy_topk import Projection, SelectExperts, top_k_plus_one
from moe_dist.moe.routing import (
    GateStats,
    Routing,
    build_routing,
    capacity_mask,
    sum_by_group,
    sum_chosen_by_group,
)
from moe_dist.nn import token_noise
from moe_dist.nn.init import set_init_bound
from moe_dist.nn.token_context import TokenContext

INITIAL_VARIANCE = 0.1  # of a logit, for an input of unit variance: what Fedus et al. 2021 (section 2.4) start from


class SoftmaxTopK(nn.Module):
    """g(x) = TopK(softmax(f(x) + eps)), f linear without bias, eps ~ N(0, 1/E²) in training.

    The weights are the probabilities themselves, not divided by their sum over the chosen. What finds no room within
    the capacity of an expert is dropped, and the residual around the layer carries the token.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        k: int,
        *,
        noise: bool = True,
        capacity_factor: float | None = 1.2,
        balance_loss_weight: float = 0.01,
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
        self.balance_loss_weight = balance_loss_weight
        self.router = Projection(dim, num_experts)
        # not zero as the noisy gate's, whose noise is at first all that decides: here all tokens would go to the same
        # experts where there is no noise
        set_init_bound(self.router.w_DE, (3 * INITIAL_VARIANCE / dim) ** 0.5)
        self.select: SelectExperts = top_k_plus_one

    def forward(self, x_TD: torch.Tensor, ctx: TokenContext) -> tuple[Routing, GateStats]:
        """Tokens (T, D) -> where they go, and sums by balance group: of probabilities, and of choices."""
        logit_TE = self.router(x_TD)
        expert_E = torch.arange(self.num_experts, device=x_TD.device)
        if (
            self.noise and ctx.train
        ):  # in the logits, as the paper and its code have it: weights and P are noisy too
            logit_TE = (
                logit_TE
                + token_noise.token_normal(ctx, "gate", expert_E, logit_TE.dtype) / self.num_experts
            )
        p_TE = logit_TE.softmax(1)
        top_TK, expert_TK = self.select(p_TE, self.k, expert_E, ctx)
        gate_TK, chosen_TK = top_TK[:, : self.k], expert_TK[:, : self.k]
        # The paper's capacity is C K N L / E for a device's batch of N L tokens; here the tokens are those of a token
        # group, padding left out, and a part of a slot is a slot. The authors' code rounds down and leaves the last
        # slot of every expert empty (it counts places from 1 and asks for less than the capacity); we do not. It also
        # fills places by token, all choices of a token together; here first choices of all tokens come before second
        # ones, so that what is dropped are second choices first.
        keep_TK = capacity_mask(chosen_TK, self.capacity_factor, ctx, self.num_experts)
        chosen_GE = sum_chosen_by_group(chosen_TK, torch.ones_like(gate_TK), self.num_experts, ctx)
        dropped = ctx.valid_T.sum() * self.k - keep_TK.sum()
        stats = GateStats(sum_by_group(p_TE, ctx), chosen_GE, dropped)
        return build_routing(chosen_TK, gate_TK, keep_TK, self.num_experts), stats

    def balance_loss(self, importance_GE: torch.Tensor, load_GE: torch.Tensor) -> torch.Tensor:
        """balance_loss_weight E sum_i m_i P_i, summed over groups. Choices count before some are dropped: what an expert cannot
        take is a load on it all the same."""
        return self.balance_loss_weight * switch_balance(importance_GE, load_GE).sum()
