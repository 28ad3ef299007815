"""A config on a mesh, ready to train, and one step of it: what train.py, verify.py, the benchmarks and tests share."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_dist.checkpoint.manifest import newest_whole
from moe_dist.checkpoint.whole import take_weights
from moe_dist.config import Config
from moe_dist.engine import Engine, compute_dtype
from moe_dist.layer import LayerStats
from moe_dist.optim import learning_rate
from moe_dist.parallel.mesh import Layout, Mesh, lay_out
from moe_dist.parallelize import ParallelModel, parallelize
from moe_dist.tasks import Batch, Task, task_of


@dataclass(frozen=True)
class Training:
    """Everything that a step needs."""

    config: Config
    mesh: Mesh
    layout: Layout
    task: Task
    model: ParallelModel
    engine: Engine


def set_up(config: Config, ds: dict[str, Any], mesh: Mesh, saved: dict[str, Any] | None = None) -> Training:
    """`ds`: the DeepSpeed config of `engine.read_ds_config`; `saved`: what the task of the run that goes on `known`. A
    collective.

    Raises ValueError, on every rank, for what does not fit together.
    """
    layout, dtype = lay_out(config, mesh.dp.size), compute_dtype(ds)
    task = task_of(config)(config, layout, mesh, saved)
    model = parallelize(task.plain_model(config), mesh, config.seed, dtype)
    if config.init and saved is None:
        _begin_from(Path(config.init), model, mesh)
    engine = Engine(model, config.optim, ds, layout, mesh)
    task.start(dtype)
    return Training(config, mesh, layout, task, model, engine)


def _begin_from(run: Path, model: ParallelModel, mesh: Mesh) -> None:
    """Takes the weights of another run where they are the same, and says which are not."""
    checkpoint, _ = newest_whole(run, mesh.files)
    rows = {name: p for table in model.rows.values() for name, p in table.items()}
    parameters = {name: (p, slice(None)) for name, p in [*model.dense.named_parameters(), *rows.items()]}
    for name, p in (model.experts | model.gates).items():
        mine = mesh.my_experts(len(p) * mesh.ep.size)
        parameters[name] = (p, slice(mine.start, mine.stop))
    others = take_weights(checkpoint, parameters)
    if mesh.is_main:
        print(f"note: weights of {checkpoint}, but new: {', '.join(others) or 'none'}", flush=True)


def train_step(training: Training, step: int) -> Iterator[tuple[Batch, dict[str, torch.Tensor], dict[str, LayerStats]]]:
    """Optimizer step `step` (from 1): yields each micro-batch of this rank after its backward, with its sums and its
    layers' statistics. The update comes with the last one's backward."""
    config, task, engine = training.config, training.task, training.engine
    engine.optimizer.begin(learning_rate(config.optim, step, config.steps))
    batches = list(task.batches(step - 1))
    total = task.total(batches)
    for batch in batches:
        loss, sums, stats = task.loss(engine, batch, total)
        engine.backward(loss)
        yield batch, sums, stats
