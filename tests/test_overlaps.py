"""Objects that are made to overlap, to learn from."""

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial import ConvexHull, Delaunay

from refinetool.masks import dilated
from refinetool.records import BoolArray
from refinetool.settings import ArbiterTrainSettings, OverlapSettings
from refinetool.train.arbiter.contests import annotated
from refinetool.train.arbiter.overlaps import convex_hull, overlapping

NOTHING = OverlapSettings(seam_share=0, hull_share=0, whole_share=0)


def stripes(seed: int, count: int = 4) -> list[BoolArray]:
    """Objects side by side, with wavy edges, bool (40, 60)."""
    rng = np.random.default_rng(seed)
    edges = 60 * np.arange(1, count)[:, None] / count + rng.integers(-3, 4, (count - 1, 40))
    labels = (np.arange(60)[None] >= edges[:, :, None]).sum(0)
    return [labels == n for n in range(count)]


def overlapped(objects: list[BoolArray], seed: int, settings: OverlapSettings) -> list[BoolArray]:
    return overlapping(objects, np.random.default_rng(seed), settings=settings)


@given(st.integers(0, 1000), st.integers(2, 5))
def test_objects_only_gain_pixels_of_others(seed: int, count: int) -> None:
    objects = stripes(seed, count)
    found = overlapped(objects, seed, OverlapSettings(whole_share=0.5))
    for before, after in zip(objects, found[:count], strict=True):
        assert (after | before).sum() == after.sum()
    for whole in found[count:]:
        parts = [part for part in objects if (part & whole).any()]
        assert len(parts) > 1
        assert np.array_equal(whole, np.logical_or.reduce(parts))


def test_no_share_changes_nothing() -> None:
    objects = stripes(0)
    assert all(map(np.array_equal, overlapped(objects, 0, NOTHING), objects))


def test_a_seam_lies_along_the_contact() -> None:
    objects = stripes(1)
    seams = replace(NOTHING, seam_share=1, taken_share=1, seam_width=0)
    for before, after in zip(objects, overlapped(objects, 0, seams), strict=True):
        assert np.array_equal(after, dilated(before, radius_px=1))


def test_a_wider_seam_is_wider() -> None:
    objects = stripes(1)
    gained = [
        np.sum(overlapped(objects, 0, replace(NOTHING, seam_share=1, taken_share=1, seam_width=width)))
        for width in (0.02, 0.2)
    ]
    assert gained[1] > gained[0] > np.sum(objects)


def test_an_object_is_drawn_through_what_stands_before_it() -> None:
    before = np.zeros((40, 60), np.bool_)
    before[10:30, 25:32] = True
    behind = np.zeros_like(before)
    behind[15:25, 10:50] = True
    filled, front = overlapped([behind & ~before, before], 0, replace(NOTHING, hull_share=1, taken_share=1))
    assert np.array_equal(filled, behind)
    assert np.array_equal(front, before)


def test_neighbours_that_are_not_taken_are_left() -> None:
    objects = stripes(2)
    none_taken = replace(NOTHING, seam_share=0.5, hull_share=0.5, taken_share=0)
    assert all(map(np.array_equal, overlapped(objects, 0, none_taken), objects))


@given(st.integers(0, 1000))
def test_a_hull_is_that_of_another_library(seed: int) -> None:
    points = np.random.default_rng(seed).integers(2, 28, (6, 2))
    points = np.concatenate((points, [[5, 5], [20, 7], [9, 24]]))
    mask = np.zeros((30, 30), np.bool_)
    mask[points[:, 1], points[:, 0]] = True
    triangles = Delaunay(points[ConvexHull(points).vertices])
    every = np.argwhere(np.ones_like(mask))[:, ::-1]
    inside = (triangles.find_simplex(every) >= 0).reshape(mask.shape)
    found = convex_hull(mask)
    assert not (inside & ~found).any()
    assert not (found & ~dilated(inside, radius_px=1)).any()  # OpenCV also fills the pixels that an edge crosses


def test_a_disc_is_round() -> None:
    mask = np.zeros((31, 31), np.bool_)
    mask[15, 15] = True
    y, x = np.mgrid[:31, :31]
    distance = np.hypot(y - 15, x - 15)
    for radius in (0, 1, 3, 8):
        grown = dilated(mask, radius_px=radius)
        assert grown[distance <= radius - 0.5].all()
        assert not grown[distance > radius + 0.5].any()


def test_images_are_annotated_with_and_without_overlaps_and_gaps() -> None:
    objects = stripes(3, 5)

    def shown(seed: int, made: bool, sparse: float) -> list[BoolArray]:
        settings = ArbiterTrainSettings(sparse_share=sparse)
        return annotated(objects, np.random.default_rng(seed), made=made, settings=settings)

    assert all(map(np.array_equal, shown(0, False, 0), objects))
    assert any(np.sum(shown(seed, True, 0)) > np.sum(objects) for seed in range(3))
    counts = [len(shown(seed, False, 1)) for seed in range(50)]
    assert min(counts) < 5 == max(counts)
    assert 0.6 < np.mean(counts) / 5 < 0.8
