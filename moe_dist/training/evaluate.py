"""Evaluates splits; the result is the same on every layout."""

from typing import Any

import torch

from moe_dist.distributed.mesh import Mesh
from moe_dist.engine.deepspeed import Engine
from moe_dist.tasks.task import Task
from moe_dist.training.metric_accumulator import MetricAccumulator


@torch.no_grad()
def evaluate(engine: Engine, task: Task, split: str, mesh: Mesh) -> dict[str, Any]:
    """Evaluates a split. A collective.

    Args:
        engine: The model.
        task: Its task.
        split: Name of the split.
        mesh: The ranks.

    Returns:
        "SPLIT/loss" and the task's other metrics by key.
    """
    mesh.flight_recorder.enter_phase("evaluation")
    accumulator = MetricAccumulator(mesh, task)
    for batches in task.eval_batches(split):
        denominator = task.loss_denominator(batches)
        for batch in batches:
            _, sums, stats = task.loss(engine, batch, denominator)
            accumulator.add(sums, stats)
    values: dict[str, Any] = dict(accumulator.reduce_and_reset(split))
    for name, value in task.finalize_eval(split).items():
        values[f"{split}/{name}"] = value
    return values


def evaluate_test(engine: Engine, task: Task, mesh: Mesh) -> dict[str, Any]:
    """Evaluates a task's test splits (two for MNLI, else one). A collective.

    Args:
        engine: The model.
        task: Its task.
        mesh: The ranks.

    Returns:
        All metrics by key.
    """
    values: dict[str, Any] = {}
    for split in task.test_splits:
        values |= evaluate(engine, task, split, mesh)
    return values
