"""Text sources: the bundled corpus, local files, or a Hugging Face Hub dataset.

An example is one line in a text file, or the "text" in one row. It is stripped, and left out if
nothing remains. Line breaks inside a row's text count as spaces, so a document is one
example. Local files are read by `data.files.read.read_rows`.
"""

import errno
import logging
import lzma
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from moe_dist.data.files.find import find_files, find_splits
from moe_dist.data.files.formats import DECOMPRESSORS, KNOWN_ENDINGS, check_ending
from moe_dist.data.files.messages import columns_of, printable
from moe_dist.data.files.read import label_names, read_rows

SPLITS = ("train", "valid", "test")
BUNDLED = "bundled"
BUNDLED_FOLDER = Path(__file__).parents[1] / "bundled"
MIN_LINES = 20  # the fewest lines of which 5 % are one whole line
OTHER_SPLIT_NAMES = {"validation": "valid", "dev": "valid"}

# short name -> (repository, default configuration, revision)
SHORT_NAMES = {
    "wikitext": ("Salesforce/wikitext", "wikitext-103-raw-v1", None),
    # The repository itself is a loading script, which the datasets library does not run any more.
    # This branch has the same rows as parquet files.
    "lm1b": ("billion-word-benchmark/lm1b", None, "refs/convert/parquet"),
}
DATASET_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[\w.-]+)?")
CANNOT_WRITE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOSPC, errno.EDQUOT}
HINT = (
    f"give {BUNDLED!r}, a file, a glob such as 'corpus/*.txt', a folder, or a dataset such as "
    "'wikitext'"
)
DATASET_HINT = "give another dataset"

# If a dataset has no valid or test split, the examples of train whose index modulo PERIOD is
# HELD_OUT[split] are that split.
HELD_OUT = {"test": 198, "valid": 199}
PERIOD = 200
# Only this many examples are split. A held-out split thus has at most 5,000 examples and is found
# without a pass over the whole text.
HELD_OUT_UP_TO = 1_000_000


@dataclass(frozen=True)
class Lines:
    """Text lines that each iteration reads again from the source.

    Attributes:
        read: Opens the source and returns its lines.
    """

    read: Callable[[], Iterator[str]]

    def __iter__(self) -> Iterator[str]:
        """Reads the lines from the first on."""
        return self.read()


