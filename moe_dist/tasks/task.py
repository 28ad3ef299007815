"""What is trained on what, by the name in a config's `task`."""

from collections.abc import Collection, Iterator
from typing import Any, Protocol

import torch
from torch import nn

from moe_dist.config.schema import Config
from moe_dist.data.data_source import DataSource
from moe_dist.distributed.batch_layout import BatchLayout
from moe_dist.distributed.mesh import Mesh
from moe_dist.moe.layer import LayerStats
from moe_dist.nn.token_context import TokenContext


class Batch(Protocol):
    """This rank's share of one micro-batch; what else is in it is the task's own matter."""

    @property
    def ctx(self) -> TokenContext: ...


class Task(Protocol):
    """A plain model, this rank's micro-batches of a step, their loss, and what is measured."""

    model_config: type  # of Config.model
    data_config: type  # of Config.data
    throughput_unit: (
        str  # what speed counts, one of the sums of `loss`: "tokens", "images" or "texts"
    )
    primary_metric: str  # the measure that models are compared by, of data of one's own
    test_splits: tuple[str, ...]  # what is evaluated at the end
    required_metadata: tuple[str, ...]  # keys of `known` that its model cannot be used without
    fields_from_data: tuple[
        str, ...
    ]  # dotted keys of the config that follow from the data where the user has not set them
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
            layout: The layout of its batch.
            mesh: The ranks.
            saved: The result of `known` of the run that this one goes on from, or begins with.
            explicit: Dotted keys that the user has set, which are not taken from the data.

        Raises:
            ValueError: On every rank, the data cannot be found, read or used, or contradicts an explicit field.
        """

    @property
    def config(self) -> Config:
        """The run's config with the fields of `from_data` as the data determines them, the same on every rank."""

    @property
    def notes(self) -> list[str]:
        """About the data, one line each."""

    @staticmethod
    def build_model(config: Config) -> nn.Module:
        """On the meta device. Raises ValueError for a model that cannot be."""

    @staticmethod
    def check_data(config: Config, main: bool, explicit: Collection[str]) -> None:
        """Takes a quick look at the data, on every rank, before there is a process group.

        Args:
            config: The run's config.
            main: Whether this is the main rank.
            explicit: As in `__init__`.

        Raises:
            ValueError: The data cannot be used.
        """

    @staticmethod
    def comparison_key(config: Config) -> dict[str, Any]:
        """What two models must share for their results to be compared: data, batch and steps, not the layout."""

    def data_source(self) -> DataSource:
        """Returns the files or arrays that were read, for a fingerprint. Called on the main rank alone."""

    @property
    def uniform_loss(self) -> float:
        """The loss of a model that gives every word, class or place the same probability, in nats (`finite`)."""

    def checkpoint_metadata(self) -> dict[str, Any]:
        """What a checkpoint keeps so that the run finds its data as it was (`contents.OF_TASKS`); goes into JSON."""

    def reset_state(self, dtype: torch.dtype) -> None:
        """The state before the first step, of the model's `dtype`."""

    def batches(self, step: int, split: str = "train") -> Iterator[Batch]:
        """This rank's micro-batches of step `step` (from 0) of a split."""

    def loss_denominator(self, batches: list[Any]) -> torch.Tensor:
        """What the step's loss is a mean over: of all ranks and micro-batches, float64. A collective."""

    def loss(
        self, engine: Any, batch: Any, total: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, LayerStats]]:
        """This micro-batch's part of the step's loss, sums over its samples by name, and its layers' statistics.

        Every rank and micro-batch has a part of the loss proper; the mean over the step's balance groups of the balance
        losses every rank has whole and differentiates for its own rows (`all_reduce_shared`).
        """

    def compute_metrics(self, sums: dict[str, float]) -> dict[str, float]:
        """Returns "loss" and the other measures of a line of metrics, from sums over many micro-batches."""

    def eval_batches(self, split: str) -> Iterator[list[Any]]:
        """Every sample of a split once, in the same number of micro-batches on every rank."""

    def finalize_eval(self, split: str) -> dict[str, float]:
        """What can only be measured when all of a split has been evaluated. A collective."""

    def weight_metrics(self, engine: Any) -> dict[str, float]:
        """What a line of metrics tells of the model's weights. A collective."""

    def save_state(self) -> dict[str, torch.Tensor]:
        """What is carried from step to step beside the model, whole. A collective."""

    def load_state(self, saved: dict[str, torch.Tensor]) -> None:
        """Inverse of `save_state`, on any layout."""

    def format_result(self, result: dict[str, float]) -> str:
        """The test metrics, in a line for people."""
