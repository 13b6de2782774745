"""The guided filter against least squares in every window, and what snapping is for: borders move onto edges."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from refinetool import masks
from refinetool.post import snap
from refinetool.records import BoolArray, ImageArray


def filtered_by_least_squares(
    image: ImageArray, values: NDArray[np.float64], radius_px: int, epsilon: float
) -> NDArray[np.float64]:
    """The definition, slowly: ridge regression of the values on the colours in every window, then averaged.

    In each window minimise sum((slope . colour + offset - value)^2 + epsilon * |slope|^2).
    """
    height, width = values.shape
    colours = image.reshape(height, width, 3) / 255.0
    total, seen = np.zeros((height, width)), np.zeros((height, width))
    for y in range(height):
        for x in range(width):
            window = (
                slice(max(0, y - radius_px), y + radius_px + 1),
                slice(max(0, x - radius_px), x + radius_px + 1),
            )
            inside, target = colours[window].reshape(-1, 3), values[window].reshape(-1)
            n = len(target)
            design = np.vstack([np.hstack([inside, np.ones((n, 1))]), np.sqrt(n * epsilon) * np.eye(3, 4)])
            solution = np.linalg.lstsq(design, np.concatenate([target, np.zeros(3)]), rcond=None)[0]
            total[window] += colours[window] @ solution[:3] + solution[3]
            seen[window] += 1
    return total / seen


def disc(height: int, width: int, centre: tuple[float, float], radius: float) -> BoolArray:
    ys, xs = np.mgrid[:height, :width]
    return np.hypot(xs - centre[0], ys - centre[1]) <= radius


def photograph(height: int, width: int, seed: int) -> ImageArray:
    """Smooth blobs of colour with a little noise: what natural images are to the filter."""
    rng = np.random.default_rng(seed)
    ys, xs = np.mgrid[:height, :width] / 16
    waves = [np.sin(xs * a + ys * b + c) for a, b, c in rng.uniform(-1, 1, (3, 3)) * 4]
    noise = rng.normal(0, 4, (height, width, 3))
    return np.clip(np.stack(waves, axis=-1) * 80 + 128 + noise, 0, 255).astype(np.uint8)


@settings(deadline=None, max_examples=25)
@given(
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    radius_px=st.integers(1, 6),
    epsilon=st.sampled_from([1e-4, 1e-2]),
    seed=st.integers(0, 10_000),
)
def test_the_filter_is_least_squares_in_every_window(
    height: int, width: int, radius_px: int, epsilon: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    values = rng.random((height, width))
    filtered = snap.guided_filter(image, values, radius_px=radius_px, epsilon=epsilon)
    expected = filtered_by_least_squares(image, values, radius_px, epsilon)
    np.testing.assert_allclose(filtered, expected, atol=1e-8)


def test_a_flat_image_leaves_a_smooth_mask_as_it_is() -> None:
    mask = disc(80, 90, (44, 38), 25)
    flat = np.full((80, 90, 3), 77, dtype=np.uint8)
    snapped = snap.guided_snap(flat, mask, radius_share=0.1, epsilon=1e-4)
    assert masks.iou(snapped, mask) > 0.98


def two_colours(thing: BoolArray) -> ImageArray:
    return np.where(thing[..., None], np.uint8([180, 90, 40]), np.uint8([60, 110, 160]))


@pytest.mark.parametrize("shift_px", [-3, -1, 1, 3])
def test_a_straight_border_moves_exactly_onto_a_colour_edge(shift_px: int) -> None:
    columns = np.broadcast_to(np.arange(80), (60, 80))
    thing, coarse = columns < 40, columns < 40 + shift_px
    snapped = snap.guided_snap(two_colours(thing), coarse, radius_share=0.3, epsilon=1e-4)
    np.testing.assert_array_equal(snapped, thing)


def test_a_shifted_object_loses_most_of_its_error() -> None:
    thing = disc(90, 100, (50, 45), 22)
    coarse = np.roll(thing, (2, -3), axis=(0, 1))
    snapped = snap.guided_snap(two_colours(thing), coarse, radius_share=0.3, epsilon=1e-4)
    assert np.count_nonzero(snapped ^ thing) < 0.2 * np.count_nonzero(coarse ^ thing)


@pytest.mark.parametrize(
    "mask",
    [
        disc(120, 150, (70, 60), 14),
        disc(120, 150, (0, 0), 20),
        disc(120, 150, (149, 60), 9),
        np.eye(120, 150, dtype=np.bool_),
        np.ones((120, 150), dtype=np.bool_),
    ],
    ids=["inside", "corner", "right edge", "diagonal", "everything"],
)
@pytest.mark.parametrize("radius_share", [0.1, 0.4])
def test_the_crop_changes_nothing(mask: BoolArray, radius_share: float) -> None:
    image = photograph(120, 150, 5)
    radius_px = snap.snap_radius(mask, radius_share=radius_share)
    whole = snap.guided_filter(image, mask, radius_px=radius_px, epsilon=1e-4) > 0.5
    cropped = snap.guided_snap(image, mask, radius_share=radius_share, epsilon=1e-4)
    np.testing.assert_array_equal(cropped, whole)


def test_the_reduced_grid_is_close_to_the_full_one(monkeypatch: pytest.MonkeyPatch) -> None:
    image = photograph(600, 700, 1)
    mask = disc(600, 700, (330, 310), 220)
    reduced = snap.guided_snap(image, mask, radius_share=0.35, epsilon=1e-4)
    monkeypatch.setattr(snap, "DENSE_RADIUS_PX", 10_000)
    full = snap.guided_snap(image, mask, radius_share=0.35, epsilon=1e-4)
    assert masks.iou(full, mask) < 0.99, "the filter must have something to do"
    assert masks.iou(reduced, full) > 0.995


def test_the_radius_is_a_share_of_the_disc_of_the_same_area() -> None:
    y, x = np.mgrid[:120, :120]
    assert snap.snap_radius((x - 60) ** 2 + (y - 60) ** 2 <= 50**2, radius_share=0.2) == 10
    assert snap.snap_radius((x == 3) & (y == 4), radius_share=0.2) == 1


def test_an_empty_mask_stays_empty_and_inputs_are_not_modified() -> None:
    image = photograph(20, 30, 2)
    image.setflags(write=False)
    empty = np.zeros((20, 30), dtype=np.bool_)
    empty.setflags(write=False)
    assert not snap.guided_snap(image, empty, radius_share=0.2, epsilon=1e-4).any()
    dot = disc(20, 30, (29, 19), 0)
    dot.setflags(write=False)
    assert snap.guided_snap(image, dot, radius_share=0.2, epsilon=1e-4).shape == (20, 30)


def test_snapping_adds_no_islands_and_no_holes() -> None:
    mask = np.zeros((12, 12), dtype=np.bool_)
    mask[3:9, 3:9] = True
    moved = mask.copy()
    moved[2, 3:9] = True  # the border moved out
    moved[5, 5] = False  # a pinhole inside the mask
    moved[0, 11] = True  # a speck outside it
    moved[8, 8] = False  # the border moved in at a corner
    expected = mask.copy()
    expected[2, 3:9], expected[8, 8] = True, False
    assert (snap.without_new_pieces(moved, mask) == expected).all()


def test_snapping_keeps_the_holes_a_mask_had() -> None:
    mask = np.ones((9, 9), dtype=np.bool_)
    mask[3:6, 3:6] = False
    moved = np.ones((9, 9), dtype=np.bool_)
    moved[4, 4] = False
    assert (snap.without_new_pieces(moved, mask) == moved).all()


def test_a_mask_as_large_as_its_image_takes_little_memory_beside_it() -> None:
    side = 1600
    image = np.full((side, side, 3), 90, dtype=np.uint8)
    mask = np.zeros((side, side), dtype=np.bool_)
    mask[100:-100, 100:-100] = True
    tracemalloc.start()
    snap.guided_filter(image, mask, radius_px=10 * snap.DENSE_RADIUS_PX, epsilon=1e-4)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak / side**2 < 8 * 3  # float64: the result, one slope, and less than that for grid and strips
