"""What is in a checkpoint: tensors keyed by meaning, a parameter's name, an expert's global id, a lane's index. No
layout is in them.

    RUN/checkpoints/step_00000425/
        shard-*.safetensors   dense/NAME, dense/NAME.exp_avg, dense/NAME.exp_avg_sq   whole float32 tensors
                              experts/NAME, experts/NAME.row, experts/NAME.column     row i belongs to global expert i
                              gates/NAME, with .exp_avg and .exp_avg_sq               row i belongs to global group i
                              rows/NAME, likewise, and rows/MODULE.updates            row i belongs to word i
                              task/lstm0.h and so on                                  row i belongs to global lane i
        state.json            step, updates (steps not skipped), norm of the last one, wandb run id, vocabulary
        manifest.sha256       checksums of them all (manifest.py)
"""

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError

ELSE = "remove this checkpoint's folder to use the one before it, or train anew"
KINDS = ("dense", "experts", "gates", "rows")  # of a parameter; its name is in a checkpoint once
ENDINGS = (".exp_avg", ".exp_avg_sq", ".row", ".column", ".updates")  # of what is an optimizer's, not a weight


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What `Saver.save` was given, with step, updates and the last norm. Raises ValueError for a broken file."""
    path = checkpoint / "state.json"
    try:
        state = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: broken ({error}); {ELSE}") from None
    needed = {"step": int, "updates": int, "previous_norm": float}
    if not isinstance(state, dict) or not all(isinstance(state.get(key), kind) for key, kind in needed.items()):
        raise ValueError(f"{path}: broken (no {', '.join(needed)}); {ELSE}")
    return state


def kept_tensors(checkpoint: Path) -> dict[str, Any]:
    """Tensors by name, of which only the heads of files are read. Raises ValueError for a file that is not whole."""
    try:
        return dcp.HuggingFaceStorageReader(str(checkpoint)).read_metadata().state_dict_metadata
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(f"{checkpoint}: a shard is broken or foreign ({error}); {ELSE}") from None


def check_shape(checkpoint: Path, kept: dict[str, Any], key: str, tensor: torch.Tensor) -> None:
    if key not in kept:
        raise ValueError(f"{checkpoint}: no tensor {key!r}; is config.json that of this run, and every shard there?")
    shape, expected = tuple(kept[key].size), tuple(tensor.shape)
    if shape != expected:
        raise ValueError(f"{checkpoint}: {key!r} is {shape} and {expected} by config.json; is it that of this run?")
