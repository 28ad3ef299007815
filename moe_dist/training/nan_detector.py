"""Finds the layer in which a NaN or an infinity first appeared.

If a gradient is not finite, `Optimizer.step` skips the step on every rank, and no trained number
changes. The detector then names the layer, and training ends after
`optim.max_consecutive_skipped_steps` skipped steps in a row. With
`optim.fuse_expert_update_in_backward` experts are already updated then, so
`Optimizer.check_not_skipped` ends the run at once.

Other checks: a lane whose LSTM state is not finite starts again from zeros
(`tasks.language_model`), `checkpoint.saver` does not write a NaN, `checkpoint.loader` does not read
one, and `divergence_reason` checks the run's last losses.

Each layer's output is summed in forward, and its gradient in backward: one pass over numbers in
cache, and no synchronisation. The sums are read only after a skipped step.
"""

import math
import sys
from collections.abc import Mapping
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

NOWHERE = 2**31  # an index after all layers
# A run has diverged if a loss is more than this many times a uniform guess's loss. A training loss
# need not be much worse than uniform; a test loss may be, if the model has memorised its training
# split. The limit is at least MARGIN above a uniform guess: with two classes a guess costs 0.69
# nats, and in a small batch one confident wrong answer costs several times as much.
DIVERGENCE_FACTORS = {"train/loss": 2.0, "test/loss": 10.0}
MARGIN = 5.0  # nats, or the unit of a squared error


class NonFiniteDetector:
    """Watches the outputs of a model's layers, and their gradients, on this rank.

    Layers are the modules with direct parameters; each MoE layer's experts count as one layer.

    Attributes:
        skipped: Number of skipped steps in a row.
        source: Description of the last skipped step since `read_and_reset`, or an empty text.
    """

    def __init__(self, model: nn.Module, mesh: Mesh) -> None:
        """Registers forward hooks.

        Args:
            model: This rank's model.
            mesh: The ranks.
        """
        self.mesh = mesh
        self.skipped = 0
        self.source = ""
        self._outputs: list[tuple[str, torch.Tensor]] = []  # layer and sum, in order
        self._gradients: list[tuple[str, torch.Tensor]] = []
        inside_experts: set[nn.Module] = set()
        for name, module in model.named_modules():
            if isinstance(module, MoE):
                dispatcher = module.get_submodule("dispatcher")
                dispatcher.register_forward_hook(partial(self._after_forward, f"{name}.experts"))
                inside_experts |= {
                    *dispatcher.modules(),
                    *module.get_submodule("experts").modules(),
                }
            if module._parameters and module not in inside_experts:
                module.register_forward_hook(partial(self._after_forward, name))

    def start_step(self) -> None:
        """Clears the previous step's sums."""
        self._outputs.clear()
        self._gradients.clear()

    def watch(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Sums a tensor now and its gradient in backward; a no-op in evaluation.

        Args:
            name: Name of the layer.
            x: Its output.

        Returns:
            x
        """
        if torch.is_grad_enabled() and x.requires_grad:
            self._outputs.append((name, x.detach().sum()))
            x.register_hook(lambda dx: self._gradients.append((name, dx.detach().sum())))
        return x

    def end_step(self, step: int, optimizer: Optimizer, max_skipped: int) -> None:
        """Reports a skipped step. A collective if the step was skipped.

        Args:
            step: Step number, from 1.
            optimizer: The optimizer after the step.
            max_skipped: The run ends after this many skipped steps in a row.

        Raises:
            FloatingPointError: On every rank, `max_skipped` steps in a row were skipped.
        """
        if math.isfinite(optimizer.norm):
            self.skipped = 0
            return
        self.skipped += 1
        self.source = f"step {step}: {self._find_source()}"
        if self.mesh.is_main:
            tqdm.write(f"warning: {self.source}; the step is skipped", file=sys.stderr)
        if self.skipped >= max_skipped:
            raise FloatingPointError(
                f"{self.source}; {self.skipped} steps in a row were skipped "
                f"(optim.max_consecutive_skipped_steps={max_skipped}). --resume continues from "
                "the last checkpoint; a lower optim.lr may help"
            )

    def read_and_reset(self) -> dict[str, str]:
        """Returns the last skipped step's source as a metric, or an empty dictionary."""
        source = self.source
        self.source = ""
        return {NONFINITE_SOURCE: source} if source else {}

    def _find_source(self) -> str:
        """Returns where a non-finite number first appeared, equal on all ranks. A collective."""
        first = [_first_nonfinite(self._outputs), _first_nonfinite(self._gradients)]
        first_P2 = all_gather(torch.tensor([first], device=self.mesh.device), self.mesh.dp)
        output_P, gradient_P = first_P2.t().tolist()
        for first_P, sums, description in (
            (output_P, self._outputs, "the output of {}"),
            (gradient_P, self._gradients, "the gradient of {}'s output"),
        ):
            earliest = min(first_P)
            if earliest < NOWHERE:
                ranks = [str(rank) for rank, index in enumerate(first_P) if index == earliest]
                layer = description.format(sums[earliest][0])
                return f"{layer} is not finite (rank {', '.join(ranks)})"
        return "a gradient of weights is not finite, though the outputs of all layers are"

    def _after_forward(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        """Watches a layer's output, or its first element if it is a tuple; a forward hook."""
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(first, torch.Tensor):  # a gate with parameters of its own returns a `Routing`
            self.watch(name, first)


def divergence_reason(values: Mapping[str, Any], uniform_loss: float) -> str:
    """Checks whether a run's loss has diverged.

    A loss has diverged if it is not finite, or if it is above both its factor times `uniform_loss`
    and `uniform_loss + MARGIN`.

    Args:
        values: The run's last metrics by key; reads the keys in `DIVERGENCE_FACTORS`, if present.
        uniform_loss: A uniform guess's loss over all words or classes, in nats.

    Returns:
        A warning with the first diverged loss's key and the reason; empty if no loss has diverged.
    """
    for key, factor in DIVERGENCE_FACTORS.items():
        loss = values.get(key, 0.0)
        if not math.isfinite(loss):
            return f"{key} is not finite"
        if loss > max(factor * uniform_loss, uniform_loss + MARGIN):
            return f"{key} is {loss:.4g}, and that of a uniform guess {uniform_loss:.4g}"
    return ""


def _first_nonfinite(sums: list[tuple[str, torch.Tensor]]) -> int:
    """Returns the index of the first non-finite sum, `NOWHERE` if all are finite."""
    if not sums:
        return NOWHERE
    bad = ~torch.stack([total.float() for _, total in sums]).isfinite()
    return int(bad.int().argmax()) if bad.any() else NOWHERE
