"""Rows to their experts and back: `exchange(x_TD, routing, experts, ctx) -> y_TD, stats`.

Both exchanges compute y_t = sum of gate_n * expert_n(x_t) over the assignments n of token t (Shazeer et al. 2017,
Eq. 1); on CPU they add in the same order. A weight travels with its row and the experts apply it, so its gradient is
formed at the owner, and experts that are layers themselves know the weight that they were chosen with.

The ragged exchange, in order:
  1. counts: every rank learns how many rows it will get for each of its experts;
  2. dispatch: exactly those rows and weights travel, and their context where the experts want it; of each rank's first
     experts in the first piece, and so on, so that the next travels while the experts run on one;
  3. regroup: rows come in order of sender; a routing of their own tells the experts of them;
  4. the experts run, and weight their rows;
  5. combine: the rows return;
  6. each token sums what came back for it.
No padding, nothing dropped. A rank with no rows to send or to receive makes every call all the same. In backward the
same pieces go the other way, and gradients of weights are formed while the last ones travel (`later`).

Legend: T tokens, D width, N assignments of this rank's tokens, R rows held here, E experts, e of this rank, P ranks,
C pieces.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from moe_dist.distributed.chunked_all_to_all import ChunkedAllToAll
from moe_dist.distributed.collectives import all_to_all_counts
from moe_dist.distributed.labels import CommLabel
from moe_dist.distributed.mesh import Axis
from moe_dist.moe.permutation import TokenPermutation
from moe_dist.moe.routing import Routing
from moe_dist.nn.token_context import TokenContext


class ExpertModule(Protocol):
    """Any module that takes rows and a routing of them to its experts, and gives each row's sum of weighted outputs.

    `needs_context` says whether it looks at what `ctx` has of each row; otherwise that may be of other rows.
    One that has `parts(sizes)` (`experts.Experts`) can run some of its experts at a time, `most_parts` at most, and put
    gradients of their weights off.
    """

    needs_context: bool

    def __call__(
        self, x_TD: torch.Tensor, routing: Routing, ctx: TokenContext
    ) -> tuple[torch.Tensor, Any]: ...


class LocalDispatcher:
    """All experts are on this rank."""

    def __call__(
        self, x_TD: torch.Tensor, routing: Routing, experts: ExpertModule, ctx: TokenContext
    ) -> tuple[torch.Tensor, Any]:
        return experts(x_TD, routing, ctx)


@dataclass(frozen=True)
class AllToAllDispatcher:
    """Experts are spread over the ranks of an axis, in consecutive blocks of equal size.

    `chunks`: that rows travel in, at most one for each of a rank's experts; 0: in one, and nothing else is done
    meanwhile. `wire`: a dtype to travel in. `layer_name`: the place in the labels of its collectives."""

    axis: Axis
    num_chunks: int = 0
    comm_dtype: torch.dtype | None = None
    layer_name: str = "moe"

    def __call__(
        self, x_TD: torch.Tensor, routing: Routing, experts: ExpertModule, ctx: TokenContext
    ) -> tuple[torch.Tensor, Any]:
        count_Pe = all_to_all_counts(
            routing.count_E, self.axis, CommLabel(self.layer_name, "counts", ctx.layer_call)
        )  # 1
        most_parts = getattr(experts, "max_chunks", 0) if self.num_chunks else 0
        sizes_C = [
            len(c)
            for c in torch.arange(count_Pe.shape[1]).chunk(max(1, min(self.num_chunks, most_parts)))
        ]
        send_PC, get_PC = (
            _by_piece(count.view_as(count_Pe), sizes_C) for count in (routing.count_E, count_Pe)
        )
        send_CP, get_CP = torch.stack([send_PC.t(), get_PC.t()]).tolist()
        there, back = (
            list(zip(send_CP, get_CP, strict=True)),
            list(zip(get_CP, send_CP, strict=True)),
        )

        def dispatch(
            x_N: torch.Tensor, wire: torch.dtype | None = None
        ) -> list[Callable[[], torch.Tensor]]:
            return ChunkedAllToAll(
                there, self.axis, CommLabel(self.layer_name, "dispatch", ctx.layer_call), wire
            ).scatter(x_N)

        order_N = _by_expert(send_PC, len(routing.token_N))
        copies = TokenPermutation(routing.token_N, len(x_TD)).reordered(order_N)
        x_arrives_C = dispatch(copies.permute(x_TD), self.comm_dtype)  # 2
        gate_arrives_C = dispatch(routing.gate_N[order_N])
        if experts.needs_context:
            mine = ctx.select(copies.token_N)
            key_arrives_C = dispatch(torch.stack([mine.sample_T, mine.position_T], 1))
        parts: list[Any] = experts.split_experts(sizes_C) if most_parts else [experts]  # type: ignore[attr-defined]
        combine = ChunkedAllToAll(
            back, self.axis, CommLabel(self.layer_name, "combine", ctx.layer_call), self.comm_dtype
        )
        returning = []
        for c, (part, count_Pc) in enumerate(zip(parts, count_Pe.split(sizes_C, 1), strict=True)):
            if experts.needs_context:
                key_R2 = key_arrives_C[c]()
                ctx = ctx.with_tokens(
                    key_R2[:, 0], key_R2[:, 1], torch.ones_like(key_R2[:, 0], dtype=torch.bool)
                )
            x_RD, gate_R = x_arrives_C[c](), gate_arrives_C[c]()
            order_R = _by_expert(count_Pc, len(x_RD))  # 3
            y_RD, stats = part(
                x_RD, Routing(order_R, gate_R.index_select(0, order_R), count_Pc.sum(0)), ctx
            )  # 4
            returning.append(combine.send_chunk(c, y_RD))  # 5
        return copies.unpermute(combine.gather(returning)), stats  # 6


def _by_piece(count_Pe: torch.Tensor, sizes_C: list[int]) -> torch.Tensor:
    """The rows of each rank in each piece: (P, C)."""
    return torch.stack([part.sum(1) for part in count_Pe.split(sizes_C, 1)], 1)


def _by_expert(count_Pe: torch.Tensor, num_rows: int) -> torch.Tensor:
    """The order that sorts rows that lie by (rank, expert), or (rank, piece), by the latter first: int64 (R,)."""
    num_senders, num_experts = count_Pe.shape
    expert_PE = torch.arange(num_experts, device=count_Pe.device).expand(num_senders, -1)
    expert_R = expert_PE.flatten().repeat_interleave(count_Pe.flatten(), output_size=num_rows)
    return expert_R.argsort(stable=True)
