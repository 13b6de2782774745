"""Boundary accuracy, J&F, top-1 accuracy and gains against slow definitions and worked values."""

import json
import math
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from pycocotools import mask as coco_mask
from skimage import morphology

from refinetool import masks
from refinetool.errors import DataError, UsageError
from refinetool.evaluate import (
    ClipEvaluator,
    InstanceEvaluator,
    Match,
    Report,
    SelectionEvaluator,
    evaluate,
)
from refinetool.evaluate.boundary_accuracy import compute_boundary_accuracies, compute_radii, find_outline_region
from refinetool.evaluate.clips import compute_contour_f, find_contour
from refinetool.evaluate.evaluators import Metrics, evaluate_all, score_images
from refinetool.evaluate.gains import IOUS, SIDES_PX, GainHistogram
from refinetool.evaluate.shapes import Canvas, make_shape
from refinetool.formats import open_dataset
from refinetool.records import BoolArray, Region, Sample
from refinetool.statuses import Reason


def disc(size: tuple[int, int], x: float, y: float, radius: float) -> BoolArray:
    rows, columns = np.ogrid[: size[0], : size[1]]
    return np.asarray(np.hypot(rows - y, columns - x) <= radius)


def sample(
    key: str, objects: dict[int, BoolArray], *, void: BoolArray | None = None, category: int | None = 1
) -> Sample:
    size = next(iter(objects.values())).shape
    regions = tuple(Region(id=id, category=category, mask=masks.encode(mask)) for id, mask in objects.items())
    return Sample(
        key, Path(f"{key}.jpg"), (size[0], size[1]), regions, void=None if void is None else masks.encode(void)
    )


def value(report: Report, name: str) -> float | None:
    return next(measure.value for measure in report.measures if measure.name == name)


# --- mBA


def radii_by_definition(height: int, width: int) -> list[int]:
    longest = (width + height) / 300
    return [1 + int((longest - 1) / 5 * i) for i in range(5)]


def ellipse_by_definition(radius: int) -> BoolArray:
    """Row by row: as wide as a circle, rounded."""
    kernel = np.zeros((2 * radius + 1, 2 * radius + 1), dtype=np.bool_)
    for dy in range(-radius, radius + 1):
        half = round(math.sqrt(radius * radius - dy * dy))
        kernel[dy + radius, radius - half : radius + half + 1] = True
    return kernel


def accuracy_by_definition(truth: BoolArray, guess: BoolArray, void: BoolArray) -> float | None:
    """Pixel by pixel: near the outline is where the kernel finds both mask and background within the image."""
    height, width = truth.shape
    accuracies = []
    for radius in radii_by_definition(height, width):
        kernel = ellipse_by_definition(radius)
        right = near = 0
        for y in range(height):
            for x in range(width):
                seen = {
                    bool(truth[y + dy, x + dx])
                    for dy in range(-radius, radius + 1)
                    for dx in range(-radius, radius + 1)
                    if kernel[dy + radius, dx + radius] and 0 <= y + dy < height and 0 <= x + dx < width
                }
                if len(seen) == 2 and not void[y, x]:
                    near += 1
                    right += bool(truth[y, x] == guess[y, x])
        if not near:
            return None
        accuracies.append(right / near)
    return sum(accuracies) / 5


def accuracy(truth: BoolArray, guess: BoolArray, void: BoolArray | None = None) -> float | None:
    size = (truth.shape[0], truth.shape[1])
    found = compute_boundary_accuracies(
        *(make_shape(truth, (0, 0), band_px=1), [make_shape(guess, (0, 0), band_px=1)]), size=size, void=void
    )
    return None if found is None else found[0]


@given(size=st.tuples(st.integers(1, 9), st.integers(1, 9)), data=st.data())
def test_boundary_accuracy_equals_its_definition(size: tuple[int, int], data: st.DataObject) -> None:
    truth, guess, void = (data.draw(arrays(np.bool_, size)) for _ in range(3))
    nowhere = np.zeros(size, np.bool_)
    assert accuracy(truth, guess) == pytest.approx(accuracy_by_definition(truth, guess, nowhere))
    truth, guess = truth & ~void, guess & ~void
    assert accuracy(truth, guess, void) == pytest.approx(accuracy_by_definition(truth, guess, void))


@pytest.mark.parametrize("size", [(20, 1400), (1300, 12)])
def test_boundary_accuracy_of_wide_regions(size: tuple[int, int]) -> None:
    """Images so long that the five radii differ, objects that the frame cuts."""
    assert len(set(compute_radii(size))) > 2
    truth = disc(size, 6, 4, 9) | disc(size, size[1] - 2, size[0] - 1, 5)
    guess = disc(size, 8, 4, 9)
    nowhere = np.zeros(size, np.bool_)
    assert accuracy(truth, guess) == pytest.approx(accuracy_by_definition(truth, guess, nowhere))


@pytest.mark.parametrize("size", [(300, 374), (427, 640), (1080, 1920), (2160, 3840), (3, 5)])
def test_radii(size: tuple[int, int]) -> None:
    assert list(compute_radii(size)) == radii_by_definition(*size)
    assert (set(compute_radii(size)) == {1}) == (sum(size) < 675)


