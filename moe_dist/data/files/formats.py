"""File endings: the formats that are supported, and the compressions around them.

    .txt .text .md .tokens       plain text: a row {"text": line} for each line
    .jsonl .ndjson .json         one object a line; .json may also be one list
    .csv .tsv                    a heading and rows; see `csv_records` for quotes
    .parquet                     rows
    .zip                         several files, each read by its own ending

Each may be compressed as .gz, .bz2, .xz or .zst. A name without an ending is plain text if its
first line looks like it. Every other ending that begins with a letter is refused, and so is a
number after a table's ending, such as .csv.1. Text is UTF-8.
"""

import bz2
import gzip
import lzma
import os
import re
from collections.abc import Callable
from typing import IO, Any

from moe_dist.data.files.messages import printable

PLAIN_TEXT = ".txt"
# text file ending -> the ending that stands for its format
TEXT_FORMATS = {
    ".txt": PLAIN_TEXT,
    ".text": PLAIN_TEXT,
    ".md": PLAIN_TEXT,
    ".tokens": PLAIN_TEXT,
    ".jsonl": ".jsonl",
    ".ndjson": ".jsonl",
    ".json": ".json",
    ".csv": ".csv",
    ".tsv": ".tsv",
}
PARQUET = ".parquet"
ARCHIVE = ".zip"
KNOWN_ENDINGS = (*TEXT_FORMATS, PARQUET, ARCHIVE)

# an ending that names a format; one such as .00001 does not
_NAMED_ENDING = re.compile(r"\.[a-zA-Z].*", re.DOTALL)
# ending with a file number: .en-00001-of-00100 is plain text, .csv-00001-of-00100 is not
_SHARD_ENDING = re.compile(r"(\.[a-zA-Z]\w*)-[0-9]+-of-[0-9]+")


def _open_zstandard(file: IO[bytes]) -> IO[bytes]:
    import pyarrow

    return pyarrow.input_stream(file, compression="zstd")


# ending -> function that opens a file's decompressed contents
DECOMPRESSORS: dict[str, Callable[[Any], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _open_zstandard,
}


def split_ending(name: str) -> tuple[str, str]:
    """Returns a file name without its last ending, and that ending in lower case ("" if none)."""
    stem, ending = os.path.splitext(name)
    return stem, ending.lower()


def check_ending(name: str) -> None:
    """Checks that files with this name are supported.

    Args:
        name: A file name, with or without folders.

    Raises:
        ValueError: The ending is not supported.
    """
    stem, ending = os.path.splitext(name)
    if ending.lower() in DECOMPRESSORS:
        check_ending(stem)
        return
    shard = _SHARD_ENDING.fullmatch(ending)
    if shard:
        is_known = not _is_table(shard[1])
    elif _NAMED_ENDING.fullmatch(ending):
        is_known = ending.lower() in KNOWN_ENDINGS
    else:
        is_known = not (ending and _is_table(os.path.splitext(stem)[1]))
    if not is_known:
        raise ValueError(
            f"files that end with {printable(ending, 40)} are not read; rename it to .txt if it is "
            f"plain text, or convert it to one of {' '.join(KNOWN_ENDINGS)} (which may be "
            f"compressed as {' '.join(DECOMPRESSORS)})"
        )


def format_of(name: str) -> str:
    """Returns the format of a file by its name, whether the file is compressed or not.

    Args:
        name: A file name with a supported ending, or without an ending.

    Returns:
        The ending that stands for the format: ".txt" for plain text, ".jsonl", ".json", ".csv",
        ".tsv" or ".parquet"; followed by ".zip" for an archive.
    """
    stem, ending = split_ending(name)
    if ending in DECOMPRESSORS:
        return format_of(stem)
    if ending == ARCHIVE:  # a member without an ending is read by the stem's ending
        return format_of(stem) + ARCHIVE
    if ending == PARQUET:
        return PARQUET
    return TEXT_FORMATS.get(ending, PLAIN_TEXT)


def _is_table(ending: str) -> bool:
    """Returns whether files with this ending contain rows, so that a part is not plain text."""
    ending = ending.lower()
    is_known = ending in KNOWN_ENDINGS or ending in DECOMPRESSORS
    return is_known and TEXT_FORMATS.get(ending) != PLAIN_TEXT
