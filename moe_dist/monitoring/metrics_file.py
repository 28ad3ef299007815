"""Reads and checks metrics.jsonl of a run folder."""

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
_MOST_STEPS = 10**9
_LONGEST_KEY = 200  # characters: pictures are named by layers


def read_metrics(run: pathlib.Path) -> list[dict]:
    """Returns the lines of `run/metrics.jsonl` in order, less a last line that a killed run left torn.

    A null is NaN, and a list a float32 array of shape [E].

    Raises:
        ValueError: There is no such file, or a line of it is not JSON, has no step or has a value that no run writes.
    """
    path = run / FILE_NAME
    if not path.is_file():
        raise ValueError(f"no metrics file {path}: give the folder of a run that has started")
    lines = []
    experts: dict[str, int] = {}  # by key of a list
    for number, _, values in _lines(path):
        if isinstance(values, str):
            raise ValueError(f"{path} line {number} {values}: mend or remove it")
        for key, value in values.items():
            # of memory there is a number for each rank, and a run may go on with others
            if key.endswith(PER_EXPERT_SUFFIXES) and len(value) != experts.setdefault(
                key, len(value)
            ):
                told = (
                    f"has {len(value)} numbers in {key!r}, where an earlier line has {experts[key]}"
                )
                raise ValueError(f"{path} line {number} {told}: mend or remove it")
        lines.append(values)
    return lines


def _lines(path: pathlib.Path) -> Iterator[tuple[int, bytes, dict | str]]:
    """Yields of each complete line of a metrics file its number, itself, and its values or why it cannot be read."""
    with open(run_folder.open_existing(path), "rb") as file:
        for number, line in enumerate(file, start=1):
            if line.endswith(b"\n"):
                try:
                    values = json.loads(line)
                except (ValueError, RecursionError):
                    yield number, line, f"is not JSON ({line[:80]!r})"
                    continue
                step = values.get("step") if isinstance(values, dict) else None
                if type(step) is not int or not 0 <= step <= _MOST_STEPS:
                    yield number, line, f"has no step ({line[:80]!r})"
                    continue
                if strange := [
                    key for key, value in values.items() if not _is_valid_entry(key, value)
                ]:
                    yield (
                        number,
                        line,
                        f"has a {strange[0]!r:.90} that is none of ours ({line[:80]!r})",
                    )
                    continue
                yield number, line, {key: as_number(value) for key, value in values.items()}


def _is_valid_entry(key: str, value: Any) -> bool:
    """Returns whether a line may hold `value` as its `key`."""
    if not (key.isprintable() and len(key) <= _LONGEST_KEY):
        return False
    if key.endswith(LIST_SUFFIXES):
        return (
            isinstance(value, list) and len(value) > 0 and all(_is_number(each) for each in value)
        )
    return isinstance(value, str) and value.isprintable() if key in TEXT_KEYS else _is_number(value)


def _is_number(value: Any) -> bool:
    """Returns whether a value is null or a number that a float can hold."""
    return value is None or type(value) is float or (type(value) is int and abs(value) < 2**63)


def open_for_append(run: pathlib.Path) -> io.FileIO:
    """Opens the metrics file of a run, which exists, to read it and to append to it."""
    return open(
        run_folder.open_existing(run / FILE_NAME, os.O_RDWR | os.O_APPEND), "a+b", buffering=0
    )


def truncate_after(run: pathlib.Path, step: int) -> None:
    """Drops the lines of a run's metrics after `step`, at step 0 all of them, for the run starts anew.

    The file is replaced as a whole. Lines that a crash of the machine has damaged are dropped with a warning, so that a
    run that is started again by itself goes on.
    """
    path = run / FILE_NAME
    with run_folder.atomic_write(run, FILE_NAME) as file:
        for number, line, values in _lines(path) if step and path.is_file() else ():
            if isinstance(values, str):
                print(
                    f"warning: {path} line {number} {values}: it is dropped",
                    file=sys.stderr,
                    flush=True,
                )
            elif values["step"] <= step:
                file.write(line)


def as_json(value: float | list[float] | str) -> Any:
    if isinstance(value, list):
        return [as_json(each) for each in value]
    return value if isinstance(value, str) or math.isfinite(value) else None


def as_number(value: Any) -> Any:
    if isinstance(value, list):
        with np.errstate(over="ignore"):  # a number that a float32 cannot hold is infinite
            return np.array(
                value, dtype=np.float32
            )  # an eighth of a list's memory: runs have thousands of experts
    return math.nan if value is None else value
