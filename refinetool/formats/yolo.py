"""Reads and writes YOLO segmentation labels: a text file per image, a line per object, `class x y x y ...`.

Coordinates are fractions of the image's width and height. A line holds one ring: holes can't be represented, and are
filled unless asked otherwise (`PolygonSettings.holes`); several islands are joined by cuts of no width, as Ultralytics'
own converter joins them. Lines with four coordinates are boxes, and stay as they are, as does the text of unchanged
lines.
"""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from refinetool import masks
from refinetool.errors import DataError
from refinetool.formats import YOLO, Request
from refinetool.formats.coco_masks import Decoded, PolygonCount, decode_segmentation, redraw_as_one
from refinetool.formats.image_files import by_stem, existing_folder, fence, refuse_link_out
from refinetool.formats.label_files import LabelFiles
from refinetool.records import Outcome, Region, Size
from refinetool.settings import PolygonSettings
from refinetool.statuses import Reason

LABELS, IMAGES = "labels", "images"
_NO_LABELS = ("classes.txt", "train.txt", "val.txt", "test.txt", "requirements.txt", "readme.txt")
_CONFIGURATIONS = (".yaml", ".yml")
_DECIMALS = 6


def open_yolo(path: Path, request: Request) -> LabelFiles:
    """Open a YOLO data set by its `data.yaml`, its folder, or its folder of labels.

    `labels/train/a.txt` belongs to `images/train/a.jpg`, or to the image of that name in the folder of the request.

    Raises:
        DataError: There are no labels, or no images although they are needed.
    """
    root = path.parent if path.is_file() else existing_folder(path)
    files = label_files(root)
    if not files:
        raise DataError(f"{path}: holds no labels; expected text files, in folders named {LABELS}.")
    copied = tuple(sorted(file for suffix in _CONFIGURATIONS for file in root.glob(f"*{suffix}")))
    folder = existing_folder(request.images) if request.images else None
    found = _images(files, folder)
    place = folder or Path(os.path.commonpath([image.parent.absolute() for image in found.values()]))
    within = fence(place, request)
    existing = next((image for image in found.values() if image.is_file()), None)
    if request.need_images and existing is None:
        first = next(iter(found.values()))
        raise DataError(
            f"{path}: none of its {len(files)} label files has an image, the first not {first}; name the folder of the "
            "images with --images."
        )
    if request.need_images and existing is not None:
        refuse_link_out(existing, within)
    codec = Yolo(request.polygons, request.max_pixels)
    return LabelFiles(YOLO, root, files, copied, found.__getitem__, within, codec)


def label_files(root: Path) -> dict[str, Path]:
    """Return the label files under a folder by their path without suffix: those in folders named `labels`, or all."""
    every = [file for file in sorted(root.rglob("*.txt")) if file.name.lower() not in _NO_LABELS]
    inside = [file for file in every if LABELS in file.relative_to(root).parts[:-1]]
    return {file.relative_to(root).with_suffix("").as_posix(): file for file in inside or every}


def _images(files: dict[str, Path], folder: Path | None) -> dict[str, Path]:
    """Return the image of each label file, or where it was expected."""
    known = {} if folder is None else by_stem(folder)
    names: dict[str, list[Path]] = {}
    for image in known.values():
        names.setdefault(image.stem, []).append(image)
    beside: dict[Path, dict[str, Path]] = {}
    found = {}
    for key, file in files.items():
        if folder is not None:
            inner = key.rpartition(f"{LABELS}/")[2]
            same = names.get(file.stem, [])
            found[key] = known.get(inner) or (same[0] if len(same) == 1 else folder / f"{inner}.jpg")
            continue
        place = _beside(file.parent)
        if place not in beside:
            beside[place] = {image.stem: image for image in by_stem(place).values() if image.parent == place}
        found[key] = beside[place].get(file.stem, place / f"{file.stem}.jpg")
    return found


def _beside(folder: Path) -> Path:
    """Return the folder of the images of a folder of labels: its last part `labels` becomes `images`."""
    parts = folder.absolute().parts
    for at in reversed(range(len(parts))):
        if parts[at] == LABELS and (place := Path(*parts[:at], IMAGES, *parts[at + 1 :])).is_dir():
            return place
    return folder


@dataclass(frozen=True, slots=True)
class Yolo:
    """See the module."""

    polygons: PolygonSettings
    max_pixels: int

    def read(self, file: Path, size: Size) -> tuple[Size, tuple[Region, ...]]:
        """Return the size, and one region per line that is not blank, numbered from 0."""
        lines = enumerate(_lines(file))
        return size, tuple(self._region(number, line, size, file) for number, line in lines if line.strip())

    def _region(self, number: int, line: str, size: Size, file: Path) -> Region:
        record = f"{file}, line {number + 1}"
        category, *rest = line.split()
        try:
            values = [float(text) for text in rest]
            known = int(float(category))
        except (ValueError, OverflowError):
            broken = Decoded(None, Reason.UNREADABLE_MASK, f"{line.strip()!r:.40} holds something other than numbers")
            return Region(number, None, None, broken.keep, fault=broken.fault_of(record))
        if len(values) <= 5:  # a box, with or without a score
            return Region(number, known, None, Reason.EMPTY)
        if len(values) % 2:  # predictions have a score at the end
            values = values[:-1]
        height, width = size
        ring = (np.array(values).reshape(-1, 2) * (width, height)).ravel()
        found = decode_segmentation([[*ring.tolist()]], size, max_pixels=self.max_pixels)
        return Region(number, known, found.mask, found.keep, fault=found.fault_of(record))

    def rewritten(self, file: Path, size: Size, outcome: Outcome, count: PolygonCount) -> bytes:
        """Replace the coordinates in the lines of refined regions."""
        lines = file.read_bytes().decode("utf-8-sig").splitlines(keepends=True)
        places = [place for place, line in enumerate(lines) if line.strip()]
        if len(places) != len(outcome.annotations):
            raise DataError(f"{file}: has changed since it was read; run the command again.")
        height, width = size
        for place, annotation in zip(places, outcome.annotations, strict=True):
            if not annotation.refined or annotation.mask is None or not masks.area(annotation.mask):
                continue
            ring, redrawn = redraw_as_one(annotation.mask, polygons=self.polygons)
            count.add(redrawn)
            line = lines[place]
            old = line.split()
            score = old[-1:] if len(old) % 2 == 0 else []
            numbers = [f"{number:.{_DECIMALS}f}" for number in (ring / (width, height)).clip(0, 1).ravel()]
            ending = line[len(line.rstrip("\r\n")) :]
            lines[place] = " ".join([old[0], *numbers, *score]) + ending
        return "".join(lines).encode()


def _lines(file: Path) -> list[str]:
    try:
        return file.read_bytes().decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: can't be read ({error}).") from error
