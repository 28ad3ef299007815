"""Checkpoints in one process, without a mesh: their weights for use, and what is in them."""

import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from moe_dist.checkpoint import manifest
from moe_dist.checkpoint.format import (
    PARAM_KINDS,
    STATE_SUFFIXES,
    TASK_METADATA_CHECKS,
    check_shape,
    check_values,
    read_state,
    tensor_index,
)
from moe_dist.config.run_folder import PARTIAL, read


def load_weights(checkpoint: Path, model: nn.Module) -> None:
    """Fills the parameters of a plain whole model in place, in one process and without a mesh.

    A parameter is found whichever of the kinds it is kept as.

    Raises:
        ValueError: A file is broken, or a parameter, which is named, is missing, overlaps, is not finite or has another
            shape or dtype.
    """
    kept, tensors = tensor_index(checkpoint), {}
    for name, p in model.named_parameters():
        key = next((key for kind in PARAM_KINDS if (key := f"{kind}/{name}") in kept), name)
        check_shape(checkpoint, kept, key, p)
        tensors[key] = p.detach()  # shares storage with the parameter
    _read(checkpoint, tensors)


def _read(checkpoint: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Fills whole tensors in place, in one process. Raises ValueError, naming the tensor, for values that are unfit."""
    import torch.distributed.checkpoint as dcp  # here: see the package's docstring

    check_values(checkpoint, tensors)
    with warnings.catch_warnings():  # torch warns that one process is all, which was asked for
        warnings.simplefilter("ignore", UserWarning)
        dcp.load(
            tensors, storage_reader=dcp.HuggingFaceStorageReader(str(checkpoint)), no_dist=True
        )


def inspect(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint holds: {"step", "updates", "weights": by name, with kind, shape and bytes, "task": likewise}.

    Raises ValueError for one that is not whole.
    """
    manifest.check_complete(checkpoint)
    state, weights, task = read_state(checkpoint), {}, {}
    kept = {key: tuple(each.size) for key, each in tensor_index(checkpoint).items()}
    for key, shape in sorted(kept.items()):
        kind, _, name = key.partition("/")
        if kind == "task":
            task[name] = {"shape": shape}
        elif not name.endswith(STATE_SUFFIXES):
            optimizer = {end: kept[key + end] for end in STATE_SUFFIXES if key + end in kept}
            weights[name] = {"kind": kind, "shape": shape, "optimizer": optimizer}
    return {
        "checkpoint": str(checkpoint),
        "step": state["step"],
        "updates": state["updates"],
        "weights": weights,
        "task": task,
    }


def export(checkpoint: Path, file: Path) -> int:
    """Writes all weights, whole, float32 and named as in the plain model, to one safetensors file, whose metadata have
    step, config (JSON) and what the task knew: vocabulary, tokens, classes. Returns the number of parameters.

    Raises ValueError for a checkpoint that is not whole and a file that exists, and OSError where it cannot be written.
    """
    if file.exists():
        raise ValueError(f"{file} exists: give another name, or remove it")
    if not file.absolute().parent.is_dir():
        raise ValueError(f"{file} cannot be written: {file.parent} is no folder")
    told = inspect(checkpoint)
    tensors = {
        f"{each['kind']}/{name}": torch.empty(each["shape"])
        for name, each in told["weights"].items()
    }
    _read(checkpoint, tensors)
    state = read_state(checkpoint)
    metadata = {"step": str(told["step"])} | {
        key: json.dumps(state[key]) for key in TASK_METADATA_CHECKS if key in state
    }
    copy = checkpoint / manifest.CONFIG  # of older versions that of the run
    config = copy if copy.is_file() else checkpoint.resolve().parent.parent / manifest.CONFIG
    metadata |= {"config": read(config).decode(errors="replace")} if config.is_file() else {}
    partial = file.with_name(f"{PARTIAL}{file.name}")
    try:
        partial.unlink(missing_ok=True)
        save_file({key.partition("/")[2]: t for key, t in tensors.items()}, partial, metadata)
        umask = os.umask(0)
        os.umask(umask)
        partial.chmod(0o666 & ~umask)  # as others' files; the library makes it its owner's alone
        partial.rename(file)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"{file} cannot be written ({error})") from None
    return sum(t.numel() for t in tensors.values())
