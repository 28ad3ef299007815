"""Images in processes of their own: workers, memory, a repaired import."""

import dataclasses
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_up_images import GRAY, files, joined, numbered, png, same, told
from paths import ROOT

from moe_dist.config.schema import ImageDataConfig, VisionConfig
from moe_dist.data.images.image_set import Images
from moe_dist.data.images.pipeline import (
    AugmentedImages,
    check_images,
    open_images,
    read_image,
)


def test_large_photograph_is_no_decompression_bomb(tmp_path: Path) -> None:
    """PIL warns above 89 million pixels and refuses twice as many; cameras have 100 million."""
    (tmp_path / "x.png").write_bytes(png(12_000, 9_000))
    code = "import sys; from moe_dist.data.images.image_files import open_image; open_image(sys.argv[1], None)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "x.png")], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


ALL = ImageDataConfig(crop="pad", flip=True, randaugment_layers=2, mixup=0.5, label_smoothing=0.1)


def numbers(batch: AugmentedImages) -> list[int]:
    """Returns the numbers of these images of `numbered`."""
    return ((batch.image_BQYX[:, 0, 0, 0] + 1) * 127.5).round().int().tolist()


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_do_not_depend_on_the_number_of_workers(workers: int) -> None:
    split = open_images(dataclasses.replace(ALL, workers=workers), GRAY, 12, seed=3)["train"]
    parts = [range(6), range(6, 12)]
    ahead = split.batches(448, parts)
    for step in (448, 449, 450, 451):
        for part in parts:
            assert same(next(ahead), split.batch(step, part))


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_reads_every_image_once_and_pads_the_end(workers: int) -> None:
    # 7 images in steps of 3: 3 steps, the last with one image and two samples of padding
    split = numbered(
        7, 3, train=False, workers=workers, mixup=0.5, label_smoothing=0.1, crop="pad", flip=True
    )
    assert split.num_steps == 3
    batches = list(split.batches(0, [range(2), range(2, 3)]))
    assert [numbers(b) for b in batches[:4]] == [[0, 1], [2], [3, 4], [5]]
    assert [b.valid_B.tolist() for b in batches] == [[True, True], [True]] * 2 + [
        [True, False],
        [False],
    ]
    assert numbers(batches[4])[0] == 6
    target_IN = joined(batches).target_BN
    assert torch.equal(target_IN[:7], torch.eye(10)[:7]), "neither smoothed nor mixed"
    assert not target_IN[7:].any()
    assert same(split.batch(2, range(3)), joined(batches[4:]))


def test_global_random_state_is_unchanged() -> None:
    before = torch.get_rng_state(), random.getstate(), repr(np.random.get_state())
    split = open_images(dataclasses.replace(ALL, workers=1), GRAY, 12, seed=3)["train"]
    split.batch(0, range(12))
    next(split.batches(0, [range(12)]))
    after = torch.get_rng_state(), random.getstate(), repr(np.random.get_state())
    assert torch.equal(before[0], after[0]) and before[1:] == after[1:]


HELD: list[Any] = []  # what is alive when a process ends


def go_on_after_sigterm(workers: int) -> None:
    """Runs a rank whose process group gets SIGTERM, as from torchrun, and which ends while its
    workers read ahead."""
    os.setpgrp()
    signal.signal(signal.SIGTERM, lambda *_: None)
    split = numbered(50, 4, workers=workers)
    batches = split.batches(0, [range(4)])
    for step in range(workers):  # one of each
        assert same(next(batches), split.batch(step, range(4)))
    os.killpg(0, signal.SIGTERM)
    for step in range(workers, 20):  # more than was read ahead
        assert same(next(batches), split.batch(step, range(4)))
    HELD.append(batches)


def test_workers_survive_sigterm_but_not_their_rank() -> None:
    rank = multiprocessing.get_context("fork").Process(target=go_on_after_sigterm, args=(2,))
    rank.start()
    rank.join(30)
    assert rank.exitcode == 0


SMALL = VisionConfig(image_size=4, channels=1, patch_size=2, num_classes=2)
TREE = {f"{split}/{kind}": 8 for split in ("train", "valid", "test") for kind in ("a", "b")}


# where images come from


def whole(splits: dict[str, Images]) -> list[bytes]:
    return [pixel_YX.tobytes() for split in splits.values() for pixel_YX in split.item_I]


@pytest.mark.parametrize("workers", [0, 1])
def test_broken_file_is_named_whenever_it_is_found(tmp_path: Path, workers: int) -> None:
    data = ImageDataConfig(str(files(tmp_path, TREE)), workers=workers)
    check_images(data, SMALL)
    split = open_images(data, SMALL, 16, 0)["train"]
    path = tmp_path / "train" / "b" / "3.png"
    whole = path.read_bytes()
    message = f"^{re.escape(repr(str(path)))} is not a readable image .*; repair or remove it$"
    for content, in_its_head in (
        (whole[:60], False),
        (b"\x89PNG nonsense", True),
        (b"", True),
        (None, True),
    ):
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        if content is None:
            with pytest.raises(ValueError, match=message):
                split.images.check_files()
        elif in_its_head:
            told(data, message, SMALL)
        else:
            check_images(data, SMALL)
        for act in (
            lambda: split.batch(0, range(16)),
            lambda: list(islice(split.batches(0, [range(16)]), 1)),
        ):
            with pytest.raises(ValueError, match=message) as error:
                act()
            assert "\n" not in str(error.value)
        with pytest.raises(ValueError, match=message):
            read_image(path, data, 4, 1)
        path.write_bytes(whole)


# torchvision

CURE = """
import sys, pathlib
root = pathlib.Path(sys.argv[1])
def offer(name, code):
    (root / name / "torchvision" / "transforms").mkdir(parents=True)
    (root / name / "torchvision" / "__init__.py").write_text(code)
    for file in ("__init__.py", "v2.py"):
        (root / name / "torchvision" / "transforms" / file).write_text("")
    sys.path[0] = str(root / name)
    for module in [m for m in sys.modules if m.startswith("torchvision")]:
        del sys.modules[module]
sys.path.insert(0, "")
from moe_dist.data.images import torchvision_import
offer("works", "import torch\\nname = 'works'")
assert torchvision_import.import_torchvision().name == 'works' and not torchvision_import._SCHEMAS
assert torchvision_import.import_torchvision() is sys.modules["torchvision"]
offer("other", "raise RuntimeError('other')")
try:
    torchvision_import.import_torchvision()
    assert False
except RuntimeError as error:
    assert str(error) == "other" and not torchvision_import._SCHEMAS
offer("misses", "import torch, torchvision.transforms\\ntorch.library.register_fake('torchvision::nms')(len)")
torchvision = torchvision_import.import_torchvision()
assert torchvision is sys.modules["torchvision"] and torchvision.transforms.v2 and len(torchvision_import._SCHEMAS) == 1
assert torchvision_import.import_torchvision() is torchvision and len(torchvision_import._SCHEMAS) == 1
"""


def test_torchvision_import_fix_is_applied_only_when_needed(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(
        [sys.executable, "-c", CURE, str(tmp_path)], env=environment, check=True, timeout=60
    )
