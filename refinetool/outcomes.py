"""Outcomes: verdicts on parts become one annotation per region, in the order of the sample."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from refinetool import masks, regions
from refinetool.parts import whole_claim
from refinetool.records import REFINED, Annotation, Candidates, Outcome, Region, Rle, Sample, kept
from refinetool.regions import Claim

EMPTY = "empty"
"""Why a region without pixels is kept as it is."""
TOO_SMALL = "too-small"
"""Why a class is kept of which every piece is too small to be refined."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one part: the claim it makes on the image, its status, how sure the model is of it (None without
    a model), how like the coarse mask it is, and what else the model offered, if that is to be kept."""

    claim: Claim
    status: str
    predicted_iou: float | None
    coarse_iou: float
    candidates: Candidates | None = None


def outcome_of(sample: Sample, verdicts: Sequence[Verdict], trivial: Sequence[Claim]) -> Outcome:
    """The outcome of a sample.

    Args:
        verdicts: One per part that the model was asked about.
        trivial: Pieces of class masks that were too small to be parts.
    """
    if sample.layout == "instances":
        return Outcome(sample.key, tuple(alone(sample, verdicts)))
    return Outcome(sample.key, tuple(merged(sample, verdicts, trivial)))


def alone(sample: Sample, verdicts: Sequence[Verdict]) -> list[Annotation]:
    """One annotation per region, where regions may overlap and none has more than one part."""
    judged = {verdict.claim.owner: verdict for verdict in verdicts}
    annotations = []
    for number, region in enumerate(sample.regions):
        verdict = judged.get(number)
        if verdict is None:
            annotations.append(untouched(region))
        elif verdict.status == REFINED:
            mask = encode_claim(verdict.claim, sample)
            annotations.append(judged_as(verdict, mask))
        else:
            annotations.append(judged_as(verdict, region.mask))
    return annotations


def merged(sample: Sample, verdicts: Sequence[Verdict], trivial: Sequence[Claim]) -> list[Annotation]:
    """One annotation per region, where regions share a map: no pixel has two owners (`regions.merge` has the rule).

    A region counts as refined if any of its parts is; its predicted IoU is the mean of those parts, weighted by area.
    A region of which no part is refined keeps its coarse mask to the pixel: nobody else can claim it.
    """
    refined = {verdict.claim.owner for verdict in verdicts if verdict.status == REFINED}
    claims = [claim for claim in (*trivial, *(verdict.claim for verdict in verdicts)) if claim.owner in refined]
    for number, region in enumerate(sample.regions):
        if number not in refined and region.mask is not None and masks.area(region.mask) > 0:
            claims.append(replace(whole_claim(number, masks.decode(region.mask)), predicted_iou=math.inf))
    void = None if sample.void is None else masks.decode(sample.void)
    owners = regions.merge(claims, void=void, size=sample.size)

    annotations = []
    for number, region in enumerate(sample.regions):
        own = [verdict for verdict in verdicts if verdict.claim.owner == number]
        accepted = [verdict for verdict in own if verdict.status == REFINED]
        if accepted and region.mask is not None:
            mask = owners == number
            overlap = masks.iou(mask, masks.decode(region.mask))
            annotations.append(Annotation(masks.encode(mask), REFINED, mean_score(accepted), overlap))
        elif own:
            largest = max(own, key=lambda verdict: int(verdict.claim.mask.sum()))
            annotations.append(replace(judged_as(largest, region.mask), candidates=None))
        else:
            annotations.append(untouched(region))
    return annotations


def judged_as(verdict: Verdict, mask: Rle | None) -> Annotation:
    """The annotation of a region that is one part."""
    return Annotation(mask, verdict.status, verdict.predicted_iou, verdict.coarse_iou, verdict.candidates)


def mean_score(verdicts: Sequence[Verdict]) -> float | None:
    """The mean predicted IoU of some parts, weighted by area; None where no model was asked."""
    scored = [(verdict.predicted_iou, float(verdict.claim.mask.sum())) for verdict in verdicts]
    scores, weights = zip(*scored, strict=True)
    return None if None in scores else float(np.average(scores, weights=weights))


def untouched(region: Region) -> Annotation:
    """The annotation of a region that the model was not asked about."""
    reason = EMPTY if region.mask is None or masks.area(region.mask) == 0 else TOO_SMALL
    return Annotation(region.mask, kept(region.keep or reason))


def encode_claim(claim: Claim, sample: Sample) -> Rle:
    """The run lengths of a claim in the frame of its image."""
    full = np.zeros(sample.size, dtype=np.bool_)
    x0, y0, x1, y1 = claim.box
    full[y0:y1, x0:x1] = claim.mask
    return masks.encode(full)
