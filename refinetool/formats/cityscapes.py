"""Reads and writes Cityscapes: `*_instanceIds.png`, 16 bits, 1000 * class + number for objects, and `*_labelIds.png`.

Objects are refined. Values below 1,000 are classes without objects, or groups of objects; groups are kept, and objects
may take pixels of the others and give some to the nearest of them (`settling`). The `labelIds` beside follow. Other
files beside, such as `_color.png` and `_polygons.json`, are no masks, and are not written because they would be out of
date.
"""

import io
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from refinetool import masks
from refinetool.errors import DataError, ImageError
from refinetool.formats import CITYSCAPES, Request, Written
from refinetool.formats.image_files import by_stem, existing_folder, fence, header_size, refuse_link_out
from refinetool.formats.rasters import read_map, read_values, with_values
from refinetool.formats.settling import settle
from refinetool.formats.storage import new_folder, refuse_clashes
from refinetool.records import IntArray, Outcome, Region, Sample, Size
from refinetool.statuses import Reason

OBJECTS = 1000
"""Values from this one on are objects."""
GROUPS = range(24, 34)
"""Classes that have objects; as values below 1,000 they are groups of them."""
INSTANCES, LABELS, IMAGES = "_instanceIds", "_labelIds", "_leftImg8bit"


def open_cityscapes(path: Path, request: Request) -> "Cityscapes":
    """Open a folder of Cityscapes, such as `gtFine` or `gtFine/val`, or a single city.

    `gtFine/val/a/a_000_gtFine_instanceIds.png` belongs to `leftImg8bit/val/a/a_000_leftImg8bit.png`.

    Raises:
        DataError: There are no such files, or no images although they are needed.
    """
    files = sorted(existing_folder(path).rglob(f"*{INSTANCES}.png"))
    if not files:
        raise DataError(f"{path}: holds no files that end in {INSTANCES}.png.")
    place = existing_folder(request.images) if request.images else _images_of(path)
    images = {image.stem.removesuffix(IMAGES): image for image in by_stem(place).values()} if place else {}
    keys = {_name(file): file for file in files}
    if len(keys) < len(files):
        raise DataError(f"{path}: two files are named {INSTANCES} of the same image; name one of the folders.")
    matched = keys.keys() & images.keys()
    if request.need_images and not matched:
        raise DataError(
            f"{path}: none of its {len(files)} files has an image; name the folder of the images, such as leftImg8bit, "
            "with --images."
        )
    within = fence(place, request) if place else None
    if request.need_images:
        refuse_link_out(images[min(matched)], within)
    return Cityscapes(path, keys, images, place or path, within, request.need_images, request.max_pixels)


def _name(file: Path) -> str:
    """Return the name of an image: `a_000` of `a_000_gtFine_instanceIds.png`."""
    return file.stem.removesuffix(INSTANCES).rpartition("_gt")[0] or file.stem.removesuffix(INSTANCES)


def _images_of(path: Path) -> Path | None:
    """Return the folder of the images, in which the part `gtFine` of the path is `leftImg8bit`."""
    parts = path.absolute().parts
    for at in reversed(range(len(parts))):
        if parts[at].startswith("gt"):
            place = Path(*parts[:at], "leftImg8bit", *parts[at + 1 :])
            return place if place.is_dir() else None
    place = path / "leftImg8bit"
    return place if place.is_dir() else None


