"""The dispatcher for a single expert-parallel rank: all experts are local."""

from typing import Any

import torch
from torch import nn

from moe_dist.moe.interfaces import ExpertModule
from moe_dist.moe.routing import Routing
from moe_dist.nn.token_context import TokenContext


class LocalDispatcher(nn.Module):
    """Calls the experts directly, without moving any rows."""

    def forward(
        self, x_TD: torch.Tensor, routing: Routing, experts: ExpertModule, ctx: TokenContext
    ) -> tuple[torch.Tensor, Any]:
        """Returns each token's weighted sum of expert outputs (T, D), and expert statistics."""
        return experts(x_TD, routing, ctx)
