"""Defects of the shape as a whole: few corners, a shift, missing parts, parts of others."""

from collections.abc import Iterator, Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from refinetool.corrupt import defects
from refinetool.corrupt.geometry import radius, reach_px, signed_depth, smooth_noise
from refinetool.corrupt.goals import Attempt, Corrupted, Goal, Rng, reach
from refinetool.records import ImageArray, Mask

FRONT_NOISE = 0.3
FRONT_CELLS = 8
"""How ragged the front of merged pixels is: noise as a fraction of the radius, and its bumps along each side."""


def partial(image: ImageArray | None, gt: Mask, rng: Rng, *, goal: Goal) -> Corrupted:
    """Keep what lies on one side of a straight cut, so that the IoU is the kept fraction, drawn from the band.

    Deliberately ill-posed: nothing in such a mask says that there was more.

    Args:
        image: Not looked at.
        gt: bool (H, W).
    """
    del image

    def attempts() -> Iterator[Attempt]:
        rows, columns = np.nonzero(gt)
        while True:
            angle, kept = rng.uniform(0, 2 * np.pi), rng.uniform(goal.low, goal.high)
            along = columns * np.cos(angle) + rows * np.sin(angle)
            first = np.argsort(along, kind="stable")[: round(kept * len(along))]
            coarse = np.zeros_like(gt)
            coarse[rows[first], columns[first]] = True
            yield Attempt(coarse, ("cut-off",))

    return reach("partial", attempts(), gt, goal=goal)


def merge_neighbour(
    image: ImageArray | None, gt: Mask, rng: Rng, *, goal: Goal, neighbours: Sequence[Mask]
) -> Corrupted:
    """Add the part of another object that is nearest, as much of it as the band asks for.

    Args:
        image: Not looked at.
        gt: bool (H, W).
        neighbours: Masks of other objects, bool (H, W). The first attempt draws one, each further one adds another.
    """
    del image

    def attempts() -> Iterator[Attempt]:
        away = cv2.distanceTransform((~gt).view(np.uint8), cv2.DIST_L2, 3)
        order, count = rng.permutation(len(neighbours)), 1
        while len(neighbours):
            other = goal.allowed(np.any([neighbours[n] for n in order[:count]], axis=0)) & ~gt
            front = away + FRONT_NOISE * radius(gt) * smooth_noise(gt.shape, rng, cells=FRONT_CELLS)
            pixels = np.flatnonzero(other)
            wanted = round(int(gt.sum()) * (1 / max(rng.uniform(goal.low, goal.high), 1e-6) - 1))
            coarse = gt.copy()
            coarse.flat[pixels[np.argsort(front.flat[pixels], kind="stable")[:wanted]]] = True
            # What is taken from another object is taken for sure, also where they share a map.
            evidence = np.where(coarse, np.where(gt, 0.75, 1.0), 0.0).astype(np.float32)
            yield Attempt(coarse, ("merged",), evidence=evidence)
            count += 1

    return reach("merge-neighbour", attempts(), gt, goal=goal)


# --- by severity


CORNER_TOLERANCE = (0.05, 0.25)
"""Tolerance of the corners as a fraction of r: 1 to 4 % of the circumference of a disc of the mask's area."""
CORNER_JITTER = 0.05
"""Standard deviation of how far a corner is off, as a fraction of r."""


def drawn_polygon(mask: Mask, rng: Rng, severity: float) -> Mask:
    """Redraw each outline with few corners (Douglas-Peucker), slightly misplaced: how people annotate polygons."""
    r = radius(mask)
    outlines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    canvas = np.zeros(mask.shape, np.uint8)
    for outline in outlines:
        corners = cv2.approxPolyDP(outline, r * rng.uniform(*CORNER_TOLERANCE) * severity, True)
        moved = corners + rng.normal(0, CORNER_JITTER * r * severity, corners.shape)
        cv2.fillPoly(canvas, [moved.round().astype(np.int32)], 1)
    return canvas.astype(bool)


