"""Where images come from: embedded ones, known sets in a folder, or any folder with a folder for each class.

Legend: I images of a split, N classes, Y and X pixels.
"""

import gzip
import lzma
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from moe_dist import keyed
from moe_dist.config import ImageDataConfig, nearest
from moe_dist.data.progress import told
from moe_dist.data.vision import import_torchvision

EMBEDDED = "embedded"
# name -> (torchvision's class, what it looks for below its root)
SETS = {
    "fashion_mnist": ("FashionMNIST", "train-images-idx3-ubyte.gz and three more, or FashionMNIST/raw"),
    "cifar10": ("CIFAR10", "cifar-10-batches-py"),
    "cifar100": ("CIFAR100", "cifar-100-python"),
}
DEBIAN_NAMES = {"train": "train", "test": "t10k"}  # as the files of Debian's dataset-fashion-mnist begin
FOLDERS = {"train": ("train",), "valid": ("valid", "val", "validation"), "test": ("test",)}
GIVE = (
    f"give {EMBEDDED!r}, {', '.join(map(repr, SETS))} with data.image_root, or a folder that holds train/CLASS/IMAGE "
    "files, and valid/ or test/ or both beside train/"
)
MOST_HELD_OUT = 10_000


@dataclass(frozen=True)
class Images:
    """What a source holds of one split, as it lies there."""

    item_I: np.ndarray  # uint8 pixels (I, Y, X) or (I, Y, X, 3); or names of files, as bytes
    label_I: np.ndarray  # int64
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.label_I)

    def take(self, index: np.ndarray) -> "Images":
        """Some of the images, in their old order."""
        index = np.sort(index)
        return Images(self.item_I[index], self.label_I[index], self.classes)

    def open(self, i: int, mode: str) -> Image.Image:
        """Image `i`, in PIL's `mode`. Raises ValueError for a file that cannot be read, naming it."""
        item = self.item_I[i]
        return Image.fromarray(item).convert(mode) if isinstance(item, np.ndarray) else open_file(item, mode)

    def check_files(self) -> None:
        """Reads the head of every file, and says so where it takes longer than two seconds. Raises ValueError for
        one that holds no image, naming it."""
        files: Iterable[bytes] = self.item_I if self.item_I.ndim == 1 else ()
        for file in told(files, "image files"):
            open_file(file, None)


def open_file(path: str | bytes | os.PathLike[str], mode: str | None) -> Image.Image:
    """An image file, decoded to PIL's `mode`; without one, its head alone. Raises ValueError naming a broken file."""
    try:
        with Image.open(os.fsdecode(path)) as image:
            if image.mode[0] in "IF":  # which `convert` would cut off at 255
                raise ValueError(f"its numbers are of PIL's mode {image.mode}, more than 8 bits: make them bytes")
            return image.convert(mode) if mode else image
    except Exception as error:  # of many kinds: what a broken file does to a decoder
        reason = " ".join(str(error).split())
        raise ValueError(f"{os.fsdecode(path)!r} is no image that can be read ({reason}): mend or remove it") from error


def open_splits(data: ImageDataConfig) -> dict[str, Images]:
    """Images of "train", "valid" and "test". Files of a folder are listed and not opened.

    A source's own splits are used. Without "valid", a tenth of "train" is held out for it, at most 10,000 images, the
    same ones for every seed; a folder without test/ has its valid/ for "test", and so "valid" held out of train/.
    Raises ValueError for images that cannot be found, read or split.
    """
    own = _own_splits(data)
    if "test" not in own:
        if "valid" not in own:
            raise ValueError(f"data.images={data.images!r} has neither test/ nor valid/ beside train/: give one")
        own["test"] = own.pop("valid")
    splits = own if "valid" in own else own | _hold_out(own["train"])
    for split, images in splits.items():
        count_N = np.bincount(images.label_I, minlength=len(images.classes))
        if len(images) == 0:
            raise ValueError(
                f"data.images={data.images!r} has no image for {split!r}: give it some; where valid/ is missing, a "
                f"tenth of train is held out for it, which takes at least 10 images"
            )
        if len(count_N) > len(images.classes):
            raise ValueError(
                f"data.images={data.images!r} has label {len(count_N) - 1} in {split!r}, but {len(images.classes)} "
                f"classes: labels go from 0 to {len(images.classes) - 1}"
            )
        if split in own and not count_N.all():
            empty = [images.classes[label] for label in np.flatnonzero(count_N == 0)]
            raise ValueError(
                f"data.images={data.images!r} has classes without an image in {split!r} ({_some(empty)}): give each "
                f"some, or leave it out of all splits"
            )
    return {split: splits[split] for split in FOLDERS}


