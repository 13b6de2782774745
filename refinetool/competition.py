"""Lets the objects of an image compete for pixels.

Each mask is predicted by itself, so where objects touch, several may claim the same pixels, although a pixel rarely
belongs to two objects. If it never did, and the predictions were otherwise independent, the odds of a pixel would be
those of the model times the probability that the pixel is not in the other mask:

    log odds + weight * log(1 - p of the other mask), summed over all rivals

With two objects and a weight of 1 this is exact; with 0 each mask is left as it is. Objects that share most of the
smaller one's coarse mask are no rivals: one of them is probably part of the other, or stands before it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np

from refinetool.candidates import Answer, Job
from refinetool.masks import bounding_box, intersect, spread
from refinetool.records import Box, FloatMap, FloatMaps
from refinetool.regions import Part
from refinetool.settings import CompetitionSettings
from refinetool.views import View

LEAST_CLAIM = 0.02
"""A pixel with a lower probability is not claimed."""
NO_CLAIM = np.float32(-100)
"""A logit that claims nothing."""


@dataclass(frozen=True, slots=True, eq=False)
class Claimed:
    """What one part claims.

    box: Half-open xyxy in the image, around all pixels that it claims.
    denied: float32 (y1 - y0, x1 - x0), log(1 - p) of each pixel, so 0 where it claims nothing.
    """

    part: Part
    box: Box
    denied: FloatMap


def compete(jobs: Sequence[Job], answers: Sequence[Answer], *, settings: CompetitionSettings) -> list[Answer]:
    """Return the answers for the parts of an image with masks and logits lowered where other objects claim pixels.

    Masks only lose pixels. Where no other object claims any, and without logits, they stay as they are.

    Args:
        jobs: All of one image.
        answers: One per job.
        settings: Resolved: the weight is not None.
    """
    weight = settings.weight or 0.0
    if weight == 0:
        return list(answers)
    claimed = [
        claim
        for job, answer in zip(jobs, answers, strict=True)
        if answer.logits is not None
        for part, logits in zip(job.parts, answer.logits, strict=True)
        if (claim := claim_of(part, logits, job.view)) is not None
    ]
    return [
        _contested(job, answer, claimed, weight=weight, max_shared=settings.max_shared)
        for job, answer in zip(jobs, answers, strict=True)
    ]


def claim_of(part: Part, logits: FloatMap, view: View) -> Claimed | None:
    """Return what a part claims by its logits, float32 (h, w) over a view; None if it claims nothing.

    Pixels whose logits are not numbers are not claimed, so that a broken answer does no harm to others.
    """
    numbers = np.where(np.isnan(logits), NO_CLAIM, logits)
    denied: FloatMap = -np.logaddexp(0, spread(numbers, view.size), dtype=np.float32)
    box = bounding_box(denied < math.log1p(-LEAST_CLAIM))
    if box is None:
        return None
    (x0, y0, x1, y1), (left, top, _, _) = box, view.window
    return Claimed(part, (left + x0, top + y0, left + x1, top + y1), denied[y0:y1, x0:x1].copy())


def _contested(job: Job, answer: Answer, claimed: Sequence[Claimed], *, weight: float, max_shared: float) -> Answer:
    if answer.logits is None:
        return answer
    masks, logits = answer.masks.copy(), answer.logits.copy()
    seen = [claim for claim in claimed if _reaches(claim, job.view)]
    for row, part in enumerate(job.parts):
        rivals = [claim for claim in seen if are_rivals(part, claim.part, max_shared=max_shared)]
        if rivals:
            lowered = weight * denied_in(job.view, rivals)
            masks[row] &= spread(answer.logits[row], job.view.size) + lowered > 0
            logits[row] += _on_grid(lowered, logits)
    return replace(answer, masks=masks, logits=logits)


def _reaches(claim: Claimed, view: View) -> bool:
    inside, _ = intersect(claim.box, view.window)
    return claim.denied[inside].size > 0


def are_rivals(one: Part, other: Part, *, max_shared: float) -> bool:
    """Whether two parts compete: not if they are of one region, or share too much of the smaller one's coarse mask."""
    if one.region == other.region:
        return False
    here, there = intersect(one.box, other.box)
    shared = np.count_nonzero(one.mask[here] & other.mask[there])
    if shared == 0:  # most pairs, so their masks need not be counted
        return True
    return bool(shared <= max_shared * min(np.count_nonzero(one.mask), np.count_nonzero(other.mask)))


def denied_in(view: View, rivals: Sequence[Claimed]) -> FloatMap:
    """Sum log(1 - p) over rivals: float32 (H, W) in a view."""
    total = np.zeros(view.size, dtype=np.float32)
    for rival in rivals:
        here, there = intersect(view.window, rival.box)
        total[here] += rival.denied[there]
    return total


def _on_grid(lowered: FloatMap, logits: FloatMaps) -> FloatMap:
    """Resize a map of a view to the grid of its logits, (n, h, w); a cell gets the mean of its pixels."""
    height, width = logits.shape[1:]
    resized = cv2.resize(lowered, (width, height), interpolation=cv2.INTER_AREA)
    return np.asarray(resized, dtype=np.float32).reshape(height, width)
