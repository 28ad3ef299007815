"""Records in .csv and .tsv files: which lines and fields belong together, by their quotes.

A field in quotes may contain separators, line ends and doubled quotes, as in RFC 4180. A quote that
is not closed before a separator or a line end is part of the text: the line is read as it stands.

A line in a .tsv file with as many fields as the heading is a separate row, unless a quote opens
in it that is closed before any other such line.

In a file with one column, a field with several lines cannot be distinguished from texts that
contain one quote each, and is read as one field; for other files see `csv_quotes`.
"""

import csv
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from moe_dist.data.files.text_lines import MAX_LINE_CHARS

csv.field_size_limit(MAX_LINE_CHARS)  # the default is 131,072 characters, fewer than documents have


@dataclass
class Record:
    """A heading or a row.

    Attributes:
        line_number: Its first line's number, from 1.
        fields: The fields, without the quotes around them.
        unquoted_rows: The rows that its lines would be if the quotes were text; empty if
            they cannot be rows.
        all_lines_fit: True if each of its lines would be such a row.
    """

    line_number: int
    fields: list[str]
    unquoted_rows: list[list[str]] = field(default_factory=list)
    all_lines_fit: bool = False


def read_records(lines: Iterator[str], separator: str) -> Iterator[Record]:
    """Yields the heading and the rows of a table, without its empty lines.

    Args:
        lines: The lines with their line ends.
        separator: The character between fields, "," or a tab.

    Yields:
        The heading, then the rows. Their field counts may differ.
    """
    source = _LineSource(lines)
    num_lines = 0
    width = 0  # fields in the heading
    while (line := source.take()) is not None:
        line_number = num_lines + 1
        num_lines += 1
        if not line.strip("\r\n"):
            continue
        record = Record(line_number, _split_line(line, separator))
        if '"' in line:
            fields, following = _read_quoted(line, source, separator, width)
            if fields is not None:
                record.fields = fields
            num_lines += len(following)
            if following:
                _add_unquoted_rows(record, [line, *following], separator, width)
        yield record
        width = width or len(record.fields)


class _LineSource:
    """The lines of a file; those that were read ahead can be put back."""

    def __init__(self, lines: Iterator[str]) -> None:
        self._lines = lines
        self._put_back: deque[str] = deque()

    def take(self) -> str | None:
        """Returns the next line, or None at the end."""
        if self._put_back:
            return self._put_back.popleft()
        return next(self._lines, None)

    def put_back(self, lines: list[str]) -> None:
        """Returns these lines, in their order, to the front of the source."""
        self._put_back.extendleft(reversed(lines))


def _read_quoted(
    line: str, source: _LineSource, separator: str, width: int
) -> tuple[list[str] | None, list[str]]:
    """Returns the fields of the record that begins with `line`, and its lines after `line`.

    The fields are None, and all other lines are put back, if the quotes are part of the text.
    """
    fields = _parse_quotes([line], separator)
    # a .tsv line that is a row as it stands ends the search for a closing quote
    is_tsv_row = separator == "\t" and len(_split_line(line, separator)) == width
    following: list[str] = []
    if fields is None:
        stop_width = width if is_tsv_row else None
        candidates = _lines_until_row(line, source, following, separator, stop_width)
        fields = _parse_quotes(candidates, separator)
    if fields is None or (is_tsv_row and len(fields) != width):
        source.put_back(following)
        return None, []
    return fields, following


def _parse_quotes(lines: Iterable[str], separator: str) -> list[str] | None:
    """Returns the fields of the first record, or None if its quotes are not closed."""
    try:
        return next(csv.reader(lines, delimiter=separator, strict=True))
    except csv.Error:
        return None


def _lines_until_row(
    line: str, source: _LineSource, following: list[str], separator: str, stop_width: int | None
) -> Iterator[str]:
    """Yields `line` and the lines after it, up to one that has `stop_width` fields as it stands.

    The lines after `line` are appended to `following`, also the one at which it stops.
    """
    yield line
    while (next_line := source.take()) is not None:
        following.append(next_line)
        if stop_width is not None and len(_split_line(next_line, separator)) == stop_width:
            return
        yield next_line


def _add_unquoted_rows(record: Record, lines: list[str], separator: str, width: int) -> None:
    """Adds the rows that the lines of a record would be without quotes, if they may be rows.

    They may be if the first line, the last line, and at least half the lines have as many fields as
    the heading.
    """
    rows = [_split_line(line, separator) for line in lines]
    fitting = [row for row in rows if len(row) == width]
    ends_fit = len(rows[0]) == width and len(rows[-1]) == width
    if ends_fit and 2 * len(fitting) >= len(rows):
        record.unquoted_rows = fitting
        record.all_lines_fit = len(fitting) == len(rows)


def _split_line(line: str, separator: str) -> list[str]:
    return line.rstrip("\r\n").split(separator)
