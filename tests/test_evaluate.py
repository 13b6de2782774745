"""The evaluation against slow definitions, pycocotools, faster-coco-eval and figures worked out by hand."""

import dataclasses
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from pycocotools import mask as coco_mask
from scipy import ndimage

from refinetool import masks
from refinetool.errors import DataError, UsageError
from refinetool.evaluate import (
    InstanceEvaluator,
    LabelMapEvaluator,
    Match,
    Report,
    evaluate,
    match_images,
    measure_overlaps,
)
from refinetool.formats import open_dataset
from refinetool.records import BoolArray, Region, Sample
from refinetool.statuses import Reason


@dataclass(frozen=True)
class InMemory:
    """A data set that is its samples."""

    content: tuple[Sample, ...]
    format: str = "voc-object"

    def samples(self) -> tuple[Sample, ...]:
        return self.content


def box_mask(x0: int, y0: int, x1: int, y1: int, size: tuple[int, int] = (40, 50)) -> BoolArray:
    mask = np.zeros(size, dtype=np.bool_)
    mask[y0:y1, x0:x1] = True
    return mask


def instances(key: str, objects: dict[int, BoolArray | None], crowd: Sequence[int] = ()) -> Sample:
    size = next((mask.shape for mask in objects.values() if mask is not None), (40, 50))
    regions = [
        Region(
            id=id,
            category=1,
            mask=None if mask is None else masks.encode(mask),
            keep=Reason.CROWD if id in crowd else Reason.UNREADABLE_MASK if mask is None else None,
        )
        for id, mask in objects.items()
    ]
    return Sample(key=key, image=Path(f"{key}.jpg"), size=size, regions=tuple(regions))


def label_map(key: str, labels: np.ndarray) -> Sample:
    regions = tuple(
        Region(id=int(label), category=int(label), mask=masks.encode(labels == label))
        for label in np.unique(labels)
        if label not in (0, 255)
    )
    void = masks.encode(labels == 255) if (labels == 255).any() else None
    size = (labels.shape[0], labels.shape[1])
    return Sample(key=key, image=Path(f"{key}.jpg"), size=size, regions=regions, layout="semantic", void=void)


def figures(report: Report, *names: str) -> dict[str, tuple[float | None, float | None]]:
    """(value, before) by name, of all measures or of those named."""
    found = {measure.name: (measure.value, measure.before) for measure in report.measures}
    assert len(found) == len(report.measures), "names are unique"
    return {name: found[name] for name in names} if names else found


def score(
    prediction: Sequence[Sample], truth: Sequence[Sample], coarse: Sequence[Sample] | None, ratio: float = 0.02
) -> Report:
    return evaluate(
        InMemory(tuple(prediction)),
        InMemory(tuple(truth)),
        coarse=None if coarse is None else InMemory(tuple(coarse)),
        boundary_ratio=ratio,
    )


# --- overlap of two masks


def boundary_by_definition(mask: BoolArray, width_px: int) -> BoolArray:
    """The mask less its erosion by so many steps of a 3 x 3 square, with one row of zeros around the image."""
    padded = np.pad(mask, 1)
    eroded = ndimage.binary_erosion(padded, np.ones((3, 3)), iterations=width_px)
    return (padded & ~eroded)[1:-1, 1:-1]


def iou_by_definition(a: BoolArray, b: BoolArray) -> float:
    pairs = list(zip(a.ravel().tolist(), b.ravel().tolist(), strict=True))
    either = sum(p or q for p, q in pairs)
    return sum(p and q for p, q in pairs) / either if either else 1.0


mask_pairs = st.tuples(st.integers(1, 14), st.integers(1, 14)).flatmap(
    lambda size: st.tuples(arrays(np.bool_, size), arrays(np.bool_, size))
)


