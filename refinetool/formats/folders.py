"""Finds the PNGs of a folder of masks, and the folder of images that belongs to it."""

import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from refinetool.errors import DataError
from refinetool.formats import Request
from refinetool.formats.image_files import (
    by_stem,
    existing_folder,
    fence,
    files_under,
    header_size,
    refuse_link_out,
    stem,
)
from refinetool.formats.png import check_headers
from refinetool.formats.storage import new_folder, refuse_clashes
from refinetool.records import Size

_BESIDE = ("JPEGImages", "images", "Images", "image", "imgs", "img", "im")
"""Common names of the image folder beside a folder of masks: in VOC and DAVIS, in most others, in HQSeg-44K."""


@dataclass(frozen=True, slots=True)
class MaskFolder:
    """Mask PNGs, and images with the same path without suffix.

    root: The path that the user named; outputs keep the paths within it.
    folder: The folder of the masks, `root` or a sub-folder.
    files: The PNGs, sorted by path.
    image_folder: Where images are looked for.
    images: The images there by path without suffix.
    within: The folder that links among the images must not lead out of; None if they may.
    """

    root: Path
    folder: Path
    files: tuple[Path, ...]
    image_folder: Path
    images: Mapping[str, Path]
    within: Path | None

    def stem(self, file: Path) -> str:
        return stem(file, self.folder)

    def image(self, key: str) -> Path:
        """Return the image of that name; if there is none, the path where it was expected."""
        return self.images.get(key, self.image_folder / f"{key}.jpg")

    def image_size(self, key: str) -> Size:
        """Return (H, W) of that image from its header, (0, 0) if it can't be read."""
        return header_size(self.image(key), within=self.within) or (0, 0)

    def write(self, rewrite: Callable[[Path], bytes | None], destination: Path) -> None:
        """Write a folder with the same mask files: the bytes of `rewrite(file)`, or a copy of the file for None."""
        refuse_clashes({"output": destination}, {"input": self.root})
        with new_folder(destination) as partial:
            for file in self.files:
                target = partial / file.relative_to(self.root)
                target.parent.mkdir(parents=True, exist_ok=True)
                content = rewrite(file)
                if content is None:
                    shutil.copyfile(file, target)
                else:
                    target.write_bytes(content)


def mask_files(folder: Path, *, follow_links: bool) -> tuple[Path, ...]:
    """Return the PNGs in a folder and its sub-folders, sorted.

    Raises:
        DataError: There are none, or one is a link that leads out of the folder and must not be followed.
    """
    files = tuple(sorted(files_under(folder, (".png",))))
    if not files:
        raise DataError(f"{folder}: holds no PNGs; masks have to be PNGs, since other formats change values.")
    within = None if follow_links else folder.resolve()
    for file in files:
        if file.is_symlink():
            refuse_link_out(file, within)
    return files


def find_images(root: Path, folder: Path, request: Request) -> MaskFolder:
    """Pair the masks in `folder` with images in the folder of the request, or in the first of the usual places that has
    one of them.

    Raises:
        DataError: There are no masks, their kind is not supported, or none has an image although images are needed.
    """
    images = request.images
    files = mask_files(folder, follow_links=request.follow_links)
    masks = frozenset(files)
    keys = {key for file in files for key in (stem(file, folder), stem(file, folder).rpartition("/")[0])}
    places = _usual_places(folder) if images is None else [existing_folder(images)]
    for place in places:
        found = {key: path for key, path in by_stem(place).items() if path not in masks}
        if matched := keys & found.keys():
            check_headers(files)
            if request.need_images:
                refuse_link_out(found[min(matched)], fence(place, request))
            return MaskFolder(root, folder, files, place, found, fence(place, request))
    if not request.need_images:
        check_headers(files)
        return MaskFolder(root, folder, files, folder, {}, fence(folder, request))
    where = " or ".join(map(str, places or [folder]))
    raise DataError(
        f"{folder}: none of its {len(files)} masks has an image of the same name in {where}; name the folder of the "
        "images with --images."
    )


def _usual_places(folder: Path) -> list[Path]:
    here = folder.absolute()
    beside = [here.parent / name for name in _BESIDE]
    above = [here.parent.parent / name / here.name for name in _BESIDE]  # Annotations/480p and JPEGImages/480p
    return [place for place in _distinct([*beside, *above, folder]) if place.is_dir()]


def _distinct(paths: Iterable[Path]) -> list[Path]:
    return list(dict.fromkeys(paths))
