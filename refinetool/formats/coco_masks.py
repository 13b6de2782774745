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


@dataclass(frozen=True, slots=True)
class Decoded:
    """The mask of a record, None if there is none; the reason to leave the record alone, if there is one; and what is
    wrong with it, in words that follow the name of the record, such as `its run lengths don't add up`.
    """

    mask: Rle | None
    keep: Reason | None = None
    fault: str | None = None

    def fault_of(self, record: str) -> str | None:
        """Return the fault as a sentence about a record that is named like this; None if there is none."""
        return None if self.fault is None else str(MaskError(f"{record}: {self.fault}."))


def read_segmentation(segmentation: Json, size: Size, *, max_pixels: int) -> tuple[Rle | None, Reason | None]:
    """Return the mask of a record and the reason to leave the record alone; see `decode_segmentation`."""
    decoded = decode_segmentation(segmentation, size, max_pixels=max_pixels)
    return decoded.mask, decoded.keep


def decode_segmentation(segmentation: Json, size: Size, *, max_pixels: int) -> Decoded:
    """Return the mask of a record, or why there is none.

    Args:
        segmentation: A list of rings [x0, y0, x1, y1 ...], RLE as a list, or RLE as a string.
        size: (H, W) of the record's image. Rings are rasterised at this size as in pycocotools, which fills holes.
        max_pixels: Masks of images that claim more pixels are not decoded.
    """
    if not segmentation:
        return Decoded(None, Reason.EMPTY)
    if math.prod(size) > max_pixels:
        return Decoded(None, Reason.IMAGE_TOO_LARGE)
    if isinstance(segmentation, dict) and segmentation.get("size") != list(size):
        found = f"{segmentation.get('size')!r:.40}"
        fault = f"its run lengths are of the size {found}, its image of {list(size)} (height, width)"
        return Decoded(None, Reason.SIZE_MISMATCH, fault)
    try:
        rle = _rle(segmentation, size)
    except MaskError as error:
        return Decoded(None, Reason.UNREADABLE_MASK, str(error).removesuffix("."))
    except (ValueError, TypeError, OverflowError):
        fault = "its segmentation holds something other than numbers; expected rings or run lengths"
        return Decoded(None, Reason.UNREADABLE_MASK, fault)
    return Decoded(rle, None if masks.area(rle) else Reason.EMPTY)


def _rle(segmentation: Json, size: Size) -> Rle:
    if isinstance(segmentation, list):
        return _from_rings(segmentation, size)
    if isinstance(segmentation, dict):
        return _from_counts(segmentation.get("counts"), size)
    raise MaskError(f"its segmentation is {segmentation!r:.40}; expected rings or run lengths")


def _from_rings(segmentation: list[Json], size: Size) -> Rle:
    found: list[list[float]] = [ring for ring in segmentation if _is_ring(ring)]  # type: ignore[misc]
    if not found:
        raise MaskError(f"none of its rings has {_MIN_RING // 2} corners, so they cover nothing")
    numbers = np.array([number for ring in found for number in ring], dtype=np.float64)
    # pycocotools iterates along every edge, so it crashes on corners far outside the image.
    reach = max(size)
    if not np.isfinite(numbers).all():
        raise MaskError("a corner of its rings is not a finite number")
    if numbers.min() < -reach or numbers.max() > 2 * reach:
        farthest = numbers.min() if numbers.min() < -reach else numbers.max()
        raise MaskError(f"a corner of its rings is at {farthest:g}, far outside the image of {_shown(size)} pixels")
    if sum(_outline_length(ring) for ring in found) > _LONGEST_OUTLINE:
        raise MaskError(f"its outline is longer than the {_LONGEST_OUTLINE:,} pixels that can be drawn")
    height, width = size
    merged = coco_mask.merge(coco_mask.frPyObjects(found, height, width))
    return Rle(size, merged["counts"])


def _shown(size: Size) -> str:
    return f"{size[1]:,} x {size[0]:,}"


def _is_ring(ring: Json) -> bool:
    if not isinstance(ring, list):
        raise MaskError(f"one of its rings is {ring!r:.40}; expected a list x, y, x, y ...")
    if len(ring) % 2:
        raise MaskError(f"one of its rings has {len(ring)} numbers; expected an even number: x, y, x, y ...")
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
    if runs.ndim != 1 or runs.dtype.kind != "i" or runs.min() < 0:
        raise MaskError(f"its counts are {counts!r:.40}; expected a text, or a list of whole numbers from 0")
    if runs.sum() != math.prod(size):
        raise MaskError(f"its run lengths add up to {runs.sum()}, its image has {math.prod(size)} pixels")
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
