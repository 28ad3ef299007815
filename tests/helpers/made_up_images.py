"""Images, files of images and splits made up by hand."""

import dataclasses
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from moe_dist.config.schema import ImageDataConfig, VisionConfig
from moe_dist.data.images.image_set import Images
from moe_dist.data.images.pipeline import (
    AugmentedImages,
    ImageSplit,
    check_images,
)
from moe_dist.nn import prng

GRAY = VisionConfig(image_size=28, channels=1, patch_size=4, num_classes=10)


def numbered(num: int, samples: int, train: bool = True, **changes: Any) -> ImageSplit:
    """Returns images of 4 x 4 equal bytes, which are the number of the image; the label is
    that modulo 10."""
    byte_I = np.arange(num, dtype=np.uint8)
    item_IYX = np.broadcast_to(byte_I[:, None, None], (num, 4, 4)).copy()
    images = Images(item_IYX, byte_I.astype(np.int64) % 10, tuple("0123456789"))
    model = dataclasses.replace(GRAY, image_size=4)
    return ImageSplit(images, ImageDataConfig(**changes), model, samples, 5, train)


def picture(seed: int, *shape: int) -> np.ndarray:
    return (prng.uniform(int(np.prod(shape)), "picture", seed) * 256).byte().view(*shape).numpy()


def same(a: AugmentedImages, b: AugmentedImages) -> bool:
    return all(
        torch.equal(getattr(a, f.name), getattr(b, f.name))
        for f in dataclasses.fields(AugmentedImages)
    )


def joined(batches: list[AugmentedImages]) -> AugmentedImages:
    return AugmentedImages(
        *(
            torch.cat([getattr(b, f.name) for b in batches])
            for f in dataclasses.fields(AugmentedImages)
        )
    )


def files(folder: Path, tree: dict[str, int]) -> Path:
    """Writes gray PNG files of 6 x 8 pixels, the given number for each "split/class"."""
    for place, num in tree.items():
        (folder / place).mkdir(parents=True, exist_ok=True)
        for i in range(num):
            Image.fromarray(picture(i, 6, 8)).save(folder / place / f"{i}.png")
    return folder


def told(data: ImageDataConfig, message: str, model: VisionConfig = GRAY) -> None:
    """Checks that opening the data raises one line with `message` before training."""
    with pytest.raises(ValueError, match=message) as error:
        check_images(data, model)
    assert "\n" not in str(error.value)


def png(width: int, height: int) -> bytes:
    """Returns a PNG of a single color: a megabyte for each gigabyte of pixels."""
    parts = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"")),
        (b"IEND", b""),
    )
    blocks = [
        struct.pack(">I", len(d)) + t + d + struct.pack(">I", zlib.crc32(t + d)) for t, d in parts
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(blocks)
