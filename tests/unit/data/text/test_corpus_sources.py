"""Sources of text: local files, folders, dataset names; their splits, and the message of every
mistake. No network."""

import errno
import gzip
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import pytest

from moe_dist.config.papers import CONFIGS, get
from moe_dist.config.schema import PretrainingDataConfig, TextDataConfig
from moe_dist.data.files.read import read_rows
from moe_dist.data.text import corpus as sources
from moe_dist.data.text.corpus import check_text, is_local, open_text
from moe_dist.training.run_spec import parse_run


def numbered(first: int, last: int, word: str = "line") -> str:
    return "".join(f"{word} {i}\n" for i in range(first, last))


def read(source: Path | str, streamed: bool = True) -> dict[str, list[str]]:
    check_text(str(source))
    return {split: list(lines) for split, lines in open_text(str(source), streamed).items()}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> tuple[Path, list[Any]]:
    """Fakes a Hub that answers a name with tmp_path / repository; returns the folder and the
    requests."""
    load, asked = datasets.load_dataset, []

    def local(name: str, *args: Any, revision: str | None, streaming: bool) -> Any:
        asked.append((name, *args, revision))
        return load(str(tmp_path / name), streaming=streaming)

    monkeypatch.setattr(datasets, "load_dataset", local)
    monkeypatch.setattr(sources, "_check_hub", lambda repository, revision: None)
    return tmp_path, asked


@pytest.mark.parametrize("streamed", [False, True])
def test_files_without_splits_are_split_in_order(tmp_path: Path, streamed: bool) -> None:
    # 39 + 1 lines: int(40 * 0.9) = 36 and int(40 * 0.95) = 38. b.txt sorts behind a.txt, so its
    # line comes last.
    (tmp_path / "b.txt").write_text("\n  last \n", encoding="utf-8")
    (tmp_path / "a.txt").write_bytes(
        ("\ufeff" + "".join(f" {i}\r\n\n" for i in range(39))).encode()
    )
    expected = {"train": [str(i) for i in range(36)], "valid": ["36", "37"], "test": ["38", "last"]}
    assert read(tmp_path / "*.txt", streamed) == expected
    assert read(tmp_path, streamed) == expected, "a folder is all of its files"


def test_existing_path_is_taken_literally(tmp_path: Path) -> None:
    path = tmp_path / "a[1].txt"
    for num_lines, sizes in ((20, [18, 1, 1]), (100, [90, 5, 5])):
        path.write_text("x\n" * num_lines)
        assert [len(lines) for lines in read(path).values()] == sizes


