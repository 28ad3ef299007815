"""Loops compiled by numba, cached on disk for the same user's next start.

numba's own cache is not used: it writes next to the source, unpickles files from any owner, and
raises if a file is damaged or the disk is full. This cache reads a file only if the process's user
owns it, nobody else can write it, and its checksum (which covers its name) is right; otherwise the
loop is compiled again. Ranks that start together may all write: a complete file is renamed into
place, and its name is a hash of everything that the machine code depends on. A rank that writes a
file also removes this user's files that no start has used for `UNUSED_DAYS`.
"""

import contextlib
import functools
import hashlib
import inspect
import os
import pickle
import re
import stat
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from numba.core.caching import NullCache
from numba.core.compiler import CompileResult
from numba.core.serialize import dumps

# bytes at a file's start: the checksum over its name and its data
DIGEST_BYTES = hashlib.sha256().digest_size
UNUSED_DAYS = 30
PARTIAL_PREFIX = "partial-"  # name prefix while a file is being written
CACHE_FILE_NAME = re.compile(rf"\w+-[0-9a-f]{{64}}|{PARTIAL_PREFIX}\w+")


def compiled(function: Callable[..., None]) -> Callable[..., None]:
    """Compiles a function at its first call, or reads it from `folder()`.

    Sums are reordered for vector instructions, and multiplications are fused with additions; NaN
    and infinity are kept. The compiled function releases the GIL.

    Args:
        function: Plain loops over array elements, which compile in under a second; an expression
            over whole arrays takes several seconds.

    Returns:
        The compiled function.
    """
    compile_: Any = numba.njit(
        nogil=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz"}
    )
    dispatcher = compile_(function)
    # FENCE: sets the same private attribute as numba's `enable_caching`. Tried with numba 0.63 to
    # 0.68; held by test_jit.py.
    dispatcher._cache = _DiskCache(function)
    return dispatcher


def folder() -> Path:
    """Returns the cache folder.

    Returns:
        moe_dist in $XDG_CACHE_HOME, or in ~/.cache.

    Raises:
        RuntimeError: The user has no home folder.
    """
    cache_home = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(cache_home):
        return Path(cache_home) / "moe_dist"
    return Path.home() / ".cache" / "moe_dist"


class _DiskCache(NullCache):
    """A cache for one function with numba's interface: one file for each argument signature."""

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function

    @functools.cached_property
    def source(self) -> bytes:
        """Source text that the machine code depends on.

        The function's module has the constants that are compiled in, this module the options.
        """
        return Path(inspect.getfile(self.function)).read_bytes() + Path(__file__).read_bytes()

    def path(self, sig: Any, codegen: Any) -> Path:
        """Returns the file for a signature on this processor."""
        versions = (sys.version, numba.__version__, codegen.magic_tuple())
        key = repr((self.function.__qualname__, sig, versions)).encode() + self.source
        name = self.function.__name__.strip("_")
        return folder() / f"{name}-{hashlib.sha256(key).hexdigest()}"

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Returns a signature's compiled function, or None without a usable file."""
        target_context.refresh()
        try:
            path = self.path(sig, target_context.codegen())
            data = _read(path)
            if data is None:
                return None
            with contextlib.suppress(OSError):
                os.utime(path, follow_symlinks=False)  # marks the file as used
            return CompileResult._rebuild(target_context, *pickle.loads(data))
        except Exception:
            # no folder, no permission, or any unpickling error: compile instead
            return None

    def save_overload(self, sig: Any, cres: Any) -> None:
        """Writes a signature's compiled function, if the folder can be written."""
        assert not cres.library.has_dynamic_globals, "machine code with addresses of this process"
        # ignores a full disk and a home folder that is missing or read-only
        with contextlib.suppress(OSError, RuntimeError):
            _write(self.path(sig, cres.codegen), dumps(cres._reduce()))


def _read(path: Path) -> bytes | None:
    """Returns the data that `_write` wrote.

    None if another user may have written the file, or it is damaged. Raises OSError.
    """
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
        status = os.fstat(file.fileno())
        writable_by_others = status.st_mode & 0o022
        if not _is_own_file(status) or writable_by_others:
            return None
        digest = file.read(DIGEST_BYTES)
        data = file.read()
    return data if _checksum(path, data) == digest else None


def _is_own_file(status: os.stat_result) -> bool:
    """Returns True for a regular file owned by the process's user."""
    return stat.S_ISREG(status.st_mode) and status.st_uid == os.getuid()


def _checksum(path: Path, data: bytes) -> bytes:
    """Returns the checksum over a file's name and data; a renamed file counts as damaged."""
    return hashlib.sha256(os.fsencode(path.name) + b"\0" + data).digest()


def _write(path: Path, data: bytes) -> None:
    """Writes a complete file, readable and writable by its owner alone, or none. Raises OSError."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    # mkstemp creates the file with mode 0600
    descriptor, partial = tempfile.mkstemp(prefix=PARTIAL_PREFIX, dir=path.parent)
    try:
        with open(descriptor, "wb") as file:
            file.write(_checksum(path, data) + data)
        os.replace(partial, path)
    except OSError:
        os.unlink(partial)
        raise
    _remove_unused(path.parent)


def _remove_unused(folder: Path) -> None:
    """Removes this user's files that no start has used for `UNUSED_DAYS`.

    These are files from other versions, and partial files from killed starts.
    """
    oldest = time.time() - UNUSED_DAYS * 24 * 3600
    for path in folder.iterdir():
        # ignores a file that another rank removed first, or that may not be removed
        with contextlib.suppress(OSError):
            status = path.lstat()
            if not CACHE_FILE_NAME.fullmatch(path.name) or not _is_own_file(status):
                continue
            if status.st_mtime < oldest:
                path.unlink()
