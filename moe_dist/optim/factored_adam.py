"""Adam without first moment and with a factored second one, of stacked matrices (Shazeer et al. 2017, Appendix D).

Of the running mean of g² only row means r and column means c are kept, and v_ij = r_i c_j / mean(r): rows + columns
numbers, not rows x columns. "factored_adam_t2t" is tensor2tensor's form of it: sqrt(v)_ij = sqrt(r_i) sqrt(c_j) / mean(sqrt(c)), a
smaller step.

Two passes over memory, for the update's second moments are those of the whole gradient: `row_and_column_squares` reads it, and
`factored_update` reads it again and moves the weights. On CPU numba makes one loop of each for matrices that are worth
it, without a compiler on the machine (`jit`); in eager torch, as on a GPU and for small matrices, each is two or three
passes over temporaries.

Legend: e experts, each a matrix and all of one shape; D rows, F columns.
"""

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from moe_dist.config.schema import OptimConfig

WORTH_A_LOOP = (
    2**14
)  # elements of a matrix; below, eager temporaries stay in cache and cost less than a compilation
ELEMENTS_AT_ONCE = {
    "cpu": 2**17,
    "cuda": 2**26,
}  # of eager temporaries: in cache, or enough to fill a GPU
ELEMENTS_A_THREAD = 2**17  # at least
SHORT = 64  # rows whose squares add up in one float32


