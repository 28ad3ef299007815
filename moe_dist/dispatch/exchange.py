"""Rows to their experts and back: `exchange(x_TD, routing, experts, ctx) -> y_TD, stats`.

Both exchanges compute y_t = sum of gate_n * expert_n(x_t) over the assignments n of token t (Shazeer et al. 2017,
Eq. 1); on CPU they add in the same order. A weight travels with its row and the experts apply it, so its gradient is
formed at the owner, and experts that are layers themselves know the weight that they were chosen with.

The ragged exchange, in order:
  1. counts: every rank learns how many rows it will get for each of its experts;
  2. dispatch: exactly those rows and weights travel, and their context where the experts want it;
  3. regroup: rows come in order of sender, and are put in order of expert;
  4. the experts run, and weight their rows;
  5. back into order of sender, combine: the rows return;
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


class ExpertModule(Protocol):
    """Any module over rows sorted by expert, count_e[i] of them for expert i; returns rows times `gate_R`.

    `needs_context` says whether it looks at `ctx_R` (None otherwise).
    """

    needs_context: bool

    def __call__(
        self, x_RD: torch.Tensor, gate_R: torch.Tensor, count_e: torch.Tensor, ctx_R: Context | None
    ) -> tuple[torch.Tensor, Any]: ...


class LocalExchange:
    """All experts are on this rank."""

    def __call__(
        self, x_TD: torch.Tensor, routing: Routing, experts: ExpertModule, ctx: Context
    ) -> tuple[torch.Tensor, Any]:
        ctx_N = ctx.rows(routing.token_N) if experts.needs_context else None
        y_ND, stats = experts(x_TD.index_select(0, routing.token_N), routing.gate_N, routing.count_E, ctx_N)
        return _combine(y_ND, routing, x_TD), stats


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

        x_RD = dispatch(x_TD.index_select(0, routing.token_N))  # 2
        gate_R = dispatch(routing.gate_N)
        order_R = _by_expert(count_Pe)  # 3
        ctx_R = None
        if experts.needs_context:
            ctx_N = ctx.rows(routing.token_N)
            key_R2 = dispatch(torch.stack([ctx_N.sample_T, ctx_N.position_T], 1))[order_R]
            ctx_R = ctx.received(key_R2[:, 0], key_R2[:, 1], torch.ones_like(key_R2[:, 0], dtype=torch.bool))
        x_RD, gate_R = x_RD.index_select(0, order_R), gate_R.index_select(0, order_R)
        y_RD, stats = experts(x_RD, gate_R, count_Pe.sum(0), ctx_R)  # 4
        y_RD = torch.empty_like(y_RD).index_copy(0, order_R, y_RD)  # 5
        y_ND = all_to_all_rows(y_RD, receive_P, send_P, self.axis, back)
        return _combine(y_ND, routing, x_TD), stats  # 6


def _by_expert(count_Pe: torch.Tensor) -> torch.Tensor:
    """The order that sorts rows that lie by (sender, expert) by (expert, sender): int64 (R,)."""
    num_senders, num_experts = count_Pe.shape
    expert_PE = torch.arange(num_experts, device=count_Pe.device).expand(num_senders, -1)
    return torch.repeat_interleave(expert_PE.flatten(), count_Pe.flatten()).argsort(stable=True)


def _combine(y_ND: torch.Tensor, routing: Routing, x_TD: torch.Tensor) -> torch.Tensor:
    return y_ND.new_zeros(x_TD.shape[0], y_ND.shape[1]).index_add(0, routing.token_N, y_ND)
