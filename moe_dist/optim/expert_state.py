"""Parameters that DeepSpeed never sees: their gradients, their float32 masters, and their updates.

  experts  Adam with beta1 = 0 and a factored second moment (`factored`), or plain Adam ("adam"). Stacked experts are a
           batch of matrices, each with a pair of moments of its own.
  gates    of groups of experts: plain Adam
  rows     of a vocabulary's matrices: Adam on the rows that some rank touched in the step. The others are neither
           reduced nor updated, and their state waits.

A narrow parameter (bf16) is the rounded copy, for compute, of a master kept here.

Of the experts that several ranks hold each is one rank's to update, whole: gradients are summed there, and there alone
are its master and its state; then the others get its weights. Gates of groups likewise.

Legend: e experts of this rank, of which it updates some; D rows, F columns; V words, n of them touched.
"""

import dataclasses
from collections.abc import Callable, Iterable

import torch
from torch import nn

from moe_dist.config.schema import OptimConfig
from moe_dist.distributed.buffer_pool import pooled_empty
from moe_dist.distributed.collectives import broadcast, reduce_sum
from moe_dist.distributed.labels import CommLabel
from moe_dist.distributed.mesh import Axis
from moe_dist.optim.factored_adam import factored_update, row_and_column_squares

EXPERT_GRADIENTS = CommLabel("experts", "gradients")
EXPERT_WEIGHTS = CommLabel("experts", "weights")
FLOAT32_BLOCK = 1024  # elements that add up in float32 without a loss


class MasterParam:
    """A parameter, the master of the part of it that this rank updates, where it is narrower than float32, and the
    gradient of all of it summed over micro-batches."""

    def __init__(self, p: nn.Parameter, mine: slice = slice(None)) -> None:
        """`mine`: along the first dimension."""
        self.p, self.owned = p, mine
        wide = torch.promote_types(p.dtype, torch.float32)
        self.narrow = p.dtype != wide
        self.master = p.detach()[mine].to(wide)  # of the parameter itself where it is wide enough
        self.accumulated: torch.Tensor | None = None  # of narrow gradients over micro-batches
        if self.narrow:
            p.register_post_accumulate_grad_hook(self._widen)

    def _widen(self, p: torch.Tensor) -> None:
        """Adds a narrow gradient to the wide sum: micro-batches do not add up in bf16."""
        assert p.grad is not None
        if self.accumulated is not None:
            self.accumulated.add_(p.grad)
        elif p.grad.is_sparse:
            self.accumulated = p.grad.to(self.master.dtype)
        else:
            self.accumulated = pooled_empty(*p.shape, like=self.master).copy_(p.grad)
        p.grad = None

    @property
    def accumulated_grad(self) -> torch.Tensor | None:
        """None where no backward came by."""
        return self.accumulated if self.narrow else self.p.grad

    def gradient(self) -> torch.Tensor:
        """Summed over this step's micro-batches, wide. Zeros where no backward came by."""
        if self.accumulated_grad is None:
            zeros = torch.zeros_like(self.p, dtype=self.master.dtype)
            self.accumulated, self.p.grad = (zeros, None) if self.narrow else (None, zeros)
        assert self.accumulated_grad is not None
        return self.accumulated_grad

    def clear(self) -> None:
        self.p.grad = self.accumulated = None

    @torch.no_grad()
    def round_master(self) -> None:
        """The parameter follows its master."""
        if self.narrow:
            self.p[self.owned] = self.master


class ShardedExpertParam(MasterParam):
    """A stack of experts or of groups: each is updated by one of the ranks that hold it, its owner, each of which owns
    a consecutive part."""

    def __init__(self, p: nn.Parameter, replicas: Axis) -> None:
        """`replicas`: the ranks that hold the same stack."""
        self.replicas, self.owner_ranges = replicas, replicas.split_ranges(len(p))
        self.of_matrices = (
            p.dim() > 2 and p.shape[1] > 1
        )  # else of vectors: the biases of an expert are one row
        super().__init__(p, self.owner_ranges[replicas.index])

    def register_grad_ready_hook(self, do: Callable[[], None]) -> None:
        """Has `do` called, within backward, when the gradient of this rank's words is whole."""
        self.p.register_post_accumulate_grad_hook(lambda p: do())

    @property
    def owned_gradient(self) -> torch.Tensor:
        """Of what this rank owns; of all ranks' words after `reduce`."""
        return self.gradient()[self.owned]

    def reduce(self) -> None:
        """Sums the gradient of each part on its owner."""
        for owner, part in enumerate(self.owner_ranges):
            reduce_sum(self.gradient()[part], self.replicas, owner, EXPERT_GRADIENTS)

    def square(self) -> torch.Tensor:
        """Of the gradient of what this rank owns (float64 scalar)."""
        raise NotImplementedError

    def update(self, scale: float, lr: float, step: int, config: OptimConfig) -> None:
        """Takes one step with gradient `scale` x the sum, after `square`; then all ranks have the weights.
        Vectors have neither weight decay nor a trust ratio."""
        if not self.of_matrices:
            config = dataclasses.replace(config, weight_decay=0.0, lamb=False)
        before = self.master.clone() if config.lamb else None
        self._update(scale, lr, step, config)
        if before is not None:
            square_e2 = torch.stack(
                [sum_of_squares_per_expert(x) for x in (before, self.master - before)], 1
            )
            apply_trust_ratio(self.master, before, square_e2, lr)
        self.round_master()

    def _update(self, scale: float, lr: float, step: int, config: OptimConfig) -> None:
        """Of the master alone."""
        raise NotImplementedError

    def tensors(self, step: int) -> dict[str, torch.Tensor]:
        """Master and state of what this rank owns, by the ending of their names, after `step` steps."""
        raise NotImplementedError

    @torch.no_grad()
    def round_master(self) -> None:
        """The parameter follows the masters of all owners."""
        super().round_master()
        self.broadcast_from_owners(self.p)

    def broadcast_from_owners(self, x: torch.Tensor) -> torch.Tensor:
        """Every owner gives the others its part of `x`, in place."""
        for owner, part in enumerate(self.owner_ranges):
            broadcast(x[part], self.replicas, owner, EXPERT_WEIGHTS)
        return x

    def whole_master(self) -> torch.Tensor:
        """Of all owners. A collective."""
        whole = torch.empty_like(self.p, dtype=self.master.dtype, requires_grad=False)
        whole[self.owned] = self.master
        return self.broadcast_from_owners(whole)


