"""Adam for vocabulary matrices, applied only to the rows touched in a step.

Rows that no rank touched are neither reduced nor updated, and their moments stay as they are.

Legend: V words, n touched in this step; D width.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from moe_dist.config.schema import OptimConfig
from moe_dist.distributed.collectives import all_reduce_max, all_reduce_sum
from moe_dist.distributed.labels import CommLabel
from moe_dist.distributed.mesh import Axis
from moe_dist.optim.expert_state import MasterParam, sum_of_squares


@dataclass(frozen=True)
class RowGradients:
    """The summed gradients for the rows touched in one step; the same on every rank.

    Attributes:
        touched_n: The rows touched by any rank, ascending, int64.
        by_name: For each parameter, the gradient for those rows, (n, D) or (n,).
    """

    touched_n: torch.Tensor
    by_name: dict[str, torch.Tensor]


class RowSparseAdam:
    """Adam for matrices (V, D) and vectors (V,) in one module, with a step count for each row.

    Backward touches the same rows in all these parameters and gives sparse gradients.

    Attributes:
        name: The module's name.
        axis: The ranks; each touches its own rows.
        named: The parameters by name.
        exp_avg: First moment for each parameter.
        exp_avg_sq: Second moment for each parameter.
        updates_V: How often each row was updated, int32.
    """

    def __init__(self, name: str, named: dict[str, nn.Parameter], axis: Axis) -> None:
        """Creates zero moments; see the attributes for the arguments."""
        self.name = name
        self.axis = axis
        self.label = CommLabel(name, "rows")
        self.named = {name: MasterParam(p) for name, p in named.items()}
        masters = {name: param.master for name, param in self.named.items()}
        self.exp_avg = {name: _lazy_zeros(master) for name, master in masters.items()}
        self.exp_avg_sq = {name: _lazy_zeros(master) for name, master in masters.items()}
        first = next(iter(masters.values()))
        self.updates_V = first.new_zeros(len(first), dtype=torch.int32)

    def clear(self) -> None:
        """Frees the gradients."""
        for param in self.named.values():
            param.clear()

    def reduce(self) -> RowGradients:
        """Sums each touched row's gradient over all ranks. A collective.

        One byte per word is reduced to find the touched rows, then only those rows.

        Returns:
            The sums; this rank's own gradients are freed.
        """
        touched_V = torch.zeros_like(self.updates_V, dtype=torch.uint8)
        local: dict[str, torch.Tensor] = {}
        for name, param in self.named.items():
            if param.accumulated_grad is not None:
                local[name] = param.accumulated_grad.coalesce()
        for sparse in local.values():
            touched_V[sparse.indices()[0]] = 1
        touched_n = all_reduce_max(touched_V, self.axis, self.label).nonzero().squeeze(1)
        sums: dict[str, torch.Tensor] = {}
        for name, param in self.named.items():
            rows = param.master.new_zeros(len(touched_n), *param.master.shape[1:])
            if name in local:
                position = torch.searchsorted(touched_n, local[name].indices()[0])
                rows[position] = local[name].values()
            sums[name] = all_reduce_sum(rows, self.axis, self.label)
            param.clear()
        return RowGradients(touched_n, sums)

    def square(self, gradients: RowGradients) -> torch.Tensor:
        """Returns the gradients' sum of squares (float64 scalar), the same on every rank."""
        return sum_of_squares(gradients.by_name.values(), self.updates_V.device)

    def update(self, gradients: RowGradients, scale: float, lr: float, config: OptimConfig) -> None:
        """Takes one Adam step on the touched rows.

        Args:
            gradients: The result from `reduce`; overwritten.
            scale: Factor for the gradients: clip coefficient / ranks.
            lr: Learning rate.
            config: Betas and epsilon.
        """
        touched_n = gradients.touched_n
        self.updates_V[touched_n] += 1
        num_updates_n = self.updates_V[touched_n].double()
        for name, param in self.named.items():
            g = gradients.by_name[name].mul_(scale)
            mean = self.exp_avg[name][touched_n].lerp_(g, 1 - config.beta1)
            square = self.exp_avg_sq[name][touched_n].lerp_(g.square_(), 1 - config.beta2)
            self.exp_avg[name][touched_n] = mean
            self.exp_avg_sq[name][touched_n] = square
            per_row = (-1, *[1] * (g.dim() - 1))
            step_size_n = lr / (1 - config.beta1**num_updates_n)
            root_scale_n = (1 - config.beta2**num_updates_n).rsqrt()
            step_size = step_size_n.to(g.dtype).view(per_row)
            root_scale = root_scale_n.to(g.dtype).view(per_row)
            root = square.sqrt_().mul_(root_scale).add_(config.eps)
            rows = param.master[touched_n].sub_(mean.mul_(step_size).div_(root))
            param.master[touched_n] = rows
            if param.narrow:
                param.p.data[touched_n] = rows.to(param.p.dtype)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Returns masters, moments and each row's update count, by name."""
        tensors = {f"{self.name}.updates": self.updates_V}
        for name, param in self.named.items():
            tensors[name] = param.master
            tensors[f"{name}.exp_avg"] = self.exp_avg[name]
            tensors[f"{name}.exp_avg_sq"] = self.exp_avg_sq[name]
        return tensors


def _lazy_zeros(like: torch.Tensor) -> torch.Tensor:
    """Returns zeros; on CPU, pages take memory only when written.

    Moments for words that never occur are twice a large vocabulary. numpy allocates with calloc,
    torch writes the zeros.
    """
    if like.device.type != "cpu":
        return torch.zeros_like(like)
    return torch.from_numpy(np.zeros(like.shape, dtype=str(like.dtype).removeprefix("torch.")))
