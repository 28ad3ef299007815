"""Files in a data source: the files that a path, a glob or a folder names, and their splits.

Copies that editors keep (x.txt~, #x.txt#) are skipped in folders and globs.
"""

import glob
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from moe_dist.data.files.formats import check_ending
from moe_dist.data.files.regular_file import open_file
from moe_dist.data.files.split_names import is_backup, is_hidden, is_no_data, splits_in_names

_MAX_CARD_BYTES = 2**20


def find_files(source: str) -> list[Path]:
    """Returns the files that a path, a glob or a folder names.

    Names that begin with a dot and copies that editors keep are skipped in folders and by
    wildcards, and so are README and LICENSE in folders. A folder is entered once, even if several
    links lead to it.

    Args:
        source: A file, a folder, or a glob. A path that exists is not expanded as a glob, so that
            names with [ or * need no escaping.

    Returns:
        The paths, sorted by name; empty if nothing has that name.
    """
    if os.path.isdir(source):
        found = []
        for folder, names in _walk(source):
            found += [Path(folder, name) for name in names if not is_no_data(name)]
        return sorted(found, key=str)
    names = [source] if os.path.lexists(source) else _expand_glob(source)
    first_path: dict[tuple[str, str], Path] = {}  # by real folder and name
    for name in names:
        if not os.path.isdir(name):
            key = (os.path.realpath(os.path.dirname(name)), os.path.basename(name))
            first_path.setdefault(key, Path(name))
    return list(first_path.values())


def find_splits(source: str) -> dict[str, list[Path]]:
    """Returns the files of each split of a data source.

    A folder is split by its subfolder names, or else by its file names, such as `train/`,
    `train-00000.jsonl` or `my_test.txt`. All files are "train" if no name contains a split, and for
    a file or a glob.

    Args:
        source: A file, a folder, or a glob.

    Returns:
        Paths by split: "train", "valid" and "test", as far as `source` has them.

    Raises:
        ValueError: The folder has no files, contains several datasets, or contains a file that is
            not supported or whose split is not clear.
    """
    files = find_files(source)
    if not os.path.isdir(source):
        return {"train": files}
    if not files:
        raise ValueError("the folder has no data files; add some, or give another folder")
    _check_card(Path(source, "README.md"))
    for file in files:
        check_ending(file.name)
    relative = [file.relative_to(source) for file in files]
    by_folder = [splits_in_names(path.parent.parts) for path in relative]
    by_name = [splits_in_names([path.name]) for path in relative]
    for splits_of_file in (by_folder, by_name):
        if any(splits_of_file):
            return _group_by_split(files, relative, splits_of_file)
    return {"train": files}


def _group_by_split(
    files: Sequence[Path], relative: Sequence[Path], splits_of_file: Sequence[set[str]]
) -> dict[str, list[Path]]:
    """Returns the files of each split; raises ValueError for a file without exactly one."""
    groups: dict[str, list[Path]] = {}
    for file, path, splits in zip(files, relative, splits_of_file, strict=True):
        if not splits:
            raise ValueError(
                f"{path} has no split in its name, unlike the other files; rename or remove it"
            )
        if len(splits) > 1:
            raise ValueError(
                f"{path} has several splits in its name ({' and '.join(sorted(splits))}); "
                "rename or remove it"
            )
        groups.setdefault(splits.pop(), []).append(file)
    return groups


def _walk(folder: str) -> Iterator[tuple[str, list[str]]]:
    """Yields `folder` and the folders below it, each once, with the names of its visible files."""

    def refuse(error: OSError) -> None:
        raise ValueError(f"{error.filename}: {error.strerror}") from error

    visited = set()
    for place, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        status = os.stat(place)
        identity = (status.st_dev, status.st_ino)
        if identity in visited:
            folders.clear()
            continue
        visited.add(identity)
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        yield place, [name for name in files if not is_hidden(name)]


def _expand_glob(pattern: str) -> list[str]:
    """Returns the sorted paths that match a glob, in which `**` stands for any folders.

    `glob.glob(pattern, recursive=True)` follows every link, and so does not end if two links lead
    upwards; `_walk` visits each folder once.
    """
    head, *rest = re.split(r"(?:^|(?<=/))\*\*(?:/|$)", pattern)
    names = glob.glob(head) if head else ["."]
    for part in rest:
        names = list(_matches_below(names, part or "*"))
    return sorted(os.path.normpath(name) for name in names if not is_backup(os.path.basename(name)))


def _matches_below(folders: Iterable[str], pattern: str) -> Iterator[str]:
    for folder in folders:
        for place, _ in _walk(folder):
            yield from glob.glob(os.path.join(glob.escape(place), pattern))


def _check_card(card: Path) -> None:
    """Raises ValueError if the head of a dataset's README lists several configurations."""
    if not card.is_file():
        return
    with open_file(card) as file:
        head = file.read(_MAX_CARD_BYTES).decode(errors="replace").split("\n---")[0]
    names = re.findall(r"^\s*-?\s*config_name:\s*(\S+)", head, re.MULTILINE)
    if head.startswith("---") and len(set(names)) > 1:
        raise ValueError(
            f"the folder has several datasets ({', '.join(names[:5])}); "
            "give the folder of one of them"
        )
