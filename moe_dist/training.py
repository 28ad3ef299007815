"""A config on a mesh, ready to train, and one step of it: what train.py, verify.py, the benchmarks and tests share."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from moe_dist.config import Config
from moe_dist.data.text import Vocabulary
from moe_dist.engine import Engine, compute_dtype
from moe_dist.layer import LayerStats
from moe_dist.optim import learning_rate
from moe_dist.parallel.mesh import Layout, Mesh, lay_out
from moe_dist.parallelize import ParallelModel, parallelize
from moe_dist.tasks import TASKS, Batch


@dataclass(frozen=True)
class Training:
    """Everything that a step needs."""

    config: Config
    mesh: Mesh
    layout: Layout
    task: Any
    model: ParallelModel
    engine: Engine


def set_up(config: Config, ds: dict[str, Any], mesh: Mesh, vocabulary: Vocabulary | None = None) -> Training:
    """`ds`: the DeepSpeed config of `engine.read_ds_config`; `vocabulary`: of the run that goes on. A collective.

    Raises ValueError, on every rank, for what does not fit together.
    """
    layout, dtype = lay_out(config, mesh.dp.size), compute_dtype(ds)
    task = TASKS[config.task](config, layout, mesh, vocabulary)
    model = parallelize(task.plain_model(config), mesh, config.seed, dtype)
    engine = Engine(model, config.optim, ds, layout, mesh)
    task.start(dtype)
    return Training(config, mesh, layout, task, model, engine)


def train_step(training: Training, step: int) -> Iterator[tuple[Batch, torch.Tensor, dict[str, LayerStats]]]:
    """Optimizer step `step` (from 1): yields each micro-batch of this rank after its backward, with its summed nll
    (nats) and its layers' statistics. The update comes with the last one's backward."""
    task, engine = training.task, training.engine
    engine.optimizer.begin(learning_rate(training.config.optim, step))
    batches = list(task.batches(step - 1))
    words = task.words(batches)
    for batch in batches:
        loss, nll, stats = task.loss(engine, batch, words)
        engine.backward(loss)
        yield batch, nll, stats
