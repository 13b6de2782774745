"""Finds the PNGs of a folder of masks, and the folder of images that belongs to it."""

import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from refinetool.errors import DataError
from refinetool.formats.image_files import by_stem, existing_folder, files_under, stem
from refinetool.formats.png import check_headers
from refinetool.formats.storage import new_folder, refuse_overlap

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
    """

    root: Path
    folder: Path
    files: tuple[Path, ...]
    image_folder: Path
    images: Mapping[str, Path]

    def stem(self, file: Path) -> str:
        return stem(file, self.folder)

    def image(self, key: str) -> Path:
        """Return the image of that name; if there is none, the path where it was expected."""
        return self.images.get(key, self.image_folder / f"{key}.jpg")

    def write(self, rewrite: Callable[[Path], bytes | None], destination: Path) -> None:
        """Write a folder with the same mask files: the bytes of `rewrite(file)`, or a copy of the file for None."""
        refuse_overlap(self.root, destination)
        with new_folder(destination) as partial:
            for file in self.files:
                target = partial / file.relative_to(self.root)
                target.parent.mkdir(parents=True, exist_ok=True)
                content = rewrite(file)
                if content is None:
                    shutil.copyfile(file, target)
                else:
                    target.write_bytes(content)


def mask_files(folder: Path) -> tuple[Path, ...]:
    """Return the PNGs in a folder and its sub-folders, sorted. Raises DataError if there are none."""
    files = tuple(sorted(files_under(folder, (".png",))))
    if not files:
        raise DataError(f"{folder}: holds no PNGs; masks have to be PNGs, since other formats change values.")
    return files


def find_images(root: Path, folder: Path, images: Path | None, *, needed: bool) -> MaskFolder:
    """Pair the masks in `folder` with images in `images`, or in the first of the usual places that has one of them.

    Raises:
        DataError: There are no masks, their kind is not supported, or none has an image although images are needed.
    """
    files = mask_files(folder)
    masks = frozenset(files)
    keys = {key for file in files for key in (stem(file, folder), stem(file, folder).rpartition("/")[0])}
    places = _usual_places(folder) if images is None else [existing_folder(images)]
    for place in places:
        found = {key: path for key, path in by_stem(place).items() if path not in masks}
        if keys & found.keys():
            check_headers(files)
            return MaskFolder(root, folder, files, place, found)
    if not needed:
        check_headers(files)
        return MaskFolder(root, folder, files, folder, {})
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
