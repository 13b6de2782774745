"""Where the images of a data set are. Reading their pixels is not done here."""

import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path, PureWindowsPath

from PIL import Image, UnidentifiedImageError

from refinetool.errors import DataError
from refinetool.records import Size

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
"""Of two images that differ in nothing else, the one whose suffix comes first is taken."""


def leaves_folder(name: str) -> bool:
    """Whether a file name, taken from a file of annotations, could point outside the folder it is looked up in."""
    path = PureWindowsPath(name)  # also splits at "/", so it knows the ways out of both systems
    return bool(path.anchor) or ".." in path.parts


def by_stem(folder: Path) -> dict[str, Path]:
    """The images in a folder and its sub-folders by their path within it, without suffix: `bear/00001` ..."""
    found: dict[str, Path] = {}
    for path in sorted(files_under(folder, SUFFIXES), key=lambda path: SUFFIXES.index(path.suffix.lower())):
        found.setdefault(stem(path, folder), path)
    return found


def files_under(folder: Path, suffixes: Iterable[str]) -> Iterator[Path]:
    """Files with one of the suffixes in a folder and its sub-folders, hidden ones left out."""
    accepted = tuple(suffixes)
    for path in folder.rglob("*"):
        if path.suffix.lower() in accepted and not any(part[0] == "." for part in path.relative_to(folder).parts):
            yield path


def stem(path: Path, folder: Path) -> str:
    """Path within a folder, without suffix, with forward slashes."""
    return path.relative_to(folder).with_suffix("").as_posix()


def existing_folder(folder: Path) -> Path:
    """The folder itself, if it is one."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; name the folder of the images with --images.")
    return folder


def header_size(path: Path) -> Size | None:
    """(H, W) as an image's header has it, before any EXIF rotation; None for a file that can't be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # only the header is read
            with Image.open(path) as image:
                return image.height, image.width
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError):
        return None
