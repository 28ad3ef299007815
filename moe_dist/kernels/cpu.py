"""Experts on CPU: an expert at a time, from the gather of its tokens to its weighted outputs, so that what is between
two matmuls stays in cache; whole experts to each of torch's threads.

Kept for backward are the tokens, which live anyway, and the hidden units. Every large buffer has the pages of an
earlier one (`memory`), the gradients of the weights as well.

Legend: T tokens, N rows, those of an expert n, D width, F hidden units, e experts.
"""

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from moe_dist.memory import empty
from moe_dist.rows import Copies, added_up

PIECES = 4  # of the experts for each thread: the first to finish takes the next
On = Callable[[torch.Tensor], torch.Tensor]  # hidden units (N, F) before ReLU -> which are on


def feedforward(
    x_TD: torch.Tensor, copies: Copies, gate_N: torch.Tensor, count_e: torch.Tensor, w1_eDF: torch.Tensor,
    w2_eFD: torch.Tensor, on: On | None = None, recompute: bool = False,
) -> torch.Tensor:  # fmt: skip
    """y_t = sum over the copies n of token t of gate_n * relu(x_t @ w1[i]) @ w2[i]: (T, D). Copies lie sorted by
    expert, count_e[i] of them for expert i. `on` decides in place of ReLU's sign; `recompute`: hidden units are not
    kept."""
    return _Feedforward.apply(x_TD, gate_N, w1_eDF, w2_eFD, copies, count_e.tolist(), on, recompute)


class _Feedforward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TD: torch.Tensor, gate_N: torch.Tensor, w1_eDF: torch.Tensor, w2_eFD: torch.Tensor,
        copies: Copies, count_e: list[int], on: On | None, recompute: bool,
    ) -> torch.Tensor:  # fmt: skip
        ctx.about = copies, count_e, on
        h_NF, on_NF = _hidden(x_TD, w1_eDF, *ctx.about)
        y_ND = empty(len(h_NF), x_TD.shape[1], like=x_TD)
        scale_N1 = gate_N.to(x_TD.dtype)[:, None]

        def down(first: int, last: int) -> None:
            for _, h_nF, y_nD, scale_n1, w2_FD in part(first, last):
                torch.mm(h_nF, w2_FD, out=y_nD).mul_(scale_n1)

        part = _by_expert(count_e, [h_NF, y_ND, scale_N1], [w2_eFD])
        _in_threads(down, count_e)
        ctx.save_for_backward(x_TD, gate_N, w1_eDF, w2_eFD, *([] if recompute else [h_NF, on_NF]))
        return added_up(y_ND, copies)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TD: torch.Tensor) -> tuple:
        x_TD, gate_N, w1_eDF, w2_eFD, *kept = ctx.saved_tensors
        copies, count_e, _ = ctx.about
        h_NF, on_NF = kept or _hidden(x_TD, w1_eDF, *ctx.about)
        dy_TD, scale_N1 = dy_TD.contiguous(), gate_N.to(x_TD.dtype)[:, None]
        dx_ND, dgate_N = empty(len(h_NF), x_TD.shape[1], like=x_TD), torch.empty_like(gate_N)
        dw1_eDF, dw2_eFD = empty(*w1_eDF.shape, like=w1_eDF), empty(*w2_eFD.shape, like=w2_eFD)

        def back(first: int, last: int) -> None:
            most = max(count_e[first:last])
            x_mD, dy_mD = (x_TD.new_empty(most, x_TD.shape[1]) for _ in range(2))
            dh_mF, product_mF = (torch.empty_like(h_NF[:most]) for _ in range(2))
            for n, token_n, h_nF, on_nF, scale_n1, dgate_n, dx_nD, w1_DF, w2_FD, dw1_DF, dw2_FD in part(first, last):
                dy_nD = torch.index_select(dy_TD, 0, token_n, out=dy_mD[:n])
                dh_nF = torch.mm(dy_nD, w2_FD.t(), out=dh_mF[:n])  # of an expert's output before its weight
                torch.sum(torch.mul(dh_nF, h_nF, out=product_mF[:n]), 1, dtype=dgate_n.dtype, out=dgate_n)
                torch.mm(h_nF.t(), dy_nD.mul_(scale_n1), out=dw2_FD)
                dh_nF.mul_(scale_n1)
                if on_nF is None:
                    torch.ops.aten.threshold_backward.grad_input(dh_nF, h_nF, 0, grad_input=dh_nF)
                else:
                    dh_nF.mul_(on_nF)
                torch.mm(dh_nF, w1_DF.t(), out=dx_nD)
                x_nD = torch.index_select(x_TD, 0, token_n, out=x_mD[:n])
                torch.mm(x_nD.t(), dh_nF, out=dw1_DF)  # zeros where there are no rows

        rows = [copies.token_N, h_NF, on_NF, scale_N1, dgate_N, dx_ND]
        part = _by_expert(count_e, rows, [w1_eDF, w2_eFD, dw1_eDF, dw2_eFD])
        _in_threads(back, count_e)
        return added_up(dx_ND, copies), dgate_N, dw1_eDF, dw2_eFD, None, None, None, None


def _hidden(
    x_TD: torch.Tensor, w1_eDF: torch.Tensor, copies: Copies, count_e: list[int], on: On | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Hidden units (N, F), and which are on where `on` says."""
    h_NF = empty(len(copies.token_N), w1_eDF.shape[2], like=x_TD)

    def up(first: int, last: int) -> None:
        x_mD = x_TD.new_empty(max(count_e[first:last]), x_TD.shape[1])
        for n, token_n, h_nF, w1_DF in part(first, last):
            torch.mm(torch.index_select(x_TD, 0, token_n, out=x_mD[:n]), w1_DF, out=h_nF)
            if on is None:
                h_nF.relu_()

    part = _by_expert(count_e, [copies.token_N, h_NF], [w1_eDF])
    _in_threads(up, count_e)
    on_NF = None if on is None else on(h_NF)
    return (h_NF if on_NF is None else h_NF.mul_(on_NF)), on_NF


def _by_expert(count_e: list[int], rows: list[torch.Tensor | None], stacks: list[torch.Tensor]) -> Callable:
    """part(first, last): of each of those experts its number of rows, its rows and its matrices."""
    columns = [count_e, *([None] * len(count_e) if t is None else t.split(count_e) for t in rows), *stacks]

    def part(first: int, last: int) -> Any:
        return zip(*(column[first:last] for column in columns), strict=True)

    return part


def _in_threads(do: Callable[[int, int], None], count_e: list[int]) -> None:
    """do(first, last) for consecutive parts of the experts that have about as many rows each."""
    threads = torch.get_num_threads()
    if threads == 1:
        return do(0, len(count_e))
    pieces, share, done = [0], max(1, sum(count_e) // (PIECES * threads)), 0
    for i, n in enumerate(count_e, 1):
        done += n
        if done >= share or i == len(count_e):
            pieces.append(i)
            done = 0
    for result in _threads(threads).map(do, pieces, pieces[1:]):
        assert result is None


@functools.cache
def _threads(number: int) -> ThreadPoolExecutor:
    """Each has one of torch's own threads, and no gradients."""

    def start() -> None:
        torch.set_num_threads(1)
        torch.set_grad_enabled(False)

    return ThreadPoolExecutor(number, initializer=start)
