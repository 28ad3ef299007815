"""An exchange that sends a token once to each rank that has experts of it, and once to each node over slow links.

Rows travel in hops. A hop cuts the experts that it reaches into consecutive blocks (of nodes, or of ranks), and sends
each row once to every block that an expert of it is in, with the list of its experts there. Behind it another exchange
goes on with what has arrived (the next hop, or `LocalDispatcher` at the end of the way), and gives one sum of weighted
outputs for each row. These return, and each row adds up what comes back for it.

  once        a hop to the ranks
  node        a hop to the nodes: to a rank there that has a chosen expert, a row's own node being where it is; then a
              hop to the ranks of the node

So y_t is that of Shazeer et al. 2017, Eq. 1, but for the order of its sum: a rank's share first. Within an expert rows
lie in order of sender, then of token, as in the plain exchange.

Legend: T rows here, D width, N assignments of them, B blocks, U pairs (row, block), P ranks of the axis; V rows and M
assignments that arrive.
"""

from dataclasses import dataclass
from typing import Any

import torch

from moe_dist.distributed.chunked_all_to_all import ChunkedAllToAll, all_to_all_rows
from moe_dist.distributed.collectives import all_to_all_counts
from moe_dist.distributed.labels import CommLabel
from moe_dist.distributed.mesh import Axis
from moe_dist.moe.dispatch.all_to_all import ExpertModule, LocalDispatcher
from moe_dist.moe.permutation import TokenPermutation
from moe_dist.moe.routing import Routing
from moe_dist.nn.token_context import TokenContext


@dataclass(frozen=True)
class DedupDispatcher:
    """To `blocks` blocks of experts; `then` is the exchange behind it."""

    axis: Axis
    num_blocks: int
    ranks_per_block: int
    next_dispatcher: Any
    comm_dtype: torch.dtype | None = None  # to travel in
    delay_wgrad: bool = False  # gradients of weights, until those of the rows have left
    layer_name: str = "moe"  # the place in the labels of its collectives

    def __call__(
        self, x_TD: torch.Tensor, routing: Routing, experts: ExpertModule, ctx: TokenContext
    ) -> tuple[torch.Tensor, Any]:
        num_rows, num_experts = len(x_TD), len(routing.count_E)
        per_block = num_experts // self.num_blocks
        expert_N = torch.arange(num_experts, device=x_TD.device).repeat_interleave(
            routing.count_E, output_size=len(routing.token_N)
        )
        pair_U, of_N = (expert_N // per_block * num_rows + routing.token_N).unique(
            return_inverse=True
        )
        block_U, row_U = pair_U // max(num_rows, 1), pair_U % max(num_rows, 1)
        rank_U = self._land(
            block_U, row_U, of_N, expert_N % per_block * self.ranks_per_block // per_block
        )

        order_U, order_N = rank_U.argsort(stable=True), rank_U[of_N].argsort(stable=True)
        sent_P2 = torch.stack(
            [torch.bincount(r, minlength=self.axis.size) for r in (rank_U, rank_U[of_N])], 1
        )
        got_P2 = all_to_all_counts(
            sent_P2.flatten(), self.axis, CommLabel(self.layer_name, "counts", ctx.layer_call)
        )
        (send_U, send_N), (get_V, get_M) = torch.stack([sent_P2.t(), got_P2.t()]).tolist()
        place_U = torch.empty_like(order_U)  # among the rows for its rank
        place_U[order_U] = torch.arange(len(order_U), device=x_TD.device)
        place_U -= (sent_P2[:, 0].cumsum(0) - sent_P2[:, 0])[rank_U]

        def dispatch(x_U: torch.Tensor, send: list[int], get: list[int], wire: Any = None) -> Any:
            return ChunkedAllToAll(
                [(send, get)],
                self.axis,
                CommLabel(self.layer_name, "dispatch", ctx.layer_call),
                wire,
            ).scatter(x_U)[0]

        row_U = row_U[order_U]
        copies = TokenPermutation(row_U, num_rows)
        x_arrives = dispatch(copies.permute(x_TD), send_U, get_V, self.comm_dtype)
        about_N2 = torch.stack([place_U[of_N], expert_N % per_block], 1)[order_N].int()
        about_arrives = dispatch(about_N2, send_N, get_M)
        gate_arrives = dispatch(routing.gate_N[order_N], send_N, get_M)
        ctx_V, needs_context = ctx, experts.needs_context
        if needs_context:
            mine = ctx.select(row_U)
            key_arrives = dispatch(torch.stack([mine.sample_T, mine.position_T], 1), send_U, get_V)
        if self.delay_wgrad and hasattr(experts, "split_experts"):
            (experts,) = experts.split_experts([num_experts // self.axis.size])
        if needs_context:
            key_V2 = key_arrives()
            ctx_V = ctx.with_tokens(
                key_V2[:, 0], key_V2[:, 1], torch.ones_like(key_V2[:, 0], dtype=torch.bool)
            )
        x_VD, about_M2, gate_M = x_arrives(), about_arrives().long(), gate_arrives()

        first_P = got_P2[:, 0].cumsum(0) - got_P2[:, 0]
        row_M = about_M2[:, 0] + first_P.repeat_interleave(got_P2[:, 1], output_size=len(about_M2))
        expert_M, by_expert_M = about_M2[:, 1].sort(stable=True)
        there = Routing(
            row_M[by_expert_M], gate_M[by_expert_M], torch.bincount(expert_M, minlength=per_block)
        )
        y_VD, stats = self.next_dispatcher(x_VD, there, experts, ctx_V)
        y_UD = all_to_all_rows(
            y_VD,
            get_V,
            send_U,
            self.axis,
            CommLabel(self.layer_name, "combine", ctx.layer_call),
            self.comm_dtype,
        )
        return copies.unpermute(y_UD), stats

    def _land(
        self, block_U: torch.Tensor, row_U: torch.Tensor, of_N: torch.Tensor, rank_N: torch.Tensor
    ) -> torch.Tensor:
        """The rank that each pair (row, block) goes to. `of_N`: the pair of each assignment; `rank_N`: which of the
        block's ranks has its expert. Among several that would do rows take turns."""
        ranks, mine = self.ranks_per_block, self.axis.index
        turn_N = (rank_N + row_U[of_N]) % ranks
        turn_U = torch.full_like(row_U, ranks).scatter_reduce(0, of_N, turn_N, "amin")
        rank_U = block_U * ranks + (turn_U - row_U) % ranks
        return torch.where(block_U == mine // ranks, mine, rank_U) if ranks > 1 else block_U


def per_rank(
    axis: Axis,
    comm_dtype: torch.dtype | None = None,
    delay_wgrad: bool = False,
    layer_name: str = "moe",
) -> DedupDispatcher:
    """To each rank of the axis once."""
    return DedupDispatcher(
        axis, axis.size, 1, LocalDispatcher(), comm_dtype, delay_wgrad, layer_name
    )


def per_node(
    axis: Axis,
    intra_node: Axis,
    comm_dtype: torch.dtype | None = None,
    delay_wgrad: bool = False,
    layer_name: str = "moe",
) -> DedupDispatcher:
    """To each node once; `inside`: the ranks of the axis in this rank's node, consecutive and as many in every node."""
    return DedupDispatcher(
        axis,
        axis.size // intra_node.size,
        intra_node.size,
        per_rank(intra_node, comm_dtype, layer_name=layer_name),
        comm_dtype,
        delay_wgrad,
        layer_name,
    )
