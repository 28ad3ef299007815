"""Local files of text and of rows: which ones a source names, and the rows of each by the ending of its own name.

    .txt .text .md .tokens       plain text: a row {"text": line} for each line
    .jsonl .ndjson .json         an object a line; .json may also be one list of objects
    .csv .tsv                    a heading and rows; see `_records` for quotes
    .parquet                     rows

Each may be packed as .gz, .bz2, .xz, .zst or .zip. A name without an ending is plain text if its first line looks like
it. Everything else is refused by name. Text is UTF-8.
"""

import bz2
import csv
import glob
import gzip
import io
import json
import lzma
import os
import re
import stat
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import IO, Any

Row = dict[str, Any]

LONGEST = 2**28  # characters of a line; some corpora are a single line of 10^8
NEAR = 1000  # rows before and after a doubtful one that it is compared with
csv.field_size_limit(LONGEST)  # the library's own is 131,072, which documents exceed

SPLIT_NAMES = {
    "train": "train", "training": "train",
    "valid": "valid", "validation": "valid", "val": "valid", "dev": "valid",
    "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
SPLIT_NAME = re.compile(rf"(?<![^-._ 0-9])({'|'.join(SPLIT_NAMES)})(?![^-._ 0-9])", re.IGNORECASE)
ENDING = re.compile(r"\.[a-zA-Z]\w*")  # of a name; one such as .00001 or .en-00001-of-00100 says nothing
# found in folders of data without being data
NO_DATA = re.compile(r"(readme|licen[cs]e)(\..*)?|(config|dataset_infos?|dataset_dict)\.json", re.IGNORECASE)
# a first line that is no prose: JSON, markup, a table
NO_PROSE = re.compile(r"\s*(\{|\[\s*[\[{\"]|<[?!]\w|<(doc|html)\b)|.*\t|((.*,)?text(,.*)?$)", re.IGNORECASE)


def find_files(source: str) -> list[Path]:
    """Returns the files of a file, a glob or a folder, sorted by name; none where nothing is called so.

    Entries whose name begins with a dot are passed over in folders and by wildcards, as are README and LICENSE in
    folders. A folder is entered once, however many links lead to it.
    """
    if os.path.isdir(source):
        found = (Path(here, name) for here, names in _walk(source) for name in names if not NO_DATA.fullmatch(name))
        return sorted(found, key=str)
    # A path that exists is taken literally, so that names with [ or * need no escaping.
    names = [source] if os.path.lexists(source) else _matches(source)
    first_of: dict[tuple[str, str], Path] = {}
    for name in names:
        if not os.path.isdir(name):
            first_of.setdefault((os.path.realpath(os.path.dirname(name)), os.path.basename(name)), Path(name))
    return list(first_of.values())


def find_splits(source: str) -> dict[str, list[Path]]:
    """Returns the files of each of "train", "valid" and "test" that `source` has.

    A folder is split by the names of its folders or else of its files, such as `train/`, `train-00000.jsonl` or
    `my_test.txt`. Where no name says anything, and for a file or a glob, all files are "train".

    Raises:
        ValueError: A folder without files, with several datasets, or with a file whose split is not clear.
    """
    files = find_files(source)
    if not os.path.isdir(source):
        return {"train": files}
    if not files:
        raise ValueError("the folder has no data files")
    _check_card(Path(source, "README.md"))
    relative = [file.relative_to(source) for file in files]
    for names in ([path.parent.parts for path in relative], [(path.name,) for path in relative]):
        found = [{SPLIT_NAMES[word.lower()] for name in parts for word in SPLIT_NAME.findall(name)} for parts in names]
        if any(found):
            splits: dict[str, list[Path]] = {}
            for path, file, of in zip(relative, files, found, strict=True):
                if len(of) != 1:
                    several = f"is of {' and '.join(sorted(of))}" if of else "is of no split, unlike the others"
                    raise ValueError(f"{path} {several}, by its name: rename it or take it away")
                splits.setdefault(of.pop(), []).append(file)
            return splits
    return {"train": files}


def check_ending(name: str) -> None:
    """Raises ValueError for a name with an ending that is not read."""
    stem, ending = os.path.splitext(name)
    if ending.lower() in UNPACK:
        return check_ending(stem)
    if ENDING.fullmatch(ending) and ending.lower() not in KNOWN:
        raise ValueError(
            f"files that end with {ending} are not read: name it .txt where it is plain text, or convert it to one "
            f"of {' '.join(KNOWN)} (or these with {' '.join(UNPACK)})"
        )


def read_rows(path: Path, columns: Sequence[str] | None = None) -> Iterator[Row]:
    """Yields the rows of a file one by one, in memory that does not grow with it (but for a .json list).

    Args:
        path: Its ending tells how it is read.
        columns: Those that are needed; of other columns parquet reads none, if it has one of these.

    Raises:
        ValueError: The file cannot be read or is damaged, whatever the reason. The message begins with `path` and has
            the number of the row before.
    """
    number = 0
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("a pipe, a device or a socket: give a regular file")
        with open(path, "rb") as file:
            for row in _rows(path.name, file, columns):
                yield row
                number += 1
    except Exception as error:  # each library has kinds of its own for what is damaged
        has_line = str(error).startswith("line ")  # which says more than the rows before it, of a table read ahead
        where = f", behind row {number}" if number and not has_line else ""
        raise ValueError(f"{path}{where}: {_reason(error)}") from error


def shown(text: str, most: int = 500) -> str:
    """Returns what a file holds for use in a message: on one line, not long, and what cannot be printed escaped."""
    line = " ".join(text[: most + 1].split())
    printable = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in line)
    return printable if len(text) <= most else f"{printable[:most]}..."


