"""Where images come from: bundled ones, known sets in a folder, or any folder with a folder for each class.

Legend: I images of a split, N classes, Y and X pixels.
"""

import gzip
import lzma
import os
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from moe_dist.config.messages import nearest
from moe_dist.config.schema import ImageDataConfig
from moe_dist.data.class_names import class_name, names_differing_by_case, preview_names
from moe_dist.data.files.regular_file import open_file
from moe_dist.data.images.image_files import (
    check_heads,
    entries,
    list_images,
    open_image,
    told_left_out,
)
from moe_dist.data.images.torchvision_import import import_torchvision
from moe_dist.monitoring.progress_bar import with_progress
from moe_dist.nn import prng

BUNDLED = "bundled"
# name -> (torchvision's class, what it looks for below its root)
SETS = {
    "fashion_mnist": (
        "FashionMNIST",
        "train-images-idx3-ubyte.gz and three more, or FashionMNIST/raw",
    ),
    "cifar10": ("CIFAR10", "cifar-10-batches-py"),
    "cifar100": ("CIFAR100", "cifar-100-python"),
}
DEBIAN_NAMES = {
    "train": "train",
    "test": "t10k",
}  # as the files of Debian's dataset-fashion-mnist begin
FOLDERS = {"train": ("train",), "valid": ("valid", "val", "validation"), "test": ("test",)}
GIVE = (
    f"give {BUNDLED!r}, {', '.join(map(repr, SETS))} with data.image_root, or a folder that holds train/CLASS/IMAGE "
    "files, and valid/ or test/ or both beside train/"
)
MOST_HELD_OUT = 10_000
LOOKED_AT = 500  # images that tell whether a source has colors
GRAY_MODES = ("1", "L", "LA", "La")  # of PIL
BLOCK = 4096  # bytes at the ends of a file that tell it from others


@dataclass(frozen=True)
class Images:
    """What a source holds of one split, as it lies there."""

    item_I: np.ndarray  # uint8 pixels (I, Y, X) or (I, Y, X, 3); or names of files, as bytes
    label_I: np.ndarray  # int64
    classes: tuple[str, ...]
    note: str = ""  # of a folder: what in it was not taken, for people

    def __len__(self) -> int:
        return len(self.label_I)

    def take(self, index: np.ndarray) -> "Images":
        """Some of the images, in their old order."""
        index = np.sort(index)
        return replace(self, item_I=self.item_I[index], label_I=self.label_I[index])

    def open(self, i: int, mode: str) -> Image.Image:
        """Image `i`, in PIL's `mode`. Raises ValueError for a file that cannot be read, naming it."""
        item = self.item_I[i]
        return (
            Image.fromarray(item).convert(mode)
            if isinstance(item, np.ndarray)
            else open_image(item, mode)
        )

    def channels(self) -> int:
        """Returns 1 where all images, or `LOOKED_AT` of all classes alike where they are more, are gray, else 3.

        Raises:
            ValueError: for a file that cannot be read, naming it.
        """
        for i in np.unique(np.linspace(0, len(self) - 1, LOOKED_AT).astype(int)).tolist():
            item = self.item_I[i]
            if isinstance(item, np.ndarray):
                pixel_YXQ = np.asarray(Image.fromarray(item).convert("RGB"))
            elif open_image(item, None).mode in GRAY_MODES:
                continue
            else:
                pixel_YXQ = np.asarray(open_image(item, "RGB", side=64))
            if (pixel_YXQ != pixel_YXQ[..., :1]).any():
                return 3
        return 1

    def check_files(self) -> np.ndarray:
        """Reads the head of every file, with a bar on stderr where that takes longer than two seconds.

        Returns:
            A number for each file, int64 (I,), the same for files of one size whose first and last `BLOCK` bytes are
            the same; (0,) for images in memory.

        Raises:
            ValueError: for files that hold no image, with their number, naming the first ones.
        """
        files: Iterable[bytes] = self.item_I if self.item_I.ndim == 1 else ()
        check_heads(with_progress(files, "image files"))
        return np.array(
            [_digest_of(file) for file in with_progress(files, "image contents")], np.int64
        )


