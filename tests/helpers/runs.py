"""Short training runs inside one process of a test, on any layout."""

from pathlib import Path
from typing import Any

import torch

from moe_dist.checkpoint.loader import load
from moe_dist.checkpoint.manifest import newest_complete
from moe_dist.checkpoint.saver import Saver
from moe_dist.config.overrides import override, to_json
from moe_dist.config.papers import get
from moe_dist.config.schema import Config
from moe_dist.distributed import mesh as meshes
from moe_dist.engine.ds_config import read_ds_config
from moe_dist.training.metric_accumulator import MetricAccumulator
from moe_dist.training.setup import set_up
from moe_dist.training.step import train_step
from moe_dist.verify.certificate import whole_weights

TINY = [
    "steps=20",
    "log_every=1",
    "write_report=false",
    "wandb.mode=off",
    "data.vocabulary_size=300",
    "model.dim=16",
    "model.moe.num_experts=8",
    "model.moe.k=2",
    "model.moe.expert_hidden_dim=24",
    "batch.global_batch_size=8",
    "batch.seq_len=6",
    "batch.balance_loss_group_size=4",
    "optim.lr=1e-4",
    "optim.warmup_steps=5",
    "optim.max_grad_norm=0.3",
]


def tiny(*more: str) -> Config:
    """Returns the demo with small numbers: dropout, noise and clipping on."""
    return override(get("lstm_moe_demo"), [*TINY, *more])


ENCODER = [
    "steps=20",
    "log_every=1",
    "write_report=false",
    "wandb.mode=off",
    "model.encoder.dim=32",
    "model.encoder.num_heads=2",
    "model.encoder.depth=3",
    "model.encoder.moe.expert_hidden_dim=24",
    "batch.global_batch_size=32",
    "batch.balance_loss_group_size=8",
    "batch.capacity_group_size=4",
    "optim.warmup_steps=3",
    "optim.max_grad_norm=0.3",
    "optim.lr=2e-3",
    "optim.lamb=false",
    "baseline=none",
]
OF_TEXTS = ["model.vocabulary_size=600", "model.embedding_dim=16", "model.max_tokens=24"]


def tiny_images(*more: str) -> Config:
    """Returns the image demo with small numbers: noise, dropout, drops, clipping and
    augmentation on."""
    return override(get("widenet_demo"), [*ENCODER, "data.crop=pad", "data.mixup=0.5", *more])


def tiny_pretraining(*more: str) -> Config:
    return override(
        get("widenet_text_4"), [*ENCODER, *OF_TEXTS, "model.encoder.dropout=0.1", *more]
    )


def tiny_sentences(*more: str) -> Config:
    return override(get("widenet_text_demo"), [*ENCODER, *OF_TEXTS, *more])


class Run:
    """A config on the mesh of the ranks that have joined, and its steps."""

    def __init__(self, config: Config) -> None:
        self.training = set_up(config, read_ds_config(config), meshes.build_mesh(config.mesh.ep))
        self.config, self.mesh, self.layout = config, self.training.mesh, self.training.layout
        self.task, self.model, self.engine = (
            self.training.task,
            self.training.model,
            self.training.engine,
        )
        self.optimizer = self.engine.optimizer
        self.losses: list[float] = []
        self.norms: list[float] = []

    def steps(self, first: int, last: int) -> "Run":
        """Optimizer steps first + 1 .. last."""
        for step in range(first + 1, last + 1):
            meter = MetricAccumulator(self.mesh, self.task)
            for _, sums, stats in train_step(self.training, step):
                meter.add(sums, stats)
            self.losses.append(meter.reduce_and_reset()["train/loss"])
            self.norms.append(self.optimizer.norm)
        return self

    def save(self, folder: Path, step: int, state: dict[str, Any] | None = None) -> None:
        """A checkpoint in the run folder `folder`."""
        Saver(folder, self.engine, self.task, self.mesh, config=to_json(self.config)).save(
            step, state or {}
        )

    def load(self, folder: Path) -> None:
        """The newest whole one of it."""
        checkpoint, refused = newest_complete(folder, self.mesh.checkpoint_group)
        assert not refused
        load(checkpoint, self.engine, self.task, self.mesh)

    def weights(self) -> dict[str, torch.Tensor]:
        """Whole masters by name, experts stacked by global id, and rows."""
        return {name: t.clone() for name, t in whole_weights(self.training).items()}
