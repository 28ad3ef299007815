"""Sets a config up on a mesh, ready to train: for train.py, verify, benchmarks and tests."""

import dataclasses
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe_dist.checkpoint.format import read_state
from moe_dist.checkpoint.loader import load_matching_weights
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
from moe_dist.tasks.registry import task_of
from moe_dist.tasks.task import Task
from moe_dist.training.nan_detector import NonFiniteDetector

# a classifier's head weights, not loaded from a run with other classes
HEAD_PREFIX = "head."


@dataclass(frozen=True)
class Training:
    """Everything a training step needs.

    Attributes:
        config: The config with data-determined sizes.
        mesh: The ranks.
        layout: The samples on each rank.
        task: Batches, loss and metrics.
        model: The parallel model.
        engine: Forward, backward and step.
        nan_detector: Watches the layers.
        metadata: Checkpoint entries about the task and its data (JSON).
    """

    config: Config
    mesh: Mesh
    layout: BatchLayout
    task: Task
    model: ParallelModel
    engine: Engine
    nan_detector: NonFiniteDetector
    metadata: dict[str, Any]


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
        config: The run's config.
        ds: The DeepSpeed config (`engine.ds_config.read_ds_config`).
        mesh: The ranks.
        metadata: `Training.metadata` from an earlier call with the same config.
        resumed: If True, `metadata` comes from an earlier run: its weights will be loaded, its
            config does not change, and its data must be the same. If False, weights start from
            `config.init_from`.
        explicit: Dotted config keys the data does not change.
        allow_changed_data: If True, an earlier run may continue with other data.
        on_config: Called with the data-determined config before the model is built; may raise
            ValueError.

    Returns:
        Everything a step needs.

    Raises:
        ValueError: On every rank, parts do not fit together, or the data differs from the earlier
            run's.
    """
    layout = make_batch_layout(config, mesh.dp.size)
    dtype = compute_dtype(ds)
    initial_checkpoint = None
    if config.init_from is not None and not resumed:
        initial_checkpoint = _initial_checkpoint(config.init_from, mesh)
    source_metadata = metadata
    if not source_metadata and initial_checkpoint:
        source_metadata = read_state(initial_checkpoint)
    fixed_keys = dotted_keys(config) if resumed else explicit
    task = task_of(config)(config, layout, mesh, source_metadata, fixed_keys)
    config = task.config
    if metadata is None and mesh.is_main:
        for note in task.notes:
            print(f"note: {note}", flush=True)
    on_config(config)
    data = _fingerprint(task, config, mesh, metadata, resumed, allow_changed_data)
    source_classes = (source_metadata or {}).get("classes")
    classes = task.checkpoint_metadata().get("classes")
    if resumed:
        check_classes(source_classes, classes)

    model = parallelize(task.build_model(config), mesh, config.seed, dtype, config.mesh)
    nan_detector = NonFiniteDetector(model.module, mesh)
    engine = Engine(model, config.optim, ds, layout, mesh)
    if initial_checkpoint:
        _load_initial_weights(initial_checkpoint, engine, mesh, classes, quiet=metadata is not None)
    task.reset_state(dtype)
    metadata = task.checkpoint_metadata() | {"data": data}
    return Training(config, mesh, layout, task, model, engine, nan_detector, metadata)


def _fingerprint(
    task: Task,
    config: Config,
    mesh: Mesh,
    metadata: dict[str, Any] | None,
    resumed: bool,
    allow_changed_data: bool,
) -> dict[str, Any]:
    """Computes the data's fingerprint, and compares it with an earlier one. A collective.

    Args:
        task: The task, with its data.
        config: The run's config, for the data's name in messages.
        mesh: The ranks.
        metadata: As in `set_up`.
        resumed: As in `set_up`.
        allow_changed_data: As in `set_up`.

    Returns:
        The fingerprint for checkpoints (JSON), the same on every rank. If `metadata` has one and
        `resumed` is False, it is returned without a comparison.

    Raises:
        ValueError: On every rank, the data differs from the earlier run's.
    """
    kept = (metadata or {}).get("data")
    if kept is not None and not resumed:
        return kept
    path_field = dataclasses.fields(config.data)[0].name  # contains the path or name of the data
    data_name = f"data.{path_field}={getattr(config.data, path_field)!r}"

    def compare() -> tuple[dict[str, Any], str]:
        return fingerprint.check_unchanged(task.data_source(), kept, data_name, allow_changed_data)

    data, note = run_on_main(compare, mesh.checkpoint_group)
    if resumed and kept is None:
        note = f"the checkpoint has no fingerprint, so {data_name} was not compared with its data"
    if note and mesh.is_main:
        print(f"note: {note}", flush=True)
    return data


def _initial_checkpoint(run: str, mesh: Mesh) -> Path:
    """Returns the newest complete checkpoint of `config.init_from`, prints refused ones."""
    try:
        checkpoint, refused = newest_complete(Path(run), mesh.checkpoint_group)
    except ValueError as error:
        raise ValueError(f"init_from={run}: {error}") from None
    if mesh.is_main:
        for reason in refused.values():
            warning = f"warning: {reason}. Refused; beginning with {checkpoint.name}"
            print(warning, file=sys.stderr, flush=True)
    return checkpoint


def _load_initial_weights(
    checkpoint: Path, engine: Engine, mesh: Mesh, classes: Any, quiet: bool
) -> None:
    """Loads another run's weights with equal name and shape, and prints which are new."""
    same_classes = read_state(checkpoint).get("classes") == classes
    never_loaded = () if same_classes else (HEAD_PREFIX,)
    num_loaded, new = load_matching_weights(checkpoint, engine, mesh, never_loaded)
    if quiet or not mesh.is_main:
        return
    note = f"note: {num_loaded} of {num_loaded + len(new)} weights are those of {checkpoint}"
    if new:
        note += f"; not there, or of another shape: {_shorten_list(new)}"
    print(note, flush=True)


def check_classes(source_classes: list[str] | None, classes: list[str] | None) -> None:
    """Checks if a resumed run's data still has the classes in its checkpoint.

    Args:
        source_classes: The checkpoint's classes, None if it has none.
        classes: The data's classes now.

    Raises:
        ValueError: They differ.
    """
    if source_classes is not None and source_classes != classes:
        raise ValueError(
            f"the run was trained on classes {_shorten_list(source_classes)}, and its data has "
            f"{_shorten_list(classes or [])} now"
        )


def _shorten_list(names: Sequence[str]) -> str:
    """Returns a text with some names and their number."""
    return f"{preview_names(names)} ({len(names)})"
