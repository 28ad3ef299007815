"""What all tasks make their batches and models with.

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
    """Of this rank's tokens in micro-batch `micro` of step `step` (from 0). `sample_T`: within the step's batch."""
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
    """Of one micro-batch's layers, its part of the mean over the step's balance groups."""
    return sum(s.balance_loss for s in stats.values()) / layout.num_balance_groups


class EncoderTask:
    """What the tasks of encoders have in common: nothing is carried from step to step. See `tasks.Task`."""

    test_splits: tuple[str, ...] = ("test",)

    def finalize_eval(self, split: str) -> dict[str, float]:
        return {}

    def weight_metrics(self, engine: Any) -> dict[str, float]:
        """How far LayerNorms of blocks are from each other (Xue et al. 2021), by what they are before."""
        norms = {
            name: engine.dense_weight(name) for name in engine.names if "encoder.norm_" in name
        }
        return {f"{NORMS_PREFIX}{name}": value for name, value in norm_divergence(norms).items()}

    def save_state(self) -> dict[str, torch.Tensor]:
        return {}

    def load_state(self, saved: dict[str, torch.Tensor]) -> None:
        """There is none."""


def build_on_meta(model: Callable[..., nn.Module], *args: Any) -> nn.Module:
    """On the meta device: shapes alone, no memory. Raises ValueError for a model that cannot be."""
    try:
        with torch.device("meta"):
            return model(*args)
    except RuntimeError as error:  # sizes whose product is beyond 64 bits
        raise ValueError(f"a model of these sizes cannot be, make some smaller ({error})") from None
