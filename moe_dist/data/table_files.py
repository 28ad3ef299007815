"""Local files of text and of rows: which ones a source names, and the rows of each by the ending of its own name.

    .txt .text .md .tokens       plain text: a row {"text": line} for each line
    .jsonl .ndjson .json         an object a line; .json may also be one list of objects
    .csv .tsv                    a heading and rows; see `_records` for quotes
    .parquet                     rows

Each may be packed as .gz, .bz2, .xz, .zst or .zip. A name without an ending is plain text if its first line looks like
it. Everything else is refused by name: endings that begin with a letter and are not among these, and numbers behind the
ending of a table, such as .csv.1. Copies that editors keep (x.txt~, #x.txt#) are passed over. Text is UTF-8.
"""

import bz2
import contextlib
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
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from io import BufferedReader
from itertools import chain
from pathlib import Path
from typing import IO, Any

Row = dict[str, Any]

LONGEST = 2**28  # characters of a line; some corpora are a single line of 10^8
LEAST_FREE = 6  # lines, for columns that hold anything to tell whether they are rows
NEAR = 1000  # rows before and after a doubtful one that it is compared with
csv.field_size_limit(LONGEST)  # the library's own is 131,072, which documents exceed

SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "valid": "valid",
    "validation": "valid",
    "val": "valid",
    "dev": "valid",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}
SPLIT_NAME = re.compile(rf"(?<![^-._ 0-9])({'|'.join(SPLIT_NAMES)})(?![^-._ 0-9])", re.IGNORECASE)
ENDING = re.compile(r"\.[a-zA-Z].*", re.DOTALL)  # of a name; one such as .00001 says nothing
SHARD = re.compile(
    r"(\.[a-zA-Z]\w*)-[0-9]+-of-[0-9]+"
)  # likewise, as .en-00001-of-00100, but .csv-00001-of-00100
# found in folders of data without being data
NO_DATA = re.compile(
    r"(readme|licen[cs]e)(\..*)?|(config|dataset_infos?|dataset_dict)\.json", re.IGNORECASE
)
# a first line that is no prose: JSON, markup, a table
NO_PROSE = re.compile(r"\s*(\{|\[\s*[\[{\"]|<[?!]\w|<(doc|html)\b)|.*\t", re.IGNORECASE)
TEXT_COLUMNS = (  # of one text, or of a pair
    ("text", "text2"),
    ("text",),
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("sentence",),
)
ALONE = {names[0] for names in TEXT_COLUMNS if len(names) == 1}
NAMED = {name for names in TEXT_COLUMNS for name in names} | {
    "label",
    "id",
    "context",
    "answers",
}  # in a heading


def find_files(source: str) -> list[Path]:
    """Returns the files of a file, a glob or a folder, sorted by name; none where nothing is called so.

    Entries whose name begins with a dot and copies that editors keep are passed over in folders and by wildcards, as
    are README and LICENSE in folders. A folder is entered once, however many links lead to it.
    """
    if os.path.isdir(source):
        found = (
            Path(here, name)
            for here, names in _walk(source)
            for name in names
            if not NO_DATA.fullmatch(name)
        )
        return sorted(found, key=str)
    # A path that exists is taken literally, so that names with [ or * need no escaping.
    names = [source] if os.path.lexists(source) else _matches(source)
    first_of: dict[tuple[str, str], Path] = {}
    for name in names:
        if not os.path.isdir(name):
            first_of.setdefault(
                (os.path.realpath(os.path.dirname(name)), os.path.basename(name)), Path(name)
            )
    return list(first_of.values())


def find_splits(source: str) -> dict[str, list[Path]]:
    """Returns the files of each of "train", "valid" and "test" that `source` has.

    A folder is split by the names of its folders or else of its files, such as `train/`, `train-00000.jsonl` or
    `my_test.txt`. Where no name says anything, and for a file or a glob, all files are "train".

    Raises:
        ValueError: A folder without files, with several datasets, or with a file that is not read or whose split is
            not clear.
    """
    files = find_files(source)
    if not os.path.isdir(source):
        return {"train": files}
    if not files:
        raise ValueError("the folder has no data files")
    _check_card(Path(source, "README.md"))
    for file in files:
        check_ending(file.name)
    relative = [file.relative_to(source) for file in files]
    for names in ([path.parent.parts for path in relative], [(path.name,) for path in relative]):
        found = [{split for name in parts for split in _splits_of(name)} for parts in names]
        if any(found):
            splits: dict[str, list[Path]] = {}
            for path, file, of in zip(relative, files, found, strict=True):
                if len(of) != 1:
                    several = (
                        f"is of {' and '.join(sorted(of))}"
                        if of
                        else "is of no split, unlike the others"
                    )
                    raise ValueError(f"{path} {several}, by its name: rename it or take it away")
                splits.setdefault(of.pop(), []).append(file)
            return splits
    return {"train": files}


