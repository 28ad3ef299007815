"""One split's images: pixels in memory or file names, with labels.

Legend: I images of a split, Y and X pixels, Q color channels.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from hashlib import blake2b

import numpy as np
from PIL import Image

from moe_dist.data.files.regular_file import open_file
from moe_dist.data.images.image_files import check_heads, open_image
from moe_dist.monitoring.progress_bar import with_progress

DIGEST_BLOCK_BYTES = 4096  # at each end of a file
_NUM_COLOR_SAMPLES = 500  # images that decide whether a set has colors
_COLOR_SAMPLE_SIDE = 64  # pixels to which these are decoded at least
_GRAY_MODES = ("1", "L", "LA", "La")  # of PIL


@dataclass(frozen=True)
class Images:
    """One split's images, as the source stores them.

    Attributes:
        item_I: uint8 pixels (I, Y, X) or (I, Y, X, 3), or file names as bytes (I,).
        label_I: Class numbers (I,), int64.
        classes: The class names.
        note: For a folder: the entries that were left out, for the user.
    """

    item_I: np.ndarray
    label_I: np.ndarray
    classes: tuple[str, ...]
    note: str = ""

    def __len__(self) -> int:
        return len(self.label_I)

    def take(self, index: np.ndarray) -> "Images":
        """Returns the images with these numbers, in their old order."""
        index = np.sort(index)
        return replace(self, item_I=self.item_I[index], label_I=self.label_I[index])

    def open(self, i: int, mode: str) -> Image.Image:
        """Returns one image.

        Args:
            i: The image's number.
            mode: PIL's mode to which it is converted.

        Returns:
            The decoded image.

        Raises:
            ValueError: The file cannot be read; the message names it.
        """
        item = self.item_I[i]
        if isinstance(item, np.ndarray):
            return Image.fromarray(item).convert(mode)
        return open_image(item, mode)

    def channels(self) -> int:
        """Returns the number of color channels that the images need.

        If there are more than 500 images, 500 at equal distances are examined. Folders are sorted
        by class, so that these include all classes.

        Returns:
            1 if all images are gray, 3 if one image has colors.

        Raises:
            ValueError: A file cannot be read; the message names it.
        """
        index = np.linspace(0, len(self) - 1, _NUM_COLOR_SAMPLES).astype(int)
        for i in np.unique(index).tolist():
            item = self.item_I[i]
            if isinstance(item, np.ndarray):
                image = Image.fromarray(item).convert("RGB")
            elif open_image(item, None).mode in _GRAY_MODES:
                continue
            else:
                image = open_image(item, "RGB", min_side=_COLOR_SAMPLE_SIDE)
            pixel_YXQ = np.asarray(image)
            if (pixel_YXQ != pixel_YXQ[..., :1]).any():
                return 3
        return 1

    def check_files(self) -> np.ndarray:
        """Reads the head of every file, with a progress bar on stderr after two seconds.

        Returns:
            A number for each file, int64 (I,), which is equal for files with the same size whose
            first and last `DIGEST_BLOCK_BYTES` bytes are equal; (0,) for images in memory.

        Raises:
            ValueError: Files are not images. The message has their number and names the first ones.
        """
        files: Iterable[bytes] = self.item_I if self.item_I.ndim == 1 else ()
        check_heads(with_progress(files, "image files"))
        digests = [_digest(file) for file in with_progress(files, "image contents")]
        return np.array(digests, np.int64)


def _digest(file: bytes) -> int:
    """Returns a hash of the size, the first and the last block of a file."""
    with open_file(file) as stream:
        head = stream.read(DIGEST_BLOCK_BYTES)
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - DIGEST_BLOCK_BYTES))
        tail = stream.read(DIGEST_BLOCK_BYTES)
    digest = blake2b(head + tail + str(size).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