def columns_of(row: Row) -> str:
    """Returns the names of a row's columns and the types of their values for use in a message."""
    return shown(", ".join(f"{name!r} ({type(value).__name__})" for name, value in row.items()))


def _reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"no JSON ({error.msg} at character {error.pos})"
    if isinstance(error, UnicodeDecodeError):
        return f"no UTF-8 ({error.reason}, byte 0x{error.object[error.start]:02x}): give UTF-8"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return shown(text) or type(error).__name__


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "__"))


def _walk(folder: str) -> Iterator[tuple[str, list[str]]]:
    """Yields the folder and those below, each once and with the names of its files. None is hidden."""

    def refuse(error: OSError) -> None:
        raise ValueError(f"{error.filename}: {error.strerror}") from error

    seen = set()
    for here, folders, files in os.walk(folder, followlinks=True, onerror=refuse):
        where = os.stat(here)
        if (where.st_dev, where.st_ino) in seen:
            folders.clear()
            continue
        seen.add((where.st_dev, where.st_ino))
        folders[:] = sorted(name for name in folders if not _is_hidden(name))
        yield here, [name for name in files if not _is_hidden(name)]


def _matches(pattern: str) -> list[str]:
    """As `glob.glob(pattern, recursive=True)`, which follows every link and so never ends where two lead upwards."""
    head, *rest = re.split(r"(?:^|(?<=/))\*\*(?:/|$)", pattern)
    names = glob.glob(head) if head else ["."]
    for part in rest:
        folders = [here for name in names for here, _ in _walk(name)]
        names = [name for here in folders for name in glob.glob(os.path.join(glob.escape(here), part or "*"))]
    return sorted(map(os.path.normpath, names))


def _check_card(card: Path) -> None:
    """The head of the README of a dataset of the Hub lists its configurations."""
    if card.is_file():
        head = card.read_bytes()[: 2**20].decode(errors="replace").split("\n---")[0]
        names = re.findall(r"^\s*-?\s*config_name:\s*(\S+)", head, re.MULTILINE)
        if head.startswith("---") and len(set(names)) > 1:
            raise ValueError(f"the folder has several datasets, {', '.join(names[:5])}: give the folder of one of them")


def _rows(name: str, file: IO[bytes], columns: Sequence[str] | None) -> Iterator[Row]:
    check_ending(name)
    stem, ending = os.path.splitext(name)
    ending = ending.lower()
    if ending == ".zip":
        yield from _members(stem, file, columns)
    elif ending in UNPACK:
        yield from _rows(stem, UNPACK[ending](file), columns)
    elif ending == ".parquet":
        yield from _parquet(file, columns)
    elif ending in READERS:
        yield from READERS[ending](file)
    else:
        yield from _without_ending(file)


