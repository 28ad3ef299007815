"""The experts' ReLU networks on CPU, one expert at a time.

A thread computes one expert from the token gather to the weighted outputs, so tensors between two
matmuls stay in cache. Each torch thread gets whole experts. Forward saves the tokens (which exist
anyway) and the hidden units for backward. Every large buffer, also for weight gradients, reuses an
earlier buffer's memory pages (`distributed.buffer_pool`).

Legend: T tokens, N rows for all experts, n rows for one expert, D width, F hidden units, e experts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from moe_dist.distributed.buffer_pool import pooled_empty
from moe_dist.moe.delayed_wgrad import DeferGrad
from moe_dist.moe.kernels.grouped_mm import for_each_expert
from moe_dist.moe.permutation import TokenPermutation, unpermute_rows

# mean bytes of hidden units per expert; below this, torch's call overhead exceeds the saved memory
# traffic
MIN_BYTES_PER_EXPERT = 2**17
# relu_mask(h_NF) -> (N, F), True for active hidden units; h_NF is their input
ReluMask = Callable[[torch.Tensor], torch.Tensor]


def feedforward(
    x_TD: torch.Tensor,
    permutation: TokenPermutation,
    gate_N: torch.Tensor,
    count_e: torch.Tensor,
    w1_eDF: torch.Tensor,
    w2_eFD: torch.Tensor,
    relu_mask: ReluMask | None = None,
    recompute: bool = False,
    defer: DeferGrad | None = None,
) -> torch.Tensor:
    """Computes y_t = sum over the rows n of token t of gate_n * relu(x_t @ w1[i]) @ w2[i].

    Args:
        x_TD: Tokens (T, D).
        permutation: The rows, sorted by expert.
        gate_N: Gate weight per row.
        count_e: Rows per expert, int64.
        w1_eDF: First matrices.
        w2_eFD: Second matrices.
        relu_mask: Selects the active hidden units. None: those with a positive input.
        recompute: If True, recomputes hidden units in backward instead of keeping them.
        defer: Registers the functions to compute the weight gradients later. None: backward returns
            these gradients.

    Returns:
        The sums (T, D).
    """
    return _Feedforward.apply(
        x_TD, gate_N, w1_eDF, w2_eFD, permutation, count_e.tolist(), relu_mask, recompute, defer
    )


def is_profitable(num_rows: int, w1_eDF: torch.Tensor) -> bool:
    """Returns True if this kernel is faster than one matmul per expert (docs/log.md)."""
    num_experts, _, hidden_dim = w1_eDF.shape
    hidden_bytes = num_rows * hidden_dim * w1_eDF.element_size()
    return w1_eDF.device.type == "cpu" and hidden_bytes >= MIN_BYTES_PER_EXPERT * num_experts


class _Feedforward(torch.autograd.Function):
    """The forward of `feedforward` and its hand-written backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: torch.Tensor,
        gate_N: torch.Tensor,
        w1_eDF: torch.Tensor,
        w2_eFD: torch.Tensor,
        permutation: TokenPermutation,
        count_e: list[int],
        relu_mask: ReluMask | None,
        recompute: bool,
        defer: DeferGrad | None,
    ) -> torch.Tensor:
        """Returns the sums (T, D)."""
        h_NF, on_NF = _hidden(x_TD, w1_eDF, permutation, count_e, relu_mask)
        y_ND = pooled_empty(len(h_NF), x_TD.shape[1], like=x_TD)
        scale_N1 = gate_N.to(x_TD.dtype)[:, None]

        def down(experts: Any) -> None:
            for h_nF, y_nD, scale_n1, w2_FD in experts:
                torch.mm(h_nF, w2_FD, out=y_nD).mul_(scale_n1)

        for_each_expert(down, count_e, [h_NF, y_ND, scale_N1], [w2_eFD])
        ctx.permutation = permutation
        ctx.count_e = count_e
        ctx.relu_mask = relu_mask
        ctx.defer = defer
        kept = () if recompute else (h_NF, on_NF)
        ctx.save_for_backward(x_TD, gate_N, w1_eDF, w2_eFD, *kept)
        return unpermute_rows(y_ND, permutation)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: torch.Tensor) -> tuple:
        """Returns the gradients of tokens, gate weights and, unless deferred, matrices."""
        x_TD, gate_N, w1_eDF, w2_eFD, *kept = ctx.saved_tensors
        if kept:
            h_NF, on_NF = kept
        else:
            h_NF, on_NF = _hidden(x_TD, w1_eDF, ctx.permutation, ctx.count_e, ctx.relu_mask)
        work = _Backward(
            count_e=ctx.count_e,
            token_N=ctx.permutation.token_N,
            x_TD=x_TD,
            dy_TD=dy_TD.contiguous(),
            h_NF=h_NF,
            on_NF=on_NF,
            scale_N1=gate_N.to(x_TD.dtype)[:, None],
            dgate_N=torch.empty_like(gate_N),
            dx_ND=pooled_empty(len(h_NF), x_TD.shape[1], like=x_TD),
            w1_eDF=w1_eDF,
            w2_eFD=w2_eFD,
        )
        weight_grads: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
        if ctx.defer is None:
            weight_grads = work.run_with_weights()
        else:
            work.run_deferring_weights(ctx.defer)
        dx_TD = unpermute_rows(work.dx_ND, ctx.permutation)
        return dx_TD, work.dgate_N, *weight_grads, *[None] * 5


