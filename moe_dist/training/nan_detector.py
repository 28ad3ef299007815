"""Where a number that is not finite came from.

The rule: a step whose gradients are not all finite (a NaN, or an overflow) is skipped on every rank, and nothing that
is trained changes. Training tells the layer where it began, and ends after `optim.max_consecutive_skipped_steps` such steps in a row. A
lane of text whose state is not finite begins again with zeros (`tasks.language_model`).

What each layer gives out is added up, in forward and its gradient in backward: one pass over numbers that are at hand,
and nothing waits for the sum, which is looked at after a step that was skipped alone.
"""

import math
import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from moe_dist.distributed.collectives import all_gather
from moe_dist.distributed.mesh import Mesh
from moe_dist.moe.layer import MoE
from moe_dist.monitoring.metric_keys import NONFINITE_SOURCE
from moe_dist.optim.optimizer import Optimizer

NOWHERE = 2**31  # a place after all others
# A run has diverged where a loss is more than so many times that of a uniform guess. In training no guess need be much
# worse than that one; elsewhere a model that has learned its training split by heart may be. The limit is at
# least MARGIN above a guess: with two classes a guess costs 0.69 nats, and in a small batch one wrong answer that the
# model is sure of makes a loss of several times that.
FAR = {"train/loss": 2.0, "test/loss": 10.0}
MARGIN = 5.0  # nats, or the unit of a squared error


class NonFiniteDetector:
    """Watches the layers of a model on this rank: modules that have parameters of their own, and experts."""

    def __init__(self, model: nn.Module, mesh: Mesh) -> None:
        self.mesh = mesh
        self.forward: list[tuple[str, torch.Tensor]] = []  # layer and sum, in order
        self.backward: list[tuple[str, torch.Tensor]] = []
        self.skipped = 0  # steps in a row
        self.source = ""
        for name, module in model.named_modules():
            if isinstance(module, MoE):
                module.dispatcher = self._around(module.dispatcher, f"{name}.experts")
            if module._parameters:
                module.register_forward_hook(partial(self._after, name))

    def start_step(self) -> None:
        """A step begins."""
        self.forward.clear()
        self.backward.clear()

    def watch(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Looks at what `name` gives, and later at its gradient. Returns `x`."""
        if torch.is_grad_enabled() and x.requires_grad:  # an evaluation has no step to skip
            self.forward.append((name, x.detach().sum()))
            x.register_hook(lambda dx: self.backward.append((name, dx.detach().sum())))
        return x

    def end_step(self, step: int, optimizer: Optimizer, max_skipped: int) -> None:
        """After a step. A collective where it was skipped.

        Raises FloatingPointError, on every rank, for too many in a row."""
        if math.isfinite(optimizer.norm):
            self.skipped = 0
            return
        self.skipped += 1
        self.source = f"step {step}: {self._where()}"
        if self.mesh.is_main:
            tqdm.write(f"warning: {self.source}; the step is skipped", file=sys.stderr)
        if self.skipped >= max_skipped:
            raise FloatingPointError(
                f"{self.source}; {self.skipped} steps in a row were skipped (optim.max_consecutive_skipped_steps). --resume goes on from "
                f"the last checkpoint, and a lower optim.lr may help"
            )

    def read_and_reset(self) -> dict[str, str]:
        """For a line of metrics: where the last step that was skipped since the last reading went wrong."""
        told, self.source = self.source, ""
        return {NONFINITE_SOURCE: told} if told else {}

    def _where(self) -> str:
        """The same on every rank."""
        places = torch.tensor(
            [[_first(self.forward), _first(self.backward)]], device=self.mesh.device
        )
        forward_P, backward_P = all_gather(places, self.mesh.dp).t().tolist()
        for place_P, seen, what in (
            (forward_P, self.forward, "the output of {}"),
            (backward_P, self.backward, "the gradient of {}'s output"),
        ):
            if (first := min(place_P)) < NOWHERE:
                ranks = ", ".join(str(rank) for rank, place in enumerate(place_P) if place == first)
                return f"{what.format(seen[first][0])} is not finite (rank {ranks})"
        return "a gradient of weights is not finite, though what all layers give out is"

    def _after(self, name: str, module: nn.Module, args: Any, y: Any) -> None:
        self.watch(name, y[0] if isinstance(y, tuple) else y)

    def _around(self, exchange: Callable[..., tuple], name: str) -> Callable[..., tuple]:
        def watched(*args: Any) -> tuple:
            y_TD, stats = exchange(*args)
            return self.watch(name, y_TD), stats

        return watched


def divergence_reason(values: Mapping[str, Any], uniform_loss: float) -> str:
    """Returns which loss of a run says that it has diverged, and why; empty where none does.

    Args:
        values: The run's last lines of metrics, by key; those of FAR are looked at, where they are there.
        uniform_loss: The loss of a model that gives everything the same probability, in nats.
    """
    for key, far in FAR.items():
        loss = values.get(key, 0.0)
        if not math.isfinite(loss):
            return f"{key} is not finite"
        if loss > max(far * uniform_loss, uniform_loss + MARGIN):
            return f"{key} is {loss:.4g}, and that of a uniform guess {uniform_loss:.4g}"
    return ""


def _first(seen: list[tuple[str, torch.Tensor]]) -> int:
    """The first sum that is not finite."""
    if not seen:
        return NOWHERE
    bad = ~torch.stack([total.float() for _, total in seen]).isfinite()
    return int(bad.int().argmax()) if bad.any() else NOWHERE
