"""Damaged files of text, rows and questions: each is read, or refused with one line.

    .venv/bin/python experiments/damaged_files.py              seeds 0 to 5000, some minutes; status 1 where one is off
    .venv/bin/python experiments/damaged_files.py --first 17 --last 18

A seed makes one file: a whole one of some kind, packed or not, with up to three damages. It is off where something
other than a ValueError of one line is raised, where a text that was read holds a NUL or half of a character, or where
it takes 10 seconds; where a library waits for ever, the program ends. `tests/unit/data/test_damaged_files.py` runs some seeds.
"""

import argparse
import bz2
import csv
import faulthandler
import gzip
import io
import json
import lzma
import os
import random
import signal
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from moe_dist.data.text.corpus import check_text, open_text
from moe_dist.data.text.sentences import check_sentences, open_sentences
from moe_dist.data.text.squad import check_questions, open_questions

SECONDS = 10
WORDS = (
    "the",
    "film",
    "is",
    "fine,",
    '"',
    '""',
    "d\u00e9j\u00e0",
    "\u0928\u092e\u0938\u094d\u0924\u0947",
    "\t",
    "1",
    "",
    "\u2028",
)


def make(seed: int, folder: Path) -> Path:
    """Writes the file of a seed into `folder` and returns its path."""
    rng = random.Random(seed)
    kind = rng.choice(list(KINDS))
    content = KINDS[kind](rng)
    if rng.random() < 0.5:
        content = damage(rng, content)
    packing = rng.choice(["", "", *PACK])
    if packing:
        content = PACK[packing](content, kind)
    for _ in range(rng.randrange(3)):
        content = damage(rng, content)
    if rng.random() < 0.1:
        kind = rng.choice([*KINDS, "", ".xml", ".001"])
    path = folder / f"{seed}{kind}{packing}"
    if rng.random() < 0.02:
        os.mkfifo(path)
    else:
        path.write_bytes(content)
    return path


def rows(rng: random.Random) -> list[dict[str, Any]]:
    return [
        {
            "text": " ".join(rng.choices(WORDS, k=rng.randrange(1, 9))),
            "label": rng.randrange(2),
            "text2": "a",
        }
        for _ in range(rng.choice([1, 25, 60]))
    ]


def table(rng: random.Random, separator: str) -> bytes:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, ["text", "label", "text2"], delimiter=separator)
    writer.writeheader()
    writer.writerows(rows(rng))
    return file.getvalue().encode()


def columns(rng: random.Random) -> bytes:
    sink = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows(rng)), sink)
    return sink.getvalue()


def questions(rng: random.Random) -> bytes:
    asked = [
        {"id": str(i), "question": "which?", "answers": [{"text": "film", "answer_start": 4}]}
        for i in range(3)
    ]
    paragraphs = [
        {"context": f"the film {i}", "qas": [dict(q, id=f"{i} {q['id']}") for q in asked]}
        for i in range(12)
    ]
    return json.dumps({"data": [{"title": "a", "paragraphs": paragraphs}]}).encode()


KINDS: dict[str, Callable[[random.Random], bytes]] = {
    ".txt": lambda rng: "\n".join(row["text"] for row in rows(rng)).encode(),
    ".jsonl": lambda rng: "\n".join(
        json.dumps(row, ensure_ascii=rng.random() < 0.5) for row in rows(rng)
    ).encode(),
    ".json": lambda rng: json.dumps(rows(rng)).encode() if rng.random() < 0.5 else questions(rng),
    ".csv": lambda rng: table(rng, ","),
    ".tsv": lambda rng: table(rng, "\t"),
    ".parquet": columns,
}


def archive(content: bytes, kind: str) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(f"a{kind}", content)
        file.writestr(f"folder/b{kind}", content)
        file.writestr("__MACOSX/._a", b"\0\xff")
    return sink.getvalue()


def encrypted(content: bytes, kind: str) -> bytes:
    """An archive whose flags say so."""
    whole = bytearray(archive(content, kind))
    for mark, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = whole.find(mark)
        while at >= 0:
            whole[at + flags] |= 1
            at = whole.find(mark, at + 1)
    return bytes(whole)