def check_ending(name: str) -> None:
    """Raises ValueError for a name with an ending that is not read."""
    stem, ending = os.path.splitext(name)
    if ending.lower() in UNPACK:
        return check_ending(stem)
    if shard := SHARD.fullmatch(ending):
        is_known = not _is_table(shard[1])
    elif ENDING.fullmatch(ending):
        is_known = ending.lower() in KNOWN
    else:
        is_known = not (ending and _is_table(os.path.splitext(stem)[1]))
    if not is_known:
        raise ValueError(
            f"files that end with {shown(ending, 40)} are not read: name it .txt where it is plain text, or convert it "
            f"to one of {' '.join(KNOWN)} (or these with {' '.join(UNPACK)})"
        )


def kind_of(name: str) -> str:
    """Returns the ending that stands for how a file is read, whether it is packed or not: ".txt" for plain text."""
    stem, ending = os.path.splitext(name)
    ending = ending.lower()
    if ending in UNPACK:
        return kind_of(stem)
    if ending == ".zip":  # of its members, those without an ending are read by that of the stem
        return kind_of(stem) + ending
    if ending in READERS:
        return next(each for each, reader in READERS.items() if reader is READERS[ending])
    return ending if ending in KNOWN else ".txt"


def open_file(path: str | bytes | os.PathLike[str]) -> BufferedReader:
    """Opens a regular file to read its bytes. Never waits for a pipe, even one that replaces the file meanwhile.

    Raises:
        ValueError: It is a folder, a pipe, a device or a socket.
        OSError: It cannot be opened.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("a folder, a pipe, a device or a socket: give a regular file")
    return open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))


def label_names(path: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yields the name of each table in a file and the names of its labels.

    Parquet files of the datasets library have such names in their metadata; other files have none. A file that cannot
    be read yields nothing here, and an error where its rows are read.
    """
    with (
        contextlib.suppress(Exception),
        open_file(path) as file,
    ):  # each library has kinds of its own
        yield from _label_names(path.name, file)


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
        with open_file(path) as file:
            for row in _rows(path.name, file, columns):
                yield row
                number += 1
    except Exception as error:  # each library has kinds of its own for what is damaged
        has_line = str(error).startswith(
            "line "
        )  # more exact than the number of rows, for tables are read ahead
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
        return f"no JSON ({error.msg.removesuffix(' at')} at character {error.pos})"
    if isinstance(error, UnicodeDecodeError):
        return f"no UTF-8 ({error.reason}, byte 0x{error.object[error.start]:02x}): give UTF-8"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return shown(text) or type(error).__name__


def _is_table(ending: str) -> bool:
    """Returns whether files with this ending hold rows, so that a part or a copy of one is not plain text."""
    ending = ending.lower()
    return ending in (*KNOWN, *UNPACK) and READERS.get(ending) is not _plain


def _is_hidden(name: str) -> bool:
    return name.startswith((".", "__")) or _is_backup(name)


def _is_backup(name: str) -> bool:
    return name.endswith("~") or (name.startswith("#") and name.endswith("#"))


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
        names = [
            name
            for here in folders
            for name in glob.glob(os.path.join(glob.escape(here), part or "*"))
        ]
    return sorted(
        os.path.normpath(name) for name in names if not _is_backup(os.path.basename(name))
    )


def _check_card(card: Path) -> None:
    """The head of the README of a dataset of the Hub lists its configurations."""
    if card.is_file():
        with open_file(card) as file:
            head = file.read(2**20).decode(errors="replace").split("\n---")[0]
        names = re.findall(r"^\s*-?\s*config_name:\s*(\S+)", head, re.MULTILINE)
        if head.startswith("---") and len(set(names)) > 1:
            raise ValueError(
                f"the folder has several datasets, {', '.join(names[:5])}: give the folder of one of them"
            )


