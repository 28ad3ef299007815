"""Opens regular files, and never blocks on a pipe or a device."""

import os
import stat
from io import BufferedReader


def open_file(path: str | bytes | os.PathLike[str]) -> BufferedReader:
    """Opens a regular file to read its bytes.

    The file is opened without blocking, so that a pipe that replaces it after the check does not
    block the caller (test_pipe_in_place_of_a_file_does_not_block).

    Args:
        path: The file; links are followed.

    Returns:
        The open file, buffered.

    Raises:
        ValueError: It is a folder, a pipe, a device or a socket.
        OSError: It cannot be opened.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError(
            "not a regular file (a folder, a pipe, a device or a socket); give a regular file"
        )
    return open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))
