"""Views: a crop holds its region and has the shape asked for, and nothing is lost on the way back."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from refinetool.records import Box, Size
from refinetool.settings import ViewSettings
from refinetool.views import View, choose_views, crop_around

DEFAULT = ViewSettings(mode="mixed", margin=0.35, min_side_px=96)


@st.composite
def boxes_in_images(draw: st.DrawFn, max_side: int) -> tuple[Box, Size]:
    height, width = draw(st.integers(1, max_side)), draw(st.integers(1, max_side))
    x0, y0 = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
    return (x0, y0, draw(st.integers(x0 + 1, width)), draw(st.integers(y0 + 1, height))), (height, width)


settings_of_views = st.builds(
    ViewSettings,
    margin=st.sampled_from([0.0, 0.1, 0.35, 1.0]),
    min_side_px=st.sampled_from([1, 96, 200]),
    max_aspect=st.sampled_from([1.0, 2.0, 3.5]),
)


@given(boxes_in_images(600), settings_of_views)
def test_a_crop_is_as_large_and_as_square_as_asked_where_the_image_has_room(
    case: tuple[Box, Size], settings: ViewSettings
) -> None:
    (x0, y0, x1, y1), (height, width) = case
    left, top, right, bottom = crop_around((x0, y0, x1, y1), size=(height, width), settings=settings)
    across, down = right - left, bottom - top
    assert 0 <= left <= x0 < x1 <= right <= width
    assert 0 <= top <= y0 < y1 <= bottom <= height
    for side, box_side, other, limit in ((across, x1 - x0, down, width), (down, y1 - y0, across, height)):
        assert side == limit or side >= settings.min_side_px
        assert side == limit or side >= box_side * (1 + 2 * settings.margin)
        assert side == limit or side * settings.max_aspect >= other
        # Not larger than one of the three asks for.
        grown = math.ceil(box_side * (1 + 2 * settings.margin))
        assert side <= max(grown, settings.min_side_px, math.ceil(other / settings.max_aspect))
    # The box lies in the middle, or the window leans on the frame.
    assert left in (0, width - across) or abs((left + right) - (x0 + x1)) <= 1
    assert top in (0, height - down) or abs((top + bottom) - (y0 + y1)) <= 1


@pytest.mark.parametrize(
    ("box", "window"),
    [
        ((400, 300, 500, 400), (365, 265, 535, 435)),  # 100 + 2 * 35
        ((400, 300, 420, 310), (362, 257, 458, 353)),  # at least 96
        ((300, 200, 700, 220), (160, 40, 840, 380)),  # 680 wide, so 340 high
        ((0, 0, 100, 100), (0, 0, 170, 170)),  # shifted, not shrunk
        ((950, 700, 1000, 750), (904, 654, 1000, 750)),
        ((0, 100, 1000, 700), (0, 0, 1000, 750)),  # all the image there is
    ],
)
def test_worked_crops(box: Box, window: Box) -> None:
    assert crop_around(box, size=(750, 1000), settings=DEFAULT) == window


@given(boxes_in_images(12), st.data())
def test_masks_come_back_from_a_view_as_they_went_in(case: tuple[Box, Size], data: st.DataObject) -> None:
    window, size = case
    view = View(window)
    masks = data.draw(arrays(np.bool_, (3, *view.size)))
    pasted = view.paste_masks(masks, size=size)
    assert pasted.shape == (3, *size)
    assert pasted.sum() == masks.sum()
    np.testing.assert_array_equal(view.crop_masks(pasted), masks)
    np.testing.assert_array_equal(view.paste_masks(masks[0], size=size), pasted[0])
    x0, y0, x1, y1 = window
    np.testing.assert_array_equal(pasted[:, y0:y1, x0:x1], masks)


def test_a_view_shows_the_image_within_its_window() -> None:
    image = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    view = View((5, 7, 25, 20))
    shown = view.crop_image(image)
    assert shown.shape == (13, 20, 3)
    assert shown.flags.c_contiguous
    np.testing.assert_array_equal(shown[2, 3], image[9, 8])


FRAME = View((0, 0, 2000, 1000))
SMALL, MIDDLING = (500, 500, 540, 540), (100, 100, 500, 500)  # 1,600 and 160,000 of 2,000,000 pixels


@pytest.mark.parametrize("mode", ["mixed", "frame"])
def test_a_frame_holds_all_regions(mode) -> None:
    found = choose_views(
        [MIDDLING, (0, 0, 9, 900)],
        [160_000, 8_100],
        size=(1000, 2000),
        settings=ViewSettings(mode=mode, margin=0.35, min_side_px=96),
    )
    assert found == [(FRAME, [0, 1])]


def test_frames_hold_everything_and_crops_one_region_each() -> None:
    boxes, areas = [SMALL, MIDDLING], [1_600, 160_000]
    frame, crop = (
        choose_views(
            boxes,
            areas,
            size=(1000, 2000),
            settings=ViewSettings(mode=mode, margin=0.35, min_side_px=96),
        )
        for mode in ("frame", "crop")
    )
    assert frame == [(FRAME, [0, 1])]
    assert crop == [(View((472, 472, 568, 568)), [0]), (View((0, 0, 680, 680)), [1])]


@pytest.mark.parametrize(
    ("area", "size", "cropped"),
    [
        (1_599, (1000, 1600), True),
        (1_600, (1000, 1600), False),  # a thousandth of the image
        (1_400, (1000, 1500), True),
        (1_400, (1000, 1499), False),  # not a large image
    ],
)
def test_mixed_views_crop_small_regions_of_large_images(area: int, size: Size, cropped: bool) -> None:
    found = choose_views([SMALL], [area], size=size, settings=DEFAULT)
    assert (found[0][0].window == (472, 472, 568, 568)) == cropped


def test_small_and_large_regions_of_one_image_get_views_in_the_order_of_the_regions() -> None:
    found = choose_views(
        [MIDDLING, SMALL, MIDDLING, SMALL],
        [160_000, 1_000, 160_000, 1_100],
        size=(1000, 2000),
        settings=DEFAULT,
    )
    assert found == [(FRAME, [0, 2]), (View((472, 472, 568, 568)), [1, 3])]


def test_no_regions_need_no_view() -> None:
    assert choose_views([], [], size=(10, 10), settings=DEFAULT) == []


@pytest.mark.parametrize("box", [(0, 0, 10**400, 10**400), (-(10**9), -5, 10**9, 5), (200, 200, 300, 300)])
def test_only_the_part_of_a_box_inside_the_image_counts(box: tuple[int, int, int, int]) -> None:
    x0, y0, x1, y1 = crop_around(box, size=(120, 160), settings=ViewSettings())
    assert 0 <= x0 < x1 <= 160
    assert 0 <= y0 < y1 <= 120
