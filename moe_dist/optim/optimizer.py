"""One optimizer for the parameters that DeepSpeed shards and the parameters outside it.

DeepSpeed passes the dense parameters (whole at ZeRO 0, this rank's flat float32 partition at 1 to
3) with gradients averaged over all ranks. A layer's own gate is a dense parameter; the gates inside
expert groups are stacks, as experts are. A stack's gradients are summed over the ranks that hold
the same stack, row gradients over all ranks; both are divided by the number of all ranks, as if
there were one rank. `Optimizer.step` documents the order.

Dense parameters use AdamW (torch's fused one, the base class); experts and group gates use
`expert_state`, vocabulary rows `row_sparse_adam`. With `optim.lamb` each matrix's step is scaled to
lr x its norm, which turns AdamW into LAMB (You et al. 2020) on any layout. Other LAMB
implementations need whole matrices, and ZeRO has only parts.

Weight decay and trust ratio apply to matrices alone, as in the LAMB authors' code, not to vectors
(biases, LayerNorm gains). A gain is stored as its offset from 1, so decay would pull all gains to
the same 1, and the logged divergence of norms (`transformer.norm_divergence`) to 0. ZeRO gives the
base class flat partitions that mix many parameters, so its weight decay is 0 and the decay is
applied here, to each matrix's part.

If the clip coefficient comes from the previous step's norm (`optim.clip_norm_source=previous`), or
there is no clipping, an expert update does not depend on other gradients. With
`optim.fuse_expert_update_in_backward` each stack is then updated within backward, as soon as its
gradient is complete, and the gradient is freed.
"""

import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
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
    Statistics,
    apply_trust_ratio,
    sum_of_squares,
)
from moe_dist.optim.row_sparse_adam import RowGradients, RowSparseAdam

EXPERT_OPTIMIZERS: dict[str, type[AdamParam] | type[FactoredAdamParam]] = {
    "factored_adam": FactoredAdamParam,
    "factored_adam_t2t": FactoredAdamParam,
    "adam": AdamParam,
}


@dataclass(frozen=True)
class ReducedGradient:
    """A stack's gradient after the sum over its replicas, ready for the update.

    Attributes:
        owned: The gradient for the part that this rank owns.
        square: Its sum of squares, float64 scalar.
        statistics: Tensors that `square` computed and `update` reuses.
    """

    owned: torch.Tensor
    square: torch.Tensor
    statistics: Statistics


