"""Column names by which a first line is recognized as a heading or a row instead of text."""

import json
import re

# columns for a single text, or for two texts
TEXT_COLUMNS = (
    ("text", "text2"),
    ("text",),
    ("premise", "hypothesis"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("sentence",),
)
_SINGLE_TEXT_COLUMNS = {columns[0] for columns in TEXT_COLUMNS if len(columns) == 1}
_OTHER_COLUMNS = {"label", "id", "context", "answers"}
_KNOWN_COLUMNS = _OTHER_COLUMNS.union(*TEXT_COLUMNS)
_AROUND_NAMES = " \"'\r\n"
# a line that is not prose: JSON, markup, or fields separated by tabs
_NO_PROSE = re.compile(r"\s*(\{|\[\s*[\[{\"]|<[?!]\w|<(doc|html)\b)|.*\t", re.IGNORECASE)


def is_json_row(line: str) -> bool:
    """Returns whether a line is a JSON object with a string in one of the known columns."""
    if not line.lstrip().startswith("{"):
        return False
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return any(isinstance(row.get(name), str) for name in _KNOWN_COLUMNS)


def is_heading(line: str) -> bool:
    """Returns whether a line is certainly a heading: single words, two of them known columns."""
    names = [name.strip(_AROUND_NAMES) for name in re.split("[,;\t]", line)]
    if len(names) < 2 or len(_KNOWN_COLUMNS.intersection(names)) < 2:
        return False
    return all(re.fullmatch(r"\w*", name) for name in names)


def is_prose(line: str) -> bool:
    """Returns whether a line is neither JSON, nor markup, nor a possible heading."""
    return not _NO_PROSE.match(line) and not _may_be_heading(line)


def _may_be_heading(line: str) -> bool:
    """Returns whether a line has no white space inside its fields, and a known column."""
    names = {name.strip(_AROUND_NAMES).lower() for name in re.split("[,;|]", line)}
    if any(character.isspace() for name in names for character in name):
        return False
    known = _KNOWN_COLUMNS if len(names) > 1 else _SINGLE_TEXT_COLUMNS
    return not known.isdisjoint(names)
