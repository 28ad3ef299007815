r"""Prepares the bundled images: 600 training and 100 test images per class of Fashion-MNIST.

apt-get install dataset-fashion-mnist
python -m moe_dist.data.bundled.prepare_images /usr/share/datasets/fashion-mnist \
    moe_dist/data/bundled

Legend: I images.
"""

import argparse
import lzma
from pathlib import Path

import numpy as np

from moe_dist.data.images.known_sets import DEBIAN_NAMES, read_idx

IMAGES_PER_CLASS = {"train": 600, "test": 100}


def main() -> None:
    """Writes fashion_train.xz and fashion_test.xz.

    Each file has all labels, then all images row by row, one byte per number. The images are the
    first ones of each class.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="folder of the four idx.gz files")
    parser.add_argument("out", type=Path, help="folder to write to")
    args = parser.parse_args()
    for split, num in IMAGES_PER_CLASS.items():
        prefix = DEBIAN_NAMES[split]
        image_I = read_idx(args.source / f"{prefix}-images-idx3-ubyte.gz")
        label_I = read_idx(args.source / f"{prefix}-labels-idx1-ubyte.gz")
        first = [np.flatnonzero(label_I == label)[:num] for label in range(10)]
        kept = np.sort(np.concatenate(first))  # in the order of the source, which mixes the classes
        content = label_I[kept].tobytes() + image_I[kept].tobytes()
        packed = lzma.compress(content, preset=9 | lzma.PRESET_EXTREME)
        (args.out / f"fashion_{split}.xz").write_bytes(packed)
        print(
            f"{split}: {len(kept)} images, {np.bincount(label_I[kept]).tolist()} by class, "
            f"{len(packed)} bytes"
        )


if __name__ == "__main__":
    main()
