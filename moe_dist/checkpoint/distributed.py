"""A run's state, written and read by all ranks on any layout.

torch.distributed.checkpoint does it, in safetensors: nothing in them is ever executed. A checkpoint is written beside
and renamed when whole.
"""

import contextlib
import json
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from tqdm import tqdm

from moe_dist.checkpoint import manifest
from moe_dist.checkpoint.format import (
    STATE_SUFFIXES,
    check_shape,
    check_values,
    is_finite,
    read_state,
    tensor_index,
)
from moe_dist.checkpoint.upcycle import Upcycling
from moe_dist.config.run_folder import PARTIAL, make_folder, remove, write
from moe_dist.distributed.collectives import Group, all_gather_objects, run_on_main
from moe_dist.distributed.mesh import Mesh
from moe_dist.engine.deepspeed import Engine
from moe_dist.optim.expert_state import ShardedExpertParam
from moe_dist.optim.optimizer import Optimizer

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

EXIT_TIMEOUT_S = (
    60  # that an end by Ctrl-C or an exception waits for a checkpoint in the background
)


class Saver:
    """Writes the checkpoints of a run. One that cannot be written is told on stderr, and the run goes on: those before
    it stay. Left by an exception it waits for what is being written."""

    def __init__(
        self,
        run: Path,
        engine: Engine,
        task: Any,
        mesh: Mesh,
        keep: int = 1,
        in_background: bool = False,
        refused: Iterable[Path] = (),
        config: str | None = None,
        restore: Callable[[], None] = lambda: None,
    ) -> None:
        """Removes what killed runs left half written.

        Args:
            run: The run folder.
            engine: Parameters and optimizer.
            task: An object with `save_state`, a `tasks.Task`.
            mesh: The ranks, all of which save together.
            keep: Checkpoints that stay, not counting those `refused`.
            in_background: Training goes on while a copy of the state, in the memory of the host, is being written.
            refused: Checkpoints that are never removed to make room.
            config: The run's config (JSON), of which each checkpoint keeps a copy.
            restore: Is called on the main rank before anything is written; makes the run folder again where it has been
                removed, or raises OSError.
        """
        self.run, self.engine, self.task, self.mesh = run, engine, task, mesh
        self.config, self.restore = config, restore
        self.keep, self.in_background, self.refused = keep, in_background, set(refused)
        self.failed = False  # the last one
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None
        if mesh.is_main:
            manifest.remove_partial(run)

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Writes a checkpoint after `step` steps, with `state` (JSON). A collective."""
        self.finish()
        tensors = self._tensors()
        optimizer = self.engine.optimizer
        state = {
            "step": step,
            "updates": optimizer.updates,
            "previous_norm": optimizer.previous_norm,
            **state,
        }
        self._writing = self._thread.submit(
            self._write, manifest.folder(self.run, step), tensors, state
        )
        if not self.in_background:
            self.finish()

    def finish(self) -> None:
        """Waits for what is being written. A collective."""
        if self._writing is None:
            return
        error, self._writing = self._writing.exception(), None
        self.failed = error is not None
        if isinstance(error, OSError):
            if self.mesh.is_main:
                tqdm.write(f"warning: {error}; earlier checkpoints are whole", file=sys.stderr)
        elif error:
            raise error

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        if self._writing is not None:
            wait([self._writing], EXIT_TIMEOUT_S)

    def _tensors(self) -> dict[str, Any]:
        """This rank's part, on CPU."""
        mesh, optimizer = self.mesh, self.engine.optimizer

        def kept(t: torch.Tensor) -> torch.Tensor:
            return t.detach().to("cpu", copy=self.in_background)

        spread = _spread_tensors(optimizer)
        tensors: dict[str, Any] = {
            key: _as_shard(kept(t), of, mesh) for key, (t, of) in spread.items()
        }
        for i, (key, t) in enumerate(self.engine.dense_state()):
            if mesh.owns_item(i):  # each rank keeps and writes a share of the whole tensors
                tensors[f"dense/{key}"] = kept(t)
        for i, (key, t) in enumerate(_row_tensors(optimizer).items()):
            if mesh.owns_item(i):
                tensors[key] = kept(t)
        for key, t in self.task.save_state().items():
            if mesh.is_main:
                tensors[f"task/{key}"] = kept(t)
        return tensors

    def _write(self, final: Path, tensors: dict[str, Any], state: dict[str, Any]) -> None:
        """A collective, in a thread and a group of ranks of its own. Raises OSError on every rank."""
        import torch.distributed.checkpoint as dcp  # here: see the package's docstring

        group, partial = self.mesh.checkpoint_group, final.with_name(f"{PARTIAL}{final.name}")
        name = f"{manifest.FOLDER}/{partial.name}"
        texts = {manifest.STATE: json.dumps(state)} | (
            {manifest.CONFIG: self.config} if self.config else {}
        )

        def begin() -> None:
            self.restore()
            remove(self.run, name)
            make_folder(self.run, name)
            for file, text in texts.items():
                write(partial, file, text)

        try:
            _check_finite(tensors, group)
            run_on_main(begin, group)
            writer = dcp.HuggingFaceStorageWriter(str(partial), save_distributed=True)
            dcp.save(tensors, storage_writer=writer, process_group=group)
            self.mesh.flight_recorder.enter_phase("save")
            mine = sorted(partial.glob(f"shard-{self.mesh.dp.index + 1:05d}-*"))
            mine += [partial / file for file in texts] if self.mesh.is_main else []
            manifest.seal(partial, mine, final, group)
        except (
            OSError,
            dcp.CheckpointException,
        ) as error:  # of every rank, though one alone may have failed
            run_on_main(lambda: _try_to_remove(self.run, name), group)
            reasons = (
                [f[0] for f in error.failures.values()]
                if isinstance(error, dcp.CheckpointException)
                else [error]
            )
            if not all(isinstance(reason, OSError | SafetensorError) for reason in reasons):
                raise  # no fault of a disk
            raise OSError(f"{final} cannot be written ({reasons[0]})") from None
        self.refused.discard(final)
        # together, for others wait in a step for one that deletes as long as for any other
        run_on_main(lambda: manifest.prune(self.run, self.keep, self.refused), group)


