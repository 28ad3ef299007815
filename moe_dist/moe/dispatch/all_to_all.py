"""All-to-all dispatcher: sends one row per assignment, with exact sizes.

It computes y_t = sum of gate_n * expert_n(x_t) over token t's assignments n (Shazeer et al. 2017,
Eq. 1). On CPU it adds in the same order as `LocalDispatcher`. A gate weight travels with its row,
and the experts apply it. So its gradient is computed on the expert's rank, and an expert group
(`moe.hierarchical`) receives its primary gate weight.

The steps in `AllToAllDispatcher.forward`:

  1. counts      each rank receives the row counts for its experts from each rank
  2. dispatch    the rows travel with their gate weights, and with their context if the experts
                 need it; chunk by chunk, so that one chunk travels while the experts run on another
  3. regroup     rows arrive ordered by sender; a local routing assigns them to this rank's experts
  4. experts     run, and apply the gate weights
  5. combine     the rows return to their senders
  6. unpermute   each token sums its returned rows

Example for step 2: experts 0 and 1 are on rank 0, experts 2 and 3 on rank 1. With 2 chunks, chunk
0 is each rank's first expert. Rank 0 has the rows a, b, c, d for experts 0, 1, 2, 3 and sends:

    chunk 0    a to rank 0    c to rank 1
    chunk 1    b to rank 0    d to rank 1

No row is padded or dropped. A rank without rows to send or to receive still makes every call. In
backward the chunks travel in the other direction, and weight gradients are computed while the last
chunks travel (`moe.delayed_wgrad`). `distributed.chunked_all_to_all` has the timeline.

Legend: T tokens, D width, N assignments on this rank, R received rows, E experts over all ranks, e
experts on this rank, P ranks, C chunks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from moe_dist.distributed.chunked_all_to_all import ChunkedAllToAll
from moe_dist.distributed.collectives import all_to_all_counts
from moe_dist.distributed.labels import CommLabel
from moe_dist.distributed.mesh import Axis
from moe_dist.moe.interfaces import ChunkedExperts, ExpertModule
from moe_dist.moe.permutation import TokenPermutation
from moe_dist.moe.routing import Routing
from moe_dist.nn.token_context import TokenContext

# wait() -> one chunk's received rows (R, ...)
WaitForChunk = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class _ChunkPlan:
    """Row counts per chunk.

    Attributes:
        sizes_C: This rank's experts per chunk.
        send_PC: Rows from this rank to each rank in each chunk, int64.
        there_C: For each chunk: (rows sent to each rank, rows received from each rank).
        back_C: The same for the way back.
    """

    sizes_C: list[int]
    send_PC: torch.Tensor
    there_C: list[tuple[list[int], list[int]]]
    back_C: list[tuple[list[int], list[int]]]


class AllToAllDispatcher(nn.Module):
    """Dispatches to experts in equal consecutive blocks, one block per rank on an axis."""

    def __init__(
        self,
        axis: Axis,
        num_chunks: int = 0,
        comm_dtype: torch.dtype | None = None,
        layer_name: str = "moe",
    ) -> None:
        """Creates a dispatcher.

        Args:
            axis: The expert-parallel ranks.
            num_chunks: Chunks into which rows are split, at most one per expert on a rank. 0: one
                chunk, which overlaps with neither experts nor weight gradients.
            comm_dtype: Wire dtype for rows. None: the rows' dtype.
            layer_name: The layer's name in the collectives' labels.
        """
        super().__init__()
        self.axis = axis
        self.num_chunks = num_chunks
        self.comm_dtype = comm_dtype
        self.layer_name = layer_name

    def forward(
        self, x_TD: torch.Tensor, routing: Routing, experts: ExpertModule, ctx: TokenContext
    ) -> tuple[torch.Tensor, Any]:
        """Runs the experts on this rank's tokens, on all ranks together. A collective.

        Args:
            x_TD: This rank's tokens (T, D).
            routing: Their assignments to all ranks' experts.
            experts: This rank's experts.
            ctx: The tokens' context.

        Returns:
            Each token's sum of weighted expert outputs (T, D), and the experts' statistics for the
            last chunk; experts with statistics run in one chunk.
        """
        label = CommLabel(self.layer_name, "counts", ctx.layer_call)
        count_Pe = all_to_all_counts(routing.count_E, self.axis, label)  # 1
        chunked = experts if self.num_chunks and isinstance(experts, ChunkedExperts) else None
        plan = self._plan(routing.count_E, count_Pe, chunked.max_chunks if chunked else 0)

        order_N = _sort_by_column(plan.send_PC, len(routing.token_N))  # 2
        permutation = TokenPermutation(routing.token_N, len(x_TD)).reordered(order_N)
        rows_arrive_C = self._send(permutation.permute(x_TD), plan, ctx, self.comm_dtype)
        gates_arrive_C = self._send(routing.gate_N[order_N], plan, ctx)
        keys_arrive_C: list[WaitForChunk] = []
        if experts.needs_context:
            sent = ctx.select(permutation.token_N)
            keys_arrive_C = self._send(torch.stack([sent.sample_T, sent.position_T], 1), plan, ctx)

        # FENCE: after the sends and before the first wait, see `moe.delayed_wgrad`
        chunks: Sequence[ExpertModule] = [experts]
        if chunked:
            chunks = chunked.split_experts(plan.sizes_C)

        label = CommLabel(self.layer_name, "combine", ctx.layer_call)
        combine = ChunkedAllToAll(plan.back_C, self.axis, label, self.comm_dtype)
        returning = []
        stats = None
        for c, count_Pc in enumerate(count_Pe.split(plan.sizes_C, 1)):
            if experts.needs_context:
                ctx = context_of_rows(keys_arrive_C[c](), ctx)
            x_RD = rows_arrive_C[c]()
            gate_R = gates_arrive_C[c]()
            order_R = _sort_by_column(count_Pc, len(x_RD))  # 3
            local_routing = Routing(order_R, gate_R.index_select(0, order_R), count_Pc.sum(0))
            y_RD, stats = chunks[c](x_RD, local_routing, ctx)  # 4
            returning.append(combine.send_chunk(c, y_RD))  # 5
        return permutation.unpermute(combine.gather(returning)), stats  # 6

    def _plan(self, count_E: torch.Tensor, count_Pe: torch.Tensor, max_chunks: int) -> _ChunkPlan:
        """Splits the experts into chunks and copies their row counts to the host.

        Args:
            count_E: Rows from this rank to each expert, int64.
            count_Pe: Rows from each rank to each expert on this rank, int64.
            max_chunks: Maximum number of chunks for the experts; 0 if they cannot run in chunks.

        Returns:
            Row counts for at most `min(self.num_chunks, max_chunks)` chunks, and at least one.
            Each chunk has equally many of this rank's experts; the last may have fewer.
        """
        num_experts = count_Pe.shape[1]
        num_chunks = max(1, min(self.num_chunks, max_chunks))
        sizes_C = [len(chunk) for chunk in torch.arange(num_experts).chunk(num_chunks)]
        send_PC = _sum_by_chunk(count_E.view_as(count_Pe), sizes_C)
        receive_PC = _sum_by_chunk(count_Pe, sizes_C)
        send_CP, receive_CP = torch.stack([send_PC.t(), receive_PC.t()]).tolist()
        there_C = list(zip(send_CP, receive_CP, strict=True))
        back_C = list(zip(receive_CP, send_CP, strict=True))
        return _ChunkPlan(sizes_C, send_PC, there_C, back_C)

    def _send(
        self,
        x_N: torch.Tensor,
        plan: _ChunkPlan,
        ctx: TokenContext,
        comm_dtype: torch.dtype | None = None,
    ) -> list[WaitForChunk]:
        """Starts to send rows (N, ...), and returns one wait function per chunk."""
        label = CommLabel(self.layer_name, "dispatch", ctx.layer_call)
        return ChunkedAllToAll(plan.there_C, self.axis, label, comm_dtype).scatter(x_N)


def context_of_rows(key_R2: torch.Tensor, ctx: TokenContext) -> TokenContext:
    """Returns the context of R valid rows from their (sample, position)."""
    valid_R = torch.ones_like(key_R2[:, 0], dtype=torch.bool)
    return ctx.with_tokens(key_R2[:, 0], key_R2[:, 1], valid_R)


def _sum_by_chunk(count_Pe: torch.Tensor, sizes_C: list[int]) -> torch.Tensor:
    """Returns the row counts per rank and expert chunk (P, C), int64."""
    return torch.stack([chunk.sum(1) for chunk in count_Pe.split(sizes_C, 1)], 1)


def _sort_by_column(count_Pe: torch.Tensor, num_rows: int) -> torch.Tensor:
    """Returns the order that sorts rows by column, then by rank.

    Args:
        count_Pe: Rows per pair (rank, expert) or (rank, chunk), int64; the rows are given sorted
            by rank, then by column.
        num_rows: Their sum.

    Returns:
        Indices of the rows by expert or chunk, then by rank, int64 (R,).
    """
    num_senders, num_experts = count_Pe.shape
    expert_PE = torch.arange(num_experts, device=count_Pe.device).expand(num_senders, -1)
    expert_R = expert_PE.flatten().repeat_interleave(count_Pe.flatten(), output_size=num_rows)
    return expert_R.argsort(stable=True)