def _hold_out(train: Images) -> dict[str, Images]:
    """A "valid" out of "train", and "train" without it."""
    order_I = keyed.uniform(len(train), "valid").argsort(stable=True).numpy()
    num_held_out = min(len(train) // 10, MOST_HELD_OUT)
    return {"train": train.take(order_I[num_held_out:]), "valid": train.take(order_I[:num_held_out])}


def _own_splits(data: ImageDataConfig) -> dict[str, Images]:
    """What the source has of FOLDERS, "train" at least."""
    if data.images in SETS:
        return _known_set(data.images, data.image_root)
    if data.image_root is not None:
        raise ValueError(
            f"data.image_root={data.image_root!r} has no meaning with data.images={data.images!r}: it is for "
            f"{', '.join(SETS)}; another folder is data.images itself"
        )
    if data.images == EMBEDDED:
        return {split: _embedded(split) for split in DEBIAN_NAMES}
    if not data.images or not Path(data.images).is_dir():
        raise ValueError(
            f"data.images={data.images!r} is no folder and no known name; "
            f"{nearest(data.images, (EMBEDDED, *SETS))}; {GIVE}"
        )
    return _folder(data.images)


def _embedded(split: str) -> Images:
    """Fashion-MNIST's first 6,000 and 1,000 images, balanced by class."""
    packed = (Path(__file__).parent / "embedded" / f"fashion_{split}.xz").read_bytes()
    raw = np.frombuffer(lzma.decompress(packed), np.uint8)
    num = len(raw) // (1 + 28 * 28)
    return Images(raw[num:].reshape(num, 28, 28), raw[:num].astype(np.int64), _fashion_classes())


def _fashion_classes() -> tuple[str, ...]:
    return tuple(import_torchvision().datasets.FashionMNIST.classes)


def _known_set(name: str, root: str | None) -> dict[str, Images]:
    kind, below = SETS[name]
    if root is None or not Path(root).is_dir():
        raise ValueError(
            f"data.image_root={root!r} is no folder: data.images={name!r} needs the one that holds {below}"
        )
    datasets = import_torchvision().datasets
    try:
        if name == "fashion_mnist" and (Path(root) / f"{DEBIAN_NAMES['train']}-images-idx3-ubyte.gz").is_file():
            return {split: _debian(Path(root), first) for split, first in DEBIAN_NAMES.items()}
        return {split: _stored(getattr(datasets, kind), root, split) for split in DEBIAN_NAMES}
    except Exception as error:  # of many kinds: files that are missing, damaged or cut short
        reason = " ".join(str(error).split()).removesuffix(" You can use download=True to download it")
        raise ValueError(
            f"data.image_root={root!r} has no whole {name} ({reason}): give the folder that holds {below}, as "
            f"torchvision stores it"
        ) from error


def _stored(kind: Any, root: str, split: str) -> Images:
    opened = kind(root, train=split == "train", download=False)
    return _in_memory(np.asarray(opened.data), np.asarray(opened.targets), tuple(opened.classes))


def _debian(root: Path, first: str) -> Images:
    image_I, label_I = (read_idx(root / f"{first}-{what}-ubyte.gz") for what in ("images-idx3", "labels-idx1"))
    return _in_memory(image_I, label_I, _fashion_classes())


def _in_memory(image_I: np.ndarray, label_I: np.ndarray, classes: tuple[str, ...]) -> Images:
    if len(image_I) != len(label_I):
        raise ValueError(f"{len(image_I)} images and {len(label_I)} labels")
    return Images(np.ascontiguousarray(image_I), label_I.astype(np.int64), classes)


def read_idx(path: Path) -> np.ndarray:
    """Bytes of an idx.gz file, in its shape: the fourth byte is the number of dimensions, then come their sizes."""
    raw = gzip.decompress(path.read_bytes())
    shape = np.frombuffer(raw, ">u4", count=raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def _folder(root: str) -> dict[str, Images]:
    found = {split: [name for name in names if (Path(root) / name).is_dir()] for split, names in FOLDERS.items()}
    if not found["train"]:
        raise ValueError(f"data.images={root!r} has no folder train/: {GIVE}")
    if len(found["valid"]) > 1:
        raise ValueError(f"data.images={root!r} has {' and '.join(found['valid'])}: leave one")
    splits = {split: _class_folders(root, names[0]) for split, names in found.items() if names}
    in_train = set(splits["train"].classes)
    for split, images in splits.items():
        if differing := sorted(in_train ^ set(images.classes)):
            raise ValueError(
                f"data.images={root!r}: {found[split][0]}/ and train/ have different classes, for {_some(differing)} "
                f"is in one of them alone: give both the same folders"
            )
    return splits


def _class_folders(root: str, name: str) -> Images:
    try:
        found = import_torchvision().datasets.ImageFolder(str(Path(root) / name), allow_empty=True)
    except OSError as error:  # no folder for any class, or no right to read one
        raise ValueError(f"data.images={root!r} has no folders of classes in {name}/ ({error}): {GIVE}") from error
    # An array of bytes, because worker processes share its memory; strings they would copy one by one.
    files = np.array([os.fsencode(path) for path, _ in found.samples], dtype=np.bytes_)
    return Images(files, np.array(found.targets, dtype=np.int64), tuple(found.classes))


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
