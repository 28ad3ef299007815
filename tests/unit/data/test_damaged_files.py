"""Damaged data files are read, or rejected with one line; `experiments/damaged_files.py` runs more
seeds."""

import os
import zipfile
from pathlib import Path

import pytest

from experiments.damaged_files import READERS, read, run
from moe_dist.data.text.corpus import check_text, is_local, open_text


@pytest.mark.timeout(200)
def test_damaged_files_are_read_or_refused_with_one_line(tmp_path: Path) -> None:
    counts = run(0, 150, tmp_path)
    assert all(counts[name] > 5 for name in ("text", "streamed", "sentences")), "not all is refused"
    assert max(counts.values()) < 75


@pytest.mark.parametrize("name", ["pipe", "device", "closed", "loop", "folder of loops", "none"])
def test_special_files_are_rejected_at_once(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "device").symlink_to("/dev/zero")
    (tmp_path / "closed").symlink_to("/no/such")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "folder of loops").mkdir()
    for i in range(3):
        (tmp_path / "folder of loops" / str(i)).symlink_to("..", target_is_directory=True)
    for source in (str(tmp_path / name), f"{tmp_path}/{name[:-1]}?", f"{tmp_path}/**/{name[:-1]}?"):
        told = read(Path(source))
        assert "read" not in told.values() and len(told) == len(READERS)


def test_folder_of_link_loops_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "x.txt").write_text("x\n" * 25)
    for i, folder in enumerate((tmp_path, tmp_path / "a", tmp_path / "a" / "b")):
        folder.joinpath(f"up{i}").symlink_to(tmp_path)
    for source in (str(tmp_path), f"{tmp_path}/**/*.txt", f"{tmp_path}/**"):
        assert sum(len(list(lines)) for lines in open_text(source, True).values()) == 25


@pytest.mark.parametrize("source", ["a" * 5000, "\0", "a/" * 3000, "corpus\ud800.txt"])
def test_impossible_file_names_are_rejected(source: str) -> None:
    assert not is_local(source)
    with pytest.raises(ValueError, match=r"data.text="):
        check_text(source) or open_text(source, True)


def test_message_quotes_file_content_in_one_short_line(tmp_path: Path) -> None:
    path = tmp_path / "x.csv"
    for name in ("\x1b[2J\u202e\u2028", '"two\nlines\x07"', "long" * 5000, "te\ufeffxt"):
        path.write_text(f"{name},label\n" + "a,b\n" * 30)
        read(path)
        path.write_text(f"text,{name},{name}\n")
        read(path)


def test_nested_archives_are_limited(tmp_path: Path) -> None:
    content = b"x\n" * 30
    for _ in range(30):
        with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
            archive.writestr("x.zip" if _ else "x.txt", content)
        content = (tmp_path / "x.zip").read_bytes()
    assert (
        sum(len(list(lines)) for lines in open_text(str(tmp_path / "x.zip"), True).values()) == 30
    )
