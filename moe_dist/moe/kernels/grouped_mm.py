"""A loop over experts, whole experts to each of torch's threads on CPU; and the grouped matmul, by it or by a kernel.

Legend: R rows sorted by expert, D width, F columns, e experts.
"""

import functools
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Barrier
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from moe_dist.distributed.buffer_pool import pooled_empty
from moe_dist.moe.delayed_wgrad import GradFn

CHUNKS_PER_THREAD = 4  # of the experts for each thread: the first to finish takes the next


def for_each_expert(
    do: Callable[[Any], None],
    count_e: list[int],
    rows: list[torch.Tensor | None],
    stacks: list[torch.Tensor | None],
) -> None:
    """do(experts) for consecutive parts of the experts with about as many rows each, in threads; of each expert come
    its rows and its matrices, None where there are none."""
    of_all = [[None] * len(count_e) if t is None else t.split(count_e) for t in rows]
    of_all += [[None] * len(count_e) if t is None else t.unbind() for t in stacks]
    experts = list(zip(*of_all, strict=True))
    threads = torch.get_num_threads() if stacks[0] is None or stacks[0].device.type == "cpu" else 1
    if threads == 1:
        return do(experts)
    parts, share, done = [0], sum(count_e) / (CHUNKS_PER_THREAD * threads), 0
    for i, n in enumerate(count_e, 1):
        done += n
        if done >= share or i == len(count_e):
            parts.append(i)
            done = 0
    inference = torch.is_inference_mode_enabled()  # which is a thread's own

    def run(part: list[Any]) -> None:
        with torch.inference_mode(inference), torch.no_grad():
            do(part)

    for result in _threads(threads).map(run, (experts[a:b] for a, b in itertools.pairwise(parts))):
        assert result is None


@functools.cache
def _threads(number: int) -> ThreadPoolExecutor:
    """Each has one of torch's own threads."""
    all_here = Barrier(number + 1)

    def start() -> None:
        torch.set_num_threads(1)
        all_here.wait()

    pool = ThreadPoolExecutor(number, initializer=start)
    for _ in range(number):
        pool.submit(int)
    all_here.wait()
    torch.set_num_threads(
        number
    )  # for threads that begin later as well, who would have got what was set last
    return pool


class GroupedMatmul(torch.autograd.Function):
    """x @ w[i] for the `count_e[i]` consecutive rows of each expert i. Indexing a stacked parameter under autograd
    would write a gradient of the whole stack for every expert."""

    @staticmethod
    def forward(
        ctx: Any,
        x_RD: torch.Tensor,
        w_eDF: torch.Tensor,
        count_e: torch.Tensor,
        defer: Callable[[GradFn], None] | None,
    ) -> torch.Tensor:
        """`defer` takes what forms the gradient of w, which then comes later."""
        ctx.save_for_backward(x_RD, w_eDF)
        ctx.products = products = (_GroupedMM if has_grouped_mm(x_RD, w_eDF) else _PerExpertMM)(
            count_e
        )
        ctx.defer = defer
        return products.rows(x_RD, w_eDF)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_RF: torch.Tensor) -> tuple:
        x_RD, w_eDF = ctx.saved_tensors
        dy_RF = dy_RF.contiguous()
        dx_RD = ctx.products.rows(dy_RF, w_eDF.mT)
        if ctx.defer is not None:
            ctx.defer(partial(ctx.products.weights, x_RD, dy_RF))
            return dx_RD, None, None, None
        return dx_RD, ctx.products.weights(x_RD, dy_RF), None, None


class _PerExpertMM:
    """Products by expert."""

    def __init__(self, count_e: torch.Tensor) -> None:
        self.count_e: list[int] = count_e.tolist()

    def rows(self, x_RK: torch.Tensor, w_eKC: torch.Tensor) -> torch.Tensor:
        out_RC = pooled_empty(len(x_RK), w_eKC.shape[2], like=x_RK)

        def run(experts: Any) -> None:
            for x, out, w in experts:
                torch.mm(x, w, out=out)

        for_each_expert(run, self.count_e, [x_RK, out_RC], [w_eKC])
        return out_RC

    def weights(
        self, x_RK: torch.Tensor, dy_RC: torch.Tensor, out_eKC: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Zeros where there are no rows."""
        if out_eKC is None:
            out_eKC = pooled_empty(len(self.count_e), x_RK.shape[1], dy_RC.shape[1], like=x_RK)

        def run(experts: Any) -> None:
            for x, dy, out in experts:
                torch.mm(x.t(), dy, out=out)

        for_each_expert(run, self.count_e, [x_RK, dy_RC], [out_eKC])
        return out_eKC


class _GroupedMM:
    """In one kernel of torch."""

    def __init__(self, count_e: torch.Tensor) -> None:
        self.end_e = count_e.cumsum(0).int()

    def rows(self, x_RK: torch.Tensor, w_eKC: torch.Tensor) -> torch.Tensor:
        return F.grouped_mm(x_RK, w_eKC, offs=self.end_e)

    def weights(
        self, x_RK: torch.Tensor, dy_RC: torch.Tensor, out_eKC: torch.Tensor | None = None
    ) -> torch.Tensor:
        made_eKC = F.grouped_mm(x_RK.t(), dy_RC, offs=self.end_e)
        return made_eKC if out_eKC is None else out_eKC.copy_(made_eKC)


def has_grouped_mm(x_RD: torch.Tensor, w_eDF: torch.Tensor) -> bool:
    """Whether torch has one kernel for it: CUDA, bf16, rows of a multiple of 16 bytes, under 1,024 experts."""
    even = all(n % 8 == 0 for n in w_eDF.shape[1:])
    return x_RD.is_cuda and x_RD.dtype == torch.bfloat16 and even and len(w_eDF) < 1024
