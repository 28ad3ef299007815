"""What the command lines of the package have in common. Imports no torch."""

import argparse
from pathlib import Path
from typing import Any, NoReturn

from moe_dist.config import wrong_text

LONGEST_NAME = 255  # bytes of one name in a path that file systems take
LONGEST_PATH = 3900  # bytes of a path, so that 4,096 hold the names of files below it
LONGEST_MESSAGE = 1000  # characters


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
    wrong = wrong_text(text)
    longest = max(len(name.encode(errors="replace")) for name in text.split("/"))
    if wrong is None and longest > LONGEST_NAME:
        wrong = f"has a name of {longest} bytes; at most {LONGEST_NAME}"
    if wrong is None and len(text.encode()) > LONGEST_PATH:
        wrong = f"has {len(text.encode())} bytes; at most {LONGEST_PATH}"
    if wrong is not None:
        raise argparse.ArgumentTypeError(f"{text!r} {wrong}")
    return Path(text)


def one_line(message: str) -> str:
    """Returns a message as one line that a terminal shows as it is: line breaks are spaces, other
    characters that cannot be printed are escaped, and a long message has its middle left out."""
    joined = " ".join(map(str.strip, message.splitlines()))
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in joined)
    half = LONGEST_MESSAGE // 2
    return shown if len(shown) <= LONGEST_MESSAGE else f"{shown[:half]} [...] {shown[-half:]}"
