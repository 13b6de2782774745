"""Detects the format of a file or folder of masks."""

import codecs
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from refinetool.errors import DataError, MaskError, UsageError
from refinetool.formats import (
    CITYSCAPES,
    COCO,
    COCO_RESULTS,
    DAVIS,
    LABELME,
    MASKS,
    PANOPTIC,
    VOC_CLASS,
    VOC_OBJECT,
    YOLO,
)
from refinetool.formats.folders import mask_files
from refinetool.formats.json_spans import refuse_utf16
from refinetool.formats.png import mostly_black_and_white
from refinetool.formats.rasters import SUFFIXES, check_headers, has_colours, read_values
from refinetool.formats.voc import clips_folder
from refinetool.formats.yolo import label_files

_LOOKED_AT = 12
"""Number of PNGs, spread over the folder, whose values are examined."""

_YOLO_LINE = re.compile(rb"\s*\d+( +-?\d*\.?\d+){4,}\s*($|\n|\r)")

_SOFT_VALUES = 16
"""More grey values than this are soft edges, not numbers of objects."""


def detect(path: Path, *, follow_links: bool, ending: str = "") -> str:
    """Return one of FORMATS.

    Raises:
        DataError: The path does not exist or does not hold masks.
        UsageError: Classes, objects and plain masks look alike; the user must name the format.
    """
    if path.is_dir():
        return _of_folder(path, follow_links=follow_links, ending=ending)
    if path.suffix.lower() in SUFFIXES and path.is_file():
        return _of_pixels(path.parent, [path])
    try:
        with path.open("rb") as file:
            start = file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip()
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror}).") from error
    if not start:
        raise DataError(f"{path}: the file is empty.")
    refuse_utf16(path, start)
    if path.suffix.lower() in (".yaml", ".yml"):
        raise UsageError(f"{path}: name the folder of the data set instead, {path.absolute().parent}.")
    if path.suffix.lower() == ".txt" and _YOLO_LINE.match(start):
        raise UsageError(f"{path}: these are YOLO labels of one image; name their folder, {path.absolute().parent}.")
    if known := _foreign(start):
        raise DataError(f"{path}: this looks like {known}")
    if start.startswith(b"{"):
        if path.suffix == ".json" and path.with_suffix("").is_dir() and ("panoptic" in path.name or _SEGMENTS in start):
            return PANOPTIC
        return LABELME if _LABELME.search(start) else COCO
    if start.startswith(b"["):
        return COCO_RESULTS
    raise DataError(f"{path}: is not JSON; expected {_EXPECTED}.")


_EXPECTED = "COCO JSON, LabelMe JSON, a VOC root, a YOLO data set, or a folder of masks"
_LABELME = re.compile(rb'"shapes"\s*:')

_SEGMENTS = b'"segments_info"'

_FOREIGN = (
    (rb'^\{.*"FeatureCollection"', "a GeoJSON file; rasterise it, or export COCO."),
    (rb'^\{.*"_via_(img_metadata|settings)"', "a project of the VGG Image Annotator; export COCO from it."),
    (rb'^\{.*"(dm_format_version|media_type)"', "Datumaro's own JSON; convert it to coco_instances with Datumaro."),
    (rb'^\{.*"classTitle"', "a file of Supervisely; export COCO from it."),
    (rb'^\[.*"(annotations|completions)".*"(data|result)"', "a JSON export of Label Studio; export COCO from it."),
    (rb'^\[.*"image".*"coordinates"', "a CreateML file, which holds no masks."),
    (rb'^\{.*"(data_row|row_data)"', "an export of Labelbox; convert it to COCO."),
    (rb"^<(.*<)?annotations>", "an XML of CVAT for images; export COCO or 'Segmentation mask' from it."),
    (rb"^<(.*<)?annotation[ >]", "an XML of PASCAL VOC, which holds boxes; name the root of the data set."),
)
"""What other files begin with, and what to do with them. Only looked for at the start of a file, without 'images'."""


def _foreign(start: bytes) -> str | None:
    """Say what a file of a known kind that is not read is, by its start; None for any other."""
    if b'"images"' in start:
        return None
    return next((said for pattern, said in _FOREIGN if re.search(pattern, start, re.DOTALL)), None)


def _of_folder(folder: Path, *, follow_links: bool, ending: str) -> str:
    by_name = {"SegmentationClass": VOC_CLASS, "SegmentationObject": VOC_OBJECT}
    inside = [format for name, format in by_name.items() if (folder / name).is_dir()]
    if len(inside) > 1:
        raise UsageError(f"{folder}: has classes and objects; name the format {VOC_CLASS} or {VOC_OBJECT}.")
    if inside:
        return inside[0]
    for name, format in by_name.items():
        if folder.absolute().name.startswith(name):
            return format
    if found := _of_texts(folder):
        return found
    return _of_pixels(folder, mask_files(folder, follow_links=follow_links, ending=ending))


def _of_texts(folder: Path) -> str | None:
    """Return the format of a data set that is known by its layout or its text files; None if it is neither."""
    if clips_folder(folder) != folder:
        return DAVIS
    if next(folder.rglob("*_instanceIds.png"), None):
        return CITYSCAPES
    named = any(folder.glob("*.yaml")) or (folder / "labels").is_dir() or "labels" in folder.absolute().parts[-2:]
    if named and label_files(folder):
        return YOLO
    if (text := next(folder.glob("*.txt"), None)) and _YOLO_LINE.match(text.read_bytes()[:4096]):
        return YOLO
    if file := next(folder.rglob("*.json"), None):
        with file.open("rb") as opened:
            if _LABELME.search(opened.read(1 << 16)):
                return LABELME
    return None


def _of_pixels(folder: Path, files: Sequence[Path]) -> str:
    check_headers(files)
    histogram = np.zeros(256, dtype=np.int64)
    palette = False
    for file in files[:: -(-len(files) // _LOOKED_AT)]:
        try:
            palette |= has_colours(file)
            histogram += np.bincount(read_values(file).ravel(), minlength=256)
        except MaskError:
            continue  # a broken file is reported later, when it is read
    values = np.flatnonzero(histogram).tolist()
    objects = set(values) - {0}
    soft = len(objects) > _SOFT_VALUES and mostly_black_and_white(histogram)
    if objects <= {255} or (not palette and (objects <= {1} or soft)):
        return MASKS
    if any(file.parent != folder for file in files):
        return DAVIS
    raise UsageError(
        f"{folder}: its PNGs hold the values {', '.join(map(str, values[:8]))} ..., which may number classes or "
        f"objects; name the format {VOC_CLASS}, {VOC_OBJECT}, {DAVIS} or {MASKS}."
    )
