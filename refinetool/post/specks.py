"""Removes specks: small islands and holes of a proposed mask that its coarse mask did not have.

The model's logits cross zero away from the border where textures confuse it, and snapping can cut specks off a border.
Objects rarely have pieces of a few pixels, and one pinhole is enough to make a polygon impossible.
"""

from dataclasses import replace
from typing import TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray

from refinetool.masks import bounding_box, framed
from refinetool.records import BoolArray, IntArray, Mask, Proposal
from refinetool.settings import SpeckSettings

Labels: TypeAlias = NDArray[np.int32]
"""int32 (H, W): the number of each pixel's piece."""


def remove_specks(proposal: Proposal, *, settings: SpeckSettings) -> Proposal:
    """Remove the specks of a proposed mask."""
    cleaned = without_specks(proposal.mask, proposal.coarse, max_px=settings.max_px, max_share=settings.max_share)
    return replace(proposal, mask=cleaned)


def without_specks(mask: Mask, coarse: Mask, *, max_px: float, max_share: float) -> Mask:
    """Drop islands and fill holes (both 8-connected) that are small and new.

    A piece is small if it has at most max(max_px, max_share * area of the mask) pixels. It is new unless it is the
    largest piece that overlaps some island, or hole, of the coarse mask: that one stays, whatever its size.

    Args:
        mask: bool (H, W).
        coarse: bool (H, W), same frame.

    Returns:
        bool (H, W).
    """
    limit = max(max_px, max_share * np.count_nonzero(mask))
    box = bounding_box(mask)
    if box is None or limit < 1:
        return mask
    x0, y0, x1, y1 = box
    crop = slice(y0, y1), slice(x0, x1)
    # With a ring of background around both, the background outside is one piece, which holds the first pixel.
    inside = _without_small(framed(mask[crop]), framed(coarse[crop]), limit=limit)
    filled = ~_without_small(~inside, ~framed(coarse[crop]), limit=limit)
    if (filled[1:-1, 1:-1] == mask[crop]).all():
        return mask
    cleaned = mask.copy()
    cleaned[crop] = filled[1:-1, 1:-1]
    return cleaned


def _without_small(pixels: Mask, before: Mask, *, limit: float) -> Mask:
    """Drop the pieces of a set of pixels that are small and new, compared with the pieces of another set."""
    count, labels, areas = _pieces(pixels)
    kept: BoolArray = areas > limit
    kept[labels[0, 0]] = True  # the background outside, which is no hole; or all that is in no piece
    kept[0] = False
    if kept.sum() == count - 1:
        return pixels
    kept[_heirs(labels, areas, _pieces(before)[1])] = True
    kept[0] = False
    remaining: Mask = kept[labels]
    return remaining


def _pieces(pixels: Mask) -> tuple[int, Labels, IntArray]:
    """Return the number of pieces and 1, the label of each pixel (0 for pixels outside), and the area of each label."""
    count, labels = cv2.connectedComponents(pixels.view(np.uint8), connectivity=8)
    found = np.asarray(labels, dtype=np.int32)
    return count, found, np.bincount(found.ravel(), minlength=count).astype(np.int64)


def _heirs(labels: Labels, areas: IntArray, before: Labels) -> IntArray:
    """Return, for each piece of `before` that overlaps any piece, the label of the largest one, or of several.

    What holds the first pixel is the background outside, and takes no part: it is no hole.
    """
    both = (labels > 0) & (before > 0) & (labels != labels[0, 0]) & (before != before[0, 0])
    old, new = np.unique(np.stack((before[both], labels[both])), axis=1)
    largest = np.zeros(int(before.max()) + 1, dtype=np.int64)
    np.maximum.at(largest, old, areas[new])
    return np.asarray(new[areas[new] == largest[old]], dtype=np.int64)
