"""Fingerprints of data: whether a run that goes on finds the data that it was trained on.

A checkpoint keeps how its data was given ("bundled", "folder", "files", or the name of a dataset), the
name and size of each file, and hashes of contents. Names are relative to the folder or the glob's first
part, so that data may be moved as a whole; of the name of a single file only how it is read is compared
(`files.kind_of`), and a small file may be packed (.gz, .bz2, .xz). A dataset of the Hub is described by
its own list of files, images that are held in memory by their pixels and labels.

The cost is bounded, for data may be terabytes:

- `BUDGET` bytes are read in all, of at most `NUM_READ` files. A file is read whole where it is no larger
  than its share, else in blocks at even distances, the first and the last among them. A change between
  the blocks of a large file, and in a file that is not among the `NUM_READ`, is seen by its size alone.
- Names and sizes of all files are read: 2 to 4 seconds of CPU on the main rank for 100,000 files.
- Packed files are unpacked where there are at most `MOST_NAMED` of them, of at most `MOST_UNPACKED` bytes
  together. Otherwise all are compared as they are, so that data which is packed later, or again by another
  program, is other data.
- Above `MOST_NAMED` files it is folders that are kept, each with the number of its files, their bytes and
  a hash of their names and sizes.
"""

import glob
import heapq
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import blake2b
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from moe_dist.data.files.find import find_files
from moe_dist.data.files.formats import DECOMPRESSORS, format_of
from moe_dist.data.files.regular_file import open_file
from moe_dist.data.text.corpus import BUNDLED, SHORT_NAMES, SPLITS, is_local
from moe_dist.monitoring.progress_bar import with_progress

BUDGET = 2**26  # bytes that are read in all
BLOCK = 2**16  # bytes
NUM_READ = 1000  # files, drawn by a hash of their names
MOST_NAMED = 5000  # entries
MOST_PACKED = 2**24  # bytes of a packed file that is unpacked to be compared
MOST_UNPACKED = 2**28  # bytes of all that are, unpacked
SEEKABLE = {ending: DECOMPRESSORS[ending] for ending in (".gz", ".bz2", ".xz")}
THE_FILE = "the file"  # name of the only one that was given, where it is plain text
MOST_TOLD = 3  # changes of an error


@dataclass(frozen=True)
class Source:
    """Data to be described."""

    given: str  # "bundled", "folder", "files", or a dataset's name
    size: Mapping[str, int]  # bytes of each file, by name
    digest: Callable[[str, int], str]  # (name, bytes that may be read) -> a hash of its contents


