"""Optimizer state for the parameters outside DeepSpeed: experts and group gates.

  experts  Adam with beta1 = 0 and a factored second moment (`factored_adam`), or plain Adam
           ("adam"). Stacked experts are a batch of matrices; each matrix has its own moments.
  gates    of expert groups: plain Adam

A narrow parameter (bf16) is the rounded copy, used for compute, of a float32 master kept here.

Several ranks can hold the same stack. Each expert (or gate) in it has one owner among these ranks:
its gradient is summed on the owner, only the owner keeps master and moments, and the owner
broadcasts the new weights. One step of a stack is

    gradient = state.reduce()                               # sum on the owners
    square, statistics = state.square(gradient)             # its part of the gradient norm
    state.update(gradient, statistics, scale, lr, ...)      # update the owned part, then broadcast

Legend: e experts held by this rank (it owns some); D rows, F columns.
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
FLOAT32_BLOCK = 1024  # so many squares add up in float32 without a loss

# Tensors computed by `square` and reused by `update`; empty for an optimizer that reuses nothing.
Statistics = tuple[torch.Tensor, ...]


class MasterParam:
    """A parameter with its float32 master and its gradient, summed over micro-batches.

    Attributes:
        p: The parameter.
        owned: The slice along the first dimension that this rank updates.
        narrow: True if the parameter's dtype is narrower than float32.
        master: The owned part, float32 or wider; a view of the parameter unless it is narrow.
        accumulated: The wide sum of narrow gradients over the micro-batches so far, or None.
    """

    def __init__(self, p: nn.Parameter, owned: slice = slice(None)) -> None:
        """Creates the master; by default this rank updates the whole parameter."""
        self.p = p
        self.owned = owned
        wide = torch.promote_types(p.dtype, torch.float32)
        self.narrow = p.dtype != wide
        self.master = p.detach()[owned].to(wide)
        self.accumulated: torch.Tensor | None = None
        if self.narrow:
            p.register_post_accumulate_grad_hook(self._accumulate)

    def _accumulate(self, p: torch.Tensor) -> None:
        """Adds a narrow gradient to the wide sum, because micro-batches do not add up in bf16."""
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
        """This rank's gradient, at least float32; None if no gradient was accumulated."""
        return self.accumulated if self.narrow else self.p.grad

    def clear(self) -> None:
        """Frees the gradient."""
        self.p.grad = None
        self.accumulated = None

    @torch.no_grad()
    def round_master(self) -> None:
        """Copies the master to the parameter, rounded to the parameter's dtype."""
        if self.narrow:
            self.p[self.owned] = self.master


