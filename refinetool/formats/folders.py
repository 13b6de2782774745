"""Finds the files of a folder of masks, or a single mask, and the images that belong to them."""

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from refinetool.errors import DataError
from refinetool.formats import Request
from refinetool.formats.image_files import SUFFIXES as PICTURES
from refinetool.formats.image_files import (
    by_stem,
    existing_folder,
    fence,
    files_under,
    header_size,
    refuse_link_out,
    refuse_links_out,
    stem,
)
from refinetool.formats.rasters import SUFFIXES, check_headers
from refinetool.formats.storage import new_file, new_folder, refuse_clashes
from refinetool.locations import resolved
from refinetool.records import Size

_BESIDE = ("JPEGImages", "images", "Images", "image", "imgs", "img", "im")
"""Common names of the image folder beside a folder of masks: in VOC and DAVIS, in most others, in HQSeg-44K."""


@dataclass(frozen=True, slots=True)
class MaskFolder:
    """Mask files, and images with the same path without suffix.

    root: The path that the user named, a folder or a single mask; outputs keep the paths within it.
    folder: The folder of the masks: `root`, a sub-folder, or the one that the single mask is in.
    files: The masks, sorted by path.
    image_folder: Where images are looked for.
    images: The images there by path without suffix.
    within: The folder that links among the images must not lead out of; None if they may.
    ending: What the names of masks end in and those of their images do not, such as `_mask`.
    unread: Pictures among the masks that are read neither as masks nor as images, sorted by path.
    """

    root: Path
    folder: Path
    files: tuple[Path, ...]
    image_folder: Path
    images: Mapping[str, Path]
    within: Path | None
    ending: str = ""
    unread: tuple[Path, ...] = ()

    def stem(self, file: Path) -> str:
        """Return the name of a mask's image: its path without suffix and ending."""
        return stem(file, self.folder).removesuffix(self.ending)

    def image(self, key: str) -> Path:
        """Return the image of that name; if there is none, the path where it was expected."""
        return self.images.get(key, self.image_folder / f"{key}.jpg")

    def image_size(self, key: str) -> Size:
        """Return (H, W) of that image from its header, (0, 0) if it can't be read."""
        return header_size(self.image(key), within=self.within) or (0, 0)

    def remarks(self) -> tuple[str, ...]:
        """Say which pictures among the masks were not read."""
        if not self.unread:
            return ()
        first, number = self.unread[0].relative_to(self.folder), len(self.unread)
        told = f"1 file was not read as a mask: {first}"
        if number > 1:
            told = f"{number} files were not read as masks, the first {first}"
        return (f"{told}; masks have to be PNGs, TIFFs or BMPs, each with a name of its own.",)

    def write(self, rewrite: Callable[[Path], bytes | None], destination: Path) -> None:
        """Write the same mask files: the bytes of `rewrite(file)`, or a copy of the file for None."""
        refuse_clashes({"output": destination}, {"input": self.root})
        if self.root.is_file():
            with new_file(destination) as out:
                out.write(rewrite(self.root) or self.root.read_bytes())
            return
        with new_folder(destination) as partial:
            for file in self.files:
                target = partial / file.relative_to(self.root)
                target.parent.mkdir(parents=True, exist_ok=True)
                content = rewrite(file)
                if content is None:
                    shutil.copyfile(file, target)
                else:
                    target.write_bytes(content)


def folder_of(path: Path) -> Path:
    """Return the folder that a mask is in, or the folder itself; raises DataError if the path does not exist."""
    return path.parent if path.is_file() else existing_folder(path)


