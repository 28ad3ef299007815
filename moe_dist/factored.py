"""Adam without first moment and with a factored second one, of stacked matrices (Shazeer et al. 2017, Appendix D).

Of the running mean of g² only row means r and column means c are kept, and v_ij = r_i c_j / mean(r): rows + columns
numbers, not rows x columns. "diet" is tensor2tensor's form of it: sqrt(v)_ij = sqrt(r_i) sqrt(c_j) / mean(sqrt(c)), a
smaller step.

Two passes over memory, for the update's second moments are those of the whole gradient: `squares_of` reads it, and
`factored_update` reads it again and moves the weights. On CPU numba compiles each into one loop, without a compiler on
the machine and once for all runs (in eager torch each is two or three passes over temporaries); on a GPU they are
eager, of as many whole experts at a time as fill it.

Legend: e experts, each a matrix and all of one shape; D rows, F columns.
"""

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numba
import numpy as np
import torch

from moe_dist.config import OptimConfig

ELEMENTS_AT_ONCE = 2**26  # on a GPU
SHORT = 64  # rows whose squares add up in one float32
# Sums in the order that vector instructions like, and a fused multiply-add; NaN and infinity stay what they are.
_compiled = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz"})


def squares_of(g_eDF: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of squares of each row (e, D) and column (e, F) of every expert, of which norm and means are made. They are
    short: float32 will do."""
    (e, rows, columns) = g_eDF.shape
    row_eD, column_eF = g_eDF.new_empty(e, rows), g_eDF.new_empty(e, columns)
    if g_eDF.device.type == "cpu":
        _by_thread(_sum_squares, g_eDF, row_eD, column_eF)
    else:
        _sum_squares_eagerly(g_eDF, row_eD, column_eF)
    return row_eD, column_eF


def factored_update(
    w_eDF: torch.Tensor, g_eDF: torch.Tensor, row_square_eD: torch.Tensor, column_square_eF: torch.Tensor,
    row_eD: torch.Tensor, column_eF: torch.Tensor, scale: float, lr: float, step: int, config: OptimConfig,
) -> None:  # fmt: skip
    """In place: weights, row means and column means of g² after one step of Adam with beta1 = 0 (Appendix D).

    w -= lr (g / (sqrt(v) + eps) + weight_decay w) with v from bias-corrected means. Rows and columns without any
    gradient give v = 0 and g = 0: no update, not NaN.
    """
    beta, correction = config.expert_beta2, 1 - config.expert_beta2**step
    rows, columns = g_eDF.shape[1:]
    row_eD.lerp_(row_square_eD * (scale**2 / columns), 1 - beta)
    column_eF.lerp_(column_square_eF * (scale**2 / rows), 1 - beta)
    r_eD, c_eF = row_eD / correction, column_eF / correction
    if config.expert_form == "paper":  # sqrt(r c / mean(r)), the root of each factor
        left_eD = (r_eD / _or_one(r_eD.mean(1, keepdim=True))).sqrt_()
        right_eF = c_eF.sqrt_()
    else:  # tensor2tensor, diet.py: roots, then the mean
        left_eD, right_eF = r_eD.sqrt_(), c_eF.sqrt_()
        right_eF = right_eF / _or_one(right_eF.mean(1, keepdim=True))
    scalars = (config.eps, lr * scale, 1 - lr * config.weight_decay)
    if w_eDF.device.type == "cpu":
        _by_thread(_move, w_eDF, g_eDF, left_eD, right_eF, scalars=scalars)
    else:
        _move_eagerly(w_eDF, g_eDF, left_eD, right_eF, *scalars)


def _or_one(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x > 0, x, 1)


def _by_thread(kernel: Callable[..., None], *stacks: torch.Tensor, scalars: tuple[float, ...] = ()) -> None:
    """Whole experts to each of torch's threads. Scalars in the type of the stacks: a wider one would widen all."""
    arrays = [t.detach().numpy() for t in stacks]
    numbers = [arrays[0].dtype.type(x) for x in scalars]
    threads = min(torch.get_num_threads(), len(arrays[0]))
    if threads < 2:
        return kernel(*arrays, *numbers)
    parts = zip(*(np.array_split(a, threads) for a in arrays), strict=True)
    for done in [_threads(threads).submit(kernel, *part, *numbers) for part in parts]:
        done.result()


@functools.cache
def _threads(number: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(number)


@_compiled
def _sum_squares(g_eDF: Any, row_eD: Any, column_eF: Any) -> None:
    e, rows, columns = g_eDF.shape
    part_F = np.zeros(columns, g_eDF.dtype)
    for i in range(e):
        column_eF[i] = 0
        for first in range(0, rows, SHORT):
            part_F[:] = 0
            for d in range(first, min(first + SHORT, rows)):
                row = part_F.dtype.type(0)
                for f in range(columns):
                    square = g_eDF[i, d, f] * g_eDF[i, d, f]
                    row += square
                    part_F[f] += square
                row_eD[i, d] = row
            column_eF[i] += part_F


@_compiled
def _move(w_eDF: Any, g_eDF: Any, left_eD: Any, right_eF: Any, eps: float, size: float, keep: float) -> None:
    e, rows, columns = w_eDF.shape
    for i in range(e):
        for d in range(rows):
            left = left_eD[i, d]
            for f in range(columns):
                w_eDF[i, d, f] = keep * w_eDF[i, d, f] - size * g_eDF[i, d, f] / (left * right_eF[i, f] + eps)


def _sum_squares_eagerly(g_eDF: torch.Tensor, row_eD: torch.Tensor, column_eF: torch.Tensor) -> None:
    for g, row, column in _in_pieces(g_eDF, row_eD, column_eF):
        square = g.square()
        torch.sum(square, 2, out=row)
        torch.sum(square, 1, out=column)


def _move_eagerly(
    w_eDF: torch.Tensor, g_eDF: torch.Tensor, left_eD: torch.Tensor, right_eF: torch.Tensor,
    eps: float, size: float, keep: float,
) -> None:  # fmt: skip
    for w, g, left, right in _in_pieces(w_eDF, g_eDF, left_eD, right_eF):
        if keep != 1:
            w.mul_(keep)
        w.addcdiv_(g, (left[:, :, None] * right[:, None]).add_(eps), value=-size)


def _in_pieces(*stacks: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Of whole experts, so that temporaries stay small and kernels few."""
    at_once = max(1, ELEMENTS_AT_ONCE // stacks[0][0].numel()) if len(stacks[0]) else 1
    return zip(*(t.split(at_once) for t in stacks), strict=True)
