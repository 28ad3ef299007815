"""Writes a run's state with all ranks.

torch.distributed.checkpoint stores it in safetensors files. A checkpoint is written to a partial
folder; the folder is renamed when it is complete (`checkpoint.manifest`).
"""

import contextlib
import itertools
import json
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from tqdm import tqdm

from moe_dist.checkpoint import manifest
from moe_dist.checkpoint.format import is_finite
from moe_dist.checkpoint.run_tensors import TaskState, as_shard, row_tensors, stack_tensors
from moe_dist.config.run_folder import PARTIAL, make_folder, remove, write
from moe_dist.distributed.collectives import Group, all_gather_objects, run_on_main
from moe_dist.distributed.mesh import Mesh
from moe_dist.engine.deepspeed import Engine

EXIT_TIMEOUT_S = 60  # longest wait for a background checkpoint after Ctrl-C or an exception


class Saver:
    """Writes a run's checkpoints.

    If a checkpoint cannot be written (for example, on a full disk, or because a value is NaN or
    infinity), a warning is printed to stderr and the run continues; earlier checkpoints stay. As a
    context manager it waits on exit, also after an exception, for an unfinished checkpoint.

    Attributes:
        failed: True if the last checkpoint could not be written.
    """

    def __init__(
        self,
        run: Path,
        engine: Engine,
        task: TaskState,
        mesh: Mesh,
        keep: int = 1,
        in_background: bool = False,
        refused: Iterable[Path] = (),
        config: str | None = None,
        restore: Callable[[], None] = lambda: None,
    ) -> None:
        """Removes partial checkpoints from killed runs.

        Args:
            run: The run folder.
            engine: The engine, with parameters and optimizer.
            task: The task; its `save_state` returns its tensors.
            mesh: The ranks; all of them save.
            keep: Number of newest checkpoints to keep, not counting `refused`.
            in_background: If True, copies the state to host memory and writes the copy in a thread,
                while training continues.
            refused: Damaged checkpoints; they are never removed to make room.
            config: The run's config as JSON; each checkpoint has a copy.
            restore: Called on the main rank before anything is written. It creates the run folder
                again if it was removed, or raises OSError.
        """
        self.run = run
        self.engine = engine
        self.task = task
        self.mesh = mesh
        self.keep = keep
        self.in_background = in_background
        self.refused = set(refused)
        self.config = config
        self.restore = restore
        self.failed = False
        self._thread = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None
        if mesh.is_main:
            manifest.remove_partial(run)

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Writes a checkpoint, after the previous one is finished. A collective.

        Args:
            step: Number of steps so far.
            state: Further values for state.json.
        """
        self.finish()
        tensors = self._local_tensors()
        optimizer = self.engine.optimizer
        state = {
            "step": step,
            "updates": optimizer.updates,
            "previous_norm": optimizer.previous_norm,
            **state,
        }
        final = manifest.folder(self.run, step)
        self._writing = self._thread.submit(self._write, final, tensors, state)
        if not self.in_background:
            self.finish()

    def finish(self) -> None:
        """Waits until the current checkpoint is written or has failed. A collective."""
        if self._writing is None:
            return
        error = self._writing.exception()
        self._writing = None
        self.failed = error is not None
        if isinstance(error, OSError):
            if self.mesh.is_main:
                tqdm.write(f"warning: {error}; earlier checkpoints are intact", file=sys.stderr)
        elif error:
            raise error

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        if self._writing is not None:
            wait([self._writing], EXIT_TIMEOUT_S)

    def _local_tensors(self) -> dict[str, Any]:
        """Returns this rank's tensors to write, by key, on CPU. A collective."""
        mesh = self.mesh
        optimizer = self.engine.optimizer

        def to_cpu(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.detach().to("cpu", copy=self.in_background)

        tensors: dict[str, Any] = {}
        for key, (tensor, param) in stack_tensors(optimizer).items():
            tensors[key] = as_shard(to_cpu(tensor), param, mesh)
        # Every rank has all dense tensors and all rows; each rank writes a share.
        for i, (key, tensor) in enumerate(self.engine.dense_state()):
            if mesh.owns_item(i):
                tensors[f"dense/{key}"] = to_cpu(tensor)
        for i, (key, tensor) in enumerate(row_tensors(optimizer).items()):
            if mesh.owns_item(i):
                tensors[key] = to_cpu(tensor)
        for key, tensor in self.task.save_state().items():
            if mesh.is_main:
                tensors[f"task/{key}"] = to_cpu(tensor)
        return tensors

    def _write(self, final: Path, tensors: dict[str, Any], state: dict[str, Any]) -> None:
        """Writes one checkpoint; raises OSError on every rank if any rank cannot write.

        A collective. It runs in a thread, on a separate process group.
        """
        import torch.distributed.checkpoint as dcp  # in the call: see the package's docstring

        group = self.mesh.checkpoint_group
        partial = final.with_name(f"{PARTIAL}{final.name}")
        partial_name = f"{manifest.FOLDER}/{partial.name}"
        texts = {manifest.STATE: json.dumps(state)}
        if self.config:
            texts[manifest.CONFIG] = self.config

        def prepare_folder() -> None:
            self.restore()
            remove(self.run, partial_name)
            make_folder(self.run, partial_name)
            for name, text in texts.items():
                write(partial, name, text)

        try:
            _check_finite(tensors, group)
            run_on_main(prepare_folder, group)
            writer = dcp.HuggingFaceStorageWriter(str(partial), save_distributed=True)
            dcp.save(tensors, storage_writer=writer, process_group=group)
            self.mesh.flight_recorder.enter_phase("save")
            written = sorted(partial.glob(f"shard-{self.mesh.dp.index + 1:05d}-*"))
            if self.mesh.is_main:
                written += [partial / name for name in texts]
            manifest.seal(partial, written, final, group)
        except (OSError, dcp.CheckpointException) as error:  # on every rank, if one has failed
            run_on_main(lambda: _try_to_remove(self.run, partial_name), group)
            reasons: list[BaseException] = [error]
            if isinstance(error, dcp.CheckpointException):
                reasons = [failure[0] for failure in error.failures.values()]
            if not all(isinstance(reason, OSError | SafetensorError) for reason in reasons):
                raise  # a programming error, not a disk failure
            raise OSError(f"{final} cannot be written ({reasons[0]})") from None
        self.refused.discard(final)
        # All ranks wait for the removal: a main rank that removes files during a step would delay
        # the others there.
        run_on_main(lambda: manifest.prune(self.run, self.keep, self.refused), group)


def _check_finite(tensors: dict[str, Any], group: Group) -> None:
    """Raises OSError on every rank if a tensor is not finite: no run could continue from it."""
    from torch.distributed.tensor import DTensor  # in the call: see the package's docstring

    local: list[str] = []
    for key, tensor in tensors.items():
        if not is_finite(tensor.to_local() if isinstance(tensor, DTensor) else tensor):
            local.append(key)
    invalid = sorted(set(itertools.chain.from_iterable(all_gather_objects(local, group))))
    if invalid:
        first, *others = invalid
        more = f", as do {len(others)} more" if others else ""
        raise OSError(f"{first!r} contains NaN or infinity{more}")


def _try_to_remove(run: Path, name: str) -> None:
    """Removes a folder in a run folder if possible."""
    with contextlib.suppress(OSError):
        remove(run, name)
