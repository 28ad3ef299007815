"""Images with a class each, as batches: which image is which sample of a step, and what is done to it.

An epoch is a permutation of the training split keyed by (seed, epoch), and sample b of step s is number s B + b of all
epochs in a row. What is drawn for it is keyed by (seed, step, sample). So a batch depends on nothing else: neither on
the rank and the worker process that make it, nor on batches made before.

Legend: I images of a split, B samples (of a step over all ranks, or those asked for), N classes, Q colours, Y and X
pixels.
"""

import itertools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from os import PathLike

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import one_hot
from torch.utils.data import DataLoader, Dataset

from moe_dist.config.messages import nearest
from moe_dist.config.schema import ImageDataConfig, VisionConfig
from moe_dist.data.images.datasets import BLOCK, Images, open_splits
from moe_dist.data.images.image_files import open_image
from moe_dist.data.images.torchvision_import import import_torchvision
from moe_dist.nn import prng

MODES = {1: "L", 3: "RGB"}  # PIL's, by the number of colours


@dataclass(frozen=True)
class AugmentedImages:
    """Some samples of one step."""

    image_BQYX: torch.Tensor  # float32 in [-1, 1]
    label_B: torch.Tensor  # int64, each image's own; 0 for padding
    target_BN: (
        torch.Tensor
    )  # float32, what is learned: classes smoothed and mixed; rows of padding are 0
    valid_B: torch.Tensor  # bool, False for padding, which ends an evaluation


@dataclass(frozen=True)
class _Read:
    """What a worker process sends: bytes of each sample, and with mixup of the one that follows the last."""

    step: int
    samples: range
    pixel_BQYX: torch.Tensor  # uint8
    label_B: torch.Tensor


