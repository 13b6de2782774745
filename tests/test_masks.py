"""Mask algebra against slow, obvious implementations and against pycocotools."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pycocotools import mask as coco_mask
from scipy import ndimage

from refinetool import masks
from refinetool.errors import MaskError
from refinetool.records import BoolArray, IntArray, Rle

settings.register_profile("unhurried", deadline=None)  # a busy machine is no failure
settings.load_profile("unhurried")

any_mask = st.tuples(st.integers(1, 14), st.integers(1, 14)).flatmap(lambda shape: arrays(np.bool_, shape))


@st.composite
def blobs(draw: st.DrawFn) -> BoolArray:
    """Smooth noise over a threshold: parts, holes, thin bridges, touched frames, at sizes of small pictures."""
    seed, height, width = draw(st.integers(0, 2**31)), draw(st.integers(1, 60)), draw(st.integers(1, 60))
    noise = np.random.default_rng(seed).normal(size=(height, width))
    smooth = ndimage.gaussian_filter(noise, draw(st.sampled_from([0.6, 1.5, 4.0])))
    return smooth > np.quantile(smooth, draw(st.floats(0, 1)))


def rasterised(rings: list[IntArray], shape: tuple[int, ...]) -> BoolArray:
    height, width = shape
    if not rings:
        return np.zeros(shape, dtype=bool)
    runs = coco_mask.frPyObjects([ring.ravel().tolist() for ring in rings], height, width)
    return coco_mask.decode(coco_mask.merge(runs)).astype(bool)


def slow_distance(mask: BoolArray, border_is_background: bool) -> np.ndarray:
    field = np.pad(mask, 1) if border_is_background or mask.all() else mask
    offset = (field.shape[0] - mask.shape[0]) // 2
    background = np.argwhere(~field) - offset
    result = np.zeros(mask.shape)
    for y, x in np.argwhere(mask):
        result[y, x] = math.sqrt(((background - (y, x)) ** 2).sum(axis=1).min())
    return result


@given(any_mask)
def test_run_lengths_decode_to_the_mask_they_were_made_from(mask: BoolArray) -> None:
    rle = masks.encode(mask)
    assert rle.size == mask.shape
    assert np.array_equal(masks.decode(rle), mask)
    assert np.array_equal(coco_mask.decode({"size": list(rle.size), "counts": rle.counts}), mask)
    assert masks.area(rle) == mask.sum()


def test_run_lengths_count_columns_from_the_background() -> None:
    rle = masks.encode(np.array([[False, True], [True, True]]))
    uncompressed = coco_mask.frPyObjects({"size": [2, 2], "counts": [1, 3]}, 2, 2)
    assert rle.counts == uncompressed["counts"]


@given(st.one_of(any_mask, blobs()))
def test_run_lengths_are_those_counted_along_columns(mask: BoolArray) -> None:
    expected, lit = [0], False
    for pixel in mask.ravel(order="F"):
        if pixel != lit:
            expected.append(0)
            lit = not lit
        expected[-1] += 1
    assert masks.run_lengths(masks.encode(mask)).tolist() == expected


@pytest.mark.parametrize("counts", [b"52", b"zzzz", b"\xff", b"", b"P", b"TTTTTTTTTTTTTTTTT1", b"L?"])
def test_run_lengths_that_do_not_fit_are_refused(counts: bytes) -> None:
    with pytest.raises(MaskError, match="the run lengths"):
        masks.run_lengths(Rle((3, 4), counts))


@given(st.one_of(any_mask, blobs()))
def test_a_crop_is_the_mask_within_its_box(mask: BoolArray) -> None:
    found = masks.decode_crop(masks.encode(mask))
    if found is None:
        assert not mask.any()
        return
    crop, box = found
    assert box == masks.bounding_box(mask)
    assert np.array_equal(crop, mask[box[1] : box[3], box[0] : box[2]])


@given(arrays(np.bool_, (3, 5, 7)))
def test_union_covers_what_any_mask_covers(stack: BoolArray) -> None:
    joined = masks.union([masks.encode(mask) for mask in stack])
    assert np.array_equal(masks.decode(joined), stack.any(axis=0))


@given(any_mask)
def test_box_is_tight_and_half_open(mask: BoolArray) -> None:
    box = masks.bounding_box(mask)
    if box is None:
        assert not mask.any()
        return
    x0, y0, x1, y1 = box
    assert mask[y0:y1, x0:x1].sum() == mask.sum()
    assert mask[y0].any() and mask[y1 - 1].any() and mask[:, x0].any() and mask[:, x1 - 1].any()


def test_iou_of_worked_masks() -> None:
    left, top = np.zeros((4, 4), dtype=bool), np.zeros((4, 4), dtype=bool)
    left[:, :2] = True
    top[:2] = True
    assert masks.iou(left, top) == 4 / 12
    assert masks.iou(left, np.zeros_like(left)) == 0.0
    assert masks.iou(np.zeros_like(left), np.zeros_like(left)) == 1.0


@given(arrays(np.bool_, (2, 6, 6)))
def test_iou_is_symmetric_and_one_with_itself(pair: BoolArray) -> None:
    a, b = pair
    assert masks.iou(a, b) == masks.iou(b, a)
    assert masks.iou(a, a) == masks.boundary_iou(a, a, 0.02) == 1.0


@pytest.mark.parametrize(("size", "width"), [((480, 640), 16), ((1, 1), 1), ((1080, 1920), 44)])
def test_boundary_width_is_two_percent_of_the_diagonal(size: tuple[int, int], width: int) -> None:
    assert masks.boundary_width(size, 0.02) == width


@given(blobs(), st.integers(1, 6))
def test_boundary_is_mask_minus_repeated_erosion(mask: BoolArray, width_px: int) -> None:
    square = np.ones((3, 3))
    eroded = ndimage.binary_erosion(np.pad(mask, 1), square, iterations=width_px)[1:-1, 1:-1]
    assert np.array_equal(masks.boundary(mask, width_px), mask & ~eroded)


def test_boundary_iou_of_a_worked_shift() -> None:
    a, b = np.zeros((30, 40), dtype=bool), np.zeros((30, 40), dtype=bool)
    a[5:15, 5:15] = True
    b[5:15, 6:16] = True
    # Diagonal 50, width 1: rings of 36 pixels. Rows 5 and 14 share 9 pixels each; the sides meet nowhere else.
    assert masks.boundary_iou(a, b, 0.02) == 18 / (36 + 36 - 18)


@given(blobs(), st.booleans())
@settings(max_examples=40)
def test_distances_on_the_crop_are_those_of_the_whole_image(mask: BoolArray, border_is_background: bool) -> None:
    expected = slow_distance(mask, border_is_background)
    measured = masks.distance_inside(mask, border_is_background)
    assert measured.dtype == np.float32
    np.testing.assert_allclose(measured, expected, atol=1e-4)


def test_the_frame_is_background_only_if_asked() -> None:
    mask = np.zeros((9, 30), dtype=bool)
    mask[:, :20] = True
    assert masks.distance_inside(mask, border_is_background=False)[4, 0] == 20
    assert masks.distance_inside(mask, border_is_background=True)[4, 0] == 1


@pytest.mark.parametrize("border_is_background", [False, True])
def test_a_full_mask_is_deepest_in_its_middle(border_is_background: bool) -> None:
    depth = masks.distance_inside(np.ones((5, 7), dtype=bool), border_is_background)
    assert depth[2, 3] == 3 and depth[0, 0] == 1


@given(blobs())
def test_components_partition_the_mask(mask: BoolArray) -> None:
    parts = masks.components(mask)
    labels, count = ndimage.label(mask, structure=np.ones((3, 3)))
    assert len(parts) == count
    assert np.array_equal(parts.labels, labels)
    for part in range(count):
        alone = labels == part + 1
        assert tuple(parts.boxes[part]) == masks.bounding_box(alone)
        assert parts.areas[part] == alone.sum() == parts.crop(part).sum()


def test_an_empty_mask_has_no_parts() -> None:
    parts = masks.components(np.zeros((3, 4), dtype=bool))
    assert len(parts) == 0 and parts.boxes.shape == (0, 4)


@given(st.one_of(any_mask, blobs()))
@settings(max_examples=200)
def test_outlines_are_rasterised_to_the_mask_unless_it_has_holes(mask: BoolArray) -> None:
    rings = masks.outline(mask)
    height, width = mask.shape
    for ring in rings:
        assert len(ring) >= 4
        assert ring.min() >= 0 and (ring <= (width, height)).all()
        steps = ring - np.roll(ring, 1, axis=0)
        assert ((steps == 0).sum(axis=1) == 1).all(), "every edge is horizontal or vertical"
        assert ((steps[:, 0] == 0) != (np.roll(steps, 1, axis=0)[:, 0] == 0)).all(), "every corner is a turn"
    assert np.array_equal(rasterised(rings, mask.shape), filled(mask))
    assert masks.has_holes(mask) == (filled(mask) != mask).any()


def filled(mask: BoolArray) -> BoolArray:
    return ndimage.binary_fill_holes(mask, structure=np.ones((3, 3)))


@given(any_mask)
def test_outlines_enclose_the_area_of_the_mask(mask: BoolArray) -> None:
    """Shoelace areas, holes counting negative: independent of any rasteriser, exact for masks with holes too."""

    def signed_area(ring: IntArray) -> float:
        (x, y), (next_x, next_y) = ring.T, np.roll(ring, -1, axis=0).T
        return float((x * next_y - next_x * y).sum()) / 2

    assert abs(sum(signed_area(ring) for ring in masks.outline(mask))) == mask.sum()


def test_outline_of_worked_shapes() -> None:
    corner = np.zeros((4, 5), dtype=bool)
    corner[1, 2] = corner[2, 3] = True  # two pixels that touch at (3, 2)
    rings = {frozenset(map(tuple, ring.tolist())) for ring in masks.outline(corner)}
    assert rings == {frozenset({(2, 1), (3, 1), (3, 2), (2, 2)}), frozenset({(3, 2), (4, 2), (4, 3), (3, 3)})}


def test_a_diamond_of_touching_pixels_has_no_hole_but_a_ring_of_pixels_has() -> None:
    diamond = np.array([[0, 1, 0], [1, 0, 1], [0, 1, 0]], dtype=bool)
    ring = np.array([[1, 1, 1], [1, 0, 1], [1, 1, 1]], dtype=bool)
    assert not masks.has_holes(diamond)
    assert masks.has_holes(ring)


@pytest.mark.parametrize(
    "array",
    [
        np.array([[True, False]]),
        np.array([[1, 0]], dtype=np.uint8),
        np.array([[255, 0]], dtype=np.uint8),
        np.array([[1.0, 0.0]]),
        np.array([[1, 0]], dtype=np.int64),
    ],
)
def test_binary_arrays_become_bool(array: np.ndarray) -> None:
    assert masks.as_bool(array, "x").tolist() == [[True, False]]


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.array([[np.nan, 1.0]]), "NaN"),
        (np.array([[0.3, 1.0]]), "0.3"),
        (np.array([[1, 255]], dtype=np.uint8), "both 1 and 255"),
        (np.array([[7]], dtype=np.uint8), "the value 7"),
        (np.array([[-1, 1]]), "the value -1"),
        (np.zeros((2, 2, 3), dtype=bool), r"shape \(2, 2, 3\)"),
        (np.array([["a"]]), "type <U1"),
    ],
)
def test_other_arrays_are_refused_with_a_sentence(array: np.ndarray, words: str) -> None:
    with pytest.raises(MaskError, match=f"^m.npy: .*{words}"):
        masks.as_bool(array, "m.npy")
