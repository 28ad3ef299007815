"""Dispatchers that send a token once to each rank, or once to each node, that has its experts.

Rows travel in hops. A hop divides the experts into consecutive blocks, one per rank or one per
node. It sends each row once to every block with at least one of the row's experts, together with
the list of these experts. The next dispatcher runs on the received rows and returns one weighted
sum per row. The sums travel back, and each row adds its sums.

  per_rank    one hop to ranks
  per_node    a hop to nodes, then a hop to ranks inside the node. The first hop sends a row to a
              rank with one of its experts; inside the row's own node, the row stays on its rank.

The output equals Shazeer et al. 2017, Eq. 1, with another order of summation: first within a rank.
An expert's rows are ordered by sender, then by token, as in `AllToAllDispatcher`.

Example: 4 experts; rank 0 has two rows with four assignments:

    row 0: experts 2, 3        row 1: experts 0, 2

`per_rank` on 2 ranks with 2 experts each. There are three pairs (row, block), because both experts
of row 0 are on rank 1:

    stays on rank 0    row 1    for expert 0
    to rank 1          row 0    for experts 2, 3
                       row 1    for expert 2

Rank 1 receives 2 rows and 3 assignments, with its experts counted from 0: (row 0, expert 0),
(row 1, expert 0), (row 0, expert 1).

`per_node` on 2 nodes with 2 ranks each, one expert per rank. Two rows cross to node 1 (ranks 2 and
3); `per_rank` would send three:

    hop to nodes       row 1    stays on rank 0
                       row 0    rank 0 -> rank 2
                       row 1    rank 0 -> rank 2
    hop to ranks       row 1    stays on rank 0, for expert 0
                       row 0    stays on rank 2, for expert 2
                       row 1    stays on rank 2, for expert 2
                       row 0    rank 2 -> rank 3, for expert 3

Timeline of `per_node`, with the symbols of `distributed.chunked_all_to_all`: "+" starts an
all-to-all, "-" waits for it, E is the experts' forward, D the gradients of their input rows, and W
the gradients of their weights. `delay_wgrad` moves W behind D, so that it runs while the row
gradients travel between nodes. The all-to-all of counts before each dispatch is not drawn:

    forward, time from left to right
      dispatch to nodes        +======-
      dispatch to ranks                +==-
      experts                              E
      combine from ranks                    +==-
      combine from nodes                        +======-

    backward
      combine from nodes       +======-
      combine from ranks               +==-
      experts                              D     W
      dispatch to ranks                     +==-
      dispatch to nodes                         +======-

tests/distributed/test_overlap.py holds the order in backward.

Legend: T rows on this rank, D width, N assignments, B blocks, U pairs (row, block), P ranks on the
axis; V received rows, M received assignments, L experts per block.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moe_dist.distributed.chunked_all_to_all import ChunkedAllToAll, all_to_all_rows
from moe_dist.distributed.collectives import all_to_all_counts
from moe_dist.distributed.labels import CommLabel
from moe_dist.distributed.mesh import Axis
from moe_dist.moe.dispatch.all_to_all import WaitForChunk, context_of_rows
from moe_dist.moe.dispatch.local import LocalDispatcher
from moe_dist.moe.interfaces import ChunkedExperts, Dispatcher, ExpertModule
from moe_dist.moe.permutation import TokenPermutation
from moe_dist.moe.routing import Routing
from moe_dist.nn.token_context import TokenContext


@dataclass(frozen=True)
class HopPlan:
    """The rows and assignments that this rank sends in a hop, computed without communication.

    `slot_N` and `expert_N` are in the routing's order; `order_N` sorts them for sending.

    Attributes:
        row_U: Rows to send, one per pair (row, block), ordered by receiving rank; int64.
        order_N: Assignments ordered by receiving rank; int64 indices.
        slot_N: Each assignment's row, a position among the rows for the same rank; int64.
        expert_N: Each assignment's expert, an index in its block; int64.
        sent_P2: Rows and assignments to each rank; int64.
    """

    row_U: torch.Tensor
    order_N: torch.Tensor
    slot_N: torch.Tensor
    expert_N: torch.Tensor
    sent_P2: torch.Tensor


def plan_hop(
    routing: Routing, num_rows: int, num_blocks: int, ranks_per_block: int, axis: Axis
) -> HopPlan:
    """Plans this rank's part in a hop.

    Args:
        routing: The rows' assignments to all blocks' experts.
        num_rows: T.
        num_blocks: Number of blocks, which divide the experts evenly.
        ranks_per_block: Consecutive ranks that divide a block's experts evenly.
        axis: The ranks of all blocks.

    Returns:
        This rank's plan.
    """
    num_experts = len(routing.count_E)
    per_block = num_experts // num_blocks
    expert_E = torch.arange(num_experts, device=routing.token_N.device)
    expert_N = expert_E.repeat_interleave(routing.count_E, output_size=len(routing.token_N))

    # all of a row's assignments to one block share one pair (row, block)
    key_N = expert_N // per_block * num_rows + routing.token_N
    key_U, pair_N = key_N.unique(return_inverse=True)
    block_U = key_U // max(num_rows, 1)
    row_U = key_U % max(num_rows, 1)
    expert_in_block_N = expert_N % per_block
    rank_in_block_N = expert_in_block_N * ranks_per_block // per_block
    rank_U = _receiving_rank(block_U, row_U, pair_N, rank_in_block_N, ranks_per_block, axis.index)
    rank_N = rank_U[pair_N]

    order_U = rank_U.argsort(stable=True)
    order_N = rank_N.argsort(stable=True)
    rows_P = torch.bincount(rank_U, minlength=axis.size)
    assignments_P = torch.bincount(rank_N, minlength=axis.size)
    slot_U = torch.empty_like(order_U)
    slot_U[order_U] = torch.arange(len(order_U), device=order_U.device)
    slot_U -= (rows_P.cumsum(0) - rows_P)[rank_U]
    return HopPlan(
        row_U=row_U[order_U],
        order_N=order_N,
        slot_N=slot_U[pair_N],
        expert_N=expert_in_block_N,
        sent_P2=torch.stack([rows_P, assignments_P], 1),
    )


def _receiving_rank(
    block_U: torch.Tensor,
    row_U: torch.Tensor,
    pair_N: torch.Tensor,
    rank_in_block_N: torch.Tensor,
    ranks_per_block: int,
    my_rank: int,
) -> torch.Tensor:
    """Chooses the receiving rank for each pair (row, block).

    Args:
        block_U: Each pair's block.
        row_U: Each pair's row.
        pair_N: Each assignment's pair.
        rank_in_block_N: The rank with the assignment's expert, an index in its block.
        ranks_per_block: Ranks per block.
        my_rank: This rank on the axis.

    Returns:
        Each pair's rank on the axis (U,), int64. In this rank's own block, the row stays on this
        rank. In another block, it goes to a rank with one of its experts; if several ranks have
        one, rows take turns between them.
    """
    if ranks_per_block == 1:
        return block_U
    # row t prefers the ranks in cyclic order, from rank -t % ranks_per_block on; turn 0 is the most
    # preferred rank
    turn_N = (rank_in_block_N + row_U[pair_N]) % ranks_per_block
    no_turn_U = torch.full_like(row_U, ranks_per_block)
    first_turn_U = no_turn_U.scatter_reduce(0, pair_N, turn_N, "amin")
    rank_U = block_U * ranks_per_block + (first_turn_U - row_U) % ranks_per_block
    return torch.where(block_U == my_rank // ranks_per_block, my_rank, rank_U)


class DedupDispatcher(nn.Module):
    """One hop to expert blocks, followed by the next dispatcher."""

    def __init__(
        self,
        axis: Axis,
        num_blocks: int,
        ranks_per_block: int,
        next_dispatcher: Dispatcher,
        comm_dtype: torch.dtype | None = None,
        delay_wgrad: bool = False,
        layer_name: str = "moe",
    ) -> None:
        """Creates a dispatcher.

        Args:
            axis: The ranks of all blocks.
            num_blocks: Number of blocks.
            ranks_per_block: Ranks per block.
            next_dispatcher: Runs on the received rows, with a routing to this block's experts.
            comm_dtype: Wire dtype for rows. None: the rows' dtype.
            delay_wgrad: If True, computes weight gradients after row gradients have been sent.
            layer_name: The layer's name in the collectives' labels.
        """
        super().__init__()
        self.axis = axis
        self.num_blocks = num_blocks
        self.ranks_per_block = ranks_per_block
        self.next_dispatcher = next_dispatcher
        self.comm_dtype = comm_dtype
        self.delay_wgrad = delay_wgrad
        self.layer_name = layer_name

    def forward(
        self, x_TD: torch.Tensor, routing: Routing, experts: ExpertModule, ctx: TokenContext
    ) -> tuple[torch.Tensor, Any]:
        """Runs the experts on this rank's tokens, on all ranks together. A collective.

        Args:
            x_TD: This rank's tokens (T, D).
            routing: Their assignments to all blocks' experts.
            experts: This rank's experts.
            ctx: The tokens' context.

        Returns:
            Each token's sum of weighted expert outputs (T, D), and the experts' statistics.
        """
        num_experts = len(routing.count_E)
        plan = plan_hop(routing, len(x_TD), self.num_blocks, self.ranks_per_block, self.axis)
        label = CommLabel(self.layer_name, "counts", ctx.layer_call)
        received_P2 = all_to_all_counts(plan.sent_P2.flatten(), self.axis, label)
        counts_2P = torch.stack([plan.sent_P2.t(), received_P2.t()]).tolist()
        (send_U, send_N), (receive_V, receive_M) = counts_2P
        rows = (send_U, receive_V)
        assignments = (send_N, receive_M)

        permutation = TokenPermutation(plan.row_U, len(x_TD))
        rows_arrive = self._send(permutation.permute(x_TD), rows, ctx, self.comm_dtype)
        slot_and_expert_N2 = torch.stack([plan.slot_N, plan.expert_N], 1)[plan.order_N].int()
        slots_arrive = self._send(slot_and_expert_N2, assignments, ctx)
        gates_arrive = self._send(routing.gate_N[plan.order_N], assignments, ctx)
        ctx_V = ctx
        if experts.needs_context:
            sent = ctx.select(plan.row_U)
            keys_arrive = self._send(torch.stack([sent.sample_T, sent.position_T], 1), rows, ctx)

        # FENCE: after the sends and before the first wait, see `moe.delayed_wgrad`
        local_experts = experts
        if self.delay_wgrad and isinstance(experts, ChunkedExperts):
            (local_experts,) = experts.split_experts([num_experts // self.axis.size])

        if experts.needs_context:
            ctx_V = context_of_rows(keys_arrive(), ctx)
        x_VD = rows_arrive()
        slot_and_expert_M2 = slots_arrive().long()
        gate_M = gates_arrive()
        local_routing = self._local_routing(
            slot_and_expert_M2, gate_M, received_P2, num_experts // self.num_blocks
        )
        y_VD, stats = self.next_dispatcher(x_VD, local_routing, local_experts, ctx_V)
        label = CommLabel(self.layer_name, "combine", ctx.layer_call)
        y_UD = all_to_all_rows(y_VD, receive_V, send_U, self.axis, label, self.comm_dtype)
        return permutation.unpermute(y_UD), stats

    def _send(
        self,
        x_U: torch.Tensor,
        send_and_receive: tuple[list[int], list[int]],
        ctx: TokenContext,
        comm_dtype: torch.dtype | None = None,
    ) -> WaitForChunk:
        """Starts to send rows (U, ...); returns a function to wait for the received (V, ...)."""
        label = CommLabel(self.layer_name, "dispatch", ctx.layer_call)
        (wait,) = ChunkedAllToAll([send_and_receive], self.axis, label, comm_dtype).scatter(x_U)
        return wait

    @staticmethod
    def _local_routing(
        slot_and_expert_M2: torch.Tensor,
        gate_M: torch.Tensor,
        received_P2: torch.Tensor,
        experts_per_block: int,
    ) -> Routing:
        """Builds the routing from the received rows to this block's experts.

        Args:
            slot_and_expert_M2: Each assignment's row, a position among its sender's rows, and its
                expert, an index in the block; int64, ordered by sender.
            gate_M: Gate weights.
            received_P2: Rows and assignments from each rank, int64.
            experts_per_block: L.

        Returns:
            The M assignments, sorted by expert, and by sender within an expert.
        """
        rows_P = received_P2[:, 0]
        assignments_P = received_P2[:, 1]
        first_row_P = rows_P.cumsum(0) - rows_P
        first_row_M = first_row_P.repeat_interleave(
            assignments_P, output_size=len(slot_and_expert_M2)
        )
        row_M = slot_and_expert_M2[:, 0] + first_row_M
        expert_M, order_M = slot_and_expert_M2[:, 1].sort(stable=True)
        count_L = torch.bincount(expert_M, minlength=experts_per_block)
        return Routing(row_M[order_M], gate_M[order_M], count_L)


def per_rank(
    axis: Axis,
    comm_dtype: torch.dtype | None = None,
    delay_wgrad: bool = False,
    layer_name: str = "moe",
) -> DedupDispatcher:
    """Builds a dispatcher with one hop, to ranks.

    Args:
        axis: The expert-parallel ranks.
        comm_dtype: Wire dtype for rows. None: the rows' dtype.
        delay_wgrad: If True, computes weight gradients after row gradients have been sent.
        layer_name: The layer's name in the collectives' labels.

    Returns:
        A dispatcher that sends a row once to each rank with at least one of its experts.
    """
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
    """Builds a dispatcher with two hops: to nodes, then to ranks inside the node.

    Args:
        axis: The expert-parallel ranks.
        intra_node: The expert-parallel ranks on this node; consecutive, equally many per node.
        comm_dtype: Wire dtype for rows. None: the rows' dtype.
        delay_wgrad: If True, computes weight gradients after row gradients have been sent.
        layer_name: The layer's name in the collectives' labels.

    Returns:
        A dispatcher that sends a row once to each node with at least one of its experts, and inside
        the node once to each rank with at least one.
    """
    within_node = per_rank(intra_node, comm_dtype, layer_name=layer_name)
    num_nodes = axis.size // intra_node.size
    return DedupDispatcher(
        axis, num_nodes, intra_node.size, within_node, comm_dtype, delay_wgrad, layer_name
    )