@pytest.mark.parametrize("radius", [1, 2, 3, 7, 12])
def test_the_region_is_the_gradient_with_an_ellipse(radius: int) -> None:
    mask = disc((60, 70), 50, 30, 25)
    kernel = ellipse_by_definition(radius)
    grown, shrunk = morphology.dilation(mask, kernel), morphology.erosion(mask, kernel)
    inside = (slice(radius, -radius), slice(radius, -radius))  # skimage has its own idea of what is beyond the frame
    assert np.array_equal(find_outline_region(mask, radius)[inside], (grown & ~shrunk)[inside])


def test_masks_without_an_outline_are_left_out_of_mba() -> None:
    full, square = np.ones((20, 20), np.bool_), disc((20, 20), 8, 8, 4)
    evaluator = InstanceEvaluator(with_coarse=False, boundary_ratio=0.02)
    evaluator.add(
        Match("a", sample("a", {1: full, 2: square, 3: square}), sample("a", {1: full, 2: ~full, 3: square}), None)
    )
    report = evaluator.result()
    assert value(report, "mBA") == 1.0
    assert report.counts["no_outline"] == 2
    nothing = InstanceEvaluator(with_coarse=False, boundary_ratio=0.02)
    nothing.add(Match("a", sample("a", {1: full}), sample("a", {1: full}), None))
    assert value(nothing.result(), "mBA") is None


def test_void_pixels_do_not_count_for_mba() -> None:
    truth, ring = disc((40, 40), 20, 20, 10), disc((40, 40), 20, 20, 13) & ~disc((40, 40), 20, 20, 10)
    evaluator = InstanceEvaluator(with_coarse=False, boundary_ratio=0.02)
    evaluator.add(Match("a", sample("a", {1: truth | ring}), sample("a", {1: truth}, void=ring), None))
    assert value(evaluator.result(), "mBA") == 1.0


# --- figures of objects


def test_global_and_class_iou_are_sums_not_means() -> None:
    """Object 1 (category 7): 100 px, 50 found. Object 2 (7): 4 px, all found. Object 3 (8): 25 px, none found."""
    big, small, other = (np.zeros((30, 30), np.bool_) for _ in range(3))
    big[:10, :10], small[20:22, 20:22], other[25:, 25:] = True, True, True
    half = big.copy()
    half[5:] = False

    def regions(*found: BoolArray) -> Sample:
        kinds = zip((7, 7, 8), found, strict=True)
        return Sample("a", Path("a"), (30, 30), tuple(Region(n, c, masks.encode(m)) for n, (c, m) in enumerate(kinds)))

    evaluator = InstanceEvaluator(with_coarse=False, boundary_ratio=0.02)
    evaluator.add(Match("a", regions(half, small, ~np.ones_like(other)), regions(big, small, other), None))
    report = evaluator.result()
    assert value(report, "IoU") == pytest.approx((0.5 + 1 + 0) / 3)
    assert value(report, "global IoU") == pytest.approx(54 / 129)
    assert value(report, "category mIoU") == pytest.approx((54 / 104 + 0) / 2)
    assert {m.name: m.value for m in report.per_class} == {
        "IoU of category 7": pytest.approx(54 / 104),
        "IoU of category 8": 0.0,
    }


def test_single_pixels_full_frames_and_strips() -> None:
    one = np.zeros((1, 17), np.bool_)
    one[0, 3] = True
    full = np.ones((1, 17), np.bool_)
    for prediction, truth, iou in ((one, one, 1.0), (full, full, 1.0), (one, full, 1 / 17), (~full, full, 0.0)):
        evaluator = InstanceEvaluator(with_coarse=False, boundary_ratio=0.02)
        evaluator.add(Match("a", sample("a", {0: prediction}), sample("a", {0: truth}), None))
        assert value(evaluator.result(), "IoU") == value(evaluator.result(), "boundary IoU") == iou


def test_where_everything_is_void_all_masks_are_empty() -> None:
    full = np.ones((6, 9), np.bool_)
    evaluator = InstanceEvaluator(with_coarse=False, boundary_ratio=0.02)
    evaluator.add(Match("a", sample("a", {1: full}), sample("a", {1: full}, void=full), None))
    report = evaluator.result()
    assert (value(report, "IoU"), value(report, "global IoU"), value(report, "mBA")) == (1.0, None, None)
    assert (report.counts["empty_ground_truth"], report.counts["empty_prediction"]) == (1, 1)


def test_a_mask_is_drawn_once() -> None:
    canvas = Canvas((20, 20), None, 1)
    rle = masks.encode(disc((20, 20), 5, 5, 3))
    assert canvas.get_shape(rle) is canvas.get_shape(rle)


# --- gains


