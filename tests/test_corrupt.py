"""Every generator and defect: deterministic, harmless to its input, never a shape or type it was not given, never a
crash; and in its band, or said not to be."""

from collections import Counter
from collections.abc import Sequence
from functools import partial as bound
from itertools import islice
from typing import Any

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import ndimage
from shapes import AWKWARD, SIZE, blocks, disc, photograph

from refinetool.corrupt import (
    MIN_AREA_PX,
    Attempt,
    Goal,
    activation_map,
    activations,
    biased_activation,
    boundary,
    boundary_noise,
    coarse_polygon,
    compose,
    defects,
    drawn_polygon,
    grow_or_shrink,
    holes_and_islands,
    label_maps,
    leak,
    local_morphology,
    low_resolution,
    mask_head,
    merge_neighbour,
    noise_band,
    partial,
    radius,
    reach,
    shift_and_scale,
    signed_depth,
    simplified,
    superpixel,
    superpixel_defects,
    superpixel_labels,
    superpixel_vote,
    training_mix,
)
from refinetool.corrupt.activations import THRESHOLDS, activation, overlap_by_threshold
from refinetool.corrupt.defects import DEFECTS as DEFECT_TABLE
from refinetool.corrupt.defects import SECOND_CHANCE, fractions
from refinetool.corrupt.figures import count_parts
from refinetool.corrupt.geometry import zoom_on
from refinetool.corrupt.mixtures import mixed
from refinetool.masks import iou
from refinetool.records import BoolArray, FloatArray, IntArray
from refinetool.settings import CorruptSettings

DEFECTS = (
    boundary_noise,
    grow_or_shrink,
    low_resolution,
    biased_activation,
    coarse_polygon,
    drawn_polygon,
    shift_and_scale,
    holes_and_islands,
    mask_head,
)
DEFAULT = CorruptSettings()
WINDOW = {"margin": DEFAULT.window_margin, "min_side_px": DEFAULT.window_side_px}
OUTLINE = {"cut": DEFAULT.outline_cut, "keep": DEFAULT.outline_keep, "jitter": DEFAULT.outline_jitter}


def goal(low: float, high: float, *, tries: int = 31, ignore: BoolArray | None = None) -> Goal:
    return Goal(low, high, tries, MIN_AREA_PX, ignore)


# --- defects by severity


@pytest.mark.parametrize("name", AWKWARD)
@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.__name__)
def test_defects_survive_awkward_masks(defect, name: str) -> None:  # type: ignore[no-untyped-def]
    mask = AWKWARD[name]
    before = mask.copy()
    first, second = (defect(mask, np.random.default_rng(3), 1.0) for _ in range(2))
    assert first.shape == mask.shape
    assert first.dtype == np.bool_
    assert (first == second).all()
    assert (mask == before).all()


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.__name__)
def test_defects_change_an_ordinary_mask_but_not_beyond_recognition(defect) -> None:  # type: ignore[no-untyped-def]
    mask = disc(30, 24, 14)
    # A mask head's grid is finer than this disc at severity 1.
    severity = 3.0 if defect is mask_head else 1.0
    overlaps = [iou(defect(mask, np.random.default_rng(seed), severity), mask) for seed in range(20)]
    assert min(overlaps) > 0.1
    assert 0.5 < np.mean(overlaps) < 0.99


def test_superpixel_defects_toggle_whole_superpixels() -> None:
    mask = disc(30, 24, 14)
    coarse = superpixel_defects(mask, np.random.default_rng(0), 1.0, labels=blocks())
    changed = coarse != mask
    assert changed.any()
    for label in np.unique(blocks()[changed]):
        assert len(np.unique(coarse[blocks() == label])) == 1


def test_superpixel_vote_is_constant_on_each_superpixel() -> None:
    coarse = superpixel_vote(disc(30, 24, 14), np.random.default_rng(0), 0.0, labels=blocks())
    share = np.array([disc(30, 24, 14)[blocks() == label].mean() for label in range(blocks().max() + 1)])
    assert (coarse == (share > 0.5)[blocks()]).all()