def mask_files(path: Path, *, follow_links: bool, ending: str = "") -> tuple[Path, ...]:
    """Return a mask, or the masks in a folder and its sub-folders, sorted: PNGs, TIFFs and BMPs.

    If a TIFF or BMP has the name of a PNG, or of a folder of PNGs, such files are images, and only PNGs are masks.

    Args:
        ending: Only files whose names, without suffix, end like this are masks.

    Raises:
        DataError: There are none, or one is a link that leads out of the folder and must not be followed.
    """
    if path.is_file():
        return (path,)
    found = [file for file in sorted(files_under(path, SUFFIXES)) if file.stem.endswith(ending)]
    pngs = tuple(file for file in found if file.suffix.lower() == ".png")
    names = {name for file in pngs for name in (file.with_suffix(""), file.parent)}
    has_images = any(file.with_suffix("") in names for file in found if file not in pngs)
    files = pngs if has_images else tuple(found)
    if not files:
        called = f" whose names end in {ending}" if ending else ""
        raise DataError(
            f"{path}: holds no PNGs{called}; masks have to be PNGs, TIFFs or BMPs, since JPEG changes values."
        )
    refuse_links_out(files, None if follow_links else resolved(path))
    return files


def find_images(root: Path, folder: Path, request: Request, *, files: tuple[Path, ...] | None = None) -> MaskFolder:
    """Pair the masks in `folder` with images in the folder of the request, or in the first of the usual places that has
    one of them.

    Args:
        files: The masks; None finds them.

    Raises:
        DataError: There are no masks, their kind is not supported, two have the same name, or none has an image
            although images are needed.
    """
    images, ending = request.images, request.mask_suffix
    if files is None:
        files = mask_files(root if root.is_file() else folder, follow_links=request.follow_links, ending=ending)
    if images is not None and not root.is_file() and resolved(images) != resolved(folder):
        files = _outside(files, images)
    _refuse_second(files)
    check_headers(files)
    if root.is_file() and images is not None and images.is_file():
        key = stem(root, folder).removesuffix(ending)
        return MaskFolder(root, folder, files, images.parent, {key: images}, None, ending)
    masks = frozenset(files)
    stems = [stem(file, folder).removesuffix(ending) for file in files]
    keys = {key for each in stems for key in (each, each.rpartition("/")[0])}
    places = _usual_places(folder) if images is None else [existing_folder(images)]
    for place in places:
        found = by_stem(place, without=masks)
        if matched := keys & found.keys():
            if request.need_images:
                refuse_link_out(found[min(matched)], fence(place, request))
            unread = () if root.is_file() else _unread(folder, files, place, ending=ending)
            return MaskFolder(root, folder, files, place, found, fence(place, request), ending, unread)
    if not request.need_images:
        return MaskFolder(root, folder, files, folder, {}, fence(folder, request), ending)
    where = " or ".join(map(str, places or [folder]))
    raise DataError(
        f"{folder}: none of its {len(files)} masks has an image of the same name in {where}; name the folder of the "
        "images with --images. If only the names of masks end in something like _mask, name it with --mask-suffix, or "
        "rename them where a command lacks this option."
    )


def _unread(folder: Path, masks: Sequence[Path], place: Path, *, ending: str) -> tuple[Path, ...]:
    """Return the pictures in a folder of masks that are not read: neither masks nor in the folder of the images."""
    shared = resolved(place) == resolved(folder)
    if shared and not ending:
        return ()
    known = frozenset(masks)
    named = (file for file in files_under(folder, PICTURES) if file.stem.endswith(ending))
    others = tuple(file for file in sorted(named) if file not in known)
    return others if shared else _outside(others, place)


def _outside(files: Iterable[Path], folder: Path) -> tuple[Path, ...]:
    """Return those files that are not in a folder."""
    around = resolved(folder)
    return tuple(file for file in files if not resolved(file).is_relative_to(around))


def _refuse_second(masks: Iterable[Path]) -> None:
    """Raise DataError if two masks differ only in their suffix."""
    first: dict[Path, Path] = {}
    for file in masks:
        other = first.setdefault(file.with_suffix(""), file)
        if other is not file:
            raise DataError(f"{file}: is a second mask of the image of {other.name}; keep one of them.")


def _usual_places(folder: Path) -> list[Path]:
    here = folder.absolute()
    beside = [here.parent / name for name in _BESIDE]
    above = [here.parent.parent / name / here.name for name in _BESIDE]  # Annotations/480p and JPEGImages/480p
    return [place for place in _distinct([*beside, *above, folder]) if place.is_dir()]


def _distinct(paths: Iterable[Path]) -> list[Path]:
    return list(dict.fromkeys(paths))
