"""One optimizer for what DeepSpeed shards and for what it never sees.

DeepSpeed hands over the dense parameters (whole at ZeRO 0, this rank's flat float32 partition at 1 to 3) with gradients
averaged over all ranks. Gradients of experts and gates of groups are summed over the ranks that hold the same ones,
those of rows over all ranks; both are divided by the number of all ranks, as if there were one rank. Then: one norm
over everything, one clip factor, one update: Adam (torch's fused one, the base class) for the dense parameters, and
what `outside.py` says for the others.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from moe_dist.config import OptimConfig, nearest
from moe_dist.outside import Adam, Factored, Rows, square_of
from moe_dist.parallel.collectives import sum_over
from moe_dist.parallel.mesh import Mesh

FORMS: dict[str, type[Adam] | type[Factored]] = {"paper": Factored, "diet": Factored, "adam": Adam}


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
        rows: dict[str, dict[str, nn.Parameter]],
        config: OptimConfig,
        mesh: Mesh,
        zero: int,
    ) -> None:
        """`rows`: by module. `zero`: the engine's ZeRO stage. Raises ValueError for an unknown `expert_form`."""
        if config.expert_form not in FORMS:
            raise ValueError(f"optim.expert_form={config.expert_form!r}; {nearest(config.expert_form, FORMS)}")
        super().__init__(dense, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)
        self.experts = {name: FORMS[config.expert_form](p) for name, p in experts.items()}
        self.gates = {name: Adam(p) for name, p in gates.items()}
        self.rows = {name: Rows(name, named, mesh.dp) for name, named in rows.items()}
        self.config, self.mesh, self.zero = config, mesh, zero
        self.updates = 0  # steps that were not skipped
        self.norm = math.nan  # of the last step, before clipping; not a number where DeepSpeed refused to step
        self.begun = False

    def round_masters(self) -> None:
        """After masters have been loaded: narrow parameters follow them."""
        of_rows = [master for table in self.rows.values() for master in table.named.values()]
        for master in (*self.experts.values(), *self.gates.values(), *of_rows):
            master.round_master()

    def begin(self, lr: float) -> None:
        """To be called before the first backward of a step that is to use `lr`."""
        self.param_groups[0]["lr"] = lr
        self.norm, self.begun = math.nan, True
        for state in (*self.experts.values(), *self.gates.values()):
            state.clear_to_reuse()
        for table in self.rows.values():
            table.clear()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update at `param_groups[0]["lr"]`. Where the norm is not finite nothing changes and `norm` says so."""
        if not self.begun:  # DeepSpeed's bf16 optimizer of stage 0 takes a step on zeros when it is made
            return
        self.begun = False
        (group,) = self.param_groups  # a norm needs every gradient at once
        gradients = [p.grad for p in group["params"] if p.grad is not None]
        spread, rows = [*self.experts.values(), *self.gates.values()], list(self.rows.values())
        for state in spread:
            sum_over(state.gradient(), self.mesh.edp)
        for table in rows:
            table.reduce()
        dense_square = square_of(gradients, self.mesh.device)
        if self.zero > 0:  # partitions; at stage 0 every rank holds the whole gradient
            sum_over(dense_square, self.mesh.dp)
        zero = torch.zeros_like(dense_square)
        outside_square = sum_over(sum((state.square() for state in spread), zero), self.mesh.ep)
        outside_square = sum((table.square() for table in rows), outside_square)
        world = self.mesh.dp.size
        self.norm = math.sqrt((dense_square + outside_square / world**2).item())
        if not math.isfinite(self.norm):
            return
        clip, lr = self.config.clip_norm, group["lr"]
        factor = 1.0 if clip is None or self.norm <= clip else clip / self.norm
        if gradients:
            torch._foreach_mul_(gradients, factor)
        super().step()
        self.updates += 1
        for state in spread:
            state.update(factor / world, lr, self.updates, self.config)
        for table in rows:
            table.update(factor / world, lr, self.config)