def _rows(name: str, file: IO[bytes], columns: Sequence[str] | None) -> Iterator[Row]:
    check_ending(name)
    stem, ending = os.path.splitext(name)
    ending = ending.lower()
    if ending == ".zip":
        for member, part in _members(stem, file):
            yield from _rows(member, part, columns)
    elif ending in UNPACK:
        yield from _rows(stem, UNPACK[ending](file), columns)
    elif ending == ".parquet":
        yield from _parquet(file, columns)
    elif ending in READERS:
        yield from READERS[ending](file)
    else:
        yield from _without_ending(file)


def _label_names(name: str, file: IO[bytes]) -> Iterator[tuple[str, tuple[str, ...]]]:
    stem, ending = os.path.splitext(name)
    ending = ending.lower()
    if ending == ".zip":
        for member, part in _members(stem, file):
            yield from _label_names(member, part)
    elif ending in UNPACK:
        yield from _label_names(stem, UNPACK[ending](file))
    elif ending == ".parquet":
        info = json.loads(
            (_open_parquet(file).schema_arrow.metadata or {}).get(b"huggingface", b"{}")
        )
        features = info.get("info", {}).get("features", {})
        yield name, tuple(map(str, features.get("label", {}).get("names", ())))
    else:
        yield name, ()


def _members(stem: str, file: IO[bytes]) -> Iterator[tuple[str, IO[bytes]]]:
    """Yields the files of a .zip, and the names by which they are read: `stem` for one without an ending.

    Raises:
        ValueError: Its files are of several splits, by their names.
    """
    with zipfile.ZipFile(file) as archive:
        members = {}
        for member in sorted(archive.namelist()):
            *folders, name = member.split("/")
            if name and not any(map(_is_hidden, [*folders, name])) and not NO_DATA.fullmatch(name):
                members[member] = name
        of_folders = {
            split
            for member in members
            for part in Path(member).parent.parts
            for split in _splits_of(part)
        }
        of_names = {split for name in members.values() for split in _splits_of(name)}
        if len(splits := of_folders or of_names) > 1:
            raise ValueError(
                f"it has files of {' and '.join(sorted(splits))}, by their names: unpack it into a folder"
            )
        for member, name in members.items():
            with archive.open(member) as part:
                yield (name if "." in name else stem), part


def _splits_of(name: str) -> set[str]:
    return {SPLIT_NAMES[word.lower()] for word in SPLIT_NAME.findall(name)}


def _unpack_zstandard(file: IO[bytes]) -> IO[bytes]:
    import pyarrow

    return pyarrow.input_stream(file, compression="zstd")


