"""Reproduces the geometry of SAMRefiner's public release where it differs from the paper (`PromptSettings.release`).

Reproduced are chamfer distances, a negative point at (0, 0) where a box holds no background, ranges that stop before
the last row and column, and box expansions that are cancelled at the image border and rounded towards zero. The
constants are in `settings.RELEASE`.

Not reproduced: in the release, the box of the last mask of an image decides whether all mask prompts of the image are
weakened. Here each mask depends only on its own box, so results do not depend on the order of the masks.
"""

from itertools import pairwise

import numpy as np

from refinetool.records import Box, FloatArray, Mask, Point

UNREACHABLE = 1e10
"""The release's distance where there is no background."""


def chamfer_inside(mask: Mask) -> FloatArray:
    """Measure the chamfer distance of each mask pixel to the background: a step costs 1, a diagonal step sqrt 2.

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
    # The same length can be summed up in different orders; float32 drops the last bits, so that ties stay ties.
    return distance.astype(np.float32)


def _relax_row(row: np.ndarray[tuple[int], np.dtype[np.float64]]) -> None:
    """Update the distances of a row from its own pixels, in place."""
    x = np.arange(len(row))
    rightwards = np.minimum.accumulate(row - x) + x
    leftwards = np.minimum.accumulate((row + x)[::-1])[::-1] - x
    np.minimum(rightwards, leftwards, out=row)


def background_point(mask: Mask, box: Box) -> Point:
    """Find the background pixel of the box that is farthest from the foreground, the first in row-major order on ties.

    The box's last row and column are not searched. If there is no background, the point is (0, 0), whatever is there.

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


def stretch_box(box: Box, similar: Mask, *, threshold: float, step: float, step_px: float) -> Box:
    """Move each edge of a box outwards by one step if more than `threshold` of the strip it sweeps is similar.

    A step is `step` times the side, at most `step_px`. Coordinates are inclusive and truncated, so the left and upper
    edges move up to one pixel further than the others. An edge that would reach the image border stays.

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

    def is_similar(strip: Mask) -> bool:
        return strip.size > 0 and float(strip.mean()) > threshold

    return (
        left if left > 0 and is_similar(similar[y0:y1, left:x0]) else x0,
        top if top > 0 and is_similar(similar[top:y0, x0:x1]) else y0,
        (right if right < width and is_similar(similar[y0:y1, x1:right]) else x1) + 1,
        (bottom if bottom < height and is_similar(similar[y1:bottom, x0:x1]) else y1) + 1,
    )
