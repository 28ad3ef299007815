"""Writes to a run folder stay inside it."""

import os
import re
from pathlib import Path

import pytest

from moe_dist.config import run_folder

PRECIOUS = "precious"


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    folder = tmp_path / "outside"
    folder.mkdir()
    (folder / "victim").write_text(PRECIOUS)
    return folder


@pytest.mark.parametrize(
    "name", ["config.json", "partial_config.json", "report/loss.png", "report/partial_loss.png"]
)
@pytest.mark.parametrize("leads_to", ["victim", "missing"])
def test_link_in_place_of_a_file_is_replaced(
    name: str, leads_to: str, outside: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    (run / "report").mkdir(parents=True)
    (run / name).symlink_to(outside / leads_to)
    written = run_folder.write(run, name.replace("partial_", ""), "ours")
    assert written.read_text() == "ours" and not written.is_symlink()
    assert not list(run.rglob("partial_*"))
    run_folder.remove(run, name)
    assert [path.name for path in outside.iterdir()] == ["victim"]
    assert (outside / "victim").read_text() == PRECIOUS


@pytest.mark.parametrize("link", ["report", "report/deep"])
def test_link_in_place_of_a_folder_is_rejected_by_name(
    link: str, outside: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    (run / link).parent.mkdir(parents=True)
    (run / link).symlink_to(outside)
    named = re.escape(f"{run / link} is a link, and nothing is written through")
    for attempt in (
        lambda: run_folder.write(run, "report/deep/victim", "ours"),
        lambda: run_folder.make_folder(run, "report/deep"),
        lambda: run_folder.remove(run, "report/deep/victim"),
    ):
        with pytest.raises(OSError, match=named):
            attempt()
    assert (outside / "victim").read_text() == PRECIOUS
    run_folder.remove(run, link)
    assert not (run / link).is_symlink() and (outside / "victim").exists()


def test_run_folder_itself_may_be_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    run_folder.write(tmp_path / "run" / "a", "report/x", "ours")
    assert (tmp_path / "disk" / "a" / "report" / "x").read_text() == "ours"


def test_removing_a_folder_keeps_the_targets_of_its_links(outside: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    inner = run_folder.make_folder(run, "checkpoints/partial_x")
    (inner / "link").symlink_to(outside)
    run_folder.remove(run, "checkpoints/partial_x")
    assert not inner.exists() and (outside / "victim").read_text() == PRECIOUS


def test_failed_write_leaves_the_file_unchanged(tmp_path: Path) -> None:
    run_folder.write(tmp_path, "x", "whole")
    with pytest.raises(KeyError), run_folder.atomic_write(tmp_path, "x") as file:
        file.write(b"half")
        raise KeyError
    with (
        pytest.raises(OSError, match="written by another process"),
        run_folder.atomic_write(tmp_path, "x"),
    ):
        run_folder.write(tmp_path, "x", "theirs")
    assert (tmp_path / "x").read_text() == "theirs" and os.listdir(tmp_path) == ["x"]


@pytest.mark.timeout(10)
@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "nothing", "deep", "bytes"])
def test_only_a_regular_file_is_read(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    make = {
        "pipe": lambda: os.mkfifo(path),
        "folder": path.mkdir,
        "device": lambda: path.symlink_to("/dev/zero"),
        "deep": lambda: path.write_text("[" * 200_000),
        "bytes": lambda: path.write_bytes(b'"\xff'),
        "nothing": lambda: None,
    }
    make[kind]()
    with pytest.raises(ValueError, match=re.escape(str(path))):
        run_folder.read_json(path)
