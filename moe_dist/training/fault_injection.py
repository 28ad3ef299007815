r"""Injects faults to test a cluster and the trainer (`config.schema.FaultInjectionConfig`).

    --set fault_injection.fault=kill --set fault_injection.rank=1 --set fault_injection.step=17 \
        --set fault_injection.phase=dispatch
    --set fault_injection.routing=one_expert

A fault is injected once in a run: it writes the file `fault_injection` into the run folder, so the
restarted run continues without it. A routing is forced in every training step. No other trainer
module imports this one.

Legend: T tokens, N token-expert assignments, E experts.
"""

import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moe_dist.config import run_folder
from moe_dist.config.schema import Config, FaultInjectionConfig, moe_section
from moe_dist.distributed.mesh import Mesh
from moe_dist.moe.layer import MoE
from moe_dist.moe.routing import GateStats, Routing
from moe_dist.nn import prng
from moe_dist.nn.token_context import TokenContext
from moe_dist.training.setup import Training

MARKER_FILE = "fault_injection"  # in the run folder
ALL_TO_ALL_PHASES = ("counts", "dispatch", "combine")
PHASES_AFTER_TRAINING = ("report", "wandb")


def inject(training: Training, folder: Path, new_run: bool = True) -> None:
    """Schedules the configured fault and forces the configured routing.

    Args:
        training: The run, ready to train.
        folder: Its run folder.
        new_run: If True, checks the fault's rank and step. A resumed run may have fewer ranks or
            may already be past the step.

    Raises:
        ValueError: A new run would never reach the fault.
    """
    faults = training.config.fault_injection
    mesh = training.mesh
    if faults.routing != "none":
        _log(mesh, f"routing of all layers: {faults.routing}")
        for module in training.model.module.modules():
            if isinstance(module, MoE):
                hook = partial(_force_routing, faults.routing, mesh)
                module.get_submodule("gate").register_forward_hook(hook)
    if faults.fault == "none" or (folder / MARKER_FILE).exists():
        return
    if new_run:
        _check_is_reached(training.config, mesh)
    place = "in the input of the first layer" if faults.fault == "nan" else f"in {faults.phase}"
    _log(mesh, f"{faults.fault} of rank {faults.rank}, {place} of step {faults.step}")
    if faults.rank == mesh.dp.index:
        _Fault(faults, mesh, folder).install(training.model.module)


def _check_is_reached(config: Config, mesh: Mesh) -> None:
    """Raises ValueError for a fault the run never reaches: it would look like a survived one."""
    faults = config.fault_injection
    at_step = f"fault_injection.step={faults.step}"
    at_phase = f"fault_injection.phase={faults.phase!r}"
    is_last = faults.step == config.steps
    if faults.rank >= mesh.dp.size:
        raise ValueError(f"fault_injection.rank={faults.rank}: use 0 to {mesh.dp.size - 1}")
    if faults.step > config.steps:
        raise ValueError(f"{at_step}: the run has {config.steps} steps")
    if faults.fault == "nan":
        return
    if faults.phase in ALL_TO_ALL_PHASES and not (mesh.ep.size > 1 and moe_section(config)):
        raise ValueError(
            f"{at_phase}: one expert-parallel rank dispatches nothing; set mesh.ep to 2 or more"
        )
    if faults.phase in PHASES_AFTER_TRAINING and not is_last:
        raise ValueError(f"{at_step}: {at_phase} follows the last step, {config.steps}")
    if faults.phase == "evaluation" and faults.step % config.eval_every and not is_last:
        raise ValueError(
            f"{at_step}: evaluations are at multiples of eval_every={config.eval_every}"
        )
    if faults.phase == "save" and faults.step % config.save_every and not is_last:
        raise ValueError(
            f"{at_step}: a checkpoint is saved at multiples of save_every={config.save_every}"
        )
    if faults.fault == "kill_agent" and "TORCHELASTIC_RUN_ID" not in os.environ:
        raise ValueError(
            "fault_injection.fault='kill_agent': this process has no agent; start it with torchrun"
        )


def _log(mesh: Mesh, message: str) -> None:
    """Prints on the main rank."""
    if mesh.is_main:
        print(f"fault injection: {message}", flush=True)


