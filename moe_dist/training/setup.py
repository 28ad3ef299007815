"""A config on a mesh, ready to train, and one step of it: what train.py, verify.py, the benchmarks and tests share."""

import dataclasses
import sys
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import record_function

from moe_dist.checkpoint.distributed import load_matching_weights
from moe_dist.checkpoint.format import read_state
from moe_dist.checkpoint.manifest import newest_complete
from moe_dist.config.overrides import dotted_keys
from moe_dist.config.schema import Config
from moe_dist.data import fingerprint
from moe_dist.data.class_names import preview_names
from moe_dist.distributed.batch_layout import BatchLayout, make_batch_layout
from moe_dist.distributed.collectives import run_on_main
from moe_dist.distributed.mesh import Mesh
from moe_dist.engine.deepspeed import Engine
from moe_dist.engine.ds_config import compute_dtype
from moe_dist.engine.parallelize import ParallelModel, parallelize
from moe_dist.moe.layer import LayerStats
from moe_dist.optim.lr_schedule import learning_rate
from moe_dist.tasks.registry import task_of
from moe_dist.tasks.task import Batch, Task
from moe_dist.training.nan_detector import NonFiniteDetector


@dataclass(frozen=True)
class Training:
    """Everything that a step needs."""

    config: Config
    mesh: Mesh
    layout: BatchLayout
    task: Task
    model: ParallelModel
    engine: Engine
    nan_detector: NonFiniteDetector
    metadata: dict[str, Any]  # of the task and its data; checkpoints keep it


def set_up(
    config: Config,
    ds: dict[str, Any],
    mesh: Mesh,
    metadata: dict[str, Any] | None = None,
    *,
    resumed: bool = False,
    explicit: Collection[str] = (),
    allow_changed_data: bool = False,
    on_config: Callable[[Config], None] = lambda config: None,
) -> Training:
    """Opens the data, and builds the model and the engine. A collective.

    Args:
        config: The config of the run.
        ds: The DeepSpeed config of `engine.read_ds_config`.
        mesh: The ranks.
        known: `Training.metadata` of an earlier call with the same config.
        resumed: Whether `known` is that of an earlier run, whose weights will be loaded, whose config is kept as it is,
            and whose data must be the same. Otherwise weights begin as `config.init` says.
        explicit: Dotted keys of the config that are not taken from the data.
        allow_changed_data: Whether an earlier run goes on with other data.
        settle: Is called with the config as the data determines it, before the model is built; may raise ValueError.

    Returns:
        Everything that a step needs, with the config as the data determines it.

    Raises:
        ValueError: On every rank, parts do not fit together, or the data is not that of the earlier run.
    """
    layout, dtype = make_batch_layout(config, mesh.dp.size), compute_dtype(ds)
    first = None if resumed or config.init_from is None else _initial(config.init_from, mesh)
    before = metadata or (read_state(first) if first else None)
    task = task_of(config)(
        config, layout, mesh, before, dotted_keys(config) if resumed else explicit
    )
    config = task.config
    if metadata is None and mesh.is_main:
        for note in task.notes:
            print(f"note: {note}", flush=True)
    on_config(config)
    data = _fingerprint(task, config, mesh, metadata, resumed, allow_changed_data)
    was, classes = ((each or {}).get("classes") for each in (before, task.checkpoint_metadata()))
    if resumed:
        check_classes(was, classes)
    model = parallelize(task.build_model(config), mesh, config.seed, dtype, config.mesh)
    finite = NonFiniteDetector(model.module, mesh)
    engine = Engine(model, config.optim, ds, layout, mesh)
    if first:
        num_taken, new = load_matching_weights(
            first, engine, mesh, ("head.",) if read_state(first).get("classes") != classes else ()
        )
        if mesh.is_main and metadata is None:
            print(
                f"note: {num_taken} of {num_taken + len(new)} weights are those of {first}",
                end="",
                flush=True,
            )
            print(f"; not there, or of another shape: {_told(new)}" if new else "", flush=True)
    task.reset_state(dtype)
    return Training(
        config,
        mesh,
        layout,
        task,
        model,
        engine,
        finite,
        task.checkpoint_metadata() | {"data": data},
    )


def _fingerprint(
    task: Task, config: Config, mesh: Mesh, known: dict[str, Any] | None, resumed: bool, allow: bool
) -> dict[str, Any]:
    """Returns the fingerprint of the data for checkpoints, where it is that of the earlier run. A collective."""
    kept = (known or {}).get("data")
    if kept is not None and not resumed:
        return kept
    field = dataclasses.fields(config.data)[0].name  # names the place of the data
    place = f"data.{field}={getattr(config.data, field)!r}"
    data, note = run_on_main(
        lambda: fingerprint.check_unchanged(task.data_source(), kept, place, allow),
        mesh.checkpoint_group,
    )
    if resumed and kept is None:
        note = f"the checkpoint has no fingerprint of its data: whether {place} is the same cannot be told"
    if note and mesh.is_main:
        print(f"note: {note}", flush=True)
    return data


def _initial(run: str, mesh: Mesh) -> Path:
    """The checkpoint of `config.init`; says which were refused."""
    try:
        checkpoint, refused = newest_complete(Path(run), mesh.checkpoint_group)
    except ValueError as error:
        raise ValueError(f"init_from={run}: {error}") from None
    for reason in refused.values() if mesh.is_main else ():
        print(
            f"warning: {reason}. Refused; beginning with {checkpoint.name}",
            file=sys.stderr,
            flush=True,
        )
    return checkpoint


def check_classes(was: list[str] | None, now: list[str] | None) -> None:
    """Raises ValueError where a run that goes on was trained on other classes. `was`: None where it kept none."""
    if was not in (None, now):
        raise ValueError(
            f"the run was trained on classes {_told(was)}, and its data has {_told(now or [])} now"
        )


def _told(classes: Any) -> str:
    return f"{preview_names(classes)} ({len(classes)})"


def train_step(
    training: Training, step: int
) -> Iterator[tuple[Batch, dict[str, torch.Tensor], dict[str, LayerStats]]]:
    """Optimizer step `step` (from 1): yields each micro-batch of this rank after its backward, with its sums and its
    layers' statistics. The update comes with the last one's backward.

    Raises FloatingPointError, on every rank, where too many steps in a row have been skipped (`finite`)."""
    config, task, engine = training.config, training.task, training.engine
    training.mesh.flight_recorder.step = step
    training.nan_detector.start_step()
    engine.optimizer.start_step(learning_rate(config.optim, step, config.steps))
    with record_function("data"):
        batches = list(task.batches(step - 1))
        total = task.loss_denominator(batches)
    for batch in batches:
        training.mesh.flight_recorder.enter_phase("forward")
        with record_function("forward"):
            loss, sums, stats = task.loss(engine, batch, total)
            training.nan_detector.watch("the loss", loss)
        training.mesh.flight_recorder.enter_phase("backward")
        with record_function("backward and update"):
            engine.backward(loss)
        yield batch, sums, stats
    training.nan_detector.end_step(
        step, engine.optimizer, config.optim.max_consecutive_skipped_steps
    )
