"""Experts as stacked weights and a grouped matmul.

Legend: R rows sorted by expert, D width, F hidden units, e experts on this rank (all E of them before `parallelize`).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from moe_dist.context import Context
from moe_dist.parameters import parameter

# relu(h_RF, which, ctx_R) -> hidden units; `which`: rows by expert, or which of a dense network's layers
Relu = Callable[[torch.Tensor, Any, Context | None], torch.Tensor]


def relu(h_RF: torch.Tensor, which: Any, ctx_R: Context | None) -> torch.Tensor:
    """The plain one; another may know whose units they are (`replay`)."""
    return h_RF.relu()


class Experts(nn.Module):
    """Two-layer ReLU networks without biases (Shazeer et al. 2017, Appendix C.1: 2 x dim x hidden parameters each)."""

    needs_context = False

    def __init__(self, num_experts: int, dim: int, hidden: int, recompute: bool = False) -> None:
        """`recompute`: hidden activations are not kept, but computed again in backward (Appendix D)."""
        super().__init__()
        self.recompute = recompute
        self.relu: Relu = relu
        self.w1_eDF = parameter(num_experts, dim, hidden, bound=(3 / dim) ** 0.5)
        self.w2_eFD = parameter(num_experts, hidden, dim, bound=(3 / hidden) ** 0.5)

    def forward(
        self, x_RD: torch.Tensor, gate_R: torch.Tensor, count_e: torch.Tensor, ctx_R: Context | None
    ) -> tuple[torch.Tensor, None]:
        """Rows (R, D) sorted by expert, and their weights (R,) -> weighted rows (R, D)."""
        y_RD = (
            checkpoint(self._two_layers, x_RD, count_e, ctx_R, use_reentrant=False)
            if self.recompute
            else self._two_layers(x_RD, count_e, ctx_R)
        )
        return y_RD * gate_R.to(x_RD.dtype)[:, None], None

    def _two_layers(self, x_RD: torch.Tensor, count_e: torch.Tensor, ctx_R: Context | None) -> torch.Tensor:
        hidden_RF = self.relu(grouped_matmul(x_RD, self.w1_eDF, count_e), count_e, ctx_R)
        return grouped_matmul(hidden_RF, self.w2_eFD, count_e)


class GeluExperts(Experts):
    """Two-layer GELU networks with biases, as those of a transformer: 2 x dim x hidden + hidden + dim parameters each.

    The biases of an expert are a matrix of one row, whose factored second moment (`outside.Factored`) is exact.
    """

    def __init__(self, num_experts: int, dim: int, hidden: int, recompute: bool = False) -> None:
        super().__init__(num_experts, dim, hidden, recompute)
        self.b1_e1F = parameter(num_experts, 1, hidden, bound=0.0)
        self.b2_e1D = parameter(num_experts, 1, dim, bound=0.0)

    def _two_layers(self, x_RD: torch.Tensor, count_e: torch.Tensor, ctx_R: Context | None) -> torch.Tensor:
        expert_R = torch.arange(len(count_e), device=x_RD.device).repeat_interleave(count_e, output_size=len(x_RD))
        # GELU once: the code of Xue et al. 2021 has one after the output as well, the paper and ViT do not
        hidden_RF = F.gelu(grouped_matmul(x_RD, self.w1_eDF, count_e) + self.b1_e1F.squeeze(1)[expert_R])
        return grouped_matmul(hidden_RF, self.w2_eFD, count_e) + self.b2_e1D.squeeze(1)[expert_R]


def grouped_matmul(x_RD: torch.Tensor, w_eDF: torch.Tensor, count_e: torch.Tensor) -> torch.Tensor:
    """x @ w[i] for the `count_e[i]` consecutive rows of each expert i: (R, F). No rows: a zero gradient."""
    if native_grouped_matmul(x_RD, w_eDF):
        return F.grouped_mm(x_RD, w_eDF, offs=count_e.cumsum(0).int())
    return _GroupedMatmul.apply(x_RD, w_eDF, count_e.tolist())


def native_grouped_matmul(x_RD: torch.Tensor, w_eDF: torch.Tensor) -> bool:
    """Whether torch has one kernel for it: CUDA, bf16, rows of a multiple of 16 bytes, under 1,024 experts."""
    even = all(n % 8 == 0 for n in w_eDF.shape[1:])
    return x_RD.is_cuda and x_RD.dtype == torch.bfloat16 and even and len(w_eDF) < 1024


class _GroupedMatmul(torch.autograd.Function):
    """The portable path: a matmul per expert into one buffer. Indexing a stacked parameter under autograd would write
    a gradient of the whole stack for every expert."""

    @staticmethod
    def forward(ctx: Any, x_RD: torch.Tensor, w_eDF: torch.Tensor, count_e: list[int]) -> torch.Tensor:
        ctx.save_for_backward(x_RD, w_eDF)
        ctx.count_e, ctx.w_eDF = count_e, w_eDF
        y_RF = x_RD.new_empty(x_RD.shape[0], w_eDF.shape[2])
        for x, w, y in zip(x_RD.split(count_e), w_eDF, y_RF.split(count_e), strict=True):
            torch.mm(x, w, out=y)
        return y_RF

    @staticmethod
    def backward(ctx: Any, *grad: torch.Tensor) -> tuple:
        x_RD, w_eDF = ctx.saved_tensors
        dy_RF = grad[0].contiguous()
        dx_RD, dw_eDF = torch.empty_like(x_RD), ctx.w_eDF.__dict__.pop("spare", None)
        dw_eDF = torch.empty_like(w_eDF) if dw_eDF is None else dw_eDF
        parts = zip(
            x_RD.split(ctx.count_e), w_eDF, dy_RF.split(ctx.count_e), dx_RD.split(ctx.count_e), dw_eDF, strict=True
        )
        for x, w, dy, dx, dw in parts:
            torch.mm(dy, w.t(), out=dx)
            torch.mm(x.t(), dy, out=dw)  # zeros where there are no rows
        return dx_RD, dw_eDF, None
