"""Data sources as named parts with sizes and hashes: files, arrays or Hub datasets.

`fingerprint` compares them between two starts of a run. File names are relative to the folder or
to the glob's first part, so that data may be moved as a whole. A single file is named by
its format alone (`formats.format_of`), so that it may be renamed.

A small compressed file (.gz, .bz2, .xz) is described by its decompressed contents, and may be
compressed or decompressed between two runs. If there are too many compressed files, or if their
contents are too large, all are described as they are.
"""

import glob
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import blake2b
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np

from moe_dist.data.files.find import find_files
from moe_dist.data.files.formats import DECOMPRESSORS, PLAIN_TEXT, format_of
from moe_dist.data.files.regular_file import open_file
from moe_dist.data.text.corpus import BUNDLED, SHORT_NAMES, SPLITS, is_local
from moe_dist.monitoring.progress_bar import with_progress

BLOCK_BYTES = 2**16  # large files are hashed in such blocks
MAX_COMPRESSED_BYTES = 2**24  # a larger compressed file is described as it is
MAX_DECOMPRESSED_FILES = 5000
MAX_DECOMPRESSED_BYTES = 2**28  # for all files together
# compressions whose contents can be read from any position
SEEKABLE_DECOMPRESSORS = {ending: DECOMPRESSORS[ending] for ending in (".gz", ".bz2", ".xz")}
SINGLE_FILE = "the file"  # a source's only file, if it is plain text
_HUB_TIMEOUT_S = 60


@dataclass(frozen=True)
class DataSource:
    """A data set whose parts have names, sizes and hashes.

    Attributes:
        given: The source kind: "bundled", "folder", "files", or a dataset name.
        size: Bytes by part name.
        digest: A function (part name, maximum bytes to read) -> contents hash.
    """

    given: str
    size: Mapping[str, int]
    digest: Callable[[str, int], str]


def text_source(place: str) -> DataSource:
    """Returns the source for the text that a language model or a pre-training reads.

    Args:
        place: data.text.

    Returns:
        The source for the bundled text, local files, or a Hub dataset.
    """
    if place != BUNDLED:
        return named_source(place, SHORT_NAMES)
    folder = Path(__file__).parent / "bundled"
    files = [folder / f"{split}.txt.xz" for split in SPLITS]
    return files_source(BUNDLED, files, folder, decompress=False)


def named_source(
    place: str, repositories: Mapping[str, tuple[str, str | None, str | None]]
) -> DataSource:
    """Returns the source for local files, or for a Hub dataset.

    Args:
        place: A path, a glob, or a dataset's name, with ":" and its configuration if it has one.
        repositories: (repository, default configuration, revision) by short name.

    Returns:
        The source for the files if some have this name, and otherwise for the dataset.
    """
    if is_local(place):
        return local_source(place)
    name, _, configuration = place.partition(":")
    repository, default, revision = repositories.get(name, (name, None, None))
    return hub_source(repository, configuration or default, revision)


def local_source(place: str) -> DataSource:
    """Returns the source for a file, a folder or a glob."""
    files = find_files(place)
    if os.path.isdir(place):
        return files_source("folder", files, place)
    if len(files) == 1:
        format_ = format_of(files[0].name)
        name = SINGLE_FILE if format_ == PLAIN_TEXT else f"the {format_} file"
        return files_source("files", files, files[0], single_name=name)
    fixed = takewhile(lambda part: not glob.has_magic(part), Path(place).parts)
    return files_source("files", files, Path(*fixed))


def files_source(
    given: str,
    files: Iterable[Path | bytes],
    root: str | Path,
    decompress: bool = True,
    single_name: str = SINGLE_FILE,
) -> DataSource:
    """Returns the source for files.

    Args:
        given: The source kind, see `DataSource.given`.
        files: The file paths.
        root: The folder to which their names are relative, or the only file's path.
        decompress: If true, small compressed files are described by their decompressed contents.
        single_name: The only file's name, if `root` is its path.

    Returns:
        The source. Its hashes are computed when they are needed.

    Raises:
        ValueError: A compressed file is damaged.
    """
    paths = _named_paths(files, root, single_name)
    sizes = {}
    for name, path in with_progress(paths.items(), "file sizes"):
        sizes[name] = os.stat(path).st_size
    new_names = _decompressed_names(paths, sizes) if decompress else {}
    decompressed_sizes = _decompressed_sizes({name: paths[name] for name in new_names})
    is_decompressed = set()
    for name in decompressed_sizes:
        new_name = new_names[name]
        paths[new_name] = paths.pop(name)
        del sizes[name]
        is_decompressed.add(new_name)
    for name, size in decompressed_sizes.items():
        sizes[new_names[name]] = size

    def digest(name: str, max_bytes: int) -> str:
        with _open(paths[name], decompress=name in is_decompressed) as file:
            return _hash_blocks(file, sizes[name], max_bytes)

    return DataSource(given, sizes, digest)