def _digest_of(file: bytes) -> int:
    with open_file(file) as opened:
        head = opened.read(BLOCK)
        size = opened.seek(0, os.SEEK_END)
        opened.seek(max(0, size - BLOCK))
        digest = blake2b(head + opened.read(BLOCK) + str(size).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def open_splits(data: ImageDataConfig) -> dict[str, Images]:
    """Images of "train", "valid" and "test". Files of a folder are listed and not opened.

    A source's own splits are used. Without "valid", a tenth of "train" is held out for it, at most 10,000 images, the
    same ones for every seed; a folder without test/ has its valid/ for "test", and so "valid" held out of train/.
    Raises ValueError for images that cannot be found, read or split.
    """
    own = _own_splits(data)
    if "test" not in own:
        if "valid" not in own:
            raise ValueError(
                f"data.images={data.images!r} has neither test/ nor valid/ beside train/: give one"
            )
        own["test"] = own.pop("valid")
    splits = own if "valid" in own else own | _hold_out(own["train"])
    for split, images in splits.items():
        count_N = np.bincount(images.label_I, minlength=len(images.classes))
        if len(images) == 0:
            raise ValueError(
                f"data.images={data.images!r} has no image for {split!r}: give it some; where valid/ is missing, a "
                f"tenth of train is held out for it, which takes at least 10 images{_also(images.note)}"
            )
        if len(count_N) > len(images.classes):
            raise ValueError(
                f"data.images={data.images!r} has label {len(count_N) - 1} in {split!r}, but {len(images.classes)} "
                f"classes: labels go from 0 to {len(images.classes) - 1}"
            )
        if split in own and not count_N.all():
            empty = [images.classes[label] for label in np.flatnonzero(count_N == 0)]
            raise ValueError(
                f"data.images={data.images!r} has classes without an image in {split!r} ({preview_names(empty)}): give each "
                f"some, or leave it out of all splits{_also(images.note)}"
            )
    return {split: splits[split] for split in FOLDERS}


def _hold_out(train: Images) -> dict[str, Images]:
    """A "valid" out of "train", and "train" without it."""
    order_I = prng.uniform(len(train), "valid").argsort(stable=True).numpy()
    num_held_out = min(len(train) // 10, MOST_HELD_OUT)
    return {
        "train": train.take(order_I[num_held_out:]),
        "valid": train.take(order_I[:num_held_out]),
    }


def _own_splits(data: ImageDataConfig) -> dict[str, Images]:
    """What the source has of FOLDERS, "train" at least."""
    if data.images in SETS:
        return _known_set(data.images, data.image_root)
    if data.image_root is not None:
        raise ValueError(
            f"data.image_root={data.image_root!r} has no meaning with data.images={data.images!r}: it is for "
            f"{', '.join(SETS)}; another folder is data.images itself"
        )
    if data.images == BUNDLED:
        return {split: _bundled(split) for split in DEBIAN_NAMES}
    if not data.images or not os.path.isdir(data.images):
        raise ValueError(
            f"data.images={data.images!r} is no folder and no known name; "
            f"{nearest(data.images, (BUNDLED, *SETS))}; {GIVE}"
        )
    return _folder(data.images)


def _bundled(split: str) -> Images:
    """Fashion-MNIST's first 6,000 and 1,000 images, balanced by class."""
    packed = (Path(__file__).parents[1] / "bundled" / f"fashion_{split}.xz").read_bytes()
    raw = np.frombuffer(lzma.decompress(packed), np.uint8)
    num = len(raw) // (1 + 28 * 28)
    return Images(raw[num:].reshape(num, 28, 28), raw[:num].astype(np.int64), _fashion_classes())


def _fashion_classes() -> tuple[str, ...]:
    return tuple(import_torchvision().datasets.FashionMNIST.classes)


def _known_set(name: str, root: str | None) -> dict[str, Images]:
    kind, below = SETS[name]
    if root is None or not os.path.isdir(root):
        raise ValueError(
            f"data.image_root={root!r} is no folder: data.images={name!r} needs the one that holds {below}"
        )
    datasets = import_torchvision().datasets
    try:
        if (
            name == "fashion_mnist"
            and (Path(root) / f"{DEBIAN_NAMES['train']}-images-idx3-ubyte.gz").is_file()
        ):
            return {split: _debian(Path(root), first) for split, first in DEBIAN_NAMES.items()}
        return {split: _stored(getattr(datasets, kind), root, split) for split in DEBIAN_NAMES}
    except Exception as error:  # of many kinds: files that are missing, damaged or cut short
        reason = " ".join(str(error).split()).removesuffix(
            " You can use download=True to download it"
        )
        raise ValueError(
            f"data.image_root={root!r} has no whole {name} ({reason}): give the folder that holds {below}, as "
            f"torchvision stores it"
        ) from error


def _stored(kind: Any, root: str, split: str) -> Images:
    for here, _, _ in os.walk(Path(root) / getattr(kind, "base_folder", kind.__name__)):
        entries(here)  # raises for a pipe, which torchvision would wait for
    opened = kind(root, train=split == "train", download=False)
    return _in_memory(np.asarray(opened.data), np.asarray(opened.targets), tuple(opened.classes))


def _debian(root: Path, first: str) -> Images:
    image_I, label_I = (
        read_idx(root / f"{first}-{what}-ubyte.gz") for what in ("images-idx3", "labels-idx1")
    )
    return _in_memory(image_I, label_I, _fashion_classes())


def _in_memory(image_I: np.ndarray, label_I: np.ndarray, classes: tuple[str, ...]) -> Images:
    if len(image_I) != len(label_I):
        raise ValueError(f"{len(image_I)} images and {len(label_I)} labels")
    return Images(np.ascontiguousarray(image_I), label_I.astype(np.int64), classes)


def read_idx(path: Path) -> np.ndarray:
    """Bytes of an idx.gz file, in its shape: the fourth byte is the number of dimensions, then come their sizes."""
    with open_file(path) as file:
        raw = gzip.decompress(file.read())
    shape = np.frombuffer(raw, ">u4", count=raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def _folder(root: str) -> dict[str, Images]:
    folders = [entry.name for entry in entries(root) if entry.is_dir()]
    found = {split: [name for name in names if name in folders] for split, names in FOLDERS.items()}
    if not found["train"]:
        raise ValueError(f"data.images={root!r} has no folder train/: {GIVE}")
    if len(found["valid"]) > 1:
        raise ValueError(f"data.images={root!r} has {' and '.join(found['valid'])}: leave one")
    splits = {split: _class_folders(root, names[0]) for split, names in found.items() if names}
    in_train = set(splits["train"].classes)
    for split, images in splits.items():
        if differing := sorted(in_train ^ set(images.classes)):
            raise ValueError(
                f"data.images={root!r}: {found[split][0]}/ and train/ have different classes, for {preview_names(differing)} "
                f"is in one of them alone: give both the same folders"
            )
    if unread := [name for name in folders if [name] not in found.values()]:
        note = f"folders that are no split and are not read: {preview_names(unread)}{_also(splits['train'].note)}"
        splits["train"] = replace(splits["train"], note=note)
    return splits


def _class_folders(root: str, name: str) -> Images:
    """Lists the images of one split. Folders whose names look the same (`class_name`) are the same class."""
    place = Path(root) / name
    folders: dict[str, str] = {}
    beside = 0
    for entry in entries(place):
        shown = class_name(entry.name)
        if not entry.is_dir():
            beside += 1
        elif not shown or any(unicodedata.category(c) in ("Cc", "Cs") for c in entry.name.strip()):
            raise ValueError(
                f"data.images={root!r}: {name}/ has a class {entry.name!r}, which cannot be printed: rename it"
            )
        elif shown in folders:
            raise ValueError(
                f"data.images={root!r}: {name}/ has two folders for one class, "
                f"{os.path.basename(folders[shown])!r} and {entry.name!r}: move the files of one to the other"
            )
        else:
            folders[shown] = entry.path
    if not folders:
        raise ValueError(f"data.images={root!r} has no folders of classes in {name}/: {GIVE}")
    classes = sorted(folders)
    found, left_out = list_images([folders[shown] for shown in classes])
    if beside:
        left_out["beside the folders of classes"] = beside
    notes = [f"{name}/: {told_left_out(left_out)}"] if left_out else []
    if similar := names_differing_by_case(classes):
        notes.append(f"{name}/: classes whose names differ by case alone: {preview_names(similar)}")
    # An array of bytes, because worker processes share its memory; strings they would copy one by one.
    item_I = np.array([os.fsencode(path) for files in found for path in files], np.bytes_)
    label_I = np.repeat(np.arange(len(found)), [len(files) for files in found])
    return Images(item_I, label_I, tuple(classes), "; ".join(notes))


def _also(note: str) -> str:
    return f"; {note}" if note else ""