@given(pair=mask_pairs, ratio=st.sampled_from([0.02, 0.1, 0.3]))
def test_overlaps_equal_the_definition(pair: tuple[BoolArray, BoolArray], ratio: float) -> None:
    truth, guess = pair
    width_px = max(1, round(ratio * np.hypot(*truth.shape)))
    bands = boundary_by_definition(truth, width_px), boundary_by_definition(guess, width_px)
    (overlap,) = measure_overlaps(truth, [guess], boundary_ratio=ratio)
    assert overlap.iou == iou_by_definition(truth, guess)
    assert overlap.boundary_iou == iou_by_definition(*bands)


@given(pair=mask_pairs)
def test_overlaps_are_symmetric_and_blind_to_flips(pair: tuple[BoolArray, BoolArray]) -> None:
    a, b = pair
    assert measure_overlaps(a, [b], boundary_ratio=0.1) == measure_overlaps(b, [a], boundary_ratio=0.1)
    assert measure_overlaps(a, [b], boundary_ratio=0.1) == measure_overlaps(
        a[::-1, ::-1], [b[::-1, ::-1]], boundary_ratio=0.1
    )
    (own,) = measure_overlaps(a, [a], boundary_ratio=0.1)
    assert (own.iou, own.boundary_iou) == (1.0, 1.0)


def blobs(seed: int, size: tuple[int, int]) -> BoolArray:
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=size), 14)
    return np.asarray(noise > np.quantile(noise, 0.7))


@pytest.mark.parametrize("size", [(240, 320), (333, 200), (427, 640)])
def test_overlaps_equal_pycocotools_and_faster_coco_eval(size: tuple[int, int]) -> None:
    from faster_coco_eval.core import mask as faster_mask

    truth, guess = blobs(1, size), np.roll(blobs(1, size), (3, -5), axis=(0, 1))
    (overlap,) = measure_overlaps(truth, [guess], boundary_ratio=0.02)
    runs = [coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8)) for mask in (truth, guess)]
    assert overlap.iou == pytest.approx(coco_mask.iou(runs[:1], runs[1:], [0])[0, 0], abs=1e-12)
    bands = [faster_mask.rleToBoundary(run, 0.02) for run in runs]
    assert overlap.boundary_iou == pytest.approx(coco_mask.iou(bands[:1], bands[1:], [0])[0, 0], abs=1e-12)


# --- objects


def test_the_means_are_those_worked_out_by_hand() -> None:
    # Truth 10 x 10. Object 1: coarse shifted by 5 columns (50 of 150), refined exact. Object 2: refined loses half.
    truth = instances("7", {1: box_mask(0, 0, 10, 10), 2: box_mask(20, 20, 30, 30)})
    coarse = instances("7", {1: box_mask(5, 0, 15, 10), 2: box_mask(20, 20, 30, 30)})
    refined = instances("7", {1: box_mask(0, 0, 10, 10), 2: box_mask(20, 20, 25, 30)})
    report = score([refined], [truth], [coarse])
    # The band is 1 px wide (0.02 x 64 = 1.28), so the 10 x 10 square's band has 36 px. Shifted by 5: 5 common columns
    # of the top and bottom rows = 10 px of 72 - 10. The left half's band has 26 px, of which its 8 right inner pixels
    # lie inside the square: 18 common of 36 + 26 - 18.
    assert figures(report, "IoU", "boundary IoU", "global IoU", "category mIoU") == {
        "IoU": (pytest.approx((1 + 0.5) / 2), pytest.approx((1 / 3 + 1) / 2)),
        "boundary IoU": (pytest.approx((1 + 18 / 44) / 2), pytest.approx((10 / 62 + 1) / 2)),
        "global IoU": (150 / 200, 150 / 250),
        "category mIoU": (150 / 200, 150 / 250),
    }
    assert (report.better, report.worse) == (0.5, 0.5)
    assert report.gain_error is not None
    assert f"the mean gain of IoU has a standard error of {100 * report.gain_error:.2f}" in report.notes()
    assert report.to_dict()["gain_error"] == report.gain_error
    assert report.counts["scored"] == 2
    assert {measure.reduction for measure in report.measures[:2]} == {"mean over objects"}