@dataclass(frozen=True)
class _Backward:
    """The tensors in one backward pass; `dgate_N` and `dx_ND` are its outputs.

    Attributes:
        count_e: Rows per expert.
        token_N: Each row's token.
        x_TD: Tokens.
        dy_TD: The output's gradient.
        h_NF: Hidden units after ReLU.
        on_NF: True for active hidden units. None: those above zero.
        scale_N1: Gate weights.
        dgate_N: The gate weights' gradient.
        dx_ND: The rows' gradient.
        w1_eDF: First matrices.
        w2_eFD: Second matrices.
    """

    count_e: list[int]
    token_N: torch.Tensor
    x_TD: torch.Tensor
    dy_TD: torch.Tensor
    h_NF: torch.Tensor
    on_NF: torch.Tensor | None
    scale_N1: torch.Tensor
    dgate_N: torch.Tensor
    dx_ND: torch.Tensor
    w1_eDF: torch.Tensor
    w2_eFD: torch.Tensor

    def run_with_weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes all gradients; returns the matrices', with zeros for an expert without rows.

        One expert's output and hidden gradients are in reused buffers, which stay in cache.
        """
        dw1_eDF = pooled_empty(*self.w1_eDF.shape, like=self.w1_eDF)
        dw2_eFD = pooled_empty(*self.w2_eFD.shape, like=self.w2_eFD)

        def run(experts: Any) -> None:
            buffers = _Buffers()
            for *views, dw1_DF, dw2_FD in experts:
                expert = _ExpertViews(*views)
                num_rows = len(expert.token_n)
                dy_nD = buffers.get("dy", num_rows, self.x_TD)
                dh_nF = buffers.get("dh", num_rows, self.h_NF)
                self._input_grad(expert, dy_nD, dh_nF, buffers)
                torch.mm(expert.h_nF.t(), dy_nD, out=dw2_FD)
                x_nD = buffers.gather(self.x_TD, expert.token_n)
                torch.mm(x_nD.t(), dh_nF, out=dw1_DF)

        stacks = [self.w1_eDF, self.w2_eFD, dw1_eDF, dw2_eFD]
        for_each_expert(run, self.count_e, self._rows(), stacks)
        return dw1_eDF, dw2_eFD

    def run_deferring_weights(self, defer: DeferGrad) -> None:
        """Computes row and gate-weight gradients, and defers the matrices' gradients."""
        dy_ND = pooled_empty(*self.dx_ND.shape, like=self.dx_ND)
        dh_NF = pooled_empty(*self.h_NF.shape, like=self.h_NF)

        def run(experts: Any) -> None:
            buffers = _Buffers()
            for dy_nD, dh_nF, *views in experts:
                self._input_grad(_ExpertViews(*views), dy_nD, dh_nF, buffers)

        rows: list[torch.Tensor | None] = [dy_ND, dh_NF, *self._rows()]
        for_each_expert(run, self.count_e, rows, [self.w1_eDF, self.w2_eFD])
        defer(0, partial(_w1_grad, self.x_TD, self.token_N, dh_NF, self.count_e))
        defer(1, partial(_w2_grad, self.h_NF, dy_ND, self.count_e))

    def _rows(self) -> list[torch.Tensor | None]:
        """Returns the tensors with all rows, in `_ExpertViews`'s field order."""
        return [self.token_N, self.h_NF, self.on_NF, self.scale_N1, self.dgate_N, self.dx_ND]

    def _input_grad(
        self,
        expert: "_ExpertViews",
        dy_nD: torch.Tensor,
        dh_nF: torch.Tensor,
        buffers: "_Buffers",
    ) -> None:
        """Computes one expert's row and gate-weight gradients.

        Args:
            expert: The expert's part of every tensor.
            dy_nD: Output: the gradient of its outputs, times the gate weights.
            dh_nF: Output: the gradient of its hidden units' input.
            buffers: Memory for temporaries.
        """
        h_nF = expert.h_nF
        torch.index_select(self.dy_TD, 0, expert.token_n, out=dy_nD)
        torch.mm(dy_nD, expert.w2_FD.t(), out=dh_nF)  # before the gate weight
        product_nF = buffers.get("product", len(expert.token_n), self.h_NF)
        torch.mul(dh_nF, h_nF, out=product_nF)
        torch.sum(product_nF, 1, dtype=expert.dgate_n.dtype, out=expert.dgate_n)
        dy_nD.mul_(expert.scale_n1)
        dh_nF.mul_(expert.scale_n1)
        if expert.on_nF is None:
            torch.ops.aten.threshold_backward.grad_input(dh_nF, h_nF, 0, grad_input=dh_nF)
        else:
            dh_nF.mul_(expert.on_nF)
        torch.mm(dh_nF, expert.w1_DF.t(), out=expert.dx_nD)