def test_a_leak_adds_only_pixels_of_the_neighbour() -> None:
    mask, neighbour = disc(20, 24, 10), disc(40, 24, 10)
    coarse = leak(mask, np.random.default_rng(1), 1.0, neighbour=neighbour)
    assert (coarse & ~mask).any()
    assert not (coarse & ~mask & ~neighbour).any()
    assert (coarse | mask == coarse).all()


def test_a_mask_head_sees_one_pixel_per_cell() -> None:
    mask = np.zeros(SIZE, np.bool_)
    mask[4:36, 8:40] = np.random.default_rng(0).random((32, 32)) < 0.5
    mask[4, 8] = mask[35, 39] = True
    coarse = mask_head(mask, np.random.default_rng(0), 28 / 8)  # 8 or 16 cells, of 4 or 2 pixels
    inside = coarse[4:36, 8:40]
    grids = [inside.reshape(32 // side, side, 32 // side, side) for side in (4, 2)]
    assert any((cells == cells[:, :1, :, :1]).all() for cells in grids)
    assert not coarse[:4].any()


def test_polygons_keep_straight_edges_and_cut_round_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(defects, "CORNER_NOISE", 0.0)
    monkeypatch.setattr(defects, "CONVEX", 0.0)
    slope = np.add.outer(np.arange(90), 2 * np.arange(120)) < 160
    round_one = np.pad(disc(30, 24, 22), 20)
    for seed in range(10):
        rng = np.random.default_rng(seed)
        assert iou(coarse_polygon(slope, rng, 0.7), slope) > 0.95
        cut = coarse_polygon(round_one, rng, 1.5)
        assert (cut & ~round_one).sum() < 0.03 * round_one.sum()
        assert cut.sum() < 0.97 * round_one.sum()


def test_some_polygons_are_convex(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(defects, "CONVEX", 1.0)
    mask = AWKWARD["two parts"]
    for seed in range(10):
        coarse = coarse_polygon(mask, np.random.default_rng(seed), 0.5)
        hull = cv2.convexHull(np.argwhere(coarse).astype(np.int32))
        filled = cv2.fillPoly(np.zeros(mask.shape, np.uint8), [hull[:, :, ::-1]], (1,)).astype(bool)
        assert iou(coarse, filled) > 0.93
        assert (coarse & mask).sum() > 0.8 * mask.sum()


def test_masks_of_low_resolution_have_no_more_cells_than_pixels() -> None:
    """A short line in a long strip of one pixel's width would otherwise be divided into cells that cover no pixel."""
    strip = np.zeros((1, 200), dtype=bool)
    strip[0, 100:104] = True
    for seed in range(50):
        for mask in (strip, strip.T):
            low_resolution(mask, np.random.default_rng(seed), 0.5)  # warnings are errors


def test_a_biased_activation_loses_what_is_far_from_one_part() -> None:
    """Of two equal discs, the one that the bias lies in is the larger more often than not, by much."""
    left, right = disc(12, 24, 9), disc(50, 24, 9)
    lopsided = []
    for seed in range(40):
        rng = np.random.default_rng(seed)
        coarse = biased_activation(left | right, rng, 1.0)
        counts = sorted(int((coarse & part).sum()) for part in (left, right))
        lopsided.append(counts[0] < 0.8 * counts[1])
    assert np.mean(lopsided) > 0.15


def test_many_activations_have_too_few_cells_for_the_shape() -> None:
    """Of a bar six times as long as wide, a third of the activations is less than twice as long as wide."""
    bar = np.zeros(SIZE, dtype=bool)
    bar[21:27, 14:50] = True
    drawn = [biased_activation(bar, np.random.default_rng(seed), 1.0) for seed in range(100)]
    assert np.mean([coarse.any(0).sum() < 2 * coarse.any(1).sum() for coarse in drawn]) > 0.3


def test_the_cells_of_activations_lie_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of one cell per object begin at every column, not only where a grid over the window would have them."""
    for name, value in {
        "ACTIVATION_CELLS": (1, 1.01),
        "ACTIVATION_BIAS": (0, 0),
        "ACTIVATION_LEAK": (0, 0),
        "BLOCKS": 1.0,
    }.items():
        monkeypatch.setattr(defects, name, value)
    drawn = [biased_activation(disc(32, 24, 7), np.random.default_rng(seed), 1.0) for seed in range(100)]
    assert len({int(np.argmax(coarse.any(0))) for coarse in drawn}) > 13
    assert len({int(np.argmax(coarse.any(1))) for coarse in drawn}) > 13


def test_superpixels_are_not_toggled_back() -> None:
    """However often one is drawn, it becomes what the pixel that drew it was not."""
    mask = disc(30, 24, 14)
    halves = np.repeat(np.arange(2), SIZE[1] // 2)[None].repeat(SIZE[0], axis=0)
    for seed in range(20):
        coarse = superpixel_defects(mask, np.random.default_rng(seed), 2.0, labels=halves)
        assert (coarse != mask).any()


def test_a_full_window_has_no_boundary_to_move() -> None:
    full = np.ones((300, 300), np.bool_)
    for seed in range(10):
        assert grow_or_shrink(full, np.random.default_rng(seed), 3.0).all()


def test_without_a_neighbour_nothing_leaks() -> None:
    mask = disc(20, 24, 10)
    assert (leak(mask, np.random.default_rng(1), 1.0, neighbour=np.zeros_like(mask)) == mask).all()


# --- the training mix


def attempts_of(mask: BoolArray, *, blobs: bool, low: float, count: int) -> list[Attempt]:
    attempts = mixed(
        mask, np.random.default_rng(0), blobs=blobs, low=low, labels=blocks, neighbour=disc(54, 24, 9) & ~mask
    )
    return list(islice(attempts, count))


def test_the_mix_draws_defects_as_often_as_the_table_says() -> None:
    for blobs in (False, True):
        drawn = attempts_of(disc(30, 24, 14), blobs=blobs, low=0.5, count=1500)
        first = Counter(attempt.defects[0] for attempt in drawn)
        for name, fraction in zip(DEFECT_TABLE, fractions(blobs=blobs), strict=True):
            assert first[name] / len(drawn) == pytest.approx(fraction, abs=0.035)
        assert np.mean([len(attempt.defects) == 2 for attempt in drawn]) == pytest.approx(SECOND_CHANCE, abs=0.04)


def test_masks_to_be_nearly_right_get_mild_defects() -> None:
    mask = disc(30, 24, 14)
    usual, mild = (
        np.mean([iou(attempt.coarse, mask) for attempt in attempts_of(mask, blobs=False, low=low, count=150)])
        for low in (0.5, 0.9)
    )
    assert mild > usual + 0.08


def test_blobs_need_no_superpixels() -> None:
    def fail() -> IntArray:
        raise AssertionError

    mask = disc(30, 24, 14)
    attempts = mixed(mask, np.random.default_rng(0), blobs=True, low=0.4, labels=fail, neighbour=~mask)
    found = {name for attempt in islice(attempts, 100) for name in attempt.defects}
    assert found == {"low-resolution", "biased-activation"}


# --- the loop


def squares(*sides: int) -> list[Attempt]:
    """Squares of some sides at the corner of the image."""
    masks = []
    for side in sides:
        mask = np.zeros(SIZE, np.bool_)
        mask[:side, :side] = True
        masks.append(Attempt(mask, (f"{side}",)))
    return masks


def test_the_first_attempt_in_the_band_is_taken() -> None:
    gt = squares(20)[0].coarse
    coarse, info = reach("mix", squares(20, 19, 16, 17), gt, goal=goal(0.6, 0.7))
    assert coarse.sum() == 16**2
    assert info.iou == 16**2 / 20**2
    assert (info.tries, info.reached, info.defects) == (3, True, ("16",))


def test_without_one_in_the_band_the_closest_is_taken_and_said_to_miss() -> None:
    gt = squares(20)[0].coarse
    coarse, info = reach("mix", squares(20, 12, 18, 2), gt, goal=goal(0.6, 0.7, tries=3))
    assert coarse.sum() == 18**2
    assert (info.tries, info.reached) == (3, False)


def test_attempts_that_are_too_small_do_not_count() -> None:
    gt = squares(20)[0].coarse
    coarse, info = reach("mix", squares(1, 2, 3), gt, goal=goal(0.0, 1.0))
    assert (coarse == gt).all()
    assert coarse is not gt
    assert not info.reached


def test_ignored_pixels_are_never_mask_and_do_not_count() -> None:
    gt = squares(20)[0].coarse
    void = np.zeros(SIZE, np.bool_)
    void[:, 20:30] = True
    everything = Attempt(np.ones(SIZE, np.bool_), ("all",))
    coarse, info = reach("mix", [everything], gt, goal=goal(0, 1, ignore=void))
    assert not (coarse & void).any()
    assert info.iou == pytest.approx(400 / (SIZE[0] * (SIZE[1] - 10)))


# --- generators that aim


def generators(image: NDArray[np.uint8], gt: BoolArray):  # type: ignore[no-untyped-def]
    """Every generator with its parameters settled but mask, randomness and goal."""
    maps = label_maps(image, compactness=10.0)
    superpixels = {
        "labels": maps,
        "counts": (20, 50, 100),
        "compactness": 10.0,
        "fractions": DEFAULT.superpixel_shares,
        "kernel_px": 3,
        "iterations": 2,
        "max_defects": 10,
    }
    around = {"neighbours": [], "compactness": 10.0, "min_side_px": DEFAULT.window_side_px}
    cells = {"bias": True, "leak": 0.1, "mode": "either"}
    return {
        "superpixel": bound(superpixel, image, **superpixels, **WINDOW),
        "boundary": bound(boundary, None, rounds=250, **OUTLINE, **WINDOW),
        "noise-band": bound(noise_band, None, grid_side=64, factor=8, residue=0.01),
        "cam-like": bound(activation_map, None, name="cam-like", cell_px=16.0, blur=1.0, **cells),
        "clip-like": bound(activation_map, None, name="clip-like", cell_px=8.0, blur=1.0, **cells),
        "partial": bound(partial, None),
        "merge-neighbour": bound(merge_neighbour, None, neighbours=[np.roll(gt, 25, axis=1) & ~gt]),
        "mix": bound(training_mix, image, blobs=False, **around),
        "blobs": bound(training_mix, None, blobs=True, **around),
        "compose": bound(
            compose,
            None,
            more=0.5,
            generators=[lambda m, g, goal: boundary(None, m, g, goal=goal, rounds=250, **OUTLINE, **WINDOW)],
        ),
    }


NAMES = tuple(generators(photograph(), disc(30, 24, 14)))


@pytest.mark.parametrize("mask", AWKWARD)
@pytest.mark.parametrize("name", NAMES)
def test_generators_survive_awkward_masks(name: str, mask: str) -> None:
    gt, image = AWKWARD[mask], photograph()
    before, pixels = gt.copy(), image.copy()
    generator = generators(image, gt)[name]
    (first, info), (second, again) = (
        generator(gt, np.random.default_rng(3), goal=goal(0.5, 0.9, tries=8)) for _ in range(2)
    )
    assert first.shape == gt.shape
    assert first.dtype == np.bool_
    assert first.any()
    assert not np.shares_memory(first, gt)
    assert (first == second).all()
    assert info.tries == again.tries
    assert (gt == before).all()
    assert (image == pixels).all()
    assert info.generator == name
    assert info.iou == iou(first, gt)
    assert info.reached == (0.5 <= info.iou <= 0.9)
    assert info.defects or not info.reached


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    seed=st.integers(0, 10**6),
    place=st.tuples(st.integers(0, 63), st.integers(0, 47), st.floats(0.5, 40)),
    low=st.floats(0.1, 0.9),
)
def test_a_mask_is_in_its_band_or_said_not_to_be(
    name: str, seed: int, place: tuple[int, int, float], low: float
) -> None:
    gt = disc(*place)
    generator = generators(photograph(), gt)[name]
    asked = goal(low, low + 0.1, tries=5)
    coarse, info = generator(gt, np.random.default_rng(seed), goal=asked)
    assert info.iou == iou(coarse, gt)
    assert info.reached == (asked.low <= info.iou <= asked.high and info.defects != ())
    assert 1 <= info.tries <= 10
    assert coarse.sum() >= min(MIN_AREA_PX, gt.sum())
    assert (generator(gt, np.random.default_rng(seed), goal=asked).coarse == coarse).all()


@pytest.mark.parametrize("name", NAMES)
def test_nothing_comes_of_nothing(name: str) -> None:
    gt = np.zeros(SIZE, np.bool_)
    coarse, info = generators(photograph(), gt)[name](gt, np.random.default_rng(0), goal=goal(0.5, 1.0))
    assert not coarse.any()
    assert not info.reached
    assert info.tries == 0


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("superpixel", 0.75, 0.85),
        ("superpixel", 0.40, 0.60),
        ("boundary", 0.70, 0.95),
        ("noise-band", 0.60, 1.00),
        ("cam-like", 0.40, 0.65),
        ("clip-like", 0.60, 0.80),
        ("partial", 0.20, 0.60),
        ("merge-neighbour", 0.55, 0.80),
        ("mix", 0.45, 0.97),
        ("blobs", 0.40, 0.80),
        ("compose", 0.60, 0.90),
    ],
)
def test_ordinary_objects_reach_the_usual_bands(name: str, low: float, high: float) -> None:
    overlaps = []
    for seed in range(12):
        place = np.random.default_rng(seed)
        gt = disc(place.uniform(15, 30), place.uniform(15, 33), place.uniform(6, 12))
        coarse, info = generators(photograph(), gt)[name](gt, place, goal=goal(low, high))
        assert info.reached
        overlaps.append(iou(coarse, gt))
    assert low <= np.mean(overlaps) <= high
    assert np.std(overlaps) > 0.01  # spread over the band, not at its end


# --- superpixels


def test_superpixels_cover_the_image() -> None:
    labels = superpixel_labels(photograph(), count=20, compactness=10.0)
    assert labels.shape == SIZE
    assert labels.min() == 0
    assert 5 < len(np.unique(labels)) < 60


def test_label_maps_are_made_once_per_count(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def count_calls(_: NDArray[np.uint8], *, count: int, compactness: float) -> IntArray:
        asked.append((count, compactness))
        return blocks()

    monkeypatch.setattr("refinetool.corrupt.superpixels.superpixel_labels", count_calls)
    maps = label_maps(photograph(), compactness=7.0)
    for count in (50, 100, 50, 100, 50):
        maps(count)
    assert asked == [(50, 7.0), (100, 7.0)]


def superpixel_on_blocks(gt: BoolArray, seed: int, *, fractions: Sequence[float], low: float, high: float):  # type: ignore[no-untyped-def]
    return superpixel(
        photograph(),
        gt,
        np.random.default_rng(seed),
        goal=goal(low, high),
        labels=lambda _: blocks(),
        counts=(50,),
        compactness=10.0,
        fractions=fractions,
        kernel_px=3,
        iterations=1,
        max_defects=10,
        **WINDOW,
    )


@pytest.mark.parametrize(
    ("fractions", "name"), [((1, 0, 0), "boundary"), ((0, 1, 0), "inner-hole"), ((0, 0, 1), "outer-island")]
)
def test_superpixel_defects_are_where_their_band_is(fractions: tuple[int, int, int], name: str) -> None:
    gt = disc(30, 24, 16)
    core = ndimage.binary_erosion(gt, np.ones((3, 3)), border_value=1)
    grown = ndimage.binary_dilation(gt, np.ones((3, 3)))
    place = {"boundary": grown & ~core, "inner-hole": core, "outer-island": ~grown}[name]
    coarse, info = superpixel_on_blocks(gt, 0, fractions=fractions, low=0.75, high=0.85)
    assert info.reached
    assert set(info.defects) == {name}
    toggled = np.unique(blocks()[coarse != gt])
    assert 1 <= len(toggled) <= len(info.defects)
    for label in toggled:
        assert (place & (blocks() == label)).any()
        assert len(np.unique(coarse[blocks() == label])) == 1


def test_an_attempt_below_the_band_starts_over_from_the_good_mask() -> None:
    """With superpixels of half the image every defect overshoots: no attempt goes on to a second."""
    halves = np.repeat(np.arange(2), SIZE[1] // 2)[None].repeat(SIZE[0], axis=0)
    gt = disc(30, 24, 14)
    _, info = superpixel(
        photograph(),
        gt,
        np.random.default_rng(0),
        goal=goal(0.75, 0.85, tries=5),
        labels=lambda _: halves,
        counts=(50,),
        compactness=10.0,
        fractions=(1, 0, 0),
        kernel_px=3,
        iterations=1,
        max_defects=10,
        **WINDOW,
    )
    assert info.tries > 5  # the superpixels of a window around the object came to its help
    assert info.reached


# --- outlines and morphology


def test_simplified_outlines_keep_holes_and_drop_what_vanishes() -> None:
    ring = disc(30, 24, 20) & ~disc(30, 24, 10)
    redrawn = simplified(ring, np.random.default_rng(0), **OUTLINE)
    assert not redrawn[24, 30]
    assert 0.5 < iou(redrawn, ring) < 1
    speck = disc(5, 5, 2.3)  # its outline has 12 pixels, of which one is kept
    assert (simplified(speck, np.random.default_rng(0), **OUTLINE) == speck).all()
    assert not simplified(ring | speck, np.random.default_rng(0), **OUTLINE)[5, 5]


def test_outlines_with_all_corners_are_the_mask() -> None:
    mask = (disc(20, 24, 12) | disc(50, 20, 8)) & ~disc(20, 24, 5)
    canvas = simplified(mask, np.random.default_rng(0), cut=0.0, keep=1.0, jitter=0.0)
    assert (canvas != mask).sum() <= 4  # one pixel of each outline at most


def test_a_limb_is_cut_where_the_gap_is_narrow() -> None:
    """A square with a thin limb: what is left out is the limb, whose ends are closest."""
    mask = np.zeros((120, 120), np.bool_)
    mask[20:80, 20:80] = True
    mask[80:97, 49:51] = True
    redrawn = [simplified(mask, np.random.default_rng(seed), cut=0.12, keep=1.0, jitter=0.0) for seed in range(10)]
    lost = [mask & ~found for found in redrawn]
    assert all(missing.any() for missing in lost)
    assert np.mean([missing[80:].sum() / mask[80:].sum() for missing in lost]) > 0.3
    assert sum(int(missing[:78].sum()) for missing in lost) == 0


def test_morphology_stops_at_the_first_change_for_a_target_of_one() -> None:
    mask = disc(30, 24, 14)
    coarse, rounds = local_morphology(
        mask, np.random.default_rng(0), overlap=lambda found: iou(found, mask), target=1.0, rounds=250
    )
    assert 1 <= rounds < 250
    one_less, _ = local_morphology(
        mask, np.random.default_rng(0), overlap=lambda found: iou(found, mask), target=1.0, rounds=rounds - 1
    )
    assert (one_less == mask).all()
    assert (coarse != mask).any()


def test_morphology_gives_up_after_its_rounds_for_a_target_of_zero() -> None:
    mask = disc(30, 24, 14)
    _, rounds = local_morphology(
        mask, np.random.default_rng(0), overlap=lambda found: iou(found, mask), target=0.0, rounds=250
    )
    assert rounds == 250


def test_morphology_leaves_tiny_images_alone() -> None:
    mask = np.array([[True, False]])
    coarse, rounds = local_morphology(mask, np.random.default_rng(0), overlap=lambda _: 1.0, target=0.5, rounds=9)
    assert (coarse == mask).all()
    assert rounds == 0


def test_erosion_does_not_start_at_the_rim_of_a_rectangle() -> None:
    """A full image has no edge but the rims of the rectangles: only the pixels that are set to background can grow."""
    full = np.ones((40, 40), np.bool_)
    seeds = 0
    for seed in range(40):
        coarse, _ = local_morphology(full, np.random.default_rng(seed), overlap=lambda _: 1.0, target=0.5, rounds=1)
        holes, count = ndimage.label(~coarse)
        seeds += count
        for part in ndimage.find_objects(holes):
            assert all(side.stop - side.start <= 1 + 3 * 8 for side in part)
    assert seeds > 0


def test_the_noise_band_leaves_the_rest_alone() -> None:
    gt = disc(30, 24, 18)
    coarse, info = noise_band(None, gt, np.random.default_rng(0), goal=goal(0, 1), grid_side=64, factor=8, residue=0.01)
    small = cv2.resize(gt.astype(np.float32), (SIZE[1] // 8, SIZE[0] // 8), interpolation=cv2.INTER_LINEAR)
    band = np.abs(gt - cv2.resize(small, SIZE[::-1], interpolation=cv2.INTER_LINEAR)) >= 0.01
    assert not ((coarse != gt) & ~band).any()
    # N(0, 1) on top of 0 or 1 crosses 0.5 with probability 0.31.
    assert (coarse != gt)[band].mean() == pytest.approx(0.31, abs=0.05)
    assert info.defects == ("noise-band",)


# --- activations


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), void=st.booleans())
def test_overlaps_by_threshold_are_those_of_thresholding(seed: int, void: bool) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.random(SIZE, dtype=np.float32)
    gt = rng.random(SIZE) < 0.3
    ignore = (rng.random(SIZE) < 0.2) & ~gt if void else None
    found = overlap_by_threshold(scores, gt, ignore)
    for n in (0, 40, 80, 160):
        coarse = scores >= THRESHOLDS[n]
        assert found[n] == pytest.approx(iou(coarse if ignore is None else coarse & ~ignore, gt), abs=1e-6)


def test_activations_peak_in_the_object_and_fade_away_from_it() -> None:
    gt = disc(20, 24, 10)
    heat = activation(gt, np.random.default_rng(0), cell_px=8.0, blur=0.7, bias=True, leak=0.0)
    assert heat.dtype == np.float32
    assert heat.min() >= 0
    assert heat.max() == 1
    assert gt.flat[heat.argmax()]
    assert heat[24, 60] < 0.01


@pytest.mark.parametrize(("mode", "sign"), [("under", -1), ("over", 1)])
def test_the_mode_of_an_activation_decides_its_size(mode: str, sign: int) -> None:
    for seed in range(10):
        gt = disc(30, 24, 12)
        coarse, info = activation_map(
            None,
            gt,
            np.random.default_rng(seed),
            goal=goal(0.4, 0.6),
            name="cam-like",
            cell_px=8.0,
            blur=1.0,
            bias=True,
            leak=0.1,
            mode=mode,  # type: ignore[arg-type]
        )
        assert info.reached
        assert info.defects == (f"{mode}-segmented",)
        assert np.sign(int(coarse.sum()) - int(gt.sum())) == sign


def test_the_evidence_of_an_activation_is_above_a_half_in_the_mask() -> None:
    gt = disc(30, 24, 12)
    coarse, info = generators(photograph(), gt)["cam-like"](gt, np.random.default_rng(0), goal=goal(0.4, 0.6))
    assert info.evidence is not None
    assert ((info.evidence >= 0.5) == coarse).all()
    assert info.evidence.min() >= 0
    assert info.evidence.max() <= 1


# --- shapes and compositions


def test_a_partial_mask_is_cut_off_along_a_line() -> None:
    gt = disc(30, 24, 16)
    coarse, info = partial(None, gt, np.random.default_rng(0), goal=goal(0.3, 0.5))
    assert not (coarse & ~gt).any()
    assert info.iou == coarse.sum() / gt.sum()
    # Convex hulls of what is kept and what is lost don't meet, but for the pixels along the cut.
    hulls = [cv2.convexHull(np.argwhere(part).astype(np.int32)) for part in (coarse, gt & ~coarse)]
    shared, _ = cv2.intersectConvexConvex(hulls[0].astype(np.float32), hulls[1].astype(np.float32))
    assert shared < 20


def test_a_merged_neighbour_is_taken_from_its_near_side() -> None:
    gt, neighbour = disc(16, 24, 10), disc(46, 24, 14)
    coarse, info = merge_neighbour(None, gt, np.random.default_rng(0), goal=goal(0.6, 0.7), neighbours=[neighbour])
    assert info.reached
    added = coarse & ~gt
    assert not (added & ~neighbour).any()
    assert np.nonzero(added)[1].mean() < np.nonzero(neighbour)[1].mean() - 4


def test_without_a_neighbour_there_is_nothing_to_merge() -> None:
    gt = disc(16, 24, 10)
    coarse, info = merge_neighbour(None, gt, np.random.default_rng(0), goal=goal(0.6, 0.7), neighbours=[])
    assert (coarse == gt).all()
    assert not info.reached


def test_a_composition_tells_the_overlap_after_each_step() -> None:
    gt = disc(30, 24, 16)
    steps = set()
    for seed in range(20):
        coarse, info = generators(photograph(), gt)["compose"](gt, np.random.default_rng(seed), goal=goal(0.5, 0.8))
        steps.add(len(info.trail))
        assert info.trail[-1] == pytest.approx(info.iou)
        assert info.trail[-1] == iou(coarse, gt)
    assert steps == {1, 2, 3}


# --- lengths


def test_signed_depth_and_radius() -> None:
    mask = disc(30, 24, 14)
    depth = signed_depth(mask)
    assert ((depth > 0) == mask).all()
    assert depth[24, 30] == pytest.approx(14.5, abs=1)
    assert radius(mask) == pytest.approx(15, abs=0.2)


@settings(max_examples=40, deadline=None)
@given(
    place=st.tuples(st.integers(0, 63), st.integers(0, 47), st.floats(0, 40)),
    margin=st.floats(0, 1),
    side=st.integers(1, 200),
)
def test_a_zoom_and_back_is_the_mask(place: tuple[int, int, float], margin: float, side: int) -> None:
    mask = disc(*place)
    zoom = zoom_on(mask, margin=margin, min_side_px=side)
    inside = zoom.enter(mask)
    assert max(inside.shape) >= side
    assert (zoom.leave(inside, mask.shape) == mask).all()
    assert zoom.enter_image(photograph()).shape == (*inside.shape, 3)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0.05, 0.95))
def test_parts_and_holes_are_those_that_scipy_counts(seed: int, share: float) -> None:
    mask = np.random.default_rng(seed).random((12, 14)) < share
    _, parts = ndimage.label(mask, np.ones((3, 3)))
    background, gaps = ndimage.label(~np.pad(mask, 1))
    assert background[0, 0] == 1
    assert count_parts(mask) == (parts, gaps - 1 if mask.any() else 0)


def test_blur_stops_growing_when_it_covers_the_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """A band that no threshold reaches must not make each try costlier than the one before."""
    blurs: list[float] = []
    drawn = activations.activation

    def watched(gt: BoolArray, rng: np.random.Generator, *, cell_px: float, blur: float, **more: Any) -> FloatArray:
        blurs.append(blur * cell_px)
        return drawn(gt, rng, cell_px=cell_px, blur=blur, **more)

    monkeypatch.setattr(activations, "activation", watched)
    gt = np.zeros((40, 60), dtype=np.bool_)
    gt[5:35, 5:55] = True
    unreachable = np.zeros_like(gt)
    unreachable[:, :30] = True  # no mask may lie there, so that the band is out of reach
    goal = Goal(0.95, 0.99, 31, 10, unreachable)
    activations.activation_map(
        None,
        gt,
        np.random.default_rng(0),
        goal=goal,
        name="cam-like",
        cell_px=4.0,
        blur=0.7,
        bias=True,
        leak=0.1,
        mode="either",
    )
    assert len(blurs) == 31
    assert max(blurs) <= activations.WIDEST_BLUR * 60 + 1e-9
