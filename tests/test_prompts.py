"""Prompt excavation against slow, obvious implementations and values worked out by hand."""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from refinetool.masks import bounding_box, distance_inside, tight_box
from refinetool.prompts import (
    background_point,
    box_centre,
    deepest_point,
    depth_measure,
    elastic_box,
    excavate,
    expand_boxes,
    gaussian_mask,
    prompt_grid,
    random_point,
    sample_bilinear,
)
from refinetool.records import BoolArray, Box, FloatArray, Point, Size
from refinetool.release_prompts import UNREACHABLE, chamfer_inside, stretch_box
from refinetool.release_prompts import background_point as release_background_point
from refinetool.settings import RELEASE, PromptSettings

PAPER = PromptSettings()
ELASTIC = {"threshold": 0.1, "min_similarity": 0.5, "step": 0.1, "step_px": 10.0}
GAUSSIAN = {"amplitude": 15.0, "span": 4.0, "background": "negative"}


def masks_of(max_side: int) -> st.SearchStrategy[BoolArray]:
    """Masks of random pixels, and the solid shapes that random pixels never make."""
    noise = arrays(np.bool_, array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=max_side))
    return st.one_of(noise, solids(max_side)).filter(lambda mask: bool(mask.any()))


@st.composite
def solids(draw: st.DrawFn, max_side: int) -> BoolArray:
    height, width = draw(st.integers(1, max_side)), draw(st.integers(1, max_side))
    mask = np.zeros((height, width), dtype=np.bool_)
    for _ in range(draw(st.integers(1, 2))):
        y0, x0 = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
        mask[y0 : draw(st.integers(y0 + 1, height)), x0 : draw(st.integers(x0 + 1, width))] = True
    return mask


def rectangle(size: Size, box: Box) -> BoolArray:
    mask = np.zeros(size, dtype=np.bool_)
    mask[box[1] : box[3], box[0] : box[2]] = True
    return mask


def disc(radius: int, margin: int) -> BoolArray:
    y, x = np.indices((2 * (radius + margin) + 1,) * 2) - (radius + margin)
    return np.asarray(x**2 + y**2 < radius**2)


def pixels(mask: BoolArray) -> Iterator[Point]:
    """Mask pixels in row-major order."""
    height, width = mask.shape
    return ((x, y) for y in range(height) for x in range(width) if mask[y, x])


def squared(a: Point, b: Point) -> int:
    return (a[0] - b[0]) ** 2 + (a[1] - b[1]) ** 2


def foreground_point(mask: BoolArray, *, border_is_background: bool) -> Point:
    """The deepest pixel, measured as settings with this rule about the border have it."""
    depth = depth_measure(PromptSettings(border_is_background=border_is_background))
    return deepest_point(mask, tight_box(mask), depth=depth)


def slow_foreground_point(mask: BoolArray, border_is_background: bool) -> Point:
    height, width = mask.shape
    frame = [(x, y) for x in range(-1, width + 1) for y in (-1, height)]
    frame += [(x, y) for y in range(height) for x in (-1, width)]
    background = [*pixels(~mask), *(frame if border_is_background or mask.all() else [])]
    return max(pixels(mask), key=lambda p: min(squared(p, q) for q in background))


def slow_background_point(mask: BoolArray) -> Point | None:
    inside_box = rectangle(mask.shape, tight_box(mask))
    candidates = pixels(inside_box & ~mask)
    return max(candidates, key=lambda p: min(squared(p, q) for q in pixels(mask)), default=None)


# --- points


@given(masks_of(9), st.booleans())
def test_foreground_point_is_the_deepest_pixel(mask: BoolArray, border_is_background: bool) -> None:
    found = foreground_point(mask, border_is_background=border_is_background)
    assert found == slow_foreground_point(mask, border_is_background)


@given(masks_of(9))
def test_background_point_is_the_pixel_of_the_box_farthest_from_the_mask(mask: BoolArray) -> None:
    assert background_point(mask, tight_box(mask)) == slow_background_point(mask)


