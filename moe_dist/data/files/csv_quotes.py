"""Check for quoted fields that cover several lines: one field, or separate table rows.

A text that begins with a quote and a later text that ends with one look like a quoted field:

    text,label
    "I like it.,pos
    a long film,neg
    It was good.",pos

By RFC 4180 this is one row, whose text is three lines long. The lines are more likely three rows,
because their column "label" is filled as in the rows around them. Such a file is refused,
because either reading may be wrong.
"""

import enum
import re
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from moe_dist.data.files.csv_records import Record

_NEIGHBORS = 1000  # rows before and after an ambiguous one with which it is compared
_MIN_FREE_ROWS = 6  # lines that may be rows if all their columns are free text
_MAX_ID_CHARS = 99


class QuoteChecker:
    """A check of all records of a table, each against the rows around it.

    A record is checked when `_NEIGHBORS` more rows have been added. The statistics on the
    surrounding rows are updated after half as many rows, which bounds their cost.
    """

    def __init__(self) -> None:
        self._num_rows = 0
        self._window: deque[Record] = deque(maxlen=2 * _NEIGHBORS)
        self._ambiguous: deque[tuple[int, Record]] = deque()  # with their row numbers
        self._columns: list[_Column] = []  # statistics on the window, until row `_refresh_at`
        self._refresh_at = 0

    def add(self, record: Record) -> None:
        """Adds the next row, and checks at most one earlier row.

        Args:
            record: A row with as many fields as all others.

        Raises:
            ValueError: The earlier row's lines are more likely separate rows.
        """
        row_number = self._num_rows
        self._num_rows += 1
        self._window.append(record)
        if record.unquoted_rows:
            self._ambiguous.append((row_number, record))
        if self._ambiguous and self._ambiguous[0][0] + _NEIGHBORS <= row_number:
            if row_number >= self._refresh_at:
                self._columns = _column_statistics(self._window)
                self._refresh_at = row_number + _NEIGHBORS // 2
            _check_record(self._ambiguous.popleft()[1], self._columns)

    def finish(self) -> None:
        """Checks the last rows of the table.

        Raises:
            ValueError: The lines in such a row are more likely separate rows.
        """
        if not self._ambiguous:
            return
        columns = _column_statistics(self._window)
        for _, record in self._ambiguous:
            _check_record(record, columns)


@dataclass
class _Column:
    """Statistics on the cells in one column.

    Attributes:
        counts: Cell counts by value.
        num_without_indent: Cells that begin without a space.
        num_with_last_digit: Cells that end with a digit.
        id_patterns: Cell counts by pattern, for cells that look like ids.
    """

    counts: Counter[str]
    num_without_indent: int
    num_with_last_digit: int
    id_patterns: Counter[str]


class _Evidence(enum.Enum):
    """Result of a comparison of one column of possible rows with the rows around them."""

    ROWS = enum.auto()
    NO_ROWS = enum.auto()
    NONE = enum.auto()


def _column_statistics(records: Iterable[Record]) -> list[_Column]:
    rows = [record.fields for record in records]
    columns = []
    for cells in zip(*rows, strict=True):
        columns.append(
            _Column(
                counts=Counter(cells),
                num_without_indent=sum(map(_begins_without_space, cells)),
                num_with_last_digit=sum(map(_ends_with_digit, cells)),
                id_patterns=Counter(_id_pattern(cell) for cell in cells if _looks_like_id(cell)),
            )
        )
    return columns


def _check_record(record: Record, columns: Sequence[_Column]) -> None:
    """Raises ValueError if the lines of a record are more likely rows of their own."""
    if _are_separate_rows(record, columns):
        raise ValueError(
            f"line {record.line_number} begins a field in quotes of {len(record.unquoted_rows)} "
            "lines, which look like separate rows whose texts contain a quote; put texts that "
            "contain quotes in quotes, and double the quotes inside them"
        )


def _are_separate_rows(record: Record, columns: Sequence[_Column]) -> bool:
    """Returns whether the lines of a record are filled like the rows around it.

    A column is comparable if it has few values, such as labels, or values with one pattern, such as
    ids. If all columns are free text, the lines are rows if there are many and each begins its
    fields like the rows around. A table with one column gives no evidence: there a field with
    several lines is always read as RFC 4180 defines it.
    """
    rows = record.unquoted_rows
    num_others = columns[0].counts.total() - 1  # rows around, without this one
    if num_others == 0:
        return False
    opening = max(_columns_with_quote(rows[0]))
    closing = min(_columns_with_quote(rows[-1]), default=opening)
    is_row_like = [_is_row_like(row, columns, num_others) for row in rows]
    found = _are_free_rows(record, columns, is_row_like, num_others)
    for i, column in enumerate(columns):
        if opening <= i <= closing:
            continue
        # the record's own field, before or after the quotes, gives no evidence
        start = 1 if i <= opening else 0
        stop = len(rows) - 1 if i >= closing else len(rows)
        cells = [row[i] for row in rows[start:stop]]
        if not cells or any('"' in cell for cell in cells):
            continue
        row_like_cells = []
        for cell, is_like in zip(cells, is_row_like[start:stop], strict=True):
            if is_like:
                row_like_cells.append(cell)
        evidence = _compare(cells, row_like_cells, record.fields[i], column, num_others)
        if evidence is _Evidence.NO_ROWS:
            return False
        found = found or evidence is _Evidence.ROWS
    return found