def test_what_one_file_lacks_is_counted_and_only_losses_cost() -> None:
    square = box_mask(3, 4, 12, 15)
    truth = [
        instances("a", {1: square, 2: square, 3: square, 4: square, 5: None}, crowd=[4]),
        instances("only truth", {8: square, 9: square}),
    ]
    coarse = [instances("a", {1: square, 2: square, 4: square, 5: square, 77: square})]
    refined = [instances("a", {1: square, 4: square, 6: square}), instances("only refined", {1: square})]
    report = score(refined, truth, coarse)
    assert {name: count for name, count in report.counts.items() if count} == {
        "scored": 2,  # 1 and 2
        "lost": 1,  # 2
        "empty_prediction": 1,  # 2 again
        "missing": 3,  # 3, 8, 9
        "added": 2,  # 6, and the other image's
        "extra": 1,  # 77
        "crowd": 1,  # 4
        "unreadable": 1,  # 5
    }
    assert figures(report)["IoU"] == (0.5, 1.0)


def test_without_coarse_masks_the_prediction_says_what_is_scored() -> None:
    square = box_mask(3, 4, 12, 15)
    report = score([instances("a", {2: square})], [instances("a", {1: square, 2: square})], None)
    assert set(figures(report).values()) == {(1.0, None)}
    assert (report.counts["scored"], report.counts["missing"]) == (1, 1)
    assert (report.better, report.worse) == (None, None)
    assert [(measure.name, measure.value) for measure in report.per_class] == [("IoU of category 1", 1.0)]
    assert report.rows()[0] == ("IoU, mean over objects", "-", "100.00", "-")


def test_empty_masks() -> None:
    square, empty = box_mask(3, 4, 12, 15), np.zeros((40, 50), dtype=np.bool_)
    truth = instances("a", {1: square, 2: empty, 3: empty})
    prediction = instances("a", {1: empty, 2: empty, 3: square})
    report = score([prediction], [truth], None)
    assert figures(report)["IoU"] == (pytest.approx(1 / 3), None)
    assert (report.counts["empty_prediction"], report.counts["empty_ground_truth"]) == (2, 2)


def with_region(sample: Sample, region: Region) -> Sample:
    return dataclasses.replace(sample, regions=(*sample.regions, region))


def test_masks_that_can_not_be_read_score_nothing_in_the_coarse_file_either() -> None:
    empty = instances("a", {1: np.zeros((40, 50), dtype=np.bool_)})
    broken = instances("a", {1: None})
    assert figures(score([broken], [empty], [broken]))["IoU"] == (0.0, 0.0)


def test_what_the_prediction_lost_scores_nothing_even_if_the_ground_truth_is_empty() -> None:
    """An empty mask, be it drawn or left out of the record, is an answer; none at all, or a broken one, is not."""
    square, empty = box_mask(3, 4, 12, 15), np.zeros((40, 50), dtype=np.bool_)
    truth = instances("a", {1: square, 2: empty})
    answers = {
        "empty mask": instances("a", {1: square, 2: empty}),
        "empty record": with_region(instances("a", {1: square}), Region(2, 1, None, "empty")),
        "no record": instances("a", {1: square}),
        "broken record": instances("a", {1: square, 2: None}),
    }
    found = {name: score([answer], [truth], [truth]) for name, answer in answers.items()}
    ious = {name: (figures(report)["IoU"][0], report.counts["lost"]) for name, report in found.items()}
    assert ious == {
        "empty mask": (1.0, 0),
        "empty record": (1.0, 0),
        "no record": (0.5, 1),
        "broken record": (0.5, 1),
    }


