"""Every generator: deterministic, harmless to its input, never a shape or type it was not given, never a crash."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from refinetool.corrupt import (
    MIN_AREA_PX,
    boundary_noise,
    coarse_polygon,
    corrupt,
    grow_or_shrink,
    holes_and_islands,
    leak,
    low_resolution,
    radius,
    shift_and_scale,
    signed_depth,
    superpixel_defects,
    superpixel_labels,
    superpixel_vote,
)
from refinetool.masks import iou
from refinetool.records import BoolArray

PLAIN = (boundary_noise, grow_or_shrink, low_resolution, coarse_polygon, shift_and_scale, holes_and_islands)
SIZE = (48, 64)


def disc(x: float, y: float, r: float) -> BoolArray:
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    inside: BoolArray = (columns - x) ** 2 + (rows - y) ** 2 <= r**2
    return inside


def blocks() -> NDArray[np.int64]:
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    return (rows // 6) * 11 + columns // 6


AWKWARD = {
    "pixel": disc(20, 20, 0.5),
    "full": np.ones(SIZE, np.bool_),
    "at the border": disc(0, 20, 14),
    "two parts": disc(14, 14, 6) | disc(46, 30, 8),
}


@pytest.mark.parametrize("name", AWKWARD)
@pytest.mark.parametrize("generator", PLAIN, ids=lambda generator: generator.__name__)
def test_generators_survive_awkward_masks(generator, name: str) -> None:  # type: ignore[no-untyped-def]
    mask = AWKWARD[name]
    before = mask.copy()
    first, second = (generator(mask, np.random.default_rng(3), 1.0) for _ in range(2))
    assert first.shape == mask.shape
    assert first.dtype == np.bool_
    assert (first == second).all()
    assert (mask == before).all()


@pytest.mark.parametrize("generator", PLAIN, ids=lambda generator: generator.__name__)
def test_generators_change_an_ordinary_mask_but_not_beyond_recognition(generator) -> None:  # type: ignore[no-untyped-def]
    mask = disc(30, 24, 14)
    overlaps = [iou(generator(mask, np.random.default_rng(seed), 1.0), mask) for seed in range(20)]
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


def test_superpixels_cover_the_image() -> None:
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    image = np.stack([rows * 5, columns * 3, rows + columns], axis=2).astype(np.uint8)
    labels = superpixel_labels(image, count=20, compactness=10.0)
    assert labels.shape == SIZE
    assert labels.min() == 0
    assert 5 < len(np.unique(labels)) < 60


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), x=st.integers(5, 60), y=st.integers(5, 44), r=st.integers(4, 20))
def test_corrupt_lands_in_its_band_or_gives_the_closest_attempt(seed: int, x: int, y: int, r: int) -> None:
    mask = disc(x, y, r)
    coarse = corrupt(mask, np.random.default_rng(seed), labels=blocks(), neighbour=~mask, low=0.5, high=0.95, tries=40)
    again = corrupt(mask, np.random.default_rng(seed), labels=blocks(), neighbour=~mask, low=0.5, high=0.95, tries=40)
    assert (coarse == again).all()
    assert coarse.sum() >= MIN_AREA_PX
    assert 0.45 <= iou(coarse, mask) <= 0.97


def test_an_impossible_band_returns_the_closest_attempt() -> None:
    mask = disc(30, 24, 14)
    coarse = corrupt(mask, np.random.default_rng(0), labels=None, neighbour=None, low=0.0, high=0.01, tries=3)
    assert 0.01 < iou(coarse, mask) < 1


def test_signed_depth_and_radius() -> None:
    mask = disc(30, 24, 14)
    depth = signed_depth(mask)
    assert ((depth > 0) == mask).all()
    assert depth[24, 30] == pytest.approx(14.5, abs=1)
    assert radius(mask) == pytest.approx(15, abs=0.2)
