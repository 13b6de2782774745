"""Converts the value of `segmentation` in a COCO record to RLE, and back to its original form."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from pycocotools import mask as coco_mask

from refinetool import masks
from refinetool.errors import MaskError
from refinetool.formats import rings
from refinetool.formats.json_spans import Json
from refinetool.records import Mask, Point, Rle, Size
from refinetool.settings import PolygonSettings
from refinetool.statuses import Reason

_MIN_RING = 6
"""Numbers in a ring of three corners; shorter rings are points and lines, which cover nothing."""


_LONGEST_OUTLINE = 10_000_000
"""Pixels along all edges of a record. pycocotools takes 40 bytes for each, and crashes when it gets none."""


def read_segmentation(segmentation: Json, size: Size, *, max_pixels: int) -> tuple[Rle | None, Reason | None]:
    """Return the mask of a record, and the reason to leave the record alone, if there is one.

    Args:
        segmentation: A list of rings [x0, y0, x1, y1 ...], RLE as a list, or RLE as a string.
        size: (H, W) of the record's image. Rings are rasterised at this size as in pycocotools, which fills holes.
        max_pixels: Masks of images that claim more pixels are not decoded.
    """
    if not segmentation:
        return None, Reason.EMPTY
    if math.prod(size) > max_pixels:
        return None, Reason.IMAGE_TOO_LARGE
    try:
        if isinstance(segmentation, list):
            rle = _from_rings(segmentation, size)
        elif isinstance(segmentation, dict):
            if segmentation.get("size") != list(size):
                return None, Reason.SIZE_MISMATCH
            rle = _from_counts(segmentation.get("counts"), size)
        else:
            return None, Reason.UNREADABLE_MASK
    except (MaskError, ValueError, TypeError, OverflowError):
        return None, Reason.UNREADABLE_MASK
    return rle, None if masks.area(rle) else Reason.EMPTY


def _from_rings(segmentation: list[Json], size: Size) -> Rle:
    found: list[list[float]] = [ring for ring in segmentation if _is_ring(ring)]  # type: ignore[misc]
    numbers = np.array([number for ring in found for number in ring], dtype=np.float64)
    # pycocotools iterates along every edge, so it crashes on corners far outside the image.
    reach = max(size)
    if not found or not np.isfinite(numbers).all() or numbers.min() < -reach or numbers.max() > 2 * reach:
        raise MaskError("no ring that can be drawn")
    if sum(_outline_length(ring) for ring in found) > _LONGEST_OUTLINE:
        raise MaskError("an outline so long that it can't be drawn")
    height, width = size
    merged = coco_mask.merge(coco_mask.frPyObjects(found, height, width))
    return Rle(size, merged["counts"])


def _is_ring(ring: Json) -> bool:
    if not isinstance(ring, list) or len(ring) % 2:
        raise MaskError("a ring is not a list of x and y")
    return len(ring) >= _MIN_RING


def _outline_length(ring: list[float]) -> float:
    """Return the number of pixels along the edges of a closed ring."""
    corners = np.array(ring, dtype=np.float64).reshape(-1, 2)
    return float(np.abs(corners - np.roll(corners, 1, axis=0)).max(axis=1).sum())


def _from_counts(counts: Json, size: Size) -> Rle:
    height, width = size
    if isinstance(counts, str):
        rle = Rle(size, counts.encode("ascii"))
        masks.run_lengths(rle)
        return rle
    runs = np.array(counts)
    if runs.ndim != 1 or runs.dtype.kind != "i" or runs.min() < 0 or runs.sum() != math.prod(size):
        raise MaskError("run lengths that don't add up to the image")
    return Rle(size, coco_mask.frPyObjects({"size": list(size), "counts": counts}, height, width)["counts"])


@dataclass(frozen=True, slots=True)
class Redrawn:
    """New values of a record, and how its mask is written.

    values: `segmentation`, `area` and `bbox`.
    became_rle: Whether a polygon became RLE, because the mask has holes.
    filled: Whether holes of the mask were filled.
    drawn_iou: IoU of what a polygon draws with the mask, whose holes may have been filled; None for RLE.
    """

    values: Mapping[str, Json]
    became_rle: bool = False
    filled: bool = False
    drawn_iou: float | None = None


def redraw(segmentation: Json, rle: Rle, *, polygons: PolygonSettings) -> Redrawn | None:
    """Return new `segmentation`, `area` and `bbox` for a record; None for an empty mask, which no reader accepts.

    The segmentation keeps its form. RLE as a list stays a list, as a string a string, and other keys beside it stay
    too. Rings become rings, by default along pixel edges, whose rasterisation is exactly the mask; see `rings`. A mask
    with holes that they can't represent becomes RLE as a string. `area` is the number of pixels, `bbox` the tight
    x, y, width, height.
    """
    found = masks.decode_crop(rle)
    if found is None:
        return None
    crop, (x0, y0, _, _) = found
    if isinstance(segmentation, dict):
        as_list = isinstance(segmentation.get("counts"), list)
        counts: Json = masks.run_lengths(rle).tolist() if as_list else rle.counts.decode("ascii")
        return Redrawn(_values({**segmentation, "counts": counts}, crop, (x0, y0)))
    drawing = rings.draw(crop, settings=polygons)
    if drawing is None:
        plain: Json = {"size": list(rle.size), "counts": rle.counts.decode("ascii")}
        return Redrawn(_values(plain, crop, (x0, y0)), became_rle=True)
    polygon: Json = [_numbers(np.add(ring, (x0, y0))) for ring in drawing.rings]
    return Redrawn(
        _values(polygon, drawing.drawn, (x0, y0)),
        filled=drawing.filled,
        drawn_iou=masks.iou(drawing.drawn, masks.fill_holes(crop) if drawing.filled else crop),
    )


def redraw_as_one(rle: Rle, *, polygons: PolygonSettings) -> tuple[rings.Ring, Redrawn]:
    """Return a non-empty mask as a single ring, for formats that have nothing else; see `rings.draw_as_one`."""
    found = masks.decode_crop(rle)
    assert found is not None, "an empty mask has no ring"
    crop, (x0, y0, _, _) = found
    drawing = rings.draw_as_one(crop, settings=polygons)
    (ring,) = drawing.rings
    overlap = masks.iou(drawing.drawn, masks.fill_holes(crop) if drawing.filled else crop)
    return np.add(ring, (x0, y0)), Redrawn({}, filled=drawing.filled, drawn_iou=overlap)


def _values(segmentation: Json, crop: Mask, corner: Point) -> dict[str, Json]:
    x0, y0, x1, y1 = masks.tight_box(crop)
    box: Json = [corner[0] + x0, corner[1] + y0, x1 - x0, y1 - y0]
    return {"segmentation": segmentation, "area": int(np.count_nonzero(crop)), "bbox": box}


def _numbers(ring: rings.Ring) -> list[Json]:
    """Return x, y, x, y ..., whole numbers without a decimal point."""
    return [int(number) if number.is_integer() else number for number in ring.ravel().astype(np.float64).tolist()]


@dataclass(slots=True)
class PolygonCount:
    """Counts how polygons were written, for the remarks about an output."""

    polygons: int = 0
    became_rle: int = 0
    filled: int = 0
    changed: int = 0
    overlap: float = 0.0

    def add(self, redrawn: Redrawn) -> None:
        self.became_rle += redrawn.became_rle
        self.filled += redrawn.filled
        if redrawn.drawn_iou is not None:
            self.polygons += 1
            self.changed += redrawn.drawn_iou < 1
            self.overlap += redrawn.drawn_iou

    def remarks(self) -> tuple[str, ...]:
        lines = []
        if self.became_rle:
            lines.append(f"Polygons that became run lengths, because their new masks have holes: {self.became_rle}.")
        if self.filled:
            lines.append(f"Polygons whose new masks had holes, which are filled: {self.filled}.")
        if self.changed:
            lines.append(
                f"Polygons that differ from their masks, to have fewer corners: {self.changed} of {self.polygons}; "
                f"mean IoU of all {self.overlap / self.polygons:.4f}."
            )
        return tuple(lines)