def test_tiny_changes_are_neither_better_nor_worse() -> None:
    """100 x 20 px: a column more or less changes the IoU by less than 0.01 twice, by 0.05 in the last object."""
    truth = instances("a", {n: box_mask(0, 0, 110, 20, (20, 120)) for n in (1, 2, 3)})
    ends = {1: (109, 110), 2: (110, 109), 3: (110, 100)}
    coarse, refined = (
        instances("a", {n: box_mask(0, 0, end[k], 20, (20, 120)) for n, end in ends.items()}) for k in (0, 1)
    )
    report = score([refined], [truth], [coarse])
    assert (report.better, report.worse) == (0.0, pytest.approx(1 / 3))


def test_annotation_id_0_is_an_id_like_any_other() -> None:
    square = box_mask(3, 4, 12, 15)
    report = score([instances("a", {0: square})], [instances("a", {0: square})], None)
    assert figures(report)["IoU"] == (1.0, None)


def test_void_pixels_of_the_ground_truth_count_for_nobody() -> None:
    ring, core = box_mask(5, 5, 25, 25), box_mask(8, 8, 22, 22)
    truth = Sample(
        key="a",
        image=Path("a.jpg"),
        size=(40, 50),
        regions=(Region(id=1, category=None, mask=masks.encode(core)),),
        layout="indexed",
        void=masks.encode(ring & ~core),
    )
    prediction = Sample(
        key="a",
        image=Path("a.jpg"),
        size=(40, 50),
        regions=(Region(id=1, category=None, mask=masks.encode(ring)),),
        layout="indexed",
    )
    assert set(figures(score([prediction], [truth], None)).values()) == {(1.0, None)}


def random_triple(key: str, seed: int) -> Match:
    rng = np.random.default_rng(seed)
    truth = {id: blobs(seed * 100 + id, (40, 50)) for id in range(1, 5)}
    shifted = {id: np.roll(mask, rng.integers(0, 3), axis=1) for id, mask in truth.items()}
    noisy = {id: mask ^ (rng.random((40, 50)) < 0.02) for id, mask in truth.items() if id != seed}
    return Match(key, instances(key, noisy), instances(key, truth, crowd=[4]), instances(key, shifted))


def assert_same_report(a: Report, b: Report) -> None:
    assert a.counts == b.counts
    assert (a.better, a.worse, a.gain_error) == (b.better, b.worse, pytest.approx(b.gain_error))
    for one, other in zip(a.measures + a.per_class, b.measures + b.per_class, strict=True):
        assert (one.value, one.before) == (pytest.approx(other.value), pytest.approx(other.before))
    for mine, theirs in zip(a.gain_by_size + a.gain_by_coarse_iou, b.gain_by_size + b.gain_by_coarse_iou, strict=True):
        assert dataclasses.asdict(mine) == pytest.approx(dataclasses.asdict(theirs), abs=1e-9)


def test_merged_instance_evaluators_equal_one() -> None:
    triples = [random_triple(str(seed), seed) for seed in range(1, 4)]
    whole, first, rest = (InstanceEvaluator(with_coarse=True, boundary_ratio=0.02) for _ in range(3))
    for match in triples:
        whole.add(match)
    first.add(triples[0])
    rest.add(triples[1])
    rest.add(triples[2])
    first.merge(rest)
    assert_same_report(first.result(), whole.result())
    assert whole.result().counts["scored"] == 9
    assert sum(bin.objects for bin in whole.result().gain_by_size) == 9


def test_scores_of_single_objects_can_be_had() -> None:
    square = box_mask(3, 4, 12, 15)
    match = Match("a", instances("a", {5: square}), instances("a", {5: square}), None)
    (only,) = InstanceEvaluator(with_coarse=False, boundary_ratio=0.02).score_objects(match)
    assert (only.key, only.id, only.after.overlap.iou, only.before) == ("a", 5, 1.0, None)


# --- label maps


