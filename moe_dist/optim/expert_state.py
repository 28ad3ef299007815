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
from moe_dist.distributed.buffer_pool import empty
from moe_dist.distributed.collectives import from_owner, sum_to
from moe_dist.distributed.mesh import Axis
from moe_dist.optim.factored_adam import factored_update, squares_of

SHORT = 1024  # elements that add up in float32 without a loss


class Master:
    """A parameter, the master of the part of it that this rank updates, where it is narrower than float32, and the
    gradient of all of it summed over micro-batches."""

    def __init__(self, p: nn.Parameter, mine: slice = slice(None)) -> None:
        """`mine`: along the first dimension."""
        self.p, self.mine = p, mine
        wide = torch.promote_types(p.dtype, torch.float32)
        self.narrow = p.dtype != wide
        self.master = p.detach()[mine].to(wide)  # of the parameter itself where it is wide enough
        self.sum: torch.Tensor | None = None  # of narrow gradients over micro-batches
        if self.narrow:
            p.register_post_accumulate_grad_hook(self._widen)

    def _widen(self, p: torch.Tensor) -> None:
        """Adds a narrow gradient to the wide sum: micro-batches do not add up in bf16."""
        assert p.grad is not None
        if self.sum is not None:
            self.sum.add_(p.grad)
        elif p.grad.is_sparse:
            self.sum = p.grad.to(self.master.dtype)
        else:
            self.sum = empty(*p.shape, like=self.master).copy_(p.grad)
        p.grad = None

    @property
    def summed(self) -> torch.Tensor | None:
        """None where no backward came by."""
        return self.sum if self.narrow else self.p.grad

    def gradient(self) -> torch.Tensor:
        """Summed over this step's micro-batches, wide. Zeros where no backward came by."""
        if self.summed is None:
            zeros = torch.zeros_like(self.p, dtype=self.master.dtype)
            self.sum, self.p.grad = (zeros, None) if self.narrow else (None, zeros)
        assert self.summed is not None
        return self.summed

    def clear(self) -> None:
        self.p.grad = self.sum = None

    @torch.no_grad()
    def round_master(self) -> None:
        """The parameter follows its master."""
        if self.narrow:
            self.p[self.mine] = self.master


class Spread(Master):
    """A stack of experts or of groups: each is updated by one of the ranks that hold it, its owner, each of which owns
    a consecutive part."""

    def __init__(self, p: nn.Parameter, replicas: Axis) -> None:
        """`replicas`: the ranks that hold the same stack."""
        self.replicas, self.parts = replicas, replicas.parts(len(p))
        self.of_matrices = p.dim() > 2 and p.shape[1] > 1  # else of vectors: the biases of an expert are one row
        super().__init__(p, self.parts[replicas.index])

    def when_complete(self, do: Callable[[], None]) -> None:
        """Has `do` called, within backward, when the gradient of this rank's words is whole."""
        self.p.register_post_accumulate_grad_hook(lambda p: do())

    @property
    def my_gradient(self) -> torch.Tensor:
        """Of what this rank owns; of all ranks' words after `reduce`."""
        return self.gradient()[self.mine]

    def reduce(self) -> None:
        """Sums the gradient of each part on its owner."""
        for owner, part in enumerate(self.parts):
            sum_to(self.gradient()[part], self.replicas, owner, ("experts", "gradients"))

    def square(self) -> torch.Tensor:
        """Of the gradient of what this rank owns (float64 scalar)."""
        raise NotImplementedError

    def update(self, scale: float, lr: float, step: int, config: OptimConfig) -> None:
        """Takes one step with gradient `scale` x the sum, after `square`; then all ranks have the weights.
        Vectors have neither weight decay nor a trust ratio."""
        if not self.of_matrices:
            config = dataclasses.replace(config, weight_decay=0.0, trust_ratio=False)
        before = self.master.clone() if config.trust_ratio else None
        self._update(scale, lr, step, config)
        if before is not None:
            square_e2 = torch.stack([squares_by_expert(x) for x in (before, self.master - before)], 1)
            trust(self.master, before, square_e2, lr)
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
        self.share(self.p)

    def share(self, x: torch.Tensor) -> torch.Tensor:
        """Every owner gives the others its part of `x`, in place."""
        for owner, part in enumerate(self.parts):
            from_owner(x[part], self.replicas, owner, ("experts", "weights"))
        return x

    def whole_master(self) -> torch.Tensor:
        """Of all owners. A collective."""
        whole = torch.empty_like(self.p, dtype=self.master.dtype, requires_grad=False)
        whole[self.mine] = self.master
        return self.share(whole)


