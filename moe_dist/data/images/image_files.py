"""Image files: which files of a folder are images, and how one is opened, for training, evaluation and `classify`.

A folder is read as `ls` shows it and an image as a viewer shows it: names that begin with a dot are passed over, the
camera's orientation is applied, transparency lies on white, and of an animation the first frame is taken.
"""

import contextlib
import os
import warnings
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from moe_dist.data.files.regular_file import open_file

# folders that other programs make, with thumbnails, halves of files and what was deleted
SYSTEM_FOLDERS = {"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
# formats that PIL recognises and cannot decode, and EPS, for which it starts Ghostscript
NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
LONGEST_SIDE = (
    100  # times the other: resized to a short side of 384 pixels, such an image has 15 million
)
AGAIN = "a link to a folder that is listed already"
MOST_NAMED = 5  # files of a message
NO_ENDING = "without an ending"

# of damaged metadata, and of half the pixels from which it refuses an image; they do not name the file
warnings.filterwarnings("ignore", module=r"PIL\.")


def list_images(folders: Sequence[str | os.PathLike[str]]) -> tuple[list[list[str]], Counter[str]]:
    """Lists the image files of each folder and of the folders below it, by their endings; a file without an ending is
    opened to find out.

    Links are followed, after all real folders. No folder is listed twice, and none that contains one of `folders`: a
    link to such a folder would list images of one class for another.

    Returns:
        The sorted paths of each folder's images; and what is left out: how many files by ending, and links (`AGAIN`).

    Raises:
        ValueError: for a folder that cannot be read, and for an entry that is neither a file nor a folder, naming it.
    """
    found: list[list[str]] = [[] for _ in folders]
    left_out: Counter[str] = Counter()
    listed = {
        _identity(parent) for folder in folders for parent in Path(os.path.realpath(folder)).parents
    }
    places = deque((i, os.fspath(folder)) for i, folder in enumerate(folders))
    links: deque[tuple[int, str]] = deque()
    while places or links:
        i, place = (places or links).popleft()
        if (identity := _identity(place)) in listed:
            left_out[AGAIN] += 1
            continue
        listed.add(identity)
        for entry in entries(place):
            if entry.is_dir():
                (links if entry.is_symlink() else places).append((i, entry.path))
            elif _is_image(entry.path):
                found[i].append(entry.path)
            else:
                left_out[_ending(entry.name) or NO_ENDING] += 1
    return [sorted(files, key=os.path.split) for files in found], left_out


def entries(folder: str | os.PathLike[str]) -> list[os.DirEntry[str]]:
    """Returns the files and folders in `folder` that are not hidden, sorted by name.

    Raises:
        ValueError: where it cannot be read, and for an entry that is neither a file nor a folder, naming it.
    """
    try:
        with os.scandir(folder) as scan:
            shown = [
                entry
                for entry in scan
                if not entry.name.startswith(".") and entry.name not in SYSTEM_FOLDERS
            ]
        for entry in shown:
            if not entry.is_dir() and not entry.is_file():
                raise ValueError(
                    f"{entry.path!r} is neither a file nor a folder, but a link that leads nowhere, a pipe or a "
                    f"device: mend or remove it"
                )
    except OSError as error:
        raise _unreadable(folder, error) from None
    return sorted(shown, key=lambda entry: entry.name)


def _identity(folder: str | os.PathLike[str]) -> tuple[int, int]:
    """The same for all paths that lead to one folder."""
    try:
        status = os.stat(folder)
    except OSError as error:
        raise _unreadable(folder, error) from None
    return status.st_dev, status.st_ino


def _unreadable(folder: str | os.PathLike[str], error: OSError) -> ValueError:
    return ValueError(
        f"{error.filename or os.fspath(folder)!r} cannot be read ({error.strerror}): mend or remove it"
    )


def _is_image(path: str) -> bool:
    """Whether a file is one by its ending, or by its head where it has no ending."""
    if _ending(path):
        return _ending(path) in _formats()
    try:
        open_image(path, None)
    except ValueError:
        return False
    return True


def _ending(path: str) -> str:
    """Returns ".jpg" of "a/B.JPG"; empty where there is none."""
    return os.path.splitext(path)[1].lower()


@cache
def _formats() -> dict[str, list[str]]:
    """Returns PIL's formats that a file may have, by its ending; "" stands for an unknown one.

    Files often have another format than their ending says. A format without a signature, which
    almost any bytes match, is only accepted with its own ending.
    """
    Image.init()
    decoded = Image.OPEN.keys() - NOT_DECODED
    signed = [kind for kind, (_, accept) in Image.OPEN.items() if kind in decoded and accept]
    endings = {
        ending: kind for ending, kind in Image.registered_extensions().items() if kind in decoded
    }
    return {"": signed} | {
        ending: signed if kind in signed else [*signed, kind] for ending, kind in endings.items()
    }


def told_left_out(left_out: Counter[str]) -> str:
    """Returns a line for people of what `list_images` left out, the most frequent kinds first; empty for nothing."""
    if not left_out:
        return ""
    kinds = [f"{count} {ascii(kind)[1:-1][:60]}" for kind, count in left_out.most_common()]
    return f"{left_out.total()} left out: {', '.join(kinds[:5] + ['...'] * (len(kinds) > 5))}"


def open_image(
    path: str | bytes | os.PathLike[str], mode: str | None, side: int | None = None
) -> Image.Image:
    """Opens an image file as a viewer shows it.

    Args:
        path: The file.
        mode: PIL's mode that it is decoded to; None reads its head alone.
        side: Pixels that are enough for each side: a JPEG that has more is decoded to a half, a quarter or an eighth.

    Raises:
        ValueError: for a file that cannot be read, or is none (a pipe is not waited for), naming it.
    """
    path = os.fsdecode(path)
    try:
        formats = _formats().get(_ending(path), _formats()[""])
        with open_file(path) as file, Image.open(file, formats=formats) as image:
            if image.mode[0] in "IF":  # which `convert` would cut off at 255
                raise ValueError(
                    f"its numbers are of PIL's mode {image.mode}, more than 8 bits: make them bytes"
                )
            short, long = sorted(image.size)
            if long > LONGEST_SIDE * short:
                raise ValueError(
                    f"it has {short} x {long} pixels, and no side may be {LONGEST_SIDE} times the other"
                )
            if side:
                image.draft(None, (side, side))
            return _shown(image, mode) if mode else image
    except UnidentifiedImageError:
        reason = "it does not begin like any image that PIL decodes"
    except Exception as error:  # of many kinds: what a damaged file does to a decoder
        reason = " ".join(str(error).split()) or type(error).__name__
    raise ValueError(f"{path!r} is no image that can be read ({reason}): mend or remove it")


def check_heads(paths: Iterable[str | bytes | os.PathLike[str]]) -> None:
    """Reads the head of every image file.

    Raises:
        ValueError: Files hold no image; with their number, and naming the first ones.
    """
    refused = []
    for path in paths:
        try:
            open_image(path, None)
        except ValueError as error:
            refused.append(str(error))
    if len(refused) > 1:
        raise ValueError(
            f"{len(refused)} files are no images that can be read: {'; '.join(refused[:MOST_NAMED])}"
        )
    if refused:
        raise ValueError(refused[0])


def _shown(image: Image.Image, mode: str) -> Image.Image:
    image.load()  # before what may hide the error of a damaged file
    with contextlib.suppress(Exception):  # of many kinds: damaged metadata, which a viewer ignores
        ImageOps.exif_transpose(image, in_place=True)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)
