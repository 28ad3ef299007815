"""Writes and reads a run's state with all ranks, on any layout.

torch.distributed.checkpoint stores it in safetensors files; reading them executes no code. A
checkpoint is written to a partial folder; the folder is renamed when it is complete.
"""

import contextlib
import itertools
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

EXIT_TIMEOUT_S = 60  # longest wait for a background checkpoint after Ctrl-C or an exception


class Saver:
    """Writes a run's checkpoints.

    If a checkpoint cannot be written (for example, on a full disk), a warning is printed to stderr
    and the run continues; earlier checkpoints stay. As a context manager it waits on exit, also
    after an exception, for an unfinished checkpoint.

    Attributes:
        failed: True if the last checkpoint could not be written.
    """

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
        for key, (tensor, param) in _stack_tensors(optimizer).items():
            tensors[key] = _as_shard(to_cpu(tensor), param, mesh)
        # Every rank has all dense tensors and all rows; each rank writes a share.
        for i, (key, tensor) in enumerate(self.engine.dense_state()):
            if mesh.owns_item(i):
                tensors[f"dense/{key}"] = to_cpu(tensor)
        for i, (key, tensor) in enumerate(_row_tensors(optimizer).items()):
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


def load(
    checkpoint: Path, engine: Engine, task: Any, mesh: Mesh, growth: Upcycling | None = None
) -> None:
    """Loads a run's complete state, on any layout. A collective.

    It fills parameters, float32 masters, optimizer state and the task's state. It overwrites all
    state from earlier steps.

    Args:
        checkpoint: A complete checkpoint's folder.
        engine: The engine, changed in place.
        task: The task; its state is changed in place.
        mesh: The ranks.
        growth: Upcycling, if the engine has more experts than the checkpoint.

    Raises:
        ValueError: On every rank, before anything is changed: a file is damaged; or a tensor is
            missing, has overlapping parts, is not finite, or has another shape or dtype. The
            message has its key.
    """
    import torch.distributed.checkpoint as dcp  # in the call: see the package's docstring

    optimizer = engine.optimizer
    state = read_state(checkpoint)
    unmanaged = _UnmanagedTensors(optimizer, mesh)
    dense = engine.empty_dense_state()
    task_state = {key: torch.empty_like(t, device="cpu") for key, t in task.save_state().items()}
    wanted = dict(unmanaged.to_read)
    wanted |= {f"dense/{key}": tensor for key, tensor in dense.items()}
    wanted |= {f"task/{key}": tensor for key, tensor in task_state.items()}
    index = tensor_index(checkpoint)

    smaller: dict[str, Any] = {}  # tensors with fewer experts in the checkpoint
    if growth:
        for key, tensor in wanted.items():
            if key in index and (key in unmanaged.owned_ids or ".gate." in key):
                saved = growth.empty_saved(tensor, index[key].size, mesh)
                if saved is not None:
                    smaller[key] = saved
    to_read = wanted | smaller
    for key, tensor in to_read.items():
        check_shape(checkpoint, index, key, tensor)
    check_values(checkpoint, wanted, mesh.checkpoint_group)
    reader = dcp.HuggingFaceStorageReader(str(checkpoint))
    dcp.load(to_read, storage_reader=reader, process_group=mesh.checkpoint_group)

    for key, saved in smaller.items():
        assert growth
        owned = unmanaged.owned_ids.get(key, range(0))
        is_weight = not key.endswith(STATE_SUFFIXES)
        growth.fill(wanted[key], saved, owned, key, perturb=is_weight)
    unmanaged.copy_from_cpu()
    optimizer.updates = state["updates"]
    optimizer.previous_norm = state["previous_norm"]
    engine.load_dense_state(dense, optimizer.updates)
    optimizer.round_masters()
    task.load_state(task_state)


