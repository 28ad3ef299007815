"""File contents in error messages: short, printable and on one line."""

from typing import Any


def printable(text: str, max_chars: int = 500) -> str:
    """Returns `text` on one line, at most `max_chars` long, with unprintable characters escaped."""
    line = " ".join(text[: max_chars + 1].split())
    escaped = ""
    for character in line:
        escaped += character if character.isprintable() else repr(character)[1:-1]
    return escaped if len(text) <= max_chars else f"{escaped[:max_chars]}..."


def columns_of(row: dict[str, Any]) -> str:
    """Returns the column names of a row and the types of their values."""
    columns = [f"{name!r} ({type(value).__name__})" for name, value in row.items()]
    return printable(", ".join(columns))
