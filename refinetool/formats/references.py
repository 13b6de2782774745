"""Reads annotated reference images: a COCO file in which a few objects are marked, or a folder of class maps.

A record of the file may mark its object by `segmentation` (polygons or RLE), `scribble` (strokes), `points` or
`keypoints`, or `bbox`; if it has several, the first of these that is not empty counts. All marks of a class in an image
are one reference.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import cv2
import numpy as np

from refinetool import masks
from refinetool.errors import DataError
from refinetool.formats import VOC_CLASS, Request, open_dataset
from refinetool.formats.class_names import VOC_CLASSES, coco_category_names
from refinetool.formats.coco_images import listed_images
from refinetool.formats.coco_index import read_images
from refinetool.formats.coco_masks import read_segmentation
from refinetool.formats.image_files import header_size
from refinetool.records import Mask, Rle, Size

MarkKind: TypeAlias = Literal["mask", "scribble", "point", "box"]

BRUSH = 0.01
"""Width of a stroke as a fraction of the image's longer side."""
EXPECTED = "segmentation, scribble, points, keypoints or bbox"


@dataclass(frozen=True, slots=True)
class Reference:
    """The marked pixels of one class in one image; `kinds` are the kinds of marks, sorted.

    within: The folder that links must not lead out of, resolved; None if they may.
    """

    category: int
    image: Path
    annotation: Rle
    kinds: tuple[MarkKind, ...]
    within: Path | None = None


@dataclass(frozen=True, slots=True)
class References:
    """All references with the names of their categories by id, in the order of the file."""

    path: Path
    names: Mapping[int, str]
    shots: tuple[Reference, ...]
    digest: str = field(default="")

    def by_category(self) -> dict[int, tuple[Reference, ...]]:
        """Return the references of each category that has some, in the order of `names`."""
        return {
            number: found
            for number in self.names
            if (found := tuple(shot for shot in self.shots if shot.category == number))
        }


def read_references(path: Path, *, images: Path | None, follow_links: bool, max_pixels: int) -> References:
    """Read references.

    Args:
        path: A COCO-shaped JSON file, a folder of class maps (PNGs), or a VOC root.
        images: The folder of the reference images; None looks beside the annotations.
        follow_links: Whether links in it may lead out of it.
        max_pixels: Larger images are refused.

    Raises:
        DataError: The file is not as described, or nothing is marked; the message names the record.
    """
    if not path.exists():
        raise DataError(f"{path}: there is no such file or folder; name a COCO file or a folder of class maps.")
    request = Request(images, follow_links=follow_links, max_pixels=max_pixels)
    names, shots = _of_maps(path, request) if path.is_dir() else _of_coco(path, request)
    if not shots:
        raise DataError(f"{path}: nothing is marked in it; add at least one annotation with {EXPECTED}.")
    return References(path, names, shots, _digest(names, shots))


def _digest(names: Mapping[int, str], shots: Iterable[Reference]) -> str:
    """Hash all that labels depend on; images by their content."""
    digest = hashlib.sha256(json.dumps(list(names.items())).encode())
    for shot in shots:
        try:
            content = hashlib.sha256(shot.image.read_bytes()).hexdigest()
        except OSError:
            content = ""
        digest.update(f"{shot.category} {content} ".encode() + shot.annotation.counts + b"\n")
    return digest.hexdigest()


# --- COCO


def _of_coco(path: Path, request: Request) -> tuple[dict[int, str], tuple[Reference, ...]]:
    records = read_images(path)
    names = coco_category_names(path)
    if not names:
        raise DataError(f"{path}: has no categories; expected a list of them, each with an id and a name.")
    found = listed_images(records, path, request)
    entries = {entry.key: entry for entry in found.entries()}
    annotations = json.loads(path.read_bytes()).get("annotations")
    if not isinstance(annotations, list):
        raise DataError(f"{path}: has no list of annotations; expected one record per marked object.")
    marks: dict[tuple[str, int], list[tuple[Mask, MarkKind]]] = {}
    for number, record in enumerate(annotations):
        where = f"{path}: annotation {number}"
        if not isinstance(record, dict):
            raise DataError(f"{where} is no object; expected image_id, category_id and {EXPECTED}.")
        where = f"{path}: annotation {record.get('id', f'number {number}')}"
        entry, category = entries.get(str(record.get("image_id"))), record.get("category_id")
        if entry is None:
            raise DataError(f"{where}: its image_id {record.get('image_id')!r} is not listed; add the image.")
        if not isinstance(category, int) or category not in names:
            raise DataError(f"{where}: its category_id {category!r} is not listed; add the category.")
        size = entry.size or header_size(entry.path, within=found.within)
        if size is None:
            raise DataError(f"{where}: its image {entry.path} can't be read, and its record has no size.")
        if math.prod(size) > request.max_pixels:
            raise DataError(f"{where}: its image claims {size[1]} x {size[0]} pixels, more than are read; shrink it.")
        mask, kind = _marked(record, size, where, max_pixels=request.max_pixels)
        if not mask.any():
            raise DataError(f"{where}: its {kind} covers no pixel of the image; correct or remove it.")
        marks.setdefault((entry.key, category), []).append((mask, kind))
    shots = []
    for (key, category), drawn in marks.items():
        whole: Mask = np.logical_or.reduce([mask for mask, _ in drawn])
        kinds = tuple(sorted({kind for _, kind in drawn}))
        shots.append(Reference(category, entries[key].path, masks.encode(whole), kinds, found.within))
    return names, tuple(shots)


