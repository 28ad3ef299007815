"""Rows in plain text files: {"text": line} for each line."""

from collections.abc import Iterator
from itertools import chain
from typing import IO, Any

from moe_dist.data.files.formats import TEXT_FORMATS
from moe_dist.data.files.headings import is_heading, is_json_row, is_prose
from moe_dist.data.files.messages import printable
from moe_dist.data.files.text_lines import text_lines


def plain_text_rows(file: IO[bytes]) -> Iterator[dict[str, Any]]:
    """Yields a row for each line of a file whose name has an ending of plain text.

    Args:
        file: The decompressed bytes.

    Yields:
        {"text": line}, with the line end.

    Raises:
        ValueError: The first line is a row or a heading, which would be trained on as text.
    """
    lines = text_lines(file)
    head: list[str] = []
    for line in lines:
        head.append(line)
        if not line.strip():
            continue
        if is_json_row(line):
            raise ValueError(
                f"the first line is a JSON row ({printable(line, 40)!r}), not text; "
                "rename the file to .jsonl"
            )
        if is_heading(line):
            raise ValueError(
                f"the first line is a heading ({printable(line, 40)!r}), not text; "
                "rename the file to .csv or .tsv"
            )
        break
    for line in chain(head, lines):
        yield {"text": line}


def rows_without_ending(file: IO[bytes]) -> Iterator[dict[str, Any]]:
    """Yields a row for each line of a file whose name has no ending.

    Empty lines before the first text are left out.

    Args:
        file: The decompressed bytes.

    Yields:
        {"text": line}, with the line end.

    Raises:
        ValueError: The first line is not prose.
    """
    lines = text_lines(file)
    first = next((line for line in lines if line.strip()), "")
    if not is_prose(first):
        raise ValueError(
            f"the name has no ending, and the first line is not prose ({first.strip()[:40]!r}); "
            f"add one of the endings {' '.join(TEXT_FORMATS)}"
        )
    for line in chain([first], lines):
        yield {"text": line}
