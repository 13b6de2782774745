"""Masks of one image, cut to their boxes and drawn only once, however often they are compared."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from refinetool import masks
from refinetool.records import Box, Mask, Rle, Size


@dataclass(frozen=True, slots=True)
class Shape:
    """A mask within its tight box, and the band along the inside of its boundary, both bool (y1 - y0, x1 - x0)."""

    box: Box
    pixels: Mask
    band: Mask
    area: int
    band_area: int


NOTHING = np.zeros((0, 0), dtype=np.bool_)
EMPTY = Shape(box=(0, 0, 0, 0), pixels=NOTHING, band=NOTHING, area=0, band_area=0)


@dataclass(frozen=True, slots=True)
class Overlap:
    """IoU and boundary IoU of a mask with its ground truth, both in 0..1."""

    iou: float
    boundary_iou: float


LOST = Overlap(iou=0.0, boundary_iou=0.0)
"""The score of an object that the prediction lacks, even if its ground truth is empty."""


@dataclass(frozen=True, slots=True)
class CommonPixels:
    """How many pixels two masks share and cover together, and how many their bands."""

    shared: int
    covered: int
    band_shared: int
    band_covered: int

    @property
    def overlap(self) -> Overlap:
        """IoU and boundary IoU; both are 1 for two empty masks, which is the convention of DAVIS."""
        return Overlap(
            iou=self.shared / self.covered if self.covered else 1.0,
            boundary_iou=self.band_shared / self.band_covered if self.band_covered else 1.0,
        )


@dataclass(frozen=True, slots=True)
class Canvas:
    """Draws the masks of an image.

    size: (H, W).
    void: bool (H, W), pixels that belong to no mask; None if there are none.
    band_px: Width of the boundary band.
    drawn: The shapes drawn so far, by run lengths.
    """

    size: Size
    void: Mask | None
    band_px: int
    drawn: dict[bytes, Shape] = field(default_factory=dict)

    def get_shape(self, rle: Rle | None) -> Shape:
        """The shape of a mask without the void pixels; None stands for an empty mask."""
        if rle is None:
            return EMPTY
        found = self.drawn.get(rle.counts)
        if found is None:
            found = self.drawn[rle.counts] = self._draw(rle)
        return found

    def _draw(self, rle: Rle) -> Shape:
        crop = masks.decode_crop(rle)
        if crop is None:
            return EMPTY
        pixels, (x0, y0, x1, y1) = crop
        if self.void is not None:
            pixels = pixels & ~self.void[y0:y1, x0:x1]
        return make_shape(pixels, (x0, y0), band_px=self.band_px)


def make_shape(pixels: Mask, corner: tuple[int, int], *, band_px: int) -> Shape:
    """Cut a mask, bool (h, w), to its box; its top left pixel lies at `corner` (x, y) in the image."""
    box = masks.bounding_box(pixels)
    if box is None:
        return EMPTY
    x0, y0, x1, y1 = box
    inside = pixels[y0:y1, x0:x1]
    band = masks.boundary(inside, band_px)
    return Shape(
        box=(corner[0] + x0, corner[1] + y0, corner[0] + x1, corner[1] + y1),
        pixels=inside,
        band=band,
        area=int(np.count_nonzero(inside)),
        band_area=int(np.count_nonzero(band)),
    )


def count_common(a: Shape, b: Shape) -> CommonPixels:
    """Count the pixels that two masks share and cover."""
    here, there = masks.intersect(a.box, b.box)
    shared = int(np.count_nonzero(a.pixels[here] & b.pixels[there]))
    band_shared = int(np.count_nonzero(a.band[here] & b.band[there]))
    return CommonPixels(
        shared=shared,
        covered=a.area + b.area - shared,
        band_shared=band_shared,
        band_covered=a.band_area + b.band_area - band_shared,
    )


def draw_in_box(shape: Shape, box: Box) -> Mask:
    """Draw the part of a mask that lies in a box, bool (y1 - y0, x1 - x0)."""
    x0, y0, x1, y1 = box
    canvas = np.zeros((y1 - y0, x1 - x0), dtype=np.bool_)
    here, there = masks.intersect(shape.box, box)
    canvas[there] = shape.pixels[here]
    return canvas


def enclose_boxes(boxes: Iterable[Box], *, margin_px: int, size: Size) -> Box:
    """The box around some boxes and a margin, within an image of size (H, W)."""
    x0, y0, x1, y1 = zip(*boxes, strict=True)
    return (
        max(0, min(x0) - margin_px),
        max(0, min(y0) - margin_px),
        min(size[1], max(x1) + margin_px),
        min(size[0], max(y1) + margin_px),
    )


def measure_overlaps(truth: Mask, others: Iterable[Mask], *, boundary_ratio: float) -> list[Overlap]:
    """IoU and boundary IoU of some masks, bool (H, W), with one ground truth mask.

    IoU is |P & G| / |P | G|. Boundary IoU is the same for the bands along the inside of the boundaries (Cheng et al.
    2021), `boundary_ratio` of the image diagonal wide but at least 1 px. Two empty masks get 1 for both, which is the
    convention of DAVIS.
    """
    band_px = masks.boundary_width((truth.shape[0], truth.shape[1]), boundary_ratio)
    reference = make_shape(truth, (0, 0), band_px=band_px)
    return [count_common(reference, make_shape(other, (0, 0), band_px=band_px)).overlap for other in others]
