"""Grouped matmul: each expert's rows times its matrix, by a loop or by one torch kernel.

On CPU, torch's threads divide the loop; a thread runs whole experts.

Legend: R rows sorted by expert, K inner size, C columns, D width, F hidden units, e experts.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from moe_dist.distributed.buffer_pool import pooled_empty
from moe_dist.moe.delayed_wgrad import GradFn

# parts per thread: the first thread to finish takes the next part
CHUNKS_PER_THREAD = 4


def for_each_expert(
    do: Callable[[Any], None],
    count_e: list[int],
    rows: Sequence[torch.Tensor | None],
    stacks: Sequence[torch.Tensor | None],
) -> None:
    """Calls a function for consecutive parts of the expert list; on CPU in threads.

    Args:
        do: Called with a list of tuples, one per expert: its rows from each tensor in `rows`, then
            its matrix from each tensor in `stacks`.
        count_e: Rows per expert.
        rows: Tensors with all rows, sorted by expert. An entry None gives every expert None.
        stacks: Tensors with the experts along the first dimension. An entry None gives every expert
            None.
    """
    none_e = [None] * len(count_e)
    columns: list[Any] = [none_e if t is None else t.split(count_e) for t in rows]
    columns += [none_e if t is None else t.unbind() for t in stacks]
    experts = list(zip(*columns, strict=True))
    is_cpu = stacks[0] is None or stacks[0].device.type == "cpu"
    num_threads = torch.get_num_threads() if is_cpu else 1
    if num_threads == 1:
        do(experts)
        return
    inference = torch.is_inference_mode_enabled()  # a thread has its own mode

    def run(part: list[Any]) -> None:
        with torch.inference_mode(inference), torch.no_grad():
            do(part)

    bounds = _equal_parts(count_e, CHUNKS_PER_THREAD * num_threads)
    parts = (experts[first:end] for first, end in itertools.pairwise(bounds))
    for result in _threads(num_threads).map(run, parts):
        assert result is None


def _equal_parts(count_e: list[int], num_parts: int) -> list[int]:
    """Returns the bounds of consecutive expert parts with about equally many rows."""
    share = sum(count_e) / num_parts
    bounds = [0]
    rows_in_part = 0
    for end, count in enumerate(count_e, 1):
        rows_in_part += count
        if rows_in_part >= share or end == len(count_e):
            bounds.append(end)
            rows_in_part = 0
    return bounds


@functools.cache
def _threads(number: int) -> ThreadPoolExecutor:
    """Returns a pool of threads, each with one torch thread."""
    started = Barrier(number + 1)

    def start() -> None:
        torch.set_num_threads(1)
        started.wait()

    pool = ThreadPoolExecutor(number, initializer=start)
    for _ in range(number):
        pool.submit(int)
    started.wait()
    # FENCE. `set_num_threads` also applies to threads that start later, which would get 1 now
    # (torch 2.13, held by test_experts.py).
    torch.set_num_threads(number)
    return pool


class GroupedMatmul(torch.autograd.Function):
    """Multiplies expert i's `count_e[i]` consecutive rows by w[i], for each i.

    It is an autograd function because indexing a stacked parameter under autograd would write a
    gradient of the stack's full size for every expert.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_RD: torch.Tensor,
        w_eDF: torch.Tensor,
        count_e: torch.Tensor,
        defer: Callable[[GradFn], None] | None,
    ) -> torch.Tensor:
        """Returns the products (R, F); backward passes `w_eDF`'s gradient function to `defer`."""
        products = _GroupedMM(count_e) if has_grouped_mm(x_RD, w_eDF) else _PerExpertMM(count_e)
        ctx.save_for_backward(x_RD, w_eDF)
        ctx.products = products
        ctx.defer = defer
        return products.rows(x_RD, w_eDF)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_RF: torch.Tensor) -> tuple:
        """Returns the gradients of rows and, unless deferred, matrices."""
        x_RD, w_eDF = ctx.saved_tensors
        dy_RF = dy_RF.contiguous()
        dx_RD = ctx.products.rows(dy_RF, w_eDF.mT)
        if ctx.defer is not None:
            ctx.defer(partial(ctx.products.weights, x_RD, dy_RF))
            return dx_RD, None, None, None
        return dx_RD, ctx.products.weights(x_RD, dy_RF), None, None


class _PerExpertMM:
    """Products by one matmul per expert."""

    def __init__(self, count_e: torch.Tensor) -> None:
        self.count_e: list[int] = count_e.tolist()

    def rows(self, x_RK: torch.Tensor, w_eKC: torch.Tensor) -> torch.Tensor:
        """Returns x @ w for each expert's rows (R, C)."""
        out_RC = pooled_empty(len(x_RK), w_eKC.shape[2], like=x_RK)

        def run(experts: Any) -> None:
            for x, out, w in experts:
                torch.mm(x, w, out=out)

        for_each_expert(run, self.count_e, [x_RK, out_RC], [w_eKC])
        return out_RC

    def weights(
        self, x_RK: torch.Tensor, dy_RC: torch.Tensor, out_eKC: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Returns x.T @ dy for each expert's rows (e, K, C), zeros for an expert without rows."""
        if out_eKC is None:
            out_eKC = pooled_empty(len(self.count_e), x_RK.shape[1], dy_RC.shape[1], like=x_RK)

        def run(experts: Any) -> None:
            for x, dy, out in experts:
                torch.mm(x.t(), dy, out=out)

        for_each_expert(run, self.count_e, [x_RK, dy_RC], [out_eKC])
        return out_eKC


class _GroupedMM:
    """Products by torch's `grouped_mm` kernel."""

    def __init__(self, count_e: torch.Tensor) -> None:
        self.end_e = count_e.cumsum(0).int()

    def rows(self, x_RK: torch.Tensor, w_eKC: torch.Tensor) -> torch.Tensor:
        """Returns x @ w for each expert's rows (R, C)."""
        return F.grouped_mm(x_RK, w_eKC, offs=self.end_e)

    def weights(
        self, x_RK: torch.Tensor, dy_RC: torch.Tensor, out_eKC: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Returns x.T @ dy for each expert's rows (e, K, C), in `out_eKC` if given."""
        product_eKC = F.grouped_mm(x_RK.t(), dy_RC, offs=self.end_e)
        return product_eKC if out_eKC is None else out_eKC.copy_(product_eKC)


def has_grouped_mm(x_RD: torch.Tensor, w_eDF: torch.Tensor) -> bool:
    """Returns True if `grouped_mm` can run: CUDA, bf16, rows of 16 n bytes, < 1,024 experts."""
    aligned = all(size % 8 == 0 for size in w_eDF.shape[1:])
    return x_RD.is_cuda and x_RD.dtype == torch.bfloat16 and aligned and len(w_eDF) < 1024
