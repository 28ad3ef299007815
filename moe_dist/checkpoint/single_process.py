"""Checkpoints read by one process, without a mesh: loads, lists and exports their weights."""

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
    """Fills a complete model's parameters in place.

    Args:
        checkpoint: The checkpoint's folder.
        model: An unsharded model with all experts. Each parameter is found by its name, under any
            kind in `PARAM_KINDS`.

    Raises:
        ValueError: A shard is damaged; or a parameter is missing, has overlapping parts, is not
            finite, or has another shape or dtype. The message has its key.
    """
    index = tensor_index(checkpoint)
    tensors: dict[str, torch.Tensor] = {}
    for name, param in model.named_parameters():
        key = _weight_key(index, name)
        check_shape(checkpoint, index, key, param)
        tensors[key] = param.detach()  # shares storage with the parameter
    _read(checkpoint, tensors)


def _weight_key(index: dict[str, Any], name: str) -> str:
    """Returns a parameter's key in a checkpoint, or its name if the checkpoint has none."""
    for kind in PARAM_KINDS:
        if f"{kind}/{name}" in index:
            return f"{kind}/{name}"
    return name


def _read(checkpoint: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Fills complete tensors in place, by key; raises ValueError for invalid values."""
    import torch.distributed.checkpoint as dcp  # in the call: see the package's docstring

    check_values(checkpoint, tensors)
    reader = dcp.HuggingFaceStorageReader(str(checkpoint))
    with warnings.catch_warnings():  # torch warns about a single process, which is intended
        warnings.simplefilter("ignore", UserWarning)
        dcp.load(tensors, storage_reader=reader, no_dist=True)


def inspect(checkpoint: Path) -> dict[str, Any]:
    """Lists a checkpoint's content without reading tensor values.

    Args:
        checkpoint: The checkpoint's folder.

    Returns:
        A dictionary with "checkpoint" (its path), "step", "updates", "weights" and "task".
        "weights" has, by name, each weight's kind and shape, and under "optimizer" its optimizer
        state's shapes by suffix. "task" has each task tensor's shape by name.

    Raises:
        ValueError: The checkpoint is damaged.
    """
    manifest.check_complete(checkpoint)
    state = read_state(checkpoint)
    shapes = {key: tuple(each.size) for key, each in tensor_index(checkpoint).items()}
    weights: dict[str, Any] = {}
    task: dict[str, Any] = {}
    for key, shape in sorted(shapes.items()):
        kind, _, name = key.partition("/")
        if kind == "task":
            task[name] = {"shape": shape}
        elif not name.endswith(STATE_SUFFIXES):
            optimizer = {end: shapes[key + end] for end in STATE_SUFFIXES if key + end in shapes}
            weights[name] = {"kind": kind, "shape": shape, "optimizer": optimizer}
    return {
        "checkpoint": str(checkpoint),
        "step": state["step"],
        "updates": state["updates"],
        "weights": weights,
        "task": task,
    }


def export(checkpoint: Path, file: Path) -> int:
    """Writes all weights from a checkpoint to one safetensors file.

    The weights are complete float32 tensors with the unsharded model's names. The file's metadata
    has the step, the config as JSON, and the task's metadata as JSON (vocabulary, tokens, classes).

    Args:
        checkpoint: The checkpoint's folder.
        file: The safetensors file; it must not exist.

    Returns:
        The number of parameters.

    Raises:
        ValueError: The checkpoint is damaged, the file exists, or its folder does not.
        OSError: The file cannot be written.
    """
    if file.exists():
        raise ValueError(f"{file} exists: give another name, or remove it")
    if not file.absolute().parent.is_dir():
        raise ValueError(f"{file} cannot be written: {file.parent} is no folder")
    summary = inspect(checkpoint)
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in summary["weights"].items():
        tensors[f"{weight['kind']}/{name}"] = torch.empty(weight["shape"])
    _read(checkpoint, tensors)
    _write_file(
        file,
        {key.partition("/")[2]: tensor for key, tensor in tensors.items()},
        _export_metadata(checkpoint, summary["step"]),
    )
    return sum(tensor.numel() for tensor in tensors.values())


def _export_metadata(checkpoint: Path, step: int) -> dict[str, str]:
    """Returns step, config and the task's metadata as texts."""
    metadata = {"step": str(step)}
    state = read_state(checkpoint)
    for key in TASK_METADATA_CHECKS:
        if key in state:
            metadata[key] = json.dumps(state[key])
    config = checkpoint / manifest.CONFIG
    if not config.is_file():  # earlier versions saved no copy; use the run's file
        config = checkpoint.resolve().parent.parent / manifest.CONFIG
    if config.is_file():
        metadata["config"] = read(config).decode(errors="replace")
    return metadata


def _write_file(file: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Writes a safetensors file under a partial name and renames it; raises OSError."""
    partial = file.with_name(f"{PARTIAL}{file.name}")
    try:
        partial.unlink(missing_ok=True)
        save_file(tensors, partial, metadata)
        # The library lets only the owner read the file; give it the usual permissions.
        umask = os.umask(0)
        os.umask(umask)
        partial.chmod(0o666 & ~umask)
        partial.rename(file)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        raise OSError(f"{file} cannot be written ({error})") from None
