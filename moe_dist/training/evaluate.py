"""Measures of a split, the same on every layout."""

from typing import Any

import torch

from moe_dist.distributed.mesh import Mesh
from moe_dist.training.metric_accumulator import MetricAccumulator


@torch.no_grad()
def evaluate(engine: Any, task: Any, split: str, mesh: Mesh) -> dict[str, Any]:
    """{"SPLIT/loss", "SPLIT/MEASURE"}, what the task measures. A collective: all ranks must call it."""
    mesh.flight_recorder.enter_phase("evaluation")
    meter = MetricAccumulator(mesh, task)
    for batches in task.eval_batches(split):
        total = task.loss_denominator(batches)
        for batch in batches:
            _, sums, stats = task.loss(engine, batch, total)
            meter.add(sums, stats)
    return meter.reduce_and_reset(split) | {
        f"{split}/{name}": value for name, value in task.finalize_eval(split).items()
    }


def evaluate_test(engine: Any, task: Any, mesh: Mesh) -> dict[str, Any]:
    """Returns what `evaluate` does of all test splits of a task, which is one but for MNLI. A collective."""
    result: dict[str, Any] = {}
    for split in task.test_splits:
        result |= evaluate(engine, task, split, mesh)
    return result
