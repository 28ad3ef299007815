"""Faults made on purpose, to try a cluster, and this trainer on it: `chaos` of a config (`config.ChaosConfig`).

    --set fault_injection.fault=kill --set fault_injection.rank=1 --set fault_injection.step=17 --set fault_injection.phase=dispatch
    --set fault_injection.routing=one_expert

A fault happens once in a run folder, however often the run is started again: it leaves RUN/chaos there. A `routing`
holds in every step of training. Nothing else in the trainer knows of this module.

Legend: T tokens, N assignments of them, E experts.
"""

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moe_dist.config import run_folder
from moe_dist.config.schema import FaultInjectionConfig, moe_section
from moe_dist.distributed.mesh import Mesh
from moe_dist.moe.layer import MoE
from moe_dist.moe.routing import Routing
from moe_dist.nn import prng
from moe_dist.nn.token_context import TokenContext
from moe_dist.training.setup import Training

MARKER_FILE = "fault_injection"  # a file of the run folder
EXCHANGES = ("counts", "dispatch", "combine")  # phases that are directions of an exchange
ENDS = ("report", "wandb")  # phases of a run that has trained and saved all of its steps


def inject(training: Training, folder: Path, begins: bool = True) -> None:
    """Lets happen what the config asks for. Raises ValueError where a run `begins` in which it cannot; a run that goes
    on may do so on fewer ranks, or behind the step."""
    chaos, mesh = training.config.fault_injection, training.mesh
    if chaos.routing != "none":
        _say(mesh, f"routing of all layers: {chaos.routing}")
        for module in training.model.dense.modules():
            if isinstance(module, MoE):
                module.gate.forward = _routed(module.gate.forward, chaos.routing, mesh)
    if chaos.fault == "none" or (folder / MARKER_FILE).exists():
        return
    if begins:
        _check(training)
    where = "in what the first layer gets" if chaos.fault == "nan" else f"in the {chaos.phase}"
    _say(mesh, f"{chaos.fault} of rank {chaos.rank}, {where} of step {chaos.step}")
    if chaos.rank == mesh.dp.index:
        _Fault(chaos, mesh, folder, training.model.dense)


def _check(training: Training) -> None:
    """A fault that never comes would look like one that was survived."""
    config, mesh, chaos = training.config, training.mesh, training.config.fault_injection
    if chaos.rank >= mesh.dp.size:
        raise ValueError(f"fault_injection.rank={chaos.rank}: ranks are 0 to {mesh.dp.size - 1}")
    if chaos.step > config.steps:
        raise ValueError(f"fault_injection.step={chaos.step}: the run has {config.steps}")
    if chaos.fault == "nan":
        return
    if chaos.phase in EXCHANGES and not (mesh.ep.size > 1 and moe_section(config)):
        raise ValueError(
            f"fault_injection.phase={chaos.phase!r}: nothing is exchanged on one expert-parallel rank; --set mesh.ep"
        )
    if chaos.phase in ENDS and chaos.step != config.steps:
        raise ValueError(
            f"fault_injection.step={chaos.step}: the phase {chaos.phase!r} follows the last step, {config.steps}"
        )
    if (
        chaos.phase == "evaluation"
        and chaos.step % config.eval_every
        and chaos.step != config.steps
    ):
        raise ValueError(
            f"fault_injection.step={chaos.step}: evaluations are at multiples of eval_every={config.eval_every}"
        )
    if chaos.phase == "save" and chaos.step % config.save_every and chaos.step != config.steps:
        raise ValueError(
            f"fault_injection.step={chaos.step}: a checkpoint is saved at multiples of save_every={config.save_every}"
        )
    if chaos.fault == "kill_agent" and "TORCHELASTIC_RUN_ID" not in os.environ:
        raise ValueError(
            "fault_injection.fault='kill_agent': this process was not started by torchrun"
        )


def _say(mesh: Mesh, what: str) -> None:
    if mesh.is_main:
        print(f"fault injection: {what}", flush=True)


class _Fault:
    """That is to come, on this rank."""

    def __init__(
        self, chaos: FaultInjectionConfig, mesh: Mesh, folder: Path, model: nn.Module
    ) -> None:
        self.chaos = chaos
        self.record = mesh.flight_recorder
        self.folder = folder
        if chaos.fault == "nan":
            for module in model.modules():
                if module._parameters:
                    module.register_forward_pre_hook(self._not_a_number)
        else:
            mesh.flight_recorder.on_phase = self._at

    def _due(self) -> bool:
        """Leaves the mark."""
        if self.record.step != self.chaos.step or (self.folder / MARKER_FILE).exists():
            return False
        run_folder.write(self.folder, MARKER_FILE, f"{self.chaos}\n")
        return True

    def _at(self, phase: str) -> None:
        """In this phase, or in a call that has begun."""
        if phase != self.chaos.phase or not self._due():
            return
        if self.chaos.fault == "delay":
            time.sleep(self.chaos.seconds)
        elif self.chaos.fault == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        else:
            if self.chaos.fault == "kill_agent":
                os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)

    def _not_a_number(self, module: nn.Module, args: tuple) -> Any:
        """In what the first layer of the step gets that takes numbers, instead of words."""
        x = args[0]
        if not (torch.is_grad_enabled() and x.is_floating_point() and self._due()):
            return None
        x = x.clone()
        x.view(-1)[0] = torch.nan
        return x, *args[1:]


def _routed(gate: Callable[..., tuple], kind: str, mesh: Mesh) -> Callable[..., tuple]:
    def changed(x_TD: torch.Tensor, ctx: TokenContext) -> tuple:
        routing, told = gate(x_TD, ctx)
        if not ctx.train:
            return routing, told
        num_experts = len(routing.count_E)
        expert_N = torch.arange(num_experts, device=x_TD.device).repeat_interleave(routing.count_E)
        if kind == "one_expert":  # the first choice of each token in the order of experts
            order_N = routing.token_N.argsort(stable=True)
            token_N = routing.token_N[order_N]
            keep_N = order_N[torch.diff(token_N, prepend=token_N.new_tensor([-1])) > 0]
            expert_N = torch.zeros_like(expert_N)
        elif kind == "empty_rank":  # the last one's experts get nothing
            keep_N = (
                (expert_N < num_experts - len(mesh.local_experts(num_experts))).nonzero().squeeze(1)
            )
        else:  # ragged: every rank sends what it has of some first tokens alone, of none or of all
            part = prng.uniform(
                1, ctx.seed, "ragged", ctx.step, ctx.layer_call, mesh.dp.index
            ).item()
            keep_N = (routing.token_N < int(part * (len(x_TD) + 1))).nonzero().squeeze(1)
        count_E = torch.bincount(expert_N[keep_N], minlength=num_experts)
        return Routing(routing.token_N[keep_N], routing.gate_N[keep_N], count_E), told

    return changed
