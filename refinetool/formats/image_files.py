"""Finds image files, without reading their pixels."""

import os
from collections.abc import Container, Iterable, Iterator
from pathlib import Path, PureWindowsPath

from refinetool.errors import DataError
from refinetool.formats import Request
from refinetool.images import leads_out, open_lazily
from refinetool.locations import is_remote, resolved
from refinetool.records import Size

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
"""Suffixes of images. Of two images that differ only in their suffix, the one whose suffix comes first is used."""


LONGEST_NAME, LONGEST_PATH = 255, 1024
"""Bytes of a file name and of a path within the image folder. No common file system has longer names."""


def fault_of_name(name: str) -> str | None:
    """Say why a file name from annotations can't be looked up in a folder, None if it can."""
    if is_foreign(name):
        return "leads out of the image folder"
    if "\0" in name:
        return "holds a NUL character"
    try:
        raw = os.fsencode(name)
    except UnicodeEncodeError:
        return "is not valid Unicode"
    if len(raw) > LONGEST_PATH or any(len(part) > LONGEST_NAME for part in raw.split(b"/")):
        return "is longer than file names can be"
    return None


def is_foreign(name: str) -> bool:
    """Whether a file name is an address, or a path that leads out of the folder that it is joined to."""
    path = PureWindowsPath(name)  # also splits at "/", so it handles the paths of both systems
    return bool(path.anchor) or ".." in path.parts or "://" in name


def fence(folder: Path, request: Request) -> Path | None:
    """Return the folder that links in it must not lead out of, resolved; None if they may."""
    return None if request.follow_links or is_remote(folder) else resolved(folder)


def by_stem(folder: Path, *, without: Container[Path] = ()) -> dict[str, Path]:
    """Map the images in a folder and its sub-folders by their path within it, without suffix: `bear/00001` ...

    Args:
        without: Files that are not images.
    """
    found: dict[str, Path] = {}
    for path in sorted(files_under(folder, SUFFIXES), key=lambda path: SUFFIXES.index(path.suffix.lower())):
        if path not in without:
            found.setdefault(stem(path, folder), path)
    return found


def files_under(folder: Path, suffixes: Iterable[str], *, deep: bool = True) -> Iterator[Path]:
    """Yield files with one of the suffixes in a folder and, if `deep`, in its sub-folders, without hidden ones."""
    accepted = tuple(suffixes)
    for path in folder.rglob("*") if deep else folder.iterdir():
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


def refuse_link_out(path: Path, within: Path | None) -> None:
    """Raise DataError if a path leads out of a resolved folder; does nothing if the folder is None."""
    if leads_out(path, within):
        raise DataError(f"{path}: is a link that leads out of {within}; --follow-links allows that, if you trust it.")


def refuse_links_out(files: Iterable[Path], within: Path | None) -> None:
    """Raise DataError for the first file that is a link to nowhere, or out of a folder, resolved; None allows that."""
    for file in files:
        if not file.is_symlink():
            continue
        if not file.exists():
            raise DataError(f"{file}: is a link that leads nowhere; mend it, or remove it.")
        refuse_link_out(file, within)


def header_size(path: Path, *, within: Path | None) -> Size | None:
    """Return (H, W) from an image's header, before any EXIF rotation; None for a file that can't be read.

    Args:
        within: The folder that links must not lead out of; None if they may.
    """
    if leads_out(path, within):
        return None
    try:
        with path.open("rb") as file:
            width, height = open_lazily(file).size
    except Exception:  # the decoders of a dozen formats raise all kinds of exceptions for a broken file
        return None
    return height, width
