"""Experts as stacked weights. `outputs` is their mathematics; `run` gives the same by the device's fast path, where
there is one (`kernels`).

Legend: T tokens, R copies of them sorted by expert, D width, F hidden units, e experts on this rank (all E of them
before `parallelize`).
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from moe_dist.moe.delayed_wgrad import DeferGrad, DelayedWeightGrads, ExpertChunk
from moe_dist.moe.kernels import select as kernel_select
from moe_dist.moe.kernels.grouped_mm import GroupedMatmul
from moe_dist.moe.permutation import TokenPermutation
from moe_dist.moe.routing import Routing
from moe_dist.nn.init import uniform_parameter
from moe_dist.nn.token_context import TokenContext

# on(h_RF, which=.., ctx_R=..) -> which hidden units are on, in place of ReLU's sign (`replay`); `which`: rows by
# expert, or which of a dense network's layers
ReluMask = Callable[..., torch.Tensor]


class Experts(nn.Module):
    """Two-layer ReLU networks without biases (Shazeer et al. 2017, Appendix C.1: 2 x dim x hidden parameters each)."""

    needs_context = False

    def __init__(
        self, num_experts: int, dim: int, hidden_dim: int, recompute: bool = False
    ) -> None:
        """`recompute`: hidden activations are not kept, but computed again in backward (Appendix D)."""
        super().__init__()
        self.recompute = recompute
        self.relu_mask_override: ReluMask | None = None
        # on a GPU, Triton's kernels in place of torch's. Not before one has timed them (`ours_triton` of
        # benchmarks/layer.py): in Triton's interpreter they are right, whether they are faster is not known
        self.use_triton = False
        self.w1_eDF = uniform_parameter(num_experts, dim, hidden_dim, bound=(3 / dim) ** 0.5)
        self.w2_eFD = uniform_parameter(num_experts, hidden_dim, dim, bound=(3 / hidden_dim) ** 0.5)

    def forward(
        self, x_TD: torch.Tensor, routing: Routing, ctx: TokenContext
    ) -> tuple[torch.Tensor, None]:
        """The sum of each token's weighted outputs: (T, D). Assignments are to this rank's experts."""
        return self.run_experts(x_TD, routing, ctx, 0, None, *self.parameters())

    def expert_ffn(
        self,
        x_RD: torch.Tensor,
        count_e: torch.Tensor,
        on: kernel_select.ReluMask | None,
        defer: DeferGrad | None,
        *weights: torch.Tensor,
    ) -> torch.Tensor:
        """Of the `count_e[i]` consecutive rows of each expert i: (R, D). `on` decides in place of ReLU's sign."""
        w1_eDF, w2_eFD = weights
        h_RF = grouped_matmul(x_RD, w1_eDF, count_e, defer and partial(defer, 0))
        return grouped_matmul(masked_relu(h_RF, on), w2_eFD, count_e, defer and partial(defer, 1))

    def run_experts(
        self,
        x_TD: torch.Tensor,
        routing: Routing,
        ctx: TokenContext,
        first: int,
        defer: DeferGrad | None,
        *weights: torch.Tensor,
    ) -> tuple[torch.Tensor, None]:
        """Of the experts from `first` on, whose weights are given. `defer`: where gradients of weights may wait."""
        copies, count_e = TokenPermutation(routing.token_N, len(x_TD)), routing.count_E
        on = None
        if self.relu_mask_override:
            of_all_e = F.pad(count_e, (first, len(self.w1_eDF) - first - len(count_e)))
            on = partial(self.relu_mask_override, which=of_all_e, ctx_R=ctx.select(routing.token_N))
        if fast := self._select_kernel(len(routing.token_N), x_TD, on, *weights):
            options = {"recompute": self.recompute, "defer": defer}
            return fast(x_TD, copies, routing.gate_N, count_e, *weights, **options), None
        outputs = (
            partial(checkpoint, self.expert_ffn, use_reentrant=False)
            if self.recompute
            else self.expert_ffn
        )
        y_RD = outputs(copies.permute(x_TD), count_e, on, defer, *weights)
        return copies.unpermute(y_RD * routing.gate_N.to(x_TD.dtype)[:, None]), None

    @property
    def max_chunks(self) -> int:
        return len(self.w1_eDF)

    def split_experts(self, sizes: list[int]) -> list[ExpertChunk]:
        """Consecutive parts of the experts, each called as all are. To be made when rows have departed and none has
        arrived: what follows may put gradients of weights off until the rows' gradients have left (`later`)."""
        later = DelayedWeightGrads(sizes, *self.parameters())

        def part(i: int) -> ExpertChunk:
            first, defer = sum(sizes[:i]), partial(later.defer, i)

            def run(
                x_TD: torch.Tensor, routing: Routing, ctx: TokenContext
            ) -> tuple[torch.Tensor, None]:
                return self.run_experts(x_TD, routing, ctx, first, defer, *later.chunk(i))

            return ExpertChunk(run, self.needs_context)

        return [part(i) for i in range(len(sizes))]

    def _select_kernel(
        self,
        num_rows: int,
        x_TD: torch.Tensor,
        on: kernel_select.ReluMask | None,
        *weights: torch.Tensor,
    ) -> kernel_select.FeedForward | None:
        w1_eDF, w2_eFD = weights
        return kernel_select.select_kernel(num_rows, x_TD, w1_eDF, w2_eFD, on, self.use_triton)


