"""Rows in JSON files: one object a line, or one list."""

import json
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import IO, Any

from moe_dist.data.files.text_lines import text_lines


def json_line_rows(file: IO[bytes]) -> Iterator[dict[str, Any]]:
    """Yields the object of each line that is not empty.

    Args:
        file: The decompressed bytes.

    Yields:
        A row: the object's values by key.

    Raises:
        ValueError: A line is not a JSON object, or contains a NUL character or half a surrogate
            pair.
    """
    yield from _rows_of_lines(text_lines(file))


def json_rows(file: IO[bytes]) -> Iterator[dict[str, Any]]:
    """Yields the objects of a list, of an object that covers several lines, or of each line.

    Args:
        file: The decompressed bytes.

    Yields:
        A row: the object's values by key.

    Raises:
        ValueError: As in `json_line_rows`.
    """
    lines = text_lines(file)
    first = next((line for line in lines if line.strip()), "")
    if not first.lstrip().startswith("[") and not _is_cut_off(first):
        yield from _rows_of_lines(chain([first], lines))
        return
    value = _parse(first + "".join(lines))
    for row in value if isinstance(value, list) else [value]:
        yield _checked_row(row)


def _rows_of_lines(lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    for line in lines:
        if line.strip():
            yield _checked_row(_parse(line))


def _is_cut_off(line: str) -> bool:
    """Returns whether an object begins in this line and does not end in it."""
    try:
        json.loads(line)
    except json.JSONDecodeError as error:
        return error.pos >= len(line.rstrip())
    except (ValueError, RecursionError):  # reported when the line is parsed as a row
        return False
    return False


def _parse(text: str) -> Any:
    """Returns a JSON value; raises ValueError for strings that are not valid Unicode text."""
    value = json.loads(text)
    if "\\u" in text:
        if "\\u0000" in text:
            raise ValueError("a string contains a NUL character; remove it")
        json.dumps(value, ensure_ascii=False).encode()  # raises for half a surrogate pair
    return value


def _checked_row(row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(
            f"a row is {type(row).__name__} ({str(row)[:40]!r}), but must be an object such as "
            "{'text': ...}"
        )
    return row
