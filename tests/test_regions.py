"""Split-then-merge against Algorithm 1 on full-size masks, and the rules of the merge pixel by pixel."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from scipy import ndimage

from refinetool.masks import bounding_box, encode
from refinetool.records import BoolArray, Box, Region, Sample
from refinetool.regions import NOBODY, Claim, ClassParts, Verdict, merge, outcome_of, split, whole_claim
from refinetool.settings import ExclusiveSettings, SplitSettings

EIGHT = np.ones((3, 3))


def rectangles(size: tuple[int, int], *boxes: Box) -> BoolArray:
    mask = np.zeros(size, dtype=np.bool_)
    for x0, y0, x1, y1 in boxes:
        mask[y0:y1, x0:x1] = True
    return mask


@st.composite
def scattered(draw: st.DrawFn) -> BoolArray:
    """A class mask of up to 12 rectangles on up to 30 x 30 pixels, or of noise."""
    if draw(st.booleans()):
        return draw(arrays(np.bool_, array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=12)))
    height, width = draw(st.integers(1, 30)), draw(st.integers(1, 30))
    corners = st.tuples(
        st.integers(0, width - 1), st.integers(0, height - 1), st.integers(1, 6), st.integers(1, 6)
    ).map(lambda c: (c[0], c[1], c[0] + c[2], c[1] + c[3]))
    return rectangles((height, width), *draw(st.lists(corners, max_size=12)))


def box_area(mask: BoolArray) -> int:
    y, x = np.nonzero(mask)
    return int((y.max() - y.min() + 1) * (x.max() - x.min() + 1))


def slow_sweep_paper(masks: list[BoolArray], ratio: float) -> list[BoolArray]:
    """Algorithm 1 to the letter: pairs of the masks as they came, and everything that hangs together is one."""
    label = list(range(len(masks)))
    for i in range(len(masks)):
        for j in range(i + 1, len(masks)):
            both = box_area(masks[i] | masks[j])
            boxes_fill = box_area(masks[i]) + box_area(masks[j]) > ratio * both
            if boxes_fill and masks[i].sum() + masks[j].sum() > ratio * both:
                old, new = max(label[i], label[j]), min(label[i], label[j])
                label = [new if part == old else part for part in label]
    return [np.any([m for m, part in zip(masks, label, strict=True) if part == n], axis=0) for n in sorted({*label})]


def slow_sweep_relaxed(masks: list[BoolArray], ratio: float) -> list[BoolArray]:
    """The release's: one pass in which region i grows, and what it has swallowed is gone."""
    masks = list(masks)
    i = 0
    while i < len(masks):
        j = i + 1
        while j < len(masks):
            a, b = masks[i], masks[j]
            both = box_area(a | b)
            sparser = min(a.sum() / box_area(a), b.sum() / box_area(b))
            boxes_fill = box_area(a) + box_area(b) > ratio * both
            if boxes_fill and (a.sum() + b.sum()) / both > min(ratio, sparser - 0.1):
                masks[i] = a | masks.pop(j)
            else:
                j += 1
        i += 1
    return masks


def slow_split(class_mask: BoolArray, settings: SplitSettings) -> list[BoolArray]:
    labels, count = ndimage.label(class_mask, structure=EIGHT)
    masks = [labels == n + 1 for n in range(count)]
    masks = [mask for mask in masks if mask.sum() >= settings.min_area_px]
    sweep = slow_sweep_paper if settings.rule == "paper" else slow_sweep_relaxed
    while True:
        parts = sweep(masks, settings.merge_ratio)
        if not settings.fixed_point or len(parts) == len(masks):
            return parts
        masks = parts


def coarse_claims(owner: int, parts: ClassParts) -> list[Claim]:
    claims = [Claim(owner, parts.box(n), parts.crop(n), None) for n in range(len(parts))]
    height, width = parts.size
    return [*claims, Claim(owner, (0, 0, width, height), parts.dropped(), None)]


# --- split


@given(
    scattered(),
    st.builds(
        SplitSettings,
        rule=st.sampled_from(["paper", "relaxed"]),
        merge_ratio=st.sampled_from([0.3, 0.5, 0.7]),
        min_area_px=st.sampled_from([1, 5]),
        fixed_point=st.booleans(),
    ),
)
def test_split_is_algorithm_1_on_full_masks(class_mask: BoolArray, settings: SplitSettings) -> None:
    parts = split(class_mask, settings=settings)
    expected = slow_split(class_mask, settings)
    assert len(parts) == len(expected)
    for n, mask in enumerate(expected):
        np.testing.assert_array_equal(parts.mask(n), mask)
        assert parts.box(n) == bounding_box(mask)
        assert parts.areas[n] == mask.sum()
        x0, y0, x1, y1 = parts.box(n)
        np.testing.assert_array_equal(parts.crop(n), mask[y0:y1, x0:x1])