def miou_by_definition(truths: Sequence[np.ndarray], guesses: Sequence[np.ndarray]) -> float:
    confusion = np.zeros((21, 21))
    for truth, guess in zip(truths, guesses, strict=True):
        for t, g in zip(truth.ravel(), guess.ravel(), strict=True):
            if t != 255:
                confusion[t, 0 if g == 255 else g] += 1
    union = confusion.sum(0) + confusion.sum(1) - np.diag(confusion)
    there = confusion.sum(1) > 0  # the classes that the ground truth has
    return float(np.mean(np.diag(confusion)[there] / union[there]))


def random_labels(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).choice(np.uint8([0, 1, 5, 20, 255]), (9, 11))


def test_miou_equals_the_confusion_matrix_over_the_whole_data_set() -> None:
    truths, guesses, coarse = ([random_labels(10 * n + i) for i in range(3)] for n in range(3))
    report = score(
        *[[label_map(str(i), labels) for i, labels in enumerate(maps)] for maps in (guesses, truths, coarse)]
    )
    assert report.measures[0].name == "mIoU"
    assert report.measures[0].value == pytest.approx(miou_by_definition(truths, guesses))
    assert report.measures[0].before == pytest.approx(miou_by_definition(truths, coarse))
    names = ["FB-IoU", *(f"IoU of class {label}" for label in (0, 1, 5, 20))]
    assert [measure.name for measure in report.measures[1:]] == names
    binary = [[np.where(one == 255, 255, one > 0).astype(np.uint8) for one in maps] for maps in (truths, guesses)]
    for guess, truth in zip(binary[1], binary[0], strict=True):
        guess[(guess == 255) & (truth != 255)] = 0
    assert report.measures[1].value == pytest.approx(miou_by_definition(*binary))
    valid = sum(np.count_nonzero(truth != 255) for truth in truths)
    both = sum(np.count_nonzero((t != 255) & (g == 255)) for t, g in zip(truths, guesses, strict=True))
    assert (report.counts["compared_px"], report.counts["void_in_prediction_px"]) == (valid, both)
    assert (report.better, report.worse) == (None, None)


def test_merged_label_evaluators_equal_one() -> None:
    images = [
        Match(str(i), label_map(str(i), random_labels(i)), label_map(str(i), random_labels(9 - i)), None)
        for i in range(3)
    ]
    whole, first, rest = (LabelMapEvaluator(with_coarse=False) for _ in range(3))
    for match in images:
        whole.add(match)
    first.add(images[0])
    rest.add(images[1])
    rest.add(images[2])
    first.merge(rest)
    assert_same_report(first.result(), whole.result())


def test_classes_that_the_ground_truth_lacks_stay_out_of_the_mean() -> None:
    """Their pixels are wrong, which the classes they hide have to bear."""
    truth = np.uint8([[0, 0, 0, 0, 1, 1, 1, 1, 255, 255]])
    guess = np.uint8([[0, 0, 0, 60, 1, 1, 1, 1, 61, 61]])
    coarse = np.uint8([[0, 7, 7, 7, 1, 1, 1, 1, 0, 0]])
    report = score([label_map("a", guess)], [label_map("a", truth)], [label_map("a", coarse)])
    assert figures(report) == {
        "mIoU": ((3 / 4 + 1) / 2, (1 / 4 + 1) / 2),
        "FB-IoU": ((3 / 4 + 4 / 5) / 2, (1 / 4 + 4 / 7) / 2),
        "IoU of class 0": (3 / 4, 1 / 4),
        "IoU of class 1": (1.0, 1.0),
        "IoU of class 7": (None, 0.0),
        "IoU of class 60": (0.0, None),
    }
    assert (report.counts["unknown_classes"], report.counts["unknown_classes_px"]) == (1, 1), "void hides class 61"
    assert report.notes()[-2:] == [
        "1 classes of the prediction that the ground truth does not have, left out of the mean",
        "1 pixels of the prediction of such classes, counted as wrong",
    ]


