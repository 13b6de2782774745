"""Finds the objects of id maps for training.

An id map is a PNG whose values are ids: 0 is background, 255 is ignored. Ids are instances, or classes of which each
connected component counts as an object.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from refinetool.errors import DataError
from refinetool.masks import bounding_box
from refinetool.records import VOID, Mask


@dataclass(frozen=True, slots=True)
class TrainObject:
    """One object: all pixels of an id, or with `seed` (x, y) the component of them that contains that pixel."""

    value: int
    box: tuple[int, int, int, int]
    seed: tuple[int, int] | None


def find_objects(ids: NDArray[np.uint8], *, by_class: bool, min_px: int) -> list[TrainObject]:
    """Find the objects of an id map, uint8 (H, W), that have at least `min_px` pixels.

    Ids that are classes are also split into connected components.
    """
    objects = []
    for value in np.unique(ids):
        if value in (0, VOID):
            continue
        whole = ids == value
        box = bounding_box(whole)
        count, labels, stats, _ = cv2.connectedComponentsWithStats(whole.view(np.uint8), connectivity=8)
        if box is not None and (not by_class or count <= 4) and stats[1:, cv2.CC_STAT_AREA].sum() >= min_px:
            objects.append(TrainObject(int(value), box, None))
        if by_class and count > 2:
            for part in range(1, count):
                x, y, w, h, area = (int(number) for number in stats[part])
                if area >= min_px:
                    column = int(np.flatnonzero(labels[y, x : x + w] == part)[0]) + x
                    objects.append(TrainObject(int(value), (x, y, x + w, y + h), (column, y)))
    return objects


def object_mask(ids: NDArray[np.uint8], thing: TrainObject) -> Mask:
    """Return the mask of one object of an id map, bool (H, W)."""
    mask: Mask = ids == thing.value
    if thing.seed is None:
        return mask
    _, labels = cv2.connectedComponents(mask.view(np.uint8), connectivity=8)
    part: Mask = labels == labels[thing.seed[1], thing.seed[0]]
    return part


def large_ones(objects: Iterable[Mask], *, min_px: int) -> tuple[Mask, ...]:
    """Return the masks that have at least `min_px` pixels."""
    return tuple(mask for mask in objects if np.count_nonzero(mask) >= min_px)


def read_ids(path: Path) -> NDArray[np.uint8]:
    """Read the id map of a palette or grey PNG, uint8 (H, W)."""
    try:
        with Image.open(path) as picture:
            ids = np.array(picture)
    except (OSError, UnidentifiedImageError) as error:
        raise DataError(f"{path}: the mask can't be read ({error}); replace the file.") from error
    if ids.ndim != 2 or ids.dtype != np.uint8:
        raise DataError(f"{path}: the mask is {ids.dtype} {ids.shape}; expected a palette or grey PNG of 8 bits.")
    return ids
