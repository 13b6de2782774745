"""Defects of the boundary: outlines drawn with few corners, local morphology, noise, boundaries that moved."""

from collections.abc import Callable, Iterator

import cv2
import numpy as np
from numpy.typing import NDArray

from refinetool.corrupt import defects
from refinetool.corrupt.geometry import radius, reach_px, signed_depth, smooth_noise, zoom_on
from refinetool.corrupt.goals import Attempt, Corrupted, Goal, Rng, reach
from refinetool.records import FloatArray, ImageArray, Mask

OPERATIONS_PER_ROUND = 4
SEED_CHANCE = 0.25
"""Probability that an operation sets a pixel, from which a hole or an island may grow."""
ELEMENT_SIDES = (3, 9)
TINY_PX = 2
LEAST_CORNERS = 10
"""Outlines with fewer corners are left as they are."""


def boundary(
    image: ImageArray | None,
    gt: Mask,
    rng: Rng,
    *,
    goal: Goal,
    cut: float,
    keep: float,
    jitter: float,
    rounds: int,
    margin: float,
    min_side_px: int,
) -> Corrupted:
    """Redraw the outlines with few corners, then disturb them locally, as CascadePSP does for training.

    The IoU aimed at is drawn from the band; the disturbance ends below it. It happens in a window around the object,
    whose pixels are repeated where the object is small: structuring elements of 3 to 9 pixels would swallow it.

    Args:
        image: Not looked at.
        gt: bool (H, W).
        cut, keep, jitter: See `simplified`.
        rounds: See `local_morphology`.
        margin, min_side_px: Of the window, see `geometry.zoom_on`.
    """
    del image

    def attempts() -> Iterator[Attempt]:
        zoom = zoom_on(gt, margin=margin, min_side_px=min_side_px)
        inside = zoom.enter(gt)
        void = None if goal.ignore is None else zoom.enter(goal.ignore)
        around = Goal(goal.low, goal.high, goal.tries, goal.min_area, void)
        while True:
            target = rng.uniform(goal.low, goal.high)
            redrawn = simplified(inside, rng, cut=cut, keep=keep, jitter=jitter)
            coarse, _ = local_morphology(
                redrawn, rng, overlap=lambda mask: around.overlap(mask, inside), target=target, rounds=rounds
            )
            yield Attempt(zoom.leave(coarse, gt.shape), ("simplified-outline", "local-morphology"))

    return reach("boundary", attempts(), gt, goal=goal)


