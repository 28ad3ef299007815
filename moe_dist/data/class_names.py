"""Names of classes, as labels of texts and as folders of images."""

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence

from moe_dist.data.files.messages import printable

# Shown as nothing: zero-width space, word joiner, byte order mark, soft hyphen, marks of direction, and the choice
# between a character as text and as a picture.
INVISIBLE = dict.fromkeys(
    [
        *map(ord, "\u200b\u2060\ufeff\u00ad\u200e\u200f\u061c\ufe0e\ufe0f"),
        *range(0x202A, 0x202F),
        *range(0x2066, 0x206A),
    ]
)
JOINERS = "\u200c\u200d"  # between letters of some scripts they change how these look


def class_name(text: str) -> str:
    """Returns the one spelling of all texts that look like this one.

    Composed form (NFC), without invisible characters, without white space around it and with single spaces inside.
    """
    words = unicodedata.normalize("NFC", text).translate(INVISIBLE).split()
    return " ".join(stripped for word in words if (stripped := word.strip(JOINERS)))


def names_differing_by_case(names: Iterable[str]) -> list[str]:
    """Returns the names that differ from another one by case alone."""
    kept = list(names)
    count = Counter(name.casefold() for name in kept)
    return [name for name in kept if count[name.casefold()] > 1]


def preview_names(names: Sequence[str]) -> str:
    """Returns the first five names for use in a message."""
    return printable(", ".join(names[:5]), 200) + (", ..." if len(names) > 5 else "")
