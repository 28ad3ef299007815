"""Parameters that DeepSpeed never sees: their gradients, their float32 masters, and their updates.

  experts  Adam with beta1 = 0 and a factored second moment (Shazeer et al. 2017, Appendix D): of the running mean of g²
           only row means r and column means c are kept, and v_ij = r_i c_j / mean(r). Rows + columns numbers, not rows
           x columns. "diet" is tensor2tensor's form of it: sqrt(v)_ij = sqrt(r_i) sqrt(c_j) / mean(sqrt(c)), a smaller
           step. Stacked experts are a batch of matrices, each with a pair of its own. Or plain Adam ("adam").
  gates    of groups of experts: plain Adam
  rows     of a vocabulary's matrices: Adam on the rows that some rank touched in the step. The others are neither
           reduced nor updated, and their state waits.

A narrow parameter (bf16) is the rounded copy, for compute, of a master kept here.

Legend: e experts of this rank, D rows, F columns; V words, n of them touched.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import nn

from moe_dist.config import OptimConfig
from moe_dist.parallel.collectives import any_over, sum_over
from moe_dist.parallel.mesh import Axis

ELEMENTS_PER_CHUNK = 2**20  # an update's temporaries stay in cache


class Master:
    """A parameter, its master where it is narrower than float32, and its gradient summed over micro-batches."""

    def __init__(self, p: nn.Parameter) -> None:
        self.p = p
        wide = torch.promote_types(p.dtype, torch.float32)
        self.narrow = p.dtype != wide
        self.master = p.detach().to(wide)  # the parameter itself where it is wide enough
        self.sum: torch.Tensor | None = None  # of narrow gradients over micro-batches
        if self.narrow:
            p.register_post_accumulate_grad_hook(self._widen)

    def _widen(self, p: torch.Tensor) -> None:
        """Adds a narrow gradient to the wide sum: micro-batches do not add up in bf16."""
        assert p.grad is not None
        self.sum = p.grad.to(self.master.dtype) if self.sum is None else self.sum.add_(p.grad)
        p.grad = None

    @property
    def summed(self) -> torch.Tensor | None:
        """None where no backward came by."""
        return self.sum if self.narrow else self.p.grad

    def gradient(self) -> torch.Tensor:
        """Summed over this step's micro-batches, wide. Zeros where no backward came by."""
        if self.summed is None:
            zeros = torch.zeros_like(self.master)
            self.sum, self.p.grad = (zeros, None) if self.narrow else (None, zeros)
        assert self.summed is not None
        return self.summed

    def clear(self) -> None:
        self.p.grad = self.sum = None

    def clear_to_reuse(self) -> None:
        """As `clear`, but leaves the gradient's memory to the next one (`experts.py` takes it): on CPU the system would
        take it back, and to fill fresh pages again costs a tenth of a step of 256 experts."""
        self.p.spare = self.p.grad  # type: ignore[attr-defined]
        self.clear()

    @torch.no_grad()
    def round_master(self) -> None:
        """The parameter follows its master."""
        if self.narrow:
            self.p.copy_(self.master)


