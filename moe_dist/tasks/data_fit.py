"""Takes sizes of the model from the data."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from moe_dist.config.overrides import override, value_of
from moe_dist.config.schema import Config
from moe_dist.data.class_names import preview_names


@dataclass
class DataFit:
    """A config that takes over what its data determines, except for the fields that the user has set.

    Attributes:
        config: The config so far.
        explicit: Dotted keys that keep their value; data that contradicts one is an error.
        notes: A line for the user about each field that was taken from the data.
    """

    config: Config
    explicit_keys: Collection[str] = ()
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
        if key in self.explicit_keys:
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
        if "model.num_classes" in self.explicit_keys and configured > num_classes:
            unused = configured - num_classes
            self.notes.append(f"{unused} of model.num_classes={configured} are not in the data")
        else:
            self.take(
                "model.num_classes",
                num_classes,
                f"{source} has {num_classes} classes ({preview_names(classes)})",
            )

    def take_channels(self, channels: int, source: str) -> None:
        """Sets `model.channels`. The user may have set it to another number, which is noted.

        Args:
            channels: 3 for images with colors, 1 for gray ones.
            source: The field that names the data, with its value.
        """
        configured = value_of(self.config, "model.channels")
        has = f"{source} has {'colors' if channels == 3 else 'no colors'}"
        if "model.channels" not in self.explicit_keys:
            self.take("model.channels", channels, has)
        elif configured != channels:
            loses = "makes them gray" if channels == 3 else "repeats each value"
            self.notes.append(
                f"{has}, and model.channels={configured} {loses}; model.channels={channels} fits"
            )

    def note_repeats(self, num_examples: int, unit: str) -> None:
        """Adds a note where a step reads some training examples more than once.

        Args:
            num_examples: Number of training examples.
            unit: The name of several of them, such as "images".
        """
        samples = self.config.batch.global_batch_size
        if num_examples < samples:
            self.notes.append(
                f"each of the {num_examples} training {unit} is {samples / num_examples:.1f} times in a step of "
                f"batch.global_batch_size={samples}; set batch.global_batch_size to {num_examples} or less"
            )
