"""File names: the split that a name contains, and the names that are not data."""

import re
from collections.abc import Iterable

_SPLIT_OF_WORD = {
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
_SPLIT_WORD = re.compile(
    rf"(?<![^-._ 0-9])({'|'.join(_SPLIT_OF_WORD)})(?![^-._ 0-9])", re.IGNORECASE
)
# files that accompany data
_NO_DATA = re.compile(
    r"(readme|licen[cs]e)(\..*)?|(config|dataset_infos?|dataset_dict)\.json", re.IGNORECASE
)


def splits_in_names(names: Iterable[str]) -> set[str]:
    """Returns the splits ("train", "valid", "test") whose words the names contain."""
    splits = set()
    for name in names:
        for word in _SPLIT_WORD.findall(name):
            splits.add(_SPLIT_OF_WORD[word.lower()])
    return splits


def is_no_data(name: str) -> bool:
    """Returns whether a file accompanies data, such as README.md."""
    return _NO_DATA.fullmatch(name) is not None


def is_hidden(name: str) -> bool:
    """Returns whether a file or folder is skipped when a folder or an archive is listed."""
    return name.startswith((".", "__")) or is_backup(name)


def is_backup(name: str) -> bool:
    """Returns whether a file is a copy that an editor keeps, such as x.txt~ or #x.txt#."""
    return name.endswith("~") or (name.startswith("#") and name.endswith("#"))
