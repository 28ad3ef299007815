"""Lines in an open file, decoded as UTF-8 and checked."""

import io
from collections.abc import Iterator
from typing import IO

MAX_LINE_CHARS = 2**28  # some corpora are a single line of 10^8 characters


def text_lines(file: IO[bytes], newline: str | None = None) -> Iterator[str]:
    """Yields the lines in a file with their line ends, without a byte order mark at the beginning.

    Args:
        file: The decompressed bytes.
        newline: As in `open`: None translates all line ends to a line feed, "" keeps them.

    Yields:
        One line, with its line end.

    Raises:
        ValueError: A line is too long, or contains a NUL byte.
        UnicodeDecodeError: The file is not UTF-8.
    """
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline=newline)  # type: ignore[type-var]
    while line := text.readline(MAX_LINE_CHARS):
        if len(line) == MAX_LINE_CHARS:
            raise ValueError(
                f"a line has {MAX_LINE_CHARS:,} characters or more; break it into shorter lines"
            )
        if "\0" in line:  # valid UTF-8, but it does not occur in text
            raise ValueError("the file is not text, it contains a NUL byte")
        yield line