UNPACK: dict[str, Callable[[Any], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _unpack_zstandard,
}


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
    """Reads plain text. Raises ValueError for rows under a name of plain text: keys and braces would be trained on."""
    lines = _lines(file)
    head: list[str] = []
    for line in lines:
        head.append(line)
        if line.strip():
            if _is_row(line):
                raise ValueError(
                    f"its first line is a row, {shown(line, 40)!r}, and not text: name it .jsonl"
                )
            if _is_heading_of_several(line):
                raise ValueError(
                    f"its first line is a heading, {shown(line, 40)!r}, and not text: name it .csv or .tsv"
                )
            break
    return ({"text": line} for line in chain(head, lines))


def _is_row(line: str) -> bool:
    """Returns whether a line is a JSON object that has a text in one of the known columns."""
    if not line.lstrip().startswith("{"):
        return False
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return any(isinstance(row.get(name), str) for name in NAMED)


def _is_heading_of_several(line: str) -> bool:
    names = [name.strip(" \"'\r\n") for name in re.split("[,;\t]", line)]
    return (
        len(names) > 1
        and len(NAMED & {*names}) > 1
        and all(re.fullmatch(r"\w*", name) for name in names)
    )


def _without_ending(file: IO[bytes]) -> Iterator[Row]:
    lines = _lines(file)
    first = next((line for line in lines if line.strip()), "")
    if NO_PROSE.match(first) or _is_heading(first):
        raise ValueError(
            f"its name has no ending, and its first line is not prose, {first.strip()[:40]!r}: end it with one of "
            f"{' '.join(READERS)}"
        )
    return ({"text": line} for line in chain([first], lines))


def _is_heading(line: str) -> bool:
    names = {name.strip(" \"'\r\n").lower() for name in re.split("[,;|]", line)}
    if any(map(str.isspace, "".join(names))):  # as in prose
        return False
    return bool(names & (NAMED if len(names) > 1 else ALONE))


def _json_lines(file: IO[bytes]) -> Iterator[Row]:
    return _objects(_lines(file))


def _json(file: IO[bytes]) -> Iterator[Row]:
    lines = _lines(file)
    first = next((line for line in lines if line.strip()), "")
    if not first.lstrip().startswith("[") and not _is_cut_off(first):
        yield from _objects(chain([first], lines))
        return
    found = _loaded(first + "".join(lines))
    for row in found if isinstance(found, list) else [found]:
        yield _object(row)


def _is_cut_off(line: str) -> bool:
    """Returns whether an object begins in a line and does not end in it."""
    try:
        json.loads(line)
    except json.JSONDecodeError as error:
        return error.pos >= len(line.rstrip())
    except (ValueError, RecursionError):  # reported where it is read
        return False
    return False


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
    otherwise: list[
        list[str]
    ]  # rows that its lines would be without the quotes, if they could be some
    all_fit: bool = False  # whether each of its lines would be one


@dataclass
class _Column:
    """Counts of the fields that some rows have in one column."""

    count: Counter[str]
    begins: int  # how many begin at once (`_begins`)
    ends: int  # how many end with a digit
    forms: Counter[str]  # of those that are like ids


def _columns(records: Iterable[_Record]) -> list[_Column]:
    return [
        _Column(
            Counter(values),
            sum(map(_begins, values)),
            sum(map(_ends, values)),
            Counter(map(_form, filter(_is_id, values))),
        )
        for values in zip(*(record.fields for record in records), strict=True)
    ]


def _table(separator: str, file: IO[bytes]) -> Iterator[Row]:
    records = _records(_lines(file, newline=""), separator)
    names = [name.strip() for name in next((record.fields for record in records), [])]
    other = next(
        (mark for mark in (",", ";", "\t", "|") if len(names) == 1 and mark in names[0]), None
    )
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
    columns: list[_Column] = []  # of `near`, until it is `stale`
    stale = 0
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
            if count >= stale:
                columns, stale = _columns(near), count + NEAR // 2
            _check_quotes(doubtful.popleft()[1], columns)
        yield dict(zip(names, record.fields, strict=True))
    if doubtful:
        columns = _columns(near)
    for _, record in doubtful:
        _check_quotes(record, columns)


def _records(lines: Iterator[str], separator: str) -> Iterator[_Record]:
    """Yields the heading and the rows of a .csv or .tsv file, without its empty lines.

    A field in quotes may hold separators, line ends and doubled quotes, as in RFC 4180. A quote that
    none closes before a separator or a line end is part of the text: the line is read as it stands.
    In a file of one column a field of several lines cannot be told from texts with a quote each, and
    is read as the former; of other files see `_check_quotes`.
    A line of a .tsv file with as many fields as the heading is a row of its own, unless a quote opens in
    it that closes before any other such line.
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
            if whole is None:
                fits = partial(_has_fields, width, separator) if is_row else None
                whole = _unquoted(_noted(line, take, taken, fits), separator)
            if whole is None or (is_row and len(whole) != width):
                waiting.extendleft(reversed(taken[1:]))
                del taken[1:]
            else:
                record.fields = whole
        if len(taken) > 1:
            rows = [_split(each, separator) for each in taken]
            fitting = [row for row in rows if len(row) == width]
            if len(rows[0]) == len(rows[-1]) == width and len(fitting) >= len(rows) / 2:
                record.otherwise, record.all_fit = fitting, len(fitting) == len(rows)
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


def _has_fields(number: int, separator: str, line: str) -> bool:
    return len(_split(line, separator)) == number


def _noted(
    line: str, take: Callable[[], str | None], taken: list[str], ends: Callable[[str], bool] | None
) -> Iterator[str]:
    """Yields `line` and those behind it, which are appended to `taken`, up to one for which `ends` is true."""
    yield line
    while (following := take()) is not None:
        taken.append(following)
        if ends and ends(following):
            return
        yield following


def _check_quotes(doubtful: _Record, columns: Sequence[_Column]) -> None:
    """Raises ValueError where lines that two quotes make one row are more likely rows of their own, with a text that
    begins and another one that ends with a quote: where their other fields are such as those of the rows around."""
    if _are_rows(doubtful, columns):
        raise ValueError(
            f"line {doubtful.number} begins a field in quotes, whose {len(doubtful.otherwise)} lines would be rows of "
            f"their own if the quotes are part of texts: put texts with quotes in quotes, and double those"
        )


def _are_rows(doubtful: _Record, columns: Sequence[_Column]) -> bool:
    """Whether lines are rows as well, by their columns: of few values, such as labels; of one form, such as ids; or
    free. One column tells nothing: there a field of several lines is always what it is by RFC 4180.

    Args:
        doubtful: The row that they are by the quotes.
        columns: Those of the rows around, among which is `doubtful`.
    """
    rows, num_others = doubtful.otherwise, columns[0].count.total() - 1
    opens = max(i for i, cell in enumerate(rows[0]) if '"' in cell)
    closes = min((i for i, cell in enumerate(rows[-1]) if '"' in cell), default=opens)
    at_once = [i for i, column in enumerate(columns) if i and 2 * column.begins > num_others]
    has_numbers = [2 * column.ends > num_others for column in columns]
    alike = [
        all(_begins(row[i]) for i in at_once) and not any(map(_is_cut, row, row[1:], has_numbers))
        for row in rows
    ]
    found = (
        len(at_once) == len(columns) - 1 > 0
        and len(rows) >= LEAST_FREE
        and doubtful.all_fit
        and all(alike[1:-1])
    )
    for i, column in enumerate(columns):
        # a field of the row itself, ahead of the quotes or behind them, tells nothing
        part = slice(i <= opens, len(rows) - (i >= closes))
        cells = [row[i] for row in rows[part]]
        if not cells or opens <= i <= closes or any('"' in cell for cell in cells):
            continue
        cells_alike = [cell for cell, is_alike in zip(cells, alike[part], strict=True) if is_alike]
        own = doubtful.fields[i]
        known = [cell for cell in cells_alike if column.count[cell] > (cell == own)]
        if 2 * len(known) >= len(cells):
            found |= any(known)
        elif 2 * (len(column.count) - (column.count[own] == 1)) <= num_others:
            return False
        elif 2 * column.forms.total() > num_others:
            if 2 * len({cell for cell in cells_alike if column.forms[_form(cell)]}) < len(cells):
                return False
            found = True
    return num_others > 0 and found


def _begins(cell: str) -> bool:
    """Returns whether a field begins without a space. Text behind a comma of prose begins with one."""
    return not cell[:1].isspace() and cell != ""


def _is_cut(cell: str, following: str, ends: bool) -> bool:
    """Returns whether a comma between two fields belongs to a number in a text: 1,000 or Note 4,5 or May 3,2019.

    Args:
        cell: The first field.
        following: The second one.
        ends: Whether most fields of the first one's column end with a digit, as texts do not.
    """
    number = re.match(r"[0-9]+", following)
    if not (_ends(cell) and number):
        return False
    is_thousand = len(number[0]) == 3 and (len(following) > 3 or any(map(str.isspace, cell)))
    return is_thousand or (not ends and any(map(str.isspace, cell)))


def _ends(cell: str) -> bool:
    return re.search(r"[0-9]$", cell) is not None


def _is_id(cell: str) -> bool:
    return len(cell) < 100 and any(map(str.isdigit, cell)) and not any(map(str.isspace, cell))


def _form(cell: str) -> str:
    """Returns "a-0" for "doc-17b": a letter for each word, a digit for each one that has any."""
    return re.sub(r"\w+", lambda word: "0" if any(map(str.isdigit, word[0])) else "a", cell)


def _parquet(file: IO[bytes], columns: Sequence[str] | None) -> Iterator[Row]:
    table = _open_parquet(file)
    needed = [name for name in table.schema_arrow.names if name in (columns or ())]
    for batch in table.iter_batches(batch_size=1000, columns=needed or None):
        yield from batch.to_pylist()


def _open_parquet(file: IO[bytes]) -> Any:
    from pyarrow import parquet

    return parquet.ParquetFile(
        file if isinstance(file, BufferedReader) else io.BytesIO(file.read())
    )


READERS: dict[str, Callable[[IO[bytes]], Iterator[Row]]] = {
    ".txt": _plain,
    ".text": _plain,
    ".md": _plain,
    ".tokens": _plain,
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": partial(_table, ","),
    ".tsv": partial(_table, "\t"),
}
KNOWN = (*READERS, ".parquet", ".zip")
