"""Rows in .csv and .tsv files: records with the heading's columns."""

from collections.abc import Iterator
from typing import IO, Any

from moe_dist.data.files.csv_quotes import QuoteChecker
from moe_dist.data.files.csv_records import read_records
from moe_dist.data.files.messages import printable
from moe_dist.data.files.text_lines import text_lines

_SEPARATORS = (",", ";", "\t", "|")


def csv_rows(file: IO[bytes], separator: str) -> Iterator[dict[str, Any]]:
    """Yields the rows of a table with a heading.

    Args:
        file: The decompressed bytes.
        separator: The character between fields, "," or a tab.

    Yields:
        A row: strings by column name.

    Raises:
        ValueError: The heading is not one, a row has another number of fields than the heading, or
            it is not clear whether quotes enclose a field with several lines.
    """
    records = read_records(text_lines(file, newline=""), separator)
    heading = next(records, None)
    names = [name.strip() for name in heading.fields] if heading else []
    _check_heading(names, separator)
    quotes = QuoteChecker()
    for record in records:
        if len(record.fields) != len(names):
            raise ValueError(
                f"line {record.line_number} has {len(record.fields)} fields, but the heading has "
                f"{len(names)}; put a text that contains the separator in quotes, and double the "
                "quotes inside it"
            )
        quotes.add(record)
        yield dict(zip(names, record.fields, strict=True))
    quotes.finish()


def _check_heading(names: list[str], separator: str) -> None:
    if len(names) == 1:
        for other in _SEPARATORS:
            if other in names[0]:
                raise ValueError(
                    f"the heading {printable(names[0], 40)!r} is one column; it seems to be "
                    f"separated by {other!r}, but this format is separated by {separator!r}"
                )
    repeated = {name for name in names if name and names.count(name) > 1}
    if repeated:
        raise ValueError(
            f"the heading has {printable(min(repeated), 40)!r} twice; remove or rename one column"
        )