def test_gain_bins() -> None:
    histogram, other = GainHistogram(IOUS), GainHistogram(IOUS)
    for before, after in ((0.45, 0.65), (0.41, 0.51), (1.0, 0.9), (0.7, 0.691)):
        histogram.add(before, before=before, after=after)
    other.add(0.5, before=0.5, after=0.505)
    histogram.merge(other)
    bins = {bin.low: bin for bin in histogram.result()}
    assert [bin.objects for bin in bins.values()] == [0, 2, 1, 0, 1, 0, 0, 1]
    assert bins[0.0].gain is None
    assert bins[0.4].gain == pytest.approx(0.15)
    assert bins[0.4].gain_error == pytest.approx(np.std([0.2, 0.1], ddof=1) / math.sqrt(2))
    assert bins[0.4].before == pytest.approx(0.43)
    assert (bins[0.4].better, bins[0.4].worse) == (1.0, 0.0)
    assert (bins[0.5].better, bins[0.5].worse) == (0.0, 0.0), "0.005 is no notable change"
    assert (bins[0.7].better, bins[0.7].worse) == (0.0, 0.0), "nor is -0.009"
    assert bins[0.5].gain_error is None
    assert bins[0.95].worse == 1.0
    total = histogram.total()
    gains = [0.2, 0.1, -0.1, -0.009, 0.005]
    assert (total.low, total.high, total.objects) == (0.0, 1.0, 5)
    assert (total.gain, total.before) == (pytest.approx(np.mean(gains)), pytest.approx(0.612))
    assert total.gain_error == pytest.approx(np.std(gains, ddof=1) / math.sqrt(5))
    assert (total.better, total.worse) == (0.4, 0.2)


def test_objects_are_binned_by_the_side_of_their_area() -> None:
    histogram = GainHistogram(SIDES_PX)
    for side in (1.0, 15.9, 16.0, 32.0, 96.0, 5000.0):
        histogram.add(side, before=0.0, after=0.0)
    assert [bin.objects for bin in histogram.result()] == [2, 1, 1, 0, 1, 1]
    assert math.isinf(histogram.result()[-1].high)


# --- J and F


def contour_by_definition(mask: BoolArray) -> BoolArray:
    height, width = mask.shape
    edge = np.zeros_like(mask)
    for y in range(height):
        for x in range(width):
            neighbours = [(y, x + 1), (y + 1, x), (y + 1, x + 1)]
            edge[y, x] = any(mask[y, x] != mask[b, a] for b, a in neighbours if b < height and a < width)
    return edge


def f_by_definition(truth: BoolArray, guess: BoolArray) -> float:
    reach = math.ceil(0.008 * math.sqrt(truth.shape[0] ** 2 + truth.shape[1] ** 2))
    ours, theirs = contour_by_definition(guess), contour_by_definition(truth)
    match (bool(theirs.any()), bool(ours.any())):
        case (True, False):
            precision, recall = 1.0, 0.0
        case (False, True):
            precision, recall = 0.0, 1.0
        case (False, False):
            precision, recall = 1.0, 1.0
        case _:
            disk = morphology.disk(reach).astype(bool)
            near_theirs, near_ours = (morphology.dilation(np.pad(e, reach), disk) for e in (theirs, ours))
            crop = (slice(reach, -reach), slice(reach, -reach))
            precision = float((ours & near_theirs[crop]).sum() / ours.sum())
            recall = float((theirs & near_ours[crop]).sum() / theirs.sum())
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@given(size=st.tuples(st.integers(1, 12), st.integers(1, 12)), data=st.data())
def test_f_equals_its_definition(size: tuple[int, int], data: st.DataObject) -> None:
    truth, guess = data.draw(arrays(np.bool_, size)), data.draw(arrays(np.bool_, size))
    assert np.array_equal(find_contour(truth), contour_by_definition(truth))
    assert compute_contour_f(truth, guess) == pytest.approx(f_by_definition(truth, guess))


def test_f_of_larger_masks() -> None:
    size = (120, 170)  # contours may be 2 px apart
    truth = disc(size, 80, 60, 32)
    assert compute_contour_f(truth, truth) == 1.0
    for guess in (disc(size, 82, 60, 32), disc(size, 80, 60, 35), disc(size, 4, 4, 25), disc(size, 90, 60, 24)):
        assert compute_contour_f(truth, guess) == pytest.approx(f_by_definition(truth, guess))
    assert compute_contour_f(truth, disc(size, 80, 60, 27)) == 0.0, "further off than contours may be"


def frame(*objects: Sequence[int]) -> np.ndarray:
    """uint8 (30, 40): objects as (id, x0, x1), 10 rows high."""
    labels = np.zeros((30, 40), dtype=np.uint8)
    for id, x0, x1 in objects:
        labels[10:20, x0:x1] = id
    return labels


def clips(folder: Path, content: dict[str, np.ndarray]) -> Any:
    for key, labels in content.items():
        (folder / key).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(labels).save(folder / f"{key}.png")
    return open_dataset(folder, format="davis", need_images=False)


TRUTH = {
    "a/00": frame((1, 0, 10)),
    "a/01": frame((1, 0, 10), (2, 20, 30)),
    "a/02": frame((1, 0, 10), (2, 20, 30)),
    "a/03": frame((1, 0, 10)),
    "a/04": frame((1, 0, 10)),
    "b/00": frame((1, 5, 15)),
    "b/01": frame((1, 5, 15)),
    "b/02": frame((1, 5, 15)),
}


