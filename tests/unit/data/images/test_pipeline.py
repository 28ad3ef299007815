"""Images: sources, numbering of samples, augmentation by key, and the message of every mistake.

Legend: I images, B samples, N classes, Q colours, Y and X pixels.
"""

import dataclasses
import gzip
import os
import pickle
import re
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_up_images import GRAY, files, joined, numbered, picture, same, told
from PIL import Image

from moe_dist.config.overrides import override
from moe_dist.config.papers import get
from moe_dist.config.schema import ImageDataConfig, VisionConfig
from moe_dist.data.bundled import prepare_images
from moe_dist.data.images import datasets, known_sets
from moe_dist.data.images.datasets import open_splits
from moe_dist.data.images.image_set import Images
from moe_dist.data.images.pipeline import (
    AugmentedImages,
    ImageSplit,
    check_images,
    open_images,
    read_image,
)
from moe_dist.data.images.torchvision_import import import_torchvision
from moe_dist.distributed import batch_layout
from moe_dist.inference.classify import images_of
from moe_dist.nn import prng
from moe_dist.tasks.image_classification import ImageClassification

PLAIN = ImageDataConfig()
ALL = ImageDataConfig(crop="pad", flip=True, randaugment_layers=2, mixup=0.5, label_smoothing=0.1)


