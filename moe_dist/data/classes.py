"""Names of classes, as labels of texts and as folders of images."""

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence

from moe_dist.data.files import shown

# Shown as nothing by every font: zero-width space, word joiner, byte order mark, soft hyphen. Zero-width (non-)joiners
# change how letters of some scripts look, and stay.
INVISIBLE = dict.fromkeys(map(ord, "\u200b\u2060\ufeff\u00ad"))


def class_name(text: str) -> str:
    """Returns the one spelling of all texts that look like this one.

    Composed form (NFC), without invisible characters, without white space around it and with single spaces inside.
    """
    return " ".join(unicodedata.normalize("NFC", text).translate(INVISIBLE).split())


def alike(names: Iterable[str]) -> list[str]:
    """Returns the names that differ from another one by case alone."""
    kept = list(names)
    count = Counter(name.casefold() for name in kept)
    return [name for name in kept if count[name.casefold()] > 1]


def some(names: Sequence[str]) -> str:
    """Returns the first five names for use in a message."""
    return shown(", ".join(names[:5]), 200) + (", ..." if len(names) > 5 else "")