@dataclass(frozen=True)
class Rows:
    """Rows in one split, as dicts by column, that each iteration reads again from the source.

    Attributes:
        read: Opens the source and returns its rows.
        label_names: The names for the numbers in column "label"; empty if the source has none.
    """

    read: Callable[[], Iterator[dict[str, Any]]]
    label_names: tuple[str, ...]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Reads the rows from the first on."""
        return self.read()


def open_text(source: str, streamed: bool) -> dict[str, Iterable[str]]:
    """Opens the lines for "train", "valid" and "test".

    The source's own splits are used if it has any. Local files without splits are read in sorted
    order: the first 90 % of the lines are train, the next 5 % valid, the last 5 % test. If a
    dataset has no "valid" or "test", some "train" examples are held out by their index
    (`HELD_OUT`).

    Args:
        source: `BUNDLED`, a file, a glob, a folder, or a dataset name.
        streamed: If True, each iteration over a split reads the source again. If False, the lines
            are read once and kept in memory.

    Returns:
        The lines by split.

    Raises:
        ValueError: The text cannot be found, read or split.
    """
    splits: dict[str, Iterable[str]] = {**_own_splits(source)}
    if not streamed:
        splits = {split: list(lines) for split, lines in splits.items()}
    if splits.keys() == {"train"} and is_local(source):
        return _cut(source, splits["train"])
    missing = [split for split in HELD_OUT if split not in splits]
    if missing:
        splits |= _hold_out(splits["train"], missing)
    for split, lines in splits.items():
        if next(iter(lines), None) is None:
            raise ValueError(
                f"data.text={source!r} has no line for {split!r}: give it some, or leave that "
                f"split out and give {PERIOD} lines of 'train', so that one can be held out"
            )
    return splits


def check_text(source: str) -> None:
    """Checks a text source early, without network.

    For local text, reads the first lines and checks all file name endings. For a dataset, checks
    the form of its name.

    Args:
        source: The source, as for `open_text`.

    Raises:
        ValueError: The source is neither a file nor a dataset's name, or its first lines show that
            it cannot be trained on.
    """
    if not is_local(source):
        _check_name(source)
        return
    heads = {split: list(islice(lines, MIN_LINES)) for split, lines in _own_splits(source).items()}
    if heads.keys() == {"train"} or not heads["train"]:
        _check_length(source, len(heads["train"]))


def is_local(source: str) -> bool:
    """Returns whether `source` is a local folder or matches local files, not a dataset name."""
    if source in ("", BUNDLED):
        return False
    return os.path.isdir(source) or bool(find_files(source))


def read_lines(key: str, source: str, files: Iterable[Path]) -> Iterator[str]:
    """Returns an iterator over the stripped lines in local files.

    Args:
        key: The config field, with which errors begin.
        source: The value in that field.
        files: The files, in the order in which they are read.

    Returns:
        The lines. Iteration raises ValueError if a file cannot be read, or has no column "text" of
        strings.
    """
    return _stripped(key, source, _texts_of_files(key, source, files))


def open_rows(
    key: str, source: str, dataset: tuple[str, str | None, str | None], hint: str
) -> dict[str, Rows]:
    """Opens the rows in local files, or in a Hub dataset.

    Args:
        key: The config field, with which errors begin.
        source: The value in that field: a file, a glob, a folder, or anything else for `dataset`.
        dataset: The repository, configuration and revision to load if `source` is not local.
        hint: The valid values, for the end of an error.

    Returns:
        The rows by split. Local splits have names from `SPLITS`; dataset splits keep their names.

    Raises:
        ValueError: The source does not load or is damaged, or a label number has different names in
            different places. Iteration over the rows raises it too.
    """
    rows: dict[str, Rows] = {}
    places: list[tuple[str, tuple[str, ...]]] = []  # all places with their label names
    read: Callable[[], Iterator[dict[str, Any]]]
    if is_local(source):
        for split, files in _find_splits(key, source).items():
            found = _label_names_of_files(files)
            read = partial(_rows_of_files, key, source, files)
            rows[split] = Rows(read, next((names for _, names in found if names), ()))
            places += found
    else:
        for split, examples in load_dataset_splits(key, source, dataset, hint).items():
            label = (examples.features or {}).get("label")
            names = tuple(getattr(label, "names", ()))
            read = partial(_rows_of_dataset, key, source, examples)
            rows[split] = Rows(read, names)
            places.append((f"split {split!r}", names))
    _check_label_names(key, source, places)
    return rows


def load_dataset_splits(
    key: str, source: str, dataset: tuple[str, str | None, str | None], hint: str
) -> dict[str, Any]:
    """Opens the splits of a Hub dataset as streams.

    Args:
        key: The config field, with which errors begin.
        source: The value in that field.
        dataset: The repository, configuration and revision.
        hint: The valid values, for the end of an error.

    Returns:
        The `IterableDataset` for each split, by the dataset's own split names.

    Raises:
        ValueError: The dataset does not load; the message contains the reason.
    """
    datasets = _import_datasets()
    repository, configuration, revision = dataset
    try:
        _check_hub(repository, revision)
        return datasets.load_dataset(repository, configuration, revision=revision, streaming=True)
    # There are many kinds of errors: the library's own, its network client's, its file readers'.
    except Exception as error:
        if isinstance(error, OSError) and error.errno in CANNOT_WRITE:
            hint = "set HF_HOME to a folder that can be written: downloads are cached there"
        raise ValueError(f"{key}={source!r} does not load: {_one_line(error)}; {hint}") from error


def _own_splits(source: str) -> dict[str, Lines]:
    """Returns the source's own splits in the order of `SPLITS`, always with "train"."""
    if source == BUNDLED:
        return {split: Lines(partial(_read_bundled, split)) for split in SPLITS}
    found: dict[str, Any]
    read: Callable[[str, str, Any], Iterator[str]]
    if is_local(source):
        found = _find_splits("data.text", source)
        read = read_lines
    else:
        found = _load_text_dataset(source)
        read = _lines_of_dataset
    if "train" not in found:
        raise ValueError(
            f"data.text={source!r} has no split 'train', only {', '.join(found)}: give one that has"
        )
    splits = {}
    for split in SPLITS:
        if split in found:
            splits[split] = Lines(partial(read, "data.text", source, found[split]))
    return splits


# The bundled corpus


