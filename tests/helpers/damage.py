"""Damaged image files, for a short test (test_image_files.py) and for longer runs by hand."""

import io
import os
import random
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from moe_dist.data.images.image_files import open_image

# PIL's format and mode of the whole files, one of each kind of decoder
WHOLE = (
    ("png", "RGBA"),
    ("png", "P"),
    ("png", "I;16"),
    ("jpeg", "RGB"),
    ("jpeg", "CMYK"),
    ("gif", "P"),
    ("webp", "RGB"),
    ("avif", "RGB"),
    ("tiff", "RGB"),
    ("bmp", "RGB"),
    ("ppm", "L"),
    ("jpeg2000", "RGB"),
    ("ico", "RGBA"),
    ("tga", "RGB"),
    ("pcx", "RGB"),
    ("sgi", "RGB"),
    ("dds", "RGBA"),
    ("qoi", "RGB"),
    ("im", "RGB"),
    ("xbm", "1"),
)
OTHERS = (
    b"",
    b"\0",
    b"<html><body>404 Not Found</body></html>",
    b"%PDF-1.7\n",
    b"PK\3\4" + bytes(60),
    b"\xff" * 999,
)


def whole_files() -> list[tuple[str, bytes]]:
    """Returns a small picture in every format of `WHOLE`, as (ending, content)."""
    files = []
    for kind, mode in WHOLE:
        image = (
            Image.effect_noise((37, 23), 60).convert("RGB").convert("L" if mode == "I;16" else mode)
        )
        exif = Image.Exif()
        exif[0x0112] = 6
        content = io.BytesIO()
        options = (
            {"exif": exif, "compression": "tiff_lzw"}
            if kind in ("jpeg", "png", "webp", "tiff")
            else {}
        )
        (image.convert("I;16") if mode == "I;16" else image).save(content, kind, **options)
        files.append((f".{kind}", content.getvalue()))
    return files


def damaged(content: bytes, dice: random.Random) -> bytes:
    """Returns the content cut short, with bits turned, with a stretch of other bytes, or doubled."""
    bytes_ = bytearray(content)
    kind = dice.choice(("cut", "bits", "head", "stretch", "twice"))
    if kind == "cut":
        del bytes_[dice.randrange(len(bytes_)) :]
    elif kind == "stretch":
        start = dice.randrange(len(bytes_))
        bytes_[start : start + dice.randint(1, 200)] = dice.randbytes(dice.randint(0, 200))
    elif kind == "twice":
        start = dice.randrange(len(bytes_))
        bytes_[start:start] = bytes_[: dice.randint(1, len(bytes_))]
    else:
        reach = min(64, len(bytes_)) if kind == "head" else len(bytes_)
        for _ in range(dice.randint(1, 8)):
            bytes_[dice.randrange(reach)] ^= 1 << dice.randrange(8)
    return bytes(bytes_)


def damaged_files(num: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Yields `num` damaged files and files of other kinds, as (ending, content); the ending is
    often another's.
    """
    dice = random.Random(seed)
    files = whole_files()
    for _ in range(num):
        ending, content = dice.choice(files)
        if dice.random() < 0.1:
            ending = dice.choice(files)[0]
        yield ending, (dice.choice(OTHERS) if dice.random() < 0.05 else damaged(content, dice))


def open_damaged_files(folder: Path, num: int, seed: int, seconds: float = 5) -> Counter[str]:
    """Opens `num` damaged files, written one after the other in `folder`, as the trainer does.

    Returns:
        How many were read ("image") and how many refused ("refused").

    Raises:
        AssertionError: where a file is neither read nor refused in one line that names it, or not
            within `step_seconds`.
    """
    outcomes: Counter[str] = Counter()
    for i, (ending, content) in enumerate(damaged_files(num, seed)):
        path = folder / f"{i}{ending}"
        path.write_bytes(content)
        start = time.monotonic()
        for mode in ("RGB", "L", None):
            try:
                image = open_image(path, mode)
                assert mode is None or (image.mode == mode and min(image.size) > 0), path
                outcome = "image"
            except ValueError as error:
                assert repr(str(path)) in str(error) and "\n" not in str(error), path
                outcome = "refused"
            except Exception as error:
                raise AssertionError(f"{path}: {error!r}") from error
            outcomes[outcome] += 1
        assert time.monotonic() - start < seconds, path
        os.remove(path)
    return outcomes
