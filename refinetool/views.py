"""Chooses the view of each region: the whole frame, or a crop around the region's box.

A crop shows small objects at a resolution the model can work with. Coordinates in a view are image coordinates minus
the view's upper left corner; nothing is scaled here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from refinetool.records import BoolArray, Box, ImageArray, Size
from refinetool.settings import ViewSettings


@dataclass(frozen=True, slots=True)
class View:
    """A window on an image: half-open xyxy in image pixels, inside the image."""

    window: Box

    @property
    def size(self) -> Size:
        """(H, W) of the view."""
        x0, y0, x1, y1 = self.window
        return y1 - y0, x1 - x0

    def crop_image(self, image: ImageArray) -> ImageArray:
        """Crop an image (H, W, 3) to a contiguous (h, w, 3), which may share its memory."""
        x0, y0, x1, y1 = self.window
        return np.ascontiguousarray(image[y0:y1, x0:x1])

    def crop_masks(self, masks: BoolArray) -> BoolArray:
        """Crop masks, bool (..., H, W), to (..., h, w)."""
        x0, y0, x1, y1 = self.window
        return np.ascontiguousarray(masks[..., y0:y1, x0:x1])

    def paste_masks(self, masks: BoolArray, *, size: Size) -> BoolArray:
        """Paste masks of the view, bool (..., h, w), into an image of `size`: bool (..., H, W), background outside."""
        x0, y0, x1, y1 = self.window
        pasted = np.zeros((*masks.shape[:-2], *size), dtype=np.bool_)
        pasted[..., y0:y1, x0:x1] = masks
        return pasted


def choose_views(
    boxes: Sequence[Box],
    areas: Sequence[int],
    *,
    size: Size,
    settings: ViewSettings,
) -> list[tuple[View, list[int]]]:
    """Decide what the model sees for each of N regions.

    `frame` shows all regions in one view of the whole image, `crop` each region in one of its own, and `mixed` crops
    small regions of large images. Regions with the same window share a view, so each view is embedded once.

    Args:
        boxes: N tight boxes, half-open xyxy.
        areas: N areas in pixels.
        size: (H, W) of the image.
        settings: Resolved: the mode is not `auto`.

    Returns:
        Views with the indices of their regions, in the order of their first regions; each region is in exactly one.
    """
    height, width = size
    large_image = max(size) >= settings.large_image_px
    regions_of: dict[Box, list[int]] = {}
    for n, (box, area) in enumerate(zip(boxes, areas, strict=True)):
        small = area < settings.small_object * height * width
        crop = settings.mode == "crop" or (settings.mode == "mixed" and large_image and small)
        window = crop_around(box, size=size, settings=settings) if crop else (0, 0, width, height)
        regions_of.setdefault(window, []).append(n)
    return [(View(window), regions) for window, regions in regions_of.items()]


def crop_around(box: Box, *, size: Size, settings: ViewSettings) -> Box:
    """Return the window of a region's crop: its box with a margin, with a minimum side and a maximum aspect ratio.

    The box is centred unless the window would cross the image border; the window is then shifted, not shrunk. Where the
    image is smaller than the window should be, the window is as wide or high as the image.

    Args:
        box: Half-open xyxy; only its part inside the image counts.
        size: (H, W) of the image.
    """
    height, width = size
    x0, x1 = (min(max(x, 0), width) for x in box[::2])
    y0, y1 = (min(max(y, 0), height) for y in box[1::2])
    grown = 1 + 2 * settings.margin
    across = min(max(math.ceil((x1 - x0) * grown), settings.min_side_px), width)
    down = min(max(math.ceil((y1 - y0) * grown), settings.min_side_px), height)
    across, down = (
        min(max(across, math.ceil(down / settings.max_aspect)), width),
        min(max(down, math.ceil(across / settings.max_aspect)), height),
    )
    left, right = _placed(x0, x1, across, width)
    top, bottom = _placed(y0, y1, down, height)
    return left, top, right, bottom


def _placed(start: int, end: int, length: int, limit: int) -> tuple[int, int]:
    """Return an interval of `length` centred on another interval, shifted into 0..`limit`."""
    first = min(max((start + end - length) // 2, 0), limit - length)
    return first, first + length