class Factored(Spread):
    """A stacked expert parameter (e, D, F) and its factored second moment."""

    row_square_eD: torch.Tensor  # of this step's gradient, from `square` to `update`
    column_square_eF: torch.Tensor

    def __init__(self, p: nn.Parameter, replicas: Axis) -> None:
        super().__init__(p, replicas)
        e, rows, columns = self.master.shape
        self.row_eD, self.column_eF = self.master.new_zeros(e, rows), self.master.new_zeros(e, columns)

    def square(self) -> torch.Tensor:
        """The sums that it is made of serve the update as well."""
        self.row_square_eD, self.column_square_eF = squares_of(self.my_gradient)
        return self.row_square_eD.double().sum()

    def _update(self, scale: float, lr: float, step: int, config: OptimConfig) -> None:
        squares, means = (self.row_square_eD, self.column_square_eF), (self.row_eD, self.column_eF)
        factored_update(self.master, self.my_gradient, *squares, *means, scale, lr, step, config)
        del self.row_square_eD, self.column_square_eF

    def tensors(self, step: int) -> dict[str, torch.Tensor]:
        return {"": self.master, ".row": self.row_eD, ".column": self.column_eF}


class Adam(Spread):
    """A stacked parameter under torch's fused Adam."""

    def __init__(self, p: nn.Parameter, replicas: Axis) -> None:
        super().__init__(p, replicas)
        self.adam = torch.optim.AdamW([self.master], fused=True)

    def square(self) -> torch.Tensor:
        return square_of([self.my_gradient], self.p.device)

    def _update(self, scale: float, lr: float, step: int, config: OptimConfig) -> None:
        betas, decay = (config.beta1, config.beta2), config.weight_decay
        self.adam.param_groups[0] |= {"lr": lr, "betas": betas, "eps": config.eps, "weight_decay": decay}
        self.master.grad = self.my_gradient.mul_(scale)
        if state := self.adam.state[self.master]:  # of another step where a checkpoint has been loaded since
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


def square_of(tensors: Iterable[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Sum of squares, of short rows in float32 and of rows in float64. All in float32 a million elements on CPU lose
    5e-5 of it, and more or less of it on another layout; all in float64 it takes twenty times as long. An element
    beyond 1e19 counts as infinite."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    for t in tensors:
        flat, wide = t.flatten(), torch.promote_types(t.dtype, torch.float32)
        even = len(flat) - len(flat) % SHORT
        norms = torch.linalg.vector_norm(flat[:even].view(-1, SHORT), dim=1, dtype=wide).double()
        total += norms.square().sum() + torch.linalg.vector_norm(flat[even:], dtype=wide).double().square()
    return total


def squares_by_expert(x_eDF: torch.Tensor) -> torch.Tensor:
    """Sums of squares (e,), float64."""
    return torch.linalg.vector_norm(x_eDF.flatten(1), dim=1, dtype=torch.float64).square()


def trust(after_n: torch.Tensor, before_n: torch.Tensor, square_n2: torch.Tensor, lr: float) -> None:
    """Scales each of n steps of AdamW to the length lr x |before| (You et al. 2020, Algorithm 2 with phi the identity);
    in place. `square_n2`: sums of squares of each tensor before, and of its step; where one is 0 the step stays."""
    before_norm_n, step_norm_n = square_n2.sqrt().unbind(1)
    ratio_n = torch.where(square_n2.prod(1) > 0, lr * before_norm_n / step_norm_n, 1).to(after_n.dtype)
    torch.lerp(before_n, after_n, ratio_n.view(-1, *[1] * (after_n.dim() - 1)), out=after_n)
