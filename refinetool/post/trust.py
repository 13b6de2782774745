"""Trust in the coarse outline: where the model is unsure, a good coarse mask knows better.

A model answers on a grid of cells much larger than pixels. Near the outline its logits are small and its mask is a
guess, while the coarse mask may be exact to the pixel: drawn by hand along an edge, or made of superpixels. So within a
margin of logits around the threshold the coarse mask decides. The margin is wide where the coarse outline deserves it:
it lies on colour edges, more so than its neighbourhood, and wider still where the model agrees with almost all of the
mask. Blobs and loose polygons, whose outlines follow no edges, get no margin.
"""

import math

import cv2
import numpy as np

from refinetool.masks import bounding_box, disc_radius, distance_inside, iou, spread
from refinetool.records import BoolArray, FloatArray, ImageArray
from refinetool.settings import TrustSettings

BLUR_PX = 1.0
"""Standard deviation of the blur before colours are differentiated, against noise."""
LINE_PX = 1.0
"""The outline: pixels within this distance of the other side."""
BAND_SHARE, LEAST_BAND_PX = 0.2, 4.0
"""Its neighbourhood: pixels within this share of the radius of a disc of the mask's area."""
NEAR_SHARE = 0.35
"""What counts as near: standard deviation of a Gaussian, as a share of the same radius."""
LEAST_WEIGHT, LEAST_CHANGE = 1e-6, 1e-3
"""Below these there is no outline nearby, or nothing to see."""


def settled(
    image: ImageArray, coarse: BoolArray, refined: BoolArray, logits: FloatArray, *, settings: TrustSettings
) -> BoolArray:
    """The refined mask, with the coarse one in place of it where the model is unsure and the coarse outline is good.

    Args:
        image: uint8 (H, W, 3) RGB.
        coarse, refined: bool (H, W), the same frame; the coarse one is not empty.
        logits: float32 (h, w), the model's on its own grid over that frame; above 0 is foreground.

    Returns:
        bool (H, W), a new array.
    """
    fine = spread(logits, refined.shape)
    width = margin(alignment(image, coarse), iou(coarse, fine > 0), settings=settings)
    result: BoolArray = np.where(np.abs(fine) < width, coarse, refined)
    return result


def margin(aligned: FloatArray, agreement: float, *, settings: TrustSettings) -> FloatArray:
    """How far from 0 the logits may be for the coarse mask to decide, in logits, float32 like `aligned`.

    It rises from 0 to `settings.margin` with the alignment of the outline nearby, and to twice that where, besides, the
    model agrees. Agreement alone is no reason: a loosely drawn outline shares most of its pixels with the object, too.
    """
    by_edges = _share(aligned, settings.edges_from, settings.edges_to)
    by_agreement = _share(np.float32(agreement), settings.agreement_from, settings.agreement_to)
    width: FloatArray = (settings.margin * by_edges * (1 + by_agreement)).astype(np.float32)
    return width


def alignment(image: ImageArray, mask: BoolArray) -> FloatArray:
    """How much stronger colours change on the outline of a mask than beside it, near each pixel.

    The gradient is measured after a slight blur, as the root of the squared derivatives summed over colours. Both
    means are weighted with a Gaussian around the pixel.

    Args:
        image: uint8 (H, W, 3) RGB.
        mask: bool (H, W).

    Returns:
        float32 (H, W): mean gradient on the outline nearby over mean gradient in the band around it, which it is part
        of; 0 where there is no outline nearby.
    """
    aligned = np.zeros(mask.shape, dtype=np.float32)
    box = bounding_box(mask)
    if box is None or mask.all():
        return aligned
    band_px, near_px = (max(LEAST_BAND_PX, share * disc_radius(mask)) for share in (BAND_SHARE, NEAR_SHARE))
    reach = math.ceil(max(band_px + 4, 3 * near_px))  # the blur and the derivative look a few pixels further
    x0, y0, x1, y1 = box
    crop = slice(max(0, y0 - reach), y1 + reach), slice(max(0, x0 - reach), x1 + reach)
    inside = mask[crop]
    depth = distance_inside(inside, border_is_background=False) + distance_inside(~inside, border_is_background=False)
    change = gradient(image[crop])
    on_line, beside = (_mean_near(change, depth <= width, near_px) for width in (LINE_PX, band_px))
    aligned[crop] = on_line / np.maximum(beside, LEAST_CHANGE)
    return aligned


def _mean_near(values: FloatArray, where: BoolArray, near_px: float) -> FloatArray:
    """The mean of values over some pixels, weighted with a Gaussian around each pixel; 0 where none is near."""
    weights = where.astype(np.float32)
    total, weight = (cv2.GaussianBlur(plane, (0, 0), near_px) for plane in (values * weights, weights))
    mean: FloatArray = np.asarray(total / np.maximum(weight, LEAST_WEIGHT), np.float32)
    return mean


def gradient(image: ImageArray) -> FloatArray:
    """Strength of the colour gradient at each pixel of uint8 (H, W, 3): float32 (H, W), in Sobel's units."""
    calm = cv2.GaussianBlur(image.astype(np.float32), (0, 0), BLUR_PX)
    across, down = (cv2.Sobel(calm, cv2.CV_32F, *order) for order in ((1, 0), (0, 1)))
    strength: FloatArray = np.sqrt((across**2 + down**2).sum(axis=2)).astype(np.float32)
    return strength


def _share(value: FloatArray | np.float32, start: float, end: float) -> FloatArray:
    """How far values have come from start to end, 0..1."""
    share: FloatArray = np.clip((np.asarray(value) - start) / (end - start), 0, 1).astype(np.float32)
    return share