def _marked(record: Mapping[str, Any], size: Size, where: str, *, max_pixels: int) -> tuple[Mask, MarkKind]:
    """Return the marked pixels of a record, bool (H, W), and how they are marked."""
    if record.get("segmentation"):
        rle, reason = read_segmentation(record["segmentation"], size, max_pixels=max_pixels)
        if rle is None:
            raise DataError(f"{where}: its segmentation can't be used ({reason}); correct or remove it.")
        return masks.decode(rle), "mask"
    if record.get("scribble"):
        return draw_strokes(_strokes(record["scribble"], where), size), "scribble"
    if record.get("points") or record.get("keypoints"):
        return _draw_points(_points(record, where), size, where), "point"
    if record.get("bbox"):
        return _draw_box(_numbers(record["bbox"], where, "bbox"), size, where), "box"
    raise DataError(f"{where}: marks nothing; expected {EXPECTED}.")


def _numbers(value: Any, where: str, what: str) -> list[float]:
    if isinstance(value, list) and value and all(isinstance(one, int | float) and math.isfinite(one) for one in value):
        return [float(one) for one in value]
    raise DataError(f"{where}: its {what} is not a list of numbers; correct or remove it.")


def _pairs(value: Any, where: str, what: str) -> list[tuple[float, float]]:
    """Return points given as [x, y, x, y ...] or [[x, y], ...]."""
    if isinstance(value, list) and value and all(isinstance(one, list) for one in value):
        value = [number for one in value for number in _numbers(one, where, what)]
    numbers = _numbers(value, where, what)
    if len(numbers) % 2:
        raise DataError(f"{where}: its {what} has an odd number of coordinates; expected x and y of every point.")
    return list(zip(numbers[0::2], numbers[1::2], strict=True))


def _points(record: Mapping[str, Any], where: str) -> list[tuple[float, float]]:
    if record.get("points"):
        return _pairs(record["points"], where, "points")
    numbers = _numbers(record["keypoints"], where, "keypoints")
    if len(numbers) % 3:
        raise DataError(f"{where}: its keypoints are not triples of x, y and visibility.")
    return [(x, y) for x, y, seen in zip(numbers[0::3], numbers[1::3], numbers[2::3], strict=True) if seen > 0]


def _strokes(value: Any, where: str) -> list[list[tuple[float, float]]]:
    """Return strokes; a single one may be given without the outer list."""
    several = isinstance(value, list) and value and all(isinstance(one, list) for one in value)
    if several and all(len(one) != 2 or isinstance(one[0], list) for one in value):
        return [_pairs(one, where, "scribble") for one in value]
    return [_pairs(value, where, "scribble")]


def draw_strokes(strokes: Sequence[Sequence[tuple[float, float]]], size: Size) -> Mask:
    """Draw strokes with a round brush, bool (H, W); what leaves the image is cut off."""
    canvas = np.zeros(size, np.uint8)
    width = max(1, round(BRUSH * max(size)))
    reach = 4 * max(size)
    for stroke in strokes:
        corners = np.clip(np.floor(np.array(stroke)), -reach, reach).astype(np.int32)
        cv2.polylines(canvas, [corners.reshape(-1, 1, 2)], isClosed=False, color=1, thickness=width)
        if len(corners) == 1:
            cv2.circle(canvas, corners[0].tolist(), width // 2, 1, -1)
    drawn: Mask = canvas > 0
    return drawn


def _draw_points(points: Sequence[tuple[float, float]], size: Size, where: str) -> Mask:
    marked = np.zeros(size, np.bool_)
    for x, y in points:
        if not (0 <= x < size[1] and 0 <= y < size[0]):
            raise DataError(f"{where}: its point ({x:g}, {y:g}) is not in the image of {size[1]} x {size[0]} pixels.")
        marked[int(y), int(x)] = True
    return marked


def _draw_box(box: Sequence[float], size: Size, where: str) -> Mask:
    if len(box) != 4:
        raise DataError(f"{where}: its bbox has {len(box)} numbers; expected x, y, width and height.")
    x, y, width, height = box
    left, top = max(0, math.floor(x)), max(0, math.floor(y))
    right, bottom = min(size[1], math.ceil(x + width)), min(size[0], math.ceil(y + height))
    marked = np.zeros(size, np.bool_)
    if right > left and bottom > top:
        marked[top:bottom, left:right] = True
    return marked


# --- class maps


def _of_maps(path: Path, request: Request) -> tuple[dict[int, str], tuple[Reference, ...]]:
    dataset = open_dataset(path, images=request.images, format=VOC_CLASS, follow_links=request.follow_links)
    shots = []
    for sample in dataset.samples():
        for region in sample.regions:
            if region.mask is None or region.category is None:
                raise DataError(f"{path}: the class map of {sample.key} can't be read; replace the file.")
            shots.append(Reference(region.category, sample.image, region.mask, ("mask",), sample.within))
    values = sorted({shot.category for shot in shots})
    return _names_of_values(path, values), tuple(shots)


def _names_of_values(path: Path, values: Sequence[int]) -> dict[int, str]:
    """Return names from `classes.json` in or beside the folder; those of VOC for a VOC root; else `class N`."""
    for listing in (path / "classes.json", path.parent / "classes.json"):
        if listing.is_file():
            try:
                table = json.loads(listing.read_text())
                return {value: str(table[str(value)]) for value in values}
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise DataError(f"{listing}: expected the name of every value, such as {{'1': 'cat'}}.") from error
    if (path / "SegmentationClass").is_dir() and all(value < len(VOC_CLASSES) for value in values):
        return {value: VOC_CLASSES[value] for value in values}
    return {value: f"class {value}" for value in values}