class Factored(Master):
    """A stacked expert parameter (e, D, F) and its factored second moment."""

    def __init__(self, p: nn.Parameter) -> None:
        super().__init__(p)
        self.row_eD = self.master.new_zeros(p.shape[:2])
        self.column_eF = self.master.new_zeros((p.shape[0], p.shape[2]))
        self.row_square_eD = self.row_eD  # of this step's gradient

    def square(self) -> torch.Tensor:
        """Of the gradient (float64 scalar). The row sums that it is made of serve the update as well."""
        self.row_square_eD = row_squares_of(self.gradient())
        return self.row_square_eD.double().sum()

    def update(self, scale: float, lr: float, step: int, config: OptimConfig) -> None:
        """One step with gradient `scale` x the sum, after `square`."""
        per_chunk = max(1, ELEMENTS_PER_CHUNK // self.p[0].numel())
        whole = (self.master, self.gradient(), self.row_square_eD, self.row_eD, self.column_eF)
        for w, g, square, row, column in zip(*(t.split(per_chunk) for t in whole), strict=True):
            factored_update(w, g, square, row, column, scale, lr, step, config)
        self.round_master()

    def tensors(self, step: int) -> dict[str, torch.Tensor]:
        """Master and state, by the ending of their names."""
        return {"": self.master, ".row": self.row_eD, ".column": self.column_eF}


class Adam(Master):
    """A stacked parameter under torch's fused Adam."""

    def __init__(self, p: nn.Parameter) -> None:
        super().__init__(p)
        self.adam = torch.optim.Adam([self.master], fused=True)

    def square(self) -> torch.Tensor:
        """Of the gradient (float64 scalar)."""
        return square_of([self.gradient()], self.p.device)

    def update(self, scale: float, lr: float, step: int, config: OptimConfig) -> None:
        """One step with gradient `scale` x the sum."""
        self.adam.param_groups[0] |= {"lr": lr, "betas": (config.beta1, config.beta2), "eps": config.eps}
        self.master.grad = self.gradient().mul_(scale)
        self.adam.step()
        self.master.grad = None
        self.round_master()

    def tensors(self, step: int) -> dict[str, torch.Tensor]:
        """Master and moments by the ending of their names; the moments are made where there are none yet, after
        `step` steps."""
        state = self.adam.state[self.master]
        if not state:  # as torch makes it
            state |= {m: torch.zeros_like(self.master) for m in ("exp_avg", "exp_avg_sq")}
            state["step"] = torch.tensor(float(step), device=self.p.device)
        return {"": self.master, ".exp_avg": state["exp_avg"], ".exp_avg_sq": state["exp_avg_sq"]}


class Rows:
    """Matrices (V, D) and vectors (V,) of one module whose backward touches the same rows of each (sparse gradients).

    Every row is under an Adam of its own, which counts the steps that touched it.
    """

    def __init__(self, name: str, named: dict[str, nn.Parameter], axis: Axis) -> None:
        """`name`: of the module; `axis`: the ranks that touch rows of their own."""
        self.name, self.axis, self.label = name, axis, (name, "rows")
        self.named = {name: Master(p) for name, p in named.items()}
        masters = {name: m.master for name, m in self.named.items()}
        self.exp_avg = {name: _untouched_zeros(t) for name, t in masters.items()}
        self.exp_avg_sq = {name: _untouched_zeros(t) for name, t in masters.items()}
        first = next(iter(masters.values()))
        self.updates_V = first.new_zeros(len(first), dtype=torch.int32)
        self.touched_n = self.updates_V.new_zeros(0, dtype=torch.int64)  # of this step, on any rank, ascending
        self.gradients: dict[str, torch.Tensor] = {}  # of those rows

    def clear(self) -> None:
        for master in self.named.values():
            master.clear()

    def reduce(self) -> None:
        """Sums the rows touched on any rank over all ranks: a byte per word, then those rows alone."""
        touched_V = torch.zeros_like(self.updates_V, dtype=torch.uint8)
        mine = {name: m.summed.coalesce() for name, m in self.named.items() if m.summed is not None}
        for sparse in mine.values():
            touched_V[sparse.indices()[0]] = 1
        self.touched_n = any_over(touched_V, self.axis, self.label).nonzero().squeeze(1)
        for name, master in self.named.items():
            rows = master.master.new_zeros(len(self.touched_n), *master.master.shape[1:])
            if name in mine:
                rows[torch.searchsorted(self.touched_n, mine[name].indices()[0])] = mine[name].values()
            self.gradients[name] = sum_over(rows, self.axis, self.label)
            master.clear()

    def square(self) -> torch.Tensor:
        """Of the gradient (float64 scalar), after `reduce`; the same on every rank."""
        return square_of(self.gradients.values(), self.updates_V.device)

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
            named |= {f"{name}.exp_avg": self.exp_avg[name], f"{name}.exp_avg_sq": self.exp_avg_sq[name]}
        return named


def _untouched_zeros(like: torch.Tensor) -> torch.Tensor:
    """On CPU they take memory only where they are written to: numpy leaves it to the system (calloc), torch writes
    zeros. Moments of rows that never come up are twice a large vocabulary."""
    if like.device.type != "cpu":
        return torch.zeros_like(like)
    return torch.from_numpy(np.zeros(like.shape, dtype=str(like.dtype).removeprefix("torch.")))


def square_of(tensors: Iterable[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Sum of squares, added up in float64: in float32 a million elements on CPU lose 5e-5 of it, and more or less of it
    on another layout."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    for t in tensors:
        for chunk in t.flatten().split(ELEMENTS_PER_CHUNK):
            total += torch.linalg.vector_norm(chunk, dtype=torch.float64).square()
    return total


def row_squares_of(g_eDF: torch.Tensor) -> torch.Tensor:
    """Sums of squares of each row (e, D): the norm and the row means are both made of them."""
    return torch.linalg.vector_norm(g_eDF, dim=2).square_()  # rows are short: float32 will do


def factored_update(
    w_eDF: torch.Tensor, g_eDF: torch.Tensor, row_square_eD: torch.Tensor,
    row_eD: torch.Tensor, column_eF: torch.Tensor, scale: float, lr: float, step: int, config: OptimConfig,
) -> None:  # fmt: skip
    """In place: weights, row means and column means of g² after one step of Adam with beta1 = 0 (Appendix D).

    w -= lr g / (sqrt(v) + eps) with v from bias-corrected means. Rows and columns without any gradient give v = 0 and
    g = 0: no update, not NaN.
    """
    beta, correction = config.expert_beta2, 1 - config.expert_beta2**step
    rows, columns = g_eDF.shape[1:]
    row_eD.lerp_(row_square_eD * (scale**2 / columns), 1 - beta)
    column_eF.lerp_(torch.linalg.vector_norm(g_eDF, dim=1).square_().mul_(scale**2 / rows), 1 - beta)
    r_eD, c_eF = row_eD / correction, column_eF / correction
    if config.expert_form == "paper":  # sqrt(r c / mean(r)), the root of each factor
        left_eD = (r_eD / _or_one(r_eD.mean(1, keepdim=True))).sqrt_()
        right_eF = c_eF.sqrt_()
    else:  # tensor2tensor, diet.py: roots, then the mean
        left_eD, right_eF = r_eD.sqrt_(), c_eF.sqrt_()
        right_eF = right_eF / _or_one(right_eF.mean(1, keepdim=True))
    root_eDF = left_eD[:, :, None] * right_eF[:, None, :]
    w_eDF.addcdiv_(g_eDF, root_eDF.add_(config.eps), value=-lr * scale)


def _or_one(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x > 0, x, 1)