def numbers(batch: AugmentedImages) -> list[int]:
    """Returns the numbers of these images of `numbered`."""
    return ((batch.image_BQYX[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()


def one(item_YX: np.ndarray, samples: int, **changes: Any) -> ImageSplit:
    """Returns a set of one image."""
    model = dataclasses.replace(
        GRAY, image_size=len(item_YX), channels=3 if item_YX.ndim == 3 else 1
    )
    images = Images(item_YX[None], np.zeros(1, np.int64), ("0",))
    return ImageSplit(images, ImageDataConfig(**changes), model, samples, 5, True)


# which image is which sample


def test_each_epoch_is_a_permutation() -> None:
    # 7 images: steps of 3 end within epochs, one of 10 holds more than one. Numbers 0 to 69 are 10
    # epochs.
    stream = [i for step in range(24) for i in numbers(numbered(7, 3).batch(step, range(3)))][:70]
    assert stream == [
        i for step in range(7) for i in numbers(numbered(7, 10).batch(step, range(10)))
    ]
    epochs = [stream[first : first + 7] for first in range(0, 70, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) > 5, "each has an order of its own"
    other = dataclasses.replace(numbered(7, 70), seed=6)
    assert numbers(other.batch(0, range(70))) != stream


def test_labels_follow_their_images() -> None:
    batch = numbered(30, 16).batch(3, range(16))
    assert batch.label_B.dtype == torch.int64
    assert batch.label_B.tolist() == [i % 10 for i in numbers(batch)]


def test_any_slice_of_a_step_is_the_same_on_every_rank() -> None:
    split = open_images(ALL, GRAY, 12, seed=3)["train"]
    whole = split.batch(450, range(12))  # 5,400 = 450 x 12 images: the first step of an epoch
    for parts in (
        [range(6), range(6, 12)],
        [range(b, b + 1) for b in range(12)],
        [range(5), range(5, 12)],
    ):
        again = open_images(ALL, GRAY, 12, seed=3)["train"]
        made = {part: again.batch(450, part) for part in reversed(parts)}
        assert same(joined([made[part] for part in parts]), whole)
    different = [
        dataclasses.replace(split, seed=4).batch(450, range(12)),
        split.batch(451, range(12)),
    ]
    assert not any(torch.equal(b.image_BQYX, whole.image_BQYX) for b in different)


def test_split_can_be_pickled_without_torchvision() -> None:
    split = numbered(7, 3, crop="pad")
    split.batch(0, range(3))
    sent = pickle.dumps(split)
    assert b"torchvision" not in sent
    assert same(pickle.loads(sent).batch(1, range(3)), split.batch(1, range(3)))


# what is done to an image


def test_normalized_by_hand() -> None:
    # 0 / 127.5 - 1 = -1; 51 / 127.5 - 1 = 0.4 - 1 = -0.6; 255 / 127.5 - 1 = 1
    item_YX = np.array([[0, 51], [255, 51]], np.uint8)
    image_BQYX = one(item_YX, 1).batch(0, range(1)).image_BQYX
    assert image_BQYX.dtype == torch.float32 and image_BQYX.is_contiguous()
    torch.testing.assert_close(image_BQYX, torch.tensor([[[[-1.0, -0.6], [1.0, -0.6]]]]))
    colours = one(picture(0, 4, 4, 3), 1).batch(0, range(1)).image_BQYX
    torch.testing.assert_close(
        colours[0], torch.from_numpy(picture(0, 4, 4, 3)).permute(2, 0, 1) / 127.5 - 1
    )


def test_pad_crop_cuts_a_window_and_flips_half() -> None:
    item_YX = picture(1, 8, 8)
    padded_YX = np.pad(item_YX, 4)
    seen: Counter[tuple[int, int, bool]] = Counter()
    for image_QYX in one(item_YX, 1000, crop="pad", flip=True).batch(0, range(1000)).image_BQYX:
        byte_YX = ((image_QYX[0] + 1) * 127.5).round().byte().numpy()
        (found,) = [
            (y, x, flipped)
            for y in range(9)
            for x in range(9)
            for flipped in (False, True)
            if (byte_YX == (padded_YX[y : y + 8, x : x + 8][:, :: -1 if flipped else 1])).all()
        ]
        seen[found] += 1
    # 1,000 over 2 x 81 places: 6.2 of each; a place that is never taken has probability e^-6.2 =
    # 0.002
    assert len(seen) > 155
    flipped = sum(num for (_, _, is_flipped), num in seen.items() if is_flipped)
    assert abs(flipped - 500) < 4 * (1000 / 4) ** 0.5


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("crop", ["none", "pad", "inception"])
def test_augmentation_equals_torchvision_seeded_by_key(crop: str, channels: int) -> None:
    """The slow reference augments each image alone, with a forked generator seeded by its key."""
    v2 = import_torchvision().transforms.v2
    shape = (20, 20, 3) if channels == 3 else (20, 20)
    split = one(
        picture(2, *shape), 60, crop=crop, flip=True, randaugment_layers=2, randaugment_magnitude=20
    )
    steps = {
        "none": [],
        "pad": [v2.RandomCrop(20, padding=4)],
        "inception": [v2.RandomResizedCrop(20)],
    }[crop]
    compose = v2.Compose(
        [*steps, v2.RandomHorizontalFlip(0.5), v2.RandAugment(2, 20), v2.PILToTensor()]
    )
    batch = split.batch(9, range(60))
    for sample in range(60):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(prng.fold_in(5, "augment", 9, sample)[0])
            expected_QYX = compose(Image.fromarray(split.images.item_I[0]))
        torch.testing.assert_close(batch.image_BQYX[sample], expected_QYX / 127.5 - 1)


SMALL = VisionConfig(image_size=4, channels=1, patch_size=2, num_classes=2)
TREE = {f"{split}/{kind}": 8 for split in ("train", "valid", "test") for kind in ("a", "b")}


def test_evaluation_resizes_the_short_side_and_crops_the_center(tmp_path: Path) -> None:
    # 28 x 256 / 224 = 32: a picture of 40 x 60 becomes 32 x 48, of which the middle 28 x 28 begins
    # at row 2, column 10.
    # Without inception it becomes 28 x 42, cut from column 7 on.
    image = Image.fromarray(picture(3, 40, 60))
    path = tmp_path / "image.png"
    image.save(path)
    for crop, size, box in (
        ("inception", (48, 32), (10, 2, 38, 30)),
        ("pad", (42, 28), (7, 0, 35, 28)),
    ):
        expected = (
            np.asarray(image.resize(size, Image.Resampling.BILINEAR).crop(box)) / np.float32(127.5)
            - 1
        )
        actual = read_image(path, ImageDataConfig(crop=crop), 28, 1)
        torch.testing.assert_close(actual[0], torch.from_numpy(expected))
        assert torch.equal(
            read_image(path, ImageDataConfig(crop=crop), 28, 3), actual.expand(3, 28, 28)
        )


def test_read_image_equals_evaluation(tmp_path: Path) -> None:
    data = ImageDataConfig(
        images=str(files(tmp_path, TREE)), crop="inception", flip=True, mixup=0.5
    )
    batch = open_images(data, SMALL, 16, 0)["test"].batch(0, range(16))
    for b, place in ((0, "a/0"), (7, "a/7"), (8, "b/0")):
        assert torch.equal(
            read_image(tmp_path / "test" / f"{place}.png", data, 4, 1), batch.image_BQYX[b]
        )


@pytest.mark.parametrize("mode", ["1", "P", "LA", "RGBA", "CMYK"])
def test_files_of_any_mode_become_gray_or_color(tmp_path: Path, mode: str) -> None:
    path = tmp_path / f"image.{'jpg' if mode == 'CMYK' else 'png'}"
    Image.fromarray(picture(4, 9, 9, 3)).convert("RGB").convert(mode).save(path)
    for channels in (1, 3):
        assert read_image(path, PLAIN, 6, channels).shape == (channels, 6, 6)


def test_more_than_eight_bits_are_rejected(tmp_path: Path) -> None:
    root = files(tmp_path, TREE)
    path = root / "test" / "a" / "0.png"
    Image.fromarray(np.full((9, 9), 4096, np.uint16)).save(path)  # which PIL would make white
    told(
        ImageDataConfig(str(root)),
        f"{re.escape(repr(str(path)))} is not a readable image .*mode in PIL is I;16, more than 8 "
        "bits",
        SMALL,
    )


# targets


def test_targets_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    # Two images, of bytes 0 (-1) and 255 (+1), classes 0 and 2 of 4; smoothing 0.2: 0.8 + 0.2 / 4 =
    # 0.85 and 0.05.
    # Weight 0.25 on oneself, 0.75 on the next of the step, the last one's being the first:
    #   -1 x 0.25 + 1 x 0.75 = 0.5      0.85 x 0.25 + 0.05 x 0.75 = 0.25      0.05 x 0.25 + 0.85 x 0.75 = 0.65
    monkeypatch.setattr(ImageSplit, "mixup_weight", lambda split, step: 0.25)
    item_IYX = np.array([0, 255], np.uint8)[:, None, None].repeat(4, 1).repeat(4, 2)
    images = Images(item_IYX, np.array([0, 2]), ("w", "x", "y", "z"))
    model = dataclasses.replace(GRAY, image_size=4, num_classes=4)
    split = ImageSplit(images, ImageDataConfig(label_smoothing=0.2), model, 2, 0, True)
    plain, mixed = (
        dataclasses.replace(split, data=ImageDataConfig(mixup=m, label_smoothing=0.2))
        for m in (0, 0.5)
    )
    rows = {0: [0.85, 0.05, 0.05, 0.05], 2: [0.05, 0.05, 0.85, 0.05]}
    mixed_rows = {0: [0.25, 0.05, 0.65, 0.05], 2: [0.65, 0.05, 0.25, 0.05]}
    for batch, expected, pixel in (
        (plain.batch(0, range(2)), rows, {0: -1.0, 2: 1.0}),
        (mixed.batch(0, range(2)), mixed_rows, {0: 0.5, 2: -0.5}),
    ):
        assert sorted(batch.label_B.tolist()) == [0, 2]
        for b, label in enumerate(batch.label_B.tolist()):
            torch.testing.assert_close(batch.target_BN[b], torch.tensor(expected[label]))
            assert (batch.image_BQYX[b] == pixel[label]).all()


def test_mixup_mixes_each_sample_with_the_next() -> None:
    plain, mixed = (numbered(40, 9, mixup=mixup, crop="pad") for mixup in (0.0, 0.4))
    for step in range(3):
        a, b, weight = (
            plain.batch(step, range(9)),
            mixed.batch(step, range(9)),
            mixed.mixup_weight(step),
        )
        for sample in range(9):
            for x, y in ((a.image_BQYX, b.image_BQYX), (a.target_BN, b.target_BN)):
                torch.testing.assert_close(
                    y[sample], weight * x[sample] + (1 - weight) * x[(sample + 1) % 9]
                )
        assert torch.equal(a.label_B, b.label_B)
    alone = dataclasses.replace(mixed, global_batch_size=1)  # its partner is itself
    torch.testing.assert_close(alone.batch(2, range(1)).target_BN.max(), torch.tensor(1.0))


def test_mixup_weights_follow_a_beta_distribution() -> None:
    # Beta(1/2, 1/2) is the arcsine law: mean 1/2, variance 1/8, P(x < p) = 2 / pi arcsin(sqrt(p))
    split = numbered(40, 9, mixup=0.5)
    weight_S = torch.tensor([split.mixup_weight(step) for step in range(3000)], dtype=torch.float64)
    assert abs(weight_S.mean() - 0.5) < 4 * (1 / 8 / 3000) ** 0.5
    for p in (0.1, 0.4, 0.9):
        below = 2 / np.pi * np.arcsin(p**0.5)
        assert abs((weight_S < p).double().mean() - below) < 4 * (below * (1 - below) / 3000) ** 0.5
    assert (
        split.mixup_weight(7) == weight_S[7] != dataclasses.replace(split, seed=6).mixup_weight(7)
    )


# where images come from


def whole(splits: dict[str, Images]) -> list[bytes]:
    return [pixel_YX.tobytes() for split in splits.values() for pixel_YX in split.item_I]


def test_bundled_images_are_balanced_and_evenly_split() -> None:
    splits = open_splits(PLAIN)
    assert {name: len(split) for name, split in splits.items()} == {
        "train": 5400,
        "valid": 600,
        "test": 1000,
    }
    num_N = sum(np.bincount(splits[name].label_I) for name in ("train", "valid"))
    assert (
        num_N.tolist() == [600] * 10 and np.bincount(splits["test"].label_I).tolist() == [100] * 10
    )
    assert len(set(whole(splits))) == 7000
    assert splits["train"].classes[9] == "Ankle boot"


def write_idx(folder: Path, num: int = 20, labels: list[int] | None = None) -> Path:
    """Writes a data set in the format of Fashion-MNIST, with `num` images per split."""
    folder.mkdir(parents=True, exist_ok=True)
    for first, seed in (("train", 0), ("t10k", 1)):
        label_I = np.array(labels or [i % 10 for i in range(num)], np.uint8)
        for what, array in (("images-idx3", picture(seed, num, 28, 28)), ("labels-idx1", label_I)):
            head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
            (folder / f"{first}-{what}-ubyte.gz").write_bytes(gzip.compress(head + array.tobytes()))
    return folder


def test_prepared_images_are_the_first_of_each_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_idx(tmp_path / "idx", 50)
    monkeypatch.setattr(prepare_images, "IMAGES_PER_CLASS", {"train": 3, "test": 2})
    monkeypatch.setattr(sys, "argv", ["prepare_images", str(source), str(tmp_path)])
    prepare_images.main()
    (tmp_path / "bundled").mkdir()
    for split in ("train", "test"):
        (tmp_path / f"fashion_{split}.xz").rename(tmp_path / "bundled" / f"fashion_{split}.xz")
    monkeypatch.setattr(known_sets, "__file__", str(tmp_path / "images" / "known_sets.py"))
    bundled = {split: known_sets._bundled_split(split) for split in ("train", "test")}
    # image i has class i mod 10: the first 3 and 2 of each class are the first 30 and 20 images
    for split, seed, num in (("train", 0, 30), ("test", 1, 20)):
        assert (bundled[split].item_I == picture(seed, 50, 28, 28)[:num]).all()
        assert bundled[split].label_I.tolist() == [i % 10 for i in range(num)]


def test_fashion_mnist_in_debian_and_torchvision_layout(tmp_path: Path) -> None:
    debian = write_idx(tmp_path / "debian")
    raw = tmp_path / "torchvision" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for path in debian.iterdir():
        (raw / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    one, other = (
        open_splits(ImageDataConfig("fashion_mnist", str(tmp_path / n)))
        for n in ("debian", "torchvision")
    )
    assert [len(split) for split in one.values()] == [18, 2, 20]
    assert (one["test"].item_I == picture(1, 20, 28, 28)).all()
    held_out_last = np.concatenate([one["train"].item_I, one["valid"].item_I])
    assert {i.tobytes() for i in held_out_last} == {i.tobytes() for i in picture(0, 20, 28, 28)}
    for split, images in one.items():
        assert (images.item_I == other[split].item_I).all() and (
            images.label_I == other[split].label_I
        ).all()


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("fashion_mnist", "train-labels-idx1-ubyte.gz"),
        ("fashion_mnist", "t10k-images-idx3-ubyte.gz"),
        ("fashion_mnist", "FashionMNIST/raw/train-images-idx3-ubyte"),
        ("fashion_mnist", "FashionMNIST/processed/training.pt"),
        ("cifar10", "cifar-10-batches-py/data_batch_1"),
        ("cifar100", "cifar-100-python/meta"),
    ],
)
def test_pipe_in_a_known_dataset_does_not_block(name: str, file: str, tmp_path: Path) -> None:
    if "/" not in file:
        write_idx(tmp_path)
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).unlink(missing_ok=True)
    os.mkfifo(tmp_path / file)
    with pytest.raises(
        ValueError, match=rf"does not contain the complete {name} \(.*a pipe.* a device"
    ):
        open_splits(ImageDataConfig(name, str(tmp_path)))


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_in_torchvision_layout(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = getattr(import_torchvision().datasets, name.upper())
    (tmp_path / kind.base_folder).mkdir()
    num_classes, key = {"cifar10": (10, "labels"), "cifar100": (100, "fine_labels")}[name]
    pixel_IQYX: dict[str, list[np.ndarray]] = {"train_list": [], "test_list": []}
    for part in pixel_IQYX:
        named = [file for file, _ in getattr(kind, part)]
        monkeypatch.setattr(kind, part, [[file, None] for file in named])  # no checksum
        for i, file in enumerate(named):  # two images of each class
            pixel_IQYX[part].append(picture(i, 2 * num_classes, 3, 32, 32))
            content = {
                "data": pixel_IQYX[part][-1].reshape(2 * num_classes, -1),
                key: [*range(num_classes)] * 2,
            }
            (tmp_path / kind.base_folder / file).write_bytes(pickle.dumps(content))
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": None})
    classes = [f"class {i}" for i in range(num_classes)]
    (tmp_path / kind.base_folder / kind.meta["filename"]).write_bytes(
        pickle.dumps({kind.meta["key"]: classes})
    )
    monkeypatch.setattr(datasets, "MAX_HELD_OUT", 5)
    splits = open_images(
        ImageDataConfig(name, str(tmp_path)), VisionConfig(32, 3, 4, num_classes), 20, 0
    )
    num_train = 2 * num_classes * len(pixel_IQYX["train_list"])
    assert [len(split) for split in splits.values()] == [num_train - 5, 5, 2 * num_classes]
    assert splits["train"].images.classes == tuple(classes)
    batch = splits["test"].batch(0, range(20))
    torch.testing.assert_close(
        batch.image_BQYX, torch.from_numpy(pixel_IQYX["test_list"][0][:20]) / 127.5 - 1
    )
    assert batch.label_B.tolist() == [i % num_classes for i in range(20)]


@pytest.mark.parametrize("valid", ["valid", "val"])
def test_splits_of_a_folder(tmp_path: Path, valid: str) -> None:
    sizes = {}
    for name, tree in {
        "all": {"train": 8, valid: 3, "test": 2},
        "no test": {"train": 10, valid: 3},
        "no valid": {"train": 10, "test": 2},
    }.items():
        root = files(
            tmp_path / name,
            {f"{split}/{kind}": num for split, num in tree.items() for kind in "ab"},
        )
        splits = open_splits(ImageDataConfig(str(root)))
        sizes[name] = [len(split) for split in splits.values()]
        in_test = {
            Path(os.fsdecode(file)).relative_to(root).parts[0] for file in splits["test"].item_I
        }
        assert in_test == {valid if name == "no test" else "test"}
        assert not {*splits["train"].item_I} & {*splits["valid"].item_I}
        # files 0, 1, ... of class a, then those of class b
        assert all((np.diff(split.label_I) >= 0).all() for split in splits.values())
    assert sizes == {"all": [16, 6, 4], "no test": [18, 2, 6], "no valid": [18, 2, 4]}


def test_held_out_images_are_a_tenth_and_at_most_ten_thousand() -> None:
    for num, held_out in ((10, 1), (59, 5), (99_999, 9_999), (100_000, 10_000), (300_000, 10_000)):
        images = Images(np.arange(num), np.zeros(num, np.int64), ("0",))
        splits = datasets._hold_out(images)
        assert len(splits["valid"]) == held_out
        assert (
            np.sort(np.concatenate([splits["train"].item_I, splits["valid"].item_I]))
            == np.arange(num)
        ).all()
    share = (splits["valid"].item_I < 150_000).mean()  # the last of 300,000: from everywhere
    assert abs(share - 0.5) < 4 * 0.5 / 10_000**0.5


def test_folder_and_classify_list_the_same_files(tmp_path: Path) -> None:
    root = files(tmp_path, TREE)
    for number, kind in enumerate(("gif", "jpeg", "webp", "avif", "png", "tiff")):
        name = {"jpeg": "x.JFIF", "png": "no ending"}.get(kind, f"x.{kind.upper()}")
        Image.fromarray(picture(number, 6, 8)).save(root / "test" / "a" / name, kind)
    (root / "test" / "a" / "notes.txt").write_text("none")
    (root / "test" / "b" / ".thumbnails").mkdir()
    shutil.copy(root / "test" / "b" / "0.png", root / "test" / "b" / ".thumbnails")
    for hidden in (".ipynb_checkpoints", "__MACOSX"):
        (root / "test" / hidden).mkdir()
    test = open_splits(ImageDataConfig(str(root)))["test"]
    assert [Path(os.fsdecode(file)) for file in test.item_I] == images_of([root / "test"])
    assert (test.classes, np.bincount(test.label_I).tolist()) == (("a", "b"), [14, 8])
    assert test.note == "test/: 1 left out: 1 .txt"


def test_files_outside_classes_and_splits_are_reported(tmp_path: Path) -> None:
    root = files(
        tmp_path,
        {**TREE, "train/Ä": 1, "valid/Ä": 1, "test/Ä": 1, "train/ä": 1, "valid/ä": 1, "test/ä": 1},
    )
    files(root, {"Test/a": 1, "test/": 2, "dev/a": 2})
    alike = "{}/: classes whose names differ by case alone: Ä, ä"
    assert opened(f"data.images={root}", "model.num_classes=4").notes == [
        f"folders that are not splits and are not read: Test, dev; {alike.format('train')}",
        alike.format("valid"),
        f"test/: 2 left out: 2 outside the class folders; {alike.format('test')}",
    ]


def opened(*sets: str, samples: int = 8) -> ImageClassification:
    """Returns the task of the demo's config with the given settings."""
    batch = [
        f"batch.{key}={samples}"
        for key in ("global_batch_size", "balance_loss_group_size", "capacity_group_size")
    ]
    config = override(get("widenet_demo"), [*sets, *batch])
    mesh: Any = None  # not asked
    explicit = [text.partition("=")[0] for text in sets]
    return ImageClassification(
        config, batch_layout.make_batch_layout(config, 1), mesh, None, explicit
    )


def test_class_names_are_unified_by_unicode_form(tmp_path: Path) -> None:
    root = files(
        tmp_path,
        {
            f"{split}/{kind}": 9
            for split in ("train", "test")
            for kind in ("cat", "caf\u00e9", "हिन्दी")
        },
    )
    (root / "test" / "cat").rename(root / "test" / "cat ")
    (root / "test" / "caf\u00e9").rename(root / "test" / "cafe\u0301")
    splits = open_splits(ImageDataConfig(str(root)))
    assert splits["train"].classes == splits["test"].classes == ("caf\u00e9", "cat", "हिन्दी")
    assert np.bincount(splits["test"].label_I).tolist() == [9] * 3
    for name in ("cafe\u0301", " cat", "cat\u00a0"):
        files(root, {f"train/{name}": 1})
        told(
            ImageDataConfig(str(root)),
            "train/ has two folders for one class, '.*' and '.*'; move the files",
        )
        shutil.rmtree(root / "train" / name)
    for name in ("a\nb", "\udcff", " ", "\x1b[31m"):
        files(root, {f"train/{name}": 1})
        told(
            ImageDataConfig(str(root)),
            re.escape(f"train/ has a class {name!r}, which cannot be printed"),
        )
        shutil.rmtree(root / "train" / name)


@pytest.mark.parametrize(("samples", "times"), [(16, None), (17, "1.1"), (64, "4.0")])
def test_fewer_images_than_samples_are_reported(
    tmp_path: Path, samples: int, times: str | None
) -> None:
    root = files(tmp_path, TREE)
    told = f"each of the 16 training images is {times} times in a step of batch.global_batch_size={samples}; set batch.global_batch_size to"
    notes = opened(f"data.images={root}", "model.num_classes=2", samples=samples).notes
    assert notes == ([f"{told} 16 or less"] if times else [])


@pytest.mark.parametrize("kind", ["png", "jpeg"])
def test_channels_follow_from_the_images(tmp_path: Path, kind: str) -> None:
    """The pixels decide: many gray images are stored with three equal channels."""
    for name, shape, fits in (("gray", (6, 8), 1), ("colored", (6, 8, 3), 3)):
        for place in TREE:
            (tmp_path / name / place).mkdir(parents=True)
            for i in range(8):
                Image.fromarray(picture(i, *shape)).convert("RGB").save(
                    tmp_path / name / place / f"{i}.{kind}"
                )
        folder = f"data.images={tmp_path / name}"
        for channels in (1, 3):
            taken = ImageClassification(
                override(get("widenet_demo"), [folder, f"model.channels={channels}"]),
                batch_layout.make_batch_layout(get("widenet_demo"), 1),
                None,
                None,
                ["data.images"],  # type: ignore[arg-type]
            )
            assert taken.config.model.channels == fits  # type: ignore[union-attr]
            assert taken.splits["test"].batch(0, range(4)).image_BQYX.shape[1] == fits
            assert any("model.channels" in note for note in taken.notes) == (channels != fits)
            kept = opened(folder, f"model.channels={channels}", "model.num_classes=2")
            assert kept.config.model.channels == channels  # type: ignore[union-attr]
            assert [note.partition(", and ")[2] for note in kept.notes] == {
                (1, 3): ["model.channels=1 makes them gray; model.channels=3 fits"],
                (3, 1): ["model.channels=3 repeats each value; model.channels=1 fits"],
            }.get((channels, fits), [])


def test_one_color_image_means_three_channels() -> None:
    pixel_IYXQ = np.zeros((500, 4, 4, 3), np.uint8)
    images = Images(pixel_IYXQ, np.zeros(500, np.int64), ("0",))
    assert images.channels() == 1
    pixel_IYXQ[333, 2, 2, 2] = 1
    assert images.channels() == 3
    assert open_splits(PLAIN)["train"].channels() == 1


@pytest.mark.parametrize(
    ("rare", "mode", "channels"), [(7, "RGB", 3), (39, "P", 3), (16, "CMYK", 3), (5, "LA", 1)]
)
def test_one_color_file_means_three_channels(
    tmp_path: Path, rare: int, mode: str, channels: int
) -> None:
    """Some of the other files are gray but stored in color."""
    for i in range(40):
        image = Image.fromarray(picture(i, 6, 8)).convert("RGB" if i % 2 else "L")
        if i == rare:
            image = Image.new("RGB", (6, 8), "red" if channels == 3 else "gray").convert(mode)
        image.save(tmp_path / f"{i}.{'tif' if mode == 'CMYK' else 'png'}")
    files = np.array(sorted(map(os.fsencode, tmp_path.iterdir())), np.bytes_)
    assert Images(files, np.zeros(40, np.int64), ("0",)).channels() == channels


def test_images_in_two_splits_are_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    numbers = iter(range(1000))
    for place, num in {
        "train/a": 8,
        "train/b": 8,
        "valid/a": 4,
        "valid/b": 4,
        "test/a": 4,
        "test/b": 4,
    }.items():
        (tmp_path / place).mkdir(parents=True)
        for _ in range(num):
            Image.fromarray(picture(number := next(numbers), 60, 80)).save(
                tmp_path / place / f"{number}.bmp"
            )
    check_images(ImageDataConfig(str(tmp_path)), SMALL)
    assert capsys.readouterr().err == ""
    shutil.copy(tmp_path / "train" / "a" / "0.bmp", tmp_path / "test" / "a" / "copy.bmp")
    (tmp_path / "test" / "b" / "link.bmp").symlink_to(tmp_path / "train" / "b" / "9.bmp")
    check_images(ImageDataConfig(str(tmp_path)), SMALL, files=False)
    assert capsys.readouterr().err == ""
    check_images(ImageDataConfig(str(tmp_path)), SMALL)
    assert capsys.readouterr().err.startswith(
        "note: 2 of 10 images of 'test' are also in 'train' (same size, first and la"
    )


# mistakes

BAD = [
    (
        {"images": "cifr10"},
        "'cifr10' is neither a folder nor a known name; did you mean 'cifar10'.*; give 'bundled'",
    ),
    (
        {"images": "/no/such"},
        "'/no/such' is neither a folder nor a known name; known: bundled, cifar10, cifar100",
    ),
    ({"images": ""}, "'' is neither a folder nor a known name"),
    ({"image_root": "."}, "image_root='.' has no effect with data.images='bundled'"),
    (
        {"images": "cifar10"},
        "image_root=None is not a folder; data.images='cifar10' needs .*cifar-10-batches-py",
    ),
    ({"images": "cifar10", "image_root": "/no/such"}, "image_root='/no/such' is not a folder"),
    (
        {"images": "cifar100", "image_root": "."},
        r"does not contain the complete cifar100 \(Dataset not found or corrupted.\); give",
    ),
    (
        {"images": "fashion_mnist", "image_root": "."},
        r"does not contain the complete fashion_mnist \(Dataset not found.\); give",
    ),
    ({"crop": "inceptoin"}, "data.crop='inceptoin' is not known; did you mean 'inception'"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_invalid_dataset_names_are_rejected(changes: dict[str, str], message: str) -> None:
    told(ImageDataConfig(**changes), message)


def test_invalid_model_sizes_are_rejected() -> None:
    told(
        PLAIN,
        "num_classes=9, but data.images='bundled' has 10 classes",
        dataclasses.replace(GRAY, num_classes=9),
    )
    told(
        PLAIN,
        r"channels=2 is not supported; use 1 \(gray\) or 3",
        dataclasses.replace(GRAY, channels=2),
    )
    check_images(PLAIN, dataclasses.replace(GRAY, num_classes=11))


def test_invalid_image_folders_are_rejected(tmp_path: Path) -> None:
    for name, tree, message in [
        ("none", {}, "has no folder train/; give"),
        ("unnamed", {"a": 3, "b": 3}, "has no folder train/"),
        ("only train", {"train/a": 20}, "neither test/ nor valid/ next to train/"),
        ("both", {**TREE, "val/a": 1}, "has valid and val; leave only one"),
        ("no classes", {"train": 20, "test/a": 2}, "has no folders of classes in train/"),
        ("flat test", {"train/a": 20, "test": 2}, "has no folders of classes in test/"),
        (
            "differ",
            {**TREE, "test/c": 2},
            "test/ and train/ have different classes, because c is in only one",
        ),
        (
            "differ too",
            {**TREE, "train/c": 2},
            "valid/ and train/ have different classes, because c is",
        ),
        ("empty class", {**TREE, "train/b": 0}, r"classes without an image in 'train' \(b\)"),
        ("empty test class", {**TREE, "test/b": 0}, r"classes without an image in 'test' \(b\)"),
        (
            "other files",
            {**TREE, "train/c": 0, "valid/c": 1, "test/c": 1},
            r"in 'train' \(c\).* 2 left out: 2 .heic",
        ),
        ("empty split", {**TREE, "valid/a": 0, "valid/b": 0}, "has no image for 'valid'"),
        (
            "too few",
            {"train/a": 4, "train/b": 5, "test/a": 1, "test/b": 1},
            "no image for 'valid'.*at least 10 images",
        ),
        (
            "one each",
            {f"{split}/{n}": 1 for split in ("train", "test") for n in range(10)},
            "without an image in 'tr",
        ),
    ]:
        (root := tmp_path / name).mkdir()
        data = ImageDataConfig(str(files(root, tree)))
        for file in ("x.heic", "y.HEIC") if name == "other files" else ():
            (root / "train" / "c" / file).write_bytes(b"....ftypheic")
        told(
            data,
            f"data.images={re.escape(repr(str(root)))}.*{message}",
            dataclasses.replace(SMALL, num_classes=10),
        )


def test_invalid_known_datasets_are_rejected(tmp_path: Path) -> None:
    for name, spoil, message in [
        (
            "cut short",
            lambda f: f.write_bytes(f.read_bytes()[:500]),
            r"does not contain the complete fashion_mnist \(Compressed file",
        ),
        (
            "no archive",
            lambda f: f.write_bytes(b"nothing"),
            r"does not contain the complete fashion_mnist \(Not a gzipped file",
        ),
        (
            "missing",
            lambda f: f.unlink(),
            r"does not contain the complete fashion_mnist \(.*No such file",
        ),
        (
            "other sizes",
            lambda f: write_idx(f.parent, 20, [0, 1, 2]),
            r"\(20 images and 3 labels\)",
        ),
        (
            "label",
            lambda f: write_idx(f.parent, 20, [*range(10), *range(1, 10), 12]),
            "label 12 in 'train', but 10 cl",
        ),
        (
            "empty class",
            lambda f: write_idx(f.parent, 20, [3, 4] * 10),
            r"'train' \(T-shirt/top, Tro.*, \.\.\.\)",
        ),
    ]:
        root = write_idx(tmp_path / name)
        spoil(root / "t10k-images-idx3-ubyte.gz")
        told(ImageDataConfig("fashion_mnist", str(root)), message)


@pytest.mark.parametrize("num_broken", [2, 7])
def test_message_names_several_broken_files_and_counts_all(tmp_path: Path, num_broken: int) -> None:
    root = files(tmp_path, TREE)
    broken = sorted((root / "train" / "a").iterdir())[:num_broken]
    for path in broken:
        path.write_bytes(b"GIF87a, or not")
    with pytest.raises(ValueError, match=f"^{num_broken} files are not readable images: ") as error:
        check_images(ImageDataConfig(str(root)), SMALL)
    assert [str(path) in str(error.value) for path in broken] == [i < 5 for i in range(num_broken)]
