"""Progress bar for long passes over data."""

import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")

_DELAY_S = 2  # shorter passes have no bar
_TERMINAL_INTERVAL_S = 0.1
_LOG_INTERVAL_S = 2


def with_progress(items: Iterable[T], title: str, unit: str = "it") -> Iterable[T]:
    """Iterates over `items` with a progress bar on stderr if the pass takes more than two seconds.

    On a terminal the bar disappears at the end. In a log it is a single line with a few states,
    which ends before anything else is written.

    Args:
        items: The items, which are passed through.
        title: The text before the bar.
        unit: The name of an item.

    Returns:
        An iterable over the same items.
    """
    terminal = sys.stderr.isatty()
    return tqdm(
        items,
        title,
        unit=unit,
        delay=_DELAY_S,
        mininterval=_TERMINAL_INTERVAL_S if terminal else _LOG_INTERVAL_S,
        leave=not terminal,
        file=sys.stderr,
    )