@given(masks_of(12), st.integers(0, 5), st.integers(0, 5))
def test_points_follow_a_shift(mask: BoolArray, dx: int, dy: int) -> None:
    # A rim of background makes both frames irrelevant.
    here, there = np.pad(mask, 1), np.pad(mask, ((1 + dy, 1), (1 + dx, 1)))
    x, y = foreground_point(here, border_is_background=False)
    assert foreground_point(there, border_is_background=False) == (x + dx, y + dy)
    negative = background_point(here, tight_box(here))
    moved = negative and (negative[0] + dx, negative[1] + dy)
    assert background_point(there, tight_box(there)) == moved


@given(masks_of(12), st.sampled_from([np.fliplr, np.flipud, np.transpose]))
def test_points_lie_as_deep_in_a_turned_mask(mask: BoolArray, turn) -> None:
    def depths(mask: BoolArray) -> tuple[float, float | None]:
        x, y = foreground_point(mask, border_is_background=False)
        negative = background_point(mask, tight_box(mask))
        outside = distance_inside(~mask, border_is_background=False)
        return distance_inside(mask, border_is_background=False)[y, x], negative and outside[negative[::-1]]

    assert depths(turn(mask)) == depths(mask)


def test_a_tie_goes_to_the_first_pixel_in_row_major_order() -> None:
    mask = rectangle((300, 300), (20, 30, 280, 230))  # 260 x 200: 2 rows of 62 pixels are equally deep
    assert np.count_nonzero(distance_inside(mask, False) == 100) == 124
    assert foreground_point(mask, border_is_background=False) == (20 + 99, 30 + 99)


def test_a_mask_cut_by_the_frame_has_its_point_at_the_frame_unless_the_frame_bounds_it() -> None:
    band = rectangle((50, 40), (0, 10, 40, 21))
    assert foreground_point(band, border_is_background=False) == (0, 15)
    assert foreground_point(band, border_is_background=True) == (5, 15)
    corner = rectangle((50, 40), (0, 0, 10, 10))
    assert foreground_point(corner, border_is_background=False) == (0, 0)


@pytest.mark.parametrize("border_is_background", [False, True])
def test_a_full_mask_is_bounded_by_the_frame(border_is_background: bool) -> None:
    full = np.ones((7, 11), dtype=np.bool_)
    assert foreground_point(full, border_is_background=border_is_background) == (3, 3)
    assert background_point(full, (0, 0, 11, 7)) is None


@pytest.mark.parametrize("box", [(3, 4, 4, 5), (0, 2, 9, 3), (2, 0, 3, 9), (2, 2, 7, 6)])
def test_a_mask_that_fills_its_box_has_no_negative_point(box: Box) -> None:
    assert background_point(rectangle((9, 9), box), box) is None


@given(masks_of(6), st.integers(0, 2**32 - 1))
def test_a_random_point_lies_in_the_mask(mask: BoolArray, seed: int) -> None:
    x, y = random_point(mask, rng=np.random.default_rng(seed))
    assert mask[y, x]


def test_random_points_reach_every_pixel_equally() -> None:
    mask = np.array([[1, 0, 1], [0, 1, 1]], dtype=np.bool_)
    rng = np.random.default_rng(0)
    counts = np.zeros(mask.shape)
    for _ in range(4000):
        x, y = random_point(mask, rng=rng)
        counts[y, x] += 1
    assert counts[~mask].sum() == 0
    assert np.abs(counts[mask] / 1000 - 1).max() < 0.1


@pytest.mark.parametrize(("box", "centre"), [((2, 3, 5, 4), (3, 3)), ((2, 3, 6, 7), (3, 4)), ((0, 0, 1, 1), (0, 0))])
def test_box_centre(box: Box, centre: Point) -> None:
    assert box_centre(box) == centre


# --- elastic box


def upsampled(grid: FloatArray, size: Size) -> np.ndarray:
    """The whole map at pixel centres, one axis at a time."""
    for axis in (0, 1):
        cells, pixels_ = grid.shape[axis], size[axis]
        at = (np.arange(pixels_) + 0.5) / pixels_
        centres = (np.arange(cells) + 0.5) / cells
        grid = np.apply_along_axis(lambda line: np.interp(at, centres, line), axis, grid)  # noqa: B023 - used at once
    return grid


