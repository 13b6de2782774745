"""Closes gaps between neighbours in a map of owners."""

import math
from collections.abc import Mapping, Set
from itertools import combinations
from typing import TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from refinetool.masks import tight_box
from refinetool.records import IntArray, Mask

LabelMap: TypeAlias = NDArray[np.int32]
"""int32 (H, W): the index of the region that owns each pixel."""

NOBODY = -1
"""In a label map: background."""


def close_gaps(owners: LabelMap, coarse: Mapping[int, Mask], *, moving: Set[int], gap_px: float) -> LabelMap:
    """Close gaps between neighbours: pixels that two regions have given up between them get an owner again.

    A pixel without an owner that was in the coarse mask of one of two regions goes to the nearer of the two if both are
    at most `gap_px` away, if it lies between them (their nearest pixels are in directions more than 90 degrees apart),
    and if their coarse masks touched (8-connectivity) or overlapped.

    Args:
        owners: int32 (H, W), see `regions.merge`.
        coarse: bool (H, W) by region.
        moving: The regions that may get pixels; the others keep what they have.
    """
    closed = owners.copy()
    reach = math.ceil(2 * gap_px) + 2
    boxes = {n: tight_box(mask | (owners == n)) for n, mask in coarse.items()}
    for a, b in combinations(sorted(coarse), 2):
        if a not in moving and b not in moving:
            continue
        x0, y0 = (max(0, *(boxes[n][side] - reach for n in (a, b))) for side in (0, 1))
        x1, y1 = (min(boxes[n][side] + reach for n in (a, b)) for side in (2, 3))
        if x0 >= x1 or y0 >= y1:
            continue
        window = slice(y0, y1), slice(x0, x1)
        ours, theirs = coarse[a][window], coarse[b][window]
        if not (cv2.dilate(ours.view(np.uint8), np.ones((3, 3), np.uint8)).view(np.bool_) & theirs).any():
            continue
        here, there = (_nearest(owners[window] == n) for n in (a, b))
        if here is None or there is None:
            continue
        far = [np.hypot(*vector) for vector in (here, there)]
        between = (here * there).sum(axis=0) < 0
        gap = (owners[window] == NOBODY) & (ours | theirs) & between & (far[0] <= gap_px) & (far[1] <= gap_px)
        nearer = np.where(far[0] <= far[1], a, b)
        if not {a, b} <= moving:
            nearer[:] = a if a in moving else b
        closed[window][gap] = nearer[gap]
    return closed


def _nearest(mask: Mask) -> NDArray[np.float64] | None:
    """Return the vectors (y, x) from each pixel to the nearest one of a mask, (2, H, W); None if it is empty."""
    if not mask.any():
        return None
    nearest: IntArray = ndimage.distance_transform_edt(~mask, return_distances=False, return_indices=True)
    return np.asarray(nearest - np.indices(mask.shape), dtype=np.float64)