def filled(maps: dict[str, np.ndarray]) -> list[Sample]:
    """All six maps of a set, background in place of those that are not there."""
    return [label_map(key, maps.get(key, np.zeros((9, 11), np.uint8))) for key in "abcdef"]


def test_images_that_class_maps_lack_count_as_background() -> None:
    """In the prediction and in the coarse file alike, whichever of them has more."""
    truth, guess, coarse = ({key: random_labels(10 * n + i) for i, key in enumerate("abcdef")} for n in range(3))
    del guess["b"], guess["f"], coarse["f"], coarse["c"], coarse["d"]
    truths = filled(truth)
    partial = score(*[[label_map(key, labels) for key, labels in maps.items()] for maps in (guess, truth, coarse)])
    assert partial.measures == score(filled(guess), truths, filled(coarse)).measures
    whole = [np.zeros((9, 11), np.uint8) if key not in guess else guess[key] for key in "abcdef"]
    assert partial.measures[0].value == pytest.approx(miou_by_definition(list(truth.values()), whole))
    assert {name: partial.counts[name] for name in ("scored", "lost", "lost_coarse")} == {
        "scored": 6,
        "lost": 2,
        "lost_coarse": 3,
    }
    assert "3 missing or unreadable in the coarse file, scored as if nothing had been found there" in partial.notes()


def test_half_a_prediction_scores_no_better_than_all_of_it() -> None:
    good, poor = np.uint8([[0, 0, 3, 3]]), np.uint8([[3, 0, 3, 0]])
    truth = [label_map("a", good), label_map("b", good)]
    half, all_of_it = (score(maps, truth, None) for maps in ([label_map("a", good)], [truth[0], label_map("b", poor)]))
    assert half.measures[0].value < all_of_it.measures[0].value
    assert half.measures[0].value == pytest.approx((4 / 6 + 2 / 4) / 2)
    assert all_of_it.measures[0].value == pytest.approx((3 / 5 + 3 / 5) / 2)
    assert (half.counts["scored"], half.counts["lost"]) == (2, 1)


def test_class_maps_without_ground_truth_are_left_out() -> None:
    labels = np.uint8([[0, 0, 3, 3]])
    one, two = ([label_map(key, labels) for key in keys] for keys in ("a", "ab"))
    for report in (score(two, one, None), score(two, one, two), score(one, one, two)):
        assert figures(report)["mIoU"][0] == 1.0
        assert (report.counts["scored"], report.counts["extra"], report.counts["lost"]) == (1, 1, 0)


def test_a_class_that_no_label_map_can_hold_is_told() -> None:
    mask = masks.encode(np.ones((1, 4), dtype=np.bool_))
    wrong = Sample("a", Path("a.jpg"), (1, 4), (Region(255, 255, mask),), layout="semantic")
    with pytest.raises(DataError, match="Image a has a class 255; label maps hold classes from 0 to 254"):
        score([wrong], [label_map("a", np.uint8([[0, 0, 3, 3]]))], None)


# --- pairing, errors, output


@pytest.mark.parametrize("order", list(itertools.permutations("abc")))
def test_files_in_another_order_score_the_same(order: tuple[str, ...]) -> None:
    triples = {key: random_triple(key, seed) for seed, key in enumerate("abc", start=1)}
    same = score(*[[getattr(triples[k], part) for k in "abc"] for part in ("prediction", "truth", "coarse")])
    mixed = score(
        [triples[k].prediction for k in order],
        [triples[k].truth for k in "abc"],
        [triples[k].coarse for k in order[::-1]],
    )
    assert_same_report(mixed, same)


def test_pairing_holds_back_nothing_when_orders_agree() -> None:
    read: list[str] = []

    def reading(name: str) -> Callable[[], Sample]:
        for key in "abc":
            read.append(name + key)
            yield instances(key, {1: box_mask(0, 0, 3, 3)})

    keys = []
    for match in match_images(reading("p"), reading("t"), reading("c")):
        keys.append(match.key)
        assert len(read) == 3 * len(keys)
    assert keys == ["a", "b", "c"]


