"""Hierarchical mixture of experts (Shazeer et al. 2017, Appendix B): a layer whose experts are groups of experts, each
with a gate of its own.

The primary gate is an ordinary gate over the groups, so a token crosses the network once for each chosen group, and the
secondary gates live with their group: no rank holds a matrix of width x all experts. The product of weights (Eq. 12)
arises by nesting, for a group is given the weight that it was chosen with.

Legend: T tokens, D width, R rows of this rank's groups, g groups of this rank, b experts per group, e = g b, K chosen,
G balance groups, E all experts.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moe_dist.moe.delayed_wgrad import ExpertChunk
from moe_dist.moe.dispatch.all_to_all import LocalDispatcher
from moe_dist.moe.experts import Experts, grouped_matmul
from moe_dist.moe.gating.balance_loss import cv_squared
from moe_dist.moe.gating.noisy_topk import (
    NoisyTopK,
    SelectExperts,
    noise_std,
    route_noisy,
    top_k_plus_one,
)
from moe_dist.moe.layer import LayerStats, MoE
from moe_dist.moe.permutation import TokenPermutation
from moe_dist.moe.routing import GateStats, Routing, build_routing, sum_chosen_by_group
from moe_dist.nn.init import uniform_parameter
from moe_dist.nn.token_context import TokenContext


@dataclass(frozen=True)
class GroupStats:
    """Sums over the rows of this rank's groups, by balance group; gradients in the first two."""

    importance_Ge: torch.Tensor  # Eq. 13
    load_Ge: torch.Tensor  # Load_i(X^(i))_j of Eq. 14
    rows_Gg: torch.Tensor  # |X^(i)|
    count_e: torch.Tensor  # int64, rows by expert


class GroupProjection(nn.Module):
    """x @ w of the row's group, in float32 or wider, w starting at zero. Its parameters are never narrower."""

    def __init__(self, num_groups: int, dim: int, experts_per_group: int) -> None:
        super().__init__()
        self.w_gDb = uniform_parameter(num_groups, dim, experts_per_group, bound=0.0)

    def forward(self, x_RD: torch.Tensor, count_g: torch.Tensor) -> torch.Tensor:
        return grouped_matmul(x_RD.to(self.w_gDb.dtype), self.w_gDb, count_g)


class ExpertGroups(nn.Module):
    """Groups of experts as the experts of a layer, each with a noisy top-k gate, which the task gives no gradient at
    k = 1 (see `NoisyTopK`)."""

    needs_context = True
    first_group = 0  # global id of this rank's first group; `parallelize` sets it

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
        """Raises ValueError where k is not in 1..experts_per_group."""
        super().__init__()
        if not 1 <= k <= experts_per_group:
            raise ValueError(
                f"k={k} experts per group: must be 1 to {experts_per_group}, the experts of a group"
            )
        self.experts_per_group, self.k, self.noise = experts_per_group, k, noise
        self.w_gate = GroupProjection(num_groups, dim, experts_per_group)
        self.w_noise = GroupProjection(num_groups, dim, experts_per_group)
        self.experts = Experts(num_groups * experts_per_group, dim, hidden_dim, recompute)
        self.dispatcher = LocalDispatcher()
        self.select: SelectExperts = top_k_plus_one

    def forward(
        self, x_TD: torch.Tensor, routing: Routing, ctx: TokenContext
    ) -> tuple[torch.Tensor, GroupStats]:
        """The sum of each token's weighted outputs: (T, D). Assignments are to this rank's groups."""
        return self.run_groups(x_TD, routing, ctx, self.experts)

    max_chunks = 1  # it tells of all of its rows together

    def split_experts(self, sizes: list[int]) -> list[ExpertChunk]:
        """As `Experts.split_experts`: the gradients of experts may wait, those of gates do not."""
        assert len(sizes) == 1
        (experts,) = self.experts.split_experts([len(self.experts.w1_eDF)])
        return [
            ExpertChunk(
                lambda x_TD, routing, ctx: self.run_groups(x_TD, routing, ctx, experts),
                self.needs_context,
            )
        ]

    def run_groups(
        self, x_TD: torch.Tensor, routing: Routing, ctx: TokenContext, experts: Any
    ) -> tuple[torch.Tensor, GroupStats]:
        """By these `experts`, which are its own."""
        copies, gate_R, count_g = (
            TokenPermutation(routing.token_N, len(x_TD)),
            routing.gate_N,
            routing.count_E,
        )
        x_RD, ctx_R = (
            copies.permute(x_TD),
            dataclasses.replace(ctx.select(routing.token_N), gate_level=1),
        )
        b, num_groups = self.experts_per_group, len(count_g)
        group_R = torch.arange(num_groups, device=x_RD.device).repeat_interleave(
            count_g, output_size=len(x_RD)
        )
        expert_Rb = (self.first_group + group_R)[:, None] * b + torch.arange(b, device=x_RD.device)
        clean_Rb = self.w_gate(x_RD, count_g)
        std_Rb = noise_std(self.w_noise(x_RD, count_g)) if self.noise and ctx_R.train else None
        chosen_RK, gate_RK, load_Rb = route_noisy(
            clean_Rb, std_Rb, self.k, expert_Rb, ctx_R, self.select
        )
        weight_RK = gate_R.to(gate_RK.dtype)[:, None] * gate_RK  # Eq. 12
        local_RK = group_R[:, None] * b + chosen_RK
        inner = build_routing(
            local_RK, weight_RK, torch.ones_like(local_RK, dtype=torch.bool), num_groups * b
        )
        y_RD, _ = self.dispatcher(x_RD, inner, experts, ctx_R)
        if load_Rb is None:
            load_Ge = sum_chosen_by_group(local_RK, torch.ones_like(gate_RK), num_groups * b, ctx_R)
        else:
            load_Ge = _sum_by_group(load_Rb, group_R, num_groups, ctx_R)
        return copies.unpermute(y_RD), GroupStats(
            importance_Ge=sum_chosen_by_group(local_RK, weight_RK, num_groups * b, ctx_R),
            load_Ge=load_Ge,
            rows_Gg=sum_chosen_by_group(
                group_R[:, None], torch.ones_like(gate_RK[:, :1]), num_groups, ctx_R
            ),
            count_e=inner.count_E,
        )


