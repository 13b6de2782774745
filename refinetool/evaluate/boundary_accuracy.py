"""mBA: the share of right pixels near the true outline (Cheng et al. 2020, CascadePSP)."""

import functools

import cv2
import numpy as np
from numpy.typing import NDArray

from refinetool.evaluate.shapes import Shape, box_around, placed
from refinetool.records import BoolArray, Size

WIDTHS = 5
"""The regions that are averaged."""

SHARE_OF_SIDES = 300
"""The widest radius is (W + H) / 300."""


def radii(size: Size) -> tuple[int, ...]:
    """The five radii in pixels for an image of size (H, W): r_i = 1 + int((r_max - 1) / 5 i), r_max = (W + H) / 300.

    They repeat in small images: below W + H = 675 all are 1.
    """
    longest = (size[0] + size[1]) / SHARE_OF_SIDES
    return tuple(1 + int((longest - 1) / WIDTHS * i) for i in range(WIDTHS))


def near_outline(mask: BoolArray, radius: int) -> BoolArray:
    """The morphological gradient, bool (H, W): dilation less erosion with an ellipse of 2 r + 1 pixels.

    Beyond the frame nothing is known, so it neither grows nor shrinks a mask.
    """
    kernel = _ellipse(radius)
    pixels = mask.view(np.uint8)
    grown = cv2.dilate(pixels, kernel, borderType=cv2.BORDER_CONSTANT, borderValue=(0,))
    shrunk = cv2.erode(pixels, kernel, borderType=cv2.BORDER_CONSTANT, borderValue=(255,))
    return np.not_equal(grown, shrunk)


@functools.cache
def _ellipse(radius: int) -> NDArray[np.uint8]:
    return np.asarray(cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius + 1, 2 * radius + 1)), dtype=np.uint8)


def boundary_accuracies(truth: Shape, others: list[Shape], *, size: Size, void: BoolArray | None) -> list[float] | None:
    """The boundary accuracy, 0..1, of some masks of an image of size (H, W): the mean over the five radii of the share
    of pixels near the true outline where a mask is right.

    Args:
        void: bool (H, W), pixels that do not count.

    Returns:
        None if the truth has no outline: it is empty, or all of the image.
    """
    if not truth.area or truth.area == size[0] * size[1]:
        return None
    reach = radii(size)
    box = box_around([truth.box], margin_px=max(reach), size=size)
    reference = np.ascontiguousarray(placed(truth, box))
    right = [placed(other, box) == reference for other in others]
    x0, y0, x1, y1 = box
    sums = np.zeros(len(others))
    for radius in sorted(set(reach)):
        region = near_outline(reference, radius)
        if void is not None:
            region &= ~void[y0:y1, x0:x1]
        count = int(np.count_nonzero(region))
        if not count:
            return None
        sums += [reach.count(radius) * np.count_nonzero(region & same) / count for same in right]
    return [float(value) for value in sums / WIDTHS]
