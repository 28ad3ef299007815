"""Hierarchical mixture of experts: a layer's experts are groups, and each group has a gate.

Shazeer et al. 2017, Appendix B. The primary gate is an ordinary gate over groups, so a token
crosses the network once per chosen group. A secondary gate is on the same rank as its group: no
rank holds a (width, all experts) matrix. Nesting gives the product of gate weights (Eq. 12): a row
arrives at a group with its primary weight, and the group multiplies it by the secondary weight.

Legend: T tokens, D width, R rows for this rank's groups, g groups on this rank, b experts per
group, e = g b experts on this rank, K experts chosen in a group, G balance groups, E all experts.
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import nn

from moe_dist.moe.dispatch.local import LocalDispatcher
from moe_dist.moe.experts import Experts, grouped_matmul
from moe_dist.moe.gating.balance_loss import cv_squared
from moe_dist.moe.gating.noisy_topk import (
    NoisyTopK,
    SelectExperts,
    noise_std,
    route_noisy,
    top_k_plus_one,
)
from moe_dist.moe.interfaces import Dispatcher, ExpertModule
from moe_dist.moe.layer import LayerStats, MoE
from moe_dist.moe.permutation import TokenPermutation
from moe_dist.moe.routing import GateStats, Routing, build_routing, sum_chosen_by_group
from moe_dist.nn.init import uniform_parameter
from moe_dist.nn.token_context import TokenContext


@dataclass(frozen=True)
class GroupStats:
    """Sums over the rows in this rank's groups, per balance group.

    Attributes:
        importance_Ge: Gate weights summed per expert (Eq. 13), with a gradient.
        load_Ge: Each expert's load within its group (Load_i(X^(i))_j in Eq. 14), with a gradient.
        rows_Gg: Rows per group (|X^(i)| in Eq. 14).
        count_e: Rows per expert, int64.
    """

    importance_Ge: torch.Tensor
    load_Ge: torch.Tensor
    rows_Gg: torch.Tensor
    count_e: torch.Tensor


class GroupProjection(nn.Module):
    """Multiplies each row by its group's matrix, in float32 or wider; starts at zero.

    Its parameters are never narrower than float32.
    """

    def __init__(self, num_groups: int, dim: int, experts_per_group: int) -> None:
        """Creates a matrix (dim, experts_per_group) for each group."""
        super().__init__()
        self.w_gDb = uniform_parameter(num_groups, dim, experts_per_group, bound=0.0)

    def forward(self, x_RD: torch.Tensor, count_g: torch.Tensor) -> torch.Tensor:
        """Returns a number for each expert in the row's group (R, b)."""
        return grouped_matmul(x_RD.to(self.w_gDb.dtype), self.w_gDb, count_g)


@dataclass(frozen=True)
class _GroupsChunk:
    """This rank's groups as one chunk; only the experts delay their weight gradients."""

    groups: "ExpertGroups"
    experts: ExpertModule
    needs_context: bool = True

    def __call__(
        self, x_TD: torch.Tensor, routing: Routing, ctx: TokenContext
    ) -> tuple[torch.Tensor, GroupStats]:
        """Runs the groups with these experts."""
        return self.groups(x_TD, routing, ctx, experts=self.experts)


class ExpertGroups(nn.Module):
    """Expert groups, in the place of a layer's experts; each group has a noisy top-k gate.

    At k = 1 these gates get no gradient from the task's loss (see `NoisyTopK`).

    Attributes:
        first_group: Global id of this rank's first group; `engine.parallelize` sets it.
        max_chunks: 1, because the statistics cover all rows together.
    """

    needs_context = True
    first_group = 0
    max_chunks = 1
    dispatcher: Dispatcher

    def __init__(
        self,
        num_groups: int,
        experts_per_group: int,
        dim: int,
        hidden_dim: int,
        k: int,
        *,
        noise: bool = True,
        recompute: bool = False,
    ) -> None:
        """Creates the groups.

        Args:
            num_groups: Groups over all ranks.
            experts_per_group: Experts in each group.
            dim: Layer width.
            hidden_dim: Hidden units per expert.
            k: Experts per row and chosen group.
            noise: If True, the gates add noise in training (Eq. 4).
            recompute: As for `Experts`.

        Raises:
            ValueError: k is not in 1..experts_per_group.
        """
        super().__init__()
        if not 1 <= k <= experts_per_group:
            raise ValueError(
                f"k={k} experts per group: must be 1 to {experts_per_group}, the experts of a group"
            )
        self.experts_per_group = experts_per_group
        self.k = k
        self.noise = noise
        self.w_gate = GroupProjection(num_groups, dim, experts_per_group)
        self.w_noise = GroupProjection(num_groups, dim, experts_per_group)
        self.experts = Experts(num_groups * experts_per_group, dim, hidden_dim, recompute)
        self.dispatcher = LocalDispatcher()
        self.select: SelectExperts = top_k_plus_one

    def split_experts(self, sizes: list[int]) -> list[_GroupsChunk]:
        """Returns all groups as one chunk, with delayed weight gradients for the experts."""
        assert len(sizes) == 1
        (experts,) = self.experts.split_experts([len(self.experts.w1_eDF)])
        return [_GroupsChunk(self, experts)]

    def forward(
        self,
        x_TD: torch.Tensor,
        routing: Routing,
        ctx: TokenContext,
        experts: ExpertModule | None = None,
    ) -> tuple[torch.Tensor, GroupStats]:
        """Runs the secondary gates and the experts they choose.

        Args:
            x_TD: Tokens (T, D).
            routing: Their assignments to this rank's groups.
            ctx: The tokens' context.
            experts: The groups' experts. None: `self.experts`.

        Returns:
            Each token's sum of weighted outputs (T, D), and the balance loss's sums.
        """
        permutation = TokenPermutation(routing.token_N, len(x_TD))
        x_RD = permutation.permute(x_TD)
        ctx_R = dataclasses.replace(ctx.select(routing.token_N), gate_level=1)
        count_g = routing.count_E
        num_groups = len(count_g)
        b = self.experts_per_group
        group_g = torch.arange(num_groups, device=x_RD.device)
        group_R = group_g.repeat_interleave(count_g, output_size=len(x_RD))
        expert_b = torch.arange(b, device=x_RD.device)
        expert_Rb = (self.first_group + group_R)[:, None] * b + expert_b

        clean_Rb = self.w_gate(x_RD, count_g)
        std_Rb = noise_std(self.w_noise(x_RD, count_g)) if self.noise and ctx_R.train else None
        chosen_RK, gate_RK, load_Rb = route_noisy(
            clean_Rb, std_Rb, self.k, expert_Rb, ctx_R, self.select
        )
        weight_RK = routing.gate_N.to(gate_RK.dtype)[:, None] * gate_RK  # Eq. 12
        local_RK = group_R[:, None] * b + chosen_RK
        all_kept_RK = torch.ones_like(local_RK, dtype=torch.bool)
        expert_routing = build_routing(local_RK, weight_RK, all_kept_RK, num_groups * b)
        y_RD, _ = self.dispatcher(x_RD, expert_routing, experts or self.experts, ctx_R)

        ones_RK = torch.ones_like(gate_RK)
        if load_Rb is None:
            load_Ge = sum_chosen_by_group(local_RK, ones_RK, num_groups * b, ctx_R)
        else:
            load_Ge = _sum_by_group(load_Rb, group_R, num_groups, ctx_R)
        stats = GroupStats(
            importance_Ge=sum_chosen_by_group(local_RK, weight_RK, num_groups * b, ctx_R),
            load_Ge=load_Ge,
            rows_Gg=sum_chosen_by_group(group_R[:, None], ones_RK[:, :1], num_groups, ctx_R),
            count_e=expert_routing.count_E,
        )
        return permutation.unpermute(y_RD), stats


