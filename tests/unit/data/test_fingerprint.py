"""Data that has changed since a checkpoint is reported by name; data that has only moved is the
same."""

import bz2
import gzip
import json
import lzma
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from processes import check_plan, set_
from runs import tiny_images

from moe_dist.config import papers
from moe_dist.config.overrides import override, to_json
from moe_dist.data import data_source, fingerprint
from moe_dist.data.data_source import DataSource, arrays_source, local_source, text_source
from moe_dist.data.fingerprint import Fingerprint, check_unchanged
from moe_dist.distributed.batch_layout import make_batch_layout
from moe_dist.tasks.registry import task_of
from moe_dist.training import run_spec

ROWS = ["text,label", *(f"a film of {i} parts,{i % 2}" for i in range(50))]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Writes a table, a text and an image into two subfolders."""
    folder = tmp_path / "data"
    (folder / "train").mkdir(parents=True)
    (folder / "test").mkdir()
    (folder / "train" / "a.csv").write_text("\n".join(ROWS))
    (folder / "train" / "b.txt").write_text("in the beginning\n" * 100)
    (folder / "test" / "c.png").write_bytes(bytes(range(256)))
    return folder


def kept(source: DataSource) -> dict[str, Any]:
    """Returns the fingerprint in the form that a checkpoint has."""
    return json.loads(json.dumps(check_unchanged(source, None, "", False)[0]))


def changes(before: dict[str, Any], place: Path | str) -> list[str]:
    return Fingerprint.from_json(before).changes(local_source(str(place)))


def test_moved_data_has_the_same_fingerprint(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under another root, next to other files, packed, behind a link, and by a relative path."""
    before = kept(local_source(str(corpus)))
    other = shutil.copytree(corpus, tmp_path / "elsewhere" / "renamed")
    (other / ".cache").mkdir()
    (other / ".cache" / "x.txt").write_text("hidden")
    (other / "README.md").write_text("of the data")
    (other / "train" / "b.txt.gz").write_bytes(
        gzip.compress((other / "train" / "b.txt").read_bytes())
    )
    (other / "train" / "b.txt").unlink()
    (tmp_path / "link").symlink_to(other)
    monkeypatch.chdir(tmp_path / "elsewhere")
    for place in (corpus, f"{corpus}/", other, tmp_path / "link", "renamed", "./renamed/"):
        assert changes(before, place) == []
    pattern = kept(local_source(f"{corpus}/*/*.[cp]*"))
    assert (
        list(pattern["entries"]) == ["test/c.png", "train/a.csv"]
        and changes(pattern, "renamed/*/*.[cp]*") == []
    )


