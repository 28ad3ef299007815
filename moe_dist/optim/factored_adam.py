"""Adam without first moment and with a factored second moment, for stacked matrices.

Shazeer et al. 2017, Appendix D: the running mean of g² is stored only as row means r and column
means c, and v_ij = r_i c_j / mean(r). This takes rows + columns numbers, not rows x
columns. "factored_adam_t2t" is tensor2tensor's variant: sqrt(v)_ij = sqrt(r_i) sqrt(c_j) /
mean(sqrt(c)), a smaller step.

The update needs the whole gradient's second moments, so there are two passes over memory:
`row_and_column_squares` reads the gradient, and `factored_update` reads it again and changes the
weights. On CPU, numba compiles each pass to one loop if the matrices are large enough, without a
compiler on the machine (`compiled_loops`). In eager torch, used on GPUs and for small matrices,
each is two or three passes over temporaries.

Legend: e experts, each a matrix, all with one shape; D rows, F columns.
"""

import functools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from moe_dist.config.schema import OptimConfig

# matrix elements; for smaller matrices eager temporaries stay in cache and cost less than compiling
MIN_COMPILED_ELEMENTS = 2**14
# elements in eager temporaries, by device: small enough for the cache, or large enough for a GPU
EAGER_CHUNK_ELEMENTS = {"cpu": 2**17, "cuda": 2**26}
MIN_THREAD_ELEMENTS = 2**17
SHORT = 64  # rows whose squares add up in one float32


