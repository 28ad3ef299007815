"""Image files: which files in a folder are images, and how an image file is opened.

Training, evaluation and `classify` share these rules. A folder is listed as `ls` lists it: names
that begin with a dot are skipped. An image is opened as a viewer shows it: the camera's orientation
is applied, transparent pixels are blended with white, and only the first frame is read from an
animation.
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

REPEATED_FOLDER = "a link to a folder that is listed already"
NO_ENDING = "without an ending"

# folders that other programs create, with thumbnails, partial files and deleted files
_SYSTEM_FOLDERS = {"__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
# formats that PIL recognizes but does not decode; and EPS, for which PIL starts Ghostscript
_NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}
# PIL's modes with more than 8 bits begin with these letters; `convert` cuts their values at 255
_WIDE_MODES = ("I", "F")
# Long side over short side. With the short side resized to 384 pixels, the largest image that is
# accepted has 15 million pixels.
_MAX_ASPECT_RATIO = 100
_MAX_LISTED_FILES = 5  # in an error
_MAX_LISTED_KINDS = 5  # in a note
_MAX_KIND_CHARS = 60

# PIL warns about damaged metadata, and about images with half as many pixels as it refuses; these
# warnings do not name the file.
warnings.filterwarnings("ignore", module=r"PIL\.")


def list_images(folders: Sequence[str | os.PathLike[str]]) -> tuple[list[list[str]], Counter[str]]:
    """Lists the image files of each folder and of the folders below it.

    A file is an image if it has the ending for an image format; a file without an ending is opened
    to find out. Links are followed, after all real folders. No folder is listed twice, and neither
    is a parent of `folders`: a link to such a folder adds one class's images to another.

    Args:
        folders: The folders, such as one for each class.

    Returns:
        The sorted paths of each folder's images, and a count for each kind that is left out: files
        by their endings, and links (`REPEATED_FOLDER`).

    Raises:
        ValueError: A folder cannot be read, or an entry is neither a file nor a folder. The message
            names it.
    """
    images: list[list[str]] = [[] for _ in folders]
    left_out: Counter[str] = Counter()
    listed: set[tuple[int, int]] = set()  # folder identities
    for folder in folders:
        listed.update(map(_identity, Path(os.path.realpath(folder)).parents))
    real_folders = deque((i, os.fspath(folder)) for i, folder in enumerate(folders))
    links: deque[tuple[int, str]] = deque()
    while real_folders or links:
        i, place = (real_folders or links).popleft()
        identity = _identity(place)
        if identity in listed:
            left_out[REPEATED_FOLDER] += 1
            continue
        listed.add(identity)
        for entry in visible_entries(place):
            if entry.is_dir():
                queue = links if entry.is_symlink() else real_folders
                queue.append((i, entry.path))
            elif _is_image(entry.path):
                images[i].append(entry.path)
            else:
                left_out[_ending(entry.name) or NO_ENDING] += 1
    return [sorted(files, key=os.path.split) for files in images], left_out


def format_left_out(left_out: Counter[str]) -> str:
    """Returns a note on the entries that were left out, the most frequent kinds first.

    Args:
        left_out: A count by kind, from `list_images`.

    Returns:
        One printable line such as "3 left out: 2 .txt, 1 .csv"; "" if nothing is left out.
    """
    if not left_out:
        return ""
    kinds = []
    for kind, count in left_out.most_common(_MAX_LISTED_KINDS):
        kinds.append(f"{count} {ascii(kind)[1:-1][:_MAX_KIND_CHARS]}")
    if len(left_out) > _MAX_LISTED_KINDS:
        kinds.append("...")
    return f"{left_out.total()} left out: {', '.join(kinds)}"


def visible_entries(folder: str | os.PathLike[str]) -> list[os.DirEntry[str]]:
    """Returns the files and folders in `folder` that are not hidden, sorted by name.

    Args:
        folder: The folder; folders below it are not entered.

    Returns:
        The entries, each of which is a file, a folder, or a link to one.

    Raises:
        ValueError: The folder cannot be read, or an entry is neither a file nor a folder. The
            message names it.
    """
    visible = []
    try:
        with os.scandir(folder) as scan:
            for entry in scan:
                if not entry.name.startswith(".") and entry.name not in _SYSTEM_FOLDERS:
                    visible.append(entry)
        for entry in visible:
            if not entry.is_dir() and not entry.is_file():
                raise ValueError(
                    f"{entry.path!r} is neither a file nor a folder, but a broken link, a pipe or "
                    "a device; repair or remove it"
                )
    except OSError as error:
        raise _cannot_be_read(folder, error) from None
    return sorted(visible, key=lambda entry: entry.name)


def open_image(
    path: str | bytes | os.PathLike[str], mode: str | None, min_side: int | None = None
) -> Image.Image:
    """Opens an image file as a viewer shows it.

    Args:
        path: The file.
        mode: PIL's mode to which the image is decoded, such as "L" or "RGB"; None reads only the
            file's head.
        min_side: Pixels that suffice for each side. A larger JPEG file is decoded at a half, a
            quarter or an eighth scale, which is faster.

    Returns:
        The decoded image; if `mode` is None, an image without pixels.

    Raises:
        ValueError: The file cannot be read, or is not an image. The message names it.
    """
    path = os.fsdecode(path)
    try:
        formats = _formats().get(_ending(path), _formats()[""])
        with open_file(path) as file, Image.open(file, formats=formats) as image:
            _check_head(image)
            if min_side:
                image.draft(None, (min_side, min_side))
            return _decode(image, mode) if mode else image
    except UnidentifiedImageError:
        reason = "it does not begin like any image that PIL decodes"
    except Exception as error:  # a decoder raises many types for a damaged file
        reason = " ".join(str(error).split()) or type(error).__name__
    raise ValueError(f"{path!r} is not a readable image ({reason}); repair or remove it")


def check_heads(paths: Iterable[str | bytes | os.PathLike[str]]) -> None:
    """Reads the head of every image file.

    Args:
        paths: The files.

    Raises:
        ValueError: Files are not images. The message has their number and names the first ones.
    """
    errors = []
    for path in paths:
        try:
            open_image(path, None)
        except ValueError as error:
            errors.append(str(error))
    if len(errors) > 1:
        listed = "; ".join(errors[:_MAX_LISTED_FILES])
        raise ValueError(f"{len(errors)} files are not readable images: {listed}")
    if errors:
        raise ValueError(errors[0])


def _identity(folder: str | os.PathLike[str]) -> tuple[int, int]:
    """Returns a key that is equal for all paths that lead to one folder."""
    try:
        status = os.stat(folder)
    except OSError as error:
        raise _cannot_be_read(folder, error) from None
    return status.st_dev, status.st_ino


def _cannot_be_read(folder: str | os.PathLike[str], error: OSError) -> ValueError:
    path = error.filename or os.fspath(folder)
    return ValueError(f"{path!r} cannot be read ({error.strerror}); repair or remove it")


def _is_image(path: str) -> bool:
    """Returns whether a file is an image by its ending, or by its head if it has no ending."""
    ending = _ending(path)
    if ending:
        return ending in _formats()
    try:
        open_image(path, None)
    except ValueError:
        return False
    return True


def _ending(path: str) -> str:
    """Returns ".jpg" for "a/B.JPG", and "" for a name without an ending."""
    return os.path.splitext(path)[1].lower()


@cache
def _formats() -> dict[str, list[str]]:
    """Returns PIL's formats that a file may have, by its ending; "" stands for all other endings.

    Files often have another format than their ending indicates, so that every format with a
    signature is accepted. A format without a signature matches almost any bytes, and is accepted
    only with its own ending.
    """
    Image.init()
    decoded = Image.OPEN.keys() - _NOT_DECODED
    signed = [name for name, (_, accept) in Image.OPEN.items() if name in decoded and accept]
    formats = {"": signed}
    for ending, name in Image.registered_extensions().items():
        if name in decoded:
            formats[ending] = signed if name in signed else [*signed, name]
    return formats


def _check_head(image: Image.Image) -> None:
    """Raises ValueError for values of more than 8 bits, and for a very long image."""
    if image.mode.startswith(_WIDE_MODES):
        raise ValueError(f"its mode in PIL is {image.mode}, more than 8 bits; convert it to 8 bits")
    short, long = sorted(image.size)
    if long > _MAX_ASPECT_RATIO * short:
        raise ValueError(
            f"it has {short} x {long} pixels, but no side may be more than {_MAX_ASPECT_RATIO} "
            "times the other"
        )


def _decode(image: Image.Image, mode: str) -> Image.Image:
    # before `exif_transpose`, whose errors are suppressed: a damaged file must raise an error here
    image.load()
    with contextlib.suppress(Exception):  # many types, for damaged metadata
        ImageOps.exif_transpose(image, in_place=True)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert(mode)
