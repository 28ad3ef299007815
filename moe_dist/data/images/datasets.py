"""Image data sets by split: bundled images, known sets, or a folder with a folder for each class.

Legend: I images of a split, N classes.
"""

import os

import numpy as np

from moe_dist.config.messages import nearest
from moe_dist.config.schema import ImageDataConfig
from moe_dist.data.class_names import preview_names
from moe_dist.data.images.class_folders import FOLDER_FORM, SPLIT_FOLDERS, read_class_folders
from moe_dist.data.images.image_set import Images
from moe_dist.data.images.known_sets import BUNDLED, KNOWN_SETS, bundled_images, known_set
from moe_dist.nn import prng

MAX_HELD_OUT = 10_000  # images


def open_splits(data: ImageDataConfig) -> dict[str, Images]:
    """Returns the splits of an image data set. Files of a folder are listed, but not opened.

    The source's own splits are used. Without "valid", a tenth of "train" is held
    out for it, at most 10,000 images, independent of the seed. If a folder has no test/, its valid/
    is "test", and "valid" is held out of train/.

    Args:
        data: The config section.

    Returns:
        "train", "valid" and "test".

    Raises:
        ValueError: The images cannot be found, read or split.
    """
    own = _own_splits(data)
    if "test" not in own:
        if "valid" not in own:
            raise ValueError(
                f"data.images={data.images!r} has neither test/ nor valid/ next to train/; "
                "add one of them"
            )
        own["test"] = own.pop("valid")
    splits = own if "valid" in own else own | _hold_out(own["train"])
    for split, images in splits.items():
        _check_labels(data, split, images, every_class=split in own)
    return {split: splits[split] for split in SPLIT_FOLDERS}


def _own_splits(data: ImageDataConfig) -> dict[str, Images]:
    """Returns the splits that the source has, "train" at least."""
    known = ", ".join(KNOWN_SETS)
    if data.images in KNOWN_SETS:
        return known_set(data.images, data.image_root)
    if data.image_root is not None:
        raise ValueError(
            f"data.image_root={data.image_root!r} has no effect with data.images={data.images!r}; "
            f"it is for {known}; give another folder as data.images"
        )
    if data.images == BUNDLED:
        return bundled_images()
    if not data.images or not os.path.isdir(data.images):
        raise ValueError(
            f"data.images={data.images!r} is neither a folder nor a known name; "
            f"{nearest(data.images, (BUNDLED, *KNOWN_SETS))}; give {BUNDLED!r}, {known} with "
            f"data.image_root, or {FOLDER_FORM}"
        )
    return read_class_folders(data.images)


def _hold_out(train: Images) -> dict[str, Images]:
    """Returns a "valid" out of "train", and "train" without it."""
    order_I = prng.uniform(len(train), "valid").argsort(stable=True).numpy()
    num_held_out = min(len(train) // 10, MAX_HELD_OUT)
    return {
        "train": train.take(order_I[num_held_out:]),
        "valid": train.take(order_I[:num_held_out]),
    }


def _check_labels(data: ImageDataConfig, split: str, images: Images, every_class: bool) -> None:
    """Raises ValueError for a split without images, and for wrong labels.

    With `every_class`, each class must have an image.
    """
    place = f"data.images={data.images!r}"
    note = f"; {images.note}" if images.note else ""
    num_classes = len(images.classes)
    count_N = np.bincount(images.label_I, minlength=num_classes)
    if len(images) == 0:
        raise ValueError(
            f"{place} has no image for {split!r}; add some (without valid/, a tenth of train is "
            f"held out for it, which needs at least 10 images){note}"
        )
    if len(count_N) > num_classes:
        raise ValueError(
            f"{place} has label {len(count_N) - 1} in {split!r}, but {num_classes} classes; labels "
            f"must be in 0..{num_classes - 1}"
        )
    if every_class and not count_N.all():
        empty = [images.classes[label] for label in np.flatnonzero(count_N == 0)]
        raise ValueError(
            f"{place} has classes without an image in {split!r} ({preview_names(empty)}); add "
            f"images, or remove the class from all splits{note}"
        )
