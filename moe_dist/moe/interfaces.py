"""Protocols of the parts of a mixture-of-experts layer: gate, experts, dispatcher.

A gate decides which experts a token visits. A dispatcher moves the rows to the ranks of their
experts and back. The experts compute. A stat reducer sums statistics over ranks for the balance
loss.

Legend: T tokens on this rank, D width, G balance groups, E experts over all ranks.
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch

from moe_dist.moe.routing import GateStats, Routing
from moe_dist.nn.token_context import TokenContext


class Gate(Protocol):
    """Decides which experts each token visits, without communication.

    Attributes:
        num_experts: Number of experts, or of groups of experts, over all ranks.
        k: Number of experts, or of groups, that a token visits.
    """

    num_experts: int
    k: int

    def __call__(self, x_TD: torch.Tensor, ctx: TokenContext) -> tuple[Routing, GateStats]:
        """Returns the assignments of this rank's tokens, and sums over them by balance group."""
        ...

    def balance_loss(self, importance_GE: torch.Tensor, load_GE: torch.Tensor) -> torch.Tensor:
        """Returns the scalar balance loss from sums over the tokens of all ranks."""
        ...


class ExpertModule(Protocol):
    """Computes the weighted sum of expert outputs for each of its input rows.

    A module that does not need the context may get that of other rows.
    """

    @property
    def needs_context(self) -> bool:
        """Returns whether the context of each row is read."""
        ...

    def __call__(
        self, x_TD: torch.Tensor, routing: Routing, ctx: TokenContext
    ) -> tuple[torch.Tensor, Any]:
        """Returns the sums (T, D) and the statistics of the experts, None if they have none."""
        ...


@runtime_checkable
class ChunkedExperts(Protocol):
    """Experts that can run in chunks, and whose weight gradients can wait."""

    @property
    def max_chunks(self) -> int:
        """Returns the largest number of chunks."""
        ...

    def split_experts(self, sizes: list[int]) -> Sequence[ExpertModule]:
        """Returns consecutive chunks of `sizes[i]` experts, each callable like the whole module.

        It is called after the rows' dispatch has started and before the first chunk has arrived,
        because autograd then forms the delayed weight gradients at the right time
        (`moe.delayed_wgrad`).
        """
        ...


class Dispatcher(Protocol):
    """Carries rows to the ranks of their experts and back, and decides nothing."""

    def __call__(
        self, x_TD: torch.Tensor, routing: Routing, experts: ExpertModule, ctx: TokenContext
    ) -> tuple[torch.Tensor, Any]:
        """Returns each token's weighted sum of expert outputs (T, D), and expert statistics."""
        ...


class StatReducer(Protocol):
    """Sums statistics over ranks; each method is differentiable.

    `NoReduction` is the one for a single rank, `distributed.collectives.StatReducer` the one for a
    mesh.
    """

    def over_data(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the sum over all ranks, each of which has tokens of its own."""
        ...

    def over_replicas(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the sum over the ranks that hold the same experts."""
        ...

    def over_expert_shards(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the sum over the ranks that together hold all experts."""
        ...

    def to_expert_shards(self, x: torch.Tensor) -> torch.Tensor:
        """Returns `x`, the same on every rank, for use of one part by each expert shard."""
        ...