def arrays_source(given: str, arrays: Mapping[str, Iterable[np.ndarray]]) -> DataSource:
    """Returns the source for arrays in memory.

    Args:
        given: The source kind, see `DataSource.given`.
        arrays: The arrays in each part, by part name; hashed with their types and shapes.

    Returns:
        The source. A part's size is the sum over its arrays.
    """

    def digest(name: str, max_bytes: int) -> str:
        digest = blake2b(digest_size=16)
        for array in arrays[name]:
            digest.update(str((array.dtype, array.shape)).encode())
            digest.update(np.ascontiguousarray(array).data.cast("B"))
        return digest.hexdigest()

    sizes = {name: sum(array.nbytes for array in part) for name, part in arrays.items()}
    return DataSource(given, sizes, digest)


def hub_source(repository: str, configuration: str | None, revision: str | None) -> DataSource:
    """Returns the source for a Hub dataset.

    Its files are not read: the Hub lists their sizes and hashes.

    Args:
        repository: The dataset's name, such as "Salesforce/wikitext".
        configuration: A configuration's name, or None.
        revision: A branch, a tag or a commit; None for the newest.

    Returns:
        The source, without README and hidden files.

    Raises:
        ValueError: The Hub does not answer, or has no such dataset.
    """
    from huggingface_hub import HfApi

    try:
        info = HfApi().dataset_info(
            repository, revision=revision, files_metadata=True, timeout=_HUB_TIMEOUT_S
        )
    except Exception as error:  # the library and its network client raise types of their own
        raise ValueError(
            f"{repository}: cannot list the files of the dataset on the Hub ({error}); check the "
            "name and the network"
        ) from error
    sizes = {}
    hashes = {}
    for file in info.siblings or ():
        name = file.rfilename
        if name.startswith(".") or name == "README.md":
            continue
        sizes[name] = file.size or 0
        hashes[name] = file.lfs.sha256 if file.lfs else file.blob_id or ""
    given = f"{repository}:{configuration}" if configuration else repository
    return DataSource(given, sizes, lambda name, max_bytes: hashes[name])


def _named_paths(
    files: Iterable[Path | bytes], root: str | Path, single_name: str
) -> dict[str, str]:
    """Returns the file paths by their names in the source."""
    normal_root = os.path.normpath(root)
    prefix = os.path.join(normal_root, "")
    paths = {}
    for file in files:
        path = os.path.normpath(os.fsdecode(file))
        if path == normal_root:
            paths[single_name] = path
        else:
            paths[_as_text(path.removeprefix(prefix))] = path
    return paths


def _decompressed_names(paths: Mapping[str, str], sizes: Mapping[str, int]) -> dict[str, str]:
    """Returns the names that small compressed files have without their endings, by name.

    A file is left out if another file has its name without the ending.
    """
    new_names: dict[str, str] = {}
    taken = set(paths)
    for name, path in paths.items():
        ending = os.path.splitext(path)[1]
        if ending not in SEEKABLE_DECOMPRESSORS or sizes[name] > MAX_COMPRESSED_BYTES:
            continue
        new_name = name.removesuffix(ending)
        if new_name == name or new_name not in taken:
            new_names[name] = new_name
            taken.add(new_name)
    return new_names


def _decompressed_sizes(paths: Mapping[str, str]) -> dict[str, int]:
    """Returns the decompressed size of each file by name; {} if all together take too long."""
    sizes: dict[str, int] = {}
    remaining = MAX_DECOMPRESSED_BYTES
    if len(paths) > MAX_DECOMPRESSED_FILES or sum(map(os.path.getsize, paths.values())) > remaining:
        return {}
    for name, path in with_progress(sorted(paths.items()), "compressed files"):
        try:
            with _open(path, decompress=True) as file:
                sizes[name] = 0
                while part := file.read(2**20):
                    sizes[name] += len(part)
                    remaining -= len(part)
                    if remaining < 0:
                        return {}
        except Exception as error:  # each library raises its own types for a damaged file
            raise ValueError(
                f"{path}: cannot be decompressed ({error}); replace or remove it"
            ) from error
    return sizes


@contextmanager
def _open(path: str, decompress: bool) -> Iterator[Any]:
    with open_file(path) as file:
        if decompress:
            yield SEEKABLE_DECOMPRESSORS[os.path.splitext(path)[1]](file)
        else:
            yield file


def _hash_blocks(file: Any, size: int, max_bytes: int) -> str:
    """Returns a hash over a whole file, or over blocks at equal distances if it is larger.

    The first and the last block are among them.
    """
    if size <= max_bytes:
        starts: Iterable[int] = range(0, size, BLOCK_BYTES)
    else:
        last = max(1, max_bytes // BLOCK_BYTES - 1)
        starts = (i * (size - BLOCK_BYTES) // last for i in range(last + 1))
    digest = blake2b(digest_size=16)
    for start in starts:
        file.seek(start)
        digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()


def _as_text(name: str) -> str:
    """Returns a file name, which may contain any bytes, as valid Unicode text."""
    return os.fsencode(name).decode(errors="backslashreplace")
