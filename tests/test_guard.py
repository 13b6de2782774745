"""The guard: which refined masks are taken."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from refinetool.post.guard import doubt, expected_gain
from refinetool.records import BoolArray, FloatArray
from refinetool.settings import GuardSettings

SIZE = (6, 8)
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
    assert expected_gain(coarse, logits) == pytest.approx((after - before) / (1 - before), rel=1e-4, abs=1e-5)


@given(coarse=filled, sharpness=st.floats(1, 60))
def test_where_the_model_agrees_nothing_is_gained(coarse: BoolArray, sharpness: float) -> None:
    assert expected_gain(coarse, np.where(coarse, sharpness, -sharpness).astype(np.float32)) == 0


@given(coarse=filled, object=filled)
def test_a_model_without_doubt_expects_to_remove_all_error(coarse: BoolArray, object: BoolArray) -> None:
    certain = np.where(object, 80.0, -80.0).astype(np.float32)
    assert expected_gain(coarse, certain) == pytest.approx(0 if (coarse == object).all() else 1, abs=1e-6)


def test_a_model_that_finds_nothing_gains_nothing() -> None:
    coarse = np.ones(SIZE, np.bool_)
    assert expected_gain(coarse, np.full(SIZE, -100.0, np.float32)) <= 0


def test_a_mask_has_to_be_expected_to_be_better() -> None:
    coarse, refined = np.zeros((2, 20, 20), np.bool_)
    coarse[4:16, 4:16] = refined[4:16, 4:15] = True
    unsure = np.where(coarse, 3.0, -3.0).astype(np.float32)
    unsure[4:16, 15] = -0.1  # the column that was taken away might as well belong
    settings = GuardSettings(min_predicted_iou=0.5, min_expected_gain=0.01)
    assert doubt(coarse, refined, predicted_iou=0.9, logits=unsure, settings=settings)[0] == "no-gain"
    sure = unsure.copy()
    sure[4:16, 15] = -3.0
    assert doubt(coarse, refined, predicted_iou=0.9, logits=sure, settings=settings)[0] is None
    assert doubt(coarse, refined, predicted_iou=0.4, logits=sure, settings=settings)[0] == "low-score"
    assert doubt(coarse, refined, predicted_iou=None, logits=None, settings=settings)[0] is None