def test_j_and_f_of_clips(tmp_path: Path) -> None:
    """First and last frames are wrong, which costs nothing."""
    guess = TRUTH | {
        "a/00": frame((1, 20, 40)),
        "a/04": frame(),
        "b/00": frame(),
        "a/01": frame((1, 0, 5), (2, 20, 30)),  # object 1: J 0.5
        "a/02": frame((1, 0, 10)),  # object 2 is lost: J 0
        "a/03": frame((1, 0, 10)),  # object 2 is in neither: J 1
    }
    guess["a/05"] = frame((1, 0, 10))
    report = evaluate(clips(tmp_path / "guess", guess), clips(tmp_path / "truth", TRUTH))
    one, two = (0.5 + 1 + 1) / 3, (1 + 0 + 1) / 3
    assert value(report, "J") == pytest.approx((one + two + 1) / 3)
    f = f_by_definition(TRUTH["a/01"] == 1, guess["a/01"] == 1)
    expected = ((f + 1 + 1) / 3 + (1 + 0 + 1) / 3 + 1) / 3
    assert value(report, "F") == pytest.approx(expected)
    assert value(report, "J&F") == pytest.approx(((one + two + 1) / 3 + expected) / 2)
    assert {name: report.counts[name] for name in ("clips", "clip_objects", "clip_frames_added")} == {
        "clips": 2,
        "clip_objects": 3,
        "clip_frames_added": 1,
    }
    assert "DAVIS" in next(measure.reduction for measure in report.measures if measure.name == "J")


@pytest.mark.parametrize("pattern", ["{:02}", "{}"])
def test_frames_are_in_the_order_of_their_numbers(tmp_path: Path, pattern: str) -> None:
    """The last of eleven frames is wrong, which costs nothing; by its name, `10` would be the third."""
    names = ["c/" + pattern.format(number) for number in range(11)]
    truth = {name: frame((1, 0, 8)) for name in names}
    report = evaluate(clips(tmp_path / "guess", truth | {names[-1]: frame()}), clips(tmp_path / "truth", truth))
    assert value(report, "J") == 1


def test_lvos_counts_what_lies_between_an_objects_first_and_last_frame(tmp_path: Path) -> None:
    """Object 2 of clip a is seen in two frames: none lies between. Object 1 of a: frames 1 to 3; of b: frame 1."""
    guess = TRUTH | {"a/01": frame((1, 0, 5)), "a/00": frame(), "b/02": frame()}
    report = evaluate(clips(tmp_path / "guess", guess), clips(tmp_path / "truth", TRUTH), protocol="lvos")
    assert value(report, "J") == pytest.approx(((0.5 + 1 + 1) / 3 + 1) / 2)
    assert report.counts["clip_objects"] == 2


def test_recall_and_decay_of_clips(tmp_path: Path) -> None:
    """Ten frames, of which eight count: J falls from 1 to 1/4. Quarters share frames at their bounds."""
    names = [f"c/{number:02}" for number in range(10)]
    widths = [8, 8, 8, 6, 6, 4, 4, 2, 2, 8]
    truth = {name: frame((1, 0, 8)) for name in names}
    guess = {name: frame((1, 0, width)) for name, width in zip(names, widths, strict=True)}
    report = evaluate(clips(tmp_path / "guess", guess), clips(tmp_path / "truth", truth))
    scores = [width / 8 for width in widths[1:-1]]
    assert value(report, "J") == pytest.approx(sum(scores) / 8)
    assert value(report, "J recall") == pytest.approx(sum(score > 0.5 for score in scores) / 8)
    # 1 .. 8 in five bounds: 1, 2.75, 4.5, 6.25, 8, rounded to 1, 3, 4 or 5, 6, 8
    assert value(report, "J decay") == pytest.approx(sum(scores[:3]) / 3 - sum(scores[5:]) / 3)
    assert {"F recall", "F decay"} <= {measure.name for measure in report.measures}


def test_each_clip_has_a_row(tmp_path: Path) -> None:
    guess = TRUTH | {"b/01": frame()}
    report = evaluate(clips(tmp_path / "guess", guess), clips(tmp_path / "truth", TRUTH))
    rows = {measure.name: measure.value for measure in report.per_class}
    assert rows == {"J&F of clip a": 1.0, "J&F of clip b": 0.0}


def test_unseen_clips_are_reported_apart_and_averaged(tmp_path: Path) -> None:
    guess = TRUTH | {"b/01": frame(), "a/02": frame((1, 0, 5), (2, 20, 30))}
    files = clips(tmp_path / "guess", guess), clips(tmp_path / "truth", TRUTH)
    plain = evaluate(*files, protocol="lvos")
    report = evaluate(*files, protocol="lvos", unseen=["b"])
    seen, unseen = value(report, "J seen"), value(report, "J unseen")
    assert (seen, unseen) == (pytest.approx(2.5 / 3), 0.0)
    assert value(report, "J") == pytest.approx((seen + unseen) / 2)
    four = [value(report, f"{name} {group}") for name in "JF" for group in ("seen", "unseen")]
    assert value(report, "J&F") == pytest.approx(sum(four) / 4)
    assert not any("seen" in measure.name for measure in plain.measures)
    empty = evaluate(*files, protocol="lvos", unseen=[])
    assert (value(empty, "J&F"), value(empty, "J&F unseen")) == (None, None)


