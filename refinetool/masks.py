"""Functions on binary masks: RLE, boxes, overlap, boundaries, distances, components and outlines.

A mask is bool (H, W). Boxes are half-open xyxy, so `mask[y0:y1, x0:x1]` is the box. No function modifies its input.
Where possible, computations use only the mask's box, because masks are small compared with images.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from refinetool.errors import MaskError
from refinetool.records import Box, FloatArray, IntArray, Mask, Rle, Size

# --- run lengths


def encode(mask: Mask) -> Rle:
    """Encode a mask, bool (H, W), as RLE."""
    runs = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return Rle(size=(mask.shape[0], mask.shape[1]), counts=runs["counts"])


def decode(rle: Rle) -> Mask:
    """Decode RLE to a mask, bool (H, W). Raises the errors of `run_lengths`."""
    mask = np.zeros(rle.size, dtype=np.bool_)
    found = decode_crop(rle)
    if found is not None:
        crop, (x0, y0, x1, y1) = found
        mask[y0:y1, x0:x1] = crop
    return mask


def decode_crop(rle: Rle) -> tuple[Mask, Box] | None:
    """Decode RLE to the mask within its tight box, bool (y1 - y0, x1 - x0), and that box; None for an empty mask.

    Fills only the columns of the box, which is fast for objects that are small compared with their image.
    """
    height = rle.size[0]
    runs = run_lengths(rle)
    ends = np.cumsum(runs)
    lit = np.flatnonzero(runs[1::2])
    if lit.size == 0:
        return None
    first, last = ends[2 * lit[0]], ends[2 * lit[-1] + 1] - 1
    x0, x1 = int(first // height), int(last // height) + 1
    edges = np.minimum(np.maximum(np.append(0, ends), x0 * height), x1 * height)
    strip = np.repeat(np.arange(len(runs)) % 2 == 1, edges[1:] - edges[:-1]).reshape(x1 - x0, height)
    rows = np.flatnonzero(strip.any(axis=0))
    y0, y1 = int(rows[0]), int(rows[-1]) + 1
    return np.ascontiguousarray(strip[:, y0:y1].T), (x0, y0, x1, y1)


def run_lengths(rle: Rle) -> IntArray:
    """Decompress RLE to run lengths, int64 (R,): background, mask, background ... in column order.

    Each number is stored as base 32 digits, lowest first, one per character: 5 bits and a sixth for "more follows"; the
    highest bit of the last digit is the sign. From the fourth number on, the difference to the number two before is
    stored.

    Raises:
        MaskError: The characters are not such numbers, or the runs don't add up to the size.
    """
    digits = np.frombuffer(rle.counts, dtype=np.uint8).astype(np.int64) - 48
    if digits.size and (digits.min() < 0 or digits.max() > 63 or digits[-1] & 32):
        raise MaskError(f"the run lengths {_shortened(rle.counts)} are not in COCO's compressed form.")
    last = np.flatnonzero(digits & 32 == 0)
    first = np.concatenate([np.zeros(min(1, last.size), dtype=np.int64), last[:-1] + 1])
    place = np.arange(digits.size) - np.repeat(first, last - first + 1)
    if place.size and place.max() > _MAX_DIGITS:
        raise MaskError(f"the run lengths {_shortened(rle.counts)} contain a number with too many digits.")
    runs = np.add.reduceat((digits & 31) << (5 * place), first) if first.size else np.zeros(0, dtype=np.int64)
    runs -= np.where(digits[last] & 16, 1 << (5 * (last - first + 1)), 0)
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    height, width = rle.size
    if (runs < 0).any() or runs.sum() != height * width:
        raise MaskError(
            f"the run lengths {_shortened(rle.counts)} cover {runs.sum()} pixels, the size {height} x {width} has "
            f"{height * width}."
        )
    return runs


_MAX_DIGITS = 7
"""Longest position of a digit: eight digits of five bits hold more than the pixels of any image."""


def _shortened(counts: bytes) -> str:
    text = counts[:24].decode("ascii", errors="replace")
    return f"'{text}...'" if len(counts) > 24 else f"'{text}'"


def area(rle: Rle) -> int:
    """Count the mask pixels, without decoding."""
    return int(coco_mask.area(_as_coco(rle)))


def union(rles: Sequence[Rle]) -> Rle:
    """Return the union of at least one mask, all of one size."""
    runs = coco_mask.merge([_as_coco(rle) for rle in rles])
    return Rle(size=rles[0].size, counts=runs["counts"])


def _as_coco(rle: Rle) -> dict[str, Any]:
    return {"size": list(rle.size), "counts": rle.counts}


# --- boxes and overlap


def bounding_box(mask: Mask) -> Box | None:
    """Return the tight box (x0, y0, x1, y1), half-open; None for an empty mask."""
    rows = np.flatnonzero(mask.any(axis=1))
    if rows.size == 0:
        return None
    y0, y1 = int(rows[0]), int(rows[-1]) + 1
    columns = np.flatnonzero(mask[y0:y1].any(axis=0))
    return int(columns[0]), y0, int(columns[-1]) + 1, y1


def tight_box(mask: Mask) -> Box:
    """Return the smallest box, half-open, around a non-empty mask, bool (H, W)."""
    box = bounding_box(mask)
    assert box is not None, "empty masks must be left out before prompts are mined"
    return box


def intersect(a: Box, b: Box) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """Return the intersection of two boxes as (rows, columns) within each of them; empty if they don't meet."""
    x0, y0 = max(a[0], b[0]), max(a[1], b[1])
    x1, y1 = max(x0, min(a[2], b[2])), max(y0, min(a[3], b[3]))
    return (
        (slice(y0 - a[1], y1 - a[1]), slice(x0 - a[0], x1 - a[0])),
        (slice(y0 - b[1], y1 - b[1]), slice(x0 - b[0], x1 - b[0])),
    )


