"""Writes, reads and removes files in a run folder, which may come from an untrusted source.

The run folder itself may be a symbolic link, or be below one. Inside it nothing is written or
removed through a link: a file is written next to its final place and renamed, which replaces a link
with that name, and a link in place of a folder is refused. Reading follows links, but only to
regular files, because reading a pipe could block forever.
"""

import contextlib
import errno
import json
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import IO, Any

PARTIAL = "partial_"  # name prefix for a file or folder during its writing or removal
SUBFOLDERS = ("checkpoints", "report", "profile", "wandb", "calls")  # in a run folder


def check_folder(run: Path, name: str) -> Path:
    """Checks that no part of a folder's path inside a run folder is a link.

    Args:
        run: The run folder.
        name: The folder's path, relative to `run`. It may be missing.

    Returns:
        The folder's path.

    Raises:
        OSError: The folder, or one between `run` and it, is a link.
    """
    path = run
    for part in PurePath(name).parts:
        path = path / part
        if path.is_symlink():
            reason = f"{path} is a link, and nothing is written through a link inside a run folder"
            advice = (
                "replace it by the folder to which it points, or make the run folder itself a link"
            )
            raise OSError(errno.ELOOP, f"{reason}; {advice}", str(path))
    return path


def make_folder(run: Path, name: str = "") -> Path:
    """Creates a run folder and a folder in it, if they are missing.

    Args:
        run: The run folder.
        name: The folder's path, relative to `run`.

    Returns:
        The folder's path.

    Raises:
        OSError: The folder cannot be created, or a folder below `run` is a link or a file.
    """
    run.mkdir(parents=True, exist_ok=True)
    folder = check_folder(run, name)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def atomic_write(run: Path, name: str) -> Iterator[IO[bytes]]:
    """Opens a new file, which replaces the file `name` if the block ends without an exception.

    A reader finds either the old file or the complete new one. A link with this name is replaced,
    not followed.

    Args:
        run: The run folder. Missing folders between it and the file are created.
        name: The file's path, relative to `run`: "report/loss.png".

    Yields:
        The new file, open for writing bytes.

    Raises:
        OSError: The file cannot be written, another process is writing it, or one of its folders is
            a link.
    """
    folder = make_folder(run, str(PurePath(name).parent))
    final = folder / PurePath(name).name
    partial = folder / f"{PARTIAL}{final.name}"
    partial.unlink(missing_ok=True)
    with open(partial, "xb") as file:  # mode x creates a new file, so it follows no link
        try:
            yield file
            file.flush()
            if not is_same_file(file.fileno(), partial):
                raise OSError(
                    errno.EBUSY, f"{final} is being written by another process", str(partial)
                )
            partial.rename(final)
        except BaseException:
            if is_same_file(file.fileno(), partial):
                partial.unlink()
            raise


def write(run: Path, name: str, content: str | bytes) -> Path:
    """Writes a file with `atomic_write`, text in UTF-8, and returns its path."""
    with atomic_write(run, name) as file:
        file.write(content.encode() if isinstance(content, str) else content)
    return run / name


def open_existing(path: Path, flags: int = os.O_RDONLY) -> int:
    """Opens a regular file inside a run folder.

    Args:
        path: The file's path. With flags for writing it must not be a link.
        flags: Flags for `os.open`. `os.O_CREAT` creates a missing file.

    Returns:
        The file descriptor.

    Raises:
        OSError: The path cannot be opened, is a folder, a pipe or a device, or is a link and would
            be written.
    """
    writes = flags & os.O_ACCMODE != os.O_RDONLY
    if writes and path.is_symlink():
        raise OSError(
            errno.ELOOP,
            f"{path} is a link, and nothing is written through one; remove it",
            str(path),
        )
    no_follow = os.O_NOFOLLOW if writes else 0
    descriptor = os.open(path, flags | no_follow | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    return descriptor


def read(path: Path) -> bytes:
    """Returns a regular file's content; raises OSError for anything else."""
    with open(open_existing(path), "rb") as file:
        return file.read()


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Args:
        path: The file's path.

    Returns:
        The JSON value.

    Raises:
        ValueError: The file cannot be read, or contains no valid JSON; the message begins with the
            path.
    """
    try:
        return json.loads(read(path))
    except (OSError, ValueError, RecursionError) as error:
        problem = getattr(error, "strerror", None) or error
        raise ValueError(f"{path}: damaged ({problem})") from None


def reason(error: OSError) -> str:
    """Returns an error's text, with its path."""
    text = error.strerror or str(error)
    if error.filename is None or str(error.filename) in text:
        return text
    return f"{error.filename}: {text}"


def is_same_file(descriptor: int, path: Path) -> bool:
    """Returns True if the file open as `descriptor` is still the file at this path."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except OSError:
        return False


def remove(run: Path, name: str) -> None:
    """Removes a file, a link (not its target) or a folder with its content, if it exists.

    Args:
        run: The run folder.
        name: Path to the file, link or folder, relative to `run`.

    Raises:
        OSError: It cannot be removed, or one of its folders is a link.
    """
    path = check_folder(run, str(PurePath(name).parent)) / PurePath(name).name
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path)  # follows no links
