"""Experts on CPU: an expert at a time, from the gather of its tokens to its weighted outputs, so that what is between
two matmuls stays in cache; whole experts to each of torch's threads.

Kept for backward are the tokens, which live anyway, and the hidden units. Every large buffer has the pages of an
earlier one (`memory_rows`), the gradients of the weights as well.

Legend: T tokens, N rows, those of an expert n, those of the fullest m, D width, F hidden units, e experts.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from moe_dist.distributed.buffer_pool import pooled_empty
from moe_dist.moe.delayed_wgrad import DeferGrad
from moe_dist.moe.kernels.grouped_mm import for_each_expert
from moe_dist.moe.permutation import TokenPermutation, unpermute_rows

MIN_BYTES_PER_EXPERT = (
    2**17
)  # bytes of hidden units that an expert has on average; below, calls of torch cost more than memory
ReluMask = Callable[[torch.Tensor], torch.Tensor]  # hidden units (N, F) before ReLU -> which are on


def feedforward(
    x_TD: torch.Tensor,
    copies: TokenPermutation,
    gate_N: torch.Tensor,
    count_e: torch.Tensor,
    w1_eDF: torch.Tensor,
    w2_eFD: torch.Tensor,
    relu_mask: ReluMask | None = None,
    recompute: bool = False,
    defer: DeferGrad | None = None,
) -> torch.Tensor:
    """y_t = sum over the copies n of token t of gate_n * relu(x_t @ w1[i]) @ w2[i]: (T, D). Copies lie sorted by
    expert, count_e[i] of them for expert i.

    `on` decides in place of ReLU's sign; `recompute`: hidden units are not kept; `defer` takes what forms the
    gradients of w1 and w2, which then come later."""
    return _Feedforward.apply(
        x_TD, gate_N, w1_eDF, w2_eFD, copies, count_e.tolist(), relu_mask, recompute, defer
    )


def is_profitable(num_rows: int, w1_eDF: torch.Tensor) -> bool:
    """Whether this beats matmuls by expert and the rest at once (docs/log.md has the times)."""
    e, _, hidden = w1_eDF.shape
    return (
        w1_eDF.device.type == "cpu"
        and num_rows * hidden * w1_eDF.element_size() >= MIN_BYTES_PER_EXPERT * e
    )


class _Feedforward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TD: torch.Tensor,
        gate_N: torch.Tensor,
        w1_eDF: torch.Tensor,
        w2_eFD: torch.Tensor,
        copies: TokenPermutation,
        count_e: list[int],
        on: ReluMask | None,
        recompute: bool,
        defer: DeferGrad | None,
    ) -> torch.Tensor:
        ctx.about, ctx.defer = (copies, count_e, on), defer
        h_NF, on_NF = _hidden(x_TD, w1_eDF, *ctx.about)
        y_ND = pooled_empty(len(h_NF), x_TD.shape[1], like=x_TD)
        scale_N1 = gate_N.to(x_TD.dtype)[:, None]

        def down(experts: Any) -> None:
            for h_nF, y_nD, scale_n1, w2_FD in experts:
                torch.mm(h_nF, w2_FD, out=y_nD).mul_(scale_n1)

        for_each_expert(down, count_e, [h_NF, y_ND, scale_N1], [w2_eFD])
        ctx.save_for_backward(x_TD, gate_N, w1_eDF, w2_eFD, *([] if recompute else [h_NF, on_NF]))
        return unpermute_rows(y_ND, copies)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: torch.Tensor) -> tuple:
        x_TD, gate_N, w1_eDF, w2_eFD, *kept = ctx.saved_tensors
        copies, count_e, _ = ctx.about
        h_NF, on_NF = kept or _hidden(x_TD, w1_eDF, *ctx.about)
        dy_TD, scale_N1 = dy_TD.contiguous(), gate_N.to(x_TD.dtype)[:, None]
        dx_ND, dgate_N = pooled_empty(len(h_NF), x_TD.shape[1], like=x_TD), torch.empty_like(gate_N)
        waits = ctx.defer is not None
        # of outputs and of hidden units: where weights do not wait for them, in memory that stays in cache
        dy_ND, dh_NF = (pooled_empty(*t.shape, like=t) if waits else None for t in (dx_ND, h_NF))
        dw1_eDF, dw2_eFD = (
            None if waits else pooled_empty(*w.shape, like=w) for w in (w1_eDF, w2_eFD)
        )

        def back(experts: Any) -> None:
            cache: dict[str, torch.Tensor] = {}
            for (
                token_n,
                h_nF,
                on_nF,
                scale_n1,
                dgate_n,
                dy_nD,
                dh_nF,
                dx_nD,
                w1_DF,
                w2_FD,
                dw1_DF,
                dw2_FD,
            ) in experts:
                n = len(token_n)
                dy_nD = _room(cache, "dy", n, x_TD) if dy_nD is None else dy_nD
                dh_nF = _room(cache, "dh", n, h_NF) if dh_nF is None else dh_nF
                torch.index_select(dy_TD, 0, token_n, out=dy_nD)
                torch.mm(dy_nD, w2_FD.t(), out=dh_nF)  # of an expert's output before its weight
                product_nF = torch.mul(dh_nF, h_nF, out=_room(cache, "product", n, h_NF))
                torch.sum(product_nF, 1, dtype=dgate_n.dtype, out=dgate_n)
                dy_nD.mul_(scale_n1)
                dh_nF.mul_(scale_n1)
                if on_nF is None:
                    torch.ops.aten.threshold_backward.grad_input(dh_nF, h_nF, 0, grad_input=dh_nF)
                else:
                    dh_nF.mul_(on_nF)
                torch.mm(dh_nF, w1_DF.t(), out=dx_nD)
                if not waits:  # zeros where there are no rows
                    torch.mm(h_nF.t(), dy_nD, out=dw2_FD)
                    torch.mm(_gather(x_TD, token_n, cache).t(), dh_nF, out=dw1_DF)

        rows = [copies.token_N, h_NF, on_NF, scale_N1, dgate_N, dy_ND, dh_NF, dx_ND]
        for_each_expert(back, count_e, rows, [w1_eDF, w2_eFD, dw1_eDF, dw2_eFD])
        if waits:
            assert dh_NF is not None and dy_ND is not None
            ctx.defer(0, partial(_of_w1, x_TD, copies.token_N, dh_NF, count_e))
            ctx.defer(1, partial(_of_w2, h_NF, dy_ND, count_e))
        return unpermute_rows(dx_ND, copies), dgate_N, dw1_eDF, dw2_eFD, *[None] * 5


def _hidden(
    x_TD: torch.Tensor,
    w1_eDF: torch.Tensor,
    copies: TokenPermutation,
    count_e: list[int],
    on: ReluMask | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Hidden units (N, F), and which are on where `on` says."""
    h_NF = pooled_empty(len(copies.token_N), w1_eDF.shape[2], like=x_TD)

    def up(experts: Any) -> None:
        cache: dict[str, torch.Tensor] = {}
        for token_n, h_nF, w1_DF in experts:
            torch.mm(_gather(x_TD, token_n, cache), w1_DF, out=h_nF)
            if on is None:
                h_nF.relu_()

    for_each_expert(up, count_e, [copies.token_N, h_NF], [w1_eDF])
    on_NF = None if on is None else on(h_NF)
    return (h_NF if on_NF is None else h_NF.mul_(on_NF)), on_NF