def paste(crop: Mask, box: Box, *, size: Size) -> Mask:
    """Return the mask of an image of `size`, bool (H, W): the crop within its half-open xyxy box, else background."""
    x0, y0, x1, y1 = box
    mask = np.zeros(size, dtype=np.bool_)
    mask[y0:y1, x0:x1] = crop
    return mask


def iou(a: Mask, b: Mask) -> float:
    """Compute the intersection over union in 0..1; two empty masks count as equal (1.0, as in DAVIS)."""
    either = int(np.count_nonzero(a | b))
    return int(np.count_nonzero(a & b)) / either if either else 1.0


# --- logits


def spread(logits: FloatArray, shape: tuple[int, ...]) -> FloatArray:
    """Resize logits (h, w) bilinearly to an image of the given shape: float32 (H, W)."""
    height, width = shape
    fine: FloatArray = np.asarray(cv2.resize(logits, (width, height), interpolation=cv2.INTER_LINEAR), np.float32)
    return fine


def chances(logits: FloatArray, shape: tuple[int, ...]) -> FloatArray:
    """Turn logits (h, w) into the probability of each pixel of an image of the given shape: float32 (H, W)."""
    bounded = np.maximum(spread(logits, shape), -80)  # the exponential overflows from 88 on
    likely: FloatArray = np.asarray(1 / (1 + np.exp(-bounded)), np.float32)
    return likely


# --- boundaries


def disc_radius(mask: Mask) -> float:
    """Return the radius in pixels of a disc of the mask's area, to which lengths are relative."""
    return math.sqrt(np.count_nonzero(mask) / math.pi)


def boundary_width(size: Size, ratio: float) -> int:
    """Return the width in pixels of the boundary band of an image (H, W): `ratio` of its diagonal, at least 1."""
    return max(1, round(ratio * math.hypot(*size)))


def boundary(mask: Mask, width_px: int) -> Mask:
    """Return the inner boundary band, bool (H, W): mask pixels within `width_px` (chessboard) of a pixel outside it.

    The image border counts as boundary, as in the boundary IoU of Cheng et al. 2021.
    """
    band = np.zeros(mask.shape, dtype=np.bool_)
    box = bounding_box(mask)
    if box is None:
        return band
    x0, y0, x1, y1 = box
    inside = np.ascontiguousarray(mask[y0:y1, x0:x1])
    # Outside its box a mask is background, so eroding the crop with zeros around it is exact.
    kernel = np.ones((3, 3), dtype=np.uint8)
    eroded = cv2.erode(
        inside.view(np.uint8), kernel, iterations=width_px, borderType=cv2.BORDER_CONSTANT, borderValue=(0,)
    )
    band[y0:y1, x0:x1] = inside & (eroded == 0)
    return band


def boundary_iou(a: Mask, b: Mask, ratio: float) -> float:
    """Compute the IoU of inner boundary bands whose width is `ratio` of the diagonal; two empty masks give 1.0."""
    width_px = boundary_width((a.shape[0], a.shape[1]), ratio)
    return iou(boundary(a, width_px), boundary(b, width_px))


# --- distances