def _members(stem: str, file: IO[bytes], columns: Sequence[str] | None) -> Iterator[Row]:
    with zipfile.ZipFile(file) as archive:
        for member in sorted(archive.namelist()):
            *folders, name = member.split("/")
            if name and not any(map(_is_hidden, [*folders, name])):
                with archive.open(member) as part:
                    yield from _rows(name if "." in name else stem, part, columns)


def _unpack_zstandard(file: IO[bytes]) -> IO[bytes]:
    import pyarrow

    return pyarrow.input_stream(file, compression="zstd")


UNPACK: dict[str, Callable[[Any], Any]] = {
    ".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _unpack_zstandard,
}  # fmt: skip


def _lines(file: IO[bytes], newline: str | None = None) -> Iterator[str]:
    """Lines with their ends; `newline` as in `open`. A byte order mark at the beginning is none of them."""
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline=newline)  # type: ignore[type-var]
    while line := text.readline(LONGEST):
        if len(line) == LONGEST:
            raise ValueError(f"a line of {LONGEST:,} characters or more: break it into lines")
        if "\0" in line:  # valid UTF-8, yet text holds no NUL
            raise ValueError("it is not text, it holds a NUL byte")
        yield line


def _plain(file: IO[bytes]) -> Iterator[Row]:
    return ({"text": line} for line in _lines(file))


def _without_ending(file: IO[bytes]) -> Iterator[Row]:
    lines = _lines(file)
    first = next((line for line in lines if line.strip()), "")
    if NO_PROSE.match(first):
        raise ValueError(
            f"its name has no ending, and its first line is not prose, {first.strip()[:40]!r}: end it with one of "
            f"{' '.join(READERS)}"
        )
    return ({"text": line} for line in chain([first], lines))


def _json_lines(file: IO[bytes]) -> Iterator[Row]:
    return _objects(_lines(file))


def _json(file: IO[bytes]) -> Iterator[Row]:
    lines = _lines(file)
    first = next((line for line in lines if line.strip()), "")
    if not first.lstrip().startswith("["):
        yield from _objects(chain([first], lines))
        return
    text = first + "".join(lines)
    for row in _loaded(text):
        yield _object(row)


def _objects(lines: Iterable[str]) -> Iterator[Row]:
    for line in lines:
        if line.strip():
            yield _object(_loaded(line))


def _loaded(text: str) -> Any:
    found = json.loads(text)
    if "\\u" in text:
        if "\\u0000" in text:
            raise ValueError("it holds a NUL character")
        json.dumps(found, ensure_ascii=False).encode()  # raises for half of a surrogate pair
    return found


def _object(row: Any) -> Row:
    if not isinstance(row, dict):
        raise ValueError(
            f"a row is {type(row).__name__}, {str(row)[:40]!r}: each is an object, such as {{'text': ...}}"
        )
    return row


@dataclass
class _Record:
    number: int  # of its first line, from 1
    fields: list[str]
    otherwise: list[list[str]]  # rows that its lines would be without the quotes, if they could be some


def _table(separator: str, file: IO[bytes]) -> Iterator[Row]:
    records = _records(_lines(file, newline=""), separator)
    names = [name.strip() for name in next((record.fields for record in records), [])]
    other = next((mark for mark in (",", ";", "\t", "|") if len(names) == 1 and mark in names[0]), None)
    if other:
        raise ValueError(
            f"its heading {shown(names[0], 40)!r} is one column: it looks separated by {other!r}, and this file "
            f"should be separated by {separator!r}"
        )
    twice = {name for name in names if name and names.count(name) > 1}
    if twice:
        raise ValueError(f"its heading has {shown(min(twice), 40)!r} twice: leave one out")
    near: deque[_Record] = deque(maxlen=2 * NEAR)
    doubtful: deque[tuple[int, _Record]] = deque()
    for count, record in enumerate(records):
        if len(record.fields) != len(names):
            raise ValueError(
                f"line {record.number} has {len(record.fields)} fields, its heading {len(names)}: put a text that has "
                f"the separator in quotes, and double the quotes that are part of it"
            )
        near.append(record)
        if record.otherwise:
            doubtful.append((count, record))
        if doubtful and doubtful[0][0] + NEAR <= count:
            _check_quotes(doubtful.popleft()[1], near)
        yield dict(zip(names, record.fields, strict=True))
    for _, record in doubtful:
        _check_quotes(record, near)


