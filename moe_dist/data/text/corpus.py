"""Where text comes from: the bundled corpus, local files, or a dataset by its name.

A line is one example, stripped, where anything is left of it: a line of a text file, a row's "text". Line breaks inside
an example are spaces like any other, so that a document stays in one place. Local files are read by `data.files.read.read_rows`.
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
MIN_LINES = 20  # the fewest lines of which 5 % are one whole line
OTHER_NAMES = {"validation": "valid", "dev": "valid"}  # of splits

# name -> (repository, its configuration where none is given, revision)
SHORT_NAMES = {
    "wikitext": ("Salesforce/wikitext", "wikitext-103-raw-v1", None),
    # its own files are a loading script, which the library no longer runs; this branch holds the same rows as parquet
    "lm1b": ("billion-word-benchmark/lm1b", None, "refs/convert/parquet"),
}
NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(:[\w.-]+)?")
CANNOT_WRITE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOSPC, errno.EDQUOT}
GIVE = f"give {BUNDLED!r}, a file, a glob such as 'corpus/*.txt', a folder, or a dataset such as 'wikitext'"

# examples of train, by their index modulo PERIOD, where a dataset has no such split
HELD_OUT, PERIOD = {"test": 198, "valid": 199}, 200
HELD_OUT_UP_TO = (
    1_000_000  # examples: at most 5,000 of each are held out, and found without a pass over all
)


@dataclass(frozen=True)
class Lines:
    """Lines that are read anew, from the first on, by whoever iterates over them."""

    read: Callable[[], Iterator[str]]

    def __iter__(self) -> Iterator[str]:
        return self.read()


def open_text(source: str, streamed: bool) -> dict[str, Iterable[str]]:
    """Lines of "train", "valid" and "test": `streamed`, they are read from the source whenever they are iterated over;
    else they are read once and held in memory.

    A source's own splits are used. Local files without splits are read in sorted order; the first 90 % of their lines
    are train, the next 5 % valid, the last 5 % test. Of a dataset that lacks "valid" or "test", examples of "train" are
    held out by their index (`HELD_OUT`). Raises ValueError for text that cannot be found, read or split.
    """
    own: dict[str, Iterable[str]] = {**_own_splits(source)}
    if not streamed:
        own = {split: list(lines) for split, lines in own.items()}
    if own.keys() == {"train"} and is_local(source):
        return _cut(source, own["train"])
    missing = [split for split in HELD_OUT if split not in own]
    splits = own | _hold_out(own["train"], missing) if missing else own
    for split, lines in splits.items():
        if next(iter(lines), None) is None:
            raise ValueError(
                f"data.text={source!r} has no line for {split!r}: give it some, or leave that split out and give "
                f"{PERIOD} lines of 'train', so that one can be held out"
            )
    return splits


def check_text(source: str) -> None:
    """Reads the first lines of local text and the endings of all of its files; checks the form of a dataset's name,
    without network.

    Raises:
        ValueError: It can be neither, or its first lines tell that it cannot be trained on.
    """
    if not is_local(source):
        return _check_name(source)
    head = {split: list(islice(lines, MIN_LINES)) for split, lines in _own_splits(source).items()}
    if head.keys() == {"train"} or not head["train"]:
        _check_length(source, len(head["train"]))


def is_local(source: str) -> bool:
    """Whether `source` is, or matches, something on this machine; then it is no name of a dataset."""
    return source not in ("", BUNDLED) and (os.path.isdir(source) or bool(find_files(source)))


def read_lines(key: str, source: str, files: Iterable[Path]) -> Iterator[str]:
    """Yields the lines of local files, stripped.

    Raises:
        ValueError: A file cannot be read, or has no column "text" of strings; it begins with `key` and `source`.
    """
    return _stripped(key, source, _texts(key, source, files))


def _texts(key: str, source: str, files: Iterable[Path]) -> Iterator[str | None]:
    for file in files:
        rows = read_rows(file, ["text"])
        try:
            for number, row in enumerate(rows, start=1):
                text = row.get("text", 0)
                if not isinstance(text, str | None):
                    raise ValueError(
                        f"{file}: row {number} has no column 'text' of strings, only {columns_of(row)}: name it so"
                    )
                yield text
        except ValueError as error:
            raise ValueError(f"{key}={source!r}: {error}") from error


def _stripped(key: str, source: str, texts: Iterable[str | None]) -> Iterator[str]:
    for text in texts:
        if text is None:
            continue
        if "\0" in text:  # valid UTF-8, yet text holds no NUL
            raise ValueError(
                f"{key}={source!r} is not text, it holds a NUL byte: give plain text files"
            )
        if stripped := text.removeprefix("\ufeff").strip():  # a byte order mark opens some files
            yield stripped


def _check_name(source: str) -> None:
    if not NAME.fullmatch(source) or Path(source).suffix.lower() in (
        *KNOWN_ENDINGS,
        *DECOMPRESSORS,
    ):
        raise ValueError(f"data.text={source!r}: no file matches; {GIVE}")


def _check_length(source: str, num_lines: int) -> None:
    if num_lines < MIN_LINES:
        raise ValueError(
            f"data.text={source!r} has {num_lines} lines that are not empty, too few to split: "
            f"give at least {MIN_LINES} lines of text"
        )


def _cut(source: str, lines: Iterable[str]) -> dict[str, Iterable[str]]:
    num_lines = sum(1 for _ in lines)
    _check_length(source, num_lines)
    cuts = [num_lines * percent // 100 for percent in (0, 90, 95, 100)]
    return {
        split: Lines(partial(islice, lines, cuts[i], cuts[i + 1])) for i, split in enumerate(SPLITS)
    }


def _hold_out(lines: Iterable[str], missing: list[str]) -> dict[str, Iterable[str]]:
    """`missing` splits out of `lines`, and "train" without them."""
    place = {HELD_OUT[split]: split for split in missing}

    def read(split: str, stop: int | None) -> Iterator[str]:
        for i, line in enumerate(islice(lines, stop)):
            if split == (place.get(i % PERIOD, "train") if i < HELD_OUT_UP_TO else "train"):
                yield line

    stops = {"train": None} | dict.fromkeys(missing, HELD_OUT_UP_TO)
    return {split: Lines(partial(read, split, stop)) for split, stop in stops.items()}


def _own_splits(source: str) -> dict[str, Lines]:
    """What the source has of SPLITS, "train" at least."""
    if source == BUNDLED:
        return {split: Lines(partial(_bundled, split)) for split in SPLITS}
    found, read = (
        (_found("data.text", source), read_lines)
        if is_local(source)
        else (_load(source), _read_dataset)
    )
    if "train" not in found:
        raise ValueError(
            f"data.text={source!r} has no split 'train', only {', '.join(found)}: give one that has"
        )
    return {
        split: Lines(partial(read, "data.text", source, found[split]))
        for split in SPLITS
        if split in found
    }


def _found(key: str, source: str) -> dict[str, list[Path]]:
    """Returns the local files of each split. Raises ValueError, which begins with `key` and `source`."""
    try:
        splits = find_splits(source)
        for file in chain.from_iterable(splits.values()):
            check_ending(file.name)
    except ValueError as error:
        raise ValueError(f"{key}={source!r}: {error}") from None
    return splits


@dataclass(frozen=True)
class Rows:
    """The rows of one split as dicts by column, read anew by whoever iterates over them."""

    read: Callable[[], Iterator[dict[str, Any]]]
    label_names: tuple[
        str, ...
    ]  # names that the numbers of column "label" stand for, where the source has some

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self.read()


def open_rows(
    key: str, source: str, named: tuple[str, str | None, str | None], give: str
) -> dict[str, Rows]:
    """Opens local files or a dataset of the Hub that has columns.

    Args:
        key: The field that names the source, for errors.
        source: A file, a glob or a folder; else `named` is loaded.
        named: Repository, configuration and revision of the dataset.
        give: The end of an error, which says what to give.

    Returns:
        The rows of each split, by our names of local splits and by the dataset's own.

    Raises:
        ValueError: Here or while the rows are read, for what does not load or is damaged, and for labels whose numbers
            do not stand for the same names everywhere.
    """
    read: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {}
    names: dict[str, list[tuple[str, tuple[str, ...]]]] = {}  # by split, each with its place
    if is_local(source):
        for split, files in _found(key, source).items():
            read[split] = partial(_rows_of_files, key, source, files)
            names[split] = [
                (f"{file}" if name == file.name else f"{file} ({name})", some)
                for file in files
                for name, some in label_names(file)
            ]
    else:
        for split, dataset in load(key, source, named, give).items():
            label = (dataset.features or {}).get("label")
            read[split] = partial(_rows_of_dataset, key, source, dataset)
            names[split] = [(f"split {split!r}", tuple(getattr(label, "names", ())))]
    _check_label_names(key, source, list(chain.from_iterable(names.values())))
    return {
        split: Rows(read[split], next((some for _, some in names[split] if some), ()))
        for split in read
    }


def _rows_of_files(key: str, source: str, files: list[Path]) -> Iterator[dict[str, Any]]:
    for file in files:
        try:
            yield from read_rows(file)
        except ValueError as error:
            raise ValueError(f"{key}={source!r}: {error}") from error


def _rows_of_dataset(key: str, source: str, dataset: Any) -> Iterator[dict[str, Any]]:
    for table in tables(key, source, dataset, "give another dataset"):
        yield from table.to_pylist()


def _check_label_names(key: str, source: str, found: list[tuple[str, tuple[str, ...]]]) -> None:
    """Raises ValueError where the number of a label may stand for one name in one place and another one in another."""
    named = [(place, names) for place, names in found if names]
    for place, names in named[1:]:
        first, others = named[0]
        if names != others:
            raise ValueError(
                f"{key}={source!r}: numbers of labels stand for {_told(others)} in {first}, and for {_told(names)} in "
                f"{place}: give both the same names in the same order, or names instead of numbers"
            )
    unnamed = [place for place, names in found if not names]
    numbers = (
        [name for i, name in enumerate(named[0][1]) if name != str(i)] if named else []
    )  # of other places
    if unnamed and numbers and all(name.lstrip("+-").isdecimal() for name in named[0][1]):
        raise ValueError(
            f"{key}={source!r}: {named[0][0]} has the names {_told(named[0][1])} for numbers of labels, and "
            f"{unnamed[0]} has no names, so that a number there may be either: write both in one way"
        )


def _told(names: Sequence[str]) -> str:
    return printable(", ".join(names), 100)


def _bundled(split: str) -> Iterator[str]:
    """King James Bible and Shakespeare, split by whole books and plays."""
    with lzma.open(
        Path(__file__).parents[1] / "bundled" / f"{split}.txt.xz", "rt", encoding="utf-8"
    ) as file:
        yield from (stripped for line in file if (stripped := line.strip()))


def _read_dataset(key: str, source: str, dataset: Any) -> Iterator[str]:
    return _stripped(key, source, _texts_of(key, source, dataset))


def _texts_of(key: str, source: str, dataset: Any) -> Iterator[str | None]:
    for table in tables(key, source, dataset, "give another dataset"):
        if "text" not in table.column_names or str(table.schema.field("text").type) not in (
            "string",
            "large_string",
        ):
            columns = ", ".join(f"{field.name} ({field.type})" for field in table.schema)
            raise ValueError(
                f"{key}={source!r} has no column 'text' of strings, only {columns}: give one that has"
            )
        yield from table["text"].to_pylist()


def _load(source: str) -> dict[str, Any]:
    _check_name(source)
    name, _, configuration = source.partition(":")
    repository, default, revision = SHORT_NAMES.get(name, (name, None, None))
    loaded = load("data.text", source, (repository, configuration or default, revision), GIVE)
    return {OTHER_NAMES.get(split, split): dataset for split, dataset in loaded.items()}


def tables(key: str, source: str, dataset: Any, give: str) -> Iterator[Any]:
    """The examples of what `load` gave a thousand at a time, which costs less than one by one. Raises ValueError for
    what cannot be read."""
    try:
        yield from dataset.with_format("arrow").iter(batch_size=1000)
    except (
        Exception
    ) as error:  # of many kinds: no UTF-8, JSON, parquet or archive, and columns that change
        raise ValueError(f"{key}={source!r} is not text ({_one_line(error)}): {give}") from error


def load(
    key: str, source: str, named: tuple[str, str | None, str | None], give: str
) -> dict[str, Any]:
    """Returns the splits of a dataset of the Hub, streamed, by the library's names. The arguments are those of
    `open_rows`.

    Raises:
        ValueError: It does not load; with the reason.
    """
    datasets = _library()
    try:
        repository, configuration, revision = named
        _ask_for(repository, revision)
        return datasets.load_dataset(repository, configuration, revision=revision, streaming=True)
    except (
        Exception
    ) as error:  # of many kinds: the library's own, its network client's, its file readers'
        if isinstance(error, OSError) and error.errno in CANNOT_WRITE:
            give = "set HF_HOME to a folder that can be written, for datasets are kept there"
        raise ValueError(f"{key}={source!r} does not load: {_one_line(error)}; {give}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]


def _ask_for(repository: str, revision: str | None) -> None:
    """One short question to the Hub, because the library asks an unreachable one again for half a minute."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    try:
        HfApi().dataset_info(repository, revision=revision, timeout=5)
    except RepositoryNotFoundError:
        raise ValueError(f"no file and no public dataset is called {repository!r}") from None
    except HfHubHTTPError:
        raise
    except Exception as error:
        raise ValueError(
            f"no file is called so, and the Hub with its datasets cannot be reached from here "
            f"({type(error).__name__}: {error}); where there is a network, download it and give the folder"
        ) from error


def _library() -> Any:
    """Imported where it is needed, because it takes a second; silent, and it tells nobody of its use."""
    os.environ |= {"HF_HUB_DISABLE_TELEMETRY": "1"}  # read once, when it is imported
    import datasets

    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    datasets.disable_progress_bars()
    for logger in ("datasets", "huggingface_hub"):
        logging.getLogger(logger).setLevel(logging.CRITICAL)
    return datasets