def slow_elastic_box(box: Box, similarity: FloatArray, size: Size, rounds: int) -> Box:
    similar = upsampled(similarity, size) > 0.5
    y, x = np.indices(size)
    for _ in range(rounds):
        x0, y0, x1, y1 = box
        step_x = math.floor(min(0.1 * (x1 - x0), 10) + 0.5)
        step_y = math.floor(min(0.1 * (y1 - y0), 10) + 0.5)
        beside, above = (y >= y0) & (y < y1), (x >= x0) & (x < x1)
        strips = {
            "left": beside & (x < x0) & (x >= x0 - step_x),
            "right": beside & (x >= x1) & (x < x1 + step_x),
            "top": above & (y < y0) & (y >= y0 - step_y),
            "bottom": above & (y >= y1) & (y < y1 + step_y),
        }
        grows = {name: strip.any() and (similar & strip).sum() > 0.1 * strip.sum() for name, strip in strips.items()}
        box = (
            max(x0 - step_x, 0) if grows["left"] else x0,
            max(y0 - step_y, 0) if grows["top"] else y0,
            min(x1 + step_x, size[1]) if grows["right"] else x1,
            min(y1 + step_y, size[0]) if grows["bottom"] else y1,
        )
    return box


@st.composite
def boxes_with_similarity(draw: st.DrawFn) -> tuple[Box, FloatArray, Size]:
    height, width = draw(st.integers(1, 60)), draw(st.integers(1, 60))
    x0, y0 = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
    x1, y1 = draw(st.integers(x0 + 1, width)), draw(st.integers(y0 + 1, height))
    shape = draw(array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=6))
    similarity = draw(arrays(np.float32, shape, elements=st.floats(-1, 1, width=32)))
    return (x0, y0, x1, y1), similarity, (height, width)


@given(boxes_with_similarity(), st.integers(1, 3))
def test_elastic_box_equals_a_search_on_the_upsampled_map(case: tuple[Box, FloatArray, Size], rounds: int) -> None:
    box, similarity, size = case
    assume(np.abs(upsampled(similarity, size) - 0.5).min() > 1e-6)  # a pixel on the threshold may fall on either side
    assert elastic_box(box, similarity, size=size, rounds=rounds, **ELASTIC) == slow_elastic_box(
        box, similarity, size, rounds
    )


@given(boxes_with_similarity())
def test_elastic_box_follows_a_mirror(case: tuple[Box, FloatArray, Size]) -> None:
    (x0, y0, x1, y1), similarity, size = case
    assume(np.abs(upsampled(similarity, size) - 0.5).min() > 1e-6)
    a0, b0, a1, b1 = elastic_box((x0, y0, x1, y1), similarity, size=size, rounds=1, **ELASTIC)
    mirrored = (size[1] - x1, y0, size[1] - x0, y1)
    found = elastic_box(mirrored, similarity[:, ::-1], size=size, rounds=1, **ELASTIC)
    assert found == (size[1] - a1, b0, size[1] - a0, b1)


@given(boxes_with_similarity())
def test_bilinear_samples_are_those_of_the_upsampled_map(case: tuple[Box, FloatArray, Size]) -> None:
    (x0, y0, x1, y1), similarity, size = case
    found = sample_bilinear(similarity, (x0, y0, x1, y1), size=size)
    np.testing.assert_allclose(found, upsampled(similarity, size)[y0:y1, x0:x1], atol=1e-6)


@pytest.mark.parametrize(
    ("side", "step"),
    [(4, 0), (5, 1), (14, 1), (15, 2), (35, 4), (94, 9), (95, 10), (100, 10), (170, 10)],
)
def test_a_step_is_a_tenth_of_the_side_and_at_most_ten_pixels(side: int, step: int) -> None:
    box = (100, 100, 100 + side, 100 + side)
    found = elastic_box(box, np.ones((1, 1), dtype=np.float32), size=(400, 400), rounds=1, **ELASTIC)
    assert found == (100 - step, 100 - step, 100 + side + step, 100 + side + step)


