"""Records which experts the tokens of a text visit."""

from dataclasses import dataclass
from typing import Any

import torch

from moe_dist.moe.dispatch.local import LocalDispatcher
from moe_dist.moe.interfaces import ExpertModule
from moe_dist.moe.routing import Routing
from moe_dist.nn.token_context import TokenContext


@dataclass(frozen=True)
class ExpertAssignments:
    """Which experts (global ids) the words of a text visit, and with what gate weights, the heaviest first."""

    expert_TK: torch.Tensor
    weight_TK: torch.Tensor  # sums to 1 over K
    num_experts: int  # of the layer


class RecordingDispatcher(LocalDispatcher):
    """An exchange that keeps what it carried out last."""

    assignments: ExpertAssignments

    def forward(
        self, x_TD: torch.Tensor, routing: Routing, experts: ExpertModule, ctx: TokenContext
    ) -> tuple[torch.Tensor, Any]:
        expert_N = torch.arange(len(routing.count_E)).repeat_interleave(routing.count_E)
        # rows may be copies of a word, one for each of its groups: their context says of which
        by_word_N = ctx.position_T[routing.token_N].argsort(stable=True)
        shape = (ctx.num_samples, -1)  # every word visits as many
        weight_TK, order_TK = (
            routing.gate_N[by_word_N].view(shape).sort(dim=1, descending=True, stable=True)
        )
        expert_TK = expert_N[by_word_N].view(shape).gather(1, order_TK)
        self.assignments = ExpertAssignments(expert_TK, weight_TK, len(routing.count_E))
        return super().forward(x_TD, routing, experts, ctx)


def expert_shares(visits: ExpertAssignments) -> torch.Tensor:
    """The part of all visits that goes to each expert: (E,), float64, sums to 1."""
    count_E = torch.bincount(visits.expert_TK.flatten(), minlength=visits.num_experts)
    return count_E.double() / visits.expert_TK.numel()


def top_contexts(visits: ExpertAssignments, expert: int, num: int) -> list[tuple[float, int]]:
    """The `num` highest gate weights of an expert over a text and the positions of their words, the highest first."""
    position_M, choice_M = (visits.expert_TK == expert).nonzero(as_tuple=True)
    weight_M, order_M = visits.weight_TK[position_M, choice_M].sort(
        dim=0, descending=True, stable=True
    )
    return list(zip(weight_M[:num].tolist(), position_M[order_M][:num].tolist(), strict=True))