def test_sizes_that_differ_are_named() -> None:
    with pytest.raises(DataError, match=r"Image 7: masks are 50 x 40 in the prediction, 9 x 8 in the ground truth"):
        score([instances("7", {1: box_mask(0, 0, 3, 3)})], [instances("7", {1: box_mask(0, 0, 3, 3, (8, 9))})], None)


def test_class_maps_and_objects_do_not_compare() -> None:
    with pytest.raises(UsageError, match="instances in the prediction and semantic in the ground truth"):
        score([instances("7", {1: box_mask(0, 0, 3, 3)})], [label_map("7", np.zeros((40, 50), np.uint8))], None)


def test_results_without_ids_do_not_compare_with_annotations() -> None:
    square = instances("7", {1: box_mask(0, 0, 3, 3)})
    results, annotations = InMemory((square,), format="coco-results"), InMemory((square,), format="voc-object")
    with pytest.raises(UsageError, match="no annotation ids"):
        evaluate(results, annotations, coarse=None, boundary_ratio=0.02)
    assert evaluate(results, results, coarse=results, boundary_ratio=0.02).counts["scored"] == 1


def test_files_with_nothing_in_common_are_refused() -> None:
    square = box_mask(0, 0, 3, 3)
    seven, eight = instances("7", {1: square}), instances("8", {1: square})
    with pytest.raises(DataError, match=r"the prediction and the ground truth have no image in common \('7' and '8', "):
        score([seven], [eight], None)
    with pytest.raises(
        DataError, match=r"the coarse file and the ground truth have no image in common \('8' and '7', "
    ):
        score([seven], [seven], [eight])
    with pytest.raises(DataError, match=r"no image in common \('7', for example, and none\)"):
        score([seven], [], None)
    with pytest.raises(DataError, match="no object in common"):
        score([instances("7", {2: square})], [seven], None)
    with pytest.raises(DataError, match="hold no images"):
        score([], [], None)


def test_ids_and_images_that_occur_twice_are_refused() -> None:
    square = masks.encode(box_mask(0, 0, 3, 3))
    twice = Sample("7", Path("7.jpg"), (40, 50), (Region(1, 1, square), Region(1, 1, square)))
    once = instances("7", {1: box_mask(0, 0, 3, 3)})
    with pytest.raises(DataError, match="Image 7 has id 1 twice in the prediction"):
        score([twice], [once], None)
    with pytest.raises(DataError, match="Image 7 occurs twice in one file"):
        score([once, once], [instances("8", {1: box_mask(0, 0, 3, 3)}), once], None)


def test_the_report_speaks_in_rows_notes_and_json() -> None:
    truth = instances("7", {1: box_mask(0, 0, 10, 10), 2: box_mask(20, 20, 30, 30)})
    coarse = instances("7", {1: box_mask(5, 0, 15, 10)})
    report = score([truth], [truth], [coarse])
    assert report.rows()[0] == ("IoU, mean over objects", "33.33", "100.00", "+66.67")
    assert report.notes() == [
        "1 scored",
        "1 in the ground truth but not in the file that is scored, left out",
        "1 in the prediction but not in the coarse file, left out",
        "100.0% of the objects better, 0.0% worse by more than 0.01 IoU",
    ]
    as_json = report.to_dict()
    assert as_json["measures"][0] == {
        "name": "IoU",
        "reduction": "mean over objects",
        "value": 1.0,
        "before": pytest.approx(1 / 3),
        "gain": pytest.approx(2 / 3),
    }
    assert as_json["counts"]["missing"] == 1