def coarse_polygon(mask: Mask, rng: Rng, severity: float) -> Mask:
    """Redraw the outline with straight edges and misplaced corners, the way that batches of masks allow.

    The signed distance is kept on a coarse lattice and interpolated linearly on triangles: its zero line is a polygon.
    Some masks become the convex polygon that touches them from ten sides instead.
    """
    size = radius(mask)
    if rng.random() < defects.CONVEX:
        return _convex(mask, rng, size * severity)
    step = max(defects.LEAST_STEP_PX, rng.uniform(*defects.POLYGON_STEP) * size * severity)
    (rows, down), (columns, across) = (_lattice(side, step, rng) for side in mask.shape)
    depth = signed_depth(mask)[np.ix_(rows, columns)].clip(-reach_px(mask), reach_px(mask))
    depth = depth + defects.CORNER_NOISE * size * severity * rng.standard_normal(depth.shape)

    i, j = down.astype(int)[:, None], across.astype(int)
    v, u = down[:, None] - i, across - j
    above, below = (depth[i, j], depth[i, j + 1]), (depth[i + 1, j], depth[i + 1, j + 1])
    upper = above[0] + u * (above[1] - above[0]) + v * (below[0] - above[0])
    lower = below[1] + (1 - u) * (below[0] - below[1]) + (1 - v) * (above[1] - below[1])
    coarse: Mask = np.where(u + v < 1, upper, lower) > 0
    return coarse


def _lattice(side: int, step: float, rng: Rng) -> tuple[NDArray[np.int64], NDArray[np.floating]]:
    """The pixels along a side that are nearest to the points of a lattice, and the place of each pixel between them.

    The lattice starts up to a step before the first pixel, and ends after the last one.
    """
    origin = -rng.random() * step
    place = (np.arange(side) - origin) / step
    points = origin + step * np.arange(int(place[-1]) + 2)
    return points.round().clip(0, side - 1).astype(np.int64), place


def _convex(mask: Mask, rng: Rng, size: float) -> Mask:
    """The intersection of ten half-planes that just hold the mask, every one a little misplaced."""
    rows, columns = np.nonzero(mask)
    first = rng.random()
    inside = np.ones_like(mask)
    for number in range(defects.CONVEX_SIDES):
        angle = (first + number) * 2 * np.pi / defects.CONVEX_SIDES
        farthest = (np.cos(angle) * columns + np.sin(angle) * rows).max()
        along = np.cos(angle) * np.arange(mask.shape[1]) + np.sin(angle) * np.arange(mask.shape[0])[:, None]
        inside &= along <= farthest + (defects.SIDE_NOISE * rng.normal() - defects.SIDE_INSET) * size
    return inside


def shift_and_scale(mask: Mask, rng: Rng, severity: float) -> Mask:
    """Shift, scale and shear the mask about its centre by a few percent."""
    height, width = mask.shape
    rows, columns = np.nonzero(mask)
    centre = np.array((columns.mean(), rows.mean()))
    linear = np.eye(2) + rng.normal(0, defects.LINEAR_NOISE * severity, (2, 2))
    shift = rng.normal(0, defects.SHIFT_NOISE * radius(mask) * severity, 2)
    # From the pixels of the result to those of the mask, as training samples.
    matrix = np.hstack((linear, (centre - linear @ (centre + shift))[:, None]))
    how = cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(mask.astype(np.uint8), matrix, (width, height), flags=how).astype(bool)


def holes_and_islands(mask: Mask, rng: Rng, severity: float) -> Mask:
    """Punch rounded holes into the mask and drop rounded islands beside it."""
    noise = smooth_noise(mask.shape, rng, cells=int(rng.integers(*defects.TEAR_BUMPS)))
    level = defects.TEAR_LEVEL - defects.TEAR_SLOPE * severity
    beside = signed_depth(mask) > -min(defects.ISLAND_REACH * radius(mask), reach_px(mask))
    coarse: Mask = (mask & (noise <= level)) | ((noise < -level) & beside)
    return coarse


def leak(mask: Mask, rng: Rng, severity: float, *, neighbour: Mask) -> Mask:
    """Let the mask run over into the neighbour, where there is one."""
    reach = min(rng.uniform(*defects.LEAK_REACH) * radius(mask) * severity, reach_px(mask) - 1)
    coarse: Mask = mask | (neighbour & (signed_depth(mask) > -reach))
    return coarse