@pytest.mark.parametrize(("names", "has"), [(("00", "01", "02"), True), (("x", "y", "z"), False)])
def test_clips_of_black_and_white_masks_have_j_and_f_too(names: tuple[str, ...], has: bool, tmp_path: Path) -> None:
    for side in ("guess", "truth"):
        for name in names:
            (tmp_path / side / "a").mkdir(parents=True, exist_ok=True)
            Image.fromarray(frame((255, 0, 10))).save(tmp_path / side / "a" / f"{name}.png")
    files = [open_dataset(tmp_path / side, need_images=False) for side in ("guess", "truth")]
    assert {source.format for source in files} == {"masks"}
    assert any(measure.name == "J&F" for measure in evaluate(*files).measures) == has
    assert value(evaluate(*files, protocol="davis"), "J&F") == 1.0


def test_clips_before_and_after(tmp_path: Path) -> None:
    coarse = TRUTH | {"b/01": frame((1, 5, 10))}
    report = evaluate(
        clips(tmp_path / "guess", TRUTH), clips(tmp_path / "truth", TRUTH), coarse=clips(tmp_path / "coarse", coarse)
    )
    region = next(measure for measure in report.measures if measure.name == "J")
    assert (region.value, region.before) == (1.0, pytest.approx((1 + 1 + 0.5) / 3))


def test_frames_that_the_prediction_lacks_count_as_empty(tmp_path: Path) -> None:
    guess = {key: labels for key, labels in TRUTH.items() if key != "b/01"}
    report = evaluate(clips(tmp_path / "guess", guess), clips(tmp_path / "truth", TRUTH))
    assert value(report, "J") == pytest.approx((1 + 1 + 0) / 3)
    assert report.counts["clip_frames_lost"] == 1


def test_frames_whose_ground_truth_cannot_be_read_are_left_out() -> None:
    """Nothing is known about them, so finding an object there is no mistake."""
    evaluator = ClipEvaluator(with_coarse=True, rule="davis")
    for number in range(5):
        key, shown = f"a/{number}", sample(f"a/{number}", {1: disc((30, 40), 15, 15, 8)})
        broken = Sample(key, Path(key), (30, 40), (Region(0, None, None, "unreadable-mask"),))
        evaluator.add(Match(key, shown, broken if number == 2 else shown, shown))
    report = evaluator.result()
    assert (value(report, "J&F"), report.measures[0].before) == (1.0, 1.0)
    assert report.counts["clip_frames_unreadable"] == 1


def test_frames_whose_prediction_cannot_be_read_count_as_empty() -> None:
    shown = sample("a/1", {1: disc((30, 40), 15, 15, 8)})
    broken = Sample("a/1", Path("a/1"), (30, 40), (Region(0, None, None, "unreadable-mask"),))
    evaluator = ClipEvaluator(with_coarse=False, rule="davis")
    for key, prediction in (("a/0", shown), ("a/1", broken), ("a/2", shown)):
        evaluator.add(Match(key, prediction, shown, None))
    assert value(evaluator.result(), "J&F") == 0.0
    assert evaluator.result().counts["clip_frames_lost"] == 1


def test_void_pixels_do_not_count_in_clips() -> None:
    """Object 2 of the prediction lies where nothing is known, so it is not there at all."""
    core, whole = disc((30, 40), 12, 15, 6), disc((30, 40), 12, 15, 9)
    elsewhere = disc((30, 40), 33, 15, 4)
    truth = sample("a/1", {1: core}, void=(whole & ~core) | elsewhere)
    evaluator = ClipEvaluator(with_coarse=False, rule="davis")
    for key in ("a/0", "a/1", "a/2"):
        evaluator.add(Match(key, sample(key, {1: whole, 2: elsewhere}), truth, None))
    report = evaluator.result()
    assert (value(report, "J"), value(report, "F"), report.counts["clip_objects"]) == (1.0, 1.0, 1)


def test_objects_that_the_ground_truth_never_shows_are_an_error(tmp_path: Path) -> None:
    guess = TRUTH | {"b/01": frame((1, 5, 15), (9, 20, 30))}
    files = clips(tmp_path / "guess", guess), clips(tmp_path / "truth", TRUTH)
    with pytest.raises(DataError, match="Clip b: object 9 is in no frame of the ground truth"):
        evaluate(*files)
    assert value(evaluate(*files, protocol="none"), "IoU") == 1.0


def test_frames_of_no_clip_have_no_j_and_f(tmp_path: Path) -> None:
    frames = {key.rpartition("/")[2]: labels for key, labels in TRUTH.items() if key.startswith("a/")}
    report = evaluate(clips(tmp_path / "guess", frames), clips(tmp_path / "truth", frames))
    assert value(report, "IoU") == 1.0
    assert not any(measure.name == "J" for measure in report.measures)


