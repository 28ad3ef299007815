"""Damaged data files: each must be read, or refused with an error of one line.

    .venv/bin/python experiments/damaged_files.py              seeds 0 to 5000, some minutes
    .venv/bin/python experiments/damaged_files.py --first 17 --last 18

Each seed makes one file: a valid file in some format, compressed or not, with up to three damages.
A seed fails if an error is not a ValueError of one line, if a text that was read contains a NUL
character or half a surrogate pair, or if reading takes 10 seconds. The exit status is 1 if a seed
fails; the program ends if a library blocks forever. `tests/unit/data/test_damaged_files.py` runs
some seeds.
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

TIMEOUT_S = 10  # for one reader
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
    """Writes the file for a seed into `folder` and returns its path."""
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
    """Returns rows with two texts and a label."""
    return [
        {
            "text": " ".join(rng.choices(WORDS, k=rng.randrange(1, 9))),
            "label": rng.randrange(2),
            "text2": "a",
        }
        for _ in range(rng.choice([1, 25, 60]))
    ]


def table(rng: random.Random, separator: str) -> bytes:
    """Returns a .csv or .tsv file."""
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, ["text", "label", "text2"], delimiter=separator)
    writer.writeheader()
    writer.writerows(rows(rng))
    return file.getvalue().encode()


def columns(rng: random.Random) -> bytes:
    """Returns a .parquet file."""
    sink = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows(rng)), sink)
    return sink.getvalue()


def questions(rng: random.Random) -> bytes:
    """Returns a .json file in SQuAD's form: 12 paragraphs with three questions each."""
    paragraphs = []
    for paragraph in range(12):
        entries = []
        for i in range(3):
            entries.append(
                {
                    "id": f"{paragraph} {i}",
                    "question": "which?",
                    "answers": [{"text": "film", "answer_start": 4}],
                }
            )
        paragraphs.append({"context": f"the film {paragraph}", "qas": entries})
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
    """Returns a .zip with two files and a hidden one."""
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(f"a{kind}", content)
        file.writestr(f"folder/b{kind}", content)
        file.writestr("__MACOSX/._a", b"\0\xff")
    return sink.getvalue()


def encrypted(content: bytes, kind: str) -> bytes:
    """Returns an archive whose flags mark its files as encrypted."""
    data = bytearray(archive(content, kind))
    for signature, flags_offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        position = data.find(signature)
        while position >= 0:
            data[position + flags_offset] |= 1
            position = data.find(signature, position + 1)
    return bytes(data)


PACK: dict[str, Callable[[bytes, str], bytes]] = {
    ".gz": lambda content, _: gzip.compress(content),
    ".bz2": lambda content, _: bz2.compress(content),
    ".xz": lambda content, _: lzma.compress(content),
    ".zst": lambda content, _: pyarrow.compress(content, codec="zstd", asbytes=True),
    ".zip": archive,
    ".ZIP": encrypted,
}
INSERTIONS = (  # by which a file may be damaged
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
    """Returns the content cut off, without a part, with a part twice, or with other bytes."""
    start, stop = sorted(rng.randrange(len(content) + 1) for _ in range(2))
    kind = rng.randrange(5)
    if kind == 0:
        return content[:start]
    if kind == 1:
        return content[:start] + content[stop:]
    if kind == 2:
        return content[:stop] + content[start:]
    if kind == 3:
        return content[:start] + rng.choice(INSERTIONS) + content[start:]
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
    """Reads a file with every reader.

    Args:
        path: The file, or another data source.

    Returns:
        "read" or the error, by reader.

    Raises:
        AssertionError: A text is not valid Unicode, or an error is not one short printable line.
        TimeoutError: A reader is too slow.
    """
    results = {}
    for name, reader in READERS.items():
        signal.alarm(TIMEOUT_S)
        try:
            for texts in reader(str(path)) or ():
                for text in texts:
                    assert "\0" not in text, (path, name)
                    text.encode()
            results[name] = "read"
        except UnicodeEncodeError:
            raise AssertionError(f"{path}: {name} returns half a surrogate pair") from None
        except ValueError as error:
            message = str(error)
            results[name] = message
            is_short = len(message) < 2000
            assert message.isprintable() and is_short, (path, name, message[:2000])
        finally:
            signal.alarm(0)
    return results


def _raise_timeout(*_: Any) -> None:
    raise TimeoutError


def run(first: int, last: int, folder: Path) -> dict[str, int]:
    """Makes and reads the files for seeds `first` to `last`, and counts by reader those read."""
    previous = signal.signal(signal.SIGALRM, _raise_timeout)
    counts = dict.fromkeys(READERS, 0)
    try:
        for seed in range(first, last):
            path = make(seed, folder)
            for name, result in read(path).items():
                counts[name] += result == "read"
            path.unlink()
    finally:
        signal.signal(signal.SIGALRM, previous)
    return counts


def _exit_blocked(seed: int) -> None:
    """Ends the program if a library blocks in a call that no signal ends (opening a pipe)."""
    print(f"seed {seed}: a library blocks forever", flush=True)
    faulthandler.dump_traceback()
    os._exit(1)


def main() -> None:
    """Runs the seeds and prints those that fail."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--last", type=int, default=5000)
    args = parser.parse_args()
    num_failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(args.first, args.last):
            watchdog = threading.Timer(TIMEOUT_S * (len(READERS) + 1), _exit_blocked, [seed])
            watchdog.start()
            try:
                run(seed, seed + 1, Path(folder))
            except Exception as error:
                num_failed += 1
                print(f"seed {seed}: {type(error).__name__}: {str(error)[:300]}", flush=True)
            finally:
                watchdog.cancel()
    print(f"{args.last - args.first} files, {num_failed} failed")
    sys.exit(num_failed > 0)


if __name__ == "__main__":
    main()
