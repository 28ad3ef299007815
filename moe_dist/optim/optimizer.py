"""One optimizer for what DeepSpeed shards and for what it never sees.

DeepSpeed hands over the dense parameters (whole at ZeRO 0, this rank's flat float32 partition at 1 to 3) with gradients
averaged over all ranks. Gradients of experts and gates of groups are summed over the ranks that hold the same ones,
those of rows over all ranks; both are divided by the number of all ranks, as if there were one rank. Then: one norm
over everything, one clip factor, one update: AdamW (torch's fused one, the base class) for the dense parameters, and
what `outside.py` says for the others. With `trust_ratio` the step of a matrix is scaled to lr x its norm, which makes
LAMB of AdamW (You et al. 2020), on any layout: libraries' own LAMB needs whole matrices, which ZeRO does not have.

Weight decay and trust ratio are of matrices alone, as in the LAMB authors' code: vectors (biases, the
gains of LayerNorms) are left out. A gain is kept as its offset from 1, so that decay would pull all of
them to the same 1, and the divergence of norms that is logged (`transformer.norm_divergence`) to 0.
ZeRO gives the base class flat partitions of many parameters, so the decay is not its own but is taken
here, from each matrix's part of them.

Where the clip factor comes from the norm of the step before (`clip_by`), or there is none, experts need not wait: with
`free_gradients` each stack of them is updated within backward, when its gradient is whole, which is then freed.
"""

import inspect
import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from moe_dist.config.messages import nearest
from moe_dist.config.schema import OptimConfig
from moe_dist.distributed.collectives import all_reduce_sum
from moe_dist.distributed.mesh import Mesh
from moe_dist.optim.expert_state import (
    AdamParam,
    FactoredAdamParam,
    ShardedExpertParam,
    apply_trust_ratio,
    sum_of_squares,
)
from moe_dist.optim.row_sparse_adam import RowSparseAdam

EXPERT_OPTIMIZERS: dict[str, type[AdamParam] | type[FactoredAdamParam]] = {
    "factored_adam": FactoredAdamParam,
    "factored_adam_t2t": FactoredAdamParam,
    "adam": AdamParam,
}


