"""What is in a checkpoint: tensors keyed by meaning, a parameter's name, an expert's global id, a lane's index. No
layout is in them.

    RUN/checkpoints/step_00000425/
        shard-*.safetensors   dense/NAME, dense/NAME.exp_avg, dense/NAME.exp_avg_sq   whole float32 tensors
                              experts/NAME, experts/NAME.row, experts/NAME.column     row i belongs to global expert i
                              gates/NAME, with .exp_avg and .exp_avg_sq               row i belongs to global group i
                              rows/NAME, likewise, and rows/MODULE.updates            row i belongs to word i
                              task/lstm0.h and so on                                  row i belongs to global lane i
        state.json            step, updates (steps not skipped), norm of the last one, wandb run id, and what the task
                              knows of its data: vocabulary or tokens, classes; and a fingerprint of the data
        manifest.sha256       checksums of them all (manifest.py)
"""

import json
from math import prod
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

KINDS = ("dense", "experts", "gates", "rows")  # of a parameter; its name is in a checkpoint once
OF_TASKS = ("vocabulary", "tokens", "classes", "pairs")  # in state.json
MOST = 2**53  # of a number in state.json: what a float holds
ENDINGS = (".exp_avg", ".exp_avg_sq", ".row", ".column", ".updates")  # of what is an optimizer's, not a weight


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What `Saver.save` was given, with step, updates and the last norm. Raises ValueError for a broken file."""
    path = checkpoint / "state.json"
    try:
        state = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: broken ({error})") from None
    needed = {"step": int, "updates": int, "previous_norm": float}
    if (
        not isinstance(state, dict)
        or not all(isinstance(state.get(key), kind) and 0 <= state[key] <= MOST for key, kind in needed.items())
        or state["updates"] > state["step"]
    ):
        raise ValueError(f"{path}: broken (no {', '.join(needed)} that could be)")
    return state


def kept_tensors(checkpoint: Path) -> dict[str, Any]:
    """Tensors by name, of which only the heads of files are read. Raises ValueError for a file that is not whole, and
    for parts that do not make a whole tensor."""
    try:
        kept: Any = dcp.HuggingFaceStorageReader(str(checkpoint)).read_metadata().state_dict_metadata
    except Exception as error:  # whatever a foreign file leads torch's reader to
        raise ValueError(f"{checkpoint}: a shard is broken or foreign ({error!r})") from None
    for key, tensor in kept.items():
        if key.partition("/")[0] not in (*KINDS, "task"):
            raise ValueError(f"{checkpoint}: {key!r} is none of {', '.join(KINDS)} or task")
        offsets = [offset for part in tensor.chunks for offset in part.offsets]
        numbers, there = prod(tensor.size), sum(prod(part.sizes) for part in tensor.chunks)
        if min(offsets, default=0) < 0 or numbers != there:
            raise ValueError(f"{checkpoint}: {key!r} has not all of its parts, or some twice")
    return kept


def check_shape(checkpoint: Path, kept: dict[str, Any], key: str, tensor: torch.Tensor) -> None:
    if key not in kept:
        raise ValueError(f"{checkpoint}: no tensor {key!r}; is config.json that of this run, and every shard there?")
    shape, expected = tuple(kept[key].size), tuple(tensor.shape)
    if shape != expected:
        raise ValueError(f"{checkpoint}: {key!r} is {shape} and {expected} by config.json; is it that of this run?")
