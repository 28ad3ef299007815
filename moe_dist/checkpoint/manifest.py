"""Finds, seals and removes checkpoints; the manifest shows which ones are complete.

    RUN/checkpoints/step_00000425/manifest.sha256   one line per other file, for `sha256sum --check`
    RUN/checkpoints/partial_step_00000450/          a checkpoint during writing or removal

A checkpoint is in one of three states:

    complete    the folder has exactly the manifest's files, and each has its checksum
    damaged     a file is missing, added or changed; refused, and the error names the file
    partial     its folder is not renamed yet; never read, and removed by the next start
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
CONFIG = "config.json"  # the run's config; earlier versions saved none
LINE_PATTERN = re.compile(r"([0-9a-f]{64})  ([\w.-]+)")
STEP_GLOB = "step_" + "[0-9]" * 8
FOLDER = "checkpoints"


def folder(run: Path, step: int) -> Path:
    """Returns the folder for the checkpoint after `step` steps."""
    return run / FOLDER / f"step_{step:08d}"


def list_checkpoints(run: Path) -> list[Path]:
    """Returns a run's checkpoints, oldest first, complete or damaged."""
    return sorted((run / FOLDER).glob(STEP_GLOB))


def require_checkpoints(run: Path) -> list[Path]:
    """Returns `list_checkpoints`; raises ValueError if there is none."""
    checkpoints = list_checkpoints(run)
    if not checkpoints:
        raise ValueError(
            f"{run}: no checkpoint to continue from. Check that it is a run folder. If the run "
            f"ended before its first save, start it again with --folder {run}"
        )
    return checkpoints


def newest_complete(run: Path, group: Group | None = None) -> tuple[Path, dict[Path, str]]:
    """Finds a run's newest complete checkpoint.

    Args:
        run: The run folder.
        group: Ranks that share the reads; the call is then a collective. None: this process reads
            all files.

    Returns:
        The checkpoint's folder, and the newer damaged ones, each with its problem.

    Raises:
        ValueError: On every rank: the run has no complete checkpoint.
    """
    refused: dict[Path, str] = {}
    if group:
        checkpoints = run_on_main(lambda: require_checkpoints(run), group)
    else:
        checkpoints = require_checkpoints(run)
    for checkpoint in reversed(checkpoints):
        damage = find_damage(checkpoint, group)
        if not damage:
            return checkpoint, refused
        refused[checkpoint] = f"{checkpoint} is damaged: {'; '.join(damage)}"
    raise ValueError(
        f"{run}: no complete checkpoint to continue from. {'. '.join(refused.values())}"
    )


def check_complete(checkpoint: Path) -> None:
    """Checks if a checkpoint is complete.

    Args:
        checkpoint: The checkpoint's folder.

    Raises:
        ValueError: It is damaged; the message has the files and the run's newest complete
            checkpoint.
    """
    damage = find_damage(checkpoint)
    if not damage:
        return
    try:
        newest, _ = newest_complete(checkpoint.resolve().parent.parent)
        instead = f"the newest complete checkpoint is {newest}"
    except ValueError:
        instead = "its run has no complete checkpoint"
    raise ValueError(f"{checkpoint} is damaged: {'; '.join(damage)}. Refused; {instead}")


def find_damage(checkpoint: Path, group: Group | None = None) -> list[str]:
    """Compares a checkpoint's files with its manifest.

    Args:
        checkpoint: The checkpoint's folder.
        group: Ranks that share the reads; the call is then a collective.

    Returns:
        A phrase for each missing, added or changed file; empty for a complete checkpoint. The same
        on every rank.
    """
    num_readers, index = (group.size(), group.rank()) if group else (1, 0)
    damage: list[str] = []
    try:
        checksums = _read_manifest(checkpoint)
        # Ignore hidden files left by file systems, except those named like a shard: torch's reader
        # would read them.
        paths = [
            path
            for path in checkpoint.iterdir()
            if not path.name.startswith(".") or path.suffix == ".safetensors"
        ]
        for path in sorted(paths):
            if path.name not in checksums and path.name != NAME:
                damage.append(f"{path.name} is not in {NAME}")
        if STATE not in checksums:
            damage.append(f"{NAME} has no {STATE}")
        present = {path.name for path in paths if path.is_file()} - {NAME}
        for name in sorted(checksums)[index::num_readers]:
            if name not in present:
                damage.append(f"{name} is missing")
            elif checksum(checkpoint / name) != checksums[name]:
                damage.append(f"{name} does not match its checksum in {NAME}")
    except (OSError, ValueError) as error:
        damage.append(str(error))
    damage_by_rank = all_gather_objects(damage, group) if group else [damage]
    unique: dict[str, None] = {}
    for phrases in damage_by_rank:
        unique |= dict.fromkeys(phrases)
    return list(unique)