@given(scattered(), st.sampled_from([1, 2, 5, 1000]))
def test_parts_and_what_was_dropped_make_up_the_mask_without_overlap(class_mask: BoolArray, min_area_px: int) -> None:
    parts = split(class_mask, settings=SplitSettings(min_area_px=min_area_px))
    layers = [parts.mask(n) for n in range(len(parts))] + [parts.dropped()]
    np.testing.assert_array_equal(np.sum(layers, axis=0), class_mask)


def test_only_trivial_components_are_dropped() -> None:
    mask = rectangles((20, 40), (2, 2, 6, 3), (30, 10, 35, 11))  # 4 px and 5 px
    parts = split(mask, settings=SplitSettings(min_area_px=5))
    assert [parts.box(n) for n in range(len(parts))] == [(30, 10, 35, 11)]
    assert bounding_box(parts.dropped()) == (2, 2, 6, 3)


def test_an_empty_class_mask_has_no_parts() -> None:
    parts = split(np.zeros((6, 9), dtype=np.bool_), settings=SplitSettings())
    assert len(parts) == 0
    assert parts.dropped().shape == (6, 9)
    assert not parts.dropped().any()


@pytest.mark.parametrize("rule", ["paper", "relaxed"])
@pytest.mark.parametrize(
    ("gap", "parts"),
    [(1, 1), (9, 1), (10, 1), (19, 1), (20, 2), (21, 2)],  # two 10 x 10 squares fill 200 of 10 * (20 + gap)
)
def test_squares_are_joined_while_they_fill_more_than_half_of_their_box(rule, gap: int, parts: int) -> None:
    mask = rectangles((30, 90), (5, 5, 15, 15), (15 + gap, 5, 25 + gap, 15))
    assert len(split(mask, settings=SplitSettings(rule=rule))) == parts


def test_only_the_relaxed_rule_joins_sparse_components() -> None:
    ring = rectangles((14, 14), (1, 1, 13, 13)) & ~rectangles((14, 14), (2, 2, 12, 12))  # 44 of 144 pixels
    mask = np.hstack([ring, ring])
    assert len(split(mask, settings=SplitSettings(rule="paper"))) == 2
    assert len(split(mask, settings=SplitSettings(rule="relaxed"))) == 1


@pytest.mark.parametrize("order", [1, -1])
def test_the_relaxed_rule_asks_for_the_density_of_the_sparser_half(order: int) -> None:
    ring = rectangles((14, 14), (1, 1, 13, 13)) & ~rectangles((14, 14), (2, 2, 12, 12))
    square = rectangles((14, 14), (2, 1, 12, 13))
    # 120 pixels and the ring's 44 are less than half of the 31 x 12 around both.
    mask = np.hstack([ring, np.zeros((14, 6), np.bool_), square][::order])
    assert len(split(mask, settings=SplitSettings(rule="paper"))) == 2
    assert len(split(mask, settings=SplitSettings(rule="relaxed"))) == 1


def test_collinear_lines_have_boxes_with_an_area() -> None:
    # The release measures the box around both without its last row: an area of 0 to divide by.
    near, far = rectangles((9, 60), (2, 4, 12, 5), (14, 4, 24, 5)), rectangles((9, 60), (2, 4, 12, 5), (40, 4, 50, 5))
    assert len(split(near, settings=SplitSettings())) == 1
    assert len(split(far, settings=SplitSettings())) == 2


def test_diagonal_neighbours_are_one_component() -> None:
    parts = split(np.eye(9, dtype=np.bool_), settings=SplitSettings())
    assert len(parts) == 1
    assert parts.areas.tolist() == [9]