@dataclass(frozen=True)
class Fingerprint:
    """What a checkpoint keeps of a source."""

    given: str
    levels: int  # parts that names of entries have lost at their end; 0: entries are files
    entries: dict[
        str, list[Any]
    ]  # name -> number of files, their bytes, hash of their names and sizes
    share: int  # bytes of a file that may be read
    contents: dict[str, str]  # name of a file that was read -> hash

    @classmethod
    def read(cls, kept: Any) -> "Fingerprint":
        """Returns the fingerprint of a checkpoint's JSON.

        Raises:
            ValueError: It is none.
        """
        try:
            found = cls(**kept)
            numbers = [
                found.levels,
                found.share,
                *(x for e in found.entries.values() for x in e[:2]),
            ]
            texts = [found.given, *(e[2] for e in found.entries.values()), *found.contents.values()]
            whole = (
                all(type(x) is int and 0 <= x < 2**63 for x in numbers) and found.share <= BUDGET
            )
        except (TypeError, AttributeError, LookupError):
            whole = False
        if not whole or not all(isinstance(text, str) for text in texts):
            raise ValueError("the checkpoint's fingerprint of its data is broken")
        return found

    @classmethod
    def of(cls, source: Source) -> "Fingerprint":
        """Returns the fingerprint of a source, and reads what it needs for that."""
        read = heapq.nsmallest(NUM_READ, source.size, key=_hash)
        share = max(2 * BLOCK, BUDGET // max(1, len(read)))
        levels = 0
        while len(entries := _entries(source, levels)) > MOST_NAMED:
            levels += 1
        return cls(
            source.given,
            levels,
            entries,
            share,
            {name: source.digest(name, share) for name in read},
        )

    def changes(self, source: Source) -> list[str]:
        """Returns what of a source is not as it was, a phrase for each change, sorted by name."""
        if self.given != source.given:
            return [f"it was given as {self.given!r}, and is {source.given!r} now"]
        before, now, contents = self.entries, _entries(source, self.levels), self.contents
        found = {}
        for name in before.keys() | now.keys():
            if before.get(name) != now.get(name):
                found[name] = _told(name, before.get(name), now.get(name))
        for name in contents.keys() & source.size.keys():
            if name not in found and source.digest(name, self.share) != contents[name]:
                found[name] = f"{name} has other contents of the same size"
        return [found[name] for name in sorted(found)]


def checked(source: Source, kept: Any, place: str, allow: bool) -> tuple[dict[str, Any], str]:
    """Compares data with what a checkpoint kept of it.

    Args:
        source: The data.
        kept: The result of an earlier call, from JSON; None for a new run, or of a checkpoint without one.
        place: The field and value that name the data, for an error.
        allow: Whether to go on where the data has changed.

    Returns:
        What the next checkpoint keeps, and a note for people, which may be empty.

    Raises:
        ValueError: The data has changed, or `kept` is no fingerprint.
    """
    if kept is None:
        return asdict(Fingerprint.of(source)), ""
    changes = Fingerprint.read(kept).changes(source)
    if not changes:
        return kept, ""
    more = f"; and {len(changes) - MOST_TOLD} more changes" if len(changes) > MOST_TOLD else ""
    found = f"{place} is not the data that the run was trained on: {'; '.join(changes[:MOST_TOLD])}{more}"
    if not allow:
        raise ValueError(f"{found}. Give that data, or --allow-changed-data to go on with this")
    return asdict(Fingerprint.of(source)), found


def of_local(place: str) -> Source:
    """Returns the source of a folder, a glob or a file."""
    files = find_files(place)
    if os.path.isdir(place):
        return of_files("folder", files, place)
    fixed = list(takewhile(lambda part: not glob.has_magic(part), Path(place).parts))
    if len(files) != 1:
        return of_files("files", files, Path(*fixed))
    kind = format_of(files[0].name)
    return of_files(
        "files", files, files[0], only=THE_FILE if kind == ".txt" else f"the {kind} file"
    )


def of_named(place: str, repositories: Mapping[str, tuple[str, str | None, str | None]]) -> Source:
    """Returns the source of local files, or of a dataset of the Hub.

    Args:
        place: A path, or a dataset's name with ":" and its configuration.
        repositories: Short names -> (repository, its configuration where none is given, revision).
    """
    if is_local(place):
        return of_local(place)
    name, _, configuration = place.partition(":")
    repository, default, revision = repositories.get(name, (name, None, None))
    return of_hub(repository, configuration or default, revision)


def of_text(place: str) -> Source:
    """Returns the source of a text, of a language model or a pre-training."""
    if place != BUNDLED:
        return of_named(place, SHORT_NAMES)
    folder = Path(__file__).parent / "bundled"
    return of_files(BUNDLED, [folder / f"{split}.txt.xz" for split in SPLITS], folder, unpack=False)


def of_files(
    given: str,
    files: Iterable[Path | bytes],
    root: str | Path,
    unpack: bool = True,
    only: str = THE_FILE,
) -> Source:
    """Returns the source of files.

    Args:
        given: How they were given.
        files: Their paths.
        root: The folder below which their names begin, or the path of the only one.
        unpack: Whether a packed file is described as it is without.
        only: The name of the only one.

    Raises:
        ValueError: A packed file is damaged.
    """
    above = os.path.join(os.path.normpath(root), "")
    paths = {}
    for path in map(os.path.normpath, map(os.fsdecode, files)):
        paths[only if path == os.path.normpath(root) else _printable(path.removeprefix(above))] = (
            path
        )
    sizes = {
        name: os.stat(path).st_size for name, path in with_progress(paths.items(), "sizes of files")
    }
    packed: dict[str, str] = {}  # name -> its name without the ending, where no other file has that
    taken = set(paths)
    for name, path in paths.items() if unpack else ():
        ending = os.path.splitext(path)[1]
        plain = name.removesuffix(ending)
        if (
            ending in SEEKABLE
            and sizes[name] <= MOST_PACKED
            and (plain == name or plain not in taken)
        ):
            packed[name] = plain
            taken.add(plain)
    unpacked = _unpacked_sizes({name: paths[name] for name in packed})
    for name in unpacked:
        paths[packed[name]], sizes[packed[name]] = paths.pop(name), sizes.pop(name)
    sizes |= {packed[name]: size for name, size in unpacked.items()}
    as_unpacked = {packed[name] for name in unpacked}

    def digest(name: str, share: int) -> str:
        with _opened(paths[name], name in as_unpacked) as file:
            return _digest(file, sizes[name], share)

    return Source(given, sizes, digest)


def _unpacked_sizes(paths: dict[str, str]) -> dict[str, int]:
    """Returns the unpacked size of each packed file by name; of none where unpacking all of them would take long."""
    sizes: dict[str, int] = {}
    left = MOST_UNPACKED
    if len(paths) > MOST_NAMED or sum(map(os.path.getsize, paths.values())) > left:
        return {}
    for name, path in with_progress(sorted(paths.items()), "packed files"):
        try:
            with _opened(path, unpack=True) as file:
                sizes[name] = 0
                while part := file.read(2**20):
                    sizes[name] += len(part)
                    left -= len(part)
                    if left < 0:
                        return {}
        except Exception as error:  # each library has kinds of its own for what is damaged
            raise ValueError(f"{path}: cannot be unpacked ({error})") from error
    return sizes


@contextmanager
def _opened(path: str, unpack: bool) -> Iterator[Any]:
    with open_file(path) as file:
        yield SEEKABLE[os.path.splitext(path)[1]](file) if unpack else file


def of_arrays(given: str, arrays: Mapping[str, Iterable[np.ndarray]]) -> Source:
    """Returns the source of arrays in memory, some for each name."""

    def digest(name: str, share: int) -> str:
        found = blake2b(digest_size=16)
        for array in arrays[name]:
            found.update(str((array.dtype, array.shape)).encode())
            found.update(np.ascontiguousarray(array).data.cast("B"))
        return found.hexdigest()

    return Source(
        given, {name: sum(array.nbytes for array in some) for name, some in arrays.items()}, digest
    )


def of_hub(repository: str, configuration: str | None, revision: str | None) -> Source:
    """Returns the source of a dataset of the Hub, whose files are not read: the Hub has their sizes and hashes.

    Raises:
        ValueError: The Hub does not answer.
    """
    from huggingface_hub import HfApi

    try:
        info = HfApi().dataset_info(repository, revision=revision, files_metadata=True, timeout=60)
    except Exception as error:  # of many kinds: the library's own, its network client's
        raise ValueError(f"{repository}: the Hub does not tell its files ({error})") from error
    files = {file.rfilename: file for file in info.siblings or () if file.rfilename[0] != "."}
    files.pop("README.md", None)
    hashes = {
        name: file.lfs.sha256 if file.lfs else file.blob_id or "" for name, file in files.items()
    }
    given = f"{repository}:{configuration}" if configuration else repository
    return Source(
        given, {name: file.size or 0 for name, file in files.items()}, lambda name, _: hashes[name]
    )


def _digest(file: Any, size: int, share: int) -> str:
    if size <= share:
        starts: Iterable[int] = range(0, size, BLOCK)
    else:
        last = max(1, share // BLOCK - 1)
        starts = (i * (size - BLOCK) // last for i in range(last + 1))
    found = blake2b(digest_size=16)
    for start in starts:
        file.seek(start)
        found.update(file.read(BLOCK))
    return found.hexdigest()


def _entries(source: Source, levels: int) -> dict[str, list[Any]]:
    """Returns the entries of a fingerprint, each of the files whose names agree but for their last `levels` parts."""
    count: defaultdict[str, int] = defaultdict(int)
    size: defaultdict[str, int] = defaultdict(int)
    hashes: defaultdict[str, Any] = defaultdict(lambda: blake2b(digest_size=8))
    for name in sorted(source.size):
        parts = name.split("/")
        entry = "/".join(parts[: max(0, len(parts) - levels)]) or "."
        count[entry] += 1
        size[entry] += source.size[name]
        hashes[entry].update(f"{name}\0{source.size[name]}\0".encode())
    return {entry: [count[entry], size[entry], hashes[entry].hexdigest()] for entry in count}


def _told(name: str, was: list[Any] | None, now: list[Any] | None) -> str:
    """Returns a change of an entry."""
    if now is None:
        return f"{name} ({_size(was)}) is gone"
    if was is None:
        return f"{name} ({_size(now)}) was added"
    if was[:2] == now[:2]:
        return f"{name} ({_size(now)}) has files of other names or sizes"
    if was[0] == now[0] == 1:
        return f"{name} is {'longer' if now[1] > was[1] else 'shorter'} ({_size(was)} then, {_size(now)} now)"
    return f"{name} had {_size(was)}, and has {_size(now)}"


def _size(entry: Any) -> str:
    files = f"{entry[0]:,} files of " if entry[0] > 1 else ""
    return f"{files}{entry[1]:,} bytes"


def _hash(name: str) -> bytes:
    return blake2b(name.encode(), digest_size=8).digest()


def _printable(name: str) -> str:
    """Returns a file's name as text, for it may be any bytes."""
    return os.fsencode(name).decode(errors="backslashreplace")