def row_and_column_squares(g_eDF: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of squares of each row (e, D) and column (e, F) of every expert, of which norm and means are made. They are
    short: float32 will do."""
    (e, rows, columns) = g_eDF.shape
    row_eD, column_eF = g_eDF.new_empty(e, rows), g_eDF.new_empty(e, columns)
    if _is_worth_a_loop(g_eDF):
        _loop(_sum_squares, g_eDF, row_eD, column_eF)
    else:
        _sum_squares_eagerly(g_eDF, row_eD, column_eF)
    return row_eD, column_eF


def factored_update(
    w_eDF: torch.Tensor,
    g_eDF: torch.Tensor,
    row_square_eD: torch.Tensor,
    column_square_eF: torch.Tensor,
    row_eD: torch.Tensor,
    column_eF: torch.Tensor,
    scale: float,
    lr: float,
    step: int,
    config: OptimConfig,
) -> None:
    """In place: weights, row means and column means of g² after one step of Adam with beta1 = 0 (Appendix D).

    w -= lr (g / (sqrt(v) + eps) + weight_decay w) with v from bias-corrected means. Rows and columns without any
    gradient give v = 0 and g = 0: no update, not NaN.
    """
    beta, correction = config.expert_beta2, 1 - config.expert_beta2**step
    rows, columns = g_eDF.shape[1:]
    row_eD.lerp_(row_square_eD * (scale**2 / columns), 1 - beta)
    column_eF.lerp_(column_square_eF * (scale**2 / rows), 1 - beta)
    r_eD, c_eF = row_eD / correction, column_eF / correction
    if config.expert_optimizer == "factored_adam":  # sqrt(r c / mean(r)), the root of each factor
        left_eD = (r_eD / _or_one(r_eD.mean(1, keepdim=True))).sqrt_()
        right_eF = c_eF.sqrt_()
    else:  # tensor2tensor, diet.py: roots, then the mean
        left_eD, right_eF = r_eD.sqrt_(), c_eF.sqrt_()
        right_eF = right_eF / _or_one(right_eF.mean(1, keepdim=True))
    scalars = (config.eps, lr * scale, 1 - lr * config.weight_decay)
    if _is_worth_a_loop(w_eDF):
        torch.autograd.graph.increment_version(
            w_eDF
        )  # as an operation in place does: a graph that holds it is stale
        _loop(_apply_update, w_eDF, g_eDF, left_eD, right_eF, scalars=scalars)
    else:
        _apply_update_eagerly(w_eDF, g_eDF, left_eD, right_eF, *scalars)


def _or_one(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x > 0, x, 1)


def _is_worth_a_loop(t_eDF: torch.Tensor) -> bool:
    """By the matrix and not by the stack, which depends on how many ranks share it."""
    return t_eDF.device.type == "cpu" and t_eDF.shape[1] * t_eDF.shape[2] >= WORTH_A_LOOP


def _loop(
    over: Callable[..., None], *stacks: torch.Tensor, scalars: tuple[float, ...] = ()
) -> None:
    """Runs a loop over experts, compiled; whole experts to each of torch's threads. Scalars in the type of the stacks:
    a wider one would widen all."""
    kernel, arrays = _compiled(over), [t.detach().numpy() for t in stacks]
    assert all(a.dtype == arrays[0].dtype and len(a) == len(arrays[0]) for a in arrays)
    numbers = [arrays[0].dtype.type(x) for x in scalars]
    parts = min(torch.get_num_threads(), len(arrays[0]), arrays[0].size // ELEMENTS_A_THREAD)
    if parts < 2:
        return kernel(*arrays, *numbers)
    by_part = zip(*(np.array_split(a, parts) for a in arrays), strict=True)
    for done in [
        _threads(torch.get_num_threads()).submit(kernel, *part, *numbers) for part in by_part
    ]:
        done.result()


@functools.cache
def _compiled(function: Callable[..., None]) -> Callable[..., None]:
    from moe_dist.optim.compiled_loops import (
        compiled,
    )  # here, for numba takes a quarter of a second that others save

    return compiled(function)


@functools.cache
def _threads(number: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(number)


def _sum_squares(g_eDF: Any, row_eD: Any, column_eF: Any) -> None:
    """Writes the sums of squares of rows and columns. To be compiled, so without expressions of arrays (see `jit`)."""
    e, rows, columns = g_eDF.shape
    zero = g_eDF.dtype.type(0)
    part_F = np.empty(columns, g_eDF.dtype)
    for i in range(e):
        for f in range(columns):
            column_eF[i, f] = zero
        for first in range(0, rows, SHORT):
            for f in range(columns):
                part_F[f] = zero
            for d in range(first, min(first + SHORT, rows)):
                row = zero
                for f in range(columns):
                    square = g_eDF[i, d, f] * g_eDF[i, d, f]
                    row += square
                    part_F[f] += square
                row_eD[i, d] = row
            for f in range(columns):
                column_eF[i, f] += part_F[f]


def _apply_update(
    w_eDF: Any, g_eDF: Any, left_eD: Any, right_eF: Any, eps: float, size: float, keep: float
) -> None:
    e, rows, columns = w_eDF.shape
    for i in range(e):
        for d in range(rows):
            left = left_eD[i, d]
            for f in range(columns):
                w_eDF[i, d, f] = keep * w_eDF[i, d, f] - size * g_eDF[i, d, f] / (
                    left * right_eF[i, f] + eps
                )


def _sum_squares_eagerly(
    g_eDF: torch.Tensor, row_eD: torch.Tensor, column_eF: torch.Tensor
) -> None:
    for g, row, column in _in_pieces(g_eDF, row_eD, column_eF):
        square = g.square()
        torch.sum(square, 2, out=row)
        torch.sum(square, 1, out=column)


def _apply_update_eagerly(
    w_eDF: torch.Tensor,
    g_eDF: torch.Tensor,
    left_eD: torch.Tensor,
    right_eF: torch.Tensor,
    eps: float,
    size: float,
    keep: float,
) -> None:
    for w, g, left, right in _in_pieces(w_eDF, g_eDF, left_eD, right_eF):
        if keep != 1:
            w.mul_(keep)
        w.addcdiv_(g, (left[:, :, None] * right[:, None]).add_(eps), value=-size)


def _in_pieces(*stacks: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Of whole experts, so that temporaries stay small and kernels few."""
    _, rows, columns = stacks[0].shape
    at_once = max(1, ELEMENTS_AT_ONCE[stacks[0].device.type] // (rows * columns))
    return zip(*(t.split(at_once) for t in stacks), strict=True)
