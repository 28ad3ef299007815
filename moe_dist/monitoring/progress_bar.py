"""How far a long pass over data is."""

import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def with_progress(items: Iterable[T], what: str, unit: str = "it") -> Iterable[T]:
    """The items, with a bar on stderr where they take more than two seconds. On a terminal it goes away at the end; in
    a log it is a few states of one line, which ends before anything else is written."""
    terminal = sys.stderr.isatty()
    often = 0.1 if terminal else 2  # seconds
    return tqdm(
        items, what, unit=unit, delay=2, mininterval=often, leave=not terminal, file=sys.stderr
    )
