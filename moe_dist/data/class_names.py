"""Spelling of class names, which are labels of texts or folders of images."""

import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence

from moe_dist.data.files.messages import printable

# Characters without a visible form: zero-width space, word joiner, byte order mark, soft hyphen,
# direction marks, and the variation selectors for text and emoji style.
INVISIBLE = dict.fromkeys(
    [
        *map(ord, "\u200b\u2060\ufeff\u00ad\u200e\u200f\u061c\ufe0e\ufe0f"),
        *range(0x202A, 0x202F),
        *range(0x2066, 0x206A),
    ]
)
# Joiners change the shape of neighbouring letters in some scripts, so they are removed only at the
# ends of a word.
JOINERS = "\u200c\u200d"


def class_name(text: str) -> str:
    """Returns one canonical spelling for all texts that look the same.

    The result is in composed form (NFC), without invisible characters, without leading or trailing
    white space, and with single spaces between words.
    """
    words = []
    for word in unicodedata.normalize("NFC", text).translate(INVISIBLE).split():
        stripped = word.strip(JOINERS)
        if stripped:
            words.append(stripped)
    return " ".join(words)


def names_differing_by_case(names: Iterable[str]) -> list[str]:
    """Returns the names that equal another name when case is ignored."""
    name_list = list(names)
    counts = Counter(name.casefold() for name in name_list)
    return [name for name in name_list if counts[name.casefold()] > 1]


def preview_names(names: Sequence[str]) -> str:
    """Returns the first five names, joined by commas, for use in a message."""
    preview = printable(", ".join(names[:5]), 200)
    return preview + ", ..." if len(names) > 5 else preview
