"""Which files make a checkpoint, and whether they are as they were written.

    RUN/checkpoints/step_00000425/manifest.sha256    a line for each other file, as `sha256sum --check` reads it

A checkpoint is whole where the manifest lists the files that are there, no more and no fewer, and each has its
checksum. What is not whole is refused by name, and the newest whole one is used.
"""

import contextlib
import hashlib
import os
import re
from collections.abc import Container
from pathlib import Path

from moe_dist.config import run_folder
from moe_dist.config.run_folder import PARTIAL, open_existing, read, write
from moe_dist.distributed.collectives import Group, all_gather_objects, run_on_main

NAME = "manifest.sha256"
STATE = "state.json"
CONFIG = "config.json"  # a copy of the run's; older versions saved none
LINE_PATTERN = re.compile(r"([0-9a-f]{64})  ([\w.-]+)")
STEP_GLOB = "step_" + "[0-9]" * 8
FOLDER = "checkpoints"


def folder(run: Path, step: int) -> Path:
    return run / FOLDER / f"step_{step:08d}"


def list_checkpoints(run: Path) -> list[Path]:
    """Checkpoints of a run, the oldest first, whole or not."""
    return sorted((run / FOLDER).glob(STEP_GLOB))


def require_checkpoints(run: Path) -> list[Path]:
    """As `found`. Raises ValueError where there is none."""
    if not list_checkpoints(run):
        raise ValueError(
            f"{run}: no checkpoint to go on from; is it a run folder, and did the run reach its first save? If not, "
            f"start it again with --folder {run}"
        )
    return list_checkpoints(run)


def newest_complete(run: Path, group: Group | None = None) -> tuple[Path, dict[Path, str]]:
    """The newest whole checkpoint of a run, and newer ones that were refused, with the reason. With `group` a
    collective, which shares the reading. Raises ValueError, on every rank, where there is none."""
    refused: dict[Path, str] = {}
    there = (
        run_on_main(lambda: require_checkpoints(run), group) if group else require_checkpoints(run)
    )
    for checkpoint in reversed(there):
        wrong = find_damage(checkpoint, group)
        if not wrong:
            return checkpoint, refused
        refused[checkpoint] = f"{checkpoint} is not whole: {'; '.join(wrong)}"
    raise ValueError(f"{run}: no whole checkpoint to go on from. {'. '.join(refused.values())}")


def check_complete(checkpoint: Path) -> None:
    """Raises ValueError for a checkpoint that is not whole, naming what is wrong and the run's newest whole one."""
    if not (wrong := find_damage(checkpoint)):
        return
    try:
        instead = (
            f"the newest whole one is {newest_complete(checkpoint.resolve().parent.parent)[0]}"
        )
    except ValueError:
        instead = "its run has no whole one"
    raise ValueError(f"{checkpoint} is not whole: {'; '.join(wrong)}. Refused; {instead}")


def find_damage(checkpoint: Path, group: Group | None = None) -> list[str]:
    """What is wrong with a checkpoint's files, by name; empty for a whole one. With `group` a collective."""
    size, index = (group.size(), group.rank()) if group else (1, 0)
    wrong: list[str] = []
    try:
        listed = _read(checkpoint)
        # file systems leave hidden files; but one that ends like a shard would be read
        seen = [
            path
            for path in checkpoint.iterdir()
            if path.name[0] != "." or path.suffix == ".safetensors"
        ]
        there = {path.name for path in seen if path.is_file()} - {NAME}
        wrong += [
            f"{path.name} is not in {NAME}"
            for path in sorted(seen)
            if path.name not in {*listed, NAME}
        ]
        wrong += [f"{NAME} has no {STATE}"] if STATE not in listed else []
        for name in sorted(listed)[index::size]:
            if name not in there:
                wrong.append(f"{name} is missing")
            elif checksum(checkpoint / name) != listed[name]:
                wrong.append(f"{name} is altered or torn (another checksum in {NAME})")
    except (OSError, ValueError) as error:
        wrong.append(str(error))
    told = all_gather_objects(wrong, group) if group else [wrong]
    return list(dict.fromkeys(each for of_rank in told for each in of_rank))


def _read(checkpoint: Path) -> dict[str, str]:
    """Checksums by name of file. Raises ValueError or OSError for a manifest that is not as it was written."""
    if not (checkpoint / NAME).is_file():
        raise ValueError(f"{NAME} is missing")
    *lines, rest = read(checkpoint / NAME).decode(errors="replace").split("\n")
    matches = [LINE_PATTERN.fullmatch(line) for line in lines]
    if rest or not all(matches):
        raise ValueError(f"{NAME} is altered or torn")
    return {match[2]: match[1] for match in matches if match}


def checksum(path: Path) -> str:
    with open(open_existing(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_intact(checkpoint: Path, name: str) -> bool:
    """Returns whether the manifest has this file, which is as it was written; the others are not looked at."""
    try:
        return _read(checkpoint).get(name) == checksum(checkpoint / name)
    except (OSError, ValueError):
        return False


def seal(partial: Path, mine: list[Path], final: Path, group: Group) -> None:
    """Makes what all ranks have written to `partial` the checkpoint `final`. `mine`: files that this rank wrote. A
    collective. Raises OSError on every rank."""
    sums: dict[str, str] | OSError
    try:
        sums = {path.name: checksum(path) for path in mine}
    except OSError as error:
        sums = error
    told = all_gather_objects(sums, group)

    def end() -> None:
        for of_rank in told:
            if isinstance(of_rank, OSError):
                raise of_rank
        lines = [f"{sum_}  {name}\n" for of_rank in told for name, sum_ in of_rank.items()]  # type: ignore[union-attr]
        write(partial, NAME, "".join(lines))
        small = [
            path for path in mine if path.suffix == ".json"
        ]  # shards have been written through
        for path in (*small, partial / NAME, partial):
            _write_through(path)
        remove(final)  # refused, where there is one, since the run went on from an earlier one
        partial.rename(final)

    run_on_main(end, group)


def prune(run: Path, keep: int, refused: Container[Path]) -> None:
    """Removes all checkpoints but the newest `keep`, not counting those `refused`, which stay."""
    for old in [path for path in list_checkpoints(run) if path not in refused][:-keep]:
        with contextlib.suppress(OSError):  # a file that is in use; the next time will do
            remove(old)


def remove(checkpoint: Path) -> None:
    """Removes a checkpoint, if it exists; it is never seen half removed. Raises OSError where it cannot be moved."""
    run, gone = checkpoint.parent.parent, f"{FOLDER}/{PARTIAL}old_{checkpoint.name}"
    run_folder.remove(run, gone)
    if os.path.lexists(checkpoint):
        checkpoint.rename(run / gone)
        with contextlib.suppress(OSError):  # a file that is in use; the next start will do
            run_folder.remove(run, gone)


def remove_partial(run: Path) -> None:
    """Removes what killed runs left half written or half removed."""
    for partial in (run / FOLDER).glob(f"{PARTIAL}*"):
        with contextlib.suppress(OSError):
            run_folder.remove(run, f"{FOLDER}/{partial.name}")


def _write_through(path: Path) -> None:
    """To the disk: power may fail, and earlier checkpoints are removed."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
