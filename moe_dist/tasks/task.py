"""The task protocol: a model, its batches, its loss and its metrics."""

from collections.abc import Collection, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import nn

from moe_dist.config.schema import Config
from moe_dist.data.data_source import DataSource
from moe_dist.distributed.batch_layout import BatchLayout
from moe_dist.distributed.mesh import Mesh
from moe_dist.moe.layer import LayerStats
from moe_dist.nn.token_context import TokenContext

# a micro-batch's part of the loss (scalar), sums over its samples by name, statistics by MoE layer
LossResult = tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, LayerStats]]


class ModelEngine(Protocol):
    """The engine interface for tasks."""

    @property
    def names(self) -> Mapping[str, Any]:
        """The dense parameters by name."""

    def __call__(self, *args: Any) -> Any:
        """Runs the model's forward pass."""

    def dense_weight(self, name: str) -> torch.Tensor:
        """Returns a dense parameter's whole float32 master. A collective."""


class Batch(Protocol):
    """This rank's share of one micro-batch; each task adds its own fields."""

    @property
    def ctx(self) -> TokenContext:
        """The context for the batch's tokens."""


class Task(Protocol):
    """A plain model, this rank's micro-batches in a step, their loss, and their metrics.

    Attributes:
        model_config: The type for `Config.model`.
        data_config: The type for `Config.data`.
        throughput_unit: The unit for throughput, one of the sums in `loss`: "tokens", "images" or
            "texts".
        primary_metric: The metric that compares models on a user's own data.
        test_splits: The splits that are evaluated at a run's end.
        required_metadata: Keys in `checkpoint_metadata` that the model cannot be used without.
        fields_from_data: Dotted config keys whose values follow from the data unless the user sets
            them.
        layout: The batch layout.
    """

    model_config: type
    data_config: type
    throughput_unit: str
    primary_metric: str
    test_splits: tuple[str, ...]
    required_metadata: tuple[str, ...]
    fields_from_data: tuple[str, ...]
    layout: BatchLayout

    def __init__(
        self,
        config: Config,
        layout: BatchLayout,
        mesh: Mesh,
        saved: dict[str, Any] | None,
        explicit: Collection[str] = (),
    ) -> None:
        """Opens the data and sets `config`. A collective.

        Args:
            config: The run's config.
            layout: The batch layout.
            mesh: The ranks.
            saved: `checkpoint_metadata` from the run that this run continues or starts from.
            explicit: Dotted keys set by the user, which are not taken from the data.

        Raises:
            ValueError: On every rank: the data cannot be found, read or used, or contradicts an
                explicit field.
        """

    @property
    def config(self) -> Config:
        """The run's config; `fields_from_data` have the data's values, the same on every rank."""

    @property
    def notes(self) -> list[str]:
        """Notes about the data for the user, one line each."""

    @staticmethod
    def build_model(config: Config) -> nn.Module:
        """Builds the model.

        Args:
            config: The run's config.

        Returns:
            The model on the meta device.

        Raises:
            ValueError: The sizes do not fit together.
        """

    @staticmethod
    def check_data(config: Config, main: bool, explicit: Collection[str]) -> None:
        """Checks the data quickly, on every rank, before there is a process group.

        Args:
            config: The run's config.
            main: True on the main rank.
            explicit: As in `__init__`.

        Raises:
            ValueError: The data cannot be used.
        """

    @staticmethod
    def comparison_key(config: Config) -> dict[str, Any]:
        """Returns the settings that comparable runs share: data, batch and steps."""

    def data_source(self) -> DataSource:
        """Returns the files or arrays to fingerprint. Called on the main rank only."""

    @property
    def uniform_loss(self) -> float:
        """The loss for equal probabilities for all words, classes or places, in nats."""

    def checkpoint_metadata(self) -> dict[str, Any]:
        """Returns JSON values for a checkpoint, from which a later run restores its data."""

    def reset_state(self, dtype: torch.dtype) -> None:
        """Sets the state before the first step.

        Args:
            dtype: The model's dtype.
        """

    def batches(self, step: int, split: str = "train") -> Iterator[Batch]:
        """Iterates over this rank's micro-batches in a step.

        Args:
            step: The step's number, from 0.
            split: The split's name.

        Returns:
            An iterator over the micro-batches.
        """

    def loss_denominator(self, batches: list[Any]) -> torch.Tensor:
        """Counts the units that the step's loss is a mean over. A collective.

        Args:
            batches: This rank's micro-batches in the step.

        Returns:
            The count over all ranks and micro-batches, float64.
        """

    def loss(self, engine: ModelEngine, batch: Any, total: torch.Tensor) -> LossResult:
        """Returns a micro-batch's part of the step's loss.

        The task loss is divided among ranks and micro-batches. The balance losses (their mean over
        the step's balance groups) are whole on every rank, and each rank differentiates them for
        its own rows (`all_reduce_shared`).

        Args:
            engine: Runs the model.
            batch: The micro-batch.
            total: The result from `loss_denominator`.

        Returns:
            The loss part, sums over its samples by name, and its layers' statistics.
        """

    def compute_metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """Computes the metrics for a metrics line.

        Args:
            sums: The sums from `loss`, added over many micro-batches.

        Returns:
            "loss" and other metrics by name.
        """

    def eval_batches(self, split: str) -> Iterator[list[Any]]:
        """Yields every sample in a split once, in as many micro-batches on every rank."""

    def finalize_eval(self, split: str) -> dict[str, float]:
        """Returns metrics that need a whole split at once. A collective."""

    def weight_metrics(self, engine: ModelEngine) -> dict[str, float]:
        """Returns metrics about the model's weights for a metrics line. A collective."""

    def save_state(self) -> dict[str, torch.Tensor]:
        """Returns the whole state that steps carry, besides the model. A collective."""

    def load_state(self, saved: dict[str, torch.Tensor]) -> None:
        """Restores a saved state, on any layout."""

    def format_result(self, result: dict[str, float]) -> str:
        """Returns the test metrics as one line for people."""