def _records(lines: Iterator[str], separator: str) -> Iterator[_Record]:
    """Yields the heading and the rows of a .csv or .tsv file, without its empty lines.

    A field in quotes may hold separators, line ends and doubled quotes, as in RFC 4180. A quote that
    none closes before a separator or a line end is part of the text: the line is read as it stands.
    A line of a .tsv file with as many fields as the heading is always a row of its own.
    """
    waiting: deque[str] = deque()  # lines that were read in search of a closing quote
    number = width = 0

    def take() -> str | None:
        return waiting.popleft() if waiting else next(lines, None)

    while (line := take()) is not None:
        number += 1
        if not line.strip("\r\n"):
            continue
        record = _Record(number, _split(line, separator), [])
        taken = [line]
        if '"' in line:
            whole = _unquoted([line], separator)
            is_row = separator == "\t" and len(record.fields) == width
            if whole is None and not is_row:
                whole = _unquoted(_noted(line, take, taken), separator)
            if whole is None:
                waiting.extendleft(reversed(taken[1:]))
                del taken[1:]
            elif not is_row or len(whole) == width:
                record.fields = whole
        if len(taken) > 1:
            rows = [_split(each, separator) for each in taken]
            fitting = [row for row in rows if len(row) == width]
            if len(rows[0]) == len(rows[-1]) == width and len(fitting) >= len(rows) / 2:
                record.otherwise = fitting
        yield record
        number += len(taken) - 1
        width = width or len(record.fields)


def _split(line: str, separator: str) -> list[str]:
    return line.rstrip("\r\n").split(separator)


def _unquoted(lines: Iterable[str], separator: str) -> list[str] | None:
    """Fields of the first record, or None where its quotes do not close."""
    try:
        return next(csv.reader(lines, delimiter=separator, strict=True))
    except csv.Error:
        return None


def _noted(line: str, take: Callable[[], str | None], taken: list[str]) -> Iterator[str]:
    """`line` and those behind it, which are appended to `taken`."""
    yield line
    while (following := take()) is not None:
        taken.append(following)
        yield following


def _check_quotes(doubtful: _Record, near: Iterable[_Record]) -> None:
    """Raises ValueError where lines that two quotes make one row are more likely rows of their own, with a text that
    begins and another one that ends with a quote: where their other fields are such as those of the rows around."""
    is_likely = False
    for column, cells in enumerate(zip(*doubtful.otherwise, strict=True)):
        if any('"' in cell for cell in cells):
            continue
        values = [record.fields[column] for record in near if record is not doubtful]
        known = set(values)
        is_free = len(known) > len(values) / 2 and not all(map(_is_number, known))
        if all(cell in known or (_is_number(cell) and all(map(_is_number, known))) for cell in cells):
            is_likely |= bool(known)
        elif not is_free:
            return
    if is_likely:
        raise ValueError(
            f"line {doubtful.number} begins a field in quotes, whose {len(doubtful.otherwise)} lines would be rows of "
            f"their own if the quotes are part of texts: put texts with quotes in quotes, and double those"
        )


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _parquet(file: IO[bytes], columns: Sequence[str] | None) -> Iterator[Row]:
    from pyarrow import parquet

    table = parquet.ParquetFile(file if isinstance(file, io.BufferedReader) else io.BytesIO(file.read()))
    needed = [name for name in table.schema_arrow.names if name in (columns or ())]
    for batch in table.iter_batches(batch_size=1000, columns=needed or None):
        yield from batch.to_pylist()


READERS: dict[str, Callable[[IO[bytes]], Iterator[Row]]] = {
    ".txt": _plain, ".text": _plain, ".md": _plain, ".tokens": _plain,
    ".jsonl": _json_lines, ".ndjson": _json_lines, ".json": _json,
    ".csv": partial(_table, ","), ".tsv": partial(_table, "\t"),
}  # fmt: skip
KNOWN = (*READERS, ".parquet", ".zip")
