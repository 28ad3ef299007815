"""Protocols for the parts of a mixture-of-experts layer: gate, dispatcher, experts, stat reducer.

A gate decides which experts a token visits. A dispatcher moves the rows to their experts' ranks
and back. The experts compute. A stat reducer sums statistics over ranks for the balance loss.

Legend: T tokens on this rank, D width, G balance groups, E experts over all ranks.
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch

from moe_dist.moe.routing import GateStats, Routing
from moe_dist.nn.token_context import TokenContext


class Gate(Protocol):
    """Decides which experts each token visits, without communication.

    A gate is an `nn.Module` without buffers. Its parameters come from `nn.init.uniform_parameter`
    and lie in submodules that return a tensor, such as `gating.noisy_topk.Projection` (for ZeRO 3).
    Logits are float32 or wider, noise comes from `nn.token_noise`. `routing.build_routing` makes
    the routing, `routing.sum_by_group` and `sum_chosen_by_group` the sums. It chooses through its
    attribute `select` (`gating.noisy_topk.top_k_plus_one`), which `verify` replaces to replay
    recorded choices.

    Attributes:
        num_experts: Experts, or expert groups, over all ranks.
        k: Experts, or expert groups, per token.
    """

    num_experts: int
    k: int

    def __call__(self, x_TD: torch.Tensor, ctx: TokenContext) -> tuple[Routing, GateStats]:
        """Returns this rank's assignments, and sums over its tokens per balance group."""
        ...

    def balance_loss(self, importance_GE: torch.Tensor, load_GE: torch.Tensor) -> torch.Tensor:
        """Returns the scalar balance loss from sums over all ranks' tokens."""
        ...


class ExpertModule(Protocol):
    """Computes, for each input row, the weighted sum of its experts' outputs.

    If `needs_context` is False, the caller can pass the context of other rows.
    """

    @property
    def needs_context(self) -> bool:
        """Returns True if the experts read each row's context."""
        ...

    def __call__(
        self, x_TD: torch.Tensor, routing: Routing, ctx: TokenContext
    ) -> tuple[torch.Tensor, Any]:
        """Returns the sums (T, D) and the experts' statistics, None if they have none."""
        ...


@runtime_checkable
class ChunkedExperts(Protocol):
    """Experts that can run in chunks and can delay their weight gradients."""

    @property
    def max_chunks(self) -> int:
        """Returns the maximum number of chunks."""
        ...

    def split_experts(self, sizes: list[int]) -> Sequence[ExpertModule]:
        """Returns consecutive chunks of `sizes[i]` experts, each callable like the whole module.

        Call it after the rows' dispatch has started and before the first wait: autograd then
        computes the delayed weight gradients at the right time (`moe.delayed_wgrad`).
        """
        ...


class Dispatcher(Protocol):
    """Moves rows to their experts' ranks and back; makes no routing decision."""

    def __call__(
        self, x_TD: torch.Tensor, routing: Routing, experts: ExpertModule, ctx: TokenContext
    ) -> tuple[torch.Tensor, Any]:
        """Returns each token's weighted sum of expert outputs (T, D), and expert statistics."""
        ...


class StatReducer(Protocol):
    """Sums statistics over ranks; each method is differentiable.

    `NoReduction` serves a single rank, `distributed.collectives.StatReducer` a mesh.
    """

    def over_data(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the sum over all ranks; each has different tokens."""
        ...

    def over_replicas(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the sum over the replicas: the ranks with the same experts."""
        ...

    def over_expert_shards(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the sum over the expert shards: ranks that together hold all experts."""
        ...

    def to_expert_shards(self, x: torch.Tensor) -> torch.Tensor:
        """Returns `x`, equal on every rank, of which each expert shard then uses its own part."""
        ...