def _read_bundled(split: str) -> Iterator[str]:
    """Yields the lines from the King James Bible and Shakespeare, split by whole works."""
    with lzma.open(BUNDLED_FOLDER / f"{split}.txt.xz", "rt", encoding="utf-8") as file:
        for line in file:
            stripped = line.strip()
            if stripped:
                yield stripped


# Local files


def _find_splits(key: str, source: str) -> dict[str, list[Path]]:
    """Returns the local files by split, or raises ValueError that begins with `key`."""
    try:
        splits = find_splits(source)
        for file in chain.from_iterable(splits.values()):
            check_ending(file.name)
    except ValueError as error:
        raise ValueError(f"{key}={source!r}: {error}") from None
    return splits


def _texts_of_files(key: str, source: str, files: Iterable[Path]) -> Iterator[str | None]:
    """Yields the text in each row."""
    for file in files:
        rows = read_rows(file, ["text"])
        try:
            for number, row in enumerate(rows, start=1):
                text = row.get("text", 0)
                if not isinstance(text, str | None):
                    raise ValueError(
                        f"{file}: row {number} has no column 'text' of strings, "
                        f"only {columns_of(row)}: name it so"
                    )
                yield text
        except ValueError as error:
            raise ValueError(f"{key}={source!r}: {error}") from error


def _rows_of_files(key: str, source: str, files: list[Path]) -> Iterator[dict[str, Any]]:
    """Yields the rows in local files."""
    for file in files:
        try:
            yield from read_rows(file)
        except ValueError as error:
            raise ValueError(f"{key}={source!r}: {error}") from error


def _label_names_of_files(files: Iterable[Path]) -> list[tuple[str, tuple[str, ...]]]:
    """Returns each file, or archive member, with its label names."""
    places = []
    for file in files:
        for name, names in label_names(file):
            place = f"{file}" if name == file.name else f"{file} ({name})"
            places.append((place, names))
    return places


def _stripped(key: str, source: str, texts: Iterable[str | None]) -> Iterator[str]:
    """Yields the texts that are not empty, without white space and byte order mark around them."""
    for text in texts:
        if text is None:
            continue
        if "\0" in text:  # valid in UTF-8, but not in a text
            raise ValueError(
                f"{key}={source!r} is not text, it holds a NUL byte: give plain text files"
            )
        stripped = text.removeprefix("\ufeff").strip()
        if stripped:
            yield stripped


def _check_name(source: str) -> None:
    """Raises ValueError if `source` cannot be a dataset name."""
    is_file_name = Path(source).suffix.lower() in (*KNOWN_ENDINGS, *DECOMPRESSORS)
    if is_file_name or not DATASET_NAME.fullmatch(source):
        raise ValueError(f"data.text={source!r}: no file matches; {HINT}")


def _check_length(source: str, num_lines: int) -> None:
    """Raises ValueError if there are too few lines to split."""
    if num_lines < MIN_LINES:
        raise ValueError(
            f"data.text={source!r} has {num_lines} lines that are not empty, too few to split: "
            f"give at least {MIN_LINES} lines of text"
        )


def _cut(source: str, lines: Iterable[str]) -> dict[str, Iterable[str]]:
    """Splits lines into the first 90 %, the next 5 % and the last 5 %."""
    num_lines = sum(1 for _ in lines)
    _check_length(source, num_lines)
    train_end = num_lines * 90 // 100
    valid_end = num_lines * 95 // 100
    return {
        "train": Lines(partial(islice, lines, 0, train_end)),
        "valid": Lines(partial(islice, lines, train_end, valid_end)),
        "test": Lines(partial(islice, lines, valid_end, num_lines)),
    }


def _hold_out(lines: Iterable[str], missing: list[str]) -> dict[str, Iterable[str]]:
    """Returns the `missing` splits from `lines`, and "train" without their lines."""
    split_of_remainder = {HELD_OUT[split]: split for split in missing}

    def read(wanted: str, stop: int | None) -> Iterator[str]:
        for i, line in enumerate(islice(lines, stop)):
            split = "train"
            if i < HELD_OUT_UP_TO:
                split = split_of_remainder.get(i % PERIOD, "train")
            if split == wanted:
                yield line

    splits: dict[str, Iterable[str]] = {"train": Lines(partial(read, "train", None))}
    for split in missing:
        splits[split] = Lines(partial(read, split, HELD_OUT_UP_TO))
    return splits


