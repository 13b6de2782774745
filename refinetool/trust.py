"""Trust in the coarse outline: where the model is unsure, a good coarse mask knows better.

A model answers on a grid of cells much larger than pixels. Near the outline its logits are small and its mask is a
guess, while the coarse mask may be exact to the pixel: drawn by hand along an edge, or made of superpixels. So within a
margin of logits around the threshold the coarse mask decides. The margin is wide where the coarse outline deserves it:
it lies on colour edges, more so than its neighbourhood, or the model agrees with almost all of the mask. Blobs without
edges get no margin.
"""

import math

import cv2
import numpy as np

from refinetool.masks import bounding_box, distance_inside, iou
from refinetool.records import BoolArray, FloatArray, ImageArray
from refinetool.settings import TrustSettings

BLUR_PX = 1.0
"""Standard deviation of the blur before colours are differentiated, against noise."""
LINE_PX = 1.0
"""The outline: pixels within this distance of the other side."""
BAND_SHARE, LEAST_BAND_PX = 0.2, 4.0
"""Its neighbourhood: pixels within this share of the radius of a disc of the mask's area."""


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
    return np.where(np.abs(fine) < width, coarse, refined)


def margin(aligned: float, agreement: float, *, settings: TrustSettings) -> float:
    """How far from 0 the logits may be for the coarse mask to decide, in logits.

    It rises from 0 to `settings.margin` with the alignment of the outline, and by as much again with the agreement.
    """
    by_edges = _share(aligned, settings.edges_from, settings.edges_to)
    by_agreement = _share(agreement, settings.agreement_from, settings.agreement_to)
    return settings.margin * (by_edges + by_agreement)


def alignment(image: ImageArray, mask: BoolArray) -> float:
    """How much stronger colours change on the outline of a mask than near it.

    The colour gradient is measured after a slight blur, as the root of the squared derivatives summed over colours.

    Args:
        image: uint8 (H, W, 3) RGB.
        mask: bool (H, W).

    Returns:
        Mean gradient on the outline over mean gradient in the band around it, which it is part of. 1 where there is no
        outline or no gradient.
    """
    box = bounding_box(mask)
    if box is None or mask.all():
        return 1.0
    band_px = max(LEAST_BAND_PX, BAND_SHARE * math.sqrt(np.count_nonzero(mask) / math.pi))
    reach = math.ceil(band_px) + 4  # the blur and the derivative look a few pixels further
    x0, y0, x1, y1 = box
    crop = slice(max(0, y0 - reach), y1 + reach), slice(max(0, x0 - reach), x1 + reach)
    inside = mask[crop]
    depth = sum(distance_inside(side, border_is_background=False) for side in (inside, ~inside))
    if inside.all():
        return 1.0
    change = gradient(image[crop])
    line, band = depth <= LINE_PX, depth <= band_px
    around = float(change[band].mean())
    return float(change[line].mean()) / around if around > 0 else 1.0


def gradient(image: ImageArray) -> FloatArray:
    """Strength of the colour gradient at each pixel of uint8 (H, W, 3): float32 (H, W), in Sobel's units."""
    calm = cv2.GaussianBlur(image.astype(np.float32), (0, 0), BLUR_PX)
    across, down = (cv2.Sobel(calm, cv2.CV_32F, *order) for order in ((1, 0), (0, 1)))
    strength: FloatArray = np.sqrt((across**2 + down**2).sum(axis=2)).astype(np.float32)
    return strength


def spread(logits: FloatArray, shape: tuple[int, ...]) -> FloatArray:
    """Logits (h, w) read bilinearly at the pixels of a frame of that shape: float32 (H, W)."""
    height, width = shape
    fine: FloatArray = np.asarray(cv2.resize(logits, (width, height), interpolation=cv2.INTER_LINEAR), np.float32)
    return fine


def _share(value: float, start: float, end: float) -> float:
    """How far a value has come from start to end, 0..1."""
    return min(1.0, max(0.0, (value - start) / (end - start)))