class GeluExperts(Experts):
    """Two-layer GELU networks with biases, as those of a transformer: 2 x dim x hidden + hidden + dim parameters each.

    The biases of an expert are a matrix of one row, whose factored second moment (`outside.Factored`) is exact.
    """

    def __init__(
        self, num_experts: int, dim: int, hidden_dim: int, recompute: bool = False
    ) -> None:
        super().__init__(num_experts, dim, hidden_dim, recompute)
        self.b1_e1F = uniform_parameter(num_experts, 1, hidden_dim, bound=0.0)
        self.b2_e1D = uniform_parameter(num_experts, 1, dim, bound=0.0)

    def expert_ffn(
        self,
        x_RD: torch.Tensor,
        count_e: torch.Tensor,
        on: kernel_select.ReluMask | None,
        defer: DeferGrad | None,
        *weights: torch.Tensor,
    ) -> torch.Tensor:
        w1_eDF, w2_eFD, b1_e1F, b2_e1D = weights
        expert_R = torch.arange(len(count_e), device=x_RD.device).repeat_interleave(
            count_e, output_size=len(x_RD)
        )
        h_RF = (
            grouped_matmul(x_RD, w1_eDF, count_e, defer and partial(defer, 0))
            + b1_e1F.squeeze(1)[expert_R]
        )
        # GELU once: the code of Xue et al. 2021 has one after the output as well, the paper and ViT do not
        h_RF = F.gelu(h_RF)
        return (
            grouped_matmul(h_RF, w2_eFD, count_e, defer and partial(defer, 1))
            + b2_e1D.squeeze(1)[expert_R]
        )

    def _select_kernel(self, *_: object) -> None:
        return None  # one that computes GELU again in backward was no faster (docs/log.md)


def masked_relu(h_RF: torch.Tensor, on: kernel_select.ReluMask | None) -> torch.Tensor:
    """`on` decides in place of the sign."""
    return h_RF.relu() if on is None else torch.where(on(h_RF), h_RF, 0)


def grouped_matmul(
    x_RD: torch.Tensor,
    w_eDF: torch.Tensor,
    count_e: torch.Tensor,
    defer: Callable[..., None] | None = None,
) -> torch.Tensor:
    """x @ w[i] for the `count_e[i]` consecutive rows of each expert i: (R, F). No rows: a zero gradient. `defer`
    takes what forms the gradient of w, which then comes later."""
    return GroupedMatmul.apply(x_RD, w_eDF, count_e, defer)
