"""Fingerprint of a run's data: detects that the data has changed between two starts of a run.

A checkpoint contains its data's source kind, file names and sizes, and content hashes
(`data_source`). The cost is bounded, because data may be terabytes:

- At most `MAX_READ_BYTES` bytes from at most `MAX_HASHED_FILES` files are read. A file is read as
  a whole if it is not larger than its share, and otherwise in blocks at equal
  distances, including the first and the last. A change between these blocks, or in a file that is
  not read, is detected by the size alone.
- All file names and sizes are read: 2 to 4 CPU seconds on the main rank for 100,000 files.
- A source with more than `MAX_ENTRIES` files is stored by folder: its file count, their bytes,
  and a hash over their names and sizes.
- Compressed files are decompressed within the limits in `data_source`. Beyond them they are
  compared as they are, so that data which was compressed by another program is different data.
"""

import heapq
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import blake2b
from typing import Any

from moe_dist.data.data_source import BLOCK_BYTES, DataSource

MAX_READ_BYTES = 2**26
MAX_HASHED_FILES = 1000  # chosen by name hash
MAX_ENTRIES = 5000
MAX_LISTED_CHANGES = 3  # in an error
_MAX_NUMBER = 2**63 - 1


@dataclass(frozen=True)
class Fingerprint:
    """A data source's description in a checkpoint; the field names are part of its format.

    Attributes:
        given: The source kind, see `DataSource.given`.
        levels: Path parts removed from file names to form entry names; 0 if the entries are files.
        entries: [file count, bytes, hash over names and sizes], by entry name.
        share: The maximum bytes that are read from a file.
        contents: Contents hashes by file name, for the files that were read.
    """

    given: str
    levels: int
    entries: dict[str, list[Any]]
    share: int
    contents: dict[str, str]

    @classmethod
    def from_json(cls, value: Any) -> "Fingerprint":
        """Returns the fingerprint in a checkpoint.

        Args:
            value: The JSON value that `check_unchanged` returned for the earlier run.

        Returns:
            The fingerprint, whose values all have their types.

        Raises:
            ValueError: It is not a fingerprint.
        """
        try:
            fingerprint = cls(**value)
            is_valid = fingerprint._is_valid()
        except (TypeError, AttributeError, LookupError):
            is_valid = False
        if not is_valid:
            raise ValueError(
                "the checkpoint's fingerprint of its data is broken; use another checkpoint"
            )
        return fingerprint

    @classmethod
    def of_source(cls, source: DataSource) -> "Fingerprint":
        """Reads some contents from a source, and returns its fingerprint."""
        hashed_files = heapq.nsmallest(MAX_HASHED_FILES, source.size, key=_hash_name)
        share = max(2 * BLOCK_BYTES, MAX_READ_BYTES // max(1, len(hashed_files)))
        levels = 0
        entries = _entries(source, levels)
        while len(entries) > MAX_ENTRIES:
            levels += 1
            entries = _entries(source, levels)
        contents = {name: source.digest(name, share) for name in hashed_files}
        return cls(source.given, levels, entries, share, contents)

    def changes(self, source: DataSource) -> list[str]:
        """Compares a source with this fingerprint.

        Args:
            source: The current run's data.

        Returns:
            A phrase for each change, sorted by name; empty if the data is the same.
        """
        if self.given != source.given:
            return [f"it was given as {self.given!r}, and is {source.given!r} now"]
        before = self.entries
        now = _entries(source, self.levels)
        changes = {}
        for name in before.keys() | now.keys():
            if before.get(name) != now.get(name):
                changes[name] = _describe_change(name, before.get(name), now.get(name))
        for name in self.contents.keys() & source.size.keys():
            if name not in changes and source.digest(name, self.share) != self.contents[name]:
                changes[name] = f"{name} has other contents of the same size"
        return [changes[name] for name in sorted(changes)]

    def _is_valid(self) -> bool:
        """Returns whether all values have their types; may raise an error for broken entries."""
        numbers = [self.levels, self.share]
        texts = [self.given, *self.contents.values()]
        for entry in self.entries.values():
            numbers += entry[:2]
            texts.append(entry[2])
        has_numbers = all(type(number) is int and 0 <= number <= _MAX_NUMBER for number in numbers)
        has_texts = all(isinstance(text, str) for text in texts)
        return has_numbers and has_texts and self.share <= MAX_READ_BYTES


def check_unchanged(
    source: DataSource, saved: Any, place: str, allow_changes: bool
) -> tuple[dict[str, Any], str]:
    """Compares a run's data with the fingerprint in a checkpoint.

    Args:
        source: The data.
        saved: The fingerprint that an earlier call returned, from JSON; None for a new run, or if
            the checkpoint has none.
        place: The config field and value that name the data, for the error.
        allow_changes: If true, changed data is accepted.

    Returns:
        The fingerprint for the next checkpoint, and a note for the user, empty if there is none.

    Raises:
        ValueError: The data has changed, or `saved` is not a fingerprint.
    """
    if saved is None:
        return asdict(Fingerprint.of_source(source)), ""
    changes = Fingerprint.from_json(saved).changes(source)
    if not changes:
        return saved, ""
    note = f"{place} is not the data that the run was trained on: {_first_changes(changes)}"
    if not allow_changes:
        raise ValueError(
            f"{note}. Use the original data, or pass --allow-changed-data to continue with this one"
        )
    return asdict(Fingerprint.of_source(source)), note


def _first_changes(changes: Sequence[str]) -> str:
    listed = "; ".join(changes[:MAX_LISTED_CHANGES])
    num_more = len(changes) - MAX_LISTED_CHANGES
    return f"{listed}; and {num_more} more changes" if num_more > 0 else listed


def _entries(source: DataSource, levels: int) -> dict[str, list[Any]]:
    """Returns the entries of a fingerprint.

    An entry contains the files whose names are equal without their last `levels` parts.
    """
    files_of_entry: dict[str, list[str]] = {}
    for name in sorted(source.size):
        parts = name.split("/")
        entry = "/".join(parts[: max(0, len(parts) - levels)]) or "."
        files_of_entry.setdefault(entry, []).append(name)
    entries = {}
    for entry, names in files_of_entry.items():
        digest = blake2b(digest_size=8)
        for name in names:
            digest.update(f"{name}\0{source.size[name]}\0".encode())
        num_bytes = sum(source.size[name] for name in names)
        entries[entry] = [len(names), num_bytes, digest.hexdigest()]
    return entries


def _describe_change(name: str, before: list[Any] | None, now: list[Any] | None) -> str:
    if now is None:
        return f"{name} ({_describe_size(before)}) is gone"
    if before is None:
        return f"{name} ({_describe_size(now)}) was added"
    if before[:2] == now[:2]:
        return f"{name} ({_describe_size(now)}) has files of other names or sizes"
    if before[0] == now[0] == 1:
        change = "longer" if now[1] > before[1] else "shorter"
        return f"{name} is {change} ({_describe_size(before)} then, {_describe_size(now)} now)"
    return f"{name} had {_describe_size(before)}, and has {_describe_size(now)}"


def _describe_size(entry: Any) -> str:
    num_files = entry[0]
    num_bytes = entry[1]
    files = f"{num_files:,} files of " if num_files > 1 else ""
    return f"{files}{num_bytes:,} bytes"


def _hash_name(name: str) -> bytes:
    return blake2b(name.encode(), digest_size=8).digest()
