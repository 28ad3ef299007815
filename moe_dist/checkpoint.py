"""Checkpoints keyed by meaning: a parameter's name, an expert's global id, a lane's index. No layout is in them.

    RUN/checkpoints/step_00000425/
        shard-*.safetensors   dense/NAME, dense/NAME.exp_avg, dense/NAME.exp_avg_sq   whole float32 tensors
                              experts/NAME, experts/NAME.row, experts/NAME.column     row i belongs to global expert i
                              gates/NAME, with .exp_avg and .exp_avg_sq               row i belongs to global group i
                              rows/NAME, likewise, and rows/MODULE.updates            row i belongs to word i
                              task/lstm0.h and so on                                  row i belongs to global lane i
        state.json            step, updates (steps not skipped), wandb run id, vocabulary

Every rank writes its part (torch.distributed.checkpoint, safetensors: nothing in it is ever executed). A checkpoint is
written beside and renamed when whole.
"""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard

from moe_dist.engine import Engine
from moe_dist.optim import Optimizer
from moe_dist.parallel.collectives import from_main
from moe_dist.parallel.mesh import Mesh

ELSE = "remove this checkpoint's folder to use the one before it, or train anew"
KINDS = ("dense", "experts", "gates", "rows")  # of a parameter; its name is in a checkpoint once


def folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}"


def latest(run: Path) -> Path:
    """The newest whole checkpoint of a run. Raises ValueError where there is none."""
    whole = sorted((run / "checkpoints").glob("step_????????"))
    if not whole:
        raise ValueError(
            f"{run}: no checkpoint to go on from; is it a run folder, and did the run reach its first save?"
        )
    return whole[-1]


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What `save` was given as `state`, with step and updates. Raises ValueError for a file that is broken."""
    path = checkpoint / "state.json"
    try:
        state = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: broken ({error}); {ELSE}") from None
    if not isinstance(state, dict) or not all(isinstance(state.get(key), int) for key in ("step", "updates")):
        raise ValueError(f"{path}: broken (no step and updates); {ELSE}")
    return state


def save(run: Path, step: int, engine: Engine, task: Any, mesh: Mesh, state: dict[str, Any], keep: int) -> None:
    """Writes a checkpoint after `step` steps and removes all but the newest `keep`. A collective.

    `state`: what else to keep, JSON. Raises OSError on every rank where it cannot be written; those before it stay.
    """
    tensors = _spread_tensors(engine.optimizer, mesh)
    for i, (key, tensor) in enumerate(engine.dense_state()):
        if mesh.owns(i):  # each rank keeps and writes a share of the whole tensors
            tensors[f"dense/{key}"] = tensor.cpu()
    for i, (key, tensor) in enumerate(_row_tensors(engine.optimizer).items()):
        if mesh.owns(i):
            tensors[key] = tensor
    for key, tensor in task.save_state().items():
        if mesh.is_main:
            tensors[f"task/{key}"] = tensor.cpu()
    final = folder(run, step)
    partial = final.with_name(f"partial_{final.name}")

    def begin() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        (partial / "state.json").write_text(json.dumps({"step": step, "updates": engine.optimizer.updates, **state}))

    def end() -> None:
        partial.rename(final)
        for old in sorted(final.parent.glob("step_????????"))[:-keep]:
            shutil.rmtree(old)

    try:
        from_main(begin, mesh.dp.group)
        dcp.save(tensors, storage_writer=dcp.HuggingFaceStorageWriter(str(partial), save_distributed=True))
        from_main(end, mesh.dp.group)
    except (OSError, dcp.CheckpointException) as error:  # of every rank, though one alone may have failed
        from_main(lambda: shutil.rmtree(partial, ignore_errors=True), mesh.dp.group)
        reason = next(iter(error.failures.values()))[0] if isinstance(error, dcp.CheckpointException) else error
        raise OSError(f"{final}: cannot be written ({reason}); earlier checkpoints are whole") from None


def load(checkpoint: Path, engine: Engine, task: Any, mesh: Mesh) -> None:
    """Fills parameters, masters, optimizer state and the task's state, on any layout. A collective.

    Raises ValueError, naming the tensor, for one that is missing or has another shape, and for a broken file.
    """
    optimizer = engine.optimizer
    optimizer.updates = read_state(checkpoint)["updates"]
    outside = _spread_tensors(optimizer, mesh) | _row_tensors(optimizer)  # share storage with the optimizer's own
    dense = engine.empty_dense_state()
    task_state = {key: torch.empty_like(t, device="cpu") for key, t in task.save_state().items()}
    tensors = outside | {f"dense/{k}": t for k, t in dense.items()} | {f"task/{k}": t for k, t in task_state.items()}
    kept = _kept(checkpoint)
    for key, tensor in tensors.items():
        _check_shape(checkpoint, kept, key, tensor)
    dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(checkpoint)))
    engine.load_dense_state(dense, optimizer.updates)
    optimizer.round_masters()
    task.load_state(task_state)


def load_weights(checkpoint: Path, model: nn.Module) -> None:
    """Fills the parameters of a plain whole model in place, in one process and without a mesh, whichever of the kinds
    each is kept as. Raises ValueError, naming the parameter, for one that is missing or has another shape, and for a
    broken file."""
    kept, tensors = _kept(checkpoint), {}
    for name, p in model.named_parameters():
        key = next((key for kind in KINDS if (key := f"{kind}/{name}") in kept), name)
        _check_shape(checkpoint, kept, key, p)
        tensors[key] = p.detach()  # shares storage with the parameter
    with warnings.catch_warnings():  # torch warns that one process is all, which was asked for
        warnings.simplefilter("ignore", UserWarning)
        dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(checkpoint)), no_dist=True)


def _kept(checkpoint: Path) -> dict[str, Any]:
    """Tensors by name, of which only the heads of files are read. Raises ValueError for a file that is not whole."""
    try:
        return dcp.HuggingFaceStorageReader(str(checkpoint)).read_metadata().state_dict_metadata
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(f"{checkpoint}: a shard is broken or foreign ({error}); {ELSE}") from None


def _check_shape(checkpoint: Path, kept: dict[str, Any], key: str, tensor: torch.Tensor) -> None:
    if key not in kept:
        raise ValueError(f"{checkpoint}: no tensor {key!r}; is config.json that of this run, and every shard there?")
    shape, expected = tuple(kept[key].size), tuple(tensor.shape)
    if shape != expected:
        raise ValueError(f"{checkpoint}: {key!r} is {shape} and {expected} by config.json; is it that of this run?")


def _spread_tensors(optimizer: Optimizer, mesh: Mesh) -> dict[str, Any]:
    """Views of what belongs to experts and groups as shards of the global stack: replicas along edp are one."""
    return {
        f"{kind}/{name}{ending}": DTensor.from_local(t, mesh.device_mesh, [Replicate(), Shard(0)], run_check=False)
        for kind, states in (("experts", optimizer.experts), ("gates", optimizer.gates))
        for name, state in states.items()
        for ending, t in state.tensors(optimizer.updates).items()
    }


def _row_tensors(optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """What belongs to words, whole on every rank."""
    return {f"rows/{key}": t for table in optimizer.rows.values() for key, t in table.tensors().items()}
