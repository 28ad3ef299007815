"""The cache of compiled loops: reused by the next start; damaged or foreign files are never
executed."""

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_dist.optim import compiled_loops


def double(x_N: Any) -> None:
    for i in range(len(x_N)):
        x_N[i] *= 2


def raising(*_: Any) -> None:
    raise AssertionError("unpickled")


class Hostile:
    def __reduce__(self) -> Any:
        return raising, ()


def run() -> tuple[list[float], int]:
    """Returns the result of a new start, and the number of functions read from disk."""
    dispatcher: Any = compiled_loops.compiled(double)
    x_N = np.arange(4, dtype=np.float32)
    dispatcher(x_N)
    return x_N.tolist(), sum(dispatcher.stats.cache_hits.values())


DOUBLED = [0.0, 2.0, 4.0, 6.0]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "moe_dist"


def test_second_start_uses_the_cache(cache: Path) -> None:
    os.umask(before := os.umask(0))
    try:
        os.umask(0)
        assert run() == (DOUBLED, 0)
    finally:
        os.umask(before)
    (file,) = cache.iterdir()
    assert (cache.stat().st_mode & 0o777, file.stat().st_mode & 0o777) == (0o700, 0o600)
    assert run() == (DOUBLED, 1)


def test_damaged_cache_files_are_recompiled(cache: Path) -> None:
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


def test_intact_file_with_other_content_is_recompiled(cache: Path) -> None:
    """Another numba build with the same version string may write such a file."""
    run()
    (file,) = cache.iterdir()
    for something in (pickle.dumps((1, 2)), b"no pickle", b""):
        compiled_loops._write(file, something)
        assert run() == (DOUBLED, 0)


def halve(x_N: Any) -> None:
    for i in range(len(x_N)):
        x_N[i] /= 2


@pytest.mark.parametrize("how", ["swapped", "copied"])
def test_file_under_another_name_is_recompiled(how: str, cache: Path) -> None:
    """Both files are this user's own, in a folder that may belong to another user."""
    x_N = np.arange(4, dtype=np.float32)
    compiled_loops.compiled(halve)(x_N)
    assert run() == (DOUBLED, 0)
    halving, doubling = sorted(cache.iterdir(), key=lambda file: "double" in file.name)
    whole = halving.read_bytes()
    if how == "swapped":
        halving.write_bytes(doubling.read_bytes())
    doubling.write_bytes(whole)
    assert run() == (DOUBLED, 0)
    assert run() == (DOUBLED, 1)


@pytest.mark.parametrize("days", [29, 31])
def test_writing_a_file_removes_unused_ones(
    days: int, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run()
    (file,) = cache.iterdir()
    names = [f"double-{'0' * 64}", f"other-{'1' * 64}", "partial-abc_1"]
    kept = ["notes.txt", f"double-{'0' * 63}", f"link-{'2' * 64}", f"folder-{'3' * 64}"]
    for name in (*names, *kept[:2]):
        (cache / name).write_text("")
    (cache / kept[2]).symlink_to("notes.txt")
    (cache / kept[3]).mkdir()
    then = compiled_loops.time.time() - days * 24 * 3600
    for path in cache.iterdir():
        os.utime(path, (then, then), follow_symlinks=False)
    assert run() == (DOUBLED, 1) and file.stat().st_mtime > then + 1, "it is in use"
    assert len(list(cache.iterdir())) == 8, "reading removes nothing"
    compiled_loops.compiled(halve)(np.arange(4, dtype=np.float32))
    left = {path.name for path in cache.iterdir() if "halve" not in path.name}
    assert left == {file.name, *kept, *(names if days < 30 else [])}
    for name in names:
        (cache / name).write_text("")
        os.utime(cache / name, (then, then))
    real = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: real + 1)
    compiled_loops._remove_unused(cache)
    assert {path.name for path in cache.iterdir()} >= set(names), "another user's stay"


@pytest.mark.parametrize("how", ["owner", "group", "others", "link", "fifo", "folder"])
def test_files_writable_by_other_users_are_not_unpickled(
    how: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run()
    (file,) = cache.iterdir()
    compiled_loops._write(file, pickle.dumps(Hostile()))
    with pytest.raises(AssertionError, match="unpickled"):
        pickle.loads(compiled_loops._read(file) or b"")
    if how == "owner":
        real = os.getuid()
        monkeypatch.setattr(os, "getuid", lambda: real + 1)
    elif how in ("group", "others"):
        file.chmod(0o620 if how == "group" else 0o602)
    else:
        target = file.rename(cache / "target")
        {
            "link": lambda: file.symlink_to(target),
            "fifo": lambda: os.mkfifo(file),
            "folder": file.mkdir,
        }[how]()
    read = []
    monkeypatch.setattr(pickle, "loads", lambda data: read.append(data))
    assert run()[0] == DOUBLED
    assert not read


@pytest.mark.parametrize("home", ["/proc/none", "/dev/null", ""])
def test_without_a_cache_folder_everything_is_compiled(
    home: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", home)

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    if not home:  # a uid that no user has
        monkeypatch.setattr(Path, "home", no_home)
    assert run() == (DOUBLED, 0)


def test_full_disk_is_ignored_and_leaves_no_file(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert run() == (DOUBLED, 0)
    assert list(cache.iterdir()) == []


def test_cache_file_name_depends_on_processor_signature_and_source(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Codegen:
        def __init__(self, processor: str) -> None:
            self.processor = processor

        def magic_tuple(self) -> tuple[str, ...]:
            return ("x86_64-linux", self.processor, "+avx2")

    files = compiled_loops._DiskCache(double)
    names = [files.path(sig, Codegen(cpu)).name for sig in ("f4", "f8") for cpu in ("a", "b")]
    other = compiled_loops._DiskCache(double)
    other.source = files.source + b"#"
    names += [other.path("f4", Codegen("a")).name]
    assert len(set(names)) == len(names)
    assert all(name.startswith("double-") for name in names)


def test_relative_cache_home_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the XDG specification requires; otherwise each working folder gets a cache."""
    monkeypatch.setenv("HOME", "/home/somebody")
    for given in ("relative", ""):
        monkeypatch.setenv("XDG_CACHE_HOME", given)
        assert compiled_loops.folder() == Path("/home/somebody/.cache/moe_dist")
    monkeypatch.setenv("XDG_CACHE_HOME", "/scratch/me")
    assert compiled_loops.folder() == Path("/scratch/me/moe_dist")
