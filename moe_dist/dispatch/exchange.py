"""Rows to their experts and back: `exchange(x_TD, routing, experts, ctx) -> y_TD, stats`.

Both exchanges compute y_t = sum of gate_n * expert_n(x_t) over the assignments n of token t (Shazeer et al. 2017,
Eq. 1); on CPU they add in the same order. A weight travels with its row and the experts apply it, so its gradient is
formed at the owner, and experts that are layers themselves know the weight that they were chosen with.

The ragged exchange, in order:
  1. counts: every rank learns how many rows it will get for each of its experts;
  2. dispatch: exactly those rows and weights travel, and their context where the experts want it;
  3. regroup: rows come in order of sender; a routing of their own tells the experts of them;
  4. the experts run, and weight their rows;
  5. combine: the rows return;
  6. each token sums what came back for it.
No padding, nothing dropped. A rank with no rows to send or to receive makes every call all the same.

Legend: T tokens, D width, N assignments of this rank's tokens, R rows held here, E experts, e of this rank, P ranks.
"""

from typing import Any, Protocol

import torch

from moe_dist.context import Context
from moe_dist.parallel.collectives import all_to_all_counts, all_to_all_rows
from moe_dist.parallel.mesh import Axis
from moe_dist.routing import Routing
from moe_dist.rows import Copies


class ExpertModule(Protocol):
    """Any module that takes rows and a routing of them to its experts, and gives each row's sum of weighted outputs.

    `needs_context` says whether it looks at what `ctx` has of each row; otherwise that may be of other rows.
    """

    needs_context: bool

    def __call__(self, x_TD: torch.Tensor, routing: Routing, ctx: Context) -> tuple[torch.Tensor, Any]: ...


class LocalExchange:
    """All experts are on this rank."""

    def __call__(
        self, x_TD: torch.Tensor, routing: Routing, experts: ExpertModule, ctx: Context
    ) -> tuple[torch.Tensor, Any]:
        return experts(x_TD, routing, ctx)


class RaggedExchange:
    """Experts are spread over the ranks of an axis, in consecutive blocks of equal size."""

    def __init__(self, axis: Axis) -> None:
        self.axis = axis

    def __call__(
        self, x_TD: torch.Tensor, routing: Routing, experts: ExpertModule, ctx: Context
    ) -> tuple[torch.Tensor, Any]:
        count_Pe = all_to_all_counts(routing.count_E, self.axis, ctx.site)  # 1
        send_P = routing.count_E.view(self.axis.size, -1).sum(1).tolist()
        receive_P = count_Pe.sum(1).tolist()
        there, back = (ctx.site, "dispatch"), (ctx.site, "combine")

        def dispatch(x_N: torch.Tensor) -> torch.Tensor:
            return all_to_all_rows(x_N, send_P, receive_P, self.axis, there)

        copies = Copies(routing.token_N, len(x_TD))
        x_RD, gate_R = dispatch(copies.take(x_TD)), dispatch(routing.gate_N)  # 2
        if experts.needs_context:
            ctx_N = ctx.rows(routing.token_N)
            key_R2 = dispatch(torch.stack([ctx_N.sample_T, ctx_N.position_T], 1))
            ctx = ctx.received(key_R2[:, 0], key_R2[:, 1], torch.ones_like(key_R2[:, 0], dtype=torch.bool))
        order_R = _by_expert(count_Pe)  # 3
        y_RD, stats = experts(x_RD, Routing(order_R, gate_R.index_select(0, order_R), count_Pe.sum(0)), ctx)  # 4
        y_ND = all_to_all_rows(y_RD, receive_P, send_P, self.axis, back)  # 5
        return copies.add_up(y_ND), stats  # 6


def _by_expert(count_Pe: torch.Tensor) -> torch.Tensor:
    """The order that sorts rows that lie by (sender, expert) by (expert, sender): int64 (R,)."""
    num_senders, num_experts = count_Pe.shape
    expert_PE = torch.arange(num_experts, device=count_Pe.device).expand(num_senders, -1)
    return torch.repeat_interleave(expert_PE.flatten(), count_Pe.flatten()).argsort(stable=True)