def distance_inside(mask: Mask, border_is_background: bool) -> FloatArray:
    """Compute the depth of each pixel in the mask.

    Args:
        mask: bool (H, W).
        border_is_background: Whether pixels beyond the image border count as background.

    Returns:
        float32 (H, W): exact Euclidean distance in pixels, centre to centre, to the nearest pixel outside the mask;
        0 outside the mask. For a mask that fills the image there is no background inside the image, so the distance is
        that to the first pixel beyond the image border, whatever `border_is_background` is.
    """
    depth = np.zeros(mask.shape, dtype=np.float32)
    box = bounding_box(mask)
    if box is None:
        return depth
    x0, y0, x1, y1 = box
    inside = mask[y0:y1, x0:x1]
    # The background nearest to a mask pixel is in the box or in the ring of pixels around it, so the crop gives exact
    # distances, provided that no ring is added where the box touches the image border.
    height, width = mask.shape
    ring = np.array([[y0 > 0, y1 < height], [x0 > 0, x1 < width]])
    if border_is_background or not (ring.any() or not inside.all()):
        ring[:] = True
    padded = np.pad(inside, ring.astype(np.intp)).view(np.uint8)
    distance = cv2.distanceTransform(padded, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    # OpenCV's last bits vary from call to call, which would break ties at random. Squared distances are whole numbers.
    distance = np.sqrt(np.rint(distance * distance))
    top, left = int(ring[0, 0]), int(ring[1, 0])
    depth[y0:y1, x0:x1] = distance[top : top + y1 - y0, left : left + x1 - x0]
    return depth


# --- components and holes


@dataclass(frozen=True, slots=True)
class Components:
    """The R connected components (8-connectivity) of a mask, in row-major order of their first pixel.

    labels: int32 (H, W), 0 background, r + 1 for component r.
    boxes: int64 (R, 4), half-open xyxy.
    areas: int64 (R,), pixels.
    """

    labels: NDArray[np.int32]
    boxes: IntArray
    areas: IntArray

    def __len__(self) -> int:
        return len(self.areas)

    def crop(self, part: int) -> Mask:
        """Return the mask of one component within its box, bool (y1 - y0, x1 - x0)."""
        x0, y0, x1, y1 = self.boxes[part]
        return np.equal(self.labels[y0:y1, x0:x1], part + 1)


_EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=np.int8)


def components(mask: Mask) -> Components:
    """Find the connected components of a mask, with boxes and areas, without making an array per component."""
    from scipy import ndimage  # half a second that masks of single objects need not wait for

    labels, count = ndimage.label(mask, structure=_EIGHT_NEIGHBOURS, output=np.int32)
    slices = ndimage.find_objects(labels, max_label=count)
    boxes = np.array([(x.start, y.start, x.stop, y.stop) for y, x in slices], dtype=np.int64).reshape(count, 4)
    areas = np.bincount(labels.ravel(), minlength=count + 1)[1:].astype(np.int64)
    return Components(labels=labels, boxes=boxes, areas=areas)


def has_holes(mask: Mask) -> bool:
    """Whether the mask encloses some background (8-connectivity for the background).

    Exactly the masks without holes can be represented by the rings of `outline`, because COCO's readers fill a second
    ring instead of cutting it out.
    """
    box = bounding_box(mask)
    if box is None:
        return False
    x0, y0, x1, y1 = box
    labels, _ = _background(mask[y0:y1, x0:x1])
    return labels > 2  # the mask is label 0, the background around it label 1


def dilated(mask: Mask, *, radius_px: int) -> Mask:
    """Return the mask grown by a disc of 2 radius + 1 pixels across, bool (H, W)."""
    return cv2.dilate(mask.view(np.uint8), _disc(radius_px)).view(np.bool_)


def eroded(mask: Mask, *, radius_px: int) -> Mask:
    """Return the mask shrunk by such a disc, bool (H, W); what lies beyond the frame does not shrink it."""
    return cv2.erode(mask.view(np.uint8), _disc(radius_px)).view(np.bool_)


@functools.cache
def _disc(radius_px: int) -> NDArray[np.uint8]:
    return np.asarray(cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * radius_px + 1,) * 2), np.uint8)


def fill_holes(mask: Mask) -> Mask:
    """Return the mask with the background that it encloses (see `has_holes`), bool (H, W)."""
    _, labels = _background(mask)
    filled: Mask = labels[1:-1, 1:-1] != labels[0, 0]
    return filled


def _background(mask: Mask) -> tuple[int, NDArray[np.int32]]:
    """Label the background, 8-connected, of the mask with a ring of background around it."""
    outside = ~framed(mask)
    labels, found = cv2.connectedComponents(outside.view(np.uint8), connectivity=8)
    return labels, np.asarray(found, dtype=np.int32)


def framed(mask: Mask) -> Mask:
    """Return the mask with a ring of background around it, bool (H + 2, W + 2)."""
    framed = np.zeros((mask.shape[0] + 2, mask.shape[1] + 2), dtype=np.bool_)
    framed[1:-1, 1:-1] = mask
    return framed