class Optimizer(torch.optim.AdamW):
    """See the head of this file. The base class's `param_groups` are the dense parameters, which DeepSpeed replaces.

    Methods of torch's optimizers are wrapped for torch.compile, and a wrapper imports the compiler when it is called: a
    CPU second of each rank's start. The methods that are used here are the wrapped ones themselves (torch 2.13;
    test_startup.py), which do the same where nothing is compiled.
    """

    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.AdamW.zero_grad)

    def __init__(
        self,
        dense: Iterable[nn.Parameter],
        experts: dict[str, nn.Parameter],
        gates: dict[str, nn.Parameter],
        rows: dict[str, dict[str, nn.Parameter]],
        config: OptimConfig,
        mesh: Mesh,
        zero_stage: int,
    ) -> None:
        """`rows`: by module. `zero`: the engine's ZeRO stage. Raises ValueError for an unknown `expert_form`."""
        if config.expert_optimizer not in EXPERT_OPTIMIZERS:
            raise ValueError(
                f"optim.expert_optimizer={config.expert_optimizer!r}; {nearest(config.expert_optimizer, EXPERT_OPTIMIZERS)}"
            )
        betas = (config.beta1, config.beta2)
        super().__init__(
            dense, lr=config.lr, betas=betas, eps=config.eps, weight_decay=0.0, fused=True
        )
        self.experts = {
            name: EXPERT_OPTIMIZERS[config.expert_optimizer](p, mesh.expert_dp)
            for name, p in experts.items()
        }
        self.gates = {name: AdamParam(p, mesh.expert_dp) for name, p in gates.items()}
        self.row_tables = {
            name: RowSparseAdam(name, named, mesh.dp) for name, named in rows.items()
        }
        self.config, self.mesh, self.zero_stage = config, mesh, zero_stage
        self.updates = 0  # steps that were not skipped
        self.norm = (
            math.nan
        )  # of the last step, before clipping; not a number where DeepSpeed refused to step
        self.previous_norm = 0.0  # of the last step that was not skipped; part of a checkpoint
        self.step_started = False
        self.local_matrix_shards: Callable[
            [], list[torch.Tensor]
        ]  # of the dense matrices' masters, what this rank updates; in place
        self.squares: dict[
            ShardedExpertParam, torch.Tensor
        ] = {}  # of this step's gradients, so far
        for state in self.experts.values() if config.fuse_expert_update_in_backward else ():
            state.register_grad_ready_hook(partial(self._update_and_free, state))

    @property
    def expert_params(self) -> list[ShardedExpertParam]:
        return [*self.experts.values(), *self.gates.values()]

    def round_masters(self) -> None:
        """After masters have been loaded: narrow parameters follow them."""
        of_rows = [master for table in self.row_tables.values() for master in table.named.values()]
        for master in (*self.expert_params, *of_rows):
            master.round_master()

    def start_step(self, lr: float) -> None:
        """To be called before the first backward of a step that is to use `lr`."""
        self.param_groups[0]["lr"] = lr
        self.norm, self.step_started = math.nan, True
        self.squares.clear()
        for state in self.expert_params:
            state.clear()
        for table in self.row_tables.values():
            table.clear()

    def _reduce_and_square(self, state: ShardedExpertParam) -> None:
        """The gradient, and its part of the norm."""
        state.reduce()
        self.squares[state] = state.square()

    def _clip_coefficient(self, norm: float) -> float:
        """That all gradients are multiplied by."""
        clip = self.config.max_grad_norm
        return 1.0 if clip is None or norm <= clip else clip / norm

    def _update(self, state: ShardedExpertParam, factor: float) -> None:
        state.update(
            factor / self.mesh.dp.size, self.param_groups[0]["lr"], self.updates + 1, self.config
        )

    @torch.no_grad()
    def _update_and_free(self, state: ShardedExpertParam) -> None:
        assert self.step_started and state not in self.squares, (
            "a second gradient of experts that have been updated"
        )
        with self.mesh.step_timer.range("optimizer"):
            self._reduce_and_square(state)
            self._update(state, self._clip_coefficient(self.previous_norm))
            state.clear()

    def _apply_trust_ratios(self, parts: list[torch.Tensor], before: list[torch.Tensor]) -> None:
        """Scales the steps of the dense matrices by LAMB's ratios. This rank has a part of each matrix (none: an empty
        one), or at stage 0 the whole."""
        device = self.mesh.device
        squares = [
            [sum_of_squares([x], device) for x in (old, new - old)]
            for old, new in zip(before, parts, strict=True)
        ]
        square_p2 = torch.stack([torch.stack(pair) for pair in squares])
        if self.zero_stage > 0:
            all_reduce_sum(square_p2, self.mesh.dp)
        for new, old, square_2 in zip(parts, before, square_p2, strict=True):
            apply_trust_ratio(new[None], old[None], square_2[None], self.param_groups[0]["lr"])

    def check_not_skipped(self) -> None:
        """Raises FloatingPointError after a step that was skipped where its experts were not."""
        if self.config.fuse_expert_update_in_backward and not math.isfinite(self.norm):
            raise FloatingPointError(
                f"after {self.updates} updates the gradient is not finite, and with optim.fuse_expert_update_in_backward experts have "
                f"been updated by it; --resume goes on from the last checkpoint, and a lower optim.lr may help"
            )

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update at `param_groups[0]["lr"]`. Where the norm is not finite nothing changes and `norm` says so."""
        if (
            not self.step_started
        ):  # DeepSpeed's bf16 optimizer of stage 0 takes a step on zeros when it is made
            return
        self.step_started = False
        self.mesh.flight_recorder.enter_phase("step")
        (group,) = self.param_groups  # a norm needs every gradient at once
        gradients = [p.grad for p in group["params"] if p.grad is not None]
        rows, waiting = (
            list(self.row_tables.values()),
            [state for state in self.expert_params if state not in self.squares],
        )
        for state in waiting:
            self._reduce_and_square(state)
        for table in rows:
            table.reduce()
        dense_square = sum_of_squares(gradients, self.mesh.device)
        if self.zero_stage > 0:  # partitions; at stage 0 every rank holds the whole gradient
            all_reduce_sum(dense_square, self.mesh.dp)
        zero = torch.zeros_like(dense_square)
        outside_square = all_reduce_sum(
            sum((self.squares[state] for state in self.expert_params), zero), self.mesh.dp
        )
        outside_square = sum((table.square() for table in rows), outside_square)
        world = self.mesh.dp.size
        self.norm = math.sqrt((dense_square + outside_square / world**2).item())
        if not math.isfinite(self.norm):
            return
        factor = self._clip_coefficient(
            self.norm if self.config.clip_norm_source == "step" else self.previous_norm
        )
        if gradients:
            torch._foreach_mul_(gradients, factor)
        parts = self.local_matrix_shards() if self.config.weight_decay or self.config.lamb else []
        before = [part.clone() for part in parts] if self.config.lamb else []
        if (
            parts and self.config.weight_decay
        ):  # AdamW's decoupled decay (Loshchilov and Hutter 2019, Algorithm 2)
            torch._foreach_mul_(parts, 1 - group["lr"] * self.config.weight_decay)
        inspect.unwrap(torch.optim.AdamW.step)(self)
        if before:
            self._apply_trust_ratios(parts, before)
        for state in waiting:
            self._update(state, factor)
        for table in rows:
            table.update(factor / world, group["lr"], self.config)
        self.updates += 1
        self.previous_norm = self.norm
