"""What the command lines of the package have in common. Imports no torch."""

import argparse
from pathlib import Path
from typing import Any, NoReturn

from moe_dist.config.messages import one_line, text_problem

LONGEST_NAME = 255  # bytes of one name in a path that file systems take
LONGEST_PATH = 3900  # bytes of a path, so that 4,096 hold the names of files below it


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line on stderr and exit status 2."""

    def __init__(self, prog: str | None = None, **options: Any) -> None:
        """Takes the options of argparse's own parser."""
        options["formatter_class"] = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, **options)

    def error(self, message: str) -> NoReturn:
        """Ends the process."""
        self.exit(2, f"error: {one_line(message)}\n")


def path_argument(text: str) -> Path:
    """Returns an argument that names a file or a folder, for `type=` of an argument.

    Raises:
        ArgumentTypeError: The text is empty, which would be the current folder, or can name nothing.
    """
    wrong = text_problem(text)
    longest = max(len(name.encode(errors="replace")) for name in text.split("/"))
    if wrong is None and longest > LONGEST_NAME:
        wrong = f"has a name of {longest} bytes; at most {LONGEST_NAME}"
    if wrong is None and len(text.encode()) > LONGEST_PATH:
        wrong = f"has {len(text.encode())} bytes; at most {LONGEST_PATH}"
    if wrong is not None:
        raise argparse.ArgumentTypeError(f"{text!r} {wrong}")
    return Path(text)
