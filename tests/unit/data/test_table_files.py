"""Local files: the files of a source, how each format is read, and quotes that do not close."""

import bz2
import csv
import gzip
import json
import lzma
import os
import random
import zipfile
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from moe_dist.data.files.find import find_files, find_splits
from moe_dist.data.files.formats import format_of
from moe_dist.data.files.read import label_names, read_rows
from moe_dist.data.files.regular_file import open_file

ROWS = [{"text": f"line {i}", "n": i} for i in range(3)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def rows_of(folder: Path, content: str, name: str = "x.csv") -> list[tuple[str, ...]]:
    return [tuple(row.values()) for row in read_rows(write(folder / name, content))]


@pytest.mark.parametrize("name", ["x.jsonl", "x.NDJSON", "x.json", "list.json"])
def test_json_lines_and_lists(tmp_path: Path, name: str) -> None:
    content = json.dumps(ROWS, indent=1) if name == "list.json" else "\ufeff\n" + LINES
    assert list(read_rows(write(tmp_path / name, content))) == ROWS


def test_unused_columns_may_differ_between_rows(tmp_path: Path) -> None:
    others: list[Any] = [1, "a", None, {"page": [1, {}]}, [[]], 10**400, 1e400, True]
    rows = [{"text": "a", f"meta{i % 3}": other} for i, other in enumerate(others)]
    path = write(tmp_path / "x.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert list(read_rows(path)) == rows


def test_json_object_over_several_lines_is_one_row(tmp_path: Path) -> None:
    for row in ({"text": "a", "n": [1, {"b": 2}]}, {"data": [{"text": "a"}]}):
        assert list(read_rows(write(tmp_path / "x.json", "\n" + json.dumps(row, indent=1)))) == [
            row
        ]


@pytest.mark.parametrize(
    "name",
    [
        "x.txt",
        "X.MD",
        "wiki.train.tokens",
        "enwik8",
        "news.en-00001-of-00100",
        "x.00001",
        "x.txt.1",
        "v1. Songs",
    ],
)
def test_plain_text(tmp_path: Path, name: str) -> None:
    assert rows_of(tmp_path, "\ufeffa\r\nb\rc\n{d}", name) == [
        ("a\n",),
        ("b\n",),
        ("c\n",),
        ("{d}",),
    ]


def packed(ending: str, content: bytes) -> bytes:
    if ending == ".zst":
        return pyarrow.compress(content, codec="zstd", asbytes=True)
    return {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}[ending](content)


@pytest.mark.parametrize(
    ("name", "content", "ending"),
    [
        ("x.txt", '\n{"text": "a b", "n": 1}\n', "jsonl"),
        (
            "x.text.gz",
            gzip.compress(b'{"id": 3, "premise": "a", "hypothesis": "b"}\n', mtime=0),
            "jsonl",
        ),
        ("x.md", "id,text\n1,a\n", "csv"),
        ("x.tokens", '\ufeff"sentence1"\t"sentence2"\t"score"\n', "csv"),
        ("x.txt", "label;text\n", "csv"),
    ],
)
def test_table_rows_in_a_text_file_are_rejected(
    tmp_path: Path, name: str, content: Any, ending: str
) -> None:
    with pytest.raises(
        ValueError, match=rf"the first line is a .*, not text; rename the file to \.{ending}"
    ):
        list(read_rows(write(tmp_path / name, content)))


@pytest.mark.parametrize(
    "first",
    [
        "{",
        "{d}",
        '{"a": 1}',
        '{"text": 5}',
        "text",
        "Text, label the first",
        "a,label",
        "[1]",
        "{" * 10_000,
    ],
)
def test_text_may_start_almost_like_rows(tmp_path: Path, first: str) -> None:
    assert rows_of(tmp_path, f"\n{first}\nb", "x.txt") == [("\n",), (f"{first}\n",), ("b",)]


@pytest.mark.parametrize(
    "first",
    [
        "The text, it says, is long",
        "Question",
        "Labels: many",
        "In question, he said",
        "Text, context, and meaning",
        "Freud distinguished the ego, id, and superego",
    ],
)
def test_first_line_of_prose_is_not_a_header(tmp_path: Path, first: str) -> None:
    assert rows_of(tmp_path, f"{first}\nb", "bare") == [(f"{first}\n",), ("b",)]


@pytest.mark.parametrize("what", ["pipe", "folder", "device", "link to a pipe"])
def test_special_files_are_rejected_at_once(tmp_path: Path, what: str) -> None:
    path = tmp_path / "x.txt"
    if what == "folder":
        path.mkdir()
    elif what == "device":
        path.symlink_to("/dev/zero")
    else:
        os.mkfifo(path if what == "pipe" else tmp_path / "pipe")
        if what != "pipe":
            path.symlink_to(tmp_path / "pipe")
    with pytest.raises(
        ValueError,
        match=r"^not a regular file \(a folder, a pipe, a device or a socket\); give a regular file",
    ):
        open_file(path)
    with pytest.raises(ValueError, match=r"x\.txt: not a regular file \(a folder, a pipe"):
        list(read_rows(path))
    assert list(label_names(path)) == []


def test_pipe_in_place_of_a_file_does_not_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "x.txt", "a")
    os.mkfifo(tmp_path / "pipe")
    regular = os.stat(tmp_path / "x.txt")
    monkeypatch.setattr(os, "stat", lambda path: regular)
    with open_file(tmp_path / "pipe") as file:
        assert file.read() == b""


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("x.md", ".txt"),
        ("x", ".txt"),
        ("x.gz", ".txt"),
        ("x.txt.1", ".txt"),
        ("x.NDJSON.gz", ".jsonl"),
        ("x.json", ".json"),
        ("x.csv.xz", ".csv"),
        ("x.tsv", ".tsv"),
        ("x.parquet", ".parquet"),
        ("x.jsonl.zip", ".jsonl.zip"),
        ("x.zip", ".txt.zip"),
    ],
)
def test_file_kinds_by_name(name: str, kind: str) -> None:
    assert format_of(name) == kind


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz", ".zst"])
def test_packed_files_are_read(tmp_path: Path, ending: str) -> None:
    content = packed(ending, LINES.encode())
    assert list(read_rows(write(tmp_path / f"x.jsonl{ending}", content))) == ROWS
    bare = write(tmp_path / f"x{ending}", packed(ending, b"a b\nc"))
    assert list(read_rows(bare)) == [{"text": "a b\n"}, {"text": "c"}]
    for cut in (len(content) // 2, len(content) - 3):
        with pytest.raises(ValueError, match=f"cut.jsonl{ending}"):
            list(read_rows(write(tmp_path / f"cut.jsonl{ending}", content[:cut])))


def test_zip_members_are_read_by_their_own_suffix(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.jsonl.zip", "w") as archive:
        members = {"b/c.txt": "last", "a.csv": "text\nfirst", "bare": '{"text": "second"}'}
        hidden = {
            "__MACOSX/._a.csv": b"\0",
            ".x/y.txt": "no",
            "empty/": "",
            "b/c.txt~": "no",
            "#a.csv#": "no",
        }
        for name, content in (members | hidden).items():
            archive.writestr(name, content)
    assert [row["text"] for row in read_rows(tmp_path / "x.jsonl.zip")] == [
        "first",
        "last",
        "second",
    ]


@pytest.mark.parametrize(
    "names",
    [
        ("wiki.test.tokens", "wiki.train.tokens"),
        ("sst2/dev.tsv", "sst2/train.tsv"),
        ("x/train/a", "x/test/a"),
    ],
)
def test_zip_of_several_splits_is_rejected(tmp_path: Path, names: tuple[str, ...]) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in names:
            archive.writestr(name, "a")
    with pytest.raises(
        ValueError,
        match=r"the archive has files of several splits \((test and train|train and valid)\); unpack it",
    ):
        list(read_rows(tmp_path / "x.zip"))
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in (names[1], "README.md", "sst2/LICENSE"):
            archive.writestr(name, "text\na" if name == names[1] and name.endswith("v") else "a")
    assert [row["text"] for row in read_rows(tmp_path / "x.zip")] == ["a"]


def test_parquet_reads_only_needed_columns(tmp_path: Path) -> None:
    table = pyarrow.table(
        {"n": [1, 2], "text": ["a", None], "at": pyarrow.array([2**62, 1], pyarrow.timestamp("us"))}
    )
    parquet.write_table(table, tmp_path / "x.parquet")
    write(tmp_path / "y.parquet.gz", gzip.compress((tmp_path / "x.parquet").read_bytes()))
    for name in ("x.parquet", "y.parquet.gz"):
        assert list(read_rows(tmp_path / name, ["text", "label"])) == [
            {"text": "a"},
            {"text": None},
        ]
    with pytest.raises(
        ValueError, match=r"x.parquet: "
    ):  # a time that no datetime holds, read where none is needed
        list(read_rows(tmp_path / "x.parquet", ["words"]))


def labelled(texts: dict[int, str], separator: str = ",", rows: int = 40) -> str:
    """Returns a file of rows "film I is fine" with labels 0 and 1; some rows have another
    text, unchanged."""
    lines = [f"{texts.get(i, f'film {i} is fine')}{separator}{i % 2}" for i in range(rows)]
    return f"text{separator}label\n" + "\n".join(lines) + "\n"


LITERAL = {
    "at the first": {0: '" film'},
    "at the last": {39: '" film'},
    "three": {5: '"one', 9: '"two', 30: '"three'},
    "alone": {7: '"'},
    "a word in quotes": {8: '"Titanic" is long', 9: 'so is "Heat"'},
    "one before a text in quotes": {3: '"not closed', 12: '"closed"'},
    "doubled, not closed": {3: '"not ""closed', 9: '"nor ""this"" one'},
}


@pytest.mark.parametrize("separator", [",", "\t"])
@pytest.mark.parametrize("texts", LITERAL.values(), ids=LITERAL)
def test_unclosed_quote_swallows_no_row(
    tmp_path: Path, texts: dict[int, str], separator: str
) -> None:
    rows = rows_of(tmp_path, labelled(texts, separator), "x.csv" if separator == "," else "x.tsv")
    expected = {i: text.strip('"') if text == '"closed"' else text for i, text in texts.items()}
    assert rows == [(expected.get(i, f"film {i} is fine"), str(i % 2)) for i in range(40)]


@pytest.mark.parametrize(
    ("first", "last", "rows", "label"),
    [
        (5, 6, 40, str),
        (5, 30, 40, str),
        (0, 1, 8, ["good", "bad"].__getitem__),
        (2, 1200, 2500, lambda i: i / 7),
    ],
)
@pytest.mark.parametrize("text_first", [True, False])
def test_quotes_across_rows_are_rejected_in_csv_and_literal_in_tsv(
    tmp_path: Path, first: int, last: int, rows: int, label: Any, text_first: bool
) -> None:
    texts = {first: '"I like it.', last: 'It was good."'}
    found = [(texts.get(i, f"film {i}"), str(label(i % 2))) for i in range(rows)]
    names = ("text", "label") if text_first else ("label", "text")
    pairs = [names, *(pair if text_first else pair[::-1] for pair in found)]
    assert rows_of(tmp_path, "\n".join(map("\t".join, pairs)), "x.tsv") == pairs[1:]
    with pytest.raises(ValueError, match=rf"x.csv: line {first + 2} begins a field in quotes"):
        rows_of(tmp_path, "\n".join(map(",".join, pairs)))


def swallowed(kind: str, first: int, last: int, rows: int = 60) -> str:
    """Returns a file in which one text starts with a quote and a later one ends with one."""
    rng = random.Random(f"{kind}{first}")
    lines = []
    for i in range(rows):
        text = {first: '"Hello there', last: 'bye now"'}.get(i, f"sentence number {i}")
        label = "rare" if i == (first + last) // 2 else rng.choice(["pos", "neg"])
        columns = {
            "a rare label": f"{text},{label}",
            "a label ahead": f"{label},{text}",
            "ids": f"doc-{i:03d}x,{text}",
            "hashes": f"{rng.getrandbits(64):016x},{text}",
            "numbers": f"{text},{i}",
            "users": f"{'once' if i == first + 1 else f'u{rng.randrange(9)}'},{text}",
            "answers": f"what is {i} and {i + 1}?,{text}",
            "ids and answers": f"/a/{i}.htm,what is it?,{text}",
        }
        lines.append(columns[kind])
    return "\n".join([",".join(f"column {i}" for i in range(1 + lines[0].count(","))), *lines, ""])


KINDS = (
    "a rare label",
    "a label ahead",
    "ids",
    "hashes",
    "numbers",
    "users",
    "answers",
    "ids and answers",
)


@pytest.mark.parametrize(("first", "last"), [(10, 40), (0, 6), (51, 59)])
@pytest.mark.parametrize("kind", KINDS)
def test_swallowed_rows_are_recognized_by_most_columns(
    tmp_path: Path, kind: str, first: int, last: int
) -> None:
    number = last - first + 1
    with pytest.raises(
        ValueError, match=rf"x.csv: line {first + 2} begins a field in quotes of {number} lines"
    ):
        rows_of(tmp_path, swallowed(kind, first, last))


PROSE = "a film of the old days was not so good she said that it is time 3 12 1,000 2,500 Mr. 1984 doc-7 I"


def paragraphs(rng: random.Random, most: int) -> str:
    """Returns prose of some lines, with commas and quotes."""
    ends = [" ", " ", " ", ", ", ", ", "; ", ". ", ' "x" ', '," ']
    lines = [
        "".join(
            word + rng.choice(ends) for word in rng.choices(PROSE.split(), k=rng.randrange(2, 14))
        )
        for _ in range(rng.randrange(1, most))
    ]
    return "\n".join(line.strip() + rng.choice([".", "!", ",", "", "\n"]) for line in lines)


@pytest.mark.parametrize(
    "row",
    [
        lambda rng, i, text: (text(), rng.choice(["pos", "neg"])),
        lambda rng, i, text: (rng.choice("01"), text()),
        lambda rng, i, text: (f"doc-{i:03d}", text()),
        lambda rng, i, text: (text(), str(i)),
        lambda rng, i, text: (text(), rng.choice(["pos", "neg"]), f"{rng.random():.3f}"),
        lambda rng, i, text: (f"u{rng.randrange(9)}", text(), text(), rng.choice("01")),
        lambda rng, i, text: (text(), rng.choice(["", "", "", "see below"])),
        lambda rng, i, text: (text(), text()),
        lambda rng, i, text: (text(),),
    ],
)
def test_quoted_prose_of_several_lines_is_never_rejected(tmp_path: Path, row: Any) -> None:
    for seed in range(40):
        rng = random.Random(seed)
        most, num = rng.choice([2, 5, 12, 40]), rng.choice([2, 5, 30, 120])
        rows = [row(rng, i, lambda: paragraphs(rng, most)) for i in range(num)]  # noqa: B023
        with (tmp_path / "x.csv").open("w", newline="") as file:
            writer = csv.writer(file, quoting=rng.choice([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]))
            writer.writerows([[f"column {i}" for i in range(len(rows[0]))], *rows])
        assert [tuple(found.values()) for found in read_rows(tmp_path / "x.csv")] == rows, seed


@pytest.mark.parametrize(
    "text",
    [
        "There were\n3, not 4\n5, or so",
        "It cost\n1,000 dollars\n2,500 in all",
        "Of all\n7, it said\n1,000 were",
    ],
)
def test_numbers_in_prose_are_not_ids(tmp_path: Path, text: str) -> None:
    rows = [*((str(i), f"film {i} is fine") for i in range(20)), ("20", text)]
    content = "id,text\n" + "".join(f'{i},"{text}"\n' for i, text in rows)
    assert rows_of(tmp_path, content) == rows


@pytest.mark.parametrize("name", ["x.tsv", "x.csv"])
@pytest.mark.parametrize("text_first", [True, False])
def test_quoted_text_of_several_lines_is_one_row(
    tmp_path: Path, name: str, text_first: bool
) -> None:
    """In the form that pandas writes, next to quotes that are never closed."""
    separator = "\t" if name == "x.tsv" else ","
    texts = [
        f"first line of {i}\nsecond line\n\nlast one." if i % 3 else f"a line of {i}"
        for i in range(60)
    ]
    rows = [("text", "label"), *((text, "ab"[i % 2]) for i, text in enumerate(texts))]
    rows = rows if text_first else [row[::-1] for row in rows]
    with (tmp_path / name).open("w", newline="") as file:
        csv.writer(file, delimiter=separator).writerows(rows)
    with (tmp_path / name).open("a", newline="") as file:
        stray = ('"I like it.', "a") if text_first else ("a", '"I like it.')
        file.write(separator.join(stray) + "\n")
    assert [tuple(row.values()) for row in read_rows(tmp_path / name)] == [*rows[1:], stray]


@pytest.mark.parametrize(
    ("first", "label"),
    [
        ("Note 4,5", "5"),
        ("Score: 8,1", "1"),
        ("On May 3,2019", "2019"),
        ("Preis 12,50 und mehr", "3"),
        ("At 1,000 feet", "2"),
    ],
)
def test_numbers_with_a_comma_are_not_fields(tmp_path: Path, first: str, label: str) -> None:
    rows = [(f"ein Film {i}, der endet", label if i % 2 else "1") for i in range(200)]
    rows[::20] = [(f"{first}\nTolles Hotel gern wieder", label)] * 10
    with (tmp_path / "x.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    assert [tuple(row.values()) for row in read_rows(tmp_path / "x.csv")] == rows


def test_csv_writer_output_round_trips(tmp_path: Path) -> None:
    rng = random.Random(0)
    letters = ["a", "b", " ", "'", '"', '""', ",", "\t", ";", "é", "\n", "\r\n", "1", "0", ".", "#"]
    for case in range(200):
        rows = [
            (
                "".join(rng.choices(letters, k=rng.randrange(12))),
                rng.choice(["good", "bad"]),
                str(i),
            )
            for i in range(rng.randrange(1, 30))
        ]
        for name, dialect in (("x.csv", csv.excel), ("x.tsv", csv.excel_tab)):
            with (tmp_path / name).open("w", newline="", encoding="utf-8") as file:
                rows = [
                    (text if name == "x.csv" else text.replace("\t", " "), *more)
                    for text, *more in rows
                ]
                writer = csv.writer(
                    file, dialect, quoting=rng.choice([csv.QUOTE_ALL, csv.QUOTE_MINIMAL])
                )
                writer.writerows([("text", "label", "n"), *rows])
            assert [tuple(row.values()) for row in read_rows(tmp_path / name)] == rows, (case, name)
    long = "\n".join(["word, " * 20_000] * 3)  # longer than what the csv library takes by itself
    with (tmp_path / "long.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), (long, "1"), ("b", "0")])
    assert [row["text"] for row in read_rows(tmp_path / "long.csv")] == [long, "b"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "text,label\na,1\nb, c,1\n",
            r"\.csv: line 3 has 3 fields, but the heading has 2; put a text",
        ),
        ("text,label\n\na\n", "line 3 has 1 fields, but the heading has 2"),
        ('text,label\n"Well", he said, and went,1\n', "line 2 has 4 fields"),
        ("text,label,text\n", "heading has 'text' twice"),
        ("text\0,label\n", "NUL byte"),
    ],
)
def test_inconsistent_tables_are_rejected(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rows_of(tmp_path, content)


def test_files_named_by_a_source(tmp_path: Path) -> None:
    shown = ["a.txt", "a/b.txt", "a/c.jsonl", "b.md", "x[1].txt"]
    passed_over = [
        ".a.txt",
        ".ipynb_checkpoints/a.txt",
        "a/.hidden/b.txt",
        "a/._c.jsonl",
        "README.md",
        "a/LICENSE",
    ]
    passed_over += ["a.txt~", "a/#b.txt#", "a/b.txt.~1~", "a/#old#/b.txt"]
    for name in shown + passed_over:
        write(tmp_path / name, "x")
    os.symlink(tmp_path, tmp_path / "a" / "again")
    os.symlink(tmp_path / "a", tmp_path / "z")
    os.symlink("a.txt", tmp_path / "link.txt")  # another file, by its name
    found = {
        str(tmp_path): ["a.txt", "a/b.txt", "a/c.jsonl", "b.md", "link.txt", "x[1].txt"],
        f"{tmp_path}/**/*.txt": ["a.txt", "a/b.txt", "link.txt", "x[1].txt"],
        f"{tmp_path}/a*": ["a.txt"],
        f"{tmp_path}/a.txt~": ["a.txt~"],  # which is refused by its ending
        f"{tmp_path}/a/[b#]*": ["a/b.txt"],
        f"{tmp_path}/**": [
            "README.md",
            "a.txt",
            "a/LICENSE",
            "a/b.txt",
            "a/c.jsonl",
            "b.md",
            "link.txt",
            "x[1].txt",
        ],
        f"{tmp_path}/*/**/b.*": ["a/again/b.md", "a/b.txt"],
        f"{tmp_path}/x[1].txt": ["x[1].txt"],
        f"{tmp_path}/.a.txt": [".a.txt"],
        f"{tmp_path}/none*": [],
        f"{tmp_path}/none": [],
    }
    for source, names in found.items():
        assert sorted(str(file.relative_to(tmp_path)) for file in find_files(source)) == names, (
            source
        )


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        ("train.txt valid.txt test.txt", {"train": 1, "valid": 1, "test": 1}),
        (
            "data/train-00000-of-00002.parquet data/train-00001-of-00002.parquet dev.csv",
            {"train": 2, "valid": 1},
        ),
        (
            "training/a.txt training/test.txt eval/x.txt",
            {"train": 2, "test": 1},
        ),  # a folder's name is first
        ("my_Train.txt x.validation.txt", {"train": 1, "valid": 1}),
        ("a.txt testament.txt trained.txt", {"train": 3}),
    ],
)
def test_splits_of_a_folder_by_names(tmp_path: Path, names: str, splits: dict[str, int]) -> None:
    for name in names.split():
        write(tmp_path / name, "x")
    assert {split: len(files) for split, files in find_splits(str(tmp_path)).items()} == splits


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            "train.txt test.txt more.txt",
            "more.txt has no split in its name, unlike the other files",
        ),
        (
            "train_dev.txt test.txt",
            r"train_dev.txt has several splits in its name \(train and valid\)",
        ),
        ("README.md .train.txt", "the folder has no data files"),
    ],
)
def test_folders_with_ambiguous_splits_are_rejected(
    tmp_path: Path, names: str, message: str
) -> None:
    for name in names.split():
        write(tmp_path / name, "x")
    with pytest.raises(ValueError, match=message):
        find_splits(str(tmp_path))