def test_a_step_is_cut_at_the_frame() -> None:
    everywhere = np.ones((2, 2), dtype=np.float32)
    assert elastic_box((3, 0, 58, 50), everywhere, size=(60, 60), rounds=1, **ELASTIC) == (0, 0, 60, 55)
    assert elastic_box((0, 0, 60, 60), everywhere, size=(60, 60), rounds=3, **ELASTIC) == (0, 0, 60, 60)


def test_only_a_share_above_the_threshold_moves_an_edge() -> None:
    similarity = np.zeros((40, 40), dtype=np.float32)  # one cell per pixel
    similarity[10:20, 30] = [1, 0, 0, 0, 0, 0, 0, 0, 0, 0]
    box = (20, 10, 30, 20)  # a strip of 1 x 10 pixels on each side
    assert elastic_box(box, similarity, size=(40, 40), rounds=1, **ELASTIC) == box
    similarity[11, 30] = 1
    assert elastic_box(box, similarity, size=(40, 40), rounds=1, **ELASTIC) == (20, 10, 31, 20)


def test_edges_are_tested_on_the_same_box() -> None:
    similarity = np.zeros((40, 40), dtype=np.float32)
    similarity[10:20, 30:32] = 1  # to the right of the box
    similarity[20:22, 30:32] = 1  # below where the box will be, not below where it is
    assert elastic_box((20, 10, 30, 20), similarity, size=(40, 40), rounds=1, **ELASTIC) == (20, 10, 31, 20)


# --- mask prompt


@given(masks_of(8), st.sampled_from(["radial", "distance"]), st.sampled_from(["negative", "zero"]))
@example(np.arange(8)[None] < 7, "distance", "negative")  # so far from the deepest pixel that the lower bound holds
def test_gaussian_mask_is_the_equation_pixel_by_pixel(mask: BoolArray, shape, background) -> None:
    centre = slow_foreground_point(mask, border_is_background=False)
    area = sum(1 for _ in pixels(mask))
    depth = distance_inside(mask, border_is_background=False).astype(float)
    expected = np.zeros(mask.shape) if background == "zero" else np.full(mask.shape, -12.0)
    for x, y in pixels(mask):
        if shape == "radial":
            fade = math.exp(-squared((x, y), centre) / (area * 3))
        else:
            fade = math.exp(-((depth[y, x] - depth.max()) ** 2) / (area / 3))
        expected[y, x] = 12 * max(fade, 1e-6)
    found = gaussian_mask(
        mask, centre, shape=shape, amplitude=12.0, span=3.0, background=background, depth=inner_distance
    )
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def inner_distance(mask: BoolArray) -> FloatArray:
    return distance_inside(mask, border_is_background=False)


@pytest.mark.parametrize(("shape", "rim", "mean"), [("radial", 0.92, 0.96), ("distance", 0.29, 0.57)])
def test_how_far_a_disc_fades(shape, rim: float, mean: float) -> None:
    mask = disc(120, margin=10)
    logits = gaussian_mask(mask, (130, 130), shape=shape, **GAUSSIAN, depth=inner_distance)
    assert logits[mask].max() == 15
    assert logits[mask].min() / 15 == pytest.approx(rim, abs=0.005)
    assert logits[mask].mean() / 15 == pytest.approx(mean, abs=0.005)


def test_with_amplitude_one_and_endless_span_the_mask_prompt_is_the_mask() -> None:
    mask = disc(9, margin=3)
    logits = gaussian_mask(
        mask, (12, 12), shape="radial", amplitude=1.0, span=1e9, background="zero", depth=inner_distance
    )
    np.testing.assert_allclose(logits, mask, atol=1e-6)


def test_parts_far_from_the_point_stay_foreground() -> None:
    """Fifty times the object's size away, a Gaussian is 0 in float32."""
    mask = rectangle((40, 1000), (5, 5, 15, 15)) | rectangle((40, 1000), (980, 5, 990, 15))
    logits = gaussian_mask(mask, (10, 10), shape="radial", **GAUSSIAN, depth=inner_distance)
    np.testing.assert_array_equal(logits > 0, mask)


@pytest.mark.parametrize(
    ("size", "grid"),
    [((375, 500), (375, 500)), ((1024, 700), (1024, 700)), ((3000, 4000), (768, 1024)), ((9000, 1), (1024, 1))],
)
def test_mask_prompts_of_large_views_lie_on_a_coarser_grid(size: Size, grid: Size) -> None:
    assert prompt_grid(size) == grid


