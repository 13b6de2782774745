"""The guard: keeps the coarse mask where the refined one is doubtful, and gives a reason."""

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from refinetool.masks import chances, iou
from refinetool.records import FloatMap, Mask, Proposal
from refinetool.settings import GuardThresholds
from refinetool.statuses import Reason

SURE_FACTOR = 0.5
"""What the minimum gain is multiplied by where the model is sure of its mask."""
LEAST_ERROR = 1e-6
"""Lower bound of expected errors, which avoids a division by zero."""


def judge(proposal: Proposal, *, thresholds: GuardThresholds) -> Proposal:
    """Judge a proposal: add its IoU with the coarse mask, and a reason to keep the coarse mask if there is one.

    The reasons, in order: `empty-result`; `low-score`, the model predicts too low an IoU for its mask; `no-gain`, by
    its own logits the mask is hardly better than the coarse one; `drift`, the mask overlaps the coarse mask too little
    or its area differs too much.
    """
    overlap = iou(proposal.coarse, proposal.mask)
    return replace(proposal, coarse_iou=overlap, reason=_doubt(proposal, overlap, thresholds))


def _doubt(proposal: Proposal, overlap: float, thresholds: GuardThresholds) -> Reason | None:
    score, logits = proposal.predicted_iou, proposal.logits
    if not proposal.mask.any():
        return Reason.EMPTY_RESULT
    # `not ... >=` rather than `<`: a model that returns NaN is doubtful.
    if score is not None and not score >= thresholds.min_predicted_iou:
        return Reason.LOW_SCORE
    if logits is not None:
        promise = promised(proposal.coarse, proposal.mask, logits)
        factor = SURE_FACTOR if promise.iou >= thresholds.sure_iou else 1.0
        if not promise.gain >= factor * thresholds.min_expected_gain:
            return Reason.NO_GAIN
    growth = float(np.count_nonzero(proposal.mask) / np.count_nonzero(proposal.coarse))
    if overlap < thresholds.min_coarse_iou or max(growth, 1 / growth) > thresholds.max_area_ratio:
        return Reason.DRIFT
    return None


class Promise(NamedTuple):
    """What a model's logits promise of a mask.

    iou: Expected IoU, 0..1.
    gain: Expected fraction of the coarse mask's error that the mask removes, at most 1; 0 where it is the coarse mask.
    """

    iou: float
    gain: float


def promised(coarse: Mask, mask: Mask, logits: FloatMap) -> Promise:
    """Estimate from calibrated logits how good a mask is, and how much better than the coarse one.

    The expected IoU of a mask M with an object that covers each pixel with probability p is approximated by the ratio
    of the expected areas: sum(p in M) / (area(M) + sum(p outside M)). With E for the mask and C for the coarse one, the
    gain is (E - C) / (1 - C).

    Args:
        coarse: bool (H, W), not empty.
        mask: bool (H, W).
        logits: float32 (h, w) over the same frame.
    """
    chance = chances(logits, coarse.shape)
    total = chance.sum(dtype=np.float64)

    def expected_iou(one: Mask) -> float:
        inside = chance[one].sum(dtype=np.float64)
        either = np.count_nonzero(one) + total - inside
        return float(inside / either) if either > 0 else 0.0

    before, after = expected_iou(coarse), expected_iou(mask)
    return Promise(after, (after - before) / max(1 - before, LEAST_ERROR))
