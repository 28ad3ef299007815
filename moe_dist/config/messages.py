"""Parts of error messages: values, paths, and the nearest known name."""

import difflib
import re
from collections.abc import Iterable
from typing import Any

MAX_MESSAGE_LENGTH = 1000  # characters in an error message
MAX_TEXT_LENGTH = 1000  # characters in a user's text
MAX_VALUE_LENGTH = 80  # characters for one value in an error message

# Control characters and line separators (they would end a line or a path), and surrogates (halves
# of a character, which cannot be encoded).
FORBIDDEN_CHARACTERS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def one_line(message: str) -> str:
    """Returns a message as one line with at most about 1,000 printable characters.

    Line breaks become spaces, other unprintable characters are escaped, and the middle of a long
    message is left out.
    """
    joined = " ".join(map(str.strip, message.splitlines()))
    printable = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in joined)
    if len(printable) <= MAX_MESSAGE_LENGTH:
        return printable
    half = MAX_MESSAGE_LENGTH // 2
    return f"{printable[:half]} [...] {printable[-half:]}"


def text_problem(text: str) -> str | None:
    """Returns the problem with a user's name, path or mode.

    Args:
        text: The name, path or mode.

    Returns:
        A phrase that completes an error message ("is empty"), or None if the text is valid.
    """
    if not text.strip():
        return "is empty"
    if len(text) > MAX_TEXT_LENGTH:
        return f"has {len(text)} characters; at most {MAX_TEXT_LENGTH}"
    found = FORBIDDEN_CHARACTERS.search(text)
    if found:
        return f"has a character that no name can have, {found[0]!a}"
    return None


def shorten(value: Any) -> str:
    """Returns a value as text for an error message, without its middle if it is long."""
    text = str(value)
    return text if len(text) <= MAX_VALUE_LENGTH else f"{text[:40]}[...]{text[-20:]}"


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns the end of an error about an unknown name: the nearest known name, or all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(names)}"
