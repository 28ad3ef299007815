"""Fits sizes in the config to the data."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from moe_dist.config.overrides import override, value_of
from moe_dist.config.schema import Config
from moe_dist.data.class_names import preview_names


@dataclass
class DataFit:
    """A config that takes values from its data, except for fields that the user has set.

    Attributes:
        config: The config so far.
        explicit_keys: Dotted keys that keep their value; data that contradicts one is an error.
        notes: One line for the user about each field that was taken from the data.
    """

    config: Config
    explicit_keys: Collection[str] = ()
    notes: list[str] = field(default_factory=list)

    def take(self, key: str, value: int, reason: str) -> None:
        """Sets a field to the data's value.

        Args:
            key: The field's dotted key.
            value: The data's value.
            reason: A clause about the data, such as "data.text='x.txt' has 1402 different words".

        Raises:
            ValueError: The user has set the field to another value.
        """
        configured = value_of(self.config, key)
        if configured == value:
            return
        if key in self.explicit_keys:
            raise ValueError(
                f"{key}={configured}, but {reason}: leave it out, or set it to {value}"
            )
        self.config = override(self.config, [f"{key}={value}"])
        self.notes.append(f"{key}={value}, for {reason} (the config has {configured})")

    def take_classes(self, classes: Sequence[str], source: str) -> None:
        """Sets `model.num_classes`; more classes than in the data are allowed and noted.

        Args:
            classes: The data's class names.
            source: The field that names the data, with its value.

        Raises:
            ValueError: The user has set fewer classes.
        """
        num_classes = len(classes)
        configured = value_of(self.config, "model.num_classes")
        if "model.num_classes" in self.explicit_keys and configured > num_classes:
            unused = configured - num_classes
            self.notes.append(f"{unused} of model.num_classes={configured} are not in the data")
        else:
            reason = f"{source} has {num_classes} classes ({preview_names(classes)})"
            self.take("model.num_classes", num_classes, reason)

    def take_channels(self, channels: int, source: str) -> None:
        """Sets `model.channels`; another number set by the user is allowed and noted.

        Args:
            channels: 3 for images with colors, 1 for gray images.
            source: The field that names the data, with its value.
        """
        configured = value_of(self.config, "model.channels")
        has = f"{source} has {'colors' if channels == 3 else 'no colors'}"
        if "model.channels" not in self.explicit_keys:
            self.take("model.channels", channels, has)
        elif configured != channels:
            effect = "makes them gray" if channels == 3 else "repeats each value"
            self.notes.append(
                f"{has}, and model.channels={configured} {effect}; model.channels={channels} fits"
            )

    def note_repeats(self, num_examples: int, unit: str) -> None:
        """Adds a note if a step reads some training examples more than once.

        Args:
            num_examples: How many training examples there are.
            unit: Plural noun for them, such as "images".
        """
        samples = self.config.batch.global_batch_size
        if num_examples < samples:
            self.notes.append(
                f"each of the {num_examples} training {unit} is {samples / num_examples:.1f} times "
                f"in a step of batch.global_batch_size={samples}; set batch.global_batch_size to "
                f"{num_examples} or less"
            )
