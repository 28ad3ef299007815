"""What all tasks make their batches and models with.

Legend: T tokens.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from moe_dist.config import Config, override, value_of
from moe_dist.context import Context
from moe_dist.data.classes import some
from moe_dist.layer import LayerStats
from moe_dist.models.transformer import norm_divergence
from moe_dist.parallel.mesh import Layout, Mesh


def context(
    layout: Layout, mesh: Mesh, micro: int, sample_T: torch.Tensor, position_T: torch.Tensor, valid_T: torch.Tensor,
    seed: int, step: int, train: bool,
) -> Context:  # fmt: skip
    """Of this rank's tokens in micro-batch `micro` of step `step` (from 0). `sample_T`: within the step's batch."""
    return Context(
        sample_T=sample_T.to(mesh.device),
        position_T=position_T.to(mesh.device),
        valid_T=valid_T.to(mesh.device),
        seed=seed,
        step=step,
        train=train,
        first_sample=layout.first_sample(micro),
        num_samples=layout.samples_per_micro_batch,
        samples_per_balance_group=layout.samples_per_balance_group,
        samples_per_token_group=layout.samples_per_token_group,
    )


def balance(layout: Layout, stats: dict[str, LayerStats]) -> Any:
    """Of one micro-batch's layers, its part of the mean over the step's balance groups."""
    return sum(s.balance_loss for s in stats.values()) / layout.num_balance_groups


@dataclass
class Fit:
    """A config that takes over what its data determines, except for the fields that the user has set.

    Attributes:
        config: The config so far.
        explicit: Dotted keys that keep their value; data that contradicts one is an error.
        notes: A line for the user about each field that was taken from the data.
    """

    config: Config
    explicit: Collection[str] = ()
    notes: list[str] = field(default_factory=list)

    def take(self, key: str, value: int, why: str) -> None:
        """Sets a field to what the data determines.

        Args:
            key: Dotted key of the field.
            value: The value that follows from the data.
            why: A clause that says so, such as "data.text='x.txt' has 1402 different words".

        Raises:
            ValueError: The user has set the field to another value.
        """
        configured = value_of(self.config, key)
        if configured == value:
            return
        if key in self.explicit:
            raise ValueError(f"{key}={configured}, but {why}: leave it out, or set it to {value}")
        self.config = override(self.config, [f"{key}={value}"])
        self.notes.append(f"{key}={value}, for {why} (the config has {configured})")

    def take_classes(self, classes: Sequence[str], source: str) -> None:
        """Sets `model.num_classes`. The user may have set it to more than the data has, which is noted.

        Args:
            classes: Names of the classes of the data.
            source: The field that names the data, with its value.

        Raises:
            ValueError: The user has set it to less.
        """
        num_classes = len(classes)
        configured = value_of(self.config, "model.num_classes")
        if "model.num_classes" in self.explicit and configured > num_classes:
            unused = configured - num_classes
            self.notes.append(f"{unused} of model.num_classes={configured} are not in the data")
        else:
            self.take("model.num_classes", num_classes, f"{source} has {num_classes} classes ({some(classes)})")

    def take_channels(self, channels: int, source: str) -> None:
        """Sets `model.channels`. The user may have set it to another number, which is noted.

        Args:
            channels: 3 for images with colors, 1 for gray ones.
            source: The field that names the data, with its value.
        """
        configured = value_of(self.config, "model.channels")
        has = f"{source} has {'colors' if channels == 3 else 'no colors'}"
        if "model.channels" not in self.explicit:
            self.take("model.channels", channels, has)
        elif configured != channels:
            loses = "makes them gray" if channels == 3 else "repeats each value"
            self.notes.append(f"{has}, and model.channels={configured} {loses}; model.channels={channels} fits")

    def note_repeats(self, num_examples: int, unit: str) -> None:
        """Adds a note where a step reads some training examples more than once.

        Args:
            num_examples: Number of training examples.
            unit: The name of several of them, such as "images".
        """
        samples = self.config.batch.samples
        if num_examples < samples:
            self.notes.append(
                f"each of the {num_examples} training {unit} is {samples / num_examples:.1f} times in a step of "
                f"batch.samples={samples}; set batch.samples to {num_examples} or less"
            )


class OfEncoders:
    """What the tasks of encoders have in common: nothing is carried from step to step. See `tasks.Task`."""

    test_splits: tuple[str, ...] = ("test",)

    def finish(self, split: str) -> dict[str, float]:
        return {}

    def of_weights(self, engine: Any) -> dict[str, float]:
        """How far LayerNorms of blocks are from each other (Xue et al. 2021), by what they are before."""
        norms = {name: engine.dense_weight(name) for name in engine.names if "encoder.norm_" in name}
        return {f"norms/{name}": value for name, value in norm_divergence(norms).items()}

    def save_state(self) -> dict[str, torch.Tensor]:
        return {}

    def load_state(self, saved: dict[str, torch.Tensor]) -> None:
        """There is none."""


def meta(model: Callable[..., nn.Module], *args: Any) -> nn.Module:
    """On the meta device: shapes alone, no memory. Raises ValueError for a model that cannot be."""
    try:
        with torch.device("meta"):
            return model(*args)
    except RuntimeError as error:  # sizes whose product is beyond 64 bits
        raise ValueError(f"a model of these sizes cannot be, make some smaller ({error})") from None