class FactoredAdamParam(ShardedExpertParam):
    """A stacked expert parameter (e, D, F) and its factored second moment."""

    row_square_eD: torch.Tensor  # of this step's gradient, from `square` to `update`
    column_square_eF: torch.Tensor

    def __init__(self, p: nn.Parameter, replicas: Axis) -> None:
        super().__init__(p, replicas)
        e, rows, columns = self.master.shape
        self.row_eD, self.column_eF = (
            self.master.new_zeros(e, rows),
            self.master.new_zeros(e, columns),
        )

    def square(self) -> torch.Tensor:
        """The sums that it is made of serve the update as well."""
        self.row_square_eD, self.column_square_eF = row_and_column_squares(self.owned_gradient)
        return self.row_square_eD.double().sum()

    def _update(self, scale: float, lr: float, step: int, config: OptimConfig) -> None:
        squares, means = (self.row_square_eD, self.column_square_eF), (self.row_eD, self.column_eF)
        factored_update(self.master, self.owned_gradient, *squares, *means, scale, lr, step, config)
        del self.row_square_eD, self.column_square_eF

    def tensors(self, step: int) -> dict[str, torch.Tensor]:
        return {"": self.master, ".row": self.row_eD, ".column": self.column_eF}


class AdamParam(ShardedExpertParam):
    """A stacked parameter under torch's fused Adam."""

    def __init__(self, p: nn.Parameter, replicas: Axis) -> None:
        super().__init__(p, replicas)
        self.adam = torch.optim.AdamW([self.master], fused=True)

    def square(self) -> torch.Tensor:
        return sum_of_squares([self.owned_gradient], self.p.device)

    def _update(self, scale: float, lr: float, step: int, config: OptimConfig) -> None:
        betas, decay = (config.beta1, config.beta2), config.weight_decay
        self.adam.param_groups[0] |= {
            "lr": lr,
            "betas": betas,
            "eps": config.eps,
            "weight_decay": decay,
        }
        self.master.grad = self.owned_gradient.mul_(scale)
        if state := self.adam.state[
            self.master
        ]:  # of another step where a checkpoint has been loaded since
            state["step"].fill_(step - 1)
        self.adam.step()
        self.master.grad = None

    def tensors(self, step: int) -> dict[str, torch.Tensor]:
        """The moments are made where there are none yet."""
        state = self.adam.state[self.master]
        if not state:  # as torch makes it
            state |= {m: torch.zeros_like(self.master) for m in ("exp_avg", "exp_avg_sq")}
            state["step"] = torch.tensor(float(step), device=self.p.device)
        return {"": self.master, ".exp_avg": state["exp_avg"], ".exp_avg_sq": state["exp_avg_sq"]}


def sum_of_squares(tensors: Iterable[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Sum of squares, of short rows in float32 and of rows in float64. All in float32 a million elements on CPU lose
    5e-5 of it, and more or less of it on another layout; all in float64 it takes twenty times as long. An element
    beyond 1e19 counts as infinite."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    for t in tensors:
        flat, wide = t.flatten(), torch.promote_types(t.dtype, torch.float32)
        even = len(flat) - len(flat) % FLOAT32_BLOCK
        norms = torch.linalg.vector_norm(
            flat[:even].view(-1, FLOAT32_BLOCK), dim=1, dtype=wide
        ).double()
        total += (
            norms.square().sum()
            + torch.linalg.vector_norm(flat[even:], dtype=wide).double().square()
        )
    return total


def sum_of_squares_per_expert(x_eDF: torch.Tensor) -> torch.Tensor:
    """Sums of squares (e,), float64."""
    return torch.linalg.vector_norm(x_eDF.flatten(1), dim=1, dtype=torch.float64).square()


def apply_trust_ratio(
    after_n: torch.Tensor, before_n: torch.Tensor, square_n2: torch.Tensor, lr: float
) -> None:
    """Scales each of n steps of AdamW to the length lr x |before| (You et al. 2020, Algorithm 2 with phi the identity);
    in place. `square_n2`: sums of squares of each tensor before, and of its step; where one is 0 the step stays."""
    before_norm_n, step_norm_n = square_n2.sqrt().unbind(1)
    ratio_n = torch.where(square_n2.prod(1) > 0, lr * before_norm_n / step_norm_n, 1).to(
        after_n.dtype
    )
    torch.lerp(before_n, after_n, ratio_n.view(-1, *[1] * (after_n.dim() - 1)), out=after_n)