def test_unreadable_file_is_named_before_its_split(tmp_path: Path) -> None:
    for name in ("train.txt", "picture.png"):
        write(tmp_path / name, "x")
    with pytest.raises(ValueError, match=r"files that end with \.png are not read"):
        find_splits(str(tmp_path))


def test_folder_with_several_datasets_is_rejected(tmp_path: Path) -> None:
    write(tmp_path / "a" / "train.txt", "x")
    card = "---\nconfigs:\n- config_name: one\n  data_files: a/*\n- config_name: two\n---\n# A\n"
    write(tmp_path / "README.md", card)
    with pytest.raises(ValueError, match=r"several datasets \(one, two\); give the folder of one"):
        find_splits(str(tmp_path))
    write(tmp_path / "README.md", card.replace("two", "one"))
    assert find_splits(str(tmp_path)) == {"train": [tmp_path / "a" / "train.txt"]}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "x.xml",
            "<a>b</a>",
            "files that end with .xml are not read; rename it to .txt if it is plain text",
        ),
        ("x.tar.gz", gzip.compress(b"x", mtime=0), "files that end with .tar are not read"),
        ("x.pdf", "%PDF", "end with .pdf"),
        (
            "bare",
            LINES,
            "the name has no ending, and the first line is not prose "
            "..{'text|the name has no ending",
        ),
        ("x.00001", "id\ttext\n", "first line is not prose"),
        ("bare.gz", gzip.compress(b"id,text\n1,a\n", mtime=0), "first line is not prose"),
        ("x.csv-old", "id,sentence\n1,a\n", "files that end with .csv-old are not read"),
        ("x.txt~", "a\n", "files that end with .txt~ are not read"),
        ("x.txt.bak", "a\n", "files that end with .bak are not read"),
        ("x.jsonl (1)", LINES, r"files that end with .jsonl \(1\) are not read"),
        ("x.csv-00001-of-00002", "1,a\n", "files that end with .csv-00001-of-00002 are not read"),
        ("x.tsv.1", "1\ta\n", "files that end with .1 are not read"),
        ("x.csv.gz.001", "1,a\n", "files that end with .001 are not read"),
        ("bare", "id,sentence,label\n1,a,0\n", "first line is not prose .'id,sentence,label'"),
        ("bare", '"Question1";"Question2"\n', "first line is not prose"),
        ("bare", "premise | hypothesis\n", "first line is not prose"),
        ("bare", "Sentence\r\na\r\n", "first line is not prose .'Sentence'"),
        ("pages", '<?xml version="1.0"?>', "first line is not prose"),
        ("x.jsonl", LINES + "[1]", "after row 3: a row is list"),
        (
            "x.jsonl",
            '{"text": "a"}\n{"text": "b", "n": ["\\ud83d"]}',
            "after row 1: .*surrogates not allowed",
        ),
        ("x.json", '[{"text": "\\udc00\\ud800"}]', "surrogates not allowed"),
        ("x.ndjson", '{"text": "a\\u0000"}', "a string contains a NUL character"),
        ("x.jsonl", '{"text": ' + "[" * 100_000, "recursion"),
        ("x.jsonl", '{"text": "a", "n": ' + "9" * 5000 + "}", "5000 digits"),
        ("x.json", '["a"]', r"a row is str \('a'\), but must be an object"),
        ("x.json", '{"a\n": 1}', r"invalid JSON \(Invalid control character at character 3"),
        ("x.json", '{\n"text":', r"invalid JSON \(Expecting value"),
        ("x.txt", "é".encode("latin1"), "invalid UTF-8 .*0xe9.*; convert the file to UTF-8"),
    ],
)
def test_unknown_content_is_rejected(tmp_path: Path, name: str, content: Any, message: str) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=message) as error:
        list(read_rows(path))
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)
