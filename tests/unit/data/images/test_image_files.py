"""Image files: a folder is listed like `ls` lists it, and an image is opened like a viewer shows
it."""

import os
import random
import re
import socket
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from damage import open_damaged_files
from made_up_images import png
from PIL import Image

from moe_dist.data.images.image_files import (
    NO_ENDING,
    REPEATED_FOLDER,
    format_left_out,
    list_images,
    open_image,
)
from moe_dist.inference.classify import images_of


def save(path: Path, seed: int = 0, kind: str = "png") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixel_YXQ = np.frombuffer(random.Random(seed).randbytes(5 * 7 * 3), np.uint8).reshape(5, 7, 3)
    Image.fromarray(pixel_YXQ).save(path, kind)
    return path


def listed(*folders: Path) -> tuple[list[list[str]], Counter[str]]:
    """Returns names relative to the first folder's parent."""
    found, left_out = list_images(folders)
    return [
        [os.path.relpath(file, folders[0].parent) for file in files] for files in found
    ], left_out


# which files are images


def test_hidden_files_are_ignored(tmp_path: Path) -> None:
    save(tmp_path / "a" / "x.png")
    for hidden in (
        ".y.png",
        "._x.png",
        ".ipynb_checkpoints/x.png",
        ".thumbnails/n/x.png",
        "__MACOSX/x.png",
        "below/.DS/x.png",
        "below/@eaDir/x.jpg",
        "lost+found/x.png",
    ):
        save(tmp_path / "a" / hidden)
    assert listed(tmp_path / "a") == ([["a/x.png"]], Counter())
    assert images_of([tmp_path / "a"]) == [tmp_path / "a" / "x.png"]
    named = tmp_path / "a" / ".thumbnails"  # but not where it is asked for
    assert images_of([named, tmp_path / "a" / ".y.png"]) == [
        named / "n" / "x.png",
        tmp_path / "a" / ".y.png",
    ]


