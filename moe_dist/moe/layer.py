"""The mixture-of-experts layer: a gate, an exchange and experts, composed.

Legend: T tokens, D width, E experts (global), G balance groups.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moe_dist.moe.dispatch.all_to_all import LocalDispatcher
from moe_dist.moe.routing import GateStats, Routing
from moe_dist.nn.token_context import TokenContext


@dataclass(frozen=True)
class LayerStats:
    """What one use of a layer tells; returned, never kept in the module."""

    balance_loss: (
        torch.Tensor
    )  # scalar, summed over the balance groups of the micro-batch; the same on every rank
    importance_E: torch.Tensor  # Eq. 6, this rank's part of the sum over ranks, detached
    load_E: torch.Tensor  # int64, rows by expert, likewise
    dropped: torch.Tensor  # int64 scalar, assignments over capacity, likewise


class NoReduction:
    """The sums over ranks that balance losses need, where there is one rank. `parallelize` puts a mesh's in its place
    (`parallel.collectives.StatReducer`, which tells them)."""

    @staticmethod
    def over_data(x: torch.Tensor) -> torch.Tensor:
        return x

    over_replicas = over_expert_shards = to_expert_shards = over_data


class MoE(nn.Module):
    """y = sum over chosen experts of gate weight x expert output (Shazeer et al. 2017, Eq. 1).

    Made whole: `parallelize` slices the experts and sets `exchange` and `sums` from the mesh.
    """

    gate: Any  # gate(x_TD, ctx) -> Routing, GateStats; and gate.balance_loss, gate.num_experts, gate.k
    experts: Any  # see dispatch.exchange.ExpertModule

    def __init__(self, gate: nn.Module, experts: nn.Module) -> None:
        super().__init__()
        self.gate = gate
        self.experts = experts
        self.dispatcher: Callable[..., tuple[torch.Tensor, Any]] = LocalDispatcher()
        self.stat_reducer: Any = NoReduction()

    def forward(self, x_TD: torch.Tensor, ctx: TokenContext) -> tuple[torch.Tensor, LayerStats]:
        routing, told = self.gate(x_TD, ctx)
        y_TD, inner = self.dispatcher(x_TD, routing, self.experts, ctx)
        return y_TD, self.stats(routing, told, inner)

    def stats(self, routing: Routing, told: GateStats, inner: Any) -> LayerStats:
        """What the layer tells of itself, from what gate and experts told."""
        importance_GE, load_GE = self.stat_reducer.over_data(
            torch.stack([told.importance_GE, told.load_GE])
        )
        return LayerStats(
            balance_loss=self.gate.balance_loss(importance_GE, load_GE),
            importance_E=told.importance_GE.detach().sum(0),
            load_E=routing.count_E,
            dropped=told.dropped,
        )
