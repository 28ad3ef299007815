"""One step of training: the learning rate, the micro-batches' forward and backward, the update."""

from collections.abc import Iterator

import torch
from torch.profiler import record_function

from moe_dist.moe.layer import LayerStats
from moe_dist.optim.lr_schedule import learning_rate
from moe_dist.tasks.task import Batch
from moe_dist.training.setup import Training


def train_step(
    training: Training, step: int
) -> Iterator[tuple[Batch, dict[str, torch.Tensor], dict[str, LayerStats]]]:
    """Runs one optimizer step; the update follows the last micro-batch's backward.

    Args:
        training: The run.
        step: Step number, from 1.

    Yields:
        Each local micro-batch after its backward, with its sums and its layers' statistics. The
        last check of the gradients follows the last yield, so exhaust the iterator.

    Raises:
        FloatingPointError: On every rank, too many steps in a row were skipped (`nan_detector`).
    """
    config = training.config
    task = training.task
    engine = training.engine
    flight_recorder = training.mesh.flight_recorder
    flight_recorder.step = step
    training.nan_detector.start_step()
    engine.optimizer.start_step(learning_rate(config.optim, step, config.steps))
    with record_function("data"):
        batches = list(task.batches(step - 1))
        denominator = task.loss_denominator(batches)
    for batch in batches:
        flight_recorder.enter_phase("forward")
        with record_function("forward"):
            loss, sums, stats = task.loss(engine, batch, denominator)
            training.nan_detector.watch("the loss", loss)
        flight_recorder.enter_phase("backward")
        with record_function("backward and update"):
            engine.backward(loss)
        yield batch, sums, stats
    max_skipped = config.optim.max_consecutive_skipped_steps
    training.nan_detector.end_step(step, engine.optimizer, max_skipped)
