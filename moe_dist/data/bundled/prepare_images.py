"""Prepares the bundled images: the first 600 training and 100 test images of each class of Fashion-MNIST.

apt-get install dataset-fashion-mnist
python -m moe_dist.data.bundled.prepare_images /usr/share/datasets/fashion-mnist moe_dist/data/bundled

Legend: I images.
"""

import argparse
import lzma
from pathlib import Path

import numpy as np

from moe_dist.data.images.datasets import DEBIAN_NAMES, read_idx

IMAGES_PER_CLASS = {"train": 600, "test": 100}


def main() -> None:
    """Writes fashion_train.xz and fashion_test.xz: all labels, then all images row by row, a byte each number."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="folder of the four idx.gz files")
    parser.add_argument("out", type=Path, help="folder to write to")
    args = parser.parse_args()
    for split, num in IMAGES_PER_CLASS.items():
        image_I, label_I = (
            read_idx(args.source / f"{DEBIAN_NAMES[split]}-{what}-ubyte.gz")
            for what in ("images-idx3", "labels-idx1")
        )
        first = [np.flatnonzero(label_I == label)[:num] for label in range(10)]
        kept = np.sort(np.concatenate(first))  # in the source's order, which mixes the classes
        raw = label_I[kept].tobytes() + image_I[kept].tobytes()
        packed = lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME)
        (args.out / f"fashion_{split}.xz").write_bytes(packed)
        print(
            f"{split}: {len(kept)} images, {np.bincount(label_I[kept]).tolist()} by class, {len(packed)} bytes"
        )


if __name__ == "__main__":
    main()
