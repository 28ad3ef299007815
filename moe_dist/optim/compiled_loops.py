"""Loops compiled by numba, kept on disk for the next start of the same user.

numba's own cache is not used: it writes beside the source, unpickles a file whoever wrote it, and raises where a file
is damaged or the disk is full. Here a file is read only if its owner is the user of the process and no one else can
write it, and if its checksum, of its name as well, is right; everything else is compiled again. Ranks that start at
once may all write: a file is renamed when whole, and its name is a hash of everything that the machine code depends on.
A rank that writes a file removes files of the same user that no start has used for `UNUSED_DAYS`.
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

DIGEST = (
    hashlib.sha256().digest_size
)  # bytes at the head of a file: the checksum of its name and the rest
UNUSED_DAYS = 30
PARTIAL = "partial-"  # begins the name of a file that is being written
OURS = re.compile(rf"\w+-[0-9a-f]{{64}}|{PARTIAL}\w+")


def compiled(function: Callable[..., None]) -> Callable[..., None]:
    """Returns `function` compiled at its first call, or read from `folder()`.

    Sums are reordered for vector instructions and multiplications fused with additions; NaN and infinity stay what they
    are. The function releases the GIL. It compiles in under a second as long as it has plain loops over elements: an
    expression of whole arrays costs several.
    """
    compile_: Any = numba.njit(
        nogil=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz"}
    )
    dispatcher = compile_(function)
    dispatcher._cache = _Files(
        function
    )  # as numba's `enable_caching` does (0.63 to 0.68; test_jit.py)
    return dispatcher


def folder() -> Path:
    """Returns the folder of compiled loops: moe_dist in $XDG_CACHE_HOME, or in ~/.cache.

    Raises:
        RuntimeError: The user has no home folder.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(given) if os.path.isabs(given) else Path.home() / ".cache") / "moe_dist"


class _Files(NullCache):
    """The cache of one function, in numba's interface: a file for each signature of arguments."""

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function

    @functools.cached_property
    def source(self) -> bytes:
        """The text of the function's module, whose constants are compiled in, and of this one, with the options."""
        return b"".join(
            Path(file).read_bytes() for file in (inspect.getfile(self.function), __file__)
        )

    def path(self, sig: Any, codegen: Any) -> Path:
        """Returns the file of a signature for this processor."""
        versions = (sys.version, numba.__version__, codegen.magic_tuple())
        key = repr((self.function.__qualname__, sig, versions)).encode() + self.source
        return folder() / f"{self.function.__name__.strip('_')}-{hashlib.sha256(key).hexdigest()}"

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Returns the compiled function of a signature; None where there is no file that can be used."""
        target_context.refresh()
        try:
            data = _read(path := self.path(sig, target_context.codegen()))
            if data is None:
                return None
            with contextlib.suppress(OSError):
                os.utime(path, follow_symlinks=False)  # it is in use
            return CompileResult._rebuild(target_context, *pickle.loads(data))
        except (
            Exception
        ):  # no folder, no permission, or what unpickling raises: the function is compiled instead
            return None

    def save_overload(self, sig: Any, cres: Any) -> None:
        """Keeps the compiled function of a signature, where the folder can be written."""
        assert not cres.library.has_dynamic_globals, "machine code with addresses of this process"
        # a full disk, a home folder that cannot be written, or none
        with contextlib.suppress(OSError, RuntimeError):
            _write(self.path(sig, cres.codegen), dumps(cres._reduce()))


def _read(path: Path) -> bytes | None:
    """Returns what `_write` wrote; None where the file may be another user's or is damaged. Raises OSError."""
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
        about = os.fstat(file.fileno())
        if not stat.S_ISREG(about.st_mode) or about.st_uid != os.getuid() or about.st_mode & 0o022:
            return None
        digest, data = file.read(DIGEST), file.read()
    return data if _checksum(path, data) == digest else None


def _checksum(path: Path, data: bytes) -> bytes:
    """Returns the checksum of a file's name and data, so that a file under another name counts as damaged."""
    return hashlib.sha256(os.fsencode(path.name) + b"\0" + data).digest()


def _write(path: Path, data: bytes) -> None:
    """Writes a file that its owner alone can read and write, whole or not at all. Raises OSError."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor, partial = tempfile.mkstemp(prefix=PARTIAL, dir=path.parent)  # with mode 0600
    try:
        with open(descriptor, "wb") as file:
            file.write(_checksum(path, data) + data)
        os.replace(partial, path)
    except OSError:
        os.unlink(partial)
        raise
    _remove_unused(path.parent)


def _remove_unused(folder: Path) -> None:
    """Removes files of this user that no start has used for `UNUSED_DAYS`: other versions', and of killed starts."""
    oldest = time.time() - UNUSED_DAYS * 24 * 3600
    for path in folder.iterdir():
        with contextlib.suppress(OSError):  # another rank was faster, or it may not be removed
            about = path.lstat()
            if (
                OURS.fullmatch(path.name)
                and stat.S_ISREG(about.st_mode)
                and about.st_uid == os.getuid()
                and about.st_mtime < oldest
            ):
                path.unlink()