PACK: dict[str, Callable[[bytes, str], bytes]] = {
    ".gz": lambda content, _: gzip.compress(content),
    ".bz2": lambda content, _: bz2.compress(content),
    ".xz": lambda content, _: lzma.compress(content),
    ".zst": lambda content, _: pyarrow.compress(content, codec="zstd", asbytes=True),
    ".zip": archive,
    ".ZIP": encrypted,
}
BAD = (
    b"\0",
    b"\xff\xfe",
    b"\xed\xa0\x80",
    b'"',
    b'"\n"',
    b"\r",
    b"{",
    b"[" * 100_000,
    b'{"text": ' * 100_000,
    b"1" * 5000,
    b'{"text": "\\ud800"}\n',
    b'{"text": "\\u0000"}\n',
    b'{"text": 1}\n',
    b'{"text": NaN}\n',
    b"null\n",
    b"text,text\n",
    b"a" * 200_000,
    b"\xef\xbb\xbf",
    b"PK\x03\x04",
    b"\x1f\x8b",
    b"PAR1",
)


def damage(rng: random.Random, content: bytes) -> bytes:
    at, other = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    what = rng.randrange(5)
    if what == 0:
        return content[:at]
    if what == 1:
        return content[:at] + content[other:]
    if what == 2:
        return content[:other] + content[at:]
    if what == 3:
        return content[:at] + rng.choice(BAD) + content[at:]
    flipped = bytearray(content)
    for _ in range(rng.randrange(1, 4)):
        if flipped:
            flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
    return bytes(flipped)


READERS: dict[str, Callable[[str], Any]] = {
    "check_text": check_text,
    "text": lambda source: [list(lines) for lines in open_text(source, False).values()],
    "streamed": lambda source: [list(lines) for lines in open_text(source, True).values()],
    "check_sentences": check_sentences,
    "sentences": lambda source: [
        [s.text for s in some] for some in open_sentences(source)[1].values()
    ],
    "check_questions": check_questions,
    "questions": lambda source: [
        [q.context for q in some] for some in open_questions(source).values()
    ],
}


def read(path: Path) -> dict[str, str]:
    """Returns "read" or why not, by reader. Raises AssertionError, TimeoutError or any other for what is off."""
    told = {}
    for name, reader in READERS.items():
        signal.alarm(SECONDS)
        try:
            for text in (text for texts in reader(str(path)) or () for text in texts):
                assert "\0" not in text, (path, name)
                text.encode()
            told[name] = "read"
        except UnicodeEncodeError:
            raise AssertionError(f"{path}: {name} gives half of a character") from None
        except ValueError as error:
            told[name] = str(error)
            assert told[name].isprintable() and len(told[name]) < 2000, (
                path,
                name,
                told[name][:2000],
            )
        finally:
            signal.alarm(0)
    return told


def _too_long(*_: Any) -> None:
    raise TimeoutError


def run(first: int, last: int, folder: Path) -> dict[str, int]:
    """Makes and reads the files of these seeds. Returns how many each reader has read."""
    before = signal.signal(signal.SIGALRM, _too_long)
    counts = dict.fromkeys(READERS, 0)
    try:
        for seed in range(first, last):
            path = make(seed, folder)
            for name, told in read(path).items():
                counts[name] += told == "read"
            path.unlink()
    finally:
        signal.signal(signal.SIGALRM, before)
    return counts


def _stuck(seed: int) -> None:
    """Ends the program where a library waits in a call that no signal ends, such as the opening of a pipe."""
    print(f"seed {seed}: waits in a library for ever", flush=True)
    faulthandler.dump_traceback()
    os._exit(1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--last", type=int, default=5000)
    args = parser.parse_args()
    off = 0
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(args.first, args.last):
            watch = threading.Timer(SECONDS * (len(READERS) + 1), _stuck, [seed])
            watch.start()
            try:
                run(seed, seed + 1, Path(folder))
            except Exception as error:
                off += 1
                print(f"seed {seed}: {type(error).__name__}: {str(error)[:300]}", flush=True)
            finally:
                watch.cancel()
    print(f"{args.last - args.first} files, {off} off")
    sys.exit(off > 0)


if __name__ == "__main__":
    main()
