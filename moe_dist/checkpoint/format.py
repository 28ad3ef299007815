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
        config.json           the run's config (sealed_config.py)
        manifest.sha256       checksums of them all (manifest.py)
"""

import math
import reprlib
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from moe_dist.checkpoint.manifest import STATE, STEP_GLOB
from moe_dist.config.run_folder import read_json
from moe_dist.data.text.lanes import EOS, UNK
from moe_dist.distributed.collectives import Group, all_gather_objects

PARAM_KINDS = (
    "dense",
    "experts",
    "gates",
    "rows",
)  # of a parameter; its name is in a checkpoint once
MAX_COUNT = (
    2**53
)  # of a count in state.json, and of all counts of words together: what a float holds
STATE_SUFFIXES = (
    ".exp_avg",
    ".exp_avg_sq",
    ".row",
    ".column",
    ".updates",
)  # of what is an optimizer's, not a weight
NON_NEGATIVE_SUFFIXES = (
    ".exp_avg_sq",
    ".row",
    ".column",
    ".updates",
)  # means of squares, and a count


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Reads the state of a checkpoint and checks the type of each value.

    The values of tasks (`TASK_METADATA_CHECKS`) may be missing. They are not compared with the config.

    Args:
        checkpoint: The folder of the checkpoint.

    Returns:
        The values that `Saver.save` was given, with step, updates and the last norm.

    Raises:
        ValueError: The file is broken, or of another step than the one that the checkpoint's folder is named after.
    """
    path = checkpoint / STATE
    state = read_json(path)
    if not isinstance(state, dict) or not _is_progress(state):
        told = "step, updates or previous_norm is missing or out of its range"
        raise ValueError(f"{path}: broken ({told}); go on from another checkpoint")
    for key, is_whole in (TASK_METADATA_CHECKS | {"wandb_id": _is_wandb_id}).items():
        if key in state and not is_whole(state[key]):
            told = f"{key}={reprlib.repr(state[key])} is not a value that this version writes"
            raise ValueError(f"{path}: broken ({told}); go on from another checkpoint")
    name = checkpoint.name
    if fnmatchcase(name, STEP_GLOB) and name != f"step_{state['step']:08d}":
        raise ValueError(
            f"{path}: of step {state['step']}, in a folder that is named {name}; rename the right one"
        )
    return state


def _is_progress(state: dict[str, Any]) -> bool:
    """Returns whether the numbers of a state are in their ranges. A run may save any finite norm."""
    step, updates, norm = (state.get(key) for key in ("step", "updates", "previous_norm"))
    if not (_is_count(step) and _is_count(updates) and isinstance(norm, float)):
        return False
    return state["updates"] <= state["step"] and math.isfinite(norm) and norm >= 0


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= MAX_COUNT


def _are_texts(values: Any) -> bool:
    """Returns whether this is a list of texts that can be written."""
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        return False
    try:
        "".join(values).encode()
    except UnicodeEncodeError:  # half of a character
        return False
    return True


def _is_vocabulary(value: Any) -> bool:
    """Returns whether this is a `Vocabulary` with counts, which older versions kept as a list of words."""
    if not isinstance(value, dict) or value.keys() != {"words", "counts"}:
        return False
    words, counts = value["words"], value["counts"]
    return (
        _are_texts(words)
        and words[:2] == [UNK, EOS]
        and len(words) == len(set(words))
        and isinstance(counts, list)
        and len(counts) == len(words)
        and all(map(_is_count, counts))
        and sum(counts) <= MAX_COUNT
    )


def _are_tokens(value: Any) -> bool:
    """Returns whether this is what `WordPieceTokenizer.to_json` writes."""
    from moe_dist.data.text.wordpiece import (
        WordPieceTokenizer,
    )  # here, for its library takes a moment to import

    try:
        return isinstance(value, str) and _are_texts(
            list(WordPieceTokenizer.from_json(value).words)
        )
    except ValueError:
        return False


def _is_wandb_id(value: Any) -> bool:
    return value is None or isinstance(value, str)


# what tasks keep in state.json, and whether a value could be theirs
TASK_METADATA_CHECKS: dict[str, Callable[[Any], bool]] = {
    "vocabulary": _is_vocabulary,
    "tokens": _are_tokens,
    "classes": _are_texts,
    "pairs": lambda value: isinstance(value, bool),
}


