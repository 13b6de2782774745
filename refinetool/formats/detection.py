"""Detects the format of a file or folder of masks."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from refinetool.errors import DataError, MaskError, UsageError
from refinetool.formats import COCO, COCO_RESULTS, DAVIS, MASKS, VOC_CLASS, VOC_OBJECT
from refinetool.formats.folders import mask_files
from refinetool.formats.png import mostly_black_and_white
from refinetool.formats.rasters import SUFFIXES, check_headers, has_colours, read_values
from refinetool.formats.voc import clips_folder

_LOOKED_AT = 12
"""Number of PNGs, spread over the folder, whose values are examined."""

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
            start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror}).") from error
    if start.startswith((b"{", b"[")):
        return COCO if start.startswith(b"{") else COCO_RESULTS
    if not start:
        raise DataError(f"{path}: the file is empty.")
    raise DataError(f"{path}: is not JSON; expected COCO JSON, a VOC root, or a folder of mask PNGs.")


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
    if clips_folder(folder) != folder:
        return DAVIS
    return _of_pixels(folder, mask_files(folder, follow_links=follow_links, ending=ending))


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
