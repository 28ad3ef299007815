"""One optimizer for what DeepSpeed shards and for what it never sees.

DeepSpeed hands over the dense parameters (whole at ZeRO 0, this rank's flat float32 partition at 1 to 3) with gradients
averaged over all ranks. Expert gradients are summed over the ranks that hold the same experts and divided by the
number of all ranks, as if there were one rank. Then: one norm over everything, one clip factor, one update:

  dense    Adam (torch's fused one, the base class)
  gates    of groups of experts: the same Adam, on the rank of the group
  experts  Adam with beta1 = 0 and a factored second moment (Shazeer et al. 2017, Appendix D): of the running mean of g²
           only row means r and column means c are kept, and v_ij = r_i c_j / mean(r). Rows + columns numbers, not rows
           x columns. "diet" is tensor2tensor's form of it: sqrt(v)_ij = sqrt(r_i) sqrt(c_j) / mean(sqrt(c)), a smaller
           step. Stacked experts are a batch of matrices, each with a pair of its own.

With bf16 experts the float32 master is kept here and the parameter is its rounded copy, for compute.

Legend: e experts of this rank, D rows, F columns.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from moe_dist.config import OptimConfig, nearest
from moe_dist.parallel.collectives import sum_over
from moe_dist.parallel.mesh import Mesh

FORMS = ("paper", "diet")
ELEMENTS_PER_CHUNK = 2**20  # an update's temporaries stay in cache


def learning_rate(config: OptimConfig, step: int) -> float:
    """Of optimizer step `step` (from 1): linear warm-up, then falling with 1/sqrt(step) (Appendix C.1)."""
    warmup = max(1, config.warmup_steps)
    return config.lr * min(step / warmup, (warmup / step) ** 0.5)


class Optimizer(torch.optim.Adam):
    """See the head of this file. The base class's `param_groups` are the dense parameters, which DeepSpeed replaces."""

    def __init__(
        self,
        dense: Iterable[nn.Parameter],
        experts: dict[str, nn.Parameter],
        gates: dict[str, nn.Parameter],
        config: OptimConfig,
        mesh: Mesh,
        zero: int,
    ) -> None:
        """`zero`: the engine's ZeRO stage. Raises ValueError for an unknown `expert_form`."""
        if config.expert_form not in FORMS:
            raise ValueError(f"optim.expert_form={config.expert_form!r}; {nearest(config.expert_form, FORMS)}")
        super().__init__(dense, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)
        self.experts = {name: ExpertState(p) for name, p in experts.items()}
        self.gates = GateState(gates, config)
        self.config, self.mesh, self.zero = config, mesh, zero
        self.updates = 0  # steps that were not skipped
        self.norm = math.nan  # of the last step, before clipping; not a number where DeepSpeed refused to step
        self.begun = False

    def begin(self, lr: float) -> None:
        """To be called before the first backward of a step that is to use `lr`."""
        self.param_groups[0]["lr"] = lr
        self.norm, self.begun = math.nan, True
        self.gates.clear()
        for state in self.experts.values():
            state.clear()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update at `param_groups[0]["lr"]`. Where the norm is not finite nothing changes and `norm` says so."""
        if not self.begun:  # DeepSpeed's bf16 optimizer of stage 0 takes a step on zeros when it is made
            return
        self.begun = False
        (group,) = self.param_groups  # a norm needs every gradient at once
        gradients = [p.grad for p in group["params"] if p.grad is not None]
        states = list(self.experts.values())
        gate_gradients = self.gates.gradients()
        for gradient in (*(state.gradient() for state in states), *gate_gradients):
            sum_over(gradient, self.mesh.edp)
        world = self.mesh.dp.size
        dense_square = _square(gradients, self.mesh.device)
        if self.zero > 0:  # partitions; at stage 0 every rank holds the whole gradient
            sum_over(dense_square, self.mesh.dp)
        row_squares = [row_squares_of(state.gradient()) for state in states]
        expert_square = _square(gate_gradients, self.mesh.device) + sum(r.double().sum() for r in row_squares)
        sum_over(expert_square, self.mesh.ep).div_(world**2)
        self.norm = math.sqrt((dense_square + expert_square).item())
        if not math.isfinite(self.norm):
            return
        clip = self.config.clip_norm
        factor = 1.0 if clip is None or self.norm <= clip else clip / self.norm
        if gradients:
            torch._foreach_mul_(gradients, factor)
        super().step()
        self.updates += 1
        for state, row_square_eD in zip(states, row_squares, strict=True):
            state.update(row_square_eD, factor / world, group["lr"], self.updates, self.config)
        self.gates.update(factor / world, group["lr"])


def _square(tensors: list[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Sum of squares, added up in float64: in float32 a million elements on CPU lose 5e-5 of it, and more or less of it
    on another layout."""
    total = torch.zeros((), dtype=torch.float64, device=device)
    for t in tensors:
        for chunk in t.flatten().split(ELEMENTS_PER_CHUNK):
            total += torch.linalg.vector_norm(chunk, dtype=torch.float64).square()
    return total


