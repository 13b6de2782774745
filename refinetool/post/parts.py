"""Undoes doubtful parts: where the model changed the coarse mask for no good reason, the coarse mask is kept.

A refined mask can be better as a whole and worse in places. The model's logits can't resolve outlines finer than their
grid, and where they are unsure, the coarse outline is right more often than they say.
"""

from dataclasses import replace

import cv2
import numpy as np

from refinetool.masks import bounding_box, chances, framed
from refinetool.records import FloatMap, Mask, Proposal
from refinetool.settings import GuardThresholds

NEAR = np.ones((3, 3), np.uint8)


def undo_doubtful_parts(proposal: Proposal, *, thresholds: GuardThresholds) -> Proposal:
    """Undo the doubtful parts of a proposal, see `without_doubtful_parts`. Without logits there are none."""
    if proposal.logits is None:
        return proposal
    mask = without_doubtful_parts(
        proposal.mask,
        proposal.coarse,
        proposal.logits,
        min_confidence=thresholds.min_part_confidence,
        min_depth=thresholds.min_part_depth,
    )
    return replace(proposal, mask=mask)


def without_doubtful_parts(
    mask: Mask, coarse: Mask, logits: FloatMap, *, min_confidence: float, min_depth: float
) -> Mask:
    """Give a mask the pixels of the coarse mask in its doubtful parts.

    A part is a 4-connected set of pixels in which the masks differ. It is doubtful if the mask is right there with a
    mean probability of less than `min_confidence`, or if it lies at the mask's outline and none of its pixels is
    `min_depth` cells from its outside. Away from the outline, a shallow part is a filled hole or a removed island.

    Args:
        mask, coarse: bool (H, W).
        logits: float32 (h, w) over the same frame; where they are above 0, the model sees the object.
        min_confidence: Probability, 0..1.
        min_depth: In cells of the logits' grid, the longer side of a cell where they are not square.

    Returns:
        bool (H, W).
    """
    changed = mask ^ coarse
    box = bounding_box(changed)
    if box is None:
        return mask
    x0, y0, x1, y1 = box
    crop = slice(y0, y1), slice(x0, x1)
    pixels = changed[crop]
    count, found = cv2.connectedComponents(pixels.view(np.uint8), connectivity=4)
    labels = np.asarray(found, dtype=np.intp)
    to_outside = cv2.distanceTransform(framed(pixels).view(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[1:-1, 1:-1]
    chance = chances(logits, mask.shape)
    right = np.where(mask, chance, 1 - chance)[crop]
    outline = cv2.dilate(mask.view(np.uint8), NEAR) != cv2.erode(mask.view(np.uint8), NEAR)

    part = labels[pixels]  # 1 to count - 1; 0 is where the masks agree
    area = np.bincount(part, minlength=count)
    confidence = np.bincount(part, right[pixels], minlength=count) / np.maximum(area, 1)
    depth = np.zeros(count, np.float32)
    np.maximum.at(depth, part, to_outside[pixels].astype(np.float32))
    cell = max(side / cells for side, cells in zip(mask.shape, logits.shape, strict=True))
    at_outline = np.bincount(part, outline[crop][pixels], minlength=count) > 0
    doubtful = (confidence < min_confidence) | (at_outline & (depth < min_depth * cell))
    doubtful[0] = False
    kept = mask.copy()
    kept[crop] ^= doubtful[labels]
    return kept
