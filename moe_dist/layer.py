"""The mixture-of-experts layer: a gate, an exchange and experts, composed.

Legend: T tokens, D width, E experts (global), G balance groups.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moe_dist.context import Context
from moe_dist.dispatch.exchange import LocalExchange


@dataclass(frozen=True)
class LayerStats:
    """What one use of a layer tells; returned, never kept in the module."""

    balance_loss: torch.Tensor  # scalar, summed over the balance groups of the micro-batch; the same on every rank
    importance_E: torch.Tensor  # Eq. 6 over this rank's valid tokens, detached
    load_E: torch.Tensor  # int64, rows of this rank's tokens by expert
    dropped: torch.Tensor  # int64 scalar, this rank's assignments over capacity
    inner: Any = None  # what the experts tell, where they are layers themselves


def alone(x: torch.Tensor) -> torch.Tensor:
    """The sum over ranks where there is one."""
    return x


class MoE(nn.Module):
    """y = sum over chosen experts of gate weight x expert output (Shazeer et al. 2017, Eq. 1).

    Made whole: `parallelize` slices the experts and sets `exchange` and `shared_sum` from the mesh.
    """

    gate: Any  # gate(x_TD, ctx) -> Routing, GateStats; and gate.balance_loss
    experts: Any  # see dispatch.exchange.ExpertModule

    def __init__(self, gate: nn.Module, experts: nn.Module) -> None:
        super().__init__()
        self.gate = gate
        self.experts = experts
        self.exchange: Callable[..., tuple[torch.Tensor, Any]] = LocalExchange()
        self.shared_sum: Callable[[torch.Tensor], torch.Tensor] = alone

    def forward(self, x_TD: torch.Tensor, ctx: Context) -> tuple[torch.Tensor, LayerStats]:
        routing, told = self.gate(x_TD, ctx)
        y_TD, inner = self.exchange(x_TD, routing, self.experts, ctx)
        importance_GE, load_GE = self.shared_sum(torch.stack([told.importance_GE, told.load_GE]))
        return y_TD, LayerStats(
            balance_loss=self.gate.balance_loss(importance_GE, load_GE),
            importance_E=told.importance_GE.detach().sum(0),
            load_E=routing.count_E,
            dropped=told.dropped,
            inner=inner,
        )