def _of_w1(
    x_TD: torch.Tensor,
    token_N: torch.Tensor,
    dh_NF: torch.Tensor,
    count_e: list[int],
    out_eDF: torch.Tensor | None,
) -> torch.Tensor:
    dw1_eDF = (
        pooled_empty(len(count_e), x_TD.shape[1], dh_NF.shape[1], like=x_TD)
        if out_eDF is None
        else out_eDF
    )

    def form(experts: Any) -> None:
        cache: dict[str, torch.Tensor] = {}
        for token_n, dh_nF, dw1_DF in experts:
            torch.mm(_gather(x_TD, token_n, cache).t(), dh_nF, out=dw1_DF)

    for_each_expert(form, count_e, [token_N, dh_NF], [dw1_eDF])
    return dw1_eDF


def _of_w2(
    h_NF: torch.Tensor, dy_ND: torch.Tensor, count_e: list[int], out_eFD: torch.Tensor | None
) -> torch.Tensor:
    dw2_eFD = (
        pooled_empty(len(count_e), h_NF.shape[1], dy_ND.shape[1], like=h_NF)
        if out_eFD is None
        else out_eFD
    )

    def form(experts: Any) -> None:
        for h_nF, dy_nD, dw2_FD in experts:
            torch.mm(h_nF.t(), dy_nD, out=dw2_FD)

    for_each_expert(form, count_e, [h_NF, dy_ND], [dw2_eFD])
    return dw2_eFD


def _gather(
    x_TD: torch.Tensor, token_n: torch.Tensor, cache: dict[str, torch.Tensor]
) -> torch.Tensor:
    return torch.index_select(x_TD, 0, token_n, out=_room(cache, "x", len(token_n), x_TD))


def _room(cache: dict[str, torch.Tensor], name: str, n: int, like: torch.Tensor) -> torch.Tensor:
    """The same memory for every expert."""
    if name not in cache or len(cache[name]) < n:
        cache[name] = like.new_empty(n, like.shape[1])
    return cache[name][:n]
