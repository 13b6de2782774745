"""mBA: the fraction of pixels near the true outline that are right (Cheng et al. 2020, CascadePSP)."""

import numpy as np

from refinetool.evaluate.shapes import Shape, draw_in_box, enclose_boxes
from refinetool.masks import dilated, eroded
from refinetool.records import Mask, Size

RADII = 5
"""How many regions around the outline are averaged."""

SIDES_PER_RADIUS = 300
"""No radius reaches (W + H) / 300."""


def compute_radii(size: Size) -> tuple[int, ...]:
    """The five radii in pixels for an image of size (H, W): r_i = 1 + int((r_max - 1) / 5 i), r_max = (W + H) / 300.

    Small images repeat them: below W + H = 675 all five are 1.
    """
    longest = (size[0] + size[1]) / SIDES_PER_RADIUS
    return tuple(1 + int((longest - 1) / RADII * i) for i in range(RADII))


def find_outline_region(mask: Mask, radius: int) -> Mask:
    """The morphological gradient, bool (H, W): the dilation minus the erosion with an ellipse 2 r + 1 pixels wide.

    Nothing is known beyond the frame, so it neither grows nor shrinks a mask.
    """
    return np.not_equal(dilated(mask, radius_px=radius), eroded(mask, radius_px=radius))


def compute_boundary_accuracies(
    truth: Shape, others: list[Shape], *, size: Size, void: Mask | None
) -> list[float] | None:
    """The boundary accuracies, 0..1, of some masks of an image of size (H, W).

    Each is the mean over the five radii of the fraction of pixels near the true outline where the mask is right.

    Args:
        void: bool (H, W), pixels that don't count.

    Returns:
        None if the truth has no outline because it is empty or covers the whole image.
    """
    if not truth.area or truth.area == size[0] * size[1]:
        return None
    reach = compute_radii(size)
    box = enclose_boxes([truth.box], margin_px=max(reach), size=size)
    reference = np.ascontiguousarray(draw_in_box(truth, box))
    right = [draw_in_box(other, box) == reference for other in others]
    x0, y0, x1, y1 = box
    sums = np.zeros(len(others))
    for radius in sorted(set(reach)):
        region = find_outline_region(reference, radius)
        if void is not None:
            region &= ~void[y0:y1, x0:x1]
        count = int(np.count_nonzero(region))
        if not count:
            return None
        sums += [reach.count(radius) * np.count_nonzero(region & same) / count for same in right]
    return [float(value) for value in sums / RADII]