@dataclass(frozen=True)
class ImageSplit(Dataset):
    """One split, read `samples` images a step (over all ranks): without end in training, once in evaluation."""

    images: Images
    data: ImageDataConfig
    model: VisionConfig
    samples: int
    seed: int
    train: bool

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_steps(self) -> int:
        """In which every image is read once; the last may be padded."""
        return -(-len(self) // self.samples)

    def batch(self, step: int, samples: range) -> AugmentedImages:
        """The consecutive `samples` (global, at least one) of `step` (from 0), made in this process.

        Raises ValueError for a file that cannot be read, naming it.
        """
        return self._finish(self[step, samples])

    def batches(self, step: int, parts: Sequence[range]) -> Iterator[AugmentedImages]:
        """`batch` of each of `parts`, step by step from `step` on: in training without end, in evaluation to the end of
        the split. `data.workers` processes read ahead. Raises what `batch` does."""
        steps = itertools.count(step) if self.train else range(step, self.num_steps)
        loader = DataLoader(
            self,
            sampler=((step, part) for step in steps for part in parts),  # type: ignore[arg-type]
            batch_size=None,
            num_workers=self.data.workers,
            worker_init_fn=_leave_the_group,
            generator=prng.generator(self.seed, "workers"),  # else it draws from the default one
        )
        yield from map(self._finish, loader)

    def __getitem__(self, key: tuple[int, range]) -> "_Read | ValueError":
        """What `batch` and DataLoader begin with. A mistake is handed over, for DataLoader would wrap what is raised in
        a worker's traceback."""
        try:
            return self._read(*key)
        except ValueError as error:
            return error

    def _read(self, step: int, samples: range) -> _Read:
        drawn = [*samples]
        if (
            self._mixes
        ):  # a partner is the next sample, so that of all partners only the last one's is missing
            drawn.append((samples[-1] + 1) % self.samples)
        size, channels = self.model.image_size, self.model.channels
        transform = _transform(self.data, size, self.train)
        pixel_BYXQ = np.zeros((len(drawn), size, size, channels), np.uint8)
        label_B = np.zeros(len(drawn), np.int64)
        with prng.default_generator() as reseed:
            for b, sample in enumerate(drawn):
                i = self._index(step * self.samples + sample)
                if i < len(self):
                    reseed(self.seed, "augment", step, sample)
                    pixel_BYXQ[b] = _pixels(transform(self.images.open(i, MODES[channels])))
                    label_B[b] = self.images.label_I[i]
        return _Read(
            step, samples, torch.from_numpy(_colours_first(pixel_BYXQ)), torch.from_numpy(label_B)
        )

    def _index(self, number: int) -> int:
        """Which image the sample of this number is; in evaluation, one of padding is beyond the last."""
        if not self.train:
            return number
        return int(_order(len(self), self.seed, number // len(self))[number % len(self)])

    def _finish(self, read: "_Read | ValueError") -> AugmentedImages:
        if isinstance(read, ValueError):
            raise read
        image_BQYX, label_B, num = _normalised(read.pixel_BQYX), read.label_B, len(read.samples)
        target_BN = one_hot(label_B, self.model.num_classes).float()
        if not self.train:
            first = read.step * self.samples + read.samples.start
            valid_B = torch.arange(first, first + num) < len(self)
            return AugmentedImages(image_BQYX, label_B, target_BN * valid_B[:, None], valid_B)
        smoothing = self.data.label_smoothing
        target_BN = (1 - smoothing) * target_BN + smoothing / self.model.num_classes
        if self._mixes:
            weight = self.mixup_weight(read.step)
            image_BQYX, target_BN = (
                weight * t[:-1] + (1 - weight) * t[1:] for t in (image_BQYX, target_BN)
            )
        return AugmentedImages(
            image_BQYX, label_B[:num], target_BN, torch.ones(num, dtype=torch.bool)
        )

    @property
    def _mixes(self) -> bool:
        return self.train and self.data.mixup > 0

    def mixup_weight(self, step: int) -> float:
        """lambda ~ Beta(alpha, alpha) of Zhang et al. 2018, one for each step. Their partner is a random image; here it
        is that of sample (b + 1) mod B, for the order of images is random already."""
        alpha = torch.tensor(self.data.mixup, dtype=torch.float64)
        with prng.default_generator() as reseed:
            reseed(self.seed, "mixup", step)
            return torch.distributions.Beta(alpha, alpha).sample().item()


def open_images(
    data: ImageDataConfig, model: VisionConfig, samples: int, seed: int
) -> dict[str, ImageSplit]:
    """Splits "train", "valid" and "test" (`image_sources.open_splits` tells which images they are) for steps of
    `samples` images over all ranks. Test images are never trained on.

    Raises ValueError for images that cannot be found or split, or do not fit the model.
    """
    if model.channels not in MODES:
        raise ValueError(f"model.channels={model.channels}: 1 (gray) or 3 (colours)")
    _transform(data, model.image_size, train=True)  # which knows whether there is such a crop
    splits = open_splits(data)
    num_classes = len(splits["train"].classes)
    if num_classes > model.num_classes:
        raise ValueError(
            f"model.num_classes={model.num_classes}, but data.images={data.images!r} has {num_classes} classes: give "
            f"at least as many"
        )
    return {
        name: ImageSplit(images, data, model, samples, seed, name == "train")
        for name, images in splits.items()
    }


def check_images(data: ImageDataConfig, model: VisionConfig, files: bool = True) -> None:
    """Checks data before training; with `files`, also the head of every file, and whether files of valid and test are
    in train too, which is reported on stderr. A file that is broken further on is only found when it is used.

    Raises:
        ValueError: what `open_images` does, and for a file whose head is no image's, naming it.
    """
    splits = open_images(data, model, samples=1, seed=0)
    if not files:
        return
    digest_I = {name: split.images.check_files() for name, split in splits.items()}
    for name in ("valid", "test"):
        if shared := np.isin(digest_I[name], digest_I["train"]).sum():
            print(
                f"note: {shared} of {len(splits[name])} images of {name!r} are in 'train' too (same size, first and "
                f"last {BLOCK} bytes), so its accuracy is too high",
                file=sys.stderr,
                flush=True,
            )


def read_image(
    path: str | PathLike[str], data: ImageDataConfig, image_size: int, channels: int
) -> torch.Tensor:
    """An image file as evaluation sees it: (Q, Y, X), float32 in [-1, 1]. Raises ValueError naming a broken file."""
    image = open_image(path, MODES[channels])
    pixel_YXQ = _pixels(_transform(data, image_size, train=False)(image))
    return _normalised(torch.from_numpy(_colours_first(pixel_YXQ)))


@lru_cache(maxsize=4)
def _order(num: int, seed: int, epoch: int) -> np.ndarray:
    """The permutation of `num` images that an epoch is."""
    return prng.uniform(num, seed, "epoch", epoch).argsort(stable=True).numpy()


@cache
def _transform(
    data: ImageDataConfig, size: int, train: bool
) -> Callable[[Image.Image], Image.Image]:
    """PIL image -> PIL image of `size` x `size` pixels, by torchvision. No split keeps it: a worker process that is
    given the split may not have imported torchvision yet."""
    v2 = import_torchvision().transforms.v2

    def middle(short_side: int) -> Callable[[Image.Image], Image.Image]:
        resized = v2.Compose([v2.Resize(short_side), v2.CenterCrop(size)])
        # many a small set has the size already, and torchvision takes longer to find that out
        return lambda image: (
            image if image.height == image.width == short_side == size else resized(image)
        )

    crops = {  # in training, in evaluation
        "none": ([middle(size)], middle(size)),
        "pad": ([middle(size), v2.RandomCrop(size, padding=4)], middle(size)),
        "inception": ([v2.RandomResizedCrop(size)], middle(round(size * 256 / 224))),
    }
    if data.crop not in crops:
        raise ValueError(f"data.crop={data.crop!r}; {nearest(data.crop, crops)}")
    in_training, in_evaluation = crops[data.crop]
    if not train:
        return in_evaluation
    flip = [v2.RandomHorizontalFlip()] if data.flip else []
    layers, magnitude = data.randaugment_layers, data.randaugment_magnitude
    return v2.Compose(
        [*in_training, *flip, *([v2.RandAugment(layers, magnitude)] if layers else [])]
    )


def _pixels(image: Image.Image) -> np.ndarray:
    """(Y, X, Q), uint8."""
    return np.asarray(image).reshape(image.height, image.width, -1)


def _colours_first(pixel_YXQ: np.ndarray) -> np.ndarray:
    """(..., Y, X, Q) -> (..., Q, Y, X)"""
    return np.moveaxis(pixel_YXQ, -1, -3).copy()


def _normalised(pixel_QYX: torch.Tensor) -> torch.Tensor:
    """Bytes -> [-1, 1], the same for every set."""
    return pixel_QYX.float().div_(127.5).sub_(1)


def _leave_the_group(worker: int) -> None:
    """torchrun sends SIGTERM to a rank's whole process group, and the rank wants to finish its step before it stops.
    (Deaf to SIGTERM a worker must not be: it is how a rank that ends ends them.)"""
    os.setpgrp()
