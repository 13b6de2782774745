"""Doubtful parts: where a refined mask is unsure, or finer than the model sees, it keeps the coarse mask."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage

from refinetool.post import post_steps
from refinetool.post.parts import without_doubtful_parts
from refinetool.records import BoolArray, FloatArray, Proposal
from refinetool.settings import NO_GUARD, GuardSettings, GuardThresholds, ModelDefaults, RefineSettings

SIZE = (9, 11)
some = arrays(np.bool_, SIZE)
logits_of_pixels = arrays(np.float32, SIZE, elements=st.floats(-6, 6, width=16))
CAREFUL = GuardSettings(min_part_confidence=0.6, min_part_depth=1.5)


def without_parts_slowly(
    mask: BoolArray, coarse: BoolArray, logits: FloatArray, min_confidence: float, min_depth: float
) -> BoolArray:
    """Part by part, with scipy; logits have the size of the mask."""
    chance = 1 / (1 + np.exp(-logits.astype(np.float64)))
    kept = mask.copy()
    labels, count = ndimage.label(mask != coarse)
    for number in range(1, count + 1):
        part = labels == number
        confidence = np.where(mask, chance, 1 - chance)[part].mean()
        depth = ndimage.distance_transform_edt(np.pad(mask != coarse, 1))[1:-1, 1:-1][part].max()
        assume(abs(confidence - min_confidence) > 1e-4 and abs(depth - min_depth) > 1e-4)
        around = ndimage.binary_dilation(part, np.ones((3, 3)))
        isolated = len(np.unique(mask[around])) == 1
        if confidence < min_confidence or (depth < min_depth and not isolated):
            kept[part] = coarse[part]
    return kept


@given(mask=some, coarse=some, logits=logits_of_pixels, confidence=st.floats(0, 1), depth=st.floats(0, 3))
def test_parts_are_undone_one_by_one(
    mask: BoolArray, coarse: BoolArray, logits: FloatArray, confidence: float, depth: float
) -> None:
    before = mask.copy()
    kept = without_doubtful_parts(mask, coarse, logits, min_confidence=confidence, min_depth=depth)
    assert (kept == without_parts_slowly(mask, coarse, logits, confidence, depth)).all()
    assert (mask == before).all()


def square(x0: int, y0: int, x1: int, y1: int) -> BoolArray:
    mask = np.zeros((40, 60), np.bool_)
    mask[y0:y1, x0:x1] = True
    return mask


COARSE = square(10, 10, 30, 30)
DEEP, THIN, UNSURE = square(30, 10, 38, 18), square(10, 8, 30, 10), square(2, 16, 10, 24)


def proposal(logits: FloatArray | None) -> Proposal:
    return Proposal(np.zeros((40, 60, 3), np.uint8), COARSE, COARSE | DEEP | THIN | UNSURE, logits, None)


def coarse_grid() -> FloatArray:
    """A cell is 4 x 4 pixels; the logits are sure of everything but one part."""
    fine = np.where(COARSE | DEEP | THIN, 5.0, -5.0)
    fine[UNSURE] = 0.2
    return fine.reshape(10, 4, 15, 4).mean((1, 3)).astype(np.float32)


@pytest.mark.parametrize(
    ("guard", "parts"),
    [
        (GuardSettings(), (DEEP, THIN, UNSURE)),
        (GuardSettings(min_part_confidence=0.6), (DEEP, THIN)),
        (GuardSettings(min_part_depth=0.5), (DEEP, UNSURE)),  # the thin part is 1 pixel, so a quarter of a cell, deep
        (GuardSettings(min_part_confidence=0.6, min_part_depth=0.5), (DEEP,)),
        (GuardSettings(min_part_depth=1.5), ()),
    ],
)
def test_a_part_has_to_be_sure_and_deep(guard: GuardSettings, parts: tuple[BoolArray, ...]) -> None:
    changed = refined_by(RefineSettings(guard=guard), proposal(coarse_grid())) ^ COARSE
    for part in (DEEP, THIN, UNSURE):
        assert changed[part].all() == any(part is one for one in parts)
    assert changed.sum() == sum(part.sum() for part in parts)


def refined_by(settings: RefineSettings, given: Proposal) -> BoolArray:
    for step in post_steps(settings):
        given = step(given)
    return given.mask


def test_the_grid_has_oblong_cells_in_oblong_views() -> None:
    """Their longer side counts: here 8 pixels, of which the deep part has 4."""
    logits = np.where(COARSE | DEEP, 5.0, -5.0).reshape(10, 4, 60)[:, 0, ::8].astype(np.float32)
    mask = COARSE | DEEP
    for depth, kept in ((0.4, mask), (0.6, COARSE)):
        assert (without_doubtful_parts(mask, COARSE, logits, min_confidence=0.0, min_depth=depth) == kept).all()


def test_pinholes_of_the_coarse_mask_are_filled() -> None:
    """They are shallower than the model sees, but no part of the outline; what the model is unsure of stays."""
    coarse = COARSE.copy()
    coarse[15, 15:18] = False
    logits = np.where(COARSE, 5.0, -5.0).reshape(10, 4, 15, 4).mean((1, 3)).astype(np.float32)
    assert (without_doubtful_parts(COARSE, coarse, logits, min_confidence=0.6, min_depth=0.6) == COARSE).all()
    assert (without_doubtful_parts(COARSE, coarse, logits / 50, min_confidence=0.6, min_depth=0.6) == coarse).all()


def test_without_logits_or_guard_every_part_stays() -> None:
    whole = proposal(None).mask
    assert (refined_by(RefineSettings(guard=CAREFUL), proposal(None)) == whole).all()
    defaults = ModelDefaults(guard=GuardThresholds(min_part_confidence=0.6, min_part_depth=1.5))
    resolved = RefineSettings(guard=NO_GUARD).resolved(defaults)
    assert (refined_by(resolved, proposal(coarse_grid())) == whole).all()
    assert not (refined_by(RefineSettings().resolved(defaults), proposal(coarse_grid())) == whole).all()