class _Fault:
    """Injects a fault on this rank at its step and phase."""

    def __init__(self, faults: FaultInjectionConfig, mesh: Mesh, folder: Path) -> None:
        self.faults = faults
        self.flight_recorder = mesh.flight_recorder
        self.folder = folder

    def install(self, model: nn.Module) -> None:
        """Registers the hooks that inject the fault."""
        if self.faults.fault == "nan":
            for module in model.modules():
                if module._parameters:
                    module.register_forward_pre_hook(self._inject_nan)
        else:
            self.flight_recorder.on_phase = self._on_phase

    def _is_due(self) -> bool:
        """Returns True once, at the fault's step, and writes the marker file."""
        is_step = self.flight_recorder.step == self.faults.step
        if not is_step or (self.folder / MARKER_FILE).exists():
            return False
        run_folder.write(self.folder, MARKER_FILE, f"{self.faults}\n")
        return True

    def _on_phase(self, phase: str) -> None:
        """Injects the fault if `phase` (a step phase or a collective) is the configured one."""
        if phase != self.faults.phase or not self._is_due():
            return
        if self.faults.fault == "delay":
            time.sleep(self.faults.seconds)
        elif self.faults.fault == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        else:
            if self.faults.fault == "kill_agent":
                os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)

    def _inject_nan(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Puts a NaN into the first float input of a layer in this step; a forward pre-hook."""
        x = args[0]
        if not (torch.is_grad_enabled() and x.is_floating_point() and self._is_due()):
            return None
        x = x.clone()
        x.view(-1)[0] = torch.nan
        return x, *args[1:]


def _force_routing(
    kind: str,
    mesh: Mesh,
    gate: nn.Module,
    args: tuple[torch.Tensor, TokenContext],
    output: tuple[Routing, GateStats],
) -> tuple[Routing, GateStats]:
    """Changes a gate's routing in training; a forward hook.

    Args:
        kind: "one_expert", "empty_rank" or "ragged".
        mesh: The ranks.
        gate: The gate.
        args: Its arguments: tokens and their context.
        output: Its forward result.

    Returns:
        A routing with a subset of the assignments (for "one_expert" all to expert 0) and the
        unchanged gate statistics; outside training, `output` itself.
    """
    x_TD, ctx = args
    routing, stats = output
    if not ctx.train:
        return output
    keep: Callable[..., torch.Tensor] = _KEPT_ASSIGNMENTS[kind]
    num_experts = len(routing.count_E)
    expert_E = torch.arange(num_experts, device=x_TD.device)
    expert_N = expert_E.repeat_interleave(routing.count_E)
    kept_N = keep(routing, expert_N, ctx, mesh)
    if kind == "one_expert":
        expert_N = torch.zeros_like(expert_N)
    count_E = torch.bincount(expert_N[kept_N], minlength=num_experts)
    return Routing(routing.token_N[kept_N], routing.gate_N[kept_N], count_E), stats


def _first_of_each_token(
    routing: Routing, expert_N: torch.Tensor, ctx: TokenContext, mesh: Mesh
) -> torch.Tensor:
    """Returns the index of each token's assignment to its first expert."""
    order_N = routing.token_N.argsort(stable=True)
    token_N = routing.token_N[order_N]
    before_first = token_N.new_tensor([-1])
    return order_N[torch.diff(token_N, prepend=before_first) > 0]


def _not_on_last_rank(
    routing: Routing, expert_N: torch.Tensor, ctx: TokenContext, mesh: Mesh
) -> torch.Tensor:
    """Returns the indices of the assignments to experts outside the last rank."""
    num_experts = len(routing.count_E)
    on_last_rank = len(mesh.local_experts(num_experts))
    return (expert_N < num_experts - on_last_rank).nonzero().squeeze(1)


def _of_some_tokens(
    routing: Routing, expert_N: torch.Tensor, ctx: TokenContext, mesh: Mesh
) -> torch.Tensor:
    """Returns the indices of the assignments for a random prefix of this rank's tokens."""
    key = (ctx.seed, "ragged", ctx.step, ctx.layer_call, mesh.dp.index)
    share = prng.uniform(1, *key).item()
    num_tokens = int(share * (len(ctx.sample_T) + 1))
    return (routing.token_N < num_tokens).nonzero().squeeze(1)


_KEPT_ASSIGNMENTS: dict[str, Callable[..., torch.Tensor]] = {
    "one_expert": _first_of_each_token,
    "empty_rank": _not_on_last_rank,
    "ragged": _of_some_tokens,
}