# --- outlines


def outline(mask: Mask) -> list[IntArray]:
    """Trace the outline of a mask along the edges of its pixels.

    Returns:
        One ring per 4-connected component and per hole: int64 (P, 2) corners (x, y), 0..W and 0..H, P >= 4. Each corner
        is a turn by 90 degrees; rings are closed implicitly. The mask is on the right hand side along a ring
        (components clockwise, holes counter-clockwise on the screen). Components that touch at a corner have separate
        rings, so rings never cross. If the mask has no holes, pycocotools rasterises the rings to exactly the mask.

    Each corner of the outline is an end of one horizontal and one vertical edge. In a row of corners, horizontal edges
    join the first with the second, the third with the fourth, and so on; the same holds for vertical edges in a column.
    Following these edges alternately gives the rings as cycles.
    """
    box = bounding_box(mask)
    if box is None:
        return []
    x0, y0, x1, y1 = box
    padded = framed(mask[y0:y1, x0:x1])
    top_left, top_right, bottom_left, bottom_right = padded[:-1, :-1], padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    edge_left, edge_right, edge_up = top_left != bottom_left, top_right != bottom_right, top_left != top_right
    turn_y, turn_x = _where(edge_left != edge_right)
    touch_y, touch_x = _where(edge_left & edge_right & edge_up)  # two pixels touch at a corner: one turn for each

    # At a touching corner, the left edge joins the upper edge if the top-left pixel is in the mask.
    falling = top_left[touch_y, touch_x]
    ys = np.concatenate([turn_y, touch_y, touch_y])
    xs = np.concatenate([turn_x, touch_x, touch_x])
    to_right = np.concatenate([edge_right[turn_y, turn_x], np.zeros_like(falling), np.ones_like(falling)])
    to_bottom = np.concatenate([~edge_up[turn_y, turn_x], ~falling, falling])

    across = _joined(np.lexsort((to_right, xs, ys)))
    along = _joined(np.lexsort((to_bottom, ys, xs)))
    corners = np.stack([xs + x0, ys + y0], axis=1).astype(np.int64)
    starts = np.flatnonzero(to_right & bottom_right[ys, xs])
    return [corners[ring] for ring in _cycles(across, along, starts.tolist())]


def _where(flags: Mask) -> tuple[IntArray, IntArray]:
    """Return (y, x) of the true pixels; a 2-D `np.nonzero` takes ten times as long."""
    y, x = np.divmod(np.flatnonzero(flags), flags.shape[1])
    return y, x


def _joined(order: IntArray) -> list[int]:
    """Return the partner of each corner when sorted corners are joined in pairs."""
    partner = np.empty_like(order)
    partner[order[0::2]], partner[order[1::2]] = order[1::2], order[0::2]
    joined: list[int] = partner.tolist()
    return joined


def _cycles(across: list[int], along: list[int], starts: list[int]) -> list[list[int]]:
    seen = [False] * len(across)
    rings = []
    for start in starts:
        ring = []
        corner = start
        while not seen[corner]:
            other = across[corner]
            seen[corner] = seen[other] = True
            ring += [corner, other]
            corner = along[other]
        if ring:
            rings.append(ring)
    return rings


# --- arrays from users


def as_bool(array: NDArray[Any], source: str) -> Mask:
    """Convert a mask from a user to bool (H, W).

    Args:
        array: (H, W) of any type that holds only 0 and 1, or only 0 and 255.
        source: Name of the array in errors, such as a file and a record.

    Raises:
        MaskError: The array is not 2-D, or holds other values. Probabilities and logits must be thresholded by the
            caller, who knows the threshold.
    """
    if array.ndim != 2:
        raise MaskError(f"{source}: the mask has shape {array.shape}; expected (H, W).")
    if array.dtype == np.bool_:
        return np.asarray(array)
    if not (np.issubdtype(array.dtype, np.number)) or np.issubdtype(array.dtype, np.complexfloating):
        raise MaskError(f"{source}: the mask has values of type {array.dtype}; expected bool, 0/1 or 0/255.")
    if not np.isfinite(array).all():
        raise MaskError(f"{source}: the mask contains NaN or infinite values; expected bool, 0/1 or 0/255.")
    high = array.max(initial=0)
    if high not in (0, 1, 255) or not ((array == 0) | (array == high)).all():
        strange = array[(array != 0) & (array != 1) & (array != 255)]
        found = f"the value {strange[0]:g}" if strange.size else "both 1 and 255"
        raise MaskError(
            f"{source}: the mask contains {found}; expected bool, 0/1 or 0/255. Threshold probabilities first."
        )
    return np.asarray(array != 0)
