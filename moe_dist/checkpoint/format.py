"""A checkpoint's on-disk format, and checks on its content.

Tensor keys do not depend on the layout: they use parameter names, global expert ids and global lane
indices. So a checkpoint can be read on any number of ranks. `saver.Saver` writes it, `loader.load`
reads it.

    RUN/checkpoints/step_00000425/

    file                  key                      content
    --------------------  -----------------------  ---------------------------------------------
    shard-*.safetensors   dense/NAME               float32 parameter
                          dense/NAME.exp_avg       its first moment
                          dense/NAME.exp_avg_sq    its second moment
                          experts/NAME             float32 stack; row i is global expert i
                          experts/NAME.row         factored Adam: row means of the second moment
                          experts/NAME.column      factored Adam: column means of the second moment
                          gates/NAME               float32 stack; row i is global expert group i
                          rows/NAME                float32 table; row i is word i of the vocabulary
                          rows/MODULE.updates      number of updates of each row
                          task/NAME                task state; row i is global lane i
    state.json            step                     number of steps
                          updates                  number of steps that were not skipped
                          previous_norm            gradient norm of the last of these updates
                          wandb_id                 id of the wandb run, or null
                          data                     fingerprint of the data
                          vocabulary, tokens,      the task's metadata, if it has any
                          classes, pairs           (`TASK_METADATA_CHECKS`)
    config.json                                    the run's config (`sealed_config.py`)
    manifest.sha256                                checksums of the other files (`manifest.py`)

`gates/NAME`, `rows/NAME`, and with Adam for experts also `experts/NAME`, have `.exp_avg` and
`.exp_avg_sq` like a dense parameter. A tensor can be split along its first dimension into parts in
several shards; torch.distributed.checkpoint defines the shard format.
"""

import itertools
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

# First part of a parameter's key; a name has one kind in a checkpoint.
PARAM_KINDS = ("dense", "experts", "gates", "rows")
# Key suffixes for optimizer state; all other keys of these kinds are weights.
STATE_SUFFIXES = (".exp_avg", ".exp_avg_sq", ".row", ".column", ".updates")
NON_NEGATIVE_SUFFIXES = (".exp_avg_sq", ".row", ".column", ".updates")  # means of squares; a count
# Largest count in state.json, and largest total word count: exact as a float64.
MAX_COUNT = 2**53


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Reads state.json and checks each value's type and range.

    Task values (`TASK_METADATA_CHECKS`) may be missing, and are not compared with the config.

    Args:
        checkpoint: The checkpoint's folder.

    Returns:
        The state passed to `Saver.save`, with step, updates and previous_norm.

    Raises:
        ValueError: The file is damaged, `Saver` never writes such a value, or the step differs from
            the folder's name.
    """
    path = checkpoint / STATE
    state = read_json(path)
    if not isinstance(state, dict) or not _has_progress(state):
        problem = "step, updates or previous_norm is missing or out of its range"
        raise ValueError(f"{path}: damaged ({problem}); use another checkpoint")
    for key, is_valid in (TASK_METADATA_CHECKS | {"wandb_id": _is_wandb_id}).items():
        if key in state and not is_valid(state[key]):
            problem = f"{key}={reprlib.repr(state[key])} is not a value that this version writes"
            raise ValueError(f"{path}: damaged ({problem}); use another checkpoint")
    name = checkpoint.name
    expected_name = f"step_{state['step']:08d}"
    if fnmatchcase(name, STEP_GLOB) and name != expected_name:
        raise ValueError(
            f"{path}: has step {state['step']}, but its folder is named {name}; "
            f"rename the folder to {expected_name}"
        )
    return state


def _has_progress(state: dict[str, Any]) -> bool:
    """Returns True if step, updates and previous_norm are in their ranges."""
    step = state.get("step")
    updates = state.get("updates")
    norm = state.get("previous_norm")
    if not (_is_count(step) and _is_count(updates) and isinstance(norm, float)):
        return False
    return state["updates"] <= state["step"] and math.isfinite(norm) and norm >= 0


def _is_count(value: Any) -> bool:
    """Returns True for a whole number from 0 to `MAX_COUNT`; JSON's true is not a number."""
    return type(value) is int and 0 <= value <= MAX_COUNT


def _are_texts(values: Any) -> bool:
    """Returns True for a list of texts that UTF-8 can encode."""
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        return False
    try:
        "".join(values).encode()
    except UnicodeEncodeError:  # a surrogate, half of a character
        return False
    return True


def _is_vocabulary(value: Any) -> bool:
    """Returns True for a `Vocabulary` with each word's count.

    Earlier versions saved a list of words without counts; it is refused.
    """
    if not isinstance(value, dict) or value.keys() != {"words", "counts"}:
        return False
    words = value["words"]
    counts = value["counts"]
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
    """Returns True for a result of `WordPieceTokenizer.to_json`."""
    # imported in the call, because the tokenizer library is slow to import
    from moe_dist.data.text.wordpiece import WordPieceTokenizer

    try:
        return isinstance(value, str) and _are_texts(
            list(WordPieceTokenizer.from_json(value).words)
        )
    except ValueError:
        return False


def _is_wandb_id(value: Any) -> bool:
    """Returns True for a wandb run's id, or null."""
    return value is None or isinstance(value, str)


