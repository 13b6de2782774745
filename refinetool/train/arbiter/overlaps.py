"""Makes objects overlap, as in hand-drawn annotations of instances, from objects that share no pixels.

In a map each pixel has one label. In a file of instances it can belong to several: outlines cross where two objects
touch, an object is drawn through what stands before it, a whole is annotated beside its parts.
"""

from collections.abc import Sequence

import cv2
import numpy as np

from refinetool.masks import dilated
from refinetool.records import Mask
from refinetool.settings import OverlapSettings

NEIGHBOUR_PX = 3
"""Objects with at most about this distance are neighbours."""


def overlapping(objects: Sequence[Mask], rng: np.random.Generator, *, settings: OverlapSettings) -> list[Mask]:
    """Return the objects, some of them with pixels of their neighbours, and some unions of neighbours after them.

    Args:
        objects: bool (H, W) each, not empty, without overlaps.
    """
    extended = [_extended(n, objects, rng, settings=settings) for n in range(len(objects))]
    return extended + _wholes(objects, rng, settings=settings)


def _extended(n: int, objects: Sequence[Mask], rng: np.random.Generator, *, settings: OverlapSettings) -> Mask:
    """Return an object with a seam of its neighbours, with what of them lies in its convex hull, or as it is."""
    mask, kind = objects[n], rng.random()
    if kind < settings.seam_share:
        width = 1 + rng.exponential(settings.seam_width * np.sqrt(np.count_nonzero(mask)))
        reach = dilated(mask, radius_px=round(width))
    elif kind < settings.seam_share + settings.hull_share:
        reach = convex_hull(mask)
    else:
        return mask
    taken = [other for other in _others_in(reach, n, objects) if rng.random() < settings.taken_share]
    return mask | (reach & np.logical_or.reduce(taken)) if taken else mask


def _wholes(objects: Sequence[Mask], rng: np.random.Generator, *, settings: OverlapSettings) -> list[Mask]:
    """Return unions of an object with some of its neighbours."""
    wholes: list[Mask] = []
    for n, mask in enumerate(objects):
        if rng.random() >= settings.whole_share:
            continue
        beside = _others_in(dilated(mask, radius_px=NEIGHBOUR_PX), n, objects)
        if beside:
            count = int(rng.integers(1, len(beside) + 1))
            chosen = [beside[k] for k in rng.permutation(len(beside))[:count]]
            wholes.append(np.logical_or.reduce([mask, *chosen]))
    return wholes


def _others_in(reach: Mask, n: int, objects: Sequence[Mask]) -> list[Mask]:
    return [other for number, other in enumerate(objects) if number != n and np.any(reach & other)]


def convex_hull(mask: Mask) -> Mask:
    """Return the convex hull of the pixels of a mask that is not empty, bool (H, W)."""
    corners = cv2.convexHull(cv2.findNonZero(mask.view(np.uint8)))
    return cv2.fillConvexPoly(np.zeros(mask.shape, np.uint8), corners, 1).view(np.bool_)