def row_and_column_squares(g_eDF: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns each row's (e, D) and column's (e, F) sum of squares, in the gradient's dtype.

    Rows and columns are short enough for float32 sums. The norm and the means are computed from
    these sums.
    """
    e, rows, columns = g_eDF.shape
    row_eD = g_eDF.new_empty(e, rows)
    column_eF = g_eDF.new_empty(e, columns)
    if _is_compiled(g_eDF):
        _run_compiled(_sum_squares, g_eDF, row_eD, column_eF)
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
    """Takes one Adam step with beta1 = 0 and a factored second moment (Appendix D), in place.

    w -= lr (g / (sqrt(v) + eps) + weight_decay w), with v from bias-corrected means. Rows and
    columns without any gradient have v = 0 and g = 0: they get no update, not NaN.

    Args:
        w_eDF: Weights; updated.
        g_eDF: Gradient before scaling.
        row_square_eD: Its row sums from `row_and_column_squares`.
        column_square_eF: Its column sums.
        row_eD: Running means of g² over each row; updated.
        column_eF: Running means of g² over each column; updated.
        scale: Factor for the gradient.
        lr: Learning rate.
        step: This update's number, from 1.
        config: `expert_beta2`, `expert_optimizer`, `eps` and `weight_decay`.
    """
    beta = config.expert_beta2
    correction = 1 - beta**step
    rows, columns = g_eDF.shape[1:]
    row_eD.lerp_(row_square_eD * (scale**2 / columns), 1 - beta)
    column_eF.lerp_(column_square_eF * (scale**2 / rows), 1 - beta)
    r_eD = row_eD / correction
    c_eF = column_eF / correction
    if config.expert_optimizer == "factored_adam":
        # sqrt(r c / mean(r)) as a product: two roots
        row_scale_eD = (r_eD / _positive_or_one(r_eD.mean(1, keepdim=True))).sqrt_()
        column_scale_eF = c_eF.sqrt_()
    else:
        # tensor2tensor, diet.py: roots first, then the mean
        row_scale_eD = r_eD.sqrt_()
        column_scale_eF = c_eF.sqrt_()
        mean_e1 = column_scale_eF.mean(1, keepdim=True)
        column_scale_eF = column_scale_eF / _positive_or_one(mean_e1)
    scalars = (config.eps, lr * scale, 1 - lr * config.weight_decay)
    if _is_compiled(w_eDF):
        # as torch's in-place operations do: autograd rejects a graph that saved the old weights
        torch.autograd.graph.increment_version(w_eDF)
        _run_compiled(_apply_update, w_eDF, g_eDF, row_scale_eD, column_scale_eF, scalars=scalars)
    else:
        _apply_update_eagerly(w_eDF, g_eDF, row_scale_eD, column_scale_eF, *scalars)


def _positive_or_one(x: torch.Tensor) -> torch.Tensor:
    """Returns x with zeros replaced by 1, as a safe divisor."""
    return torch.where(x > 0, x, 1)


def _is_compiled(t_eDF: torch.Tensor) -> bool:
    """Returns True if the compiled loops are used.

    Depends on the matrix size, not on the stack's, which depends on the ranks.
    """
    return t_eDF.device.type == "cpu" and t_eDF.shape[1] * t_eDF.shape[2] >= MIN_COMPILED_ELEMENTS


def _run_compiled(
    loop: Callable[..., None], *stacks: torch.Tensor, scalars: tuple[float, ...] = ()
) -> None:
    """Compiles a loop over experts and runs it on torch's threads, with whole experts for each.

    Scalars are converted to the stacks' dtype, because a wider scalar would widen all arithmetic.
    """
    kernel = _compiled(loop)
    arrays = [t.detach().numpy() for t in stacks]
    for array in arrays:
        assert array.dtype == arrays[0].dtype and len(array) == len(arrays[0])
    numbers = [arrays[0].dtype.type(x) for x in scalars]
    num_threads = torch.get_num_threads()
    num_parts = min(num_threads, len(arrays[0]), arrays[0].size // MIN_THREAD_ELEMENTS)
    if num_parts < 2:
        return kernel(*arrays, *numbers)
    parts_by_array = [np.array_split(array, num_parts) for array in arrays]
    pending = []
    for part in zip(*parts_by_array, strict=True):
        pending.append(_thread_pool(num_threads).submit(kernel, *part, *numbers))
    for future in pending:
        future.result()


@functools.cache
def _compiled(function: Callable[..., None]) -> Callable[..., None]:
    """Returns the function compiled by numba."""
    # imported late: numba takes 0.25 seconds, and other runs do not need it
    from moe_dist.optim.compiled_loops import compiled

    return compiled(function)


@functools.cache
def _thread_pool(num_threads: int) -> ThreadPoolExecutor:
    """Returns a pool of `num_threads` threads, created once."""
    return ThreadPoolExecutor(num_threads)


def _sum_squares(g_eDF: Any, row_eD: Any, column_eF: Any) -> None:
    """Writes each row's and column's sum of squares.

    To be compiled, so without expressions over whole arrays (see `compiled_loops`).
    """
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
    w_eDF: Any,
    g_eDF: Any,
    row_scale_eD: Any,
    column_scale_eF: Any,
    eps: float,
    step_size: float,
    decay_factor: float,
) -> None:
    """Writes the new weights; to be compiled."""
    e, rows, columns = w_eDF.shape
    for i in range(e):
        for d in range(rows):
            row_scale = row_scale_eD[i, d]
            for f in range(columns):
                w_eDF[i, d, f] = decay_factor * w_eDF[i, d, f] - step_size * g_eDF[i, d, f] / (
                    row_scale * column_scale_eF[i, f] + eps
                )


def _sum_squares_eagerly(
    g_eDF: torch.Tensor, row_eD: torch.Tensor, column_eF: torch.Tensor
) -> None:
    """Does the same as `_sum_squares` in eager torch."""
    for g, row, column in _expert_chunks(g_eDF, row_eD, column_eF):
        square = g.square()
        torch.sum(square, 2, out=row)
        torch.sum(square, 1, out=column)


def _apply_update_eagerly(
    w_eDF: torch.Tensor,
    g_eDF: torch.Tensor,
    row_scale_eD: torch.Tensor,
    column_scale_eF: torch.Tensor,
    eps: float,
    step_size: float,
    decay_factor: float,
) -> None:
    """Does the same as `_apply_update` in eager torch."""
    stacks = (w_eDF, g_eDF, row_scale_eD, column_scale_eF)
    for w, g, row_scale, column_scale in _expert_chunks(*stacks):
        if decay_factor != 1:
            w.mul_(decay_factor)
        root = (row_scale[:, :, None] * column_scale[:, None]).add_(eps)
        w.addcdiv_(g, root, value=-step_size)


def _expert_chunks(*stacks: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yields chunks with whole experts: small temporaries, but few kernels."""
    _, rows, columns = stacks[0].shape
    chunk_size = max(1, EAGER_CHUNK_ELEMENTS[stacks[0].device.type] // (rows * columns))
    return zip(*(t.split(chunk_size) for t in stacks), strict=True)