def _columns_with_quote(row: list[str]) -> list[int]:
    return [i for i, cell in enumerate(row) if '"' in cell]


def _is_row_like(row: list[str], columns: Sequence[_Column], num_others: int) -> bool:
    """Returns whether the separators of a line separate fields, and are not part of its text."""
    for i, column in enumerate(columns):
        is_flush = i > 0 and 2 * column.num_without_indent > num_others
        if is_flush and not _begins_without_space(row[i]):
            return False
    for (cell, following), column in zip(pairwise(row), columns, strict=False):
        ends_with_digit = 2 * column.num_with_last_digit > num_others
        if _is_number_cut(cell, following, ends_with_digit):
            return False
    return True


def _are_free_rows(
    record: Record, columns: Sequence[_Column], is_row_like: list[bool], num_others: int
) -> bool:
    """Returns whether many lines are rows by the beginnings of their fields alone."""
    if len(columns) < 2 or len(record.unquoted_rows) < _MIN_FREE_ROWS:
        return False
    all_flush = all(2 * column.num_without_indent > num_others for column in columns[1:])
    return all_flush and record.all_lines_fit and all(is_row_like[1:-1])


def _compare(
    cells: list[str], row_like_cells: list[str], own: str, column: _Column, num_others: int
) -> _Evidence:
    """Compares the cells in one column with the rows around them.

    Args:
        cells: The cells in all lines.
        row_like_cells: The cells in the row-like lines.
        own: The record's own cell, which is contained in `column`.
        column: Statistics on the column.
        num_others: Rows in `column` without the record itself.

    Returns:
        The evidence that this column gives.
    """
    known = []
    for cell in row_like_cells:
        if column.counts[cell] > (1 if cell == own else 0):
            known.append(cell)
    if 2 * len(known) >= len(cells):
        # empty cells are no evidence
        return _Evidence.ROWS if any(known) else _Evidence.NONE
    num_values = len(column.counts) - (1 if column.counts[own] == 1 else 0)
    if 2 * num_values <= num_others:  # a column with few values, which these cells do not have
        return _Evidence.NO_ROWS
    if 2 * column.id_patterns.total() > num_others:
        matching = {cell for cell in row_like_cells if column.id_patterns[_id_pattern(cell)]}
        return _Evidence.NO_ROWS if 2 * len(matching) < len(cells) else _Evidence.ROWS
    return _Evidence.NONE


def _begins_without_space(cell: str) -> bool:
    """Returns whether a cell has text from its first character on.

    Text after a comma in prose begins with a space.
    """
    return not cell[:1].isspace() and cell != ""


def _is_number_cut(cell: str, following: str, ends_with_digit: bool) -> bool:
    """Returns whether a comma between two fields is part of a number in a text.

    Examples are 1,000 and Note 4,5 and May 3,2019.

    Args:
        cell: The field before the comma.
        following: The field after it.
        ends_with_digit: True if most fields in this column end with a digit, which texts
            do not.

    Returns:
        True if the comma does not separate fields.
    """
    number = re.match(r"[0-9]+", following)
    if not (number and _ends_with_digit(cell)):
        return False
    has_space = any(map(str.isspace, cell))
    if len(number[0]) == 3 and (len(following) > 3 or has_space):  # thousands
        return True
    return has_space and not ends_with_digit


def _ends_with_digit(cell: str) -> bool:
    return re.search(r"[0-9]$", cell) is not None


def _looks_like_id(cell: str) -> bool:
    has_digit = any(map(str.isdigit, cell))
    return len(cell) <= _MAX_ID_CHARS and has_digit and not any(map(str.isspace, cell))


def _id_pattern(cell: str) -> str:
    """Returns "a-0" for "doc-17b": "0" for each word that contains a digit, "a" for the others."""

    def symbol(word: re.Match[str]) -> str:
        return "0" if any(map(str.isdigit, word[0])) else "a"

    return re.sub(r"\w+", symbol, cell)
