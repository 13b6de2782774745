"""The geometry of SAMRefiner's public release where it differs from the paper, for `PromptSettings.release`.

Reproduced: chamfer distances, a negative point at (0, 0) where a box holds no background, ranges that stop before the
last row and column, expansions that the frame cancels and that are rounded towards zero. Its constants are
`settings.RELEASE`.

Left out: the release weakens the mask prompts of a whole image by what happened to the box of its last mask. Here each
mask answers for its own box, so that results do not depend on the order of the masks.
"""

from itertools import pairwise

import numpy as np

from refinetool.records import BoolArray, Box, FloatArray, Point

UNREACHABLE = 1e10
"""The release's distance where there is nothing to measure to."""


def chamfer_inside(mask: BoolArray) -> FloatArray:
    """Chamfer distance of each mask pixel to the nearest background pixel: a step costs 1, a diagonal one sqrt 2.

    Two raster scans are exact for this metric. The border is not background.

    Args:
        mask: bool (H, W).

    Returns:
        float32 (H, W) in pixels, 0 outside the mask; `UNREACHABLE` everywhere if there is no background.
    """
    distance = np.where(mask, UNREACHABLE, 0.0)
    if mask.all():
        return distance.astype(np.float32)
    for rows in (distance, distance[::-1]):
        _relax_row(rows[0])
        for above, row in pairwise(rows):
            np.minimum(row, above + 1.0, out=row)
            np.minimum(row[1:], above[:-1] + np.sqrt(2.0), out=row[1:])
            np.minimum(row[:-1], above[1:] + np.sqrt(2.0), out=row[:-1])
            _relax_row(row)
    # Sums of ones and roots reach one length by several paths: float32 drops their last bits, so that ties stay ties.
    return distance.astype(np.float32)


def _relax_row(row: np.ndarray[tuple[int], np.dtype[np.float64]]) -> None:
    """Let each pixel be reached from its neighbours in the row, in place."""
    x = np.arange(len(row))
    rightwards = np.minimum.accumulate(row - x) + x
    leftwards = np.minimum.accumulate((row + x)[::-1])[::-1] - x
    np.minimum(rightwards, leftwards, out=row)


def background_point(mask: BoolArray, box: Box) -> Point:
    """Find the background pixel of the box that is farthest from the foreground, the first in row-major order on ties.

    The box's last row and column are not searched. Where no background is left the point is (0, 0), whatever is there.

    Args:
        mask: bool (H, W), not empty.
        box: The mask's tight box.
    """
    x0, y0, x1, y1 = box
    distance = chamfer_inside(~mask[y0:y1, x0:x1])[:-1, :-1]
    if not distance.any():
        return 0, 0
    y, x = np.unravel_index(distance.argmax(), distance.shape)
    return x0 + int(x), y0 + int(y)


def stretch_box(box: Box, similar: BoolArray, *, threshold: float, step: float, step_px: float) -> Box:
    """Move each edge of a box outwards by one step if more than `threshold` of the strip it sweeps is similar.

    A step is `step` of the side, at most `step_px`. Coordinates are inclusive and their fractions are cut off, so the
    left and upper edges move up to one pixel further than the others. An edge that would reach the frame stays.

    Args:
        box: Tight box, half-open.
        similar: bool (H, W) over the view.

    Returns:
        The box, half-open.
    """
    height, width = similar.shape
    x0, y0, x1, y1 = box[0], box[1], box[2] - 1, box[3] - 1
    step_x, step_y = min(step * (x1 - x0), step_px), min(step * (y1 - y0), step_px)
    left, top, right, bottom = int(x0 - step_x), int(y0 - step_y), int(x1 + step_x), int(y1 + step_y)

    def alike(strip: BoolArray) -> bool:
        return strip.size > 0 and float(strip.mean()) > threshold

    return (
        left if left > 0 and alike(similar[y0:y1, left:x0]) else x0,
        top if top > 0 and alike(similar[top:y0, x0:x1]) else y0,
        (right if right < width and alike(similar[y0:y1, x1:right]) else x1) + 1,
        (bottom if bottom < height and alike(similar[y1:bottom, x0:x1]) else y1) + 1,
    )