@pytest.mark.parametrize("shape", ["radial", "distance"])
def test_a_coarser_grid_holds_the_same_hill(shape) -> None:
    mask = np.zeros((3072, 2048), dtype=np.bool_)
    mask[300:1243, 600:1543] = disc(400, margin=71)
    centre = (600 + 471, 300 + 471)
    logits = gaussian_mask(mask, centre, shape=shape, **GAUSSIAN, depth=inner_distance)
    assert logits.shape == (1024, 683)
    y, x = np.indices(logits.shape) + 0.5
    r = np.hypot(x * 2048 / 683 - 0.5 - centre[0], y * 3 - 0.5 - centre[1])
    assert (logits[r < 398] > 0).all()
    assert (logits[r > 402] == -15).all()
    variance = mask.sum() * 4 if shape == "radial" else mask.sum() / 4
    np.testing.assert_allclose(logits[r < 390], 15 * np.exp(-(r[r < 390] ** 2) / variance), atol=0.2)


@pytest.mark.parametrize("box", [(1000, 500, 1001, 501), (0, 777, 2048, 778), (2047, 0, 2048, 1500)])
def test_thin_masks_survive_on_a_coarser_grid(box: Box) -> None:
    mask = rectangle((1500, 2048), box)
    logits = gaussian_mask(mask, (box[0], box[1]), shape="radial", **GAUSSIAN, depth=inner_distance)
    on = bounding_box(logits > 0)
    assert on == (box[0] // 2, box[1] // 2, (box[2] + 1) // 2, (box[3] + 1) // 2)


# --- all of it


def seeds(masks: BoolArray, *, start: int = 0) -> list[tuple[int, int]]:
    """A seed per mask."""
    return [(7, start + n) for n in range(len(masks))]


@pytest.fixture(scope="module")
def shapes() -> BoolArray:
    """(6, 40, 60): a blob, a full mask, one pixel, a line, a rectangle, a mask cut by the frame."""
    blob = rectangle((40, 60), (5, 5, 30, 20)) | rectangle((40, 60), (25, 15, 45, 35))
    boxes: list[Box] = [(0, 0, 60, 40), (7, 9, 8, 10), (3, 20, 50, 21), (10, 10, 40, 30), (0, 30, 25, 40)]
    return np.stack([blob, *(rectangle((40, 60), box) for box in boxes)])


def test_excavated_prompts_of_every_shape(shapes: BoolArray) -> None:
    prompts = excavate(shapes, settings=PAPER, seeds=seeds(shapes))
    assert prompts.labels.tolist() == [[1, 0], [1, -1], [1, -1], [1, -1], [1, -1], [1, -1]]
    assert prompts.boxes is not None
    assert prompts.masks is not None
    for mask, points, box, logits in zip(shapes, prompts.points, prompts.boxes, prompts.masks, strict=True):
        x, y = points[0].astype(int)
        assert mask[y, x]
        assert tuple(box) == bounding_box(mask)
        assert ((logits > 0) == mask).all()
        assert logits[y, x] == 15
    x, y = prompts.points[0, 1].astype(int)
    assert not shapes[0][y, x]


@pytest.mark.parametrize("point", ["distance", "random", "box-center"])
@pytest.mark.parametrize("release", [False, True])
def test_a_batch_equals_singles(shapes: BoolArray, point, release: bool) -> None:
    chosen = dataclasses.replace(RELEASE.prompts if release else PAPER, point=point, weaken_expanded=True)
    similarity = np.random.default_rng(1).uniform(0, 1, (len(shapes), 5, 7)).astype(np.float32)
    batch = excavate(shapes, settings=chosen, seeds=seeds(shapes))
    batch = expand_boxes(batch, shapes, similarity, settings=chosen)
    for n in range(len(shapes)):
        single = excavate(shapes[n : n + 1], settings=chosen, seeds=seeds(shapes)[n : n + 1])
        single = expand_boxes(single, shapes[n : n + 1], similarity[n : n + 1], settings=chosen)
        for name in ("points", "labels", "boxes", "masks"):
            np.testing.assert_array_equal(getattr(batch.take([n]), name), getattr(single, name))


def test_what_is_switched_off_is_absent(shapes: BoolArray) -> None:
    nothing = PromptSettings(use_point=False, use_negative=False, use_box=False, use_mask=False)
    prompts = excavate(shapes, settings=nothing, seeds=seeds(shapes))
    assert prompts.points.shape == (6, 0, 2)
    assert prompts.labels.shape == (6, 0)
    assert prompts.boxes is None
    assert prompts.masks is None
    similarity = np.ones((len(shapes), 4, 4), dtype=np.float32)
    assert expand_boxes(prompts, shapes, similarity, settings=nothing) is prompts
    mask_only = excavate(shapes, settings=dataclasses.replace(nothing, use_mask=True), seeds=seeds(shapes))
    everything = excavate(shapes, settings=PAPER, seeds=seeds(shapes))
    np.testing.assert_array_equal(mask_only.masks, everything.masks)


@pytest.mark.parametrize(("positive", "negative", "columns"), [(True, False, [1]), (False, True, [0])])
def test_points_that_are_switched_off_take_no_column(
    shapes: BoolArray, positive: bool, negative: bool, columns: list[int]
) -> None:
    chosen = dataclasses.replace(PAPER, use_point=positive, use_negative=negative)
    prompts = excavate(shapes, settings=chosen, seeds=seeds(shapes))
    both = excavate(shapes, settings=PAPER, seeds=seeds(shapes))
    column = [0 if positive else 1]
    assert prompts.labels[0].tolist() == columns
    np.testing.assert_array_equal(prompts.labels, both.labels[:, column])
    np.testing.assert_array_equal(prompts.points, both.points[:, column])


def test_random_points_follow_their_own_seed(shapes: BoolArray) -> None:
    chosen = dataclasses.replace(PAPER, point="random")
    one, other = (excavate(shapes, settings=chosen, seeds=seeds(shapes, start=s)).points[:, 0] for s in (0, 100))
    assert (one != other).any()
    alone = excavate(shapes[3:4], settings=chosen, seeds=[(7, 3)])
    np.testing.assert_array_equal(alone.points[0, 0], one[3])


def test_no_regions_make_no_prompts() -> None:
    prompts = excavate(np.zeros((0, 30, 20), dtype=np.bool_), settings=PAPER, seeds=[])
    assert len(prompts) == 0
    assert prompts.points.shape == (0, 2, 2)
    assert prompts.masks is not None
    assert prompts.masks.shape == (0, 30, 20)


def test_an_empty_mask_may_not_arrive() -> None:
    with pytest.raises(AssertionError, match="empty"):
        excavate(np.zeros((1, 30, 20), dtype=np.bool_), settings=PAPER, seeds=[(0,)])


@pytest.mark.parametrize("weaken", [False, True])
def test_boxes_grow_and_only_their_masks_are_weakened(weaken: bool) -> None:
    masks = np.stack([rectangle((100, 100), (40, 40, 60, 60))] * 2)
    similarity = np.stack([np.zeros((5, 5)), np.ones((5, 5))]).astype(np.float32)
    chosen = PromptSettings(weaken_expanded=weaken)
    tight = excavate(masks, settings=chosen, seeds=seeds(masks))
    wide = expand_boxes(tight, masks, similarity, settings=chosen)
    assert wide.boxes is not None
    assert wide.boxes.tolist() == [[40, 40, 60, 60], [38, 38, 62, 62]]
    assert tight.boxes is not None
    assert tight.boxes.tolist() == [[40, 40, 60, 60]] * 2  # the input is as it was
    assert tight.masks is not None
    assert wide.masks is not None
    assert [logits.max() for logits in wide.masks] == [15, 1 if weaken else 15]
    np.testing.assert_allclose(wide.masks[1] * (15 if weaken else 1), tight.masks[1], rtol=1e-6)


# --- the authors' release


@given(masks_of(9))
def test_chamfer_distance_is_the_shortest_king_s_walk(mask: BoolArray) -> None:
    def walk(p: Point, q: Point) -> float:
        dx, dy = abs(p[0] - q[0]), abs(p[1] - q[1])
        return max(dx, dy) - min(dx, dy) + math.sqrt(2) * min(dx, dy)

    expected = np.zeros(mask.shape)
    for x, y in pixels(mask):
        expected[y, x] = min((walk((x, y), q) for q in pixels(~mask)), default=UNREACHABLE)
    np.testing.assert_allclose(chamfer_inside(mask), expected, rtol=1e-6)


def test_chamfer_distance_overstates_by_eight_percent_at_most() -> None:
    only = np.ones((121, 121), dtype=np.bool_)
    only[60, 60] = False
    ratio = chamfer_inside(only)[only] / distance_inside(only, False)[only]
    assert ratio.min() == pytest.approx(1)
    assert ratio.max() == pytest.approx(1.0824, abs=1e-3)


def test_release_puts_the_negative_at_the_origin_where_the_box_is_full() -> None:
    for box in [(3, 4, 4, 5), (0, 2, 9, 3), (2, 2, 7, 6), (0, 0, 9, 9)]:
        assert release_background_point(rectangle((9, 9), box), box) == (0, 0)


def test_release_does_not_search_the_last_row_and_column_of_the_box() -> None:
    mask = rectangle((20, 20), (5, 5, 15, 6)) | rectangle((20, 20), (5, 5, 6, 15))  # an L: farthest is its open corner
    assert background_point(mask, (5, 5, 15, 15)) == (14, 14)
    assert release_background_point(mask, (5, 5, 15, 15)) == (13, 13)


@pytest.mark.parametrize(
    ("side", "up_left", "down_right"),
    [(35, 4, 3), (9, 1, 0), (40, 4, 4), (150, 10, 10)],
)
def test_release_rounds_its_steps_lopsidedly(side: int, up_left: int, down_right: int) -> None:
    box = (100, 100, 101 + side, 101 + side)  # inclusive corners lie `side` apart
    found = stretch_box(box, np.ones((400, 400), dtype=np.bool_), threshold=0.1, step=0.1, step_px=10.0)
    assert found == (100 - up_left, 100 - up_left, 101 + side + down_right, 101 + side + down_right)


def test_release_cancels_steps_at_the_frame() -> None:
    everywhere = np.ones((60, 60), dtype=np.bool_)
    found = stretch_box((3, 1, 54, 59), everywhere, threshold=0.1, step=0.1, step_px=10.0)
    assert found == (3, 1, 59, 59)  # only the right edge has room
    assert stretch_box((0, 0, 60, 60), everywhere, threshold=0.1, step=0.1, step_px=10.0) == (0, 0, 60, 60)


def test_release_prompts_of_every_shape(shapes: BoolArray) -> None:
    prompts = excavate(shapes, settings=RELEASE.prompts, seeds=seeds(shapes))
    assert (prompts.labels == [1, 0]).all()
    assert (prompts.points[1:, 1] == 0).all()  # none of these boxes has background to its name
    assert (prompts.points[1, 0] == 0).all()  # a full mask is equally deep everywhere
    assert prompts.boxes is not None
    assert prompts.masks is not None
    for mask, box, logits in zip(shapes, prompts.boxes, prompts.masks, strict=True):
        x0, y0, x1, y1 = bounding_box(mask) or (0, 0, 0, 0)
        assert tuple(box) == (x0, y0, x1 - 1, y1 - 1)
        assert logits.max() == 30
        assert (logits[~mask] == -30).all()


@settings(max_examples=30)
@given(st.permutations(range(3)))
def test_release_weakens_each_mask_for_itself(order: list[int]) -> None:
    masks = np.stack([rectangle((80, 80), (30, 30, 50, 50))] * 3)
    similarity = np.stack([np.full((4, 4), value, dtype=np.float32) for value in (0.0, 1.0, 0.0)])[order]
    chosen = RELEASE.prompts
    tight = excavate(masks, settings=chosen, seeds=seeds(masks))
    wide = expand_boxes(tight, masks, similarity, settings=chosen)
    assert wide.masks is not None
    assert [float(logits.max()) for logits in wide.masks] == [1.0 if n == 1 else 30.0 for n in order]