def _sum_by_group(
    x_Rc: torch.Tensor, group_R: torch.Tensor, num_groups: int, ctx_R: TokenContext
) -> torch.Tensor:
    """Sums rows per pair (balance group, expert group).

    Args:
        x_Rc: c numbers per row.
        group_R: Each row's expert group, an index on this rank, int64.
        num_groups: g.
        ctx_R: The rows' context.

    Returns:
        (G, g c), float64 as in `moe.routing.sum_by_group`.
    """
    key_R = ctx_R.balance_group_T * num_groups + group_R
    x_Rc = x_Rc.double()
    zeros = x_Rc.new_zeros(ctx_R.num_balance_groups * num_groups, x_Rc.shape[1])
    return zeros.index_add(0, key_R, x_Rc).view(ctx_R.num_balance_groups, -1)


class HierarchicalMoE(MoE):
    """A layer over `ExpertGroups`; its balance losses cover all experts (Eqs. 13 and 14).

    Each rank computes the sums for its own groups. For a CV² over all experts, the expert shards
    then exchange two scalars per balance group.
    """

    gate: NoisyTopK
    experts: ExpertGroups

    def stats(
        self, routing: Routing, gate_stats: GateStats, expert_stats: GroupStats
    ) -> LayerStats:
        """Returns the layer's statistics, from the primary gate's and the groups'. A collective."""
        num_groups = expert_stats.rows_Gg.shape[1]
        b = self.experts.experts_per_group
        first = self.experts.first_group
        primary_GE = self.stat_reducer.over_data(gate_stats.load_GE)
        primary_GE = self.stat_reducer.to_expert_shards(primary_GE)
        primary_Gg = primary_GE[:, first : first + num_groups]
        addends_2Ge = torch.stack([expert_stats.importance_Ge, expert_stats.load_Ge])
        importance_Ge, load_Ge = self.stat_reducer.over_replicas(addends_2Ge)
        rows_Gg = self.stat_reducer.over_replicas(expert_stats.rows_Gg)
        # a group without tokens has no load: Eq. 14 is then 0, not 0 / 0
        share_Gg = torch.where(rows_Gg > 0, primary_Gg / torch.where(rows_Gg > 0, rows_Gg, 1), 0)
        load_Ge = load_Ge * share_Gg.repeat_interleave(b, 1)  # Eq. 14

        num_experts = self.gate.num_experts * b
        over_shards = self.stat_reducer.over_expert_shards
        importance_cv2_G = cv_squared(importance_Ge, num_experts, over_shards)
        importance_loss_G = self.gate.importance_loss_weight * importance_cv2_G
        load_loss_G = self.gate.load_loss_weight * cv_squared(load_Ge, num_experts, over_shards)

        local = slice(first * b, (first + num_groups) * b)
        importance_E = gate_stats.importance_GE.new_zeros(num_experts)
        importance_E[local] = expert_stats.importance_Ge.detach().sum(0)
        load_E = routing.count_E.new_zeros(num_experts)
        load_E[local] = expert_stats.count_e
        return LayerStats(
            balance_loss=(importance_loss_G + load_loss_G).sum(),
            importance_E=importance_E,
            load_E=load_E,
            dropped=gate_stats.dropped,
        )