def test_a_thousand_components_split_alike_in_one_look_or_many(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    mask = np.zeros((600, 800), dtype=np.bool_)
    for y in range(0, 600, 20):
        for x in range(0, 800, 20):
            mask[y : y + rng.integers(3, 15), x : x + rng.integers(3, 15)] = True
    parts = split(mask, settings=SplitSettings())
    assert 10 < len(parts) < 1200  # some of the 1200 are joined
    monkeypatch.setattr("refinetool.regions.LOOK_AHEAD", 7)
    np.testing.assert_array_equal(split(mask, settings=SplitSettings()).boxes, parts.boxes)


# --- merge


@st.composite
def label_maps(draw: st.DrawFn) -> np.ndarray:
    """int (H, W) of classes 0..2, -1 background, -2 void, in blocks of several pixels."""
    coarse = draw(arrays(np.int64, array_shapes(min_dims=2, max_dims=2, max_side=7), elements=st.integers(-2, 2)))
    return np.kron(coarse, np.ones((draw(st.integers(1, 3)), draw(st.integers(1, 3))), dtype=np.int64))


@given(label_maps(), st.sampled_from(["paper", "relaxed"]), st.sampled_from([1, 5]))
def test_merging_what_was_split_gives_the_map_back(label_map: np.ndarray, rule, min_area_px: int) -> None:
    settings = SplitSettings(rule=rule, min_area_px=min_area_px)
    claims = [claim for n in range(3) for claim in coarse_claims(n, split(label_map == n, settings=settings))]
    owners = merge(claims, void=label_map == -2, size=label_map.shape)
    np.testing.assert_array_equal(owners, np.where(label_map >= 0, label_map, NOBODY))


@st.composite
def claims_of(draw: st.DrawFn) -> list[Claim]:
    claims = []
    for _ in range(draw(st.integers(0, 6))):
        x0, y0 = draw(st.integers(0, 7)), draw(st.integers(0, 5))
        box = x0, y0, draw(st.integers(x0 + 1, 8)), draw(st.integers(y0 + 1, 6))
        mask = draw(arrays(np.bool_, (box[3] - y0, box[2] - x0)))
        score = draw(st.one_of(st.none(), st.sampled_from([0.0, 0.4, 0.8])))
        claims.append(Claim(draw(st.integers(0, 3)), box, mask, score))
    return claims


@given(claims_of(), st.one_of(st.none(), arrays(np.bool_, (6, 8))))
def test_each_pixel_goes_to_the_surest_of_those_that_claim_it(claims: list[Claim], void: BoolArray | None) -> None:
    owners = merge(claims, void=void, size=(6, 8))
    assert owners.dtype == np.int32
    for y in range(6):
        for x in range(8):
            bids = []
            for turn, claim in enumerate(claims):
                x0, y0, x1, y1 = claim.box
                if x0 <= x < x1 and y0 <= y < y1 and claim.mask[y - y0, x - x0]:
                    coarse = claim.predicted_iou is None
                    bids.append((not coarse, claim.predicted_iou or 0.0, turn, claim.owner))
            nobody = not bids or (void is not None and void[y, x])
            assert owners[y, x] == (NOBODY if nobody else max(bids)[-1])


def test_coarse_parts_lie_below_refined_ones_however_unsure() -> None:
    everywhere = np.ones((4, 4), dtype=np.bool_)
    refined, coarse = Claim(0, (0, 0, 4, 4), everywhere, 0.0), Claim(1, (0, 0, 4, 4), everywhere, None)
    for claims in ([refined, coarse], [coarse, refined]):
        assert (merge(claims, void=None, size=(4, 4)) == 0).all()


def status_of_a_class_alone(coarse: BoolArray, refined: list[BoolArray], *, void: BoolArray | None = None) -> str:
    """The status of the only class of a map, after its parts were refined."""
    sample = Sample(
        "a",
        Path("a.jpg"),
        (coarse.shape[0], coarse.shape[1]),
        (Region(1, 1, encode(coarse)),),
        layout="semantic",
        void=None if void is None else encode(void),
    )
    verdicts = [Verdict(whole_claim(0, mask, predicted_iou=0.9), None, 0.9, 0.5) for mask in refined]
    outcome = outcome_of(sample, verdicts, [], min_left=0.4, exclusive=ExclusiveSettings())
    return outcome.annotations[0].status


def test_parts_of_a_region_do_not_crowd_each_other_out() -> None:
    coarse = rectangles((60, 60), (5, 5, 15, 15), (35, 5, 45, 15), (5, 35, 15, 45))
    whole = rectangles((60, 60), (5, 5, 45, 45))
    assert status_of_a_class_alone(coarse, [whole, whole, whole]) == "refined"


def test_void_crowds_nobody_out_unless_nothing_is_left() -> None:
    coarse, refined = rectangles((40, 40), (18, 5, 22, 35)), rectangles((40, 40), (12, 4, 28, 36))
    beside = rectangles((40, 40), (10, 0, 18, 40), (22, 0, 30, 40))
    assert status_of_a_class_alone(coarse, [refined], void=beside) == "refined"
    assert status_of_a_class_alone(coarse, [beside], void=beside) == "kept:crowded-out"


def test_nothing_claimed_is_background() -> None:
    assert (merge([], void=None, size=(3, 5)) == NOBODY).all()


def test_instances_that_share_a_map_keep_their_pixels_apart() -> None:
    right, grown = rectangles((10, 20), (10, 0, 20, 10)), rectangles((10, 20), (0, 0, 13, 10))
    frame = (0, 0, 20, 10)
    owners = merge([Claim(0, frame, grown, 0.9), Claim(1, frame, right, 0.7)], void=None, size=(10, 20))
    np.testing.assert_array_equal(owners == 0, grown)
    np.testing.assert_array_equal(owners == 1, right & ~grown)


def test_without_splitting_a_class_is_one_part() -> None:
    mask = np.zeros((20, 60), dtype=np.bool_)
    mask[2:8, 2:8] = mask[10:18, 50:58] = True
    mask[0, 30] = True  # too small
    parts = split(mask, settings=replace(SplitSettings(), rule="off"))
    assert len(parts) == 1
    assert parts.box(0) == (2, 2, 58, 18)
    assert parts.areas.tolist() == [36 + 64]
    assert len(split(mask, settings=SplitSettings())) == 2