def test_merged_clip_evaluators_equal_one() -> None:
    whole, first, rest = (ClipEvaluator(with_coarse=False, rule="davis") for _ in range(3))
    for number, (key, labels) in enumerate(TRUTH.items()):
        objects = {id: labels == id for id in (1, 2)}
        shifted = {id: np.roll(labels == id, number, axis=1) for id in (1, 2)}
        match = Match(key, sample(key, shifted), sample(key, objects), None)
        whole.add(match)
        (first if number % 2 else rest).add(match)
    first.merge(rest)
    assert first.result() == whole.result()
    assert 0 < (value(whole.result(), "J") or 0) < 1


# --- top-1


def stripes(*widths: int) -> list[BoolArray]:
    return [np.arange(40)[None].repeat(10, axis=0) < width for width in widths]


def candidate_set(id: int, widths: Sequence[int], scores: Sequence[float], selected: int) -> dict[str, Any]:
    runs = [masks.encode(mask) for mask in stripes(*widths)]
    candidates = [{"size": list(rle.size), "counts": rle.counts.decode()} for rle in runs]
    return {"id": id, "selected": selected, "scores": list(scores), "candidates": candidates}


def line(key: str, *sets: dict[str, Any]) -> str:
    return json.dumps({"image": key, "annotations": sets})


# The truth is 20 columns wide, so the IoU of a stripe of w columns is w / 20 or 20 / w; coarse masks are 12 wide.
CANDIDATE_SETS = [
    candidate_set(1, (20, 10, 15, 30), (0.99, 0.5, 0.9, 0.1), 2),  # predicted takes 15, the best; coarse takes 10
    candidate_set(
        2, (10, 25, 16, 5), (0.1, 0.9, 0.8, 0.2), 0
    ),  # predicted takes 25: 0.8, a tie with 16, which coarse takes
    candidate_set(3, (10, 10, 19, 5), (0.1, 0.9, 0.8, 0.2), 1),  # predicted takes 10: wrong, and so does coarse
    candidate_set(
        4, (40, 0, 0, 0), (0.1, 0.9, 0.8, 0.2), 1
    ),  # hopeless: what might have met the truth does not compete
    candidate_set(99, (10, 10, 10, 10), (0.1, 0.9, 0.8, 0.2), 1),  # unknown
]


def selection_match(*, coarse: bool) -> Match:
    truth = sample("a", dict.fromkeys((1, 2, 3, 4), stripes(20)[0]))
    loose = sample("a", dict.fromkeys((1, 2, 3, 4), stripes(12)[0]))
    return Match("a", truth, truth, loose if coarse else None, line("a", *CANDIDATE_SETS))


def test_top_1_accuracy_worked_out_by_hand() -> None:
    evaluator = SelectionEvaluator(with_coarse=True)
    evaluator.add(selection_match(coarse=True))
    report = evaluator.result()
    assert {measure.name: measure.value for measure in report.measures} == {
        "top-1 accuracy, highest predicted IoU": pytest.approx(2 / 3),
        "top-1 accuracy, most like the coarse mask": pytest.approx(1 / 3),
        "top-1 accuracy, by chance": pytest.approx((1 / 3 + 2 / 3 + 1 / 3) / 3),
        "IoU of the candidate, highest predicted IoU": pytest.approx((0.75 + 0.8 + 0.5) / 3),
        "IoU of the candidate, most like the coarse mask": pytest.approx((0.5 + 0.8 + 0.5) / 3),
        "IoU of the candidate, taken by refine": pytest.approx((0.75 + 0.5 + 0.5) / 3),
        "IoU of the candidate, single-mask output": pytest.approx((1 + 0.5 + 0.5) / 3),
        "IoU of the candidate, best there is": pytest.approx((0.75 + 0.8 + 0.95) / 3),
    }
    assert dict(report.counts) == {"selections": 3, "selections_hopeless": 1, "selections_unknown": 1}


def test_without_coarse_masks_there_is_one_criterion() -> None:
    evaluator = SelectionEvaluator(with_coarse=False)
    evaluator.add(selection_match(coarse=False))
    assert not any("coarse" in measure.name for measure in evaluator.result().measures)


def test_merged_selection_evaluators_equal_one() -> None:
    whole, first, rest = (SelectionEvaluator(with_coarse=True) for _ in range(3))
    for evaluator in (whole, whole, first, rest):
        evaluator.add(selection_match(coarse=True))
    first.merge(rest)
    ours, theirs = first.result(), whole.result()
    assert ours.counts == theirs.counts
    assert [m.value for m in ours.measures] == [pytest.approx(m.value) for m in theirs.measures]


def test_the_single_mask_output_is_where_the_file_says() -> None:
    """The last candidate is perfect and scores highest, but it does not compete."""
    truth = sample("a", {1: stripes(20)[0]})
    candidates = candidate_set(1, (10, 15, 20), (0.2, 0.3, 0.9), 0) | {"single": 2}
    evaluator = SelectionEvaluator(with_coarse=False)
    evaluator.add(Match("a", truth, truth, None, line("a", candidates)))
    report = evaluator.result()
    assert value(report, "IoU of the candidate, highest predicted IoU") == 0.75
    assert value(report, "IoU of the candidate, single-mask output") == 1.0


