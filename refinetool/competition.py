"""Lets the objects of an image compete for pixels.

Each mask is predicted by itself, so where objects touch, several may claim the same pixels, although a pixel rarely
belongs to two objects. If it never did, and the predictions were otherwise independent, the odds of a pixel would be
those of the model times the probability that the pixel is not in the other mask:

    log odds + weight * log(1 - p of the other mask), summed over all rivals

With two objects and a weight of 1 this is exact; with 0 each mask is left as it is. Objects that share most of the
smaller one's coarse mask are no rivals: one of them is probably part of the other, or stands before it.

A model can have arbiters besides: small networks that also see the image and all coarse masks, and move the logits of
every mask further, even where no other object claims any of it. Each is asked for coarse masks at least as large as the
smallest objects it learnt from, down to those that the next one takes.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np

from refinetool.backends import Arbiter
from refinetool.candidates import Answer, Job
from refinetool.masks import bounding_box, intersect, spread
from refinetool.records import Box, Contest, FloatMap, Mask
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


def compete(
    jobs: Sequence[Job],
    answers: Sequence[Answer],
    *,
    settings: CompetitionSettings,
    arbiters: Sequence[Arbiter] = (),
    exclusive: bool = False,
) -> list[Answer]:
    """Return the answers for the parts of an image, changed by what other objects claim and by an arbiter.

    Without an arbiter masks only lose pixels, and where no other object claims any, they stay as they are. So do those
    without logits.

    Args:
        jobs: All of one image.
        answers: One per job.
        settings: Resolved: the weight is not None.
        arbiters: Those of the model, none if it has none or they are not to be asked.
        exclusive: Whether no pixel belongs to two objects; only an arbiter makes use of it.
    """
    weight = settings.weight or 0.0
    if weight == 0:
        return list(answers)
    settled = [
        answer if answer.logits is None else replace(answer, masks=answer.masks.copy(), logits=answer.logits.copy())
        for answer in answers
    ]
    every_part = [part for job in jobs for part in job.parts]
    for number, row, denied in denials(jobs, answers, max_shared=settings.max_shared):
        job, own, made = jobs[number], answers[number].logits, settled[number]
        asked = arbiter_for(int(np.count_nonzero(job.coarse[row])), arbiters)
        if asked is None and not denied.any():
            continue
        assert own is not None and made.logits is not None
        before = spread(own[row], job.view.size)
        after = before + weight * denied
        made.logits[row] += on_grid(weight * denied, own[row].shape)
        if asked is not None:
            contest = contest_of(job, row, own[row], denied, every_part, exclusive=exclusive)
            moved = asked.settle(contest)
            made.logits[row] += moved
            after += spread(moved, job.view.size)
        made.masks[row] = np.where((before > 0) == (after > 0), made.masks[row], after > 0)
    return settled


def arbiter_for(pixels: int, arbiters: Sequence[Arbiter]) -> Arbiter | None:
    """Return the arbiter to ask for a coarse mask: that for the largest masks of those whose `least_px` it reaches."""
    ready = [arbiter for arbiter in arbiters if pixels >= arbiter.least_px]
    return max(ready, key=lambda arbiter: arbiter.least_px, default=None)


def denials(
    jobs: Sequence[Job], answers: Sequence[Answer], *, max_shared: float
) -> Iterator[tuple[int, int, FloatMap]]:
    """Find what is denied to each part of an image whose logits are known.

    Yields:
        The number of the job, the row of the part in it, and log(1 - p) summed over its rivals, float32 (H, W) in the
        view: 0 where it has none.
    """
    claimed = [
        claim
        for job, answer in zip(jobs, answers, strict=True)
        if answer.logits is not None
        for part, logits in zip(job.parts, answer.logits, strict=True)
        if (claim := claim_of(part, logits, job.view)) is not None
    ]
    for number, job in enumerate(jobs):
        if answers[number].logits is None:
            continue
        seen = [claim for claim in claimed if _reaches(claim, job.view)]
        for row, part in enumerate(job.parts):
            rivals = [claim for claim in seen if are_rivals(part, claim.part, max_shared=max_shared)]
            yield number, row, denied_in(job.view, rivals)


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


def contest_of(
    job: Job, row: int, logits: FloatMap, denied: FloatMap, parts: Sequence[Part], *, exclusive: bool
) -> Contest:
    """Return what there is to know of the contest of one part of a job.

    Args:
        logits: float32 (h, w), those of its mask.
        denied: float32 (H, W) in the view, log(1 - p) summed over its rivals.
        parts: All of the image.
        exclusive: Whether no pixel belongs to two objects.
    """
    grid = logits.shape
    strangers = [part for part in parts if part.region != job.parts[row].region]
    return Contest(
        logits,
        on_grid(denied, grid),
        on_grid(job.coarse[row].astype(np.float32), grid),
        on_grid(covered_in(job.view, strangers).astype(np.float32), grid),
        np.asarray(cv2.resize(job.pixels, grid[::-1], interpolation=cv2.INTER_AREA), np.uint8),
        exclusive,
    )


def covered_in(view: View, parts: Sequence[Part]) -> Mask:
    """Return the pixels of a view inside the coarse mask of any of some parts: bool (H, W)."""
    covered = np.zeros(view.size, dtype=np.bool_)
    for part in parts:
        here, there = intersect(view.window, part.box)
        covered[here] |= part.mask[there]
    return covered


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


def on_grid(values: FloatMap, grid: tuple[int, ...]) -> FloatMap:
    """Resize a map of a view to the grid of its logits, (h, w); a cell gets the mean of its pixels."""
    height, width = grid
    resized = cv2.resize(values, (width, height), interpolation=cv2.INTER_AREA)
    return np.asarray(resized, dtype=np.float32).reshape(height, width)
