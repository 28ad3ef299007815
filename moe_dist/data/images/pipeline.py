"""Batches of labeled images: which images belong to a step, and their augmentation.

An epoch is a permutation of the training split with the key (seed, epoch). Sample b in step s is
number s * B + b in the sequence that all epochs form. Random numbers for a sample have the key
(seed, step, sample). A batch therefore does not depend on the rank or the worker process that makes
it, nor on batches made before.

Legend: I images of a split, B samples (in a step over all ranks, or the requested ones), N classes,
Q color channels, Y and X pixels.
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
from moe_dist.data.images.datasets import open_splits
from moe_dist.data.images.image_files import open_image
from moe_dist.data.images.image_set import DIGEST_BLOCK_BYTES, Images
from moe_dist.data.images.torchvision_import import import_torchvision
from moe_dist.nn import prng

_MODES = {1: "L", 3: "RGB"}  # PIL's mode by channel count
_PAD_PIXELS = 4  # on each side, for data.crop="pad"


@dataclass(frozen=True)
class AugmentedImages:
    """Some samples of one step.

    Attributes:
        image_BQYX: Pixels, float32 in [-1, 1].
        label_B: Labels, int64; 0 for padding.
        target_BN: Target probabilities, float32; smoothed and mixed in training, 0 for padding.
        valid_B: bool; False for padding when an evaluation ends.
    """

    image_BQYX: torch.Tensor
    label_B: torch.Tensor
    target_BN: torch.Tensor
    valid_B: torch.Tensor


@dataclass(frozen=True)
class _PixelBatch:
    """The result of a worker process, to be normalized and mixed in the process of the rank.

    Attributes:
        step: The step.
        samples: Sample numbers in the step.
        pixel_BQYX: uint8 pixels. With mixup they include the sample that follows the last one.
        label_B: int64 labels for the same images.
    """

    step: int
    samples: range
    pixel_BQYX: torch.Tensor
    label_B: torch.Tensor


@dataclass(frozen=True)
class ImageSplit(Dataset):
    """One split as a sequence of steps: endless in training, each image once in evaluation.

    Attributes:
        images: The images.
        data: The data config.
        model: The model config.
        global_batch_size: Images in a step over all ranks.
        seed: The run's seed.
        train: If true, images are shuffled and augmented.
    """

    images: Images
    data: ImageDataConfig
    model: VisionConfig
    global_batch_size: int
    seed: int
    train: bool

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_steps(self) -> int:
        """The number of steps in which every image is read once; the last one may be padded."""
        return -(-len(self) // self.global_batch_size)

    def batch(self, step: int, samples: range) -> AugmentedImages:
        """Returns samples of one step, made in this process.

        Args:
            step: The step, from 0.
            samples: Consecutive sample numbers in the step over all ranks, at least one.

        Returns:
            The samples.

        Raises:
            ValueError: A file cannot be read; the message names it.
        """
        return self._finish(self[step, samples])

    def batches(self, step: int, parts: Sequence[range]) -> Iterator[AugmentedImages]:
        """Yields the parts of each step; `data.workers` processes read ahead.

        Args:
            step: The first step.
            parts: The sample numbers for each part, such as a micro-batch.

        Yields:
            One part's samples: without end in training, to the last step in evaluation.

        Raises:
            ValueError: A file cannot be read; the message names it.
        """
        loader = DataLoader(
            self,
            sampler=self._keys(step, parts),  # type: ignore[arg-type]
            batch_size=None,
            num_workers=self.data.workers,
            worker_init_fn=_leave_process_group,
            # without a generator, DataLoader draws from the default one
            generator=prng.generator(self.seed, "workers"),
        )
        yield from map(self._finish, loader)

    def __getitem__(self, key: tuple[int, range]) -> "_PixelBatch | ValueError":
        """Returns the pixels of samples, for `batch` and DataLoader.

        An error is returned instead of raised, because DataLoader wraps a worker's traceback
        around an error message.
        """
        try:
            return self._read(*key)
        except ValueError as error:
            return error

    def _keys(self, first_step: int, parts: Sequence[range]) -> Iterator[tuple[int, range]]:
        steps = itertools.count(first_step) if self.train else range(first_step, self.num_steps)
        for step in steps:
            for part in parts:
                yield step, part

    def _read(self, step: int, samples: range) -> _PixelBatch:
        """Decodes and augments samples of one step."""
        numbers = list(samples)
        if self._uses_mixup:
            # Each sample is mixed with the next one, so that only the last one's partner is added.
            numbers.append((samples[-1] + 1) % self.global_batch_size)
        size = self.model.image_size
        channels = self.model.channels
        transform = _transform(self.data, size, self.train)
        pixel_BYXQ = np.zeros((len(numbers), size, size, channels), np.uint8)
        label_B = np.zeros(len(numbers), np.int64)
        with prng.default_generator() as reseed:
            for b, sample in enumerate(numbers):
                i = self._image_index(step * self.global_batch_size + sample)
                if i < len(self):
                    reseed(self.seed, "augment", step, sample)
                    image = transform(self.images.open(i, _MODES[channels]))
                    pixel_BYXQ[b] = _pixels(image)
                    label_B[b] = self.images.label_I[i]
        pixel_BQYX = torch.from_numpy(_channels_first(pixel_BYXQ))
        return _PixelBatch(step, samples, pixel_BQYX, torch.from_numpy(label_B))

    def _image_index(self, number: int) -> int:
        """Returns the index of the image with this number in the sequence of all epochs.

        In evaluation, padding has indices after the last image.
        """
        if not self.train:
            return number
        epoch, position = divmod(number, len(self))
        return int(_epoch_order(len(self), self.seed, epoch)[position])

    def _finish(self, read: "_PixelBatch | ValueError") -> AugmentedImages:
        """Normalizes pixels, and forms the targets."""
        if isinstance(read, ValueError):
            raise read
        num_samples = len(read.samples)
        image_BQYX = _normalize(read.pixel_BQYX)
        label_B = read.label_B
        target_BN = one_hot(label_B, self.model.num_classes).float()
        if not self.train:
            first = read.step * self.global_batch_size + read.samples.start
            valid_B = torch.arange(first, first + num_samples) < len(self)
            return AugmentedImages(image_BQYX, label_B, target_BN * valid_B[:, None], valid_B)
        smoothing = self.data.label_smoothing
        target_BN = (1 - smoothing) * target_BN + smoothing / self.model.num_classes
        if self._uses_mixup:
            weight = self.mixup_weight(read.step)
            image_BQYX = _mix_with_next(image_BQYX, weight)
            target_BN = _mix_with_next(target_BN, weight)
        valid_B = torch.ones(num_samples, dtype=torch.bool)
        return AugmentedImages(image_BQYX, label_B[:num_samples], target_BN, valid_B)

    @property
    def _uses_mixup(self) -> bool:
        return self.train and self.data.mixup > 0

    def mixup_weight(self, step: int) -> float:
        """Returns lambda ~ Beta(alpha, alpha) of Zhang et al. 2018, one for each step.

        There a sample's partner is a random image. Here it is sample (b + 1) mod B, because
        the image order is random already.
        """
        alpha = torch.tensor(self.data.mixup, dtype=torch.float64)
        with prng.default_generator() as reseed:
            reseed(self.seed, "mixup", step)
            return torch.distributions.Beta(alpha, alpha).sample().item()


def open_images(
    data: ImageDataConfig, model: VisionConfig, global_batch_size: int, seed: int
) -> dict[str, ImageSplit]:
    """Opens the splits of an image data set; test images are never used for training.

    Args:
        data: The data config.
        model: The model config.
        global_batch_size: Images in a step over all ranks.
        seed: The run's seed.

    Returns:
        "train", "valid" and "test", see `datasets.open_splits`.

    Raises:
        ValueError: The images cannot be found or split, or do not fit the model.
    """
    if model.channels not in _MODES:
        raise ValueError(
            f"model.channels={model.channels} is not supported; use 1 (gray) or 3 (color)"
        )
    _transform(data, model.image_size, train=True)  # raises an error for an unknown crop
    splits = open_splits(data)
    num_classes = len(splits["train"].classes)
    if num_classes > model.num_classes:
        raise ValueError(
            f"model.num_classes={model.num_classes}, but data.images={data.images!r} has "
            f"{num_classes} classes; set model.num_classes to at least {num_classes}"
        )
    image_splits = {}
    for name, images in splits.items():
        is_train = name == "train"
        image_splits[name] = ImageSplit(images, data, model, global_batch_size, seed, is_train)
    return image_splits


def check_images(data: ImageDataConfig, model: VisionConfig, files: bool = True) -> None:
    """Checks image data before training.

    A file that is damaged after its head is detected only when it is read.

    Args:
        data: The data config.
        model: The model config.
        files: If true, every file's head is read, and a note on stderr reports files in valid and
            test that are also in train.

    Raises:
        ValueError: As in `open_images`; or a file does not begin like an image.
    """
    splits = open_images(data, model, global_batch_size=1, seed=0)
    if not files:
        return
    digest_I = {name: split.images.check_files() for name, split in splits.items()}
    for name in ("valid", "test"):
        num_shared = np.isin(digest_I[name], digest_I["train"]).sum()
        if num_shared:
            print(
                f"note: {num_shared} of {len(splits[name])} images of {name!r} are also in "
                f"'train' (same size, first and last {DIGEST_BLOCK_BYTES} bytes), so that its "
                "accuracy is too high",
                file=sys.stderr,
                flush=True,
            )


def read_image(
    path: str | PathLike[str], data: ImageDataConfig, image_size: int, channels: int
) -> torch.Tensor:
    """Reads an image file as an evaluation reads it.

    Args:
        path: The file.
        data: The data config, for its crop.
        image_size: Pixels on each side.
        channels: 1 or 3.

    Returns:
        (Q, Y, X), float32 in [-1, 1].

    Raises:
        ValueError: The file cannot be read; the message names it.
    """
    image = open_image(path, _MODES[channels])
    pixel_YXQ = _pixels(_transform(data, image_size, train=False)(image))
    return _normalize(torch.from_numpy(_channels_first(pixel_YXQ)))


@lru_cache(maxsize=4)
def _epoch_order(num_images: int, seed: int, epoch: int) -> np.ndarray:
    """Returns the permutation of the images in one epoch."""
    return prng.uniform(num_images, seed, "epoch", epoch).argsort(stable=True).numpy()


@cache
def _transform(
    data: ImageDataConfig, size: int, train: bool
) -> Callable[[Image.Image], Image.Image]:
    """Returns a function from a PIL image to one of `size` x `size` pixels, by torchvision.

    `ImageSplit` does not store it, because a worker process that receives a split may not have
    imported torchvision yet.
    """
    crops = ("none", "pad", "inception")
    if data.crop not in crops:
        raise ValueError(f"data.crop={data.crop!r} is not known; {nearest(data.crop, crops)}")
    v2 = import_torchvision().transforms.v2
    # the short side before the center crop; Szegedy et al. crop 224 from 256 pixels
    short_side = round(size * 256 / 224) if data.crop == "inception" else size
    center_crop = _center_crop(short_side, size)
    if not train:
        return center_crop
    steps: list[Callable[[Image.Image], Image.Image]]
    if data.crop == "inception":
        steps = [v2.RandomResizedCrop(size)]
    elif data.crop == "pad":
        steps = [center_crop, v2.RandomCrop(size, padding=_PAD_PIXELS)]
    else:
        steps = [center_crop]
    if data.flip:
        steps.append(v2.RandomHorizontalFlip())
    if data.randaugment_layers:
        steps.append(v2.RandAugment(data.randaugment_layers, data.randaugment_magnitude))
    return v2.Compose(steps)


def _center_crop(short_side: int, size: int) -> Callable[[Image.Image], Image.Image]:
    """Returns a function that resizes the short side of an image and crops its center."""
    v2 = import_torchvision().transforms.v2
    resize_and_crop = v2.Compose([v2.Resize(short_side), v2.CenterCrop(size)])

    def center_crop(image: Image.Image) -> Image.Image:
        # images in many small sets have this size already, and torchvision detects that slowly
        if image.height == image.width == short_side == size:
            return image
        return resize_and_crop(image)

    return center_crop


def _pixels(image: Image.Image) -> np.ndarray:
    """Returns the pixels of an image, (Y, X, Q), uint8."""
    return np.asarray(image).reshape(image.height, image.width, -1)


def _channels_first(pixel_YXQ: np.ndarray) -> np.ndarray:
    """Returns (..., Q, Y, X) for (..., Y, X, Q)."""
    return np.moveaxis(pixel_YXQ, -1, -3).copy()


def _normalize(pixel_QYX: torch.Tensor) -> torch.Tensor:
    """Returns float32 values in [-1, 1] for bytes, in the same way for every image set."""
    return pixel_QYX.float().div_(127.5).sub_(1)


def _mix_with_next(x_B: torch.Tensor, weight: float) -> torch.Tensor:
    """Returns weight * x[b] + (1 - weight) * x[b + 1], one row less than `x_B` has."""
    return weight * x_B[:-1] + (1 - weight) * x_B[1:]


def _leave_process_group(worker: int) -> None:
    """Moves a worker process out of its rank's process group.

    FENCE: torchrun sends SIGTERM to a rank's process group. The rank finishes its step before it
    stops, and needs its workers until then. The workers must not ignore SIGTERM instead, because a
    rank that ends stops them by it. Held by
    test_workers_survive_sigterm_but_not_their_rank.
    """
    os.setpgrp()
