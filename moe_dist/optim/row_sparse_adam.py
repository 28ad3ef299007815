"""Adam for the rows of a vocabulary's matrices that a step touched."""

import numpy as np
import torch
from torch import nn

from moe_dist.config.schema import OptimConfig
from moe_dist.distributed.collectives import all_reduce_max, all_reduce_sum
from moe_dist.distributed.labels import CommLabel
from moe_dist.distributed.mesh import Axis
from moe_dist.optim.expert_state import MasterParam, sum_of_squares


class RowSparseAdam:
    """Matrices (V, D) and vectors (V,) of one module whose backward touches the same rows of each (sparse gradients).

    Every row is under an Adam of its own, which counts the steps that touched it.
    """

    def __init__(self, name: str, named: dict[str, nn.Parameter], axis: Axis) -> None:
        """`name`: of the module; `axis`: the ranks that touch rows of their own."""
        self.name, self.axis, self.label = name, axis, CommLabel(name, "rows")
        self.named = {name: MasterParam(p) for name, p in named.items()}
        masters = {name: m.master for name, m in self.named.items()}
        self.exp_avg = {name: _untouched_zeros(t) for name, t in masters.items()}
        self.exp_avg_sq = {name: _untouched_zeros(t) for name, t in masters.items()}
        first = next(iter(masters.values()))
        self.updates_V = first.new_zeros(len(first), dtype=torch.int32)
        self.touched_n = self.updates_V.new_zeros(
            0, dtype=torch.int64
        )  # of this step, on any rank, ascending
        self.gradients: dict[str, torch.Tensor] = {}  # of those rows

    def clear(self) -> None:
        for master in self.named.values():
            master.clear()

    def reduce(self) -> None:
        """Sums the rows touched on any rank over all ranks: a byte per word, then those rows alone."""
        touched_V = torch.zeros_like(self.updates_V, dtype=torch.uint8)
        mine = {
            name: m.accumulated_grad.coalesce()
            for name, m in self.named.items()
            if m.accumulated_grad is not None
        }
        for sparse in mine.values():
            touched_V[sparse.indices()[0]] = 1
        self.touched_n = all_reduce_max(touched_V, self.axis, self.label).nonzero().squeeze(1)
        for name, master in self.named.items():
            rows = master.master.new_zeros(len(self.touched_n), *master.master.shape[1:])
            if name in mine:
                rows[torch.searchsorted(self.touched_n, mine[name].indices()[0])] = mine[
                    name
                ].values()
            self.gradients[name] = all_reduce_sum(rows, self.axis, self.label)
            master.clear()

    def square(self) -> torch.Tensor:
        """Of the gradient (float64 scalar), after `reduce`; the same on every rank."""
        return sum_of_squares(self.gradients.values(), self.updates_V.device)

    def update(self, scale: float, lr: float, config: OptimConfig) -> None:
        """One step of the touched rows with gradient `scale` x the sum."""
        at, (beta1, beta2) = self.touched_n, (config.beta1, config.beta2)
        self.updates_V[at] += 1
        done_n = self.updates_V[at].double()
        for name, master in self.named.items():
            g = self.gradients[name].mul_(scale)
            mean = self.exp_avg[name][at].lerp_(g, 1 - beta1)
            square = self.exp_avg_sq[name][at].lerp_(g.square_(), 1 - beta2)
            self.exp_avg[name][at], self.exp_avg_sq[name][at] = mean, square
            per_row = (-1, *[1] * (g.dim() - 1))
            size_n, root_n = lr / (1 - beta1**done_n), (1 - beta2**done_n).rsqrt()
            root = square.sqrt_().mul_(root_n.to(g.dtype).view(per_row)).add_(config.eps)
            rows = master.master[at].sub_(mean.mul_(size_n.to(g.dtype).view(per_row)).div_(root))
            master.master[at] = rows
            if master.narrow:
                master.p.data[at] = rows.to(master.p.dtype)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Masters, moments and the number of updates of each row, by name."""
        named = {f"{self.name}.updates": self.updates_V}
        for name, master in self.named.items():
            named |= {name: master.master}
            named |= {
                f"{name}.exp_avg": self.exp_avg[name],
                f"{name}.exp_avg_sq": self.exp_avg_sq[name],
            }
        return named


def _untouched_zeros(like: torch.Tensor) -> torch.Tensor:
    """On CPU they take memory only where they are written to: numpy leaves it to the system (calloc), torch writes
    zeros. Moments of rows that never come up are twice a large vocabulary."""
    if like.device.type != "cpu":
        return torch.zeros_like(like)
    return torch.from_numpy(np.zeros(like.shape, dtype=str(like.dtype).removeprefix("torch.")))
