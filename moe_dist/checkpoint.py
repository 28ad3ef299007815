"""Checkpoints keyed by meaning: a parameter's name, an expert's global id, a lane's index. No layout is in them.

    RUN/checkpoints/step_00000425/
        shard-*.safetensors   dense/NAME, dense/NAME.exp_avg, dense/NAME.exp_avg_sq   whole float32 tensors
                              experts/NAME, experts/NAME.row, experts/NAME.column     row i belongs to global expert i
                              gates/NAME, with .exp_avg and .exp_avg_sq               row i belongs to global group i
                              task/lstm0.h and so on                                  row i belongs to global lane i
        state.json            step, updates (steps not skipped), wandb run id, vocabulary

Every rank writes its part (torch.distributed.checkpoint, safetensors: nothing in it is ever executed). A checkpoint is
written beside and renamed when whole.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor, Replicate, Shard

from moe_dist.engine import Engine
from moe_dist.optim import Optimizer
from moe_dist.parallel.collectives import barrier
from moe_dist.parallel.mesh import Mesh


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
    """What `save` was given as `state`."""
    return json.loads((checkpoint / "state.json").read_text())


def save(run: Path, step: int, engine: Engine, task: Any, mesh: Mesh, state: dict[str, Any], keep: int) -> None:
    """Writes a checkpoint after `step` steps and removes all but the newest `keep`. A collective.

    `state`: what else to keep, JSON.
    """
    tensors = _expert_tensors(engine.optimizer, mesh)
    for i, (key, tensor) in enumerate(engine.dense_state()):
        if mesh.owns(i):  # each rank keeps and writes a share of the whole tensors
            tensors[f"dense/{key}"] = tensor.cpu()
    for key, tensor in task.save_state().items():
        if mesh.is_main:
            tensors[f"task/{key}"] = tensor.cpu()
    final = folder(run, step)
    partial = final.with_name(f"partial_{final.name}")
    if mesh.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        (partial / "state.json").write_text(json.dumps({"step": step, "updates": engine.optimizer.updates, **state}))
    barrier()
    dcp.save(tensors, storage_writer=dcp.HuggingFaceStorageWriter(str(partial), save_distributed=True))
    barrier()
    if mesh.is_main:
        partial.rename(final)
        for old in sorted(final.parent.glob("step_????????"))[:-keep]:
            shutil.rmtree(old)
    barrier()


def load(checkpoint: Path, engine: Engine, task: Any, mesh: Mesh) -> None:
    """Fills parameters, masters, optimizer state and the task's state, on any layout. A collective."""
    optimizer = engine.optimizer
    optimizer.updates = read_state(checkpoint)["updates"]
    experts = _expert_tensors(optimizer, mesh)  # share storage with the optimizer's own
    dense = engine.empty_dense_state()
    task_state = {key: torch.empty_like(t, device="cpu") for key, t in task.save_state().items()}
    tensors = experts | {f"dense/{k}": t for k, t in dense.items()} | {f"task/{k}": t for k, t in task_state.items()}
    dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(checkpoint)))
    engine.load_dense_state(dense, optimizer.updates)
    for expert in optimizer.experts.values():
        expert.round_master()
    task.load_state(task_state)


def _expert_tensors(optimizer: Optimizer, mesh: Mesh) -> dict[str, Any]:
    """Views of what belongs to experts and groups as shards of the global stack: replicas along edp are one."""
    named = {f"gates/{name}": tensor for name, tensor in optimizer.gates.tensors(optimizer.updates).items()}
    for name, expert in optimizer.experts.items():
        key = f"experts/{name}"
        named |= {key: expert.master_eDF, f"{key}.row": expert.row_eD, f"{key}.column": expert.column_eF}
    placements = [Replicate(), Shard(0)]
    return {k: DTensor.from_local(t, mesh.device_mesh, placements, run_check=False) for k, t in named.items()}
