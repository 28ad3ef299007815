"""Image sets with a known form: the bundled images, Fashion-MNIST and CIFAR.

Legend: I images of a split, Y and X pixels.
"""

import gzip
import lzma
import os
from pathlib import Path
from typing import Any

import numpy as np

from moe_dist.data.files.regular_file import open_file
from moe_dist.data.images.image_files import visible_entries
from moe_dist.data.images.image_set import Images
from moe_dist.data.images.torchvision_import import import_torchvision

BUNDLED = "bundled"
# name -> (torchvision's class, the files that it reads below its root)
KNOWN_SETS = {
    "fashion_mnist": (
        "FashionMNIST",
        "train-images-idx3-ubyte.gz and three more, or FashionMNIST/raw",
    ),
    "cifar10": ("CIFAR10", "cifar-10-batches-py"),
    "cifar100": ("CIFAR100", "cifar-100-python"),
}
# prefixes of the files in Debian's package dataset-fashion-mnist, by split
DEBIAN_NAMES = {"train": "train", "test": "t10k"}
_BUNDLED_SIDE = 28  # pixels


def bundled_images() -> dict[str, Images]:
    """Returns the first 6,000 and 1,000 images of Fashion-MNIST, balanced by class.

    Returns:
        The splits "train" and "test".
    """
    return {split: _bundled_split(split) for split in DEBIAN_NAMES}


def known_set(name: str, root: str | None) -> dict[str, Images]:
    """Reads an image set as torchvision or Debian store it.

    Args:
        name: A key in `KNOWN_SETS`.
        root: The folder that contains the set, data.image_root.

    Returns:
        The splits "train" and "test", in memory.

    Raises:
        ValueError: The folder does not contain the complete set.
    """
    class_name, contents = KNOWN_SETS[name]
    if root is None or not os.path.isdir(root):
        raise ValueError(
            f"data.image_root={root!r} is not a folder; data.images={name!r} needs the folder that "
            f"contains {contents}"
        )
    datasets = import_torchvision().datasets
    first_debian_file = Path(root, f"{DEBIAN_NAMES['train']}-images-idx3-ubyte.gz")
    splits = {}
    try:
        if name == "fashion_mnist" and first_debian_file.is_file():
            for split, prefix in DEBIAN_NAMES.items():
                splits[split] = _debian_split(Path(root), prefix)
        else:
            for split in DEBIAN_NAMES:
                splits[split] = _torchvision_split(getattr(datasets, class_name), root, split)
    except Exception as error:  # many types, for missing, damaged and truncated files
        advice = " You can use download=True to download it"
        reason = " ".join(str(error).split()).removesuffix(advice)
        raise ValueError(
            f"data.image_root={root!r} does not contain the complete {name} ({reason}); give the "
            f"folder that contains {contents}, as torchvision stores it"
        ) from error
    return splits


def read_idx(path: Path) -> np.ndarray:
    """Returns the array of an .idx.gz file, uint8, in its shape.

    The fourth byte is the dimension count; the sizes follow it.
    """
    with open_file(path) as file:
        raw = gzip.decompress(file.read())
    num_dims = raw[3]
    shape = np.frombuffer(raw, ">u4", count=num_dims, offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * num_dims).reshape(shape)


def _bundled_split(split: str) -> Images:
    """Returns a bundled split: the file contains all labels, then all images."""
    path = Path(__file__).parents[1] / "bundled" / f"fashion_{split}.xz"
    raw = np.frombuffer(lzma.decompress(path.read_bytes()), np.uint8)
    num_images = len(raw) // (1 + _BUNDLED_SIDE * _BUNDLED_SIDE)
    item_IYX = raw[num_images:].reshape(num_images, _BUNDLED_SIDE, _BUNDLED_SIDE)
    label_I = raw[:num_images].astype(np.int64)
    return Images(item_IYX, label_I, _fashion_classes())


def _fashion_classes() -> tuple[str, ...]:
    return tuple(import_torchvision().datasets.FashionMNIST.classes)


def _torchvision_split(dataset_class: Any, root: str, split: str) -> Images:
    folder_name = getattr(dataset_class, "base_folder", dataset_class.__name__)
    for folder, _, _ in os.walk(Path(root) / folder_name):
        visible_entries(folder)  # raises an error for a pipe, on which torchvision blocks
    dataset = dataset_class(root, train=split == "train", download=False)
    return _in_memory(np.asarray(dataset.data), np.asarray(dataset.targets), tuple(dataset.classes))


def _debian_split(root: Path, prefix: str) -> Images:
    item_IYX = read_idx(root / f"{prefix}-images-idx3-ubyte.gz")
    label_I = read_idx(root / f"{prefix}-labels-idx1-ubyte.gz")
    return _in_memory(item_IYX, label_I, _fashion_classes())


def _in_memory(item_I: np.ndarray, label_I: np.ndarray, classes: tuple[str, ...]) -> Images:
    if len(item_I) != len(label_I):
        raise ValueError(f"{len(item_I)} images and {len(label_I)} labels")
    return Images(np.ascontiguousarray(item_I), label_I.astype(np.int64), classes)
