"""Defects of the shape as a whole: few corners, a shift, missing parts, parts of others."""

from collections.abc import Iterator, Sequence

import cv2
import numpy as np

from refinetool.corrupt.geometry import radius, signed_depth, smooth_noise
from refinetool.corrupt.goals import Attempt, Corrupted, Goal, Rng, reach
from refinetool.records import BoolArray, ImageArray

FRONT_NOISE = 0.3
FRONT_CELLS = 8
"""How ragged the front of a leak is: noise as a share of the radius, and its bumps along each side of the image."""


def partial(image: ImageArray | None, gt: BoolArray, rng: Rng, *, goal: Goal) -> Corrupted:
    """Keep what lies on one side of a straight cut, so that the IoU is the kept share, drawn from the band.

    Deliberately ill-posed: nothing in such a mask says that there was more.

    Args:
        image: Not looked at.
        gt: bool (H, W).
    """
    del image

    def attempts() -> Iterator[Attempt]:
        rows, columns = np.nonzero(gt)
        while True:
            angle, share = rng.uniform(0, 2 * np.pi), rng.uniform(goal.low, goal.high)
            along = columns * np.cos(angle) + rows * np.sin(angle)
            first = np.argsort(along, kind="stable")[: round(share * len(along))]
            coarse = np.zeros_like(gt)
            coarse[rows[first], columns[first]] = True
            yield Attempt(coarse, ("cut-off",))

    return reach("partial", attempts(), gt, goal=goal)


def merge_neighbour(
    image: ImageArray | None, gt: BoolArray, rng: Rng, *, goal: Goal, neighbours: Sequence[BoolArray]
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


def coarse_polygon(mask: BoolArray, rng: Rng, severity: float) -> BoolArray:
    """Redraw each outline with few, slightly misplaced corners, as a person in a hurry does.

    The tolerance of the Douglas-Peucker corners is 1 to 4 % of the circumference of a disc of the mask's area.
    """
    r = radius(mask)
    outlines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    canvas = np.zeros(mask.shape, np.uint8)
    for outline in outlines:
        corners = cv2.approxPolyDP(outline, r * rng.uniform(0.05, 0.25) * severity, True)
        if rng.random() < 0.25:
            corners = cv2.convexHull(outline)
        moved = corners + rng.normal(0, 0.05 * r * severity, corners.shape)
        cv2.fillPoly(canvas, [moved.round().astype(np.int32)], 1)
    return canvas.astype(bool)


def shift_and_scale(mask: BoolArray, rng: Rng, severity: float) -> BoolArray:
    """Shift, scale and shear the mask about its centre by a few percent."""
    height, width = mask.shape
    rows, columns = np.nonzero(mask)
    centre = np.array((columns.mean(), rows.mean()))
    linear = np.eye(2) + rng.normal(0, 0.06 * severity, (2, 2))
    offset = centre - linear @ centre + rng.normal(0, 0.12 * radius(mask) * severity, 2)
    matrix = np.hstack((linear, offset[:, None]))
    moved = cv2.warpAffine(mask.astype(np.uint8), matrix, (width, height), flags=cv2.INTER_NEAREST)
    return moved.astype(bool)


def holes_and_islands(mask: BoolArray, rng: Rng, severity: float) -> BoolArray:
    """Punch blob-shaped holes into the mask and drop blobs beside it."""
    noise = smooth_noise(mask.shape, rng, cells=int(rng.integers(6, 16)))
    level = 1.9 - 0.5 * severity
    beside = signed_depth(mask) > -0.8 * radius(mask)
    coarse: BoolArray = (mask & (noise <= level)) | ((noise < -level) & beside)
    return coarse


def leak(mask: BoolArray, rng: Rng, severity: float, *, neighbour: BoolArray) -> BoolArray:
    """Let the mask run over into a neighbouring region, as far as a draw allows."""
    reach = signed_depth(mask) > -radius(mask) * rng.uniform(0.2, 1.0) * severity
    coarse: BoolArray = mask | (neighbour & reach)
    return coarse