def load(
    checkpoint: Path, engine: Engine, task: Any, mesh: Mesh, growth: Upcycling | None = None
) -> None:
    """Fills parameters, masters, optimizer state and the task's state, on any layout. A collective.

    The engine may have made steps: nothing of them is left.

    Raises:
        ValueError: On every rank, before anything is filled: a file is broken, or a tensor, which is named, is missing,
            overlaps, is not finite or has another shape or dtype.
    """
    import torch.distributed.checkpoint as dcp  # here: see the package's docstring

    optimizer, state = engine.optimizer, read_state(checkpoint)
    spread = _spread_tensors(optimizer)
    outside = {key: t for key, (t, _) in spread.items()} | _row_tensors(optimizer)
    on_cpu = {
        key: t.cpu() for key, t in outside.items()
    }  # the tensor itself where it is there already
    dense = engine.empty_dense_state()
    task_state = {key: torch.empty_like(t, device="cpu") for key, t in task.save_state().items()}
    tensors: dict[str, Any] = on_cpu | {
        key: _as_shard(on_cpu[key], of, mesh) for key, (_, of) in spread.items()
    }
    tensors |= {f"dense/{k}": t for k, t in dense.items()} | {
        f"task/{k}": t for k, t in task_state.items()
    }
    kept = tensor_index(checkpoint)
    made = {
        key: growth.smaller(t, kept[key].size, mesh)
        for key, t in tensors.items()
        if growth and key in kept and (key in spread or ".gate." in key)
    }
    smaller = {key: t for key, t in made.items() if t is not None}
    for key, tensor in (tensors | smaller).items():
        check_shape(checkpoint, kept, key, tensor)
    check_values(checkpoint, tensors, mesh.checkpoint_group)
    reader = dcp.HuggingFaceStorageReader(str(checkpoint))
    dcp.load(tensors | smaller, storage_reader=reader, process_group=mesh.checkpoint_group)
    for key, t in smaller.items():
        mine = _global_rows(spread[key][1], mesh) if key in spread else range(0)
        assert growth
        growth.fill(tensors[key], t, mine, key, perturb=not key.endswith(STATE_SUFFIXES))
    for key, t in outside.items():
        t.copy_(on_cpu[key])
    optimizer.updates = state["updates"]
    optimizer.previous_norm = state["previous_norm"]
    engine.load_dense_state(dense, optimizer.updates)
    optimizer.round_masters()
    task.load_state(task_state)


