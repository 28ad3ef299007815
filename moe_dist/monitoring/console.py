"""Console output of rank 0."""

import os
import sys
from typing import IO


def is_main_rank() -> bool:
    """Returns whether this process is rank 0; also works before the mesh is built."""
    return os.environ.get("RANK") in (None, "", "0")


def print_on_main(text: str, to: IO[str] | None = None) -> None:
    """Prints on rank 0 and does nothing on other ranks.

    If the reader of the pipe (such as `head`) has exited, this and all later output is dropped.

    Args:
        text: The text, without its line end.
        to: The stream; None for stdout.
    """
    if not is_main_rank():
        return
    try:
        print(text, file=to, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), (to or sys.stdout).fileno())
