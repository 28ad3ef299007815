"""Images in folders: a folder for each split, and in it a folder for each class."""

import os
import unicodedata
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np

from moe_dist.data.class_names import class_name, names_differing_by_case, preview_names
from moe_dist.data.images.image_files import format_left_out, list_images, visible_entries
from moe_dist.data.images.image_set import Images

# split -> names that its folder may have
SPLIT_FOLDERS = {"train": ("train",), "valid": ("valid", "val", "validation"), "test": ("test",)}
FOLDER_FORM = "a folder with train/CLASS/IMAGE files, and valid/ or test/ or both next to train/"
_OUTSIDE = "outside the class folders"


def read_class_folders(root: str) -> dict[str, Images]:
    """Lists the images of each split of a folder. The files are not opened.

    Args:
        root: The folder, data.images.

    Returns:
        The splits in `SPLIT_FOLDERS` that exist, "train" at least. The note for "train" names the
        folders that are not splits.

    Raises:
        ValueError: A folder is missing or cannot be read, or the splits have different classes.
    """
    folders = [entry.name for entry in visible_entries(root) if entry.is_dir()]
    folder_of_split = {}
    for split, names in SPLIT_FOLDERS.items():
        existing = [name for name in names if name in folders]
        if split == "train" and not existing:
            raise ValueError(f"data.images={root!r} has no folder train/; give {FOLDER_FORM}")
        if len(existing) > 1:
            raise ValueError(
                f"data.images={root!r} has {' and '.join(existing)}; leave only one of them"
            )
        if existing:
            folder_of_split[split] = existing[0]
    splits = {}
    for split, folder in folder_of_split.items():
        splits[split] = _read_split(root, folder)
    _check_same_classes(root, splits, folder_of_split)
    unused = [name for name in folders if name not in folder_of_split.values()]
    if unused:
        note = f"folders that are not splits and are not read: {preview_names(unused)}"
        train = splits["train"]
        splits["train"] = replace(train, note=f"{note}; {train.note}" if train.note else note)
    return splits


def _check_same_classes(
    root: str, splits: dict[str, Images], folder_of_split: dict[str, str]
) -> None:
    train_classes = set(splits["train"].classes)
    for split, images in splits.items():
        different = sorted(train_classes.symmetric_difference(images.classes))
        if different:
            raise ValueError(
                f"data.images={root!r}: {folder_of_split[split]}/ and train/ have different "
                f"classes, because {preview_names(different)} is in only one of them; give both "
                "the same class folders"
            )


def _read_split(root: str, name: str) -> Images:
    """Lists the images of one split.

    Folders whose names look the same (`class_name`) are the same class.
    """
    class_folders, num_outside = _find_class_folders(root, name)
    if not class_folders:
        raise ValueError(
            f"data.images={root!r} has no folders of classes in {name}/; give {FOLDER_FORM}"
        )
    classes = sorted(class_folders)
    files_of_class, left_out = list_images([class_folders[label] for label in classes])
    if num_outside:
        left_out[_OUTSIDE] = num_outside
    notes = []
    if left_out:
        notes.append(f"{name}/: {format_left_out(left_out)}")
    similar = names_differing_by_case(classes)
    if similar:
        notes.append(f"{name}/: classes whose names differ by case alone: {preview_names(similar)}")
    num_files = [len(files) for files in files_of_class]
    label_I = np.repeat(np.arange(len(classes)), num_files)
    return Images(_as_array(files_of_class), label_I, tuple(classes), "; ".join(notes))


def _as_array(files_of_class: Iterable[list[str]]) -> np.ndarray:
    """Returns file names as one array of bytes, whose memory worker processes share.

    A list of strings would be copied into each of them, page by page, as its reference counts
    change.
    """
    names: list[bytes] = []
    for files in files_of_class:
        names += map(os.fsencode, files)
    return np.array(names, np.bytes_)


def _find_class_folders(root: str, name: str) -> tuple[dict[str, str], int]:
    """Returns the paths of class folders by class name, and the number of other entries."""
    paths: dict[str, str] = {}
    num_outside = 0
    for entry in visible_entries(Path(root) / name):
        label = class_name(entry.name)
        if not entry.is_dir():
            num_outside += 1
        elif not label or not _is_printable(entry.name):
            raise ValueError(
                f"data.images={root!r}: {name}/ has a class {entry.name!r}, which cannot be "
                "printed; rename it"
            )
        elif label in paths:
            raise ValueError(
                f"data.images={root!r}: {name}/ has two folders for one class, "
                f"{os.path.basename(paths[label])!r} and {entry.name!r}; move the files of one to "
                "the other"
            )
        else:
            paths[label] = entry.path
    return paths, num_outside


def _is_printable(name: str) -> bool:
    """Returns whether a name contains neither control characters nor surrogates."""
    return all(unicodedata.category(character) not in ("Cc", "Cs") for character in name.strip())
