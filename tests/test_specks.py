"""Specks: small new islands and holes go, all other pieces stay to the pixel."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage

from refinetool import masks
from refinetool.post import post_steps
from refinetool.post.specks import without_specks
from refinetool.records import BoolArray, Proposal
from refinetool.settings import METHODS, RELEASE, GuardSettings, ModelDefaults, RefineSettings, SpeckSettings

EIGHT = np.ones((3, 3))
SIZE = (9, 11)
some = arrays(np.bool_, SIZE)


def square(side: int = 30, margin: int = 5) -> BoolArray:
    mask = np.zeros((side, side), dtype=np.bool_)
    mask[margin:-margin, margin:-margin] = True
    return mask


def pieces(pixels: BoolArray) -> list[BoolArray]:
    labels, count = ndimage.label(pixels, EIGHT)
    return [labels == number for number in range(1, count + 1)]


def holes(mask: BoolArray) -> list[BoolArray]:
    found = pieces(np.pad(~mask, 1, constant_values=True))
    return [hole[1:-1, 1:-1] for hole in found if not hole[0, 0]]


def without_specks_slowly(mask: BoolArray, coarse: BoolArray, limit: float) -> BoolArray:
    """Piece by piece, with scipy."""
    kept = np.zeros_like(mask)
    for island in small_and_new(pieces(mask), pieces(coarse), limit)[1]:
        kept |= island
    for hole in small_and_new(holes(kept), holes(coarse), limit)[0]:
        kept |= hole
    return kept


def small_and_new(
    found: list[BoolArray], before: list[BoolArray], limit: float
) -> tuple[list[BoolArray], list[BoolArray]]:
    """The pieces to drop, and the others."""
    heirs = set()
    for old in before:
        touching = [number for number, piece in enumerate(found) if (piece & old).any()]
        if touching:
            largest = max(found[number].sum() for number in touching)
            heirs |= {number for number in touching if found[number].sum() == largest}
    dropped = [number for number, piece in enumerate(found) if piece.sum() <= limit and number not in heirs]
    return [found[n] for n in dropped], [piece for n, piece in enumerate(found) if n not in dropped]


def test_a_new_pinhole_is_filled_and_a_new_island_dropped() -> None:
    mask = square()
    mask[12:16, 12:16] = False
    mask[0:2, 0:2] = True
    assert (without_specks(mask, square(), max_px=16, max_share=0) == square()).all()


def test_what_is_left_of_a_hole_that_was_opened_is_not_new() -> None:
    """The background outside overlaps the coarse mask's hole, too, but is no hole, so the rest of it stays."""
    coarse, mask = np.ones(SIZE, dtype=np.bool_), np.ones(SIZE, dtype=np.bool_)
    coarse[5:8, 1] = False
    mask[[4, 5, 7], [0, 1, 1]] = False
    assert (without_specks(mask, coarse, max_px=1, max_share=0) == mask).all()


def test_larger_pieces_stay() -> None:
    mask = square()
    mask[12:16, 12:17] = False  # 20 pixels
    mask[0:3, 0:6] = True  # 18
    assert (without_specks(mask, square(), max_px=16, max_share=0) == mask).all()


def test_the_limit_grows_with_the_area() -> None:
    coarse, mask = square(130), square(130)
    mask[60, 60:75] = False  # 15 pixels of 14,400
    assert not (without_specks(mask, coarse, max_px=0, max_share=0.001) == coarse).all()
    assert (without_specks(mask, coarse, max_px=0, max_share=0.0011) == coarse).all()


def test_pieces_that_the_coarse_mask_had_stay_however_small() -> None:
    coarse = square()
    coarse[12:18, 12:18] = False
    coarse[0:2, 0:2] = True
    mask = square()
    mask[17, 17] = False
    mask[1, 1] = True
    assert (without_specks(mask, coarse, max_px=16, max_share=0) == mask).all()


def test_of_the_fragments_of_an_island_the_largest_stays() -> None:
    coarse, mask = square(), square()
    coarse[0:2, 0:8] = True
    mask[0:2, 0:3] = mask[0, 6] = True
    expected = mask.copy()
    expected[0, 6] = False
    assert (without_specks(mask, coarse, max_px=16, max_share=0) == expected).all()


def test_diagonal_lines_are_one_piece_and_gaps_no_holes() -> None:
    line = np.eye(40, dtype=np.bool_)
    assert (without_specks(line, line, max_px=16, max_share=0) == line).all()
    cracked = square()
    cracked[range(5, 12), range(5, 12)] = False  # reaches the background at a corner
    assert (without_specks(cracked, square(), max_px=16, max_share=0) == cracked).all()


def test_a_small_mask_that_fills_its_box_stays() -> None:
    mask = np.zeros((8, 8), dtype=np.bool_)
    mask[2:4, 2:4] = True
    assert (without_specks(mask, mask, max_px=16, max_share=0) == mask).all()


def test_zero_switches_it_off_and_inputs_are_not_modified() -> None:
    mask = square()
    mask[12, 12] = False
    mask.setflags(write=False)
    assert (without_specks(mask, square(), max_px=0, max_share=0) == mask).all()
    assert (without_specks(mask, square(), max_px=1, max_share=0) == square()).all()


@settings(max_examples=300)
@given(mask=some, coarse=some, limit=st.integers(1, 9))
def test_pieces_are_those_of_a_slow_search(mask: BoolArray, coarse: BoolArray, limit: int) -> None:
    cleaned = without_specks(mask, coarse, max_px=limit, max_share=0)
    assert (cleaned == without_specks_slowly(mask, coarse, limit)).all()


@given(mask=some, coarse=some)
def test_doing_it_twice_changes_nothing(mask: BoolArray, coarse: BoolArray) -> None:
    once = without_specks(mask, coarse, max_px=4, max_share=0)
    assert (without_specks(once, coarse, max_px=4, max_share=0) == once).all()


def proposal(mask: BoolArray) -> Proposal:
    return Proposal(np.zeros((*mask.shape, 3), dtype=np.uint8), square(), mask, None, None)


@pytest.mark.parametrize(("chosen", "holes_left"), [(SpeckSettings(), False), (SpeckSettings(max_px=0.0), True)])
def test_it_is_the_last_step_before_the_guard(chosen: SpeckSettings, holes_left: bool) -> None:
    asked = RefineSettings(specks=chosen, guard=GuardSettings(min_coarse_iou=0.0))
    mask = square()
    mask[12, 12] = False
    made = proposal(mask)
    for step in post_steps(asked.resolved(ModelDefaults())):
        made = step(made)
    assert masks.has_holes(made.mask) == holes_left
    assert made.coarse_iou == masks.iou(made.mask, square()), "the guard judges what is written"


def test_baselines_and_the_release_keep_specks() -> None:
    plain = [settings.specks for name, settings in METHODS.items() if name != "samrefiner"]
    assert {(specks.max_px, specks.max_share) for specks in [*plain, RELEASE.specks]} == {(0.0, 0.0)}