def tensor_index(checkpoint: Path) -> dict[str, Any]:
    """Returns the metadata of all tensors by name, for which only the heads of files are read.

    Raises:
        ValueError: A file is not whole, or the parts of a tensor overlap or do not make a whole one.
    """
    import torch.distributed.checkpoint as dcp  # here: see the package's docstring

    try:
        kept: Any = (
            dcp.HuggingFaceStorageReader(str(checkpoint)).read_metadata().state_dict_metadata
        )
    except Exception as error:  # whatever a foreign file leads torch's reader to
        raise ValueError(f"{checkpoint}: a shard is broken or foreign ({error!r})") from None
    for key, tensor in kept.items():
        if key.partition("/")[0] not in (*PARAM_KINDS, "task"):
            raise ValueError(f"{checkpoint}: {key!r} is none of {', '.join(PARAM_KINDS)} or task")
        if not _is_whole(tensor):
            raise ValueError(f"{checkpoint}: {key!r} has not all of its parts, or some twice")
    return kept


def _is_whole(tensor: Any) -> bool:
    """Returns whether the parts lie one after the other along the first dimension, from its start to its end."""
    first, *others = tensor.size or (1,)
    end = 0
    for part in sorted(tensor.chunks, key=lambda part: (part.offsets, part.sizes)):
        start, *starts = part.offsets or (end,)
        size, *sizes = part.sizes or (1,)
        if start != end or any(starts) or sizes != others:
            return False
        end += size
    return end == first


def check_shape(checkpoint: Path, kept: dict[str, Any], key: str, tensor: torch.Tensor) -> None:
    """Raises ValueError for a tensor that the checkpoint does not have, or has in another shape."""
    if key not in kept:
        raise ValueError(
            f"{checkpoint}: no tensor {key!r}; is config.json that of this run, and every shard there?"
        )
    shape, expected = tuple(kept[key].size), tuple(tensor.shape)
    if shape != expected:
        raise ValueError(
            f"{checkpoint}: {key!r} is {shape} and {expected} by config.json; is it that of this run?"
        )


def check_values(
    checkpoint: Path, wanted: dict[str, torch.Tensor], group: Group | None = None
) -> None:
    """Reads all parts of some tensors once, before anything is filled with them.

    Args:
        checkpoint: The checkpoint.
        wanted: By name, tensors of the dtypes that are needed. A task's may be floats of another width: its activations
            follow the precision of the run.
        group: Ranks that share the reading; then a collective.

    Raises:
        ValueError: On every rank, naming the tensor: one has another dtype, is not finite, or is negative where it is a
            mean of squares.
    """
    size, index = (group.size(), group.rank()) if group else (1, 0)
    wrong: list[str] = []
    for path in sorted(checkpoint.glob("*.safetensors"))[index::size]:
        try:
            with safe_open(path, "pt") as opened:
                for key in opened.keys():  # noqa: SIM118 (it is no dict)
                    if key in wanted and (
                        reason := _unfit(opened.get_tensor(key), key, wanted[key].dtype)
                    ):
                        wrong.append(f"{key!r} {reason}")
        except Exception as error:  # whatever a foreign file leads the library to
            wrong.append(f"{path.name} is broken or foreign ({error!r})")
    found = all_gather_objects(wrong, group) if group else [wrong]
    if all_wrong := [each for of_rank in found for each in of_rank]:
        more = f", and {len(all_wrong) - 1} more are unfit" if all_wrong[1:] else ""
        raise ValueError(f"{checkpoint}: {all_wrong[0]}{more}; go on from another checkpoint")


def _unfit(tensor: torch.Tensor, key: str, dtype: torch.dtype) -> str:
    """Returns why a tensor cannot be taken, empty where it can."""
    alike = key.startswith("task/") and tensor.is_floating_point() and dtype.is_floating_point
    if tensor.dtype != dtype and not alike:
        return f"is {tensor.dtype} and must be {dtype}"
    if not is_finite(tensor):
        return "holds NaN or infinity"
    return (
        "holds negative numbers"
        if key.endswith(NON_NEGATIVE_SUFFIXES) and (tensor < 0).any()
        else ""
    )


def is_finite(tensor: torch.Tensor) -> bool:
    """Returns whether no number of a tensor is NaN or infinite."""
    return bool(torch.isfinite(tensor).all())