def _is_bool(value: Any) -> bool:
    """Returns True for JSON's true or false."""
    return isinstance(value, bool)


# Task metadata in state.json -> a check of its value.
TASK_METADATA_CHECKS: dict[str, Callable[[Any], bool]] = {
    "vocabulary": _is_vocabulary,
    "tokens": _are_tokens,
    "classes": _are_texts,
    "pairs": _is_bool,
}


def tensor_index(checkpoint: Path) -> dict[str, Any]:
    """Reads all tensors' metadata from the shard headers.

    Args:
        checkpoint: The checkpoint's folder.

    Returns:
        Each tensor's metadata (`TensorStorageMetadata`), by key.

    Raises:
        ValueError: A shard is damaged, a key has an unknown kind, or a tensor's parts overlap or
            leave a gap.
    """
    import torch.distributed.checkpoint as dcp  # in the call: see the package's docstring

    try:
        reader = dcp.HuggingFaceStorageReader(str(checkpoint))
        index: Any = reader.read_metadata().state_dict_metadata
    except Exception as error:  # torch's reader raises many types for an invalid file
        raise ValueError(f"{checkpoint}: a shard is damaged or foreign ({error!r})") from None
    for key, metadata in index.items():
        if key.partition("/")[0] not in (*PARAM_KINDS, "task"):
            known = ", ".join(PARAM_KINDS)
            raise ValueError(f"{checkpoint}: {key!r} does not begin with one of {known} or task")
        if not _parts_are_complete(metadata):
            raise ValueError(f"{checkpoint}: the parts of {key!r} overlap or leave a gap")
    return index


def _parts_are_complete(metadata: Any) -> bool:
    """Returns True if a tensor's parts cover its first dimension without gap or overlap."""
    num_rows, *row_shape = metadata.size or (1,)
    end = 0
    for part in sorted(metadata.chunks, key=lambda part: (part.offsets, part.sizes)):
        start, *other_starts = part.offsets or (end,)
        part_rows, *part_row_shape = part.sizes or (1,)
        if start != end or any(other_starts) or part_row_shape != row_shape:
            return False
        end += part_rows
    return end == num_rows


def check_shape(checkpoint: Path, index: dict[str, Any], key: str, tensor: torch.Tensor) -> None:
    """Checks if a checkpoint has a tensor with the shape needed by the model.

    Args:
        checkpoint: The checkpoint's folder.
        index: Its tensors' metadata, from `tensor_index`.
        key: The tensor's key.
        tensor: A tensor with the needed shape.

    Raises:
        ValueError: The tensor is missing or has another shape.
    """
    if key not in index:
        raise ValueError(
            f"{checkpoint}: no tensor {key!r}; check that config.json is that of this run, and "
            "that no shard is missing"
        )
    shape, expected = tuple(index[key].size), tuple(tensor.shape)
    if shape != expected:
        raise ValueError(
            f"{checkpoint}: {key!r} has shape {shape}, but config.json needs {expected}; check "
            "that it is the config of this run"
        )


def check_values(
    checkpoint: Path, wanted: dict[str, torch.Tensor], group: Group | None = None
) -> None:
    """Reads some tensors' values once and checks them, before anything is overwritten.

    Args:
        checkpoint: The checkpoint's folder.
        wanted: Tensors with the needed dtypes, by key. A task's floating-point state may have
            another width, because activations have the run's precision.
        group: Ranks that share the reads; the call is then a collective.

    Raises:
        ValueError: On every rank: a tensor has another dtype, is not finite, or is a mean of
            squares with negative numbers; the message has its key.
    """
    num_readers, index = (group.size(), group.rank()) if group else (1, 0)
    problems: list[str] = []
    for path in sorted(checkpoint.glob("*.safetensors"))[index::num_readers]:
        try:
            with safe_open(path, "pt") as opened:
                for key in opened.keys():  # noqa: SIM118 (it is no dict)
                    if key not in wanted:
                        continue
                    problem = _value_problem(opened.get_tensor(key), key, wanted[key].dtype)
                    if problem is not None:
                        problems.append(f"{key!r} {problem}")
        except Exception as error:  # the library raises many types for an invalid file
            problems.append(f"{path.name} is damaged or foreign ({error!r})")
    problems_by_rank = all_gather_objects(problems, group) if group else [problems]
    all_problems = list(itertools.chain.from_iterable(problems_by_rank))
    if all_problems:
        first, *others = all_problems
        more = f", and {len(others)} more are invalid" if others else ""
        raise ValueError(f"{checkpoint}: {first}{more}; use another checkpoint")


def _value_problem(tensor: torch.Tensor, key: str, dtype: torch.dtype) -> str | None:
    """Returns the problem with a tensor's dtype or values, or None."""
    is_task_state = key.startswith("task/")
    both_float = tensor.is_floating_point() and dtype.is_floating_point
    if tensor.dtype != dtype and not (is_task_state and both_float):
        return f"is {tensor.dtype} and must be {dtype}"
    if not is_finite(tensor):
        return "contains NaN or infinity"
    if key.endswith(NON_NEGATIVE_SUFFIXES) and (tensor < 0).any():
        return "contains negative numbers"
    return None


def is_finite(tensor: torch.Tensor) -> bool:
    """Returns True if a tensor contains neither NaN nor infinity."""
    return bool(torch.isfinite(tensor).all())
