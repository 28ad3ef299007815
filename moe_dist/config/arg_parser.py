"""The argument parser for all of the package's command lines. Imports no torch."""

import argparse
from pathlib import Path
from typing import Any, NoReturn

from moe_dist.config.messages import one_line, text_problem

MAX_NAME_BYTES = 255  # longest file or folder name in common file systems
MAX_PATH_BYTES = 3900  # Linux allows 4,096; the rest is for names inside the folder


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line on stderr and exit status 2."""

    def __init__(self, prog: str | None = None, **options: Any) -> None:
        """Creates the parser.

        Args:
            prog: The program's name in the help text.
            **options: Further `argparse.ArgumentParser` options.
        """
        options["formatter_class"] = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, **options)

    def error(self, message: str) -> NoReturn:
        """Prints the message on one line and ends the process with status 2."""
        self.exit(2, f"error: {one_line(message)}\n")


def path_argument(text: str) -> Path:
    """Converts a command-line argument to a path; for `add_argument(type=...)`.

    Args:
        text: The argument.

    Returns:
        The path to a file or a folder; it may be missing.

    Raises:
        argparse.ArgumentTypeError: The text is empty (as a path, it would be the current folder),
            has a forbidden character, or is longer than file systems accept.
    """
    problem = text_problem(text)
    name_bytes = max(len(name.encode(errors="replace")) for name in text.split("/"))
    if problem is None and name_bytes > MAX_NAME_BYTES:
        problem = f"has a name of {name_bytes} bytes; at most {MAX_NAME_BYTES}"
    if problem is None and len(text.encode()) > MAX_PATH_BYTES:
        problem = f"has {len(text.encode())} bytes; at most {MAX_PATH_BYTES}"
    if problem is not None:
        raise argparse.ArgumentTypeError(f"{text!r} {problem}")
    return Path(text)