class GateState:
    """The gates inside groups of experts (float32 always), under torch's Adam."""

    def __init__(self, gates: dict[str, nn.Parameter], config: OptimConfig) -> None:
        self.named = gates
        options: dict[str, Any] = {"betas": (config.beta1, config.beta2), "eps": config.eps, "fused": True}
        self.adam = torch.optim.Adam(list(gates.values()), **options) if gates else None

    def gradients(self) -> list[torch.Tensor]:
        """Summed over this step's micro-batches. Zeros where no backward came by."""
        for p in self.named.values():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        return [p.grad for p in self.named.values() if p.grad is not None]

    def clear(self) -> None:
        for p in self.named.values():
            p.grad = None

    def update(self, scale: float, lr: float) -> None:
        """One step with gradient `scale` x the sum."""
        if self.adam:
            torch._foreach_mul_(self.gradients(), scale)
            self.adam.param_groups[0]["lr"] = lr
            self.adam.step()

    def tensors(self, step: int) -> dict[str, torch.Tensor]:
        """Parameters and moments by name, the moments made where there are none yet, after `step` steps."""
        named: dict[str, torch.Tensor] = {}
        for name, p in self.named.items():
            assert self.adam is not None
            state = self.adam.state[p]
            if not state:
                state |= {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
                state["step"] = torch.tensor(float(step), device=p.device)
            named |= {name: p.detach(), f"{name}.exp_avg": state["exp_avg"], f"{name}.exp_avg_sq": state["exp_avg_sq"]}
        return named


class ExpertState:
    """A stacked expert parameter (e, D, F), its float32 master where it is narrower, and its factored second moment."""

    def __init__(self, p: nn.Parameter) -> None:
        self.p = p
        wide = torch.promote_types(p.dtype, torch.float32)
        self.narrow = p.dtype != wide
        self.master_eDF = p.detach().to(wide)  # the parameter itself where it is wide enough
        self.row_eD = p.new_zeros(p.shape[:2], dtype=wide)
        self.column_eF = p.new_zeros((p.shape[0], p.shape[2]), dtype=wide)
        self.sum_eDF: torch.Tensor | None = None  # of narrow gradients over micro-batches
        if self.narrow:
            p.register_post_accumulate_grad_hook(self._widen)

    def _widen(self, p: torch.Tensor) -> None:
        """Adds a narrow gradient to the wide sum: micro-batches do not add up in bf16."""
        assert p.grad is not None
        self.sum_eDF = p.grad.to(self.master_eDF.dtype) if self.sum_eDF is None else self.sum_eDF.add_(p.grad)
        p.grad = None

    def gradient(self) -> torch.Tensor:
        """Summed over this step's micro-batches, wide. Zeros where no backward came by."""
        if self.narrow:
            if self.sum_eDF is None:
                self.sum_eDF = torch.zeros_like(self.master_eDF)
            return self.sum_eDF
        if self.p.grad is None:
            self.p.grad = torch.zeros_like(self.p)
        return self.p.grad

    def clear(self) -> None:
        self.p.grad = self.sum_eDF = None

    def update(self, row_square_eD: torch.Tensor, scale: float, lr: float, step: int, config: OptimConfig) -> None:
        """One step with gradient `scale` x the sum, of which `row_square_eD` are the row sums of squares."""
        per_chunk = max(1, ELEMENTS_PER_CHUNK // self.p[0].numel())
        whole = (self.master_eDF, self.gradient(), row_square_eD, self.row_eD, self.column_eF)
        for w, g, square, row, column in zip(*(t.split(per_chunk) for t in whole), strict=True):
            factored_update(w, g, square, row, column, scale, lr, step, config)
        self.round_master()

    @torch.no_grad()
    def round_master(self) -> None:
        """The parameter follows its master."""
        if self.narrow:
            self.p.copy_(self.master_eDF)


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