def _sum_by_group(
    x_Rc: torch.Tensor, group_R: torch.Tensor, num_groups: int, ctx_R: TokenContext
) -> torch.Tensor:
    """Sums of (R, c) over the rows of each balance group and group of experts: (G, g c), float64 (`sum_by_group`)."""
    key_R, x_Rc = ctx_R.balance_group_T * num_groups + group_R, x_Rc.double()
    sums = x_Rc.new_zeros(ctx_R.num_balance_groups * num_groups, x_Rc.shape[1]).index_add(
        0, key_R, x_Rc
    )
    return sums.view(ctx_R.num_balance_groups, -1)


class HierarchicalMoE(MoE):
    """A layer over `ExpertGroups`; its balance losses are those of all experts (Eqs. 13 and 14).

    They are formed where the rows are. CV² over all experts takes two scalars a balance group from other ranks.
    """

    gate: NoisyTopK
    experts: ExpertGroups

    def stats(self, routing: Routing, told: GateStats, inner: GroupStats) -> LayerStats:
        num_groups, b = inner.rows_Gg.shape[1], self.experts.experts_per_group
        first = self.experts.first_group
        primary_GE = self.stat_reducer.to_expert_shards(self.stat_reducer.over_data(told.load_GE))
        primary_Gg = primary_GE[:, first : first + num_groups]
        importance_Ge, load_Ge = self.stat_reducer.over_replicas(
            torch.stack([inner.importance_Ge, inner.load_Ge])
        )
        rows_Gg = self.stat_reducer.over_replicas(inner.rows_Gg)
        # a group without a token has no load: Eq. 14 as 0, not 0 / 0
        share_Gg = torch.where(rows_Gg > 0, primary_Gg / torch.where(rows_Gg > 0, rows_Gg, 1), 0)
        load_Ge = load_Ge * share_Gg.repeat_interleave(b, 1)  # Eq. 14
        num_experts = self.gate.num_experts * b
        importance_loss_G = self.gate.importance_loss_weight * cv_squared(
            importance_Ge, num_experts, self.stat_reducer.over_expert_shards
        )
        load_loss_G = self.gate.load_loss_weight * cv_squared(
            load_Ge, num_experts, self.stat_reducer.over_expert_shards
        )
        mine = slice(first * b, (first + num_groups) * b)
        importance_E, load_E = (
            told.importance_GE.new_zeros(num_experts),
            routing.count_E.new_zeros(num_experts),
        )
        importance_E[mine], load_E[mine] = inner.importance_Ge.detach().sum(0), inner.count_e
        return LayerStats(
            (importance_loss_G + load_loss_G).sum(), importance_E, load_E, told.dropped
        )
