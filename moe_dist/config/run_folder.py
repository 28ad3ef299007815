"""Writes, reads and removes what lies in a run folder, which may come from someone else.

The run folder itself may be a link or lie behind links. Inside it nothing is written or removed through a link: a file
is written beside and renamed, which replaces a link that has its name, and a link in place of a folder is refused.
Reading follows links, but only to regular files, for a pipe would never end.
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

PARTIAL = "partial_"  # begins the name of what is being written, or removed
SUBFOLDERS = ("checkpoints", "report", "profile", "wandb", "calls")  # of a run folder


def check_folder(run: Path, name: str) -> Path:
    """Returns the path of the folder `name` of a run folder.

    Raises:
        OSError: The folder, or one on the way to it, is a link.
    """
    path = run
    for part in PurePath(name).parts:
        path = path / part
        if path.is_symlink():
            reason = f"{path} is a link, and nothing is written through a link inside a run folder"
            advice = (
                "move what it leads to into its place, or let the run folder itself be the link"
            )
            raise OSError(errno.ELOOP, f"{reason}; {advice}", str(path))
    return path


def make_folder(run: Path, name: str = "") -> Path:
    """Makes a run folder and the folder `name` in it, where they do not exist, and returns the path of the latter.

    Raises:
        OSError: The folder cannot be made, or one below `run` is a link or a file.
    """
    run.mkdir(parents=True, exist_ok=True)
    folder = check_folder(run, name)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def atomic_write(run: Path, name: str) -> Iterator[IO[bytes]]:
    """Opens a new file for writing, which takes the name `name` when the block is left without an exception.

    A reader finds the old file or the whole new one. A link with this name is replaced, and not followed.

    Args:
        run: The run folder; folders between it and the file are made.
        name: The name of the file, which may begin with names of folders: "report/loss.png".

    Raises:
        OSError: The file cannot be written, or a link stands in place of one of its folders.
    """
    folder, last = make_folder(run, str(PurePath(name).parent)), PurePath(name).name
    beside = folder / f"{PARTIAL}{last}"
    beside.unlink(missing_ok=True)
    with open(beside, "xb") as file:  # which follows no link, for it makes the file
        try:
            yield file
            file.flush()
            if not is_same_file(file.fileno(), beside):
                raise OSError(
                    errno.EBUSY, f"{folder / last} is being written by another process", str(beside)
                )
            beside.rename(folder / last)
        except BaseException:
            if is_same_file(file.fileno(), beside):
                beside.unlink()
            raise


def write(run: Path, name: str, content: str | bytes) -> Path:
    """Writes a whole file (see `atomic_write`; text in UTF-8), and returns its path."""
    with atomic_write(run, name) as file:
        file.write(content.encode() if isinstance(content, str) else content)
    return run / name


def open_existing(path: Path, flags: int = os.O_RDONLY) -> int:
    """Opens a regular file inside a run folder, and returns its descriptor.

    Args:
        path: Path of the file. With flags that write it must not be a link.
        flags: Flags of `os.open`. With `os.O_CREAT` a missing file is made.

    Raises:
        OSError: It cannot be opened, or is a folder, a pipe or a device, or a link where it is to be written.
    """
    if flags & os.O_ACCMODE != os.O_RDONLY and path.is_symlink():
        raise OSError(
            errno.ELOOP,
            f"{path} is a link, and nothing is written through one; remove it",
            str(path),
        )
    follow = 0 if flags & os.O_ACCMODE == os.O_RDONLY else os.O_NOFOLLOW
    descriptor = os.open(path, flags | follow | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    return descriptor


def read(path: Path) -> bytes:
    """Returns the content of a regular file. Raises OSError for anything else."""
    with open(open_existing(path), "rb") as file:
        return file.read()


def read_json(path: Path) -> Any:
    """Returns the value in a JSON file. Raises ValueError, naming the file, where it cannot be read as one."""
    try:
        return json.loads(read(path))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: broken ({getattr(error, 'strerror', None) or error})") from None


def reason(error: OSError) -> str:
    """Returns what is wrong, with the path that the error is about."""
    text = error.strerror or str(error)
    return (
        text
        if error.filename is None or str(error.filename) in text
        else f"{error.filename}: {text}"
    )


def is_same_file(descriptor: int, path: Path) -> bool:
    """Whether the file that is open as `descriptor` still is the one that has this path."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except OSError:
        return False


def remove(run: Path, name: str) -> None:
    """Removes a file, a link (not what it leads to) or a whole folder of a run folder, if it exists.

    Raises:
        OSError: It cannot be removed, or lies behind a link.
    """
    path = check_folder(run, str(PurePath(name).parent)) / PurePath(name).name
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path)  # which follows no links