def test_every_file_that_pil_decodes_is_an_image(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kinds = {
        "a.PNG": "png",
        "b.JpG": "jpeg",
        "c.jfif": "jpeg",
        "d.gif": "gif",
        "e.webp": "webp",
        "f.avif": "avif",
        "g.tga": "tga",
        "h.jp2": "jpeg2000",
        "i": "png",
        "j": "webp",
        "k.jpg": "png",
        "l.ppm": "ppm",
        "deep/er.x/m.TIF": "tiff",
    }
    for name, kind in kinds.items():
        save(tmp_path / name, kind=kind)
    for name in (
        "labels.csv",
        "labels.CSV",
        "x.txt",
        "x.png.part",
        "figure.svg",
        "x.eps",
        "film.mpeg",
        "README",
        "n.",
    ):
        (tmp_path / name).write_bytes(b"some text")
    [found], left_out = list_images([tmp_path])
    assert [os.path.relpath(file, tmp_path) for file in found] == [*kinds]
    for file in found:
        assert open_image(file, "RGB").size == (7, 5)
    assert left_out == {
        ".csv": 2,
        ".txt": 1,
        ".part": 1,
        ".svg": 1,
        ".eps": 1,
        ".mpeg": 1,
        NO_ENDING: 1,
        ".": 1,
    }
    assert format_left_out(left_out).startswith("9 left out: 2 .csv, 1 ") and format_left_out(
        left_out
    ).endswith(", ...")
    assert images_of([tmp_path]) == [*map(Path, found)]
    assert capsys.readouterr().err == f"note: {format_left_out(left_out)}\n"


def test_ignored_files_are_reported_in_plain_characters() -> None:
    assert format_left_out(Counter()) == ""
    assert (
        format_left_out(Counter({".a\nb\udcff": 2, NO_ENDING: 1}))
        == r"3 left out: 2 .a\nb\udcff, 1 without an ending"
    )


def test_no_folder_is_listed_twice_and_links_are_followed(tmp_path: Path) -> None:
    train, elsewhere = tmp_path / "train", tmp_path / "elsewhere"
    for name in ("cat/0.png", "cat/z/1.png", "dog/2.png", "dog/sub/3.png"):
        save(train / name)
    save(elsewhere / "4.png")
    save(elsewhere / "below" / "5.png")
    for link, to in {
        "cat/self": ".",
        "cat/up": "..",
        "cat/top": "../..",
        "cat/z/back": "../../cat",
        "cat/dogs": "../dog/sub",
        "cat/a": "z",
        "dog/more": elsewhere,
        "dog/more too": elsewhere / "below",
        "dog/6.png": elsewhere / "4.png",
    }.items():
        (train / link).symlink_to(to)
    (elsewhere / "below" / "home").symlink_to(train)
    found, left_out = listed(train / "cat", train / "dog")
    assert found == [
        ["cat/0.png", "cat/z/1.png"],
        ["dog/2.png", "dog/6.png", "dog/more/4.png", "dog/more/below/5.png", "dog/sub/3.png"],
    ]
    assert left_out == {REPEATED_FOLDER: 8}
    (train / "bird").symlink_to("cat")  # one folder for two classes
    assert listed(train / "cat", train / "bird", train / "dog")[0] == [found[0], [], found[1]]


@pytest.mark.parametrize(
    "kind", ["pipe", "pipe.png", "socket", "link to a pipe", "broken link", "loop", "device"]
)
def test_special_files_are_rejected_at_once(tmp_path: Path, kind: str) -> None:
    save(tmp_path / "a" / "0.png")
    path = tmp_path / "a" / ("x" if kind == "pipe" else "x.png")
    if kind.startswith("pipe"):
        os.mkfifo(path)
    elif kind == "socket":
        socket.socket(socket.AF_UNIX).bind(os.path.relpath(path))
    elif kind == "link to a pipe":
        os.mkfifo(tmp_path / "pipe")
        path.symlink_to("../pipe")
    else:
        path.symlink_to({"broken link": "gone.png", "loop": "x.png", "device": "/dev/zero"}[kind])
    for act in (
        lambda: list_images([path.parent]),
        lambda: images_of([path.parent]),
        lambda: open_image(path, "L"),
    ):
        with pytest.raises(ValueError, match=re.escape(repr(str(path)))) as error:
            act()
        assert "\n" not in str(error.value)
    if kind not in ("broken link", "loop"):  # it is not even opened, which may wake another program
        assert (
            "not a regular file (a folder, a pipe, a device or a socket); give a regular file"
            in str(error.value)
        )
    assert len(images_of([tmp_path / "a" / "0.png"])) == 1


def test_unreadable_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> None:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", refuse)  # root may read any
    with pytest.raises(
        ValueError, match=f"^{re.escape(repr(str(tmp_path)))} cannot be read .Permission denied"
    ):
        list_images([tmp_path])


# what is in one


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff"])
def test_exif_orientation_is_applied(tmp_path: Path, kind: str) -> None:
    pixel_YXQ = np.kron(
        np.random.default_rng(0).integers(0, 256, (2, 3, 3)), np.ones((16, 16, 1))
    ).astype(np.uint8)
    shown = {
        1: pixel_YXQ,
        2: pixel_YXQ[:, ::-1],
        3: pixel_YXQ[::-1, ::-1],
        4: pixel_YXQ[::-1],
        5: pixel_YXQ.swapaxes(0, 1),
        6: np.rot90(pixel_YXQ, 3),
        7: np.rot90(pixel_YXQ, 2).swapaxes(0, 1),
        8: np.rot90(pixel_YXQ, 1),
    }
    for orientation, expected in shown.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(pixel_YXQ).save(tmp_path / "x", kind, exif=exif, quality=100, lossless=True)
        actual = np.asarray(open_image(tmp_path / "x", "RGB")).astype(int)
        assert actual.shape == expected.shape
        assert abs(actual - expected)[8::16, 8::16].max() < 6, orientation  # of JPEG's rounding


@pytest.mark.filterwarnings("ignore")
def test_damaged_metadata_is_ignored(tmp_path: Path) -> None:
    plain = save(tmp_path / "plain.jpg", kind="jpeg")
    for number, exif in enumerate(
        (b"Exif\0\0II*\0\x08\0\0\0\xff\xff", b"Exif\0\0MM", b"Exif\0\0", b"Exif\0\0" + b"\xff" * 40)
    ):
        path = tmp_path / f"{number}.jpg"
        head, rest = plain.read_bytes()[:2], plain.read_bytes()[2:]
        path.write_bytes(head + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + rest)
        assert open_image(path, "RGB").tobytes() == open_image(plain, "RGB").tobytes()


def test_transparency_is_blended_on_white(tmp_path: Path) -> None:
    """By hand: black of alpha 255, 0 and 51, a fifth: 0, 255 and 255 - 51 = 204."""
    alpha_YX = np.array([[255, 0, 51]], np.uint8)
    black = Image.new("RGB", (3, 1))
    black.putalpha(Image.fromarray(alpha_YX))
    for name, image in {
        "rgba.png": black,
        "la.png": black.convert("LA"),
        "rgba.webp": black,
        "rgba.tiff": black,
    }.items():
        image.save(tmp_path / name, lossless=True, exact=True)
        for mode in ("L", "RGB"):
            shown_YX = np.asarray(open_image(tmp_path / name, mode)).reshape(3, -1)
            assert (shown_YX == [[0], [255], [204]]).all(), (name, mode)
    # a palette with alphas, one with a transparent entry, and a color that stands for nothing, in
    # colors and in gray
    palette = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    palette.putpalette([0] * 9)
    palette.save(tmp_path / "palette.png", transparency=bytes([255, 0, 51]))
    palette.save(tmp_path / "palette.gif", transparency=1)
    Image.fromarray(np.array([[[0] * 3, [9, 0, 0], [0] * 3]], np.uint8)).save(
        tmp_path / "key.png", transparency=(9, 0, 0)
    )
    Image.fromarray(np.array([[0, 9, 0]], np.uint8)).save(tmp_path / "gray.png", transparency=9)
    for name, last in (("palette.png", 204), ("palette.gif", 0), ("key.png", 0), ("gray.png", 0)):
        for mode in ("L", "RGB"):
            assert (
                np.asarray(open_image(tmp_path / name, mode)).reshape(3, -1) == [[0], [255], [last]]
            ).all(), name


@pytest.mark.parametrize("kind", ["gif", "png", "webp", "tiff", "avif"])
def test_animation_is_read_as_its_first_frame(tmp_path: Path, kind: str) -> None:
    first, second = (Image.new("RGB", (8, 8), color) for color in ((250, 0, 0), (0, 0, 250)))
    first.save(tmp_path / "x", kind, save_all=True, append_images=[second], duration=100)
    assert np.abs(np.asarray(open_image(tmp_path / "x", "RGB")).astype(int) - [250, 0, 0]).max() < 8


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (png(60_000, 60_000), "exceeds limit"),
        (png(1, 65_000), "1 x 65000 pixels, but no side may be more than 100 times the other"),
        (png(50_500, 500), "500 x 50500 pixels"),
        (b"", "does not begin like any image"),
        (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n",
            "does not begin like any image",
        ),
        (
            b"\0\0\2" + bytes(9) + b"\5\0\5\0\x18\0" + bytes(75),
            "does not begin",
        ),  # TGA, which has no signature
    ],
)
def test_hostile_file_is_rejected_by_its_header(
    tmp_path: Path, content: bytes, reason: str
) -> None:
    (tmp_path / "x.png").write_bytes(content)
    for mode in (None, "L", "RGB"):
        with pytest.raises(ValueError, match=re.escape(repr(str(tmp_path / "x.png")))) as error:
            open_image(tmp_path / "x.png", mode)
        assert reason in str(error.value)


@pytest.mark.filterwarnings("ignore")
def test_damaged_file_is_an_image_or_one_line(tmp_path: Path) -> None:
    outcomes = open_damaged_files(tmp_path, 250, seed=18)
    assert min(outcomes["image"], outcomes["refused"]) > 100
