"""Perplexity of a split, the same on every layout."""

from typing import Any

import torch

from moe_dist.meter import Meter
from moe_dist.parallel.mesh import Mesh


@torch.no_grad()
def evaluate(engine: Any, task: Any, split: str, mesh: Mesh) -> dict[str, Any]:
    """{"SPLIT/loss": nats per word, "SPLIT/perplexity"}. A collective: all ranks must call it."""
    meter = Meter(mesh, task.layout)
    training = task.state
    task.start(training[0][0][0].dtype)
    for batches in task.evaluation(split):
        words = task.words(batches)
        for batch in batches:
            _, nll, stats = task.loss(engine, batch, words)
            meter.add(nll, batch.ctx.valid_T.sum(), stats)
    task.state = training
    return meter.read(split)