def test_label_maps_that_cannot_be_read() -> None:
    truth = np.uint8([[0, 0, 3, 3]])
    broken = Sample("b", Path("b.jpg"), (0, 0), (Region(0, None, None, "unreadable"),), layout="semantic")
    good = label_map("a", truth)
    report = score([good, broken], [good, label_map("b", truth)], None)
    assert figures(report)["IoU of class 3"] == (0.5, None)
    assert (report.counts["scored"], report.counts["lost"]) == (2, 1)
    report = score([good, label_map("b", truth)], [good, broken], None)
    assert figures(report)["IoU of class 3"] == (1.0, None)
    assert (report.counts["scored"], report.counts["unreadable"]) == (1, 1)
    report = score([good], [good], [dataclasses.replace(broken, key="a")])
    assert figures(report)["IoU of class 3"] == (1.0, 0.0)
    assert (report.counts["lost"], report.counts["lost_coarse"]) == (0, 1)


# --- through real files


def write_coco(path: Path, annotations: list[dict[str, object]]) -> Path:
    images = [{"id": 3, "file_name": "3.png", "height": 40, "width": 50}]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "x"}]}))
    return path


def coco_annotation(id: int, mask: BoolArray, iscrowd: int = 0) -> dict[str, object]:
    counts = masks.encode(mask).counts.decode()
    return {
        "id": id,
        "image_id": 3,
        "category_id": 1,
        "iscrowd": iscrowd,
        "area": int(mask.sum()),
        "bbox": [0, 0, 50, 40],
        "segmentation": {"size": [40, 50], "counts": counts},
    }


def test_coco_files_score_as_pycocotools_has_it(tmp_path: Path) -> None:
    Image.new("RGB", (50, 40)).save(tmp_path / "3.png")
    truths = [blobs(i, (40, 50)) for i in range(4)]
    guesses = [np.roll(mask, 2, axis=0) for mask in truths]
    truth = write_coco(
        tmp_path / "truth.json", [coco_annotation(i, mask, iscrowd=i == 3) for i, mask in enumerate(truths)]
    )
    prediction = write_coco(tmp_path / "refined.json", [coco_annotation(i, mask) for i, mask in enumerate(guesses)])
    report = evaluate(
        open_dataset(prediction, images=tmp_path),
        open_dataset(truth, images=tmp_path),
        coarse=None,
        boundary_ratio=0.02,
    )
    runs = [[coco_mask.encode(np.asfortranarray(m, dtype=np.uint8)) for m in group[:3]] for group in (truths, guesses)]
    assert figures(report)["IoU"][0] == pytest.approx(np.diag(coco_mask.iou(*runs, [0, 0, 0])).mean())
    assert (report.counts["scored"], report.counts["crowd"]) == (3, 1)


@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        ("SegmentationClass", {"mIoU": (pytest.approx((14 / 16 + 2 / 4) / 2), None)}),
        ("SegmentationObject", {"IoU": (0.5, None)}),
    ],
)
def test_voc_folders_score(tmp_path: Path, folder: str, expected: dict[str, tuple[float, None]]) -> None:
    truth, guess = np.zeros((2, 10), np.uint8), np.zeros((2, 10), np.uint8)
    truth[:, 6:8], truth[:, 8:9] = 7, 255
    guess[:, 7:9] = 7
    for name, labels in (("truth", truth), ("guess", guess)):
        (tmp_path / name / folder).mkdir(parents=True)
        (tmp_path / name / "JPEGImages").mkdir()
        Image.new("RGB", (10, 2)).save(tmp_path / name / "JPEGImages" / "a.jpg")
        picture = Image.fromarray(labels).convert("P")
        picture.putdata(labels.ravel().tolist())
        picture.putpalette([value for value in range(256) for _ in "rgb"])
        picture.save(tmp_path / name / folder / "a.png")
    report = evaluate(
        open_dataset(tmp_path / "guess"), open_dataset(tmp_path / "truth"), coarse=None, boundary_ratio=0.02
    )
    assert figures(report, *expected) == expected
