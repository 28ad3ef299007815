"""The mixture-of-experts layer: a gate, a dispatcher and experts.

Legend: T tokens, D width, E experts (over all ranks), G balance groups.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moe_dist.moe.dispatch.local import LocalDispatcher
from moe_dist.moe.interfaces import Dispatcher, ExpertModule, Gate, StatReducer
from moe_dist.moe.routing import GateStats, Routing
from moe_dist.nn.token_context import TokenContext


@dataclass(frozen=True)
class LayerStats:
    """Statistics of one layer call; returned, never stored in the module.

    `importance_E`, `load_E` and `dropped` are this rank's addends: sum them over ranks.

    Attributes:
        balance_loss: Scalar, summed over the micro-batch's balance groups; equal on every rank.
        importance_E: Gate weights summed per expert (Shazeer et al. 2017, Eq. 6), detached.
        load_E: Rows per expert, int64.
        dropped: Assignments over capacity, int64 scalar.
    """

    balance_loss: torch.Tensor
    importance_E: torch.Tensor
    load_E: torch.Tensor
    dropped: torch.Tensor


class NoReduction:
    """The stat reducer for a single rank: every method returns its input."""

    @staticmethod
    def over_data(x: torch.Tensor) -> torch.Tensor:
        """Returns `x`."""
        return x

    over_replicas = over_expert_shards = to_expert_shards = over_data


class MoE(nn.Module):
    """A mixture-of-experts layer (Shazeer et al. 2017, Eq. 1).

    y = sum over the chosen experts of gate weight x expert output. A new layer holds all experts
    and runs on one rank. `engine.parallelize` keeps only this rank's experts and installs the
    mesh's `dispatcher` (`engine.dispatcher_choice`) and `stat_reducer`. Forward hooks on the three
    parts time them (`monitoring.step_timer`) and find NaN (`training.nan_detector`).
    """

    gate: Gate
    dispatcher: Dispatcher
    experts: ExpertModule
    stat_reducer: StatReducer

    def __init__(self, gate: Gate, experts: ExpertModule) -> None:
        """Creates a layer that runs on one rank.

        Args:
            gate: A module that assigns tokens to experts.
            experts: A module that holds all experts.
        """
        super().__init__()
        self.gate = gate
        self.dispatcher = LocalDispatcher()
        self.experts = experts
        self.stat_reducer = NoReduction()

    def forward(self, x_TD: torch.Tensor, ctx: TokenContext) -> tuple[torch.Tensor, LayerStats]:
        """Returns the output (T, D) and this call's statistics."""
        routing, gate_stats = self.route(x_TD, ctx)
        y_TD, expert_stats = self.run_experts(x_TD, routing, ctx)
        return y_TD, self.stats(routing, gate_stats, expert_stats)

    def route(self, x_TD: torch.Tensor, ctx: TokenContext) -> tuple[Routing, GateStats]:
        """Returns this rank's assignments and the gate's sums."""
        return self.gate(x_TD, ctx)

    def run_experts(
        self, x_TD: torch.Tensor, routing: Routing, ctx: TokenContext
    ) -> tuple[torch.Tensor, Any]:
        """Sends rows to their experts' ranks, and sums each token's returned outputs.

        Args:
            x_TD: This rank's tokens (T, D).
            routing: Their assignments, from this layer's `route`; can be used more than once.
            ctx: The tokens' context.

        Returns:
            The output (T, D), and the experts' statistics, None if they have none.
        """
        return self.dispatcher(x_TD, routing, self.experts, ctx)

    def stats(self, routing: Routing, gate_stats: GateStats, expert_stats: Any) -> LayerStats:
        """Returns the layer's statistics from the gate's and the experts'. A collective."""
        addends_2GE = torch.stack([gate_stats.importance_GE, gate_stats.load_GE])
        importance_GE, load_GE = self.stat_reducer.over_data(addends_2GE)
        return LayerStats(
            balance_loss=self.gate.balance_loss(importance_GE, load_GE),
            importance_E=gate_stats.importance_GE.detach().sum(0),
            load_E=routing.count_E,
            dropped=gate_stats.dropped,
        )