class ShardedExpertParam(MasterParam):
    """A stack of experts or gates, split into consecutive parts; each part has an owner rank.

    Attributes:
        replicas: The ranks that hold the same stack.
        owner_ranges: The slice that each of them owns.
        is_matrix_stack: False for a stack of vectors: the biases of an expert are one row.
    """

    def __init__(self, p: nn.Parameter, replicas: Axis) -> None:
        """Splits the stack among its ranks and creates this rank's master."""
        self.replicas = replicas
        self.owner_ranges = replicas.split_ranges(len(p))
        self.is_matrix_stack = p.dim() > 2 and p.shape[1] > 1
        super().__init__(p, self.owner_ranges[replicas.index])

    def register_grad_ready_hook(self, hook: Callable[[], None]) -> None:
        """Registers a function that backward calls when this rank's gradient is complete."""
        self.p.register_post_accumulate_grad_hook(lambda p: hook())

    def local_gradient(self) -> torch.Tensor:
        """Returns this rank's gradient for the whole stack; zeros if none was accumulated."""
        if self.accumulated_grad is None:
            return torch.zeros_like(self.p, dtype=self.master.dtype)
        return self.accumulated_grad

    def reduce(self) -> torch.Tensor:
        """Sums each part's gradient on its owner, in place. A collective.

        Returns:
            The owned part's summed gradient: a view of the local gradient.
        """
        gradient = self.local_gradient()
        for owner, part in enumerate(self.owner_ranges):
            reduce_sum(gradient[part], self.replicas, owner, EXPERT_GRADIENTS)
        return gradient[self.owned]

    def square(self, gradient: torch.Tensor) -> tuple[torch.Tensor, Statistics]:
        """Computes the gradient's part of the norm.

        Args:
            gradient: The result from `reduce`.

        Returns:
            The sum of squares (float64 scalar), and tensors that `update` reuses.
        """
        raise NotImplementedError

    def update(
        self,
        gradient: torch.Tensor,
        statistics: Statistics,
        scale: float,
        lr: float,
        step: int,
        config: OptimConfig,
    ) -> None:
        """Takes one step on the owned part and broadcasts the new weights. A collective.

        Vectors get neither weight decay nor a trust ratio.

        Args:
            gradient: The result from `reduce`; overwritten by some optimizers.
            statistics: The second result of `square` for this gradient.
            scale: Factor for the gradient: clip coefficient / ranks.
            lr: Learning rate.
            step: This update's number, from 1, for the bias correction.
            config: Betas, epsilon, weight decay and so on.
        """
        if not self.is_matrix_stack:
            config = dataclasses.replace(config, weight_decay=0.0, lamb=False)
        before = self.master.clone() if config.lamb else None
        self._update_master(gradient, statistics, scale, lr, step, config)
        if before is not None:
            before_square_e = sum_of_squares_per_expert(before)
            step_square_e = sum_of_squares_per_expert(self.master - before)
            square_e2 = torch.stack([before_square_e, step_square_e], 1)
            apply_trust_ratio(self.master, before, square_e2, lr)
        self.round_master()

    def _update_master(
        self,
        gradient: torch.Tensor,
        statistics: Statistics,
        scale: float,
        lr: float,
        step: int,
        config: OptimConfig,
    ) -> None:
        """Takes one step on the master alone; see `update`."""
        raise NotImplementedError

    def tensors(self, step: int) -> dict[str, torch.Tensor]:
        """Returns the tensors that a checkpoint stores.

        Args:
            step: Updates so far.

        Returns:
            The owned part's master and moments, keyed by their names' suffix.
        """
        raise NotImplementedError

    @torch.no_grad()
    def round_master(self) -> None:
        """Copies all owners' masters to the parameter. A collective."""
        super().round_master()
        self.broadcast_from_owners(self.p)

    def broadcast_from_owners(self, x: torch.Tensor) -> torch.Tensor:
        """Broadcasts each owner's part of `x`, a stack like the parameter, in place; returns it."""
        for owner, part in enumerate(self.owner_ranges):
            broadcast(x[part], self.replicas, owner, EXPERT_WEIGHTS)
        return x

    def whole_master(self) -> torch.Tensor:
        """Returns the whole stack's master, gathered from its owners. A collective."""
        whole = torch.empty_like(self.p, dtype=self.master.dtype, requires_grad=False)
        whole[self.owned] = self.master
        return self.broadcast_from_owners(whole)


class FactoredAdamParam(ShardedExpertParam):
    """A stacked expert parameter (e, D, F) with a factored second moment (e, D) and (e, F)."""

    def __init__(self, p: nn.Parameter, replicas: Axis) -> None:
        super().__init__(p, replicas)
        e, rows, columns = self.master.shape
        self.row_eD = self.master.new_zeros(e, rows)
        self.column_eF = self.master.new_zeros(e, columns)

    def square(self, gradient: torch.Tensor) -> tuple[torch.Tensor, Statistics]:
        """Returns the sum of squares; the statistics are the sums by row and by column."""
        row_square_eD, column_square_eF = row_and_column_squares(gradient)
        return row_square_eD.double().sum(), (row_square_eD, column_square_eF)

    def _update_master(
        self,
        gradient: torch.Tensor,
        statistics: Statistics,
        scale: float,
        lr: float,
        step: int,
        config: OptimConfig,
    ) -> None:
        row_square_eD, column_square_eF = statistics
        factored_update(
            self.master,
            gradient,
            row_square_eD,
            column_square_eF,
            self.row_eD,
            self.column_eF,
            scale,
            lr,
            step,
            config,
        )

    def tensors(self, step: int) -> dict[str, torch.Tensor]:
        """Returns the master and the second moment's two factors."""
        return {"": self.master, ".row": self.row_eD, ".column": self.column_eF}