def test_candidates_within_a_millionth_of_the_best_are_as_good() -> None:
    full = np.ones((1200, 1000), np.bool_)
    results = []
    for missing in (1, 2):
        less = full.copy()
        less[0, :missing] = False
        runs = [masks.encode(mask) for mask in (full, full, less)]
        candidates = [{"size": [1200, 1000], "counts": rle.counts.decode()} for rle in runs]
        record = {"id": 1, "selected": 0, "scores": [0.1, 0.2, 0.9], "candidates": candidates}
        evaluator = SelectionEvaluator(with_coarse=False)
        evaluator.add(Match("a", None, sample("a", {1: full}), None, line("a", record)))
        results.append(value(evaluator.result(), "top-1 accuracy, highest predicted IoU"))
    assert results == [1.0, 0.0], "one pixel of 1.2 million is less than a millionth, two are more"


def test_crowds_have_no_candidates() -> None:
    crowd = Region(1, 1, masks.encode(stripes(20)[0]), Reason.CROWD)
    truth = Sample("a", Path("a.jpg"), (10, 40), (crowd,))
    evaluator = SelectionEvaluator(with_coarse=False)
    evaluator.add(Match("a", truth, truth, None, line("a", CANDIDATE_SETS[0])))
    assert evaluator.result().counts == {"selections": 0, "selections_hopeless": 0, "selections_unknown": 1}


def test_void_pixels_do_not_count_for_candidates() -> None:
    truth = sample("a", {1: stripes(20)[0]}, void=stripes(40)[0] & ~stripes(20)[0])
    evaluator = SelectionEvaluator(with_coarse=False)
    evaluator.add(Match("a", truth, truth, None, line("a", candidate_set(1, (5, 40, 10), (0.5, 0.9, 0.1), 0))))
    assert value(evaluator.result(), "IoU of the candidate, highest predicted IoU") == 1.0


@pytest.fixture
def coco(tmp_path: Path) -> Any:
    images = [{"id": number, "file_name": f"{number}.png", "height": 10, "width": 40} for number in (1, 2)]
    runs = masks.encode(stripes(20)[0])
    annotations = [
        {"id": id, "image_id": 1, "category_id": 1, "iscrowd": 0}
        | {"segmentation": {"size": [10, 40], "counts": runs.counts.decode()}, "area": 200}
        for id in (1, 2, 3, 4)
    ]
    path = tmp_path / "truth.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "x"}]}))
    return open_dataset(path, need_images=False)


def test_a_file_of_candidates(tmp_path: Path, coco: Any) -> None:
    path = tmp_path / "candidates.jsonl"
    path.write_text("\n".join([line("7", CANDIDATE_SETS[0]), line("1", *CANDIDATE_SETS), line("2")]) + "\n")
    report = evaluate(coco, coco, candidates=path)
    assert report.counts["selections"] == 3
    assert value(report, "top-1 accuracy, highest predicted IoU") == pytest.approx(2 / 3)
    assert report.counts["selection_images_unknown"] == 1


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "line 1: is no JSON"),
        ("[]", "line 1: expected an object with image and annotations"),
        (f"{line('1')}\n{line('1')}", "line 2: a second record of image '1'"),
        (line("1", {"id": 1}), "expected id, selected, scores and candidates"),
        (line("1", CANDIDATE_SETS[0] | {"scores": [0.1]}), "has 4 candidates, 1 scores, and takes number 2"),
        (line("1", CANDIDATE_SETS[0] | {"selected": 4}), "takes number 4"),
        (line("1", CANDIDATE_SETS[0] | {"single": "x"}), "expected a score for each, and one of them taken"),
        (line("1", CANDIDATE_SETS[0] | {"candidates": [1, 2, 3, 4]}), "candidates that can't be read"),
        (
            line("1", CANDIDATE_SETS[0] | {"candidates": [{"size": [10, 40], "counts": "zz"}] * 4}),
            "candidates that can't be read",
        ),
        (
            line("1", CANDIDATE_SETS[0] | {"candidates": [{"size": [1, 4], "counts": "4"}] * 4}),
            "Image 1: a candidate of object 1 is 4 x 1, its ground truth 40 x 10",
        ),
    ],
)
def test_broken_candidates_are_told_in_a_sentence(tmp_path: Path, coco: Any, text: str, sentence: str) -> None:
    path = tmp_path / "candidates.jsonl"
    path.write_text(text)
    with pytest.raises(DataError, match=sentence):
        evaluate(coco, coco, candidates=path)


def test_candidates_that_are_not_there(tmp_path: Path, coco: Any) -> None:
    with pytest.raises(DataError, match=r"nothing\.jsonl: can't be read"):
        evaluate(coco, coco, candidates=tmp_path / "nothing.jsonl")


