"""WideNet's router (Xue et al. 2021): softmax, then top k, with expert capacity.

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

# a logit's initial variance for unit-variance inputs (Fedus et al. 2021, section 2.4)
INITIAL_VARIANCE = 0.1


class SoftmaxTopK(nn.Module):
    """A gate g(x) = TopK(softmax(f(x) + eps)); f is linear, eps ~ N(0, 1/E²) in training.

    The gate weights are the probabilities, not normalized over the chosen experts. An assignment
    over an expert's capacity is dropped; the layer's residual connection still carries the token.
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
        """Creates the gate.

        Args:
            dim: Layer width.
            num_experts: Experts over all ranks.
            k: Experts per token.
            noise: If True, adds noise in training.
            capacity_factor: Expert capacity relative to an even load. None: nothing is dropped.
            balance_loss_weight: The paper's lambda.

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
        self.balance_loss_weight = balance_loss_weight
        self.router = Projection(dim, num_experts)
        # Not zero: without noise all tokens would choose the same experts. `NoisyTopK` can start at
        # zero, because its noise decides the first choices.
        set_init_bound(self.router.w_DE, (3 * INITIAL_VARIANCE / dim) ** 0.5)
        self.select: SelectExperts = top_k_plus_one

    def forward(self, x_TD: torch.Tensor, ctx: TokenContext) -> tuple[Routing, GateStats]:
        """Assigns tokens to experts.

        Args:
            x_TD: Tokens (T, D).
            ctx: Their context.

        Returns:
            The assignments, and per balance group the summed probabilities and choices.
        """
        logit_TE = self.router(x_TD)
        expert_E = torch.arange(self.num_experts, device=x_TD.device)
        if self.noise and ctx.train:
            # noise in the logits, as in the paper and its code: gate weights and P are noisy too
            noise_TE = token_noise.token_normal(ctx, "gate", expert_E, logit_TE.dtype)
            logit_TE = logit_TE + noise_TE / self.num_experts
        p_TE = logit_TE.softmax(1)
        top_TK, expert_TK = self.select(p_TE, self.k, expert_E, ctx)
        gate_TK = top_TK[:, : self.k]
        chosen_TK = expert_TK[:, : self.k]
        # Capacity differs from WideNet in three points:
        #   tokens    The paper's capacity is C K N L / E for the N L tokens on a device. Here the
        #             tokens are a capacity group's, without padding.
        #   rounding  The authors' code rounds down and leaves each expert's last slot empty (it
        #             counts slots from 1 and keeps those below the capacity). Here: up, no empty
        #             slot.
        #   order     The authors' code fills slots token by token, with all choices of a token
        #             together. Here all first choices precede all second choices, so second
        #             choices are dropped first.
        keep_TK = capacity_mask(chosen_TK, self.capacity_factor, ctx, self.num_experts)
        ones_TK = torch.ones_like(gate_TK)
        stats = GateStats(
            importance_GE=sum_by_group(p_TE, ctx),
            load_GE=sum_chosen_by_group(chosen_TK, ones_TK, self.num_experts, ctx),
            dropped=ctx.valid_T.sum() * self.k - keep_TK.sum(),
        )
        return build_routing(chosen_TK, gate_TK, keep_TK, self.num_experts), stats

    def balance_loss(self, importance_GE: torch.Tensor, load_GE: torch.Tensor) -> torch.Tensor:
        """Returns the balance loss from the summed probabilities and choices.

        Dropped choices count too: an assignment over capacity is still load.

        Args:
            importance_GE: Probabilities, summed over all ranks' tokens.
            load_GE: Choices, counted over all ranks' tokens.

        Returns:
            balance_loss_weight E sum_i m_i P_i (`switch_balance`), summed over balance groups; a
            scalar.
        """
        return self.balance_loss_weight * switch_balance(importance_GE, load_GE).sum()
