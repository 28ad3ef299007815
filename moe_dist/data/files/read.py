"""Rows in data files in all supported formats, and the label names that a file contains."""

import contextlib
import io
import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import IO, Any

from moe_dist.data.files.csv_rows import csv_rows
from moe_dist.data.files.formats import (
    ARCHIVE,
    DECOMPRESSORS,
    PARQUET,
    PLAIN_TEXT,
    TEXT_FORMATS,
    check_ending,
    split_ending,
)
from moe_dist.data.files.json_rows import json_line_rows, json_rows
from moe_dist.data.files.messages import printable
from moe_dist.data.files.plain_text import plain_text_rows, rows_without_ending
from moe_dist.data.files.regular_file import open_file
from moe_dist.data.files.split_names import is_hidden, is_no_data, splits_in_names

Row = dict[str, Any]

_PARQUET_BATCH_ROWS = 1000
_READERS: dict[str, Callable[[IO[bytes]], Iterator[Row]]] = {
    PLAIN_TEXT: plain_text_rows,
    ".jsonl": json_line_rows,
    ".json": json_rows,
    ".csv": partial(csv_rows, separator=","),
    ".tsv": partial(csv_rows, separator="\t"),
}


def read_rows(path: Path, columns: Sequence[str] | None = None) -> Iterator[Row]:
    """Yields the rows of a file one by one, in memory independent of its size (but a .json list).

    Args:
        path: The file; its ending decides how it is read.
        columns: The columns that are needed. If a parquet file has one of them, its other columns
            are not read; other formats return all columns.

    Yields:
        A row: values by column name.

    Raises:
        ValueError: The file cannot be read or is damaged, for any reason. The message begins with
            `path` and contains the last row's number.
    """
    num_rows = 0
    try:
        with open_file(path) as file:
            for row in _rows_of_stream(path.name, file, columns):
                yield row
                num_rows += 1
    except Exception as error:  # each library raises its own types for a damaged file
        # a line number is more exact than the row count, because tables are read ahead
        has_line = str(error).startswith("line ")
        place = f", after row {num_rows}" if num_rows and not has_line else ""
        raise ValueError(f"{path}{place}: {_reason(error)}") from error


def label_names(path: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yields the label names that a file contains.

    Parquet files from the datasets library have such names in their metadata; other files have
    none. A file that cannot be read yields nothing here, and raises an error when its rows are
    read.

    Args:
        path: The file.

    Yields:
        The name of a table (the file, or an archive member), and its label names by number;
        empty if it has none.
    """
    # each library raises its own types for a damaged file
    with contextlib.suppress(Exception), open_file(path) as file:
        yield from _label_names_of_stream(path.name, file)


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"invalid JSON ({error.msg.removesuffix(' at')} at character {error.pos})"
    if isinstance(error, UnicodeDecodeError):
        byte = error.object[error.start]
        return f"invalid UTF-8 ({error.reason}, byte 0x{byte:02x}); convert the file to UTF-8"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return printable(text) or type(error).__name__


def _rows_of_stream(name: str, file: IO[bytes], columns: Sequence[str] | None) -> Iterator[Row]:
    """Yields the rows of an open file that is read by the ending of `name`."""
    check_ending(name)
    stem, ending = split_ending(name)
    if ending == ARCHIVE:
        for member_name, member in _archive_members(stem, file):
            yield from _rows_of_stream(member_name, member, columns)
    elif ending in DECOMPRESSORS:
        yield from _rows_of_stream(stem, DECOMPRESSORS[ending](file), columns)
    elif ending == PARQUET:
        yield from _parquet_rows(file, columns)
    elif ending in TEXT_FORMATS:
        yield from _READERS[TEXT_FORMATS[ending]](file)
    else:
        yield from rows_without_ending(file)


def _label_names_of_stream(name: str, file: IO[bytes]) -> Iterator[tuple[str, tuple[str, ...]]]:
    stem, ending = split_ending(name)
    if ending == ARCHIVE:
        for member_name, member in _archive_members(stem, file):
            yield from _label_names_of_stream(member_name, member)
    elif ending in DECOMPRESSORS:
        yield from _label_names_of_stream(stem, DECOMPRESSORS[ending](file))
    elif ending == PARQUET:
        metadata = _open_parquet(file).schema_arrow.metadata or {}
        info = json.loads(metadata.get(b"huggingface", b"{}"))
        label = info.get("info", {}).get("features", {}).get("label", {})
        yield name, tuple(map(str, label.get("names", ())))
    else:
        yield name, ()


def _archive_members(stem: str, file: IO[bytes]) -> Iterator[tuple[str, IO[bytes]]]:
    """Yields the data files of a .zip, and the names by which they are read.

    A member without an ending is read by `stem`, the archive's name without .zip. Raises
    ValueError if the members belong to several splits by their names.
    """
    with zipfile.ZipFile(file) as archive:
        names: dict[str, str] = {}  # member -> its name without folders
        for member in sorted(archive.namelist()):
            *folders, name = member.split("/")
            is_visible = not any(map(is_hidden, [*folders, name]))
            if name and is_visible and not is_no_data(name):
                names[member] = name
        _check_one_split(names)
        for member, name in names.items():
            with archive.open(member) as stream:
                yield (name if "." in name else stem), stream


def _check_one_split(names: dict[str, str]) -> None:
    splits: set[str] = set()
    for member in names:
        splits |= splits_in_names(Path(member).parent.parts)
    splits = splits or splits_in_names(names.values())
    if len(splits) > 1:
        raise ValueError(
            f"the archive has files of several splits ({' and '.join(sorted(splits))}); "
            "unpack it into a folder"
        )


def _parquet_rows(file: IO[bytes], columns: Sequence[str] | None) -> Iterator[Row]:
    table = _open_parquet(file)
    needed = [name for name in table.schema_arrow.names if name in (columns or ())]
    for batch in table.iter_batches(batch_size=_PARQUET_BATCH_ROWS, columns=needed or None):
        yield from batch.to_pylist()


def _open_parquet(file: IO[bytes]) -> Any:
    from pyarrow import parquet

    # parquet is read from its end, and not every decompressed stream can seek
    seekable = file if isinstance(file, BufferedReader) else io.BytesIO(file.read())
    return parquet.ParquetFile(seekable)