def simplified(mask: Mask, rng: Rng, *, cut: float, keep: float, jitter: float) -> Mask:
    """Redraw every outline, outer and inner, with few of its pixels as corners.

    Args:
        mask: bool (H, W).
        cut: Fraction of consecutive pixels to leave out, where the ends of the gap are close: a limb or bay is cut off.
        keep: Fraction of the other pixels to keep as corners, drawn at random.
        jitter: Standard deviation of the relative move of a corner away from the middle of its outline.

    Returns:
        bool (H, W); the mask itself where no outline is left.
    """
    outlines, _ = cv2.findContours(mask.view(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    rings = [
        _fewer_corners(np.asarray(outline[:, 0], np.int32), rng, cut=cut, keep=keep, jitter=jitter)
        for outline in outlines
    ]
    drawn = [ring for ring in rings if len(ring) >= 3]
    if not drawn:
        return mask.copy()
    canvas = np.zeros(mask.shape, np.uint8)
    cv2.fillPoly(canvas, drawn, (1,))  # all at once: even-odd, so that holes stay holes
    return canvas.astype(bool)


def _fewer_corners(ring: NDArray[np.int32], rng: Rng, *, cut: float, keep: float, jitter: float) -> NDArray[np.int32]:
    if len(ring) < LEAST_CORNERS:
        return ring
    gap = max(1, int(cut * len(ring)))
    apart = np.linalg.norm(ring - np.roll(ring, -gap, axis=0), axis=1)
    closest = np.argsort(apart, kind="stable")[: max(1, len(ring) // 10)]
    start = int(rng.choice(closest))
    left = np.roll(ring, -start, axis=0)[gap:]
    picked = np.sort(rng.choice(len(left), size=max(1, int(keep * len(left))), replace=False))
    corners: NDArray[np.int32] = left[picked]
    if jitter and len(corners):
        middle = corners.mean(axis=0)
        moved = middle + (corners - middle) * (1 + rng.normal(0, jitter, (len(corners), 1)))
        corners = moved.round().astype(np.int32)
    return corners


def local_morphology(
    mask: Mask, rng: Rng, *, overlap: Callable[[Mask], float], target: float, rounds: int
) -> tuple[Mask, int]:
    """Dilate and erode in random rectangles until the overlap is below a target.

    An operation draws a rectangle, sets its middle to mask or background with probability 1/4, and dilates or erodes
    within it by a random rectangle or ellipse of 3 to 9 pixels. Pixels beyond the rectangle count as those at its edge.
    Four operations make a round; the overlap is looked at after each round.

    Args:
        mask: bool (H, W), where to start.
        overlap: The IoU that is to fall below `target`.
        rounds: How many at most.

    Returns:
        The disturbed mask, bool (H, W), and the number of rounds. Masks of one or two pixels a side stay as they are.
    """
    coarse = mask.astype(np.uint8)
    if min(mask.shape) <= TINY_PX:
        return mask.copy(), 0
    done = 0
    while done < rounds and overlap(coarse.view(np.bool_)) >= target:
        for _ in range(OPERATIONS_PER_ROUND):
            _disturb(coarse, rng)
        done += 1
    return coarse.view(np.bool_), done


def _disturb(mask: NDArray[np.uint8], rng: Rng) -> None:
    """One operation, in place."""
    height, width = mask.shape
    (x0, x1), (y0, y1) = (np.sort(rng.integers(0, side, 2)) for side in (width, height))
    part = mask[y0 : y1 + 1, x0 : x1 + 1]
    if rng.random() < SEED_CHANCE:
        part[part.shape[0] // 2, part.shape[1] // 2] = rng.integers(2)
    change = cv2.dilate if rng.random() < 0.5 else cv2.erode
    part[:] = change(part, _element(rng), borderType=cv2.BORDER_REPLICATE)


def _element(rng: Rng) -> NDArray[np.uint8]:
    side = int(rng.integers(ELEMENT_SIDES[0], ELEMENT_SIDES[1] + 1))
    kinds = (
        (cv2.MORPH_RECT, (side, side)),
        (cv2.MORPH_ELLIPSE, (side, side)),
        (cv2.MORPH_ELLIPSE, (side, side // 2)),
        (cv2.MORPH_ELLIPSE, (side // 2, side)),
    )
    kind, size = kinds[rng.integers(len(kinds))]
    return np.asarray(cv2.getStructuringElement(kind, size), dtype=np.uint8)


def noise_band(
    image: ImageArray | None, gt: Mask, rng: Rng, *, goal: Goal, grid_side: int, factor: int, residue: float
) -> Corrupted:
    """Salt and pepper along the boundary, as HQ-SAM makes mask prompts for training.

    The band is where the mask differs by `residue` or more from itself scaled down by `factor` and back, bilinearly;
    normal noise is added there and the sum thresholded at 0.5. Where the band swallows a small object, the next
    attempt doubles the grid, or halves the factor once the grid has all pixels; either way the band is half as wide.

    Args:
        image: Not looked at.
        gt: bool (H, W).
        grid_side: The longer side of the grid on which this is done, as fine as a mask prompt; smaller masks keep
            their own pixels.
    """
    del image
    height, width = gt.shape

    def attempts() -> Iterator[Attempt]:
        side, shrink = grid_side, factor
        while True:
            scale = min(1.0, side / max(height, width))
            size = (max(1, round(width * scale)), max(1, round(height * scale)))
            grid = (_resized(gt.astype(np.float32), size, cv2.INTER_AREA) >= 0.5).astype(np.float32)
            least = _resized(grid, (max(1, size[0] // shrink), max(1, size[1] // shrink)), cv2.INTER_LINEAR)
            band = np.abs(grid - _resized(least, size, cv2.INTER_LINEAR)) >= residue
            noisy = grid + band * rng.standard_normal(grid.shape, dtype=np.float32)
            large = _resized((noisy > 0.5).astype(np.float32), (width, height), cv2.INTER_NEAREST) > 0.5
            yield Attempt(large, ("noise-band",))
            if goal.overlap(large, gt) < goal.low:
                side, shrink = (2 * side, shrink) if scale < 1 else (side, max(2, shrink // 2))

    return reach("noise-band", attempts(), gt, goal=goal)


def _resized(values: FloatArray, size: tuple[int, int], how: int) -> FloatArray:
    """Values on a grid of another (width, height)."""
    return np.asarray(cv2.resize(values, size, interpolation=how), dtype=np.float32)


# --- by severity


def boundary_noise(mask: Mask, rng: Rng, severity: float) -> Mask:
    """Move the boundary in and out by smooth noise, with a bias to one side."""
    size = radius(mask) * severity
    noise = smooth_noise(mask.shape, rng, cells=int(rng.integers(*defects.BOUNDARY_BUMPS)))
    bias = np.float32(defects.BOUNDARY_BIAS * size * rng.normal())
    return _shifted_boundary(mask, defects.BOUNDARY_NOISE * size * noise + bias)


def grow_or_shrink(mask: Mask, rng: Rng, severity: float) -> Mask:
    """Move the whole boundary out or in, by about the same everywhere."""
    size = radius(mask)
    offset = rng.choice((-1, 1)) * rng.uniform(*defects.GROWTH) * size * severity
    noise = defects.GROWTH_NOISE * size * smooth_noise(mask.shape, rng, cells=int(rng.integers(*defects.GROWTH_BUMPS)))
    return _shifted_boundary(mask, np.float32(offset) + noise)


def _shifted_boundary(mask: Mask, offset: FloatArray) -> Mask:
    farthest = max(reach_px(mask) - 1, 0)
    shifted: Mask = signed_depth(mask) + offset.clip(-farthest, farthest) > 0
    return shifted
