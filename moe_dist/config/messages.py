"""Parts of error messages: values, paths and the nearest known name."""

import difflib
import re
import typing
from typing import Any

MAX_MESSAGE_LENGTH = 1000  # characters


def one_line(message: str) -> str:
    """Returns a message as one line that a terminal shows as it is: line breaks are spaces, other
    characters that cannot be printed are escaped, and a long message has its middle left out."""
    joined = " ".join(map(str.strip, message.splitlines()))
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in joined)
    half = MAX_MESSAGE_LENGTH // 2
    return shown if len(shown) <= MAX_MESSAGE_LENGTH else f"{shown[:half]} [...] {shown[-half:]}"


MAX_TEXT_LENGTH = 1000  # characters of a field


# characters that end a line or a path, or are half of one
FORBIDDEN_CHARACTERS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def text_problem(text: str) -> str | None:
    """Returns how an error about a text goes on that a user gave as a name, a path or a mode: what is
    wrong with it. None where nothing is."""
    if not text.strip():
        return "is empty"
    if len(text) > MAX_TEXT_LENGTH:
        return f"has {len(text)} characters; at most {MAX_TEXT_LENGTH}"
    if found := FORBIDDEN_CHARACTERS.search(text):
        return f"has a character that no name can have, {found[0]!a}"
    return None


def shorten(value: Any) -> str:
    """Returns a value for an error about it, whose middle is left out where it is long."""
    text = str(value)
    return text if len(text) <= 80 else f"{text[:40]}[...]{text[-20:]}"


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """What an error about an unknown `name` goes on with: the nearest known name, or all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
