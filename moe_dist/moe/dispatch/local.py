"""The dispatcher of a single expert-parallel rank: all experts are here."""

from typing import Any

import torch
from torch import nn

from moe_dist.moe.interfaces import ExpertModule
from moe_dist.moe.routing import Routing
from moe_dist.nn.token_context import TokenContext


class LocalDispatcher(nn.Module):
    """Calls the experts with the tokens as they are."""

    def forward(
        self, x_TD: torch.Tensor, routing: Routing, experts: ExpertModule, ctx: TokenContext
    ) -> tuple[torch.Tensor, Any]:
        """Returns each token's sum of weighted expert outputs (T, D), and the experts' statistics."""
        return experts(x_TD, routing, ctx)