class Optimizer(torch.optim.AdamW):
    """AdamW for dense parameters, combined with the optimizers for experts, gates and rows.

    The base class's `param_groups` are the dense parameters; DeepSpeed replaces them.

    FENCE: torch wraps the methods of its optimizers for torch.compile, and a wrapper imports the
    compiler when it is called, which costs each rank a CPU second at start. The methods used here
    are the unwrapped ones, which do the same if nothing is compiled. Tried with torch 2.13; held by
    test_startup.py.

    Attributes:
        experts: Expert stacks by parameter name.
        group_gates: Stacks with group gates by parameter name.
        row_tables: Row-sparse vocabulary matrices by module name.
        updates: Steps so far that were not skipped.
        norm: The last step's gradient norm before clipping; NaN if DeepSpeed skipped the step.
        previous_norm: The norm in the last step that was not skipped; part of a checkpoint.
        step_started: True between `start_step` and `step`.
        local_matrix_shards: Returns, for each dense matrix, a view into its master, the part that
            this rank updates. Set by the engine.
        squares: Sum of squares for each gradient that was reduced in this step so far.
    """

    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)
    zero_grad = inspect.unwrap(torch.optim.AdamW.zero_grad)

    local_matrix_shards: Callable[[], list[torch.Tensor]]

    def __init__(
        self,
        dense: Iterable[nn.Parameter],
        experts: dict[str, nn.Parameter],
        group_gates: dict[str, nn.Parameter],
        rows: dict[str, dict[str, nn.Parameter]],
        config: OptimConfig,
        mesh: Mesh,
        zero_stage: int,
    ) -> None:
        """Creates all parameters' state.

        Args:
            dense: The parameters that DeepSpeed shards.
            experts: This rank's stacked expert parameters, by name.
            group_gates: Stacked gates for expert groups, by name.
            rows: Row-sparse parameters by module name, then by parameter name.
            config: The config's section `optim`.
            mesh: The ranks.
            zero_stage: The engine's ZeRO stage.

        Raises:
            ValueError: `optim.expert_optimizer` is unknown.
        """
        if config.expert_optimizer not in EXPERT_OPTIMIZERS:
            raise ValueError(
                f"optim.expert_optimizer={config.expert_optimizer!r}; "
                f"{nearest(config.expert_optimizer, EXPERT_OPTIMIZERS)}"
            )
        super().__init__(
            dense,
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            weight_decay=0.0,
            fused=True,
        )
        expert_class = EXPERT_OPTIMIZERS[config.expert_optimizer]
        self.experts = {name: expert_class(p, mesh.expert_dp) for name, p in experts.items()}
        self.group_gates = {name: AdamParam(p, mesh.expert_dp) for name, p in group_gates.items()}
        self.row_tables: dict[str, RowSparseAdam] = {}
        for name, named in rows.items():
            self.row_tables[name] = RowSparseAdam(name, named, mesh.dp)
        self.config = config
        self.mesh = mesh
        self.zero_stage = zero_stage
        self.updates = 0
        self.norm = math.nan
        self.previous_norm = 0.0
        self.step_started = False
        self.squares: dict[ShardedExpertParam, torch.Tensor] = {}
        if config.fuse_expert_update_in_backward:
            for state in self.experts.values():
                state.register_grad_ready_hook(partial(self._update_in_backward, state))

    @property
    def expert_params(self) -> list[ShardedExpertParam]:
        """All stacks: experts, then gates."""
        return [*self.experts.values(), *self.group_gates.values()]

    @property
    def lr(self) -> float:
        """This step's learning rate."""
        return self.param_groups[0]["lr"]

    def round_masters(self) -> None:
        """Copies all masters to narrow parameters, after masters were loaded. A collective."""
        for state in self.expert_params:
            state.round_master()
        for table in self.row_tables.values():
            for param in table.named.values():
                param.round_master()

    def start_step(self, lr: float) -> None:
        """Starts a step; to be called before its first backward.

        Args:
            lr: The step's learning rate.
        """
        self.param_groups[0]["lr"] = lr
        self.norm = math.nan
        self.step_started = True
        self.squares.clear()
        for state in self.expert_params:
            state.clear()
        for table in self.row_tables.values():
            table.clear()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Updates every parameter once. A collective.

        The order, which is the same on every rank:

          1. reduce   expert and gate gradients to their owners, row gradients to all ranks
          2. norm     one norm over all gradients: dense, experts, gates, rows
          3. clip     one coefficient for all gradients
          4. update   dense parameters; experts and gates, whose owners broadcast; rows

        An expert stack updated in backward (`_update_in_backward`) has gone through 1, 3 and 4 for
        itself and only counts in the norm. If the norm is not finite, nothing else changes and
        `norm` contains it.
        """
        if not self.step_started:
            # DeepSpeed's bf16 optimizer at stage 0 steps on zeros in its constructor
            return
        self.step_started = False
        self.mesh.flight_recorder.enter_phase("step")
        (group,) = self.param_groups  # more groups would be stepped apart, without a common norm
        dense_gradients = [p.grad for p in group["params"] if p.grad is not None]
        tables = list(self.row_tables.values())

        reduced: dict[ShardedExpertParam, ReducedGradient] = {}
        for state in self.expert_params:
            if state not in self.squares:
                reduced[state] = self._reduce_and_square(state)
        row_gradients = [table.reduce() for table in tables]

        self.norm = self._global_norm(dense_gradients, row_gradients)
        if not math.isfinite(self.norm):
            return

        clip_by_this_step = self.config.clip_norm_source == "step"
        clip_coef = self._clip_coefficient(self.norm if clip_by_this_step else self.previous_norm)

        self._update_dense(dense_gradients, clip_coef)
        for state, gradient in reduced.items():
            self._update(state, gradient, clip_coef)
        for table, row_gradient in zip(tables, row_gradients, strict=True):
            table.update(row_gradient, clip_coef / self.mesh.dp.size, self.lr, self.config)
        self.updates += 1
        self.previous_norm = self.norm

    @torch.no_grad()
    def _update_in_backward(self, state: ShardedExpertParam) -> None:
        """Reduces, clips and updates one stack as `step` does, then frees its gradient."""
        assert self.step_started and state not in self.squares, (
            "a second gradient of experts that have been updated"
        )
        with self.mesh.step_timer.range("optimizer"):
            gradient = self._reduce_and_square(state)
            self._update(state, gradient, self._clip_coefficient(self.previous_norm))
            state.clear()

    def _reduce_and_square(self, state: ShardedExpertParam) -> ReducedGradient:
        """Sums a stack's gradient on its owners and records its part of the norm."""
        owned = state.reduce()
        square, statistics = state.square(owned)
        self.squares[state] = square
        return ReducedGradient(owned, square, statistics)

    def _global_norm(
        self, dense_gradients: list[torch.Tensor], row_gradients: list[RowGradients]
    ) -> float:
        """Returns the norm over all gradients, the same on every rank. A collective."""
        dense_square = sum_of_squares(dense_gradients, self.mesh.device)
        if self.zero_stage > 0:  # partitions; at stage 0 every rank holds the whole gradient
            all_reduce_sum(dense_square, self.mesh.dp)
        sum_square = torch.zeros_like(dense_square)  # of gradients not yet divided by the ranks
        for state in self.expert_params:
            sum_square = sum_square + self.squares[state]
        sum_square = all_reduce_sum(sum_square, self.mesh.dp)
        for table, row_gradient in zip(self.row_tables.values(), row_gradients, strict=True):
            sum_square = sum_square + table.square(row_gradient)
        return math.sqrt((dense_square + sum_square / self.mesh.dp.size**2).item())

    def _clip_coefficient(self, norm: float) -> float:
        """Returns the factor for all gradients: min(1, max_grad_norm / norm)."""
        max_norm = self.config.max_grad_norm
        return 1.0 if max_norm is None or norm <= max_norm else max_norm / norm

    def _update(
        self, state: ShardedExpertParam, gradient: ReducedGradient, clip_coef: float
    ) -> None:
        """Updates one stack on its owners, which broadcast the weights."""
        scale = clip_coef / self.mesh.dp.size
        step = self.updates + 1
        state.update(gradient.owned, gradient.statistics, scale, self.lr, step, self.config)

    def _update_dense(self, gradients: list[torch.Tensor], clip_coef: float) -> None:
        """Takes one AdamW or LAMB step on the dense parameters; scales their gradients in place."""
        if gradients:
            torch._foreach_mul_(gradients, clip_coef)
        shards: list[torch.Tensor] = []
        if self.config.weight_decay or self.config.lamb:
            shards = self.local_matrix_shards()
        before = [shard.clone() for shard in shards] if self.config.lamb else []
        if shards and self.config.weight_decay:
            # AdamW's decoupled decay (Loshchilov and Hutter 2019, Algorithm 2)
            torch._foreach_mul_(shards, 1 - self.lr * self.config.weight_decay)
        inspect.unwrap(torch.optim.AdamW.step)(self)
        if before:
            self._apply_trust_ratios(shards, before)

    def _apply_trust_ratios(self, shards: list[torch.Tensor], before: list[torch.Tensor]) -> None:
        """Scales the dense matrices' steps by LAMB's ratios. A collective above stage 0.

        Args:
            shards: This rank's part of each matrix after the step; may be empty, whole at stage 0.
            before: The same parts before the step.
        """
        device = self.mesh.device
        squares: list[torch.Tensor] = []
        for old, new in zip(before, shards, strict=True):
            old_square = sum_of_squares([old], device)
            step_square = sum_of_squares([new - old], device)
            squares.append(torch.stack([old_square, step_square]))
        square_p2 = torch.stack(squares)
        if self.zero_stage > 0:
            all_reduce_sum(square_p2, self.mesh.dp)
        for new, old, square_2 in zip(shards, before, square_p2, strict=True):
            apply_trust_ratio(new[None], old[None], square_2[None], self.lr)

    def check_not_skipped(self) -> None:
        """Checks that a skipped step did not already update experts in backward.

        Raises:
            FloatingPointError: The gradient is not finite and experts were updated by it.
        """
        if self.config.fuse_expert_update_in_backward and not math.isfinite(self.norm):
            raise FloatingPointError(
                f"after {self.updates} updates the gradient is not finite, and experts were "
                "already updated by it (optim.fuse_expert_update_in_backward=true); continue from "
                "the last checkpoint with --resume, perhaps with a lower optim.lr"
            )
