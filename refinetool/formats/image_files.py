"""Finds image files, without reading their pixels."""

import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path, PureWindowsPath

from PIL import Image, UnidentifiedImageError

from refinetool.errors import DataError
from refinetool.records import Size

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
"""Suffixes of images. Of two images that differ only in their suffix, the one whose suffix comes first is used."""


def leaves_folder(name: str) -> bool:
    """Whether a file name from annotations could point outside the folder in which it is looked up."""
    path = PureWindowsPath(name)  # also splits at "/", so it handles the paths of both systems
    return bool(path.anchor) or ".." in path.parts


def by_stem(folder: Path) -> dict[str, Path]:
    """Map the images in a folder and its sub-folders by their path within it, without suffix: `bear/00001` ..."""
    found: dict[str, Path] = {}
    for path in sorted(files_under(folder, SUFFIXES), key=lambda path: SUFFIXES.index(path.suffix.lower())):
        found.setdefault(stem(path, folder), path)
    return found


def files_under(folder: Path, suffixes: Iterable[str]) -> Iterator[Path]:
    """Yield files with one of the suffixes in a folder and its sub-folders, without hidden ones."""
    accepted = tuple(suffixes)
    for path in folder.rglob("*"):
        if path.suffix.lower() in accepted and not any(part[0] == "." for part in path.relative_to(folder).parts):
            yield path


def stem(path: Path, folder: Path) -> str:
    """Return the path within a folder, without suffix, with forward slashes."""
    return path.relative_to(folder).with_suffix("").as_posix()


def existing_folder(folder: Path) -> Path:
    """Return the folder; raises DataError if it does not exist."""
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; name the folder of the images with --images.")
    return folder


def header_size(path: Path) -> Size | None:
    """Return (H, W) from an image's header, before any EXIF rotation; None for a file that can't be read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # only the header is read
            with Image.open(path) as image:
                return image.height, image.width
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError):
        return None