@dataclass(frozen=True)
class _ExpertViews:
    """One expert's part of the tensors in `_Backward`."""

    token_n: torch.Tensor
    h_nF: torch.Tensor
    on_nF: torch.Tensor | None
    scale_n1: torch.Tensor
    dgate_n: torch.Tensor
    dx_nD: torch.Tensor
    w1_DF: torch.Tensor
    w2_FD: torch.Tensor


class _Buffers:
    """Buffers that one thread reuses for expert after expert, so that they stay in cache."""

    def __init__(self) -> None:
        self._by_name: dict[str, torch.Tensor] = {}

    def get(self, name: str, num_rows: int, like: torch.Tensor) -> torch.Tensor:
        """Returns uninitialized rows, as wide as `like`."""
        buffer = self._by_name.get(name)
        if buffer is None or len(buffer) < num_rows:
            buffer = like.new_empty(num_rows, like.shape[1])
            self._by_name[name] = buffer
        return buffer[:num_rows]

    def gather(self, x_TD: torch.Tensor, token_n: torch.Tensor) -> torch.Tensor:
        """Returns the rows (n, D) for tokens `token_n`."""
        return torch.index_select(x_TD, 0, token_n, out=self.get("x", len(token_n), x_TD))


def _hidden(
    x_TD: torch.Tensor,
    w1_eDF: torch.Tensor,
    permutation: TokenPermutation,
    count_e: list[int],
    relu_mask: ReluMask | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns the hidden units (N, F), and the mask from `relu_mask` (None without one)."""
    h_NF = pooled_empty(len(permutation.token_N), w1_eDF.shape[2], like=x_TD)

    def up(experts: Any) -> None:
        buffers = _Buffers()
        for token_n, h_nF, w1_DF in experts:
            torch.mm(buffers.gather(x_TD, token_n), w1_DF, out=h_nF)
            if relu_mask is None:
                h_nF.relu_()

    for_each_expert(up, count_e, [permutation.token_N, h_NF], [w1_eDF])
    if relu_mask is None:
        return h_NF, None
    on_NF = relu_mask(h_NF)
    return h_NF.mul_(on_NF), on_NF


def _w1_grad(
    x_TD: torch.Tensor,
    token_N: torch.Tensor,
    dh_NF: torch.Tensor,
    count_e: list[int],
    out_eDF: torch.Tensor | None,
) -> torch.Tensor:
    """Returns the first matrices' gradient (e, D, F), in `out_eDF` if given."""
    if out_eDF is None:
        out_eDF = pooled_empty(len(count_e), x_TD.shape[1], dh_NF.shape[1], like=x_TD)

    def run(experts: Any) -> None:
        buffers = _Buffers()
        for token_n, dh_nF, dw1_DF in experts:
            torch.mm(buffers.gather(x_TD, token_n).t(), dh_nF, out=dw1_DF)

    for_each_expert(run, count_e, [token_N, dh_NF], [out_eDF])
    return out_eDF


def _w2_grad(
    h_NF: torch.Tensor, dy_ND: torch.Tensor, count_e: list[int], out_eFD: torch.Tensor | None
) -> torch.Tensor:
    """Returns the second matrices' gradient (e, F, D), in `out_eFD` if given."""
    if out_eFD is None:
        out_eFD = pooled_empty(len(count_e), h_NF.shape[1], dy_ND.shape[1], like=h_NF)

    def run(experts: Any) -> None:
        for h_nF, dy_nD, dw2_FD in experts:
            torch.mm(h_nF.t(), dy_nD, out=dw2_FD)

    for_each_expert(run, count_e, [h_NF, dy_ND], [out_eFD])
    return out_eFD
