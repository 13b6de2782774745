"""Before/after pictures: the right pixels, in the right colours, in the right place."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from refinetool import pictures
from refinetool.records import BoolArray, ImageArray


def grey(height: int, width: int) -> ImageArray:
    return np.full((height, width, 3), 128, dtype=np.uint8)


def rectangle(size: tuple[int, int], box: tuple[int, int, int, int]) -> BoolArray:
    mask = np.zeros(size, dtype=np.bool_)
    x0, y0, x1, y1 = box
    mask[y0:y1, x0:x1] = True
    return mask


def test_outline_runs_along_the_edges_of_the_pixels() -> None:
    mask = rectangle((20, 30), (6, 5, 16, 12))
    picture = pictures.draw(grey(20, 30), mask[None], (0, 0, 30, 20), scale=10, dim=0.5)
    assert picture.shape == (200, 300, 3)
    coloured = (np.abs(picture.astype(int) - pictures.COLOURS[0]).sum(axis=-1)) < 60
    rows, columns = np.nonzero(coloured)
    half = pictures.LINE_PX / 2 + 1
    for found, edge in ((columns.min(), 60), (columns.max(), 160), (rows.min(), 50), (rows.max(), 120)):
        assert abs(found + 0.5 - edge) <= half


def test_inside_keeps_its_brightness_and_outside_is_dimmed() -> None:
    mask = rectangle((20, 30), (6, 5, 16, 12))
    picture = pictures.draw(grey(20, 30), mask[None], (0, 0, 30, 20), scale=10, dim=0.5)
    assert picture[85, 110].tolist() == [128, 128, 128]
    assert picture[10, 10].tolist() == [64, 64, 64]


def test_outline_stands_out_on_any_background() -> None:
    """Beside a line of its own colour there is still the dark halo."""
    mask = rectangle((20, 20), (5, 5, 15, 15))
    background = np.broadcast_to(np.array(pictures.COLOURS[0], dtype=np.uint8), (20, 20, 3))
    picture = pictures.draw(background, mask[None], (0, 0, 20, 20), scale=10, dim=1.0)
    across_the_left_edge = picture[100, 40:60].astype(int).sum(axis=-1)
    assert across_the_left_edge.min() < 0.35 * sum(pictures.COLOURS[0])


def test_regions_keep_their_colours_even_where_one_is_empty() -> None:
    masks = np.stack([np.zeros((20, 20), dtype=np.bool_), rectangle((20, 20), (5, 5, 15, 15))])
    picture = pictures.draw(grey(20, 20), masks, (0, 0, 20, 20), scale=10, dim=1.0)
    flat = {tuple(int(value) for value in pixel) for pixel in picture.reshape(-1, 3)}
    assert pictures.COLOURS[1] in flat
    assert pictures.COLOURS[0] not in flat


def test_window_shows_a_part_of_the_image() -> None:
    image = grey(40, 40)
    image[20:, 20:] = 250
    picture = pictures.draw(image, np.zeros((0, 40, 40), dtype=np.bool_), (20, 20, 40, 30), scale=2, dim=1.0)
    assert picture.shape == (20, 40, 3)
    assert (picture == 250).all()


@given(st.integers(0, 59), st.integers(0, 39), st.integers(1, 40), st.integers(1, 60))
def test_window_lies_in_the_image_and_holds_the_only_change(x: int, y: int, h: int, w: int) -> None:
    coarse = np.zeros((1, 40, 60), dtype=np.bool_)
    refined = coarse.copy()
    refined[0, y, x] = True
    x0, y0, x1, y1 = pictures.most_changed(coarse, refined, size=(h, w))
    assert (x1 - x0, y1 - y0) == (w, h)
    assert 0 <= x0 <= x < x1 <= 60
    assert 0 <= y0 <= y < y1 <= 40


def test_window_prefers_the_larger_change() -> None:
    coarse = np.zeros((2, 100, 100), dtype=np.bool_)
    refined = np.stack([rectangle((100, 100), (5, 5, 9, 9)), rectangle((100, 100), (70, 60, 85, 75))])
    x0, y0, x1, y1 = pictures.most_changed(coarse, refined, size=(30, 30))
    assert x0 <= 70
    assert x1 >= 85
    assert y0 <= 60
    assert y1 >= 75


def test_window_of_an_unchanged_image_is_around_the_regions() -> None:
    masks = rectangle((100, 100), (60, 10, 80, 30))[None]
    assert pictures.most_changed(masks, masks, size=(20, 20)) == (60, 10, 80, 30)
    nothing = np.zeros((0, 100, 100), dtype=np.bool_)
    assert pictures.most_changed(nothing, nothing, size=(20, 20)) == (40, 40, 60, 60)


@pytest.mark.parametrize("size", [(300, 400), (400, 300), (1, 1), (3, 900), (2000, 1500)])
@pytest.mark.parametrize("regions", [0, 1, 11])
def test_panel_takes_any_image(size: tuple[int, int], regions: int) -> None:
    height, width = size
    masks = np.ones((regions, height, width), dtype=np.bool_)
    with_close_up = pictures.panel(grey(*size), masks, ~masks, zoom=3.5)
    without = pictures.panel(grey(*size), masks, ~masks, zoom=None)
    assert with_close_up.dtype == without.dtype == np.uint8
    assert with_close_up.shape[0] > without.shape[0]
    assert max(with_close_up.shape) <= 2 * pictures.TILE_MAX_SIDE_PX + pictures.GAP_PX


def test_panel_shows_coarse_on_the_left_and_refined_on_the_right() -> None:
    size = (200, 200)
    coarse = rectangle(size, (20, 120, 60, 180))[None]
    refined = rectangle(size, (120, 120, 160, 180))[None]
    left, right = np.array_split(pictures.panel(grey(*size), coarse, refined, zoom=None), 2, axis=1)
    colour = np.array(pictures.COLOURS[0])
    for half, lower_x, upper_x in ((left, 0.05, 0.35), (right, 0.55, 0.85)):
        columns = np.nonzero((half == colour).all(axis=-1))[1] / half.shape[1]
        assert columns.size > 0
        assert lower_x < columns.min() < columns.max() < upper_x


def test_panel_leaves_its_input_alone() -> None:
    image, masks = grey(50, 50), rectangle((50, 50), (10, 10, 30, 30))[None]
    image.flags.writeable = masks.flags.writeable = False
    pictures.panel(image, masks, masks, zoom=4)


def test_panel_refuses_masks_of_another_size() -> None:
    with pytest.raises(ValueError, match=r"expected \(1, 50, 50\)"):
        pictures.panel(grey(50, 50), np.ones((1, 50, 50), np.bool_), np.ones((2, 50, 50), np.bool_), zoom=None)


def test_small_pictures_are_centred_in_a_row_and_in_a_column() -> None:
    small, large = np.zeros((2, 2, 3), dtype=np.uint8), np.full((6, 6, 3), 255, dtype=np.uint8)
    row = pictures.beside([small, large])
    assert row.shape == (6, 8 + pictures.GAP_PX, 3)
    assert (row[2:4, :2] == 0).all()
    assert (row[0, 0] == pictures.PAPER).all()
    assert np.array_equal(pictures.stack([small, large]), row.transpose(1, 0, 2))
