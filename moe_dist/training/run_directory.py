"""A process's run folder: its lock, and the files that describe the run.

RUN/config.json  RUN/layout.json  RUN/metrics.jsonl  RUN/checkpoints/  RUN/report.html
RUN/report/*.png RUN/profile/  RUN/wandb/  RUN/calls/  RUN/lock
"""

import errno
import fcntl
import os
import sys
import threading
import time
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from moe_dist.config import run_folder
from moe_dist.config.run_folder import SUBFOLDERS, is_same_file, make_folder, open_existing, write
from moe_dist.distributed.collectives import run_on_main
from moe_dist.monitoring.console import print_on_main

LOCK_NAME = "lock"
# when a launcher restarts a run, time for the killed ranks to release the lock
LOCK_TIMEOUT_S = 20
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # from file systems without locks


def check_writable(folder: Path, wait_for_lock: bool) -> None:
    """Checks early, without writing, if a run folder can be opened.

    Args:
        folder: The run folder; it may not exist yet.
        wait_for_lock: If True, waits for another process to release it.

    Raises:
        ValueError: The folder cannot be written, or another run is using it.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(
            f"{folder}: cannot be written ({existing} is no folder to write to); give another "
            "--folder"
        )
    try:
        for name in SUBFOLDERS:
            run_folder.check_folder(folder, name)
        if os.path.lexists(folder / LOCK_NAME):
            with open_lock(folder) as lock:
                acquire(lock, folder, LOCK_TIMEOUT_S if wait_for_lock else 0)
    except OSError as error:
        raise ValueError(f"{folder}: cannot be written ({run_folder.reason(error)})") from None


def new_folder(config_name: str) -> Path:
    """Returns a path for a new run folder in runs/."""
    return Path("runs") / f"{config_name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"


class RunDirectory:
    """A run folder, locked by this run's main rank.

    Attributes:
        path: The folder, the same on every rank.
        lock: The open lock file on the main rank, None on other ranks.
    """

    def __init__(self, path: Path, files: dict[str, str]) -> None:
        """Stores the path and the file contents; `claim` creates the folder.

        Args:
            path: The folder.
            files: Contents by file name, for the files that describe the run.
        """
        self.path = path
        self.lock: IO[bytes] | None = None
        self._files = files
        self._restoring = threading.Lock()

    def claim(self, wait_for_lock: bool = False, keep_files: bool = False) -> None:
        """Creates the folder, locks it until the process ends, writes the files. Main rank only.

        Args:
            wait_for_lock: If True, waits for another process to release it.
            keep_files: If True, existing files stay as they are (nothing will be trained).

        Raises:
            ValueError: The folder cannot be written, or another run is using it.
        """
        try:
            make_folder(self.path)
            self.lock = open_lock(self.path)
            acquire(self.lock, self.path, LOCK_TIMEOUT_S if wait_for_lock else 0)
            for name, content in self._files.items():
                if not (keep_files and (self.path / name).exists()):
                    write(self.path, name, content)
        except OSError as error:
            raise ValueError(
                f"{self.path}: cannot be written ({run_folder.reason(error)}); give another "
                "--folder"
            ) from None

    def restore(self) -> None:
        """Creates the folder again if it was removed or renamed, with a warning.

        It does nothing on ranks other than the main rank. Any thread may call it.

        Raises:
            OSError: The folder cannot be created again, or another run is using it now.
        """
        with self._restoring:
            if self.lock is not None:
                self._restore(self.lock)

    def _restore(self, held_lock: IO[bytes]) -> None:
        """Writes missing files, and locks the folder again if the lock file is missing."""
        missing = [name for name in self._files if not (self.path / name).exists()]
        restored = list(missing)
        if not is_same_file(held_lock.fileno(), self.path / LOCK_NAME):
            make_folder(self.path)
            new_lock = open_lock(self.path)
            try:
                acquire(new_lock, self.path, 0)
            except ValueError as error:
                new_lock.close()
                raise OSError(str(error)) from None
            self.lock = new_lock
            held_lock.close()
            restored.append(LOCK_NAME)
        for name in missing:
            write(self.path, name, self._files[name])
        if restored:
            reason = f"{', '.join(restored)} removed or renamed while it trains; written again"
            tqdm.write(f"warning: {self.path}: {reason}", file=sys.stderr)


def open_run_directory(
    folder: Path | None,
    config_name: str,
    files: dict[str, str],
    *,
    read_only: bool = False,
    wait_for_lock: bool = False,
    keep_files: bool = False,
) -> RunDirectory:
    """Opens the run folder, on every rank. A collective.

    Args:
        folder: The run folder. None: a new one in runs/.
        config_name: The config's name, for a new folder's name.
        files: Contents by file name, for the files that describe the run.
        read_only: If True, nothing will be written, so no lock is needed.
        wait_for_lock: As in `RunDirectory.claim`.
        keep_files: As in `RunDirectory.claim`.

    Returns:
        The folder, with the same path on every rank; the main rank has locked it unless
        `read_only`.

    Raises:
        ValueError: On every rank, the folder cannot be written, or another run is using it.
    """
    on_main: list[RunDirectory] = []

    def claim() -> Path:
        directory = RunDirectory(folder or new_folder(config_name), files)
        if not read_only:
            directory.claim(wait_for_lock, keep_files)
        on_main.append(directory)
        return directory.path

    path = run_on_main(claim)
    return on_main[0] if on_main else RunDirectory(path, files)


def open_lock(folder: Path) -> IO[bytes]:
    """Opens a run folder's lock file."""
    return open(open_existing(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT), "r+b")


def acquire(lock: IO[Any], folder: Path, timeout_s: int) -> None:
    """Locks an open file, with a warning if the file system has no locks.

    Args:
        lock: The open lock file.
        folder: The run folder, for messages.
        timeout_s: Seconds to wait for another process to release it.

    Raises:
        ValueError: Another process still has it.
    """
    for remaining_s in reversed(range(timeout_s + 1)):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if remaining_s == 0:
                raise ValueError(
                    f"{folder}: in use by a run that has not ended; wait until it ends, or stop it"
                ) from None
            time.sleep(1)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            print_on_main(
                f"warning: {folder}: its file system has no locks ({error.strerror}); do not "
                "start two runs in it",
                sys.stderr,
            )
            return
