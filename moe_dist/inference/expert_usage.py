"""Records which experts a text's words visit, and summarises these visits.

Legend: T words, D width, K experts per word, E experts, N word-expert assignments, M visits to one
expert.
"""

from dataclasses import dataclass
from typing import Any

import torch

from moe_dist.moe.dispatch.local import LocalDispatcher
from moe_dist.moe.interfaces import ExpertModule
from moe_dist.moe.routing import Routing
from moe_dist.nn.token_context import TokenContext


@dataclass(frozen=True)
class ExpertAssignments:
    """The experts visited by a text's words in one layer.

    Attributes:
        expert_TK: Global ids, int64, the expert with the largest gate weight first.
        weight_TK: Gate weights; they sum to 1 over K.
        num_experts: The layer's expert count.
    """

    expert_TK: torch.Tensor
    weight_TK: torch.Tensor
    num_experts: int


class RecordingDispatcher(LocalDispatcher):
    """A local dispatcher that keeps its last call's assignments.

    Attributes:
        assignments: The assignments; not set before the first call.
    """

    assignments: ExpertAssignments

    def forward(
        self, x_TD: torch.Tensor, routing: Routing, experts: ExpertModule, ctx: TokenContext
    ) -> tuple[torch.Tensor, Any]:
        """Records the routing and dispatches like `LocalDispatcher`."""
        num_experts = len(routing.count_E)
        expert_N = torch.arange(num_experts).repeat_interleave(routing.count_E)
        # with expert groups a word has one row per chosen group; the word's position in the
        # context is the same in all its rows
        by_word_N = ctx.position_T[routing.token_N].argsort(stable=True)
        shape = (ctx.num_samples, -1)  # all words visit equally many experts
        weight_TK, order_TK = (
            routing.gate_N[by_word_N].view(shape).sort(dim=1, descending=True, stable=True)
        )
        expert_TK = expert_N[by_word_N].view(shape).gather(1, order_TK)
        self.assignments = ExpertAssignments(expert_TK, weight_TK, num_experts)
        return super().forward(x_TD, routing, experts, ctx)


def expert_shares(visits: ExpertAssignments) -> torch.Tensor:
    """Returns each expert's fraction of all visits: (E,), float64, sums to 1."""
    count_E = torch.bincount(visits.expert_TK.flatten(), minlength=visits.num_experts)
    return count_E.double() / visits.expert_TK.numel()


def top_contexts(visits: ExpertAssignments, expert: int, num: int) -> list[tuple[float, int]]:
    """Returns the visits to an expert with the largest gate weights.

    Args:
        visits: A text's visits.
        expert: The expert's global id.
        num: Maximum number of visits to return.

    Returns:
        (gate weight, the word's position in the text), the largest weight first.
    """
    position_M, choice_M = (visits.expert_TK == expert).nonzero(as_tuple=True)
    weight_M, order_M = visits.weight_TK[position_M, choice_M].sort(
        dim=0, descending=True, stable=True
    )
    positions = position_M[order_M][:num].tolist()
    return list(zip(weight_M[:num].tolist(), positions, strict=True))
