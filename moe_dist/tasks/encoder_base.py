"""Functions for all tasks' batches and models, and the base class for encoder tasks.

Legend: T tokens.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from moe_dist.distributed.batch_layout import BatchLayout
from moe_dist.distributed.mesh import Mesh
from moe_dist.models.transformer import norm_divergence
from moe_dist.moe.layer import LayerStats
from moe_dist.monitoring.metric_keys import NORMS_PREFIX
from moe_dist.nn.token_context import TokenContext
from moe_dist.tasks.task import ModelEngine


def token_context(
    layout: BatchLayout,
    mesh: Mesh,
    micro: int,
    sample_T: torch.Tensor,
    position_T: torch.Tensor,
    valid_T: torch.Tensor,
    seed: int,
    step: int,
    train: bool,
) -> TokenContext:
    """Creates the context of this rank's tokens in one micro-batch.

    Args:
        layout: The batch layout.
        mesh: The ranks.
        micro: The micro-batch's number in the step.
        sample_T: Each token's sample, numbered within the step's batch.
        position_T: Each token's position in its sample.
        valid_T: False for padding.
        seed: The run's seed.
        step: The step's number, from 0.
        train: True in training.

    Returns:
        The context, on the mesh's device.
    """
    return TokenContext(
        sample_T=sample_T.to(mesh.device),
        position_T=position_T.to(mesh.device),
        valid_T=valid_T.to(mesh.device),
        seed=seed,
        step=step,
        train=train,
        first_sample=layout.first_sample(micro),
        num_samples=layout.samples_per_micro_batch,
        balance_loss_group_size=layout.balance_loss_group_size,
        capacity_group_size=layout.capacity_group_size,
    )


def balance_loss(layout: BatchLayout, stats: dict[str, LayerStats]) -> Any:
    """Adds the layers' balance losses.

    Args:
        layout: The batch layout.
        stats: Statistics for each MoE layer.

    Returns:
        The micro-batch's part of the mean over the step's balance groups; 0 without MoE layers.
    """
    return sum(s.balance_loss for s in stats.values()) / layout.num_balance_groups


class EncoderTask:
    """A base class for encoder tasks, which carry no state from step to step. See `tasks.Task`."""

    test_splits: tuple[str, ...] = ("test",)

    def finalize_eval(self, split: str) -> dict[str, float]:
        """Returns no metrics."""
        return {}

    def weight_metrics(self, engine: ModelEngine) -> dict[str, float]:
        """Returns how different the LayerNorms are (Xue et al. 2021). A collective."""
        norms: dict[str, torch.Tensor] = {}
        for name in engine.names:
            if "encoder.norm_" in name:
                norms[name] = engine.dense_weight(name)
        return {NORMS_PREFIX + part: value for part, value in norm_divergence(norms).items()}

    def save_state(self) -> dict[str, torch.Tensor]:
        """Returns no state."""
        return {}

    def load_state(self, saved: dict[str, torch.Tensor]) -> None:
        """Does nothing: there is no state."""


def build_on_meta(model: Callable[..., nn.Module], *args: Any) -> nn.Module:
    """Builds a model on the meta device: shapes without memory.

    Args:
        model: The model's class.
        *args: Arguments for its constructor.

    Returns:
        The model.

    Raises:
        ValueError: Sizes do not fit together, or a tensor has 2**63 elements or more.
    """
    try:
        with torch.device("meta"):
            return model(*args)
    except RuntimeError as error:
        raise ValueError(
            f"the model is too large for a tensor; use smaller sizes ({error})"
        ) from None
