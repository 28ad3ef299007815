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

from moe_dist.moe.delayed_wgrad import Later, Part, PutOff
from moe_dist.moe.kernels import select as kernel_select
from moe_dist.moe.kernels.grouped_mm import GroupedMatmul
from moe_dist.moe.permutation import Copies
from moe_dist.moe.routing import Routing
from moe_dist.nn.init import parameter
from moe_dist.nn.token_context import Context

# on(h_RF, which=.., ctx_R=..) -> which hidden units are on, in place of ReLU's sign (`replay`); `which`: rows by
# expert, or which of a dense network's layers
On = Callable[..., torch.Tensor]


class Experts(nn.Module):
    """Two-layer ReLU networks without biases (Shazeer et al. 2017, Appendix C.1: 2 x dim x hidden parameters each)."""

    needs_context = False

    def __init__(self, num_experts: int, dim: int, hidden: int, recompute: bool = False) -> None:
        """`recompute`: hidden activations are not kept, but computed again in backward (Appendix D)."""
        super().__init__()
        self.recompute = recompute
        self.on: On | None = None
        # on a GPU, Triton's kernels in place of torch's. Not before one has timed them (`ours_triton` of
        # benchmarks/layer.py): in Triton's interpreter they are right, whether they are faster is not known
        self.triton = False
        self.w1_eDF = parameter(num_experts, dim, hidden, bound=(3 / dim) ** 0.5)
        self.w2_eFD = parameter(num_experts, hidden, dim, bound=(3 / hidden) ** 0.5)

    def forward(self, x_TD: torch.Tensor, routing: Routing, ctx: Context) -> tuple[torch.Tensor, None]:
        """The sum of each token's weighted outputs: (T, D). Assignments are to this rank's experts."""
        return self.run(x_TD, routing, ctx, 0, None, *self.parameters())

    def outputs(
        self,
        x_RD: torch.Tensor,
        count_e: torch.Tensor,
        on: kernel_select.On | None,
        put_off: PutOff | None,
        *weights: torch.Tensor,
    ) -> torch.Tensor:
        """Of the `count_e[i]` consecutive rows of each expert i: (R, D). `on` decides in place of ReLU's sign."""
        w1_eDF, w2_eFD = weights
        h_RF = grouped_matmul(x_RD, w1_eDF, count_e, put_off and partial(put_off, 0))
        return grouped_matmul(relu(h_RF, on), w2_eFD, count_e, put_off and partial(put_off, 1))

    def run(
        self,
        x_TD: torch.Tensor,
        routing: Routing,
        ctx: Context,
        first: int,
        put_off: PutOff | None,
        *weights: torch.Tensor,
    ) -> tuple[torch.Tensor, None]:
        """Of the experts from `first` on, whose weights are given. `put_off`: where gradients of weights may wait."""
        copies, count_e = Copies(routing.token_N, len(x_TD)), routing.count_E
        on = None
        if self.on:
            of_all_e = F.pad(count_e, (first, len(self.w1_eDF) - first - len(count_e)))
            on = partial(self.on, which=of_all_e, ctx_R=ctx.rows(routing.token_N))
        if fast := self._fast(len(routing.token_N), x_TD, on, *weights):
            options = {"recompute": self.recompute, "put_off": put_off}
            return fast(x_TD, copies, routing.gate_N, count_e, *weights, **options), None
        outputs = partial(checkpoint, self.outputs, use_reentrant=False) if self.recompute else self.outputs
        y_RD = outputs(copies.take(x_TD), count_e, on, put_off, *weights)
        return copies.add_up(y_RD * routing.gate_N.to(x_TD.dtype)[:, None]), None

    @property
    def most_parts(self) -> int:
        return len(self.w1_eDF)

    def parts(self, sizes: list[int]) -> list[Part]:
        """Consecutive parts of the experts, each called as all are. To be made when rows have departed and none has
        arrived: what follows may put gradients of weights off until the rows' gradients have left (`later`)."""
        later = Later(sizes, *self.parameters())

        def part(i: int) -> Part:
            first, put_off = sum(sizes[:i]), partial(later.put_off, i)

            def run(x_TD: torch.Tensor, routing: Routing, ctx: Context) -> tuple[torch.Tensor, None]:
                return self.run(x_TD, routing, ctx, first, put_off, *later.part(i))

            return Part(run, self.needs_context)

        return [part(i) for i in range(len(sizes))]

    def _fast(
        self, num_rows: int, x_TD: torch.Tensor, on: kernel_select.On | None, *weights: torch.Tensor
    ) -> kernel_select.FeedForward | None:
        w1_eDF, w2_eFD = weights
        return kernel_select.fast_path(num_rows, x_TD, w1_eDF, w2_eFD, on, self.triton)


class GeluExperts(Experts):
    """Two-layer GELU networks with biases, as those of a transformer: 2 x dim x hidden + hidden + dim parameters each.

    The biases of an expert are a matrix of one row, whose factored second moment (`outside.Factored`) is exact.
    """

    def __init__(self, num_experts: int, dim: int, hidden: int, recompute: bool = False) -> None:
        super().__init__(num_experts, dim, hidden, recompute)
        self.b1_e1F = parameter(num_experts, 1, hidden, bound=0.0)
        self.b2_e1D = parameter(num_experts, 1, dim, bound=0.0)

    def outputs(
        self,
        x_RD: torch.Tensor,
        count_e: torch.Tensor,
        on: kernel_select.On | None,
        put_off: PutOff | None,
        *weights: torch.Tensor,
    ) -> torch.Tensor:
        w1_eDF, w2_eFD, b1_e1F, b2_e1D = weights
        expert_R = torch.arange(len(count_e), device=x_RD.device).repeat_interleave(count_e, output_size=len(x_RD))
        h_RF = grouped_matmul(x_RD, w1_eDF, count_e, put_off and partial(put_off, 0)) + b1_e1F.squeeze(1)[expert_R]
        # GELU once: the code of Xue et al. 2021 has one after the output as well, the paper and ViT do not
        h_RF = F.gelu(h_RF)
        return grouped_matmul(h_RF, w2_eFD, count_e, put_off and partial(put_off, 1)) + b2_e1D.squeeze(1)[expert_R]

    def _fast(self, *_: object) -> None:
        return None  # one that computes GELU again in backward was no faster (docs/log.md)


def relu(h_RF: torch.Tensor, on: kernel_select.On | None) -> torch.Tensor:
    """`on` decides in place of the sign."""
    return h_RF.relu() if on is None else torch.where(on(h_RF), h_RF, 0)


def grouped_matmul(
    x_RD: torch.Tensor, w_eDF: torch.Tensor, count_e: torch.Tensor, put_off: Callable[..., None] | None = None
) -> torch.Tensor:
    """x @ w[i] for the `count_e[i]` consecutive rows of each expert i: (R, F). No rows: a zero gradient. `put_off`
    takes what forms the gradient of w, which then comes later."""
    return GroupedMatmul.apply(x_RD, w_eDF, count_e, put_off)
