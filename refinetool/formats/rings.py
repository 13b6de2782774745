"""Draws a mask as rings of a polygon: along pixel edges, or with fewer corners; holes can be joined to the outline.

Rings are drawn by pycocotools, which fills every ring. Coordinates are (x, y) in pixels, 0..W and 0..H, so a pixel's
centre is at a half. Axes: P corners, S edges.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from refinetool import masks
from refinetool.records import Mask, Size
from refinetool.settings import PolygonSettings

Ring: TypeAlias = NDArray[np.float64]
"""float64 (P, 2), corners, closed implicitly; islands clockwise on the screen, holes counter-clockwise."""

_LEAST_TOLERANCE = 0.25
"""Pixels. Up to this tolerance the corners between the midpoints of pixel edges stay as they are."""

_ROWS = 256
"""Edges at a time that are compared with all others; affects only memory."""


@dataclass(frozen=True, slots=True)
class Drawing:
    """Rings, and what is drawn from them.

    rings: Islands, with their holes joined to them.
    drawn: bool (H, W), the mask that pycocotools makes of the rings.
    filled: Whether the mask had holes, which were filled.
    """

    rings: tuple[Ring, ...]
    drawn: Mask
    filled: bool


def draw(mask: Mask, *, settings: PolygonSettings) -> Drawing | None:
    """Draw a non-empty mask, bool (H, W), as rings; None if it has holes that rings are not to hold.

    The tolerance is halved until the rings have the topology of the mask and draw it well enough; without success they
    follow the edges of the pixels.
    """
    holes = masks.has_holes(mask)
    if holes and settings.holes == "rle":
        return None
    filled = holes and settings.holes == "fill"
    if filled:
        mask = masks.fill_holes(mask)
    outline = [ring.astype(np.float64) for ring in masks.outline(mask)]
    tolerance = settings.tolerance_px
    while tolerance >= _LEAST_TOLERANCE:
        simple = [simplified(ring, tolerance_px=tolerance) for ring in outline]
        if _alike(outline, simple):
            rings = joined(simple)
            drawn = rasterised(rings, size=(mask.shape[0], mask.shape[1]))
            if drawn.any() and masks.iou(drawn, mask) >= settings.min_iou:
                return Drawing(tuple(rings), drawn, filled)
        tolerance /= 2
    rings = joined(outline)
    return Drawing(tuple(rings), mask, filled) if (rasterised(rings, size=mask.shape) == mask).all() else None


def draw_as_one(mask: Mask, *, settings: PolygonSettings) -> Drawing:
    """Draw a non-empty mask, bool (H, W), as a single ring, for formats without several rings and without RLE.

    Holes are filled unless they are to be kept. Islands are joined by cuts of no width between their nearest corners.
    """
    holes = "fill" if settings.holes == "rle" else settings.holes
    drawing = draw(mask, settings=replace(settings, holes=holes))
    if drawing is None:  # pycocotools does not draw the cuts as they are meant
        drawing = draw(mask, settings=replace(settings, holes="fill"))
        assert drawing is not None, "rings without holes along pixel edges are drawn exactly"
    ring = _one_ring(drawing.rings)
    return Drawing((ring,), rasterised([ring], size=(mask.shape[0], mask.shape[1])), drawing.filled)


def _one_ring(islands: Sequence[Ring]) -> Ring:
    """Join islands one by one, always the one that is nearest to those already joined."""
    ring, rest = islands[0], list(islands[1:])
    while rest:
        apart = [np.square(ring[:, None] - island[None]).sum(axis=2) for island in rest]
        nearest = int(np.argmin([distances.min() for distances in apart]))
        island = rest.pop(nearest)
        here, there = np.unravel_index(int(apart[nearest].argmin()), apart[nearest].shape)
        opened = np.roll(island, -int(there), axis=0)
        ring = np.concatenate([ring[: here + 1], opened, opened[:1], ring[here:]])
    return ring


def rasterised(rings: Sequence[Ring], *, size: Size) -> Mask:
    """Return what pycocotools draws, bool (H, W)."""
    runs = coco_mask.frPyObjects([ring.ravel().tolist() for ring in rings], *size)
    drawn: Mask = coco_mask.decode(coco_mask.merge(runs)).astype(np.bool_)
    return drawn


# --- fewer corners


def simplified(ring: Ring, *, tolerance_px: float) -> Ring:
    """Leave out corners of a ring along pixel edges, by the algorithm of Douglas and Peucker.

    The ring through the midpoints of the pixel edges is simplified, not the one through the corners of the pixels: it
    encloses the same pixel centres, and a diagonal border is straight instead of a staircase.
    """
    through = _midpoints(ring).astype(np.float32).reshape(-1, 1, 2)
    corners = cv2.approxPolyDP(through, tolerance_px, closed=True)
    return np.asarray(corners, dtype=np.float64).reshape(-1, 2)


def _midpoints(ring: Ring) -> Ring:
    """Return the midpoint of every pixel edge along a ring, in order."""
    edges = np.roll(ring, -1, axis=0) - ring
    lengths = np.abs(edges).sum(axis=1).astype(np.int64)
    along = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    offsets = np.repeat(np.sign(edges), lengths, axis=0) * (along[:, None] + 0.5)
    return np.asarray(np.repeat(ring, lengths, axis=0) + offsets)


def _alike(outline: Sequence[Ring], simple: Sequence[Ring]) -> bool:
    """Whether simplified rings have the topology of the outline: none has vanished, turned over, or meets another."""
    if any(
        len(ring) < 3 or _twice_area(ring) * _twice_area(old) <= 0 for old, ring in zip(outline, simple, strict=True)
    ):
        return False
    return not edges_meet(simple)


def _twice_area(ring: Ring) -> float:
    x, y = ring.T
    return float(np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y))


def edges_meet(rings: Sequence[Ring]) -> bool:
    """Whether two edges of some rings cross or touch, apart from neighbours in a ring, which share a corner."""
    starts = np.concatenate(rings)
    ends = np.concatenate([np.roll(ring, -1, axis=0) for ring in rings])
    following = np.concatenate([first + np.roll(np.arange(n), -1) for first, n in _places(rings)])
    low, high = np.minimum(starts, ends), np.maximum(starts, ends)
    for top in range(0, len(starts), _ROWS):
        rows = np.arange(top, min(top + _ROWS, len(starts)))
        near = (low[rows, None] <= high[None]).all(axis=2) & (low[None] <= high[rows, None]).all(axis=2)
        first, second = np.nonzero(near)
        first += top
        apart = (first < second) & (following[first] != second) & (following[second] != first)
        first, second = first[apart], second[apart]
        a, b, c, d = starts[first], ends[first], starts[second], ends[second]
        if ((_side(a, b, c) * _side(a, b, d) <= 0) & (_side(c, d, a) * _side(c, d, b) <= 0)).any():
            return True
    return False


def _places(rings: Sequence[Ring]) -> list[tuple[int, int]]:
    """Return the index of each ring's first corner among all corners, and its number of corners."""
    counts = [len(ring) for ring in rings]
    return list(zip(np.cumsum([0, *counts[:-1]]).tolist(), counts, strict=True))