def _read_manifest(checkpoint: Path) -> dict[str, str]:
    """Returns the checksums by file name; raises ValueError or OSError for a damaged manifest."""
    if not (checkpoint / NAME).is_file():
        raise ValueError(f"{NAME} is missing")
    *lines, rest = read(checkpoint / NAME).decode(errors="replace").split("\n")
    checksums: dict[str, str] = {}
    for line in lines:
        match = LINE_PATTERN.fullmatch(line)
        if match is None:
            raise ValueError(f"{NAME} is damaged")
        checksums[match[2]] = match[1]
    if rest:  # the last line has no end
        raise ValueError(f"{NAME} is damaged")
    return checksums


def checksum(path: Path) -> str:
    """Returns a regular file's SHA-256, in hexadecimal."""
    with open(open_existing(path), "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_intact(checkpoint: Path, name: str) -> bool:
    """Returns True if a checkpoint's file is in the manifest and has its checksum."""
    try:
        return _read_manifest(checkpoint).get(name) == checksum(checkpoint / name)
    except (OSError, ValueError):
        return False


def seal(partial: Path, written: list[Path], final: Path, group: Group) -> None:
    """Writes a partial checkpoint's manifest and renames its folder. A collective.

    Args:
        partial: The folder to which all ranks have written.
        written: The files written by this rank.
        final: The complete checkpoint's folder. A checkpoint with this name is replaced.
        group: The ranks.

    Raises:
        OSError: On every rank: a rank's file cannot be read, or the folder cannot be renamed.
    """
    local: dict[str, str] | OSError
    try:
        local = {path.name: checksum(path) for path in written}
    except OSError as error:
        local = error
    checksums_by_rank = all_gather_objects(local, group)

    def complete() -> None:
        lines: list[str] = []
        for checksums in checksums_by_rank:
            if isinstance(checksums, OSError):
                raise checksums
            lines += [f"{digest}  {name}\n" for name, digest in checksums.items()]
        write(partial, NAME, "".join(lines))
        # The writer flushes the shards, but not the small files.
        small = [path for path in written if path.suffix == ".json"]
        for path in (*small, partial / NAME, partial):
            _flush_to_disk(path)
        # A checkpoint with this name was refused: the run continued from an earlier one.
        remove(final)
        partial.rename(final)

    run_on_main(complete, group)


def prune(run: Path, keep: int, refused: Container[Path]) -> None:
    """Removes old checkpoints.

    Args:
        run: The run folder.
        keep: Number of newest checkpoints to keep.
        refused: Damaged checkpoints; they are neither counted nor removed.
    """
    candidates = [path for path in list_checkpoints(run) if path not in refused]
    for old in candidates[:-keep]:
        with contextlib.suppress(OSError):  # a file is in use; the next call tries again
            remove(old)


def remove(checkpoint: Path) -> None:
    """Removes a checkpoint, if it exists.

    It is renamed to a partial checkpoint first, so no reader finds an incomplete one.

    Args:
        checkpoint: The checkpoint's folder.

    Raises:
        OSError: The folder cannot be renamed.
    """
    run = checkpoint.parent.parent
    removed_name = f"{FOLDER}/{PARTIAL}old_{checkpoint.name}"
    run_folder.remove(run, removed_name)
    if os.path.lexists(checkpoint):
        checkpoint.rename(run / removed_name)
        with contextlib.suppress(OSError):  # a file is in use; the next start removes it
            run_folder.remove(run, removed_name)


def remove_partial(run: Path) -> None:
    """Removes partial checkpoints left by killed runs."""
    for partial in (run / FOLDER).glob(f"{PARTIAL}*"):
        with contextlib.suppress(OSError):
            run_folder.remove(run, f"{FOLDER}/{partial.name}")


def _flush_to_disk(path: Path) -> None:
    """Flushes a file or folder to the disk.

    After a power failure an unflushed checkpoint would be lost, and earlier ones are removed.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
