"""Hierarchical mixture of experts: the experts of a layer are groups with gates of their own.

Shazeer et al. 2017, Appendix B. The primary gate is an ordinary gate over the groups, so a token
crosses the network once for each chosen group. The secondary gates live with their group: no rank
holds a matrix of width x all experts. The product of weights (Eq. 12) comes from nesting, because a
group gets the weight that it was chosen with.

Legend: T tokens, D width, R rows of this rank's groups, g groups on this rank, b experts per group,
e = g b experts on this rank, K experts chosen in a group, G balance groups, E all experts.
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
    """Sums over the rows of this rank's groups, by balance group.

    Attributes:
        importance_Ge: Sum of the weights of each expert (Eq. 13), with a gradient.
        load_Ge: Load of each expert within its group (Load_i(X^(i))_j of Eq. 14), with a gradient.
        rows_Gg: Rows of each group (|X^(i)| of Eq. 14).
        count_e: Rows of each expert, int64.
    """

    importance_Ge: torch.Tensor
    load_Ge: torch.Tensor
    rows_Gg: torch.Tensor
    count_e: torch.Tensor


class GroupProjection(nn.Module):
    """Multiplies each row by the matrix of its group, in float32 or wider; starts at zero.

    Its parameters are never narrower than float32.
    """

    def __init__(self, num_groups: int, dim: int, experts_per_group: int) -> None:
        """Creates a matrix (dim, experts_per_group) for each group."""
        super().__init__()
        self.w_gDb = uniform_parameter(num_groups, dim, experts_per_group, bound=0.0)

    def forward(self, x_RD: torch.Tensor, count_g: torch.Tensor) -> torch.Tensor:
        """Returns a number for each expert of the row's group (R, b)."""
        return grouped_matmul(x_RD.to(self.w_gDb.dtype), self.w_gDb, count_g)


@dataclass(frozen=True)
class _GroupsChunk:
    """All groups of a rank, with experts whose weight gradients can wait."""

    groups: "ExpertGroups"
    experts: ExpertModule
    needs_context: bool = True

    def __call__(
        self, x_TD: torch.Tensor, routing: Routing, ctx: TokenContext
    ) -> tuple[torch.Tensor, GroupStats]:
        """Returns what the groups return."""
        return self.groups(x_TD, routing, ctx, experts=self.experts)


class ExpertGroups(nn.Module):
    """Groups of experts as the experts of a layer, each with a noisy top-k gate.

    At k = 1 the task's loss has no gradient for these gates (see `NoisyTopK`).

    Attributes:
        first_group: Global id of this rank's first group; `engine.parallelize` sets it.
        max_chunks: 1, because the statistics are those of all rows together.
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
        """Creates groups of experts.

        Args:
            num_groups: Number of groups over all ranks.
            experts_per_group: Number of experts in each.
            dim: Width of the layer.
            hidden_dim: Hidden units of an expert.
            k: Experts of a group that a row visits.
            noise: Whether the gates add noise in training (Eq. 4).
            recompute: As of `Experts`.

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
        """Returns one chunk of all groups: gradients of experts can wait, those of gates do not."""
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
        """Runs the secondary gates and the experts that they choose.

        Args:
            x_TD: Tokens (T, D).
            routing: Their assignments to this rank's groups.
            ctx: The tokens' context.
            experts: The experts of the groups. None: `self.experts`.

        Returns:
            Each token's sum of weighted outputs (T, D), and the sums that the balance loss needs.
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
    """Sums over the rows of each balance group and each group of experts.

    Args:
        x_Rc: c numbers for each row.
        group_R: Each row's group among those of this rank, int64.
        num_groups: g.
        ctx_R: The rows' context.

    Returns:
        (G, g c), float64 for the reason given at `moe.routing.sum_by_group`.
    """
    key_R = ctx_R.balance_group_T * num_groups + group_R
    x_Rc = x_Rc.double()
    zeros = x_Rc.new_zeros(ctx_R.num_balance_groups * num_groups, x_Rc.shape[1])
    return zeros.index_add(0, key_R, x_Rc).view(ctx_R.num_balance_groups, -1)


class HierarchicalMoE(MoE):
    """A layer over `ExpertGroups` whose balance losses are those of all experts (Eqs. 13 and 14).

    They are formed where the rows are. CV² over all experts needs two scalars per balance group
    from other ranks.
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
        # a group without a token has no load: Eq. 14 is then 0, not 0 / 0
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