def _check_label_names(
    key: str, source: str, places: Sequence[tuple[str, tuple[str, ...]]]
) -> None:
    """Raises ValueError if a label number may have different names in different places."""
    named = [(place, names) for place, names in places if names]
    if not named:
        return
    first_place, first_names = named[0]
    for place, names in named[1:]:
        if names != first_names:
            raise ValueError(
                f"{key}={source!r}: numbers of labels stand for {_preview(first_names)} in "
                f"{first_place}, and for {_preview(names)} in {place}: give both the same names in "
                "the same order, or names instead of numbers"
            )
    unnamed = [place for place, names in places if not names]
    # A number in an unnamed place is ambiguous if the names are numbers other than their own index.
    are_numbers = all(name.lstrip("+-").isdecimal() for name in first_names)
    differ = any(name != str(i) for i, name in enumerate(first_names))
    if unnamed and differ and are_numbers:
        raise ValueError(
            f"{key}={source!r}: {first_place} has the names {_preview(first_names)} for numbers of "
            f"labels, and {unnamed[0]} has no names, so that a number there may be either: write "
            "both in one way"
        )


def _preview(names: Sequence[str]) -> str:
    return printable(", ".join(names), 100)


# Hub datasets


def _load_text_dataset(source: str) -> dict[str, Any]:
    """Returns the splits of a text dataset, with names from `SPLITS` if possible."""
    _check_name(source)
    name, _, configuration = source.partition(":")
    repository, default, revision = SHORT_NAMES.get(name, (name, None, None))
    dataset = (repository, configuration or default, revision)
    splits = {}
    for split, examples in load_dataset_splits("data.text", source, dataset, HINT).items():
        splits[OTHER_SPLIT_NAMES.get(split, split)] = examples
    return splits


def _lines_of_dataset(key: str, source: str, dataset: Any) -> Iterator[str]:
    return _stripped(key, source, _texts_of_dataset(key, source, dataset))


def _texts_of_dataset(key: str, source: str, dataset: Any) -> Iterator[str | None]:
    """Yields the text in each example."""
    for table in _tables(key, source, dataset):
        has_text = "text" in table.column_names and str(table.schema.field("text").type) in (
            "string",
            "large_string",
        )
        if not has_text:
            columns = ", ".join(f"{field.name} ({field.type})" for field in table.schema)
            raise ValueError(
                f"{key}={source!r} has no column 'text' of strings, only {columns}: "
                "give one that has"
            )
        yield from table["text"].to_pylist()


def _rows_of_dataset(key: str, source: str, dataset: Any) -> Iterator[dict[str, Any]]:
    """Yields the rows in a dataset."""
    for table in _tables(key, source, dataset):
        yield from table.to_pylist()


def _tables(key: str, source: str, dataset: Any) -> Iterator[Any]:
    """Yields the examples as Arrow tables with 1000 rows, which is faster than one by one."""
    try:
        yield from dataset.with_format("arrow").iter(batch_size=1000)
    # There are many kinds of errors: no UTF-8, JSON, parquet or archive, or columns that change.
    except Exception as error:
        raise ValueError(
            f"{key}={source!r} is not text ({_one_line(error)}): {DATASET_HINT}"
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]


def _check_hub(repository: str, revision: str | None) -> None:
    """Sends one short request to the Hub, and raises ValueError if it fails.

    Without this check, the datasets library retries an unreachable Hub for half a minute.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    try:
        HfApi().dataset_info(repository, revision=revision, timeout=5)
    except RepositoryNotFoundError:
        raise ValueError(f"no file and no public dataset has the name {repository!r}") from None
    except HfHubHTTPError:
        raise
    except Exception as error:
        raise ValueError(
            "no file has this name, and the Hub with its datasets cannot be reached from here "
            f"({type(error).__name__}: {error}); if there is a network, download it and give the "
            "folder"
        ) from error


def _import_datasets() -> Any:
    """Imports the datasets library, without progress bars, log lines and telemetry.

    The import takes a second, so it happens only if a dataset is loaded.
    """
    # The library reads this variable once, when it is imported.
    os.environ |= {"HF_HUB_DISABLE_TELEMETRY": "1"}
    import datasets

    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    datasets.disable_progress_bars()
    for logger in ("datasets", "huggingface_hub"):
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    return datasets
