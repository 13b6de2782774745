"""The guard: which refined masks are taken."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from refinetool.post.guard import judge, promised
from refinetool.records import BoolArray, FloatArray, Proposal
from refinetool.settings import NO_GUARD, GuardThresholds
from refinetool.statuses import Reason

SIZE = (6, 8)
NONE = NO_GUARD.thresholds(GuardThresholds())
"""Thresholds that only an empty mask fails."""
filled = arrays(np.bool_, SIZE).filter(lambda mask: bool(mask.any()))
sure = arrays(np.float32, SIZE, elements=st.floats(-8, 8, width=16))


def slow_expected_iou(mask: BoolArray, logits: FloatArray) -> float:
    """Pixel by pixel, at the resolution of the mask."""
    shared = joined = 0.0
    for inside, logit in zip(mask.flat, logits.flat, strict=True):
        chance = 1 / (1 + math.exp(-float(logit)))
        shared += chance if inside else 0.0
        joined += 1.0 if inside else chance
    return shared / joined


@given(coarse=filled, logits=sure)
def test_the_expected_gain_is_that_of_expected_areas(coarse: BoolArray, logits: FloatArray) -> None:
    before, after = (slow_expected_iou(mask, logits) for mask in (coarse, logits > 0))
    promise = promised(coarse, logits > 0, logits)
    assert promise.iou == pytest.approx(after, rel=1e-4)
    assert promise.gain == pytest.approx((after - before) / (1 - before), rel=1e-4, abs=1e-5)


@given(coarse=filled, sharpness=st.floats(1, 60))
def test_where_the_model_agrees_nothing_is_gained(coarse: BoolArray, sharpness: float) -> None:
    assert promised(coarse, coarse, np.where(coarse, sharpness, -sharpness).astype(np.float32)).gain == 0


@given(coarse=filled, object=filled)
def test_a_model_without_doubt_expects_to_remove_all_error(coarse: BoolArray, object: BoolArray) -> None:
    certain = np.where(object, 80.0, -80.0).astype(np.float32)
    assert promised(coarse, object, certain).gain == pytest.approx(0 if (coarse == object).all() else 1, abs=1e-6)


def test_a_model_that_finds_nothing_gains_nothing() -> None:
    coarse = np.ones(SIZE, np.bool_)
    assert promised(coarse, ~coarse, np.full(SIZE, -100.0, np.float32)).gain <= 0


def proposal(coarse: BoolArray, mask: BoolArray, *, score: float | None, logits: FloatArray | None) -> Proposal:
    return Proposal(np.zeros((*coarse.shape, 3), np.uint8), coarse, mask, logits, score)


def test_a_mask_has_to_be_expected_to_be_better() -> None:
    coarse, refined = np.zeros((2, 20, 20), np.bool_)
    coarse[4:16, 4:16] = refined[4:16, 4:15] = True
    unsure = np.where(coarse, 3.0, -3.0).astype(np.float32)
    unsure[4:16, 15] = -0.1  # the column that was taken away might as well belong
    thresholds = replace(NONE, min_predicted_iou=0.5, min_expected_gain=0.01)

    def reason(score: float | None, logits: FloatArray | None) -> Reason | None:
        judged = judge(proposal(coarse, refined, score=score, logits=logits), thresholds=thresholds)
        assert judged.coarse_iou == pytest.approx(11 / 12)
        return judged.reason

    sure = unsure.copy()
    sure[4:16, 15] = -3.0
    assert reason(0.9, unsure) is Reason.NO_GAIN
    assert reason(0.9, sure) is None
    assert reason(0.4, sure) is Reason.LOW_SCORE
    assert reason(None, None) is None


def test_a_model_that_returns_nan_is_doubted() -> None:
    coarse = np.zeros((20, 20), np.bool_)
    coarse[4:16, 4:16] = True
    refined, nan = coarse.copy(), np.full((20, 20), np.nan, np.float32)
    refined[4:16, 15] = False
    thresholds = replace(NONE, min_predicted_iou=0.5, min_expected_gain=0.01)

    def reason(score: float | None, logits: FloatArray | None) -> Reason | None:
        return judge(proposal(coarse, refined, score=score, logits=logits), thresholds=thresholds).reason

    assert reason(float("nan"), None) is Reason.LOW_SCORE
    assert reason(None, nan) is Reason.NO_GAIN


@pytest.mark.parametrize(("sure_iou", "reason"), [(1.0, Reason.NO_GAIN), (0.9, None)])
def test_a_sure_model_has_to_promise_half_as_much(sure_iou: float, reason: Reason | None) -> None:
    coarse, refined = np.zeros((2, 20, 20), np.bool_)
    coarse[4:16, 4:16] = refined[4:16, 4:15] = True
    logits = np.where(refined, 8.0, -8.0).astype(np.float32)
    logits[4:16, 15] = -0.4
    promise = promised(coarse, refined, logits)
    assert promise.iou == pytest.approx(slow_expected_iou(refined, logits), rel=1e-4)
    assert 0.9 < promise.iou < 1
    assert promise.gain > 0
    least = 1.5 * promise.gain  # too much to ask, but half of it is not
    thresholds = replace(NONE, min_expected_gain=least, sure_iou=sure_iou)
    assert judge(proposal(coarse, refined, score=None, logits=logits), thresholds=thresholds).reason is reason


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        ((0, 0, 0, 0), Reason.EMPTY_RESULT),
        ((4, 4, 12, 12), None),  # the same
        ((4, 4, 12, 8), None),  # half: IoU 0.5, area ratio 2
        ((4, 4, 12, 7), Reason.DRIFT),  # IoU 0.375
        ((8, 4, 16, 12), Reason.DRIFT),  # as large, elsewhere: IoU 1/3
        ((0, 0, 13, 13), Reason.DRIFT),  # IoU 64 / 169
    ],
)
def test_drift_is_too_little_overlap(box: tuple[int, int, int, int], reason: Reason | None) -> None:
    coarse, mask = np.zeros((2, 20, 20), np.bool_)
    coarse[4:12, 4:12] = True
    mask[box[1] : box[3], box[0] : box[2]] = True
    thresholds = replace(NONE, min_coarse_iou=0.4)
    assert judge(proposal(coarse, mask, score=None, logits=None), thresholds=thresholds).reason is reason


@pytest.mark.parametrize(("width", "reason"), [(8, None), (4, None), (3, Reason.DRIFT), (16, None), (17, Reason.DRIFT)])
def test_drift_is_too_different_an_area(width: int, reason: Reason | None) -> None:
    coarse, mask = np.zeros((2, 20, 20), np.bool_)
    coarse[4:12, :8] = mask[4:12, :width] = True
    thresholds = replace(NONE, max_area_ratio=2.0)
    assert judge(proposal(coarse, mask, score=None, logits=None), thresholds=thresholds).reason is reason
