"""Lengths and distances of a mask, smooth noise, and windows around objects: what generators are built from."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray

from refinetool.corrupt import defects
from refinetool.corrupt.goals import Attempt, Goal, Rng
from refinetool.masks import bounding_box, disc_radius
from refinetool.records import Box, FloatArray, ImageArray, Mask, Size

Defect: TypeAlias = Callable[[Mask, Rng, float], Mask]
"""One draw of a defect: a good mask, bool (H, W), and a severity around 1 to a coarse mask of the same shape."""

LEAST_MARGIN_PX = 4
SEVERITIES = (0.02, 20.0)


def radius(mask: Mask) -> float:
    """Radius in pixels of a disc of the mask's area, plus one so that lengths made from it never vanish."""
    return disc_radius(mask) + 1.0


def signed_depth(mask: Mask) -> FloatArray:
    """Distance in pixels to the nearest pixel of the other kind, float32 (H, W): positive inside, negative outside.

    Where there is no other kind, it is the longer side of the image.
    """
    if mask.all() or not mask.any():
        return np.full(mask.shape, max(mask.shape) if mask.all() else -max(mask.shape), np.float32)
    inside = mask.astype(np.uint8)
    within, beyond = (
        cv2.distanceTransform(pixels, cv2.DIST_L2, cv2.DIST_MASK_PRECISE) for pixels in (inside, 1 - inside)
    )
    depth: FloatArray = within - beyond
    return depth


def reach_px(mask: Mask) -> float:
    """How far from the boundary a defect may change the mask of a window, in pixels; training knows no farther."""
    return float(defects.REACH * max(mask.shape))


def smooth_noise(shape: tuple[int, ...], rng: Rng, *, cells: int) -> FloatArray:
    """Zero-mean noise of unit variance, float32 (H, W), with about `cells` bumps along each side."""
    knots = rng.standard_normal((cells + 2, cells + 2))
    down, across = (_spline_weights(side, cells) for side in shape)
    noise = down @ knots @ across.T
    noise = noise - noise.mean()
    scaled: FloatArray = (noise / (noise.std() + 1e-6)).astype(np.float32)
    return scaled


def _spline_weights(side: int, cells: int) -> NDArray[np.float64]:
    """Weights, float64 (side, cells + 2), of cubic B-splines with `cells` knots along the side."""
    place = (np.arange(side) + 0.5) / side * cells
    distance = np.abs(place[:, None] - np.arange(cells + 2))
    near = 2 / 3 - distance**2 + distance**3 / 2
    weights: NDArray[np.float64] = np.where(distance < 1, near, np.maximum(2 - distance, 0) ** 3 / 6)
    return weights


@dataclass(frozen=True, slots=True)
class Zoom:
    """A window around an object, its pixels repeated, so that lengths are many pixels for small objects, too.

    window: Half-open xyxy.
    factor: How often each pixel is repeated along each axis.
    """

    window: Box
    factor: int

    def enter(self, mask: Mask) -> Mask:
        """What the window shows of a mask of the image, bool (h * factor, w * factor)."""
        x0, y0, x1, y1 = self.window
        return np.ascontiguousarray(mask[y0:y1, x0:x1].repeat(self.factor, axis=0).repeat(self.factor, axis=1))

    def enter_image(self, image: ImageArray) -> ImageArray:
        """The same of the image, enlarged smoothly."""
        x0, y0, x1, y1 = self.window
        size = ((x1 - x0) * self.factor, (y1 - y0) * self.factor)
        return np.asarray(cv2.resize(image[y0:y1, x0:x1], size, interpolation=cv2.INTER_LINEAR), dtype=np.uint8)

    def leave(self, mask: Mask, shape: Size) -> Mask:
        """The mask in the image: a pixel belongs to it if at least half of its repetitions do."""
        x0, y0, x1, y1 = self.window
        cells = mask.reshape(y1 - y0, self.factor, x1 - x0, self.factor).mean(axis=(1, 3))
        whole = np.zeros(shape, dtype=np.bool_)
        whole[y0:y1, x0:x1] = cells >= 0.5
        return whole


def zoom_on(gt: Mask, *, margin: float, min_side_px: int) -> Zoom:
    """The window around a mask that isn't empty.

    Args:
        margin: What the window adds to the mask's box on each side, as a fraction of the longer side of the box.
        min_side_px: The longer side of the window has at least this many pixels once they are repeated.
    """
    box = bounding_box(gt)
    assert box is not None, "an empty mask is never corrupted"
    x0, y0, x1, y1 = box
    height, width = gt.shape
    room = max(LEAST_MARGIN_PX, math.ceil(margin * max(x1 - x0, y1 - y0)))
    window = max(0, x0 - room), max(0, y0 - room), min(width, x1 + room), min(height, y1 + room)
    side = max(window[2] - window[0], window[3] - window[1])
    return Zoom(window, math.ceil(min_side_px / side))


def aimed(
    name: str, defect: Defect, gt: Mask, rng: Rng, *, goal: Goal, margin: float, min_side_px: int
) -> Iterator[Attempt]:
    """Draw a defect again and again, at a higher severity after too good a mask and a lower one after too bad a mask.

    The IoU aimed at is drawn from the band. Defects see a window around the object (see `zoom_on`).
    """
    zoom = zoom_on(gt, margin=margin, min_side_px=min_side_px)
    inside = zoom.enter(gt)
    target, severity = rng.uniform(goal.low, goal.high), rng.uniform(0.5, 1.5)
    while True:
        coarse = zoom.leave(defect(inside, rng, severity), gt.shape)
        yield Attempt(coarse, (name,))
        step = rng.uniform(1.1, 1.8)
        changed = severity * step if goal.overlap(coarse, gt) > target else severity / step
        severity = float(np.clip(changed, *SEVERITIES))
