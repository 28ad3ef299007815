"""Prints on rank 0."""

import os
import sys
from typing import IO


def is_main_rank() -> bool:
    """Returns whether this is rank 0, also before there is a mesh."""
    return os.environ.get("RANK") in (None, "", "0")


def print_on_main(text: str, to: IO[str] | None = None) -> None:
    """Prints on rank 0 alone. Drops all later output once the reader of a pipe, such as `head`, has closed it."""
    if not is_main_rank():
        return
    try:
        print(text, file=to, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), (to or sys.stdout).fileno())