def test_streamed_lines_can_be_read_twice_without_a_list(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(numbered(0, 3000))  # more than a table of 1,000
    for lines in open_text(str(tmp_path / "a.txt"), streamed=True).values():
        assert not isinstance(lines, list)
        first = iter(lines)
        next(first)
        assert list(lines) == list(lines)
        assert [*first] == list(lines)[1:], "a second reader does not disturb the first"


def test_text_that_is_not_streamed_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text(numbered(0, 100))
    passes = []

    def counted(*args: Any) -> Iterable[Any]:
        passes.append(args)
        return read_rows(*args)

    monkeypatch.setattr(sources, "read_rows", counted)
    splits = open_text(str(tmp_path / "a.txt"), streamed=False)
    assert [len(list(lines)) for lines in splits.values()] == [90, 5, 5]
    assert len(passes) == 1


def test_example_of_several_lines_becomes_one_line(tmp_path: Path) -> None:
    rows = [{"text": f"one {i}\ntwo\n"} for i in range(20)] + [{"text": " \n"}, {"text": None}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read(tmp_path / "a.jsonl")["train"][:2] == ["one 0\ntwo", "one 1\ntwo"]
    assert sum(map(len, read(tmp_path / "a.jsonl").values())) == 20


@pytest.mark.parametrize("kind", ["txt", "txt.gz", "jsonl", "parquet"])
@pytest.mark.parametrize("valid", ["valid", "validation"])
def test_folder_with_files_named_by_split(tmp_path: Path, kind: str, valid: str) -> None:
    sizes = {"train": 30, valid: 3, "test": 2}
    for split, size in sizes.items():
        path, lines = tmp_path / f"{split}.{kind}", numbered(0, size, split).splitlines()
        if kind == "txt":
            path.write_text("\n".join(lines))
        elif kind == "txt.gz":
            path.write_bytes(gzip.compress("\n".join(lines).encode()))
        else:
            rows = datasets.Dataset.from_dict({"n": range(size), "text": lines})
            rows.to_json(path) if kind == "jsonl" else rows.to_parquet(path)
    splits = read(tmp_path)
    assert [len(splits[split]) for split in ("train", "valid", "test")] == [30, 3, 2]
    assert (splits["train"][29], splits["valid"][0], splits["test"][1]) == (
        "train 29",
        f"{valid} 0",
        "test 1",
    )


def test_dataset_without_valid_split_holds_out_by_index(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text(numbered(0, 450))
    (tmp_path / "test.txt").write_text(numbered(0, 2, "test"))
    splits = read(tmp_path)
    assert splits["valid"] == ["line 199", "line 399"]
    assert splits["test"] == ["test 0", "test 1"]
    assert splits["train"] == [f"line {i}" for i in range(450) if i not in (199, 399)]


def test_dataset_names_keep_configuration_and_revision(
    hub: tuple[Path, list[Any]],
) -> None:
    folder, asked = hub
    for repository in ("Salesforce/wikitext", "billion-word-benchmark/lm1b", "owner/name"):
        (folder / repository).mkdir(parents=True)
        (folder / repository / "train.txt").write_text(numbered(0, 250, repository))
    for name in ("wikitext", "wikitext:wikitext-2-raw-v1", "lm1b", "owner/name:config"):
        splits = {split: list(lines) for split, lines in open_text(name, streamed=True).items()}
        assert [len(splits[split]) for split in ("train", "valid", "test")] == [248, 1, 1]
        repository = splits["train"][0].split()[0]
        assert (splits["test"], splits["valid"]) == ([f"{repository} 198"], [f"{repository} 199"])
    assert asked == [
        ("Salesforce/wikitext", "wikitext-103-raw-v1", None),
        ("Salesforce/wikitext", "wikitext-2-raw-v1", None),
        ("billion-word-benchmark/lm1b", None, "refs/convert/parquet"),
        ("owner/name", "config", None),
    ]


def test_held_out_examples_come_from_the_first_million(
    hub: tuple[Path, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = hub
    monkeypatch.setattr(sources, "HELD_OUT_UP_TO", 400)
    (folder / "name").mkdir()
    (folder / "name" / "train.txt").write_text(numbered(0, 700))
    splits = {split: list(lines) for split, lines in open_text("name", streamed=True).items()}
    assert splits["valid"] == ["line 199", "line 399"] and splits["test"] == [
        "line 198",
        "line 398",
    ]
    assert len(splits["train"]) == 696 and splits["train"][-102:] == [
        f"line {i}" for i in range(598, 700)
    ]


def test_check_reads_no_whole_file_and_no_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "big.txt").write_text(numbered(0, 50_000))
    read_ = []

    def counted(*args: Any) -> Iterable[Any]:
        for row in read_rows(*args):
            read_.append(row)
            yield row

    monkeypatch.setattr(sources, "read_rows", counted)
    check_text(str(tmp_path / "big.txt"))
    assert len(read_) == sources.MIN_LINES
    monkeypatch.setattr(sources, "_import_datasets", None)  # not even imported
    check_text("bundled")
    for data in (get(name).data for name in CONFIGS):
        if isinstance(data, TextDataConfig | PretrainingDataConfig):
            check_text(data.text)


@pytest.mark.parametrize("pattern", ["*", "", "?.*", "**"])
def test_each_file_is_read_by_its_own_suffix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str
) -> None:
    monkeypatch.setattr(sources, "_import_datasets", None)  # which would want a cache
    lines = {name: numbered(0, 12, name).splitlines() for name in "abcdef"}
    rows = [{"meta": {f"page{i % 2}": i}, "text": line} for i, line in enumerate(lines["b"])]
    (tmp_path / "a.txt").write_text("\n".join(lines["a"]))
    (tmp_path / "b.ndjson").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "c.csv").write_text(
        "id,text\n" + "".join(f'{i},"{line}"\n' for i, line in enumerate(lines["c"]))
    )
    (tmp_path / "d.tsv.gz").write_bytes(
        gzip.compress("\n".join(["text\turl", *(f"{x}\tu" for x in lines["d"])]).encode())
    )
    datasets.Dataset.from_dict({"n": range(12), "text": lines["e"]}).to_parquet(
        tmp_path / "e.parquet"
    )
    (tmp_path / "f").write_text("\n".join(lines["f"]))
    (tmp_path / ".hidden.jsonl").write_text("{broken")
    expected = [line for name in "abcdef"[: 5 if pattern == "?.*" else 6] for line in lines[name]]
    splits = read(os.path.join(tmp_path, pattern))
    assert [line for split in ("train", "valid", "test") for line in splits[split]] == expected


def test_rows_without_text_are_rejected(tmp_path: Path) -> None:
    rows = [{"text": f"a {i}" if i % 2 else None, "n": i} for i in range(60)]
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert sum(map(len, read(path).values())) == 30
    path.write_text("\n".join(map(json.dumps, [*rows, {"body": "b"}])))
    with pytest.raises(
        ValueError, match=r"x.jsonl: row 61 has no column 'text' .*'body' \(str\): name it so"
    ):
        read(path)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_unwritable_cache_is_reported(
    hub: tuple[Path, list[Any]], monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refused(*_: Any, **__: Any) -> None:
        raise OSError(number, os.strerror(number), "/nonexistent")

    monkeypatch.setattr(datasets, "load_dataset", refused)
    with pytest.raises(
        ValueError,
        match=r"data.text='owner/name' does not load: .*; set HF_HOME to a folder that can",
    ):
        open_text("owner/name", streamed=True)


BAD = {
    "missing": (None, "no file matches"),
    "empty": (b" \n\n", "has 0 lines that are not empty, too few"),
    "not utf-8": (b"\xff\xfe\x00", "invalid UTF-8 .*; convert the file to UTF-8"),
    "nul bytes": (b"MZ\0\0" * 9, "NUL byte"),
    "too few lines": (b"x\n" * 19, "has 19 lines .*give at least 20"),
}


@pytest.mark.parametrize(("content", "message"), BAD.values(), ids=BAD)
def test_invalid_files_are_reported_before_any_layout(
    tmp_path: Path, content: bytes | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "corpus.txt"
    if content is not None:
        path.write_bytes(content)
    for act in (
        check_text,
        lambda source: open_text(source, True),
        lambda source: open_text(source, False),
    ):
        with pytest.raises(ValueError, match=f"data.text={re.escape(repr(str(path)))}.*{message}"):
            act(str(path))
    with pytest.raises(SystemExit) as exit_:
        parse_run(["lstm_moe_demo", "--set", f"data.text={path}"], None)
    said = capsys.readouterr()
    assert exit_.value.code == 2 and not said.out
    assert said.err.startswith("error: data.text=") and said.err.count("\n") == 1


def test_late_errors_are_reported_too(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(numbered(0, 1000))
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\n")
    check_text(str(tmp_path / "*.txt"))
    with pytest.raises(ValueError, match=r"\*.txt': .*b.txt: invalid UTF-8"):
        open_text(str(tmp_path / "*.txt"), streamed=True)


@pytest.mark.parametrize(
    "source",
    ["a b", "no/such/*.txt", "lm1b.txt", "/no/such", "./corpus", "one/two/three", "", "x:y:z"],
)
def test_unknown_source_is_rejected(source: str) -> None:
    assert not is_local(source)
    with pytest.raises(
        ValueError,
        match=f"data.text={re.escape(repr(source))}: no file matches; give 'bundled', a file",
    ):
        check_text(source)


def test_invalid_text_folders_are_rejected(tmp_path: Path) -> None:
    for name, files, message in [
        ("none", {}, "the folder has no data files"),
        ("odd", {"part.xml": "x\n" * 30}, "files that end with .xml are not read"),
        (
            "odd one",
            {"a.txt": "x\n" * 30, "b.odd": "x\n" * 30},
            "files that end with .odd are not read",
        ),
        ("test", {"test.txt": "x\n" * 30}, "no split 'train', only test"),
        (
            "columns",
            {"train.jsonl": '{"words": "a", "n": 1}\n' * 30},
            r"only 'words' \(str\), 'n' \(int\)",
        ),
        (
            "numbers",
            {"train.jsonl": '{"text": 1}\n' * 30},
            r"no column 'text' of strings, only 'text' \(int\)",
        ),
        ("broken", {"train.jsonl": "{nonsense\n" * 30}, "train.jsonl: invalid JSON"),
        ("blank", {"train.txt": "\n", "test.txt": "x\n"}, "has 0 lines"),
    ]:
        folder = tmp_path / name
        folder.mkdir()
        for file, content in files.items():
            (folder / file).write_text(content)
        with pytest.raises(
            ValueError, match=f"data.text={re.escape(repr(str(folder)))}.*{message}"
        ):
            check_text(str(folder))
    (tmp_path / "short").mkdir()
    for file, size in (("train.txt", 199), ("test.txt", 3)):
        (tmp_path / "short" / file).write_text(numbered(0, size))
    with pytest.raises(ValueError, match=r"has no line for 'valid'.*200 lines of 'train'"):
        open_text(str(tmp_path / "short"), streamed=True)
