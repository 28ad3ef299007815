"""Reading and checking of `metrics.jsonl` in a run folder.

Legend: E experts, P ranks.
"""

import io
import json
import math
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from moe_dist.config import run_folder
from moe_dist.monitoring.metric_keys import LIST_SUFFIXES, PER_EXPERT_SUFFIXES, TEXT_KEYS

FILE_NAME = "metrics.jsonl"
_MAX_STEPS = 10**9
_MAX_KEY_CHARS = 200  # names of plot files contain the layer's name


def read_metrics(run: pathlib.Path) -> list[dict]:
    """Reads all lines of a run's metrics file.

    A killed run may leave an incomplete last line, which is ignored.

    Args:
        run: The run folder.

    Returns:
        The lines in file order. A null becomes NaN, a list a float32 array of shape [E] or [P].

    Raises:
        ValueError: The file does not exist, or one of its lines is not valid.
    """
    path = run / FILE_NAME
    if not path.is_file():
        raise ValueError(f"no metrics file {path}: give the folder of a run that has started")
    lines = []
    num_experts: dict[str, int] = {}  # by key
    for number, _, values in _lines(path):
        if isinstance(values, str):
            raise ValueError(_damaged_line(path, number, values))
        for key, value in values.items():
            # the length of per-rank lists may change: a run may resume on more or fewer ranks
            if not key.endswith(PER_EXPERT_SUFFIXES):
                continue
            expected = num_experts.setdefault(key, len(value))
            if len(value) != expected:
                reason = f"has {len(value)} numbers in {key!r}, earlier lines have {expected}"
                raise ValueError(_damaged_line(path, number, reason))
        lines.append(values)
    return lines


def _damaged_line(path: pathlib.Path, number: int, reason: str) -> str:
    return (
        f"{path} line {number} {reason}: repair or remove the line; read a run of an earlier "
        "version with that version (CHANGELOG.md)"
    )


def _lines(path: pathlib.Path) -> Iterator[tuple[int, bytes, dict | str]]:
    """Yields, for each complete line, its number, its bytes, and its values or an error text."""
    with open(run_folder.open_existing(path), "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.endswith(b"\n"):
                yield number, line, _parse(line)


def _parse(line: bytes) -> dict | str:
    """Returns the values of a line, or the reason why it is not valid."""
    start = line[:80]
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return f"is not JSON ({start!r})"
    step = values.get("step") if isinstance(values, dict) else None
    if type(step) is not int or not 0 <= step <= _MAX_STEPS:
        return f"has no step from 0 to {_MAX_STEPS} ({start!r})"
    for key, value in values.items():
        if not _is_valid_entry(key, value):
            return f"has an unexpected key or type: {key!r:.90} ({start!r})"
    return {key: as_number(value) for key, value in values.items()}


def _is_valid_entry(key: str, value: Any) -> bool:
    """Returns whether a line may contain `value` under `key`."""
    if not key.isprintable() or len(key) > _MAX_KEY_CHARS:
        return False
    if key.endswith(LIST_SUFFIXES):
        return isinstance(value, list) and len(value) > 0 and all(map(_is_number, value))
    if key in TEXT_KEYS:
        return isinstance(value, str) and value.isprintable()
    return _is_number(value)


def _is_number(value: Any) -> bool:
    """Returns whether a value is null or a number that fits into a float64."""
    if type(value) is int:
        return abs(value) < 2**63
    return value is None or type(value) is float


def open_for_append(run: pathlib.Path) -> io.FileIO:
    """Opens the existing metrics file of a run for reading and appending, unbuffered."""
    descriptor = run_folder.open_existing(run / FILE_NAME, os.O_RDWR | os.O_APPEND)
    return open(descriptor, "a+b", buffering=0)


def truncate_after(run: pathlib.Path, step: int) -> None:
    """Drops the lines after `step` from a run's metrics file.

    The file is replaced atomically, and created if it does not exist. Lines that are damaged (for
    example by a crash of the machine) are dropped with a warning, so that an automatic restart
    succeeds.

    Args:
        run: The run folder.
        step: Last step that is kept; 0 drops all lines, because the run starts from the beginning.
    """
    path = run / FILE_NAME
    with run_folder.atomic_write(run, FILE_NAME) as file:
        if step == 0 or not path.is_file():
            return
        for number, line, values in _lines(path):
            if isinstance(values, str):
                warning = f"warning: {path} line {number} {values}: the line is dropped"
                print(warning, file=sys.stderr, flush=True)
            elif values["step"] <= step:
                file.write(line)


def as_json(value: float | list[float] | str) -> Any:
    """Returns a value for JSON: numbers that are not finite become None."""
    if isinstance(value, list):
        return [as_json(item) for item in value]
    if isinstance(value, str) or math.isfinite(value):
        return value
    return None


def as_number(value: Any) -> Any:
    """Returns a value from JSON: None becomes NaN, a list a float32 array."""
    if isinstance(value, list):
        # float32 takes an eighth of the memory of a list, and a run may have thousands of experts;
        # a number beyond its range becomes infinite
        with np.errstate(over="ignore"):
            return np.array(value, dtype=np.float32)
    return math.nan if value is None else value