@dataclass(frozen=True, slots=True)
class Cityscapes:
    """See the module, and `formats.Dataset`.

    files: The instance maps by the name of their image, as are `images`.
    need_images: Whether images are read; then a map of another size is not decoded.
    max_pixels: Maps that claim more pixels are not decoded.
    """

    root: Path
    files: Mapping[str, Path]
    images: Mapping[str, Path]
    place: Path
    within: Path | None
    need_images: bool
    max_pixels: int

    @property
    def format(self) -> str:
        return CITYSCAPES

    def __len__(self) -> int:
        return len(self.files)

    def _image(self, key: str) -> Path:
        return self.images.get(key, self.place / f"{key}{IMAGES}.png")

    def image_paths(self) -> Iterator[Path]:
        return map(self._image, self.files)

    def remarks(self) -> tuple[str, ...]:
        return ()

    def samples(self) -> Iterator[Sample]:
        for key, file in self.files.items():
            yield self._sample(key, file)

    def _sample(self, key: str, file: Path) -> Sample:
        image = self._image(key)
        expected = header_size(image, within=self.within)
        try:
            ids = read_deep(file, sizes=_upright(expected) if self.need_images else (), max_pixels=self.max_pixels)
        except ImageError as error:
            broken = Region(0, None, None, error.reason, fault=str(error))
            return Sample(key, image, expected or (0, 0), (broken,), within=self.within)
        height, width = ids.shape
        objects = _objects(ids)
        keep = _reason_of_labels(_labels_of(file), (height, width)) if objects else None
        regions = (Region(value, value // OBJECTS, masks.encode(ids == value), keep) for value in objects)
        return Sample(key, image, (height, width), tuple(regions), within=self.within)

    def write(self, find: Callable[[str], Outcome | None], destination: Path, notes: Mapping[str, object]) -> Written:
        """See `formats.Dataset`; a PNG has no place for notes."""
        del notes
        refuse_clashes({"output": destination}, {"input": self.root})
        changed = 0
        with new_folder(destination) as partial:
            for key, file in self.files.items():
                target = partial / file.relative_to(self.root)
                target.parent.mkdir(parents=True, exist_ok=True)
                changed += self._write_image(file, find(key), target)
        return Written(destination, changed, ())

    def _write_image(self, file: Path, outcome: Outcome | None, target: Path) -> int:
        """Write the map of an image and the labels beside it, and return how many of its objects were refined."""
        labels = _labels_of(file)
        if outcome is None or not any(annotation.refined for annotation in outcome.annotations):
            shutil.copyfile(file, target)
            if labels.is_file():
                shutil.copyfile(labels, target.with_name(labels.name))
            return 0
        old = read_deep(file, sizes=(), max_pixels=self.max_pixels)
        objects = _objects(old)
        if len(objects) != len(outcome.annotations):
            raise DataError(f"{file}: has changed since it was read; run the command again.")
        refined = {
            value: (annotation.mask, annotation.predicted_iou)
            for value, annotation in zip(objects, outcome.annotations, strict=True)
            if annotation.refined and annotation.mask is not None
        }
        new = settle(old, refined, ground=(old < OBJECTS) & ~np.isin(old, GROUPS))
        target.write_bytes(_deep_png(new))
        if labels.is_file():
            values = np.where(new >= OBJECTS, new // OBJECTS, new)
            known = np.where(new == old, read_values(labels), values.astype(np.uint8))
            target.with_name(labels.name).write_bytes(with_values(labels, known))
        return len(refined)


def _objects(ids: IntArray) -> list[int]:
    return [value for value in np.unique(ids).tolist() if value >= OBJECTS]


def _labels_of(file: Path) -> Path:
    return file.with_name(file.name.replace(INSTANCES, LABELS))


def _reason_of_labels(labels: Path, size: Size) -> Reason | None:
    """Say why the labels beside a map of objects can't follow them; None if they can, or if there are none."""
    if not labels.is_file():
        return None
    if header_size(labels, within=None) not in (size, None):
        return Reason.SIZE_MISMATCH
    try:
        read_values(labels)
    except DataError:
        return Reason.UNREADABLE_MASK
    return None


def _upright(size: Size | None) -> tuple[Size, ...]:
    """Return the sizes that the map of an image may have, since its header may be of a photograph on its side."""
    return () if size is None else (size, size[::-1])


def read_deep(path: Path, *, sizes: Collection[Size], max_pixels: int) -> IntArray:
    """Read a grey PNG of 8 or 16 bits, int64 (H, W). See `rasters.read_map` for the arguments and errors."""
    values = read_map(path, sizes=sizes, max_pixels=max_pixels)
    if values.ndim != 2:
        fault = "has colours; expected one number of 16 bits per pixel"
        raise ImageError(f"{path}: {fault}.", reason=Reason.UNREADABLE_MASK)
    return values.astype(np.int64)


def _deep_png(values: IntArray) -> bytes:
    data = io.BytesIO()
    Image.fromarray(values.astype(np.uint16)).save(data, format="PNG")
    return data.getvalue()
