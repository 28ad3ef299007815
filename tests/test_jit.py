"""Compiled loops on disk: used by the next start, and nobody else's code, no damaged one and no crash."""

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_dist import jit


def double(x_N: Any) -> None:
    for i in range(len(x_N)):
        x_N[i] *= 2


def raising(*_: Any) -> None:
    raise AssertionError("unpickled")


class Hostile:
    def __reduce__(self) -> Any:
        return raising, ()


def run() -> tuple[list[float], int]:
    """The result of a new start, and the number of functions that it read from disk."""
    dispatcher: Any = jit.compiled(double)
    x_N = np.arange(4, dtype=np.float32)
    dispatcher(x_N)
    return x_N.tolist(), sum(dispatcher.stats.cache_hits.values())


DOUBLED = [0.0, 2.0, 4.0, 6.0]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "moe_dist"


def test_the_second_start_reads_what_the_first_compiled(cache: Path) -> None:
    os.umask(before := os.umask(0))
    try:
        os.umask(0)
        assert run() == (DOUBLED, 0)
    finally:
        os.umask(before)
    (file,) = cache.iterdir()
    assert (cache.stat().st_mode & 0o777, file.stat().st_mode & 0o777) == (0o700, 0o600)
    assert run() == (DOUBLED, 1)


def test_damaged_files_are_compiled_again_and_replaced(cache: Path) -> None:
    run()
    (file,) = cache.iterdir()
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for damaged in (b"", whole[:7], whole[:-1], bytes(flipped)):
        file.write_bytes(damaged)
        assert run() == (DOUBLED, 0)
        assert run() == (DOUBLED, 1)
        assert list(cache.iterdir()) == [file]


def test_a_file_that_is_whole_but_holds_something_else_is_compiled_again(cache: Path) -> None:
    """As another numba of the same version string might leave."""
    run()
    (file,) = cache.iterdir()
    for something in (pickle.dumps((1, 2)), b"no pickle", b""):
        jit._write(file, something)
        assert run() == (DOUBLED, 0)


@pytest.mark.parametrize("how", ["owner", "group", "others", "link", "fifo", "folder"])
def test_nothing_is_unpickled_that_another_user_may_have_written(
    how: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run()
    (file,) = cache.iterdir()
    jit._write(file, pickle.dumps(Hostile()))
    with pytest.raises(AssertionError, match="unpickled"):
        pickle.loads(jit._read(file) or b"")
    if how == "owner":
        real = os.getuid()
        monkeypatch.setattr(os, "getuid", lambda: real + 1)
    elif how in ("group", "others"):
        file.chmod(0o620 if how == "group" else 0o602)
    else:
        target = file.rename(cache / "target")
        {"link": lambda: file.symlink_to(target), "fifo": lambda: os.mkfifo(file), "folder": file.mkdir}[how]()
    read = []
    monkeypatch.setattr(pickle, "loads", lambda data: read.append(data))
    assert run()[0] == DOUBLED
    assert not read


@pytest.mark.parametrize("home", ["/proc/none", "/dev/null", ""])
def test_where_nothing_can_be_kept_all_is_compiled(home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", home)

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    if not home:  # a uid that no user has
        monkeypatch.setattr(Path, "home", no_home)
    assert run() == (DOUBLED, 0)


def test_a_full_disk_ends_nothing_and_leaves_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert run() == (DOUBLED, 0)
    assert list(cache.iterdir()) == []


def test_the_name_of_a_file_depends_on_processor_signature_and_source(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Codegen:
        def __init__(self, processor: str) -> None:
            self.processor = processor

        def magic_tuple(self) -> tuple[str, ...]:
            return ("x86_64-linux", self.processor, "+avx2")

    files = jit._Files(double)
    names = [files.path(sig, Codegen(cpu)).name for sig in ("f4", "f8") for cpu in ("a", "b")]
    other = jit._Files(double)
    other.source = files.source + b"#"
    names += [other.path("f4", Codegen("a")).name]
    assert len(set(names)) == len(names)
    assert all(name.startswith("double-") for name in names)


def test_a_relative_cache_home_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """So says the XDG specification: else each working folder would have a cache."""
    monkeypatch.setenv("HOME", "/home/somebody")
    for given in ("relative", ""):
        monkeypatch.setenv("XDG_CACHE_HOME", given)
        assert jit.folder() == Path("/home/somebody/.cache/moe_dist")
    monkeypatch.setenv("XDG_CACHE_HOME", "/scratch/me")
    assert jit.folder() == Path("/scratch/me/moe_dist")
