"""A loop over experts, whole experts to each of torch's threads on CPU; and the grouped matmul that is such a loop.

Legend: R rows sorted by expert, D width, F columns, e experts.
"""

import functools
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from moe_dist.memory import empty

PIECES = 4  # of the experts for each thread: the first to finish takes the next


def each(
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
    parts, share, done = [0], sum(count_e) / (PIECES * threads), 0
    for i, n in enumerate(count_e, 1):
        done += n
        if done >= share or i == len(count_e):
            parts.append(i)
            done = 0
    for result in _threads(threads).map(do, (experts[a:b] for a, b in itertools.pairwise(parts))):
        assert result is None


@functools.cache
def _threads(number: int) -> ThreadPoolExecutor:
    """Each has one of torch's own threads, and no gradients."""

    def start() -> None:
        torch.set_num_threads(1)
        torch.set_grad_enabled(False)

    return ThreadPoolExecutor(number, initializer=start)


class GroupedMatmul(torch.autograd.Function):
    """x @ w[i] for the `count_e[i]` consecutive rows of each expert i. Indexing a stacked parameter under autograd
    would write a gradient of the whole stack for every expert."""

    @staticmethod
    def forward(ctx: Any, x_RD: torch.Tensor, w_eDF: torch.Tensor, count_e: list[int]) -> torch.Tensor:
        ctx.save_for_backward(x_RD, w_eDF)
        ctx.count_e = count_e
        y_RF = empty(len(x_RD), w_eDF.shape[2], like=x_RD)

        def run(experts: Any) -> None:
            for x, y, w in experts:
                torch.mm(x, w, out=y)

        each(run, count_e, [x_RD, y_RF], [w_eDF])
        return y_RF

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_RF: torch.Tensor) -> tuple:
        x_RD, w_eDF = ctx.saved_tensors
        dx_RD, dw_eDF = empty(*x_RD.shape, like=x_RD), empty(*w_eDF.shape, like=w_eDF)

        def run(experts: Any) -> None:
            for x, dy, dx, w, dw in experts:
                torch.mm(dy, w.t(), out=dx)
                torch.mm(x.t(), dy, out=dw)  # zeros where there are no rows

        each(run, ctx.count_e, [x_RD, dy_RF.contiguous(), dx_RD], [w_eDF, dw_eDF])
        return dx_RD, dw_eDF, None