def load_matching_weights(
    checkpoint: Path, engine: Engine, mesh: Mesh, new: tuple[str, ...] = ()
) -> tuple[int, list[str]]:
    """Takes the weights that a checkpoint has by name and in the whole shape, on any layout. A collective.

    Args:
        checkpoint: The checkpoint.
        engine: A new engine; what is not taken stays as it is.
        mesh: The ranks.
        new: Beginnings of names that are never taken.

    Returns:
        The number of weights that were taken, and the names of the others.

    Raises:
        ValueError: On every rank, before anything is filled: a file is broken, there is no weight to take, or one,
            which is named, overlaps, is not finite or has another dtype.
    """
    import torch.distributed.checkpoint as dcp  # here: see the package's docstring

    optimizer = engine.optimizer
    spread = _spread_tensors(optimizer)
    outside = {key: t for key, (t, _) in spread.items()} | _row_tensors(optimizer)
    on_cpu = {key: t.cpu() for key, t in outside.items()}
    dense = {f"dense/{key}": t.to("cpu", copy=True) for key, t in engine.dense_state()}
    tensors: dict[str, Any] = on_cpu | dense
    tensors |= {key: _as_shard(on_cpu[key], of, mesh) for key, (_, of) in spread.items()}
    shapes = {key: tuple(each.size) for key, each in tensor_index(checkpoint).items()}
    weights = {key: t for key, t in tensors.items() if not key.endswith(STATE_SUFFIXES)}
    taken = {
        key: t
        for key, t in weights.items()
        if shapes.get(key) == tuple(t.shape) and not key.partition("/")[2].startswith(new)
    }
    if not taken:
        raise ValueError(
            f"{checkpoint}: no weight has the name and the shape of one of this model's"
        )
    check_values(checkpoint, taken, mesh.checkpoint_group)
    dcp.load(
        taken,
        storage_reader=dcp.HuggingFaceStorageReader(str(checkpoint)),
        process_group=mesh.checkpoint_group,
    )
    for key, t in outside.items():
        t.copy_(on_cpu[key])
    engine.load_dense_state(
        {key.removeprefix("dense/"): t for key, t in dense.items()}, optimizer.updates
    )
    optimizer.round_masters()
    return len(taken), [key.partition("/")[2] for key in weights if key not in taken]


def _check_finite(tensors: dict[str, Any], group: Group) -> None:
    """Raises OSError, on every rank, for a tensor that is not finite: nothing could go on from it. A collective."""
    from torch.distributed.tensor import DTensor  # here: see the package's docstring

    mine = [
        key
        for key, t in tensors.items()
        if not is_finite(t.to_local() if isinstance(t, DTensor) else t)
    ]
    if wrong := sorted({key for of_rank in all_gather_objects(mine, group) for key in of_rank}):
        more = f", as do {len(wrong) - 1} more" if wrong[1:] else ""
        raise OSError(f"{wrong[0]!r} holds NaN or infinity{more}")


def _try_to_remove(run: Path, name: str) -> None:
    with contextlib.suppress(OSError):
        remove(run, name)


def _spread_tensors(optimizer: Optimizer) -> dict[str, tuple[torch.Tensor, ShardedExpertParam]]:
    """What belongs to experts and groups: of each global stack the rows that this rank owns, and whose they are."""
    return {
        f"{kind}/{name}{ending}": (t, state)
        for kind, states in (("experts", optimizer.experts), ("gates", optimizer.gates))
        for name, state in states.items()
        for ending, t in state.tensors(optimizer.updates).items()
    }


def _global_rows(of: ShardedExpertParam, mesh: Mesh) -> range:
    """Ids of the experts or groups that this rank owns."""
    first = mesh.ep.index * len(of.p)
    return range(first + of.owned.start, first + of.owned.stop)


def _as_shard(t: torch.Tensor, of: ShardedExpertParam, mesh: Mesh) -> "DTensor":
    """Returns the part of the global stack that `t` is: a stack is cut over ep and then, maybe into uneven parts, over
    its owners."""
    from torch.distributed.tensor import DTensor, Shard  # here: see the package's docstring

    whole = t.new_empty(len(of.p) * mesh.ep.size, *t.shape[1:], device="meta")
    return DTensor.from_local(
        t,
        mesh.device_mesh,
        [Shard(0), Shard(0)],
        shape=whole.shape,
        stride=whole.stride(),
        run_check=False,
    )


def _row_tensors(optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """What belongs to words, whole on every rank."""
    return {
        f"rows/{key}": t
        for table in optimizer.row_tables.values()
        for key, t in table.tensors().items()
    }