@pytest.mark.parametrize(
    ("ending", "pack"), [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress)]
)
def test_single_file_may_have_another_name(
    ending: str, pack: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    (tmp_path / "a.txt").write_text("light " * 1000)
    before = kept(local_source(str(tmp_path / "a.txt")))
    (tmp_path / "[b].text").write_text("light " * 1000)
    (tmp_path / f"c.{ending}").write_bytes(pack(b"light " * 1000))
    for same in ("[b].text", f"c.{ending}"):
        assert changes(before, tmp_path / same) == []
    (tmp_path / f"c.{ending}").write_bytes(pack(b"light " * 1001))
    assert changes(before, tmp_path / f"c.{ending}") == [
        "the file is longer (6,000 bytes then, 6,006 bytes now)"
    ]


@pytest.mark.parametrize(
    ("before", "now", "says"),
    [
        ("a.txt", "a.csv", ["the .csv file (50 bytes) was added", "the file (50 bytes) is gone"]),
        ("a.csv", "a", ["the .csv file (50 bytes) is gone", "the file (50 bytes) was added"]),
        (
            "a.csv.gz",
            "a.tsv",
            ["the .csv file (50 bytes) is gone", "the .tsv file (50 bytes) was added"],
        ),
        ("a.jsonl", "b.ndjson.xz", []),
        ("a.csv", "b.CSV.gz", []),
        ("a.txt", "b.00001", []),
    ],
)
def test_single_file_of_another_format_is_different(
    before: str, now: str, says: list[str], tmp_path: Path
) -> None:
    pack = {".gz": gzip.compress, ".xz": lzma.compress}
    for name in (before, now):
        content = b"light,1\n" * 6 + b"ok"
        (tmp_path / name).write_bytes(pack.get(Path(name).suffix, bytes)(content))
    assert changes(kept(local_source(str(tmp_path / before))), tmp_path / now) == says


@pytest.mark.parametrize(
    ("limit", "value"),
    [
        ("MAX_DECOMPRESSED_BYTES", 16_000),
        ("MAX_DECOMPRESSED_BYTES", 100),
        ("MAX_DECOMPRESSED_FILES", 3),
    ],
)
def test_packed_files_are_unpacked_within_a_budget(
    limit: str, value: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Above the budget files are compared packed, and the same data is still the same."""
    texts = [f"light {i} ".encode() * 600 for i in range(4)]  # 4,800 bytes each
    for i, content in enumerate(texts):
        (tmp_path / f"{i}.txt.gz").write_bytes(gzip.compress(content, mtime=0))
    unpacked = kept(local_source(str(tmp_path)))
    names = [f"{i}.txt" for i in range(4)]
    assert list(unpacked["entries"]) == names and unpacked["entries"]["0.txt"][1] == 4800
    read: list[bytes] = []

    class Counted(gzip.GzipFile):
        def read(self, size: int | None = -1) -> bytes:
            read.append(super().read(size))
            return read[-1]

    monkeypatch.setattr(data_source, limit, value)
    monkeypatch.setitem(
        data_source.SEEKABLE_DECOMPRESSORS, ".gz", lambda file: Counted(fileobj=file)
    )
    packed = kept(local_source(str(tmp_path)))
    assert list(packed["entries"]) == [f"{name}.gz" for name in names]
    assert sum(map(len, read)) <= (value + 4800 if value > 1000 else 0)
    assert changes(packed, tmp_path) == []
    (tmp_path / "2.txt.gz").write_bytes(gzip.compress(texts[2][:-1] + b"!", mtime=0))
    assert changes(packed, tmp_path)


def test_file_in_two_packings_counts_twice(tmp_path: Path) -> None:
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"light " * 10))
    (tmp_path / "a.txt.xz").write_bytes(lzma.compress(b"dark  " * 10))
    before = kept(local_source(str(tmp_path)))
    assert list(before["entries"]) == ["a.txt", "a.txt.xz"] and changes(before, tmp_path) == []
    for name, pack in (("a.txt.gz", gzip.compress), ("a.txt.xz", lzma.compress)):
        was = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(pack(b"others" * 11))
        assert len(changes(before, tmp_path)) == 1, name
        (tmp_path / name).write_bytes(was)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda f: (f / "train/b.txt").write_text("in\n"),
            ["train/b.txt is shorter (1,700 bytes then, 3 bytes now)"],
        ),
        (lambda f: (f / "test/c.png").unlink(), ["test/c.png (256 bytes) is gone"]),
        (lambda f: (f / "train/d.txt").write_text("new"), ["train/d.txt (3 bytes) was added"]),
        (
            lambda f: (f / "train/b.txt").rename(f / "train/e.txt"),
            ["train/b.txt (1,700 bytes) is gone", "train/e.txt (1,700 bytes) was added"],
        ),
        (
            lambda f: (f / "train/a.csv").write_text("\n".join([ROWS[0], *ROWS[:0:-1]])),
            ["train/a.csv has other contents of the same size"],
        ),
        (
            lambda f: (f / "test/c.png").write_bytes(bytes(255) + b"x"),
            ["test/c.png has other contents of the same size"],
        ),
    ],
)
def test_changed_files_are_named(
    change: Callable[[Path], object], says: list[str], corpus: Path
) -> None:
    before = kept(local_source(str(corpus)))
    change(corpus)
    assert changes(before, corpus) == says


def test_data_from_another_source_is_different(corpus: Path) -> None:
    """A folder is split by its names, a glob is not; the bundled text is not a file."""
    assert changes(kept(local_source(str(corpus))), f"{corpus}/*/*") == [
        "it was given as 'folder', and is 'files' now"
    ]
    bundled = kept(text_source("bundled"))
    assert check_unchanged(text_source("bundled"), bundled, "", False) == (bundled, "")
    assert changes(bundled, corpus) == ["it was given as 'bundled', and is 'folder' now"]


def test_no_more_than_the_budget_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large files are read in evenly spaced blocks, with the first and the last, at the same
    places when files are added and each share becomes smaller."""
    monkeypatch.setattr(fingerprint, "MAX_READ_BYTES", 4 * 2**16)
    large = tmp_path / "large.bin"
    right = bytes(2**20)  # 16 blocks, of which 4 are read: those from 0, 5, 10 and 15 blocks on
    large.write_bytes(right)
    before = kept(local_source(f"{tmp_path}/*"))
    for place, is_seen in (
        (0, True),
        (2**20 - 1, True),
        (5 * 2**16, True),
        (10 * 2**16, True),
        (2**16, False),
    ):
        large.write_bytes(right[:place] + b"x" + right[place + 1 :])
        assert changes(before, large) == (
            ["the file has other contents of the same size"] if is_seen else []
        )
    large.write_bytes(right)
    before = kept(local_source(str(tmp_path)))
    (tmp_path / "small.txt").write_text("x")
    assert changes(before, tmp_path) == ["small.txt (1 bytes) was added"]
    assert kept(local_source(str(tmp_path)))["share"] == 2 * 2**16


def test_many_files_are_kept_by_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "MAX_ENTRIES", 4)
    monkeypatch.setattr(fingerprint, "MAX_HASHED_FILES", 3)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(5):
                (tmp_path / split / name / f"{i}.png").write_bytes(b"\x89PNG" + bytes([i]))
    before = kept(local_source(str(tmp_path)))
    assert set(before["entries"]) == {"train/cat", "train/dog", "test/cat", "test/dog"}
    assert len(before["contents"]) == 3
    (tmp_path / "train" / "cat" / "3.png").unlink()
    (tmp_path / "test" / "dog" / "4.png").rename(tmp_path / "test" / "dog" / "5.png")
    assert changes(before, tmp_path) == [
        "test/dog (5 files of 25 bytes) has files of other names or sizes",
        "train/cat had 5 files of 25 bytes, and has 4 files of 20 bytes",
    ]
    monkeypatch.setattr(fingerprint, "MAX_ENTRIES", 1)
    assert list(kept(local_source(str(tmp_path)))["entries"]) == ["."]


def test_only_a_few_changes_are_listed(tmp_path: Path) -> None:
    before = kept(local_source(str(tmp_path)))
    for i in range(9):
        (tmp_path / f"{i}.txt").write_text("x")
    says = r"^data.text='x' is not the data .*: 0.txt .* 2.txt .*; and 6 more changes\. "
    with pytest.raises(ValueError, match=says) as error:
        check_unchanged(local_source(str(tmp_path)), before, "data.text='x'", False)
    assert "--allow-changed-data" in str(error.value) and "3.txt" not in str(error.value)
    now, note = check_unchanged(local_source(str(tmp_path)), before, "data.text='x'", True)
    assert "6 more changes" in note
    assert check_unchanged(local_source(str(tmp_path)), now, "", False) == (now, ""), (
        "the new one is kept"
    )


def test_fingerprint_of_images_in_memory_and_hub_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    pixel_I = np.arange(60, dtype=np.uint8).reshape(5, 4, 3)
    before = kept(arrays_source("cifar10", {"train": (pixel_I, np.arange(5))}))
    source = arrays_source("cifar10", {"train": (pixel_I, np.arange(5)[::-1])})
    assert Fingerprint.from_json(before).changes(source) == [
        "train has other contents of the same size"
    ]
    source = arrays_source("cifar10", {"train": (pixel_I[:4], np.arange(4))})
    assert Fingerprint.from_json(before).changes(source) == [
        "train is shorter (100 bytes then, 80 bytes now)"
    ]

    def files(**sizes: int) -> list[SimpleNamespace]:
        named = {f"{name}.parquet": size for name, size in sizes.items()} | {
            "README.md": len(sizes)
        }
        return [
            SimpleNamespace(rfilename=name, size=size, lfs=None, blob_id=name)
            for name, size in named.items()
        ]

    asked = []

    def dataset_info(self: Any, repository: str, **options: Any) -> SimpleNamespace:
        asked.append((repository, options["revision"]))
        return SimpleNamespace(siblings=there)

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", dataset_info)
    there = files(train=10, test=5)
    before = kept(text_source("wikitext:wikitext-2-raw-v1"))
    assert before["given"] == "Salesforce/wikitext:wikitext-2-raw-v1"
    assert check_unchanged(text_source("wikitext:wikitext-2-raw-v1"), before, "", False) == (
        before,
        "",
    )
    there = files(train=10, test=6, valid=1)
    assert Fingerprint.from_json(before).changes(text_source("wikitext:wikitext-2-raw-v1")) == [
        "test.parquet is longer (5 bytes then, 6 bytes now)",
        "valid.parquet (1 bytes) was added",
    ]
    assert (
        Fingerprint.from_json(before)
        .changes(text_source("lm1b"))[0]
        .startswith("it was given as 'Salesforce/wikitext:")
    )
    assert asked[-1] == ("billion-word-benchmark/lm1b", "refs/convert/parquet")


@pytest.mark.parametrize(
    "broken",
    [
        [],
        {},
        "x",
        5,
        {"given": "files"},
        {"given": 1, "levels": 0, "entries": {}, "share": 10, "contents": {}},
        {"given": "files", "levels": -1, "entries": {}, "share": 10, "contents": {}},
        {"given": "files", "levels": 0, "entries": {"a": [1]}, "share": 10, "contents": {}},
        {
            "given": "files",
            "levels": 0,
            "entries": {"a": [1, 2.5, ""]},
            "share": 10,
            "contents": {},
        },
        {"given": "files", "levels": 0, "entries": {}, "share": 10**300, "contents": {}},
        {"given": "files", "levels": 0, "entries": {}, "share": 10, "contents": {"a": None}},
        {"given": "files", "levels": 0, "entries": [], "share": 10, "contents": {}},
    ],
)
def test_broken_fingerprint_is_a_value_error(broken: Any, corpus: Path) -> None:
    with pytest.raises(ValueError, match="fingerprint of its data is broken"):
        check_unchanged(local_source(str(corpus)), broken, "", True)


def test_non_text_file_names_survive_json(tmp_path: Path) -> None:
    (tmp_path / "\udcff\n.txt").write_text("x")
    before = kept(local_source(str(tmp_path)))
    json.dumps(before).encode()
    assert changes(before, tmp_path) == []


PLACES = {
    "lstm_moe_demo": "data.text",
    "widenet_demo": "data.images",
    "widenet_text_demo": "data.sentences",
    "widenet_squad": "data.questions",
}


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("how", ["--resume", "--evaluate", "--folder"])
def test_data_paths_may_change_on_resume(
    name: str,
    how: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    key, run = PLACES[name], tmp_path / "run"
    (run / "checkpoints" / "step_00000010").mkdir(parents=True)
    was = override(
        papers.get(name), [f"{key}=/job1/data", "init_from=none", "baseline=none", "mesh.ep=1"]
    )
    (run / "config.json").write_text(to_json(was))
    monkeypatch.setattr(run_spec.task_of(was), "check_data", lambda *args: None)
    monkeypatch.setattr(run_spec, "check_memory", lambda told: None)
    sets = ["--set", f"{key}=/job2/data"]
    auto = [
        name,
        "--folder",
        str(run),
        "--resume",
        "auto",
        *set_("init_from=none", "baseline=none"),
    ]
    planned = run_spec.parse_run([*(auto if how == "--folder" else [how, str(run)]), *sets], None)
    assert to_json(planned.config) == to_json(override(was, [f"{key}=/job2/data"])), (
        "and is kept in the run folder"
    )
    assert (
        f"note: {key}=/job2/data, which was /job1/data; it must hold the same data\n"
        in capsys.readouterr().out
    )


def test_allow_changed_data_requires_resume(capsys: pytest.CaptureFixture[str]) -> None:
    check_plan(
        ["lstm_moe_demo", "--allow-changed-data"], "only with --resume or --evaluate", capsys
    )


@pytest.mark.timeout(120)
def test_missing_image_is_named(tmp_path: Path) -> None:
    """Uses the image task, which lists the files that it read."""
    folder = tmp_path / "images"
    for split, num in (("train", 20), ("test", 4)):
        for label in ("cat", "dog"):
            (folder / split / label).mkdir(parents=True)
            for i in range(num):
                Image.new("L", (28, 28), i).save(folder / split / label / f"{i}.png")

    def source(place: Path) -> DataSource:
        config = tiny_images(f"data.images={place}", "model.num_classes=2")
        return task_of(config)(config, make_batch_layout(config, 1), None, None).data_source()

    before = kept(source(folder))
    assert Fingerprint.from_json(before).changes(source(folder.rename(tmp_path / "moved"))) == []
    (tmp_path / "moved" / "train" / "dog" / "7.png").unlink()
    assert (
        Fingerprint.from_json(before)
        .changes(source(tmp_path / "moved"))[0]
        .startswith("train/dog/7.png (")
    )