def load_matching_weights(
    checkpoint: Path, engine: Engine, mesh: Mesh, new: tuple[str, ...] = ()
) -> tuple[int, list[str]]:
    """Loads the weights with equal name and complete shape, on any layout. A collective.

    Args:
        checkpoint: A complete checkpoint's folder.
        engine: A new engine. Other weights stay as they are.
        mesh: The ranks.
        new: Name prefixes that are never loaded, such as ("head.",).

    Returns:
        The number of loaded weights, and the other weights' names.

    Raises:
        ValueError: On every rank, before anything is changed: a file is damaged, no weight matches,
            or a matching weight has overlapping parts, is not finite or has another dtype. The
            message has its key.
    """
    import torch.distributed.checkpoint as dcp  # in the call: see the package's docstring

    optimizer = engine.optimizer
    unmanaged = _UnmanagedTensors(optimizer, mesh)
    dense = {key: tensor.to("cpu", copy=True) for key, tensor in engine.dense_state()}
    wanted = dict(unmanaged.to_read)
    wanted |= {f"dense/{key}": tensor for key, tensor in dense.items()}
    index = tensor_index(checkpoint)

    matching: dict[str, Any] = {}
    others: list[str] = []
    for key, tensor in wanted.items():
        if key.endswith(STATE_SUFFIXES):
            continue
        name = key.partition("/")[2]
        same_shape = key in index and tuple(index[key].size) == tuple(tensor.shape)
        if same_shape and not name.startswith(new):
            matching[key] = tensor
        else:
            others.append(name)
    if not matching:
        raise ValueError(
            f"{checkpoint}: no weight has the name and shape of a weight of this model; check that "
            f"it is a run of a similar model"
        )
    check_values(checkpoint, matching, mesh.checkpoint_group)
    reader = dcp.HuggingFaceStorageReader(str(checkpoint))
    dcp.load(matching, storage_reader=reader, process_group=mesh.checkpoint_group)

    unmanaged.copy_from_cpu()
    engine.load_dense_state(dense, optimizer.updates)
    optimizer.round_masters()
    return len(matching), others


class _UnmanagedTensors:
    """The tensors not managed by DeepSpeed, ready to be filled from a checkpoint.

    Attributes:
        to_read: The tensors on CPU, by key; this rank's rows of a stack are a DTensor.
        owned_ids: Global ids of this rank's rows, by stack key.
    """

    def __init__(self, optimizer: Optimizer, mesh: Mesh) -> None:
        """Copies the tensors to CPU, except those already there.

        Args:
            optimizer: Their optimizer.
            mesh: The ranks.
        """
        self.to_read: dict[str, Any] = {}
        self.owned_ids: dict[str, range] = {}
        self._pairs: list[tuple[torch.Tensor, torch.Tensor]] = []  # (tensor, the same on CPU)
        for key, (tensor, param) in _stack_tensors(optimizer).items():
            on_cpu = tensor.cpu()
            self.to_read[key] = _as_shard(on_cpu, param, mesh)
            self.owned_ids[key] = _owned_ids(param, mesh)
            self._pairs.append((tensor, on_cpu))
        for key, tensor in _row_tensors(optimizer).items():
            on_cpu = tensor.cpu()
            self.to_read[key] = on_cpu
            self._pairs.append((tensor, on_cpu))

    def copy_from_cpu(self) -> None:
        """Copies the values read on CPU to the optimizer's tensors."""
        for tensor, on_cpu in self._pairs:
            tensor.copy_(on_cpu)


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


def _stack_tensors(
    optimizer: Optimizer,
) -> dict[str, tuple[torch.Tensor, ShardedExpertParam]]:
    """Returns this rank's owned rows of each global stack, with their parameter, by key.

    Stacks are the weights and the optimizer state for experts and for gates inside expert groups.
    """
    tensors: dict[str, tuple[torch.Tensor, ShardedExpertParam]] = {}
    for kind, params in (("experts", optimizer.experts), ("gates", optimizer.group_gates)):
        for name, param in params.items():
            for suffix, tensor in param.tensors(optimizer.updates).items():
                tensors[f"{kind}/{name}{suffix}"] = (tensor, param)
    return tensors


def _owned_ids(param: ShardedExpertParam, mesh: Mesh) -> range:
    """Returns the global ids of this rank's owned experts or groups."""
    first = mesh.ep.index * len(param.p)
    return range(first + param.owned.start, first + param.owned.stop)


def _as_shard(tensor: torch.Tensor, param: ShardedExpertParam, mesh: Mesh) -> "DTensor":
    """Returns this rank's rows of a global stack as a DTensor.

    A stack is split over the expert-parallel ranks and then over their replicas, the owners; the
    owners' parts may differ in size.
    """
    from torch.distributed.tensor import DTensor, Shard  # in the call: see the package's docstring

    num_rows = len(param.p) * mesh.ep.size
    whole = tensor.new_empty(num_rows, *tensor.shape[1:], device="meta")
    return DTensor.from_local(
        tensor,
        mesh.device_mesh,
        [Shard(0), Shard(0)],
        shape=whole.shape,
        stride=whole.stride(),
        run_check=False,
    )


def _row_tensors(optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """Returns the tables with one row per word by key; every rank holds them completely."""
    tensors: dict[str, torch.Tensor] = {}
    for table in optimizer.row_tables.values():
        for name, tensor in table.tensors().items():
            tensors[f"rows/{name}"] = tensor
    return tensors