def test_class_maps_have_no_candidates(tmp_path: Path) -> None:
    (tmp_path / "SegmentationClass").mkdir()
    Image.fromarray(frame((1, 0, 10))).save(tmp_path / "SegmentationClass" / "a.png")
    opened = open_dataset(tmp_path, format="voc-class", need_images=False)
    (tmp_path / "c.jsonl").write_text("")
    with pytest.raises(UsageError, match="class maps and COCO results have none"):
        evaluate(opened, opened, candidates=tmp_path / "c.jsonl")


def test_results_have_no_candidates(tmp_path: Path, coco: Any) -> None:
    runs = masks.encode(stripes(20)[0])
    result = {"image_id": 1, "category_id": 1, "score": 0.5}
    result |= {"segmentation": {"size": [10, 40], "counts": runs.counts.decode()}}
    (tmp_path / "results.json").write_text(json.dumps([result]))
    (tmp_path / "c.jsonl").write_text("")
    with pytest.raises(UsageError, match="class maps and COCO results have none"):
        evaluate(open_dataset(tmp_path / "results.json", need_images=False), coco, candidates=tmp_path / "c.jsonl")


# --- mask folders


def test_folders_of_one_object_per_image_have_hq_sams_figures(tmp_path: Path) -> None:
    for name, shift in (("truth", 0), ("guess", 3)):
        (tmp_path / name).mkdir()
        for number in range(3):
            mask = disc((40, 60), 20 + shift + number, 20, 12)
            Image.fromarray(mask.astype(np.uint8) * 255).save(tmp_path / name / f"{number}.png")
    files = [open_dataset(tmp_path / name, need_images=False) for name in ("guess", "truth")]
    report = evaluate(*files)
    assert value(report, "mIoU") == value(report, "IoU")
    assert value(report, "mBIoU") == value(report, "boundary IoU")


def test_folders_of_several_objects_have_none() -> None:
    truth = sample("a", {0: disc((9, 9), 2, 2, 1), 1: disc((9, 9), 6, 6, 1)})
    evaluator = InstanceEvaluator(with_coarse=False, boundary_ratio=0.02, folder=True)
    evaluator.add(Match("a", truth, truth, None))
    assert not any(measure.name == "mBIoU" for measure in evaluator.result().measures)
    single = InstanceEvaluator(with_coarse=False, boundary_ratio=0.02, folder=True)
    single.add(Match("b", *(sample("b", {0: disc((9, 9), 2, 2, 1)}) for _ in range(2)), None))
    assert any(measure.name == "mBIoU" for measure in single.result().measures)
    single.merge(evaluator)
    assert not any(measure.name == "mBIoU" for measure in single.result().measures), "images of several objects merge"


# --- processes


def instance_metrics() -> Metrics:
    return Metrics(
        with_coarse=True,
        boundary_ratio=0.02,
        label_maps=False,
        objects=True,
        folder=False,
        clips=None,
        precision=True,
        federation=None,
        selection=False,
    )


def test_processes_and_tasks_change_nothing() -> None:
    rng = np.random.default_rng(0)

    def matches() -> list[Match]:
        found = []
        for number in range(170):
            x, y, radius = rng.uniform(5, 35), rng.uniform(5, 25), rng.uniform(1, 14)
            truth, coarse, refined = (disc((30, 40), x + d, y, radius) for d in (0, 2, 1))
            found.append(Match(str(number), *(sample(str(number), {1: m}) for m in (refined, truth, coarse))))
        return found

    metrics = instance_metrics()
    given_matches, told = matches(), []
    alone, shared = (
        evaluate_all(metrics, iter(given_matches), workers=workers, on_progress=told.append) for workers in (1, 2)
    )
    assert [evaluator.result() for evaluator in alone] == [evaluator.result() for evaluator in shared]
    assert told == [32, 64, 96, 128, 160, 170] * 2


def test_masks_are_forgotten_once_their_image_is_scored() -> None:
    match = Match("a", *(sample("a", {1: disc((30, 40), 15, 15, 8)}) for _ in range(3)))
    InstanceEvaluator(with_coarse=True, boundary_ratio=0.02).add(match)
    assert match.canvases, "the evaluators share them"
    score_images(instance_metrics(), [match])
    assert not match.canvases


def test_a_process_that_dies_is_told_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*_: object) -> None:
        raise BrokenProcessPool

    monkeypatch.setattr("refinetool.evaluate.evaluators.ProcessPoolExecutor.submit", die)
    shown = sample("a", {1: disc((30, 40), 15, 15, 8)})
    many = (Match(str(number), shown, shown, None) for number in range(170))
    with pytest.raises(UsageError, match="could not be started or was killed"):
        evaluate_all(instance_metrics(), many, workers=2, on_progress=lambda _: None)


def test_coco_mask_agrees_on_overlaps() -> None:
    truth, guess = disc((50, 60), 30, 25, 15), disc((50, 60), 34, 25, 15)
    evaluator = InstanceEvaluator(with_coarse=False, boundary_ratio=0.02)
    evaluator.add(Match("a", sample("a", {1: guess}), sample("a", {1: truth}), None))
    runs = [coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8)) for mask in (guess, truth)]
    assert value(evaluator.result(), "global IoU") == pytest.approx(coco_mask.iou(runs[:1], runs[1:], [0])[0, 0])
