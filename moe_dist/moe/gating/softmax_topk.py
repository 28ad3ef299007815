"""The router of WideNet (Xue et al. 2021): the top k of a softmax, with expert capacity.

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

# initial variance of a logit for an input of unit variance (Fedus et al. 2021, section 2.4)
INITIAL_VARIANCE = 0.1


class SoftmaxTopK(nn.Module):
    """A gate g(x) = TopK(softmax(f(x) + eps)); f is linear, eps ~ N(0, 1/E²) in training.

    The gate weights are the probabilities themselves, not divided by their sum over the chosen
    experts. An assignment over an expert's capacity is dropped, and the residual around the layer
    carries the token.
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
            dim: Width of the layer.
            num_experts: Number of experts over all ranks.
            k: Experts that a token visits.
            noise: Whether noise is added in training.
            capacity_factor: Capacity of an expert relative to an even load. None: nothing is
                dropped.
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
        # Not zero as for `NoisyTopK`, whose first choices its noise decides: without noise all
        # tokens would choose the same experts.
        set_init_bound(self.router.w_DE, (3 * INITIAL_VARIANCE / dim) ** 0.5)
        self.select: SelectExperts = top_k_plus_one

    def forward(self, x_TD: torch.Tensor, ctx: TokenContext) -> tuple[Routing, GateStats]:
        """Assigns tokens to experts.

        Args:
            x_TD: Tokens (T, D).
            ctx: Their context.

        Returns:
            The assignments, and sums by balance group: of probabilities, and of choices.
        """
        logit_TE = self.router(x_TD)
        expert_E = torch.arange(self.num_experts, device=x_TD.device)
        if self.noise and ctx.train:
            # in the logits, as in the paper and its code: gate weights and P are noisy as well
            noise_TE = token_noise.token_normal(ctx, "gate", expert_E, logit_TE.dtype)
            logit_TE = logit_TE + noise_TE / self.num_experts
        p_TE = logit_TE.softmax(1)
        top_TK, expert_TK = self.select(p_TE, self.k, expert_E, ctx)
        gate_TK = top_TK[:, : self.k]
        chosen_TK = expert_TK[:, : self.k]
        # The paper's capacity is C K N L / E for a device's batch of N L tokens; here the tokens
        # are those of a capacity group, padding is left out, and a part of a slot is a slot. The
        # authors' code rounds down and leaves the last slot of every expert empty (it counts slots
        # from 1 and asks for less than the capacity); this code does not. It also fills slots token
        # by token, all choices of a token together; here the first choices of all tokens precede
        # the second ones, so that second choices are dropped first.
        keep_TK = capacity_mask(chosen_TK, self.capacity_factor, ctx, self.num_experts)
        ones_TK = torch.ones_like(gate_TK)
        stats = GateStats(
            importance_GE=sum_by_group(p_TE, ctx),
            load_GE=sum_chosen_by_group(chosen_TK, ones_TK, self.num_experts, ctx),
            dropped=ctx.valid_T.sum() * self.k - keep_TK.sum(),
        )
        return build_routing(chosen_TK, gate_TK, keep_TK, self.num_experts), stats

    def balance_loss(self, importance_GE: torch.Tensor, load_GE: torch.Tensor) -> torch.Tensor:
        """Returns the balance loss from the sums of probabilities and choices.

        Choices count before some are dropped: an assignment over capacity is a load all the same.

        Args:
            importance_GE: Sums of probabilities over the tokens of all ranks.
            load_GE: Sums of choices over the tokens of all ranks.

        Returns:
            balance_loss_weight E sum_i m_i P_i (`switch_balance`), summed over balance groups; a
            scalar.
        """
        return self.balance_loss_weight * switch_balance(importance_GE, load_GE).sum()