class AdamParam(ShardedExpertParam):
    """A stacked parameter under torch's fused Adam."""

    def __init__(self, p: nn.Parameter, replicas: Axis) -> None:
        super().__init__(p, replicas)
        self.adam = torch.optim.AdamW([self.master], fused=True)

    def square(self, gradient: torch.Tensor) -> tuple[torch.Tensor, Statistics]:
        """Returns the sum of squares, without statistics."""
        return sum_of_squares([gradient], self.p.device), ()

    def _update_master(
        self,
        gradient: torch.Tensor,
        statistics: Statistics,
        scale: float,
        lr: float,
        step: int,
        config: OptimConfig,
    ) -> None:
        self.adam.param_groups[0] |= {
            "lr": lr,
            "betas": (config.beta1, config.beta2),
            "eps": config.eps,
            "weight_decay": config.weight_decay,
        }
        self.master.grad = gradient.mul_(scale)
        state = self.adam.state[self.master]
        if state:  # a checkpoint may have been loaded since the last step
            state["step"].fill_(step - 1)
        self.adam.step()
        self.master.grad = None

    def tensors(self, step: int) -> dict[str, torch.Tensor]:
        """Returns the tensors that a checkpoint stores.

        Before the first step it creates zero moments, as torch does.

        Args:
            step: Updates so far.

        Returns:
            The owned part's master and moments, keyed by their names' suffix.
        """
        state = self.adam.state[self.master]
        if not state:
            state["exp_avg"] = torch.zeros_like(self.master)
            state["exp_avg_sq"] = torch.zeros_like(self.master)
            state["step"] = torch.tensor(float(step), device=self.p.device)
        return {"": self.master, ".exp_avg": state["exp_avg"], ".exp_avg_sq": state["exp_avg_sq"]}


def sum_of_squares(tensors: Iterable[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Sums the squares of all elements.

    Blocks of `FLOAT32_BLOCK` elements are summed in float32 and the blocks in float64. All in
    float32, a million elements on CPU lose 5e-5 of the sum, and the loss depends on the layout; all
    in float64 takes twenty times as long. An element beyond 1e19 counts as infinite.

    Args:
        tensors: Dense tensors of any shape; may be empty.
        device: The result's device.

    Returns:
        A float64 scalar.
    """
    total = torch.zeros((), dtype=torch.float64, device=device)
    for t in tensors:
        flat = t.flatten()
        wide = torch.promote_types(t.dtype, torch.float32)
        even = len(flat) - len(flat) % FLOAT32_BLOCK
        blocks = flat[:even].view(-1, FLOAT32_BLOCK)
        norms = torch.linalg.vector_norm(blocks, dim=1, dtype=wide).double()
        rest = torch.linalg.vector_norm(flat[even:], dtype=wide).double()
        total += norms.square().sum() + rest.square()
    return total


def sum_of_squares_per_expert(x_eDF: torch.Tensor) -> torch.Tensor:
    """Returns each expert's sum of squares: (e,), float64."""
    return torch.linalg.vector_norm(x_eDF.flatten(1), dim=1, dtype=torch.float64).square()


def apply_trust_ratio(
    after_n: torch.Tensor, before_n: torch.Tensor, square_n2: torch.Tensor, lr: float
) -> None:
    """Scales n AdamW steps to the length lr x |before|, in place in `after_n`.

    This is LAMB (You et al. 2020, Algorithm 2 with phi the identity). A tensor whose norm or whose
    step is 0 keeps its step.

    Args:
        after_n: n tensors after the AdamW step, (n, ...).
        before_n: The same tensors before it.
        square_n2: Each tensor's sum of squares before the step, and its step's, (n, 2).
        lr: Learning rate.
    """
    before_norm_n, step_norm_n = square_n2.sqrt().unbind(1)
    ratio_n = torch.where(square_n2.prod(1) > 0, lr * before_norm_n / step_norm_n, 1)
    ratio_n = ratio_n.to(after_n.dtype)
    trailing = [1] * (after_n.dim() - 1)
    torch.lerp(before_n, after_n, ratio_n.view(-1, *trailing), out=after_n)