def _side(a: Ring, b: Ring, point: Ring) -> NDArray[np.float64]:
    """Return on which side of the lines from a to b some points are: positive, negative, or 0 on the line."""
    (ux, uy), (vx, vy) = (b - a).T, (point - a).T
    return np.asarray(np.sign(ux * vy - uy * vx))


# --- holes


def joined(rings: Sequence[Ring]) -> list[Ring]:
    """Join every hole to the ring around it by a cut of no width, so that each ring is an island with its holes.

    A hole is cut open from its leftmost corner straight to the left. The nearest edge there belongs to the island
    around the hole, or to another of its holes that lies further left and is already joined.
    """
    islands = [ring for ring in rings if _twice_area(ring) > 0]
    holes = sorted((ring for ring in rings if _twice_area(ring) <= 0), key=lambda ring: float(ring[:, 0].min()))
    for hole in holes:
        first = int(np.lexsort((hole[:, 1], hole[:, 0]))[0])
        opened = np.roll(hole, -first, axis=0)
        found = [
            (crossing[0], n, crossing[1])
            for n, island in enumerate(islands)
            if (crossing := _to_the_left(island, opened[0]))
        ]
        x, n, edge = max(found)
        cut = np.array([[x, opened[0, 1]]])
        around = islands[n]
        pieces = [around[: edge + 1], cut, opened, opened[:1], cut, around[edge + 1 :]]
        islands[n] = np.concatenate(pieces)
    return islands


def _to_the_left(ring: Ring, corner: NDArray[np.float64]) -> tuple[float, int] | None:
    """Return where a ray from a corner to the left first meets a ring: x and the index of the edge; None if nowhere."""
    x, y = corner
    a, b = ring, np.roll(ring, -1, axis=0)
    spans = np.flatnonzero(
        (np.minimum(a[:, 1], b[:, 1]) <= y) & (np.maximum(a[:, 1], b[:, 1]) >= y) & (a[:, 1] != b[:, 1])
    )
    share = (y - a[spans, 1]) / (b[spans, 1] - a[spans, 1])
    crossing = a[spans, 0] + share * (b[spans, 0] - a[spans, 0])
    left = crossing < x
    if not left.any():
        return None
    nearest = int(np.flatnonzero(left)[np.argmax(crossing[left])])
    return float(crossing[nearest]), int(spans[nearest])
