"""AP and boundary AP against pycocotools, an independent boundary AP made of it, and faster-coco-eval's own path."""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faster_coco_eval import COCO as FasterCoco  # noqa: N811
from faster_coco_eval import COCOeval_faster
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy import ndimage

from refinetool.errors import DataError, UsageError
from refinetool.evaluate import ApEvaluator, Report, evaluate, match_images
from refinetool.formats import open_dataset
from refinetool.records import Sample

RATIO = 0.02
NAMES = ("AP", "AP50", "AP75", "AP small", "AP medium", "AP large")


# --- data: a scene with every case that the rules speak of


def blob(rng: np.random.Generator, size: tuple[int, int], side: float) -> np.ndarray:
    """An irregular object of about that side, somewhere in the image, perhaps cut by its frame."""
    rows, columns = np.ogrid[: size[0], : size[1]]
    y, x = rng.uniform(0, size[0]), rng.uniform(0, size[1])
    angle = np.arctan2(rows - y, columns - x)
    waves = 1 + 0.25 * np.sin(3 * angle + rng.uniform(0, 6)) + 0.15 * np.sin(5 * angle + rng.uniform(0, 6))
    return np.hypot(rows - y, columns - x) < side / 2 * waves


def noisy(rng: np.random.Generator, mask: np.ndarray, amount: float) -> np.ndarray:
    shift = rng.normal(scale=amount * np.sqrt(mask.sum() + 1), size=2).round().astype(int)
    return np.roll(mask, shift, axis=(0, 1)) ^ (ndimage.gaussian_filter(rng.normal(size=mask.shape), 3) > 0.35)


def rle(mask: np.ndarray) -> dict[str, Any]:
    runs = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": list(mask.shape), "counts": runs["counts"].decode()}


def scene(seed: int, *, images: int, tied: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """COCO annotations and results: crowds, duplicates, misses, false alarms, empty masks, ids out of order."""
    rng = np.random.default_rng(seed)
    listed, truths, found = [], [], []
    for image in (rng.permutation(images) + 3).tolist():
        size = [(120, 160), (160, 120), (96, 200)][image % 3]
        listed.append({"id": image, "file_name": f"{image}.png", "height": size[0], "width": size[1]})
        for _ in range(rng.integers(0, 7)):
            mask = blob(rng, size, rng.choice([14, 45, 130]))
            if not mask.any():
                continue
            category = int(rng.integers(1, 5))
            truths.append(
                {"id": len(truths), "image_id": image, "category_id": category, "iscrowd": int(rng.random() < 0.1)}
                | {"area": float(mask.sum() * rng.uniform(0.95, 1.05)), "bbox": [0, 0, 1, 1], "segmentation": rle(mask)}
            )
            for _ in range(rng.integers(0, 4)):
                guess = noisy(rng, mask, rng.choice([0.0, 0.03, 0.1]))
                guess &= rng.random() < 0.95
                value = float(rng.choice([0.2, 0.5, 0.9])) if tied else float(rng.random())
                label = category if rng.random() < 0.9 else 5
                found.append({"image_id": image, "category_id": label, "score": value, "segmentation": rle(guess)})
    categories = [{"id": number, "name": str(number)} for number in (1, 2, 3, 4, 5)]
    return {"images": listed, "annotations": truths, "categories": categories}, found


def write(path: Path, record: object) -> Path:
    path.write_text(json.dumps(record))
    return path


def measured(tmp_path: Path, truth: object, found: object, protocol: str = "auto", **more: Any) -> Report:
    files = [write(tmp_path / name, record) for name, record in (("found.json", found), ("truth.json", truth))]
    opened = [open_dataset(path, need_images=False) for path in files]
    return evaluate(*opened, protocol=protocol, **more)


def value(report: Report, name: str) -> float | None:
    return next(measure.value for measure in report.measures if measure.name == name)


# --- references


def coco_truth(truth: dict[str, Any]) -> COCO:
    """pycocotools can't tell a match with annotation 0 from none, so its ids begin at 1."""
    reference = COCO()
    reference.dataset = copy.deepcopy(truth)
    for annotation in reference.dataset["annotations"]:
        annotation["id"] += 1
    reference.createIndex()
    return reference


def band(run: dict[str, Any]) -> dict[str, Any]:
    """The boundary by definition: the mask less its erosion by d steps of a 3 x 3 square, zeros around the image."""
    mask = coco_mask.decode(run).astype(bool)
    d = max(1, round(RATIO * float(np.hypot(*mask.shape))))
    inner = ndimage.binary_erosion(np.pad(mask, 1), np.ones((3, 3)), iterations=d)[1:-1, 1:-1]
    return coco_mask.encode(np.asfortranarray(mask & ~inner, dtype=np.uint8))


class BoundaryEvaluation(COCOeval):
    """pycocotools with the lesser of mask and boundary IoU in place of mask IoU; crowds keep theirs."""

    def computeIoU(self, imgId: int, catId: int) -> Any:  # noqa: N802, N803
        ious = super().computeIoU(imgId, catId)
        truths, found = self._gts[imgId, catId], self._dts[imgId, catId]
        if not truths or not found:
            return ious
        order = np.argsort([-detection["score"] for detection in found], kind="mergesort")[: self.params.maxDets[-1]]
        runs = [band(found[place]["segmentation"]) for place in order], [band(t["segmentation"]) for t in truths]
        ious_of_bands = coco_mask.iou(*runs, [0] * len(truths))
        crowds = np.array([bool(truth["iscrowd"]) for truth in truths])
        return np.where(crowds, ious, np.minimum(ious, ious_of_bands))


def by_pycocotools(truth: dict[str, Any], found: list[dict[str, Any]], kind: type[COCOeval]) -> list[float | None]:
    """AP, AP50, AP75 and AP by area; None where it is not defined."""
    reference = coco_truth(truth)
    evaluation = kind(reference, reference.loadRes(copy.deepcopy(found)), "segm")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return [None if figure == -1 else float(figure) for figure in evaluation.stats[:6]]


# --- agreement


@pytest.mark.parametrize(("seed", "tied"), [(0, False), (1, False), (2, True), (3, True)])
def test_ap_equals_pycocotools(tmp_path: Path, seed: int, tied: bool) -> None:
    truth, found = scene(seed, images=14, tied=tied)
    report = measured(tmp_path, truth, found)
    masks, boundaries = (by_pycocotools(truth, found, kind) for kind in (COCOeval, BoundaryEvaluation))
    assert 0.02 < masks[0] < 0.98
    assert boundaries[0] < masks[0] - 0.01
    for name, mask, boundary in zip(NAMES, masks, boundaries, strict=True):
        assert value(report, name) == pytest.approx(mask, abs=1e-9), name
        assert value(report, f"boundary {name}") == pytest.approx(boundary, abs=1e-9), name


def test_ap_equals_what_faster_coco_eval_makes_of_masks(tmp_path: Path) -> None:
    truth, found = scene(5, images=14, tied=False)
    report = measured(tmp_path, truth, found)
    shifted = copy.deepcopy(truth)
    for annotation in shifted["annotations"]:
        annotation["id"] += 1
    for kind, prefix in (("segm", ""), ("boundary", "boundary ")):
        reference = FasterCoco(copy.deepcopy(shifted))
        results = reference.loadRes(copy.deepcopy(found))
        evaluation = COCOeval_faster(reference, results, kind, print_function=lambda *_: None)
        evaluation.run()
        ours = [value(report, prefix + name) for name in NAMES]
        assert ours == pytest.approx(list(evaluation.stats[:6]), abs=1e-4)


def test_more_than_a_hundred_detections_of_a_category_are_cut_by_score(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    truth, _ = scene(7, images=4, tied=False)
    found = []
    for annotation in truth["annotations"]:
        mask = coco_mask.decode(annotation["segmentation"]).astype(bool)
        common = {name: annotation[name] for name in ("image_id", "category_id")}
        found += [common | {"score": rng.random(), "segmentation": rle(noisy(rng, mask, 0.05))} for _ in range(130)]
    report = measured(tmp_path, truth, found)
    expected = by_pycocotools(truth, found, COCOeval)
    assert [value(report, name) for name in NAMES] == [pytest.approx(figure, abs=1e-9) for figure in expected]


def test_worked_values(tmp_path: Path) -> None:
    """Two objects; one found at IoU 0.8, then a false alarm: precision 1 up to recall 0.5, at the 7 thresholds to 0.8.

    51 of the 101 recall points lie at 0.5 or below.
    """
    size = (40, 40)
    objects = [np.zeros(size, bool) for _ in range(2)]
    objects[0][:10, :10], objects[1][20:30, 20:30] = True, True
    guess, wrong = objects[0].copy(), np.zeros(size, bool)
    guess[8:10], wrong[35:, :5] = False, True
    truth = {
        "images": [{"id": 1, "file_name": "1.png", "height": 40, "width": 40}],
        "categories": [{"id": 1, "name": "x"}],
        "annotations": [
            {"id": id, "image_id": 1, "category_id": 1, "iscrowd": 0, "area": 100, "segmentation": rle(mask)}
            for id, mask in enumerate(objects)
        ],
    }
    found = [
        {"image_id": 1, "category_id": 1, "score": value, "segmentation": rle(mask)}
        for value, mask in ((0.9, guess), (0.8, wrong))
    ]
    report = measured(tmp_path, truth, found)
    assert value(report, "AP") == pytest.approx(0.7 * 51 / 101)
    assert value(report, "AP50") == pytest.approx(51 / 101)
    assert value(report, "AP small") == value(report, "AP")
    assert (value(report, "AP medium"), value(report, "AP large")) == (None, None), "undefined, not -1"


def broken(truth: dict[str, Any], ids: set[int]) -> dict[str, Any]:
    """The truth with run lengths of some annotations that nobody can decode."""
    record = copy.deepcopy(truth)
    for annotation in record["annotations"]:
        if annotation["id"] in ids:
            annotation["segmentation"]["counts"] = "zz"
    return record


def without_a_match(truth: dict[str, Any], ids: set[int]) -> dict[str, Any]:
    """The truth with empty masks in place of some: objects of their category and area that nothing matches."""
    record = copy.deepcopy(truth)
    for annotation in record["annotations"]:
        if annotation["id"] in ids:
            annotation["segmentation"] = rle(np.zeros(annotation["segmentation"]["size"], bool))
    return record


def test_ground_truth_that_cannot_be_decoded_counts_as_missed(tmp_path: Path) -> None:
    truth, found = scene(4, images=14, tied=False)
    lost = {a["id"] for a in truth["annotations"] if not a["iscrowd"]} - set(range(0, 60, 3))
    report = measured(tmp_path, broken(truth, lost), found)
    reference = without_a_match(truth, lost)
    for kind, prefix in ((COCOeval, ""), (BoundaryEvaluation, "boundary ")):
        expected = by_pycocotools(reference, found, kind)
        assert expected[0] > 0
        assert [value(report, prefix + name) for name in NAMES] == [pytest.approx(ap, abs=1e-9) for ap in expected]
    assert value(report, "AP") < value(measured(tmp_path, truth, found), "AP") - 0.1
    assert report.counts["truths_unreadable"] == len(lost)
    assert any(note.startswith(f"{len(lost)} objects of the ground truth without a mask") for note in report.notes())


def test_where_no_ground_truth_can_be_decoded_nothing_is_found(tmp_path: Path) -> None:
    """Nor does any file know the size of the second image then."""
    truth, found = scene(4, images=4, tied=False)
    everything = broken(truth, {a["id"] for a in truth["annotations"]})
    for image in everything["images"]:
        del image["height"], image["width"]
    for results in (found, [{**result, "segmentation": {}} for result in found]):
        assert value(measured(tmp_path, everything, results), "AP") == 0.0


# --- files


def test_results_have_ap_and_nothing_that_takes_ids(tmp_path: Path) -> None:
    truth, found = scene(1, images=6, tied=False)
    report = measured(tmp_path, truth, found)
    names = (*NAMES, "AR")
    assert {measure.name for measure in report.measures} == {*names, *(f"boundary {name}" for name in names)}
    assert any("no annotation ids" in note for note in report.notes())
    assert report.counts["detections"] == len(found)
    empty = sum(not coco_mask.area(result["segmentation"]) for result in found)
    assert report.counts["detections_unreadable"] == empty > 0


def test_annotations_have_both_and_say_that_scores_are_missing(tmp_path: Path) -> None:
    truth, _ = scene(1, images=6, tied=False)
    report = measured(tmp_path, truth, truth)
    assert (value(report, "IoU"), value(report, "AP"), value(report, "boundary AP")) == (1.0, 1.0, 1.0)
    crowds = sum(annotation["iscrowd"] for annotation in truth["annotations"])
    assert crowds
    assert report.counts["crowd_detections"] == crowds
    assert any("have no score and count as 1.0" in note for note in report.notes())


def test_refined_annotations_gain_ap(tmp_path: Path) -> None:
    truth, _ = scene(6, images=10, tied=False)
    rng = np.random.default_rng(1)
    coarse, refined = copy.deepcopy(truth), copy.deepcopy(truth)
    for version, amount in ((coarse, 0.12), (refined, 0.02)):
        for annotation in version["annotations"]:
            mask = coco_mask.decode(annotation["segmentation"]).astype(bool)
            annotation["segmentation"] = rle(noisy(rng, mask, amount))
            annotation["score"] = round(float(rng.random()), 3)
    files = [write(tmp_path / f"{name}.json", record) for name, record in (("r", refined), ("t", truth), ("c", coarse))]
    opened = [open_dataset(path, need_images=False) for path in files]
    report = evaluate(opened[0], opened[1], coarse=opened[2])
    before = evaluate(opened[2], opened[1])
    after = evaluate(opened[0], opened[1])
    for name in ("AP", "boundary AP", "AP small"):
        measure = next(measure for measure in report.measures if measure.name == name)
        assert (measure.value, measure.before) == (value(after, name), value(before, name))
    results = [a for a in refined["annotations"] if not a["iscrowd"]]
    results = [{k: a[k] for k in ("image_id", "category_id", "score", "segmentation")} for a in results]
    expected = by_pycocotools(truth, results, COCOeval)
    assert value(report, "AP") == pytest.approx(expected[0], abs=1e-9)
    assert all(measure.gain is not None and measure.gain > 0 for measure in report.measures if measure.name == "AP")


def test_no_detections_at_all(tmp_path: Path) -> None:
    truth, _ = scene(1, images=6, tied=False)
    for nothing in ([], truth | {"annotations": []}):
        report = measured(tmp_path, truth, nothing)
        assert (value(report, "AP"), value(report, "boundary AP50")) == (0.0, 0.0)


def test_images_that_one_side_lacks(tmp_path: Path) -> None:
    truth, found = scene(8, images=12, tied=False)
    keep = [image["id"] for image in truth["images"]][:6]
    fewer = truth | {
        "images": [image for image in truth["images"] if image["id"] in keep],
        "annotations": [a for a in truth["annotations"] if a["image_id"] in keep],
    }
    within = [result for result in found if result["image_id"] in keep]
    whole, cut = measured(tmp_path, fewer, found), measured(tmp_path, fewer, within)
    assert whole.measures == cut.measures
    assert whole.counts["detections_elsewhere"] == len(found) - len(within) > 0
    missed = measured(tmp_path, truth, within)
    expected = by_pycocotools(truth, within, COCOeval)
    assert [value(missed, name) for name in NAMES] == [pytest.approx(figure, abs=1e-9) for figure in expected]
    strangers = [result | {"image_id": 10_000} for result in found]
    with pytest.raises(DataError, match=r"no image in common \(.*\)\. Images are matched by id;"):
        measured(tmp_path, truth, strangers)


def test_annotations_without_categories_have_no_ap(tmp_path: Path) -> None:
    truth, _ = scene(1, images=6, tied=False)
    bare = copy.deepcopy(truth)
    for annotation in bare["annotations"]:
        del annotation["category_id"]
    report = measured(tmp_path, truth, bare)
    assert value(report, "IoU") == 1.0
    assert not any(measure.name == "AP" for measure in report.measures)
    assert any("AP is left out" in note for note in report.notes())


def test_no_ap_where_it_is_not_wanted(tmp_path: Path) -> None:
    truth, found = scene(1, images=6, tied=False)
    report = measured(tmp_path, truth, truth, protocol="none")
    assert not any("AP" in measure.name for measure in report.measures)
    with pytest.raises(UsageError, match="no annotation ids"):
        measured(tmp_path, truth, found, protocol="none")
    with pytest.raises(UsageError, match="--protocol davis needs index PNGs"):
        measured(tmp_path, truth, found, protocol="davis")


# --- LVIS


def federated(truth: dict[str, Any]) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    record = copy.deepcopy(truth)
    for image in record["images"]:
        image["neg_category_ids"] = rng.choice(5, 2, replace=False).tolist()
        image["not_exhaustive_category_ids"] = rng.choice(5, 1).tolist()
    for annotation in record["annotations"]:
        annotation["iscrowd"] = 0
    for category, frequency in zip(record["categories"], "rcfff", strict=True):
        category["frequency"] = frequency
    return record


def by_lvis_rules(truth: dict[str, Any], found: list[dict[str, Any]], kind: type[COCOeval]) -> dict[str, float]:
    """LVIS with pycocotools: what may not count is taken out or forgiven beforehand, category by category."""
    per_image: dict[int, list[dict[str, Any]]] = {}
    for result in found:
        per_image.setdefault(result["image_id"], []).append(result)
    kept = [r for group in per_image.values() for r in sorted(group, key=lambda r: -r["score"])[:300]]
    positive = {(a["image_id"], a["category_id"]) for a in truth["annotations"]}
    looked_for = positive | {(i["id"], c) for i in truth["images"] for c in i["neg_category_ids"]}
    kept = [r for r in kept if (r["image_id"], r["category_id"]) in looked_for]
    lenient = {(i["id"], c) for i in truth["images"] for c in i["not_exhaustive_category_ids"]}

    class Lenient(kind):  # type: ignore[misc, valid-type]
        def evaluateImg(self, imgId: int, catId: int, aRng: Any, maxDet: int) -> Any:  # noqa: N802, N803
            result = super().evaluateImg(imgId, catId, aRng, maxDet)
            if result is not None and (imgId, catId) in lenient:
                result["dtIgnore"] = np.logical_or(result["dtIgnore"], result["dtMatches"] == 0)
            return result

    reference = coco_truth(truth)
    evaluation = Lenient(reference, reference.loadRes(copy.deepcopy(kept)), "segm")
    evaluation.params.maxDets = [300]
    evaluation.evaluate()
    evaluation.accumulate()
    precision = evaluation.eval["precision"][:, :, :, 0, 0]
    rows = {"AP": [0, 1, 2, 3, 4], "APr": [0], "APc": [1], "APf": [2, 3, 4]}
    return {name: float(precision[:, :, k][precision[:, :, k] > -1].mean()) for name, k in rows.items()}


def test_lvis_rules(tmp_path: Path) -> None:
    truth, found = scene(9, images=40, tied=False)
    truth = federated(truth)
    report = measured(tmp_path, truth, found, protocol="lvis")
    for prefix, kind in (("", COCOeval), ("boundary ", BoundaryEvaluation)):
        for name, expected in by_lvis_rules(truth, found, kind).items():
            assert value(report, prefix + name) == pytest.approx(expected, abs=1e-9), prefix + name
    assert value(report, "AP") != pytest.approx(value(measured(tmp_path, truth, found), "AP"), abs=1e-3)
    assert report.measures[0].reduction.startswith("LVIS")


def test_lvis_takes_300_detections_of_an_image_over_all_categories(tmp_path: Path) -> None:
    truth, _ = scene(7, images=3, tied=False)
    truth = federated(truth)
    rng = np.random.default_rng(2)
    found = []
    for annotation in truth["annotations"]:
        mask = coco_mask.decode(annotation["segmentation"]).astype(bool)
        common = {name: annotation[name] for name in ("image_id", "category_id")}
        found += [common | {"score": rng.random(), "segmentation": rle(noisy(rng, mask, 0.05))} for _ in range(140)]
    report = measured(tmp_path, truth, found, protocol="lvis")
    expected = by_lvis_rules(truth, found, COCOeval)
    assert value(report, "AP") == pytest.approx(expected["AP"], abs=1e-9)


def lvis_with_a_late_hit(*, decoys: int, of_category: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """An object of category 1, found exactly but with the lowest score; decoys with higher scores miss everything."""
    size = (20, 30)
    there, nowhere = np.zeros(size, bool), np.zeros(size, bool)
    there[:5, :5], nowhere[10:, 20:] = True, True
    truth = {
        "images": [{"id": 1, "file_name": "1.png", "height": 20, "width": 30}],
        "categories": [{"id": number, "name": str(number), "frequency": "f"} for number in (1, 2)],
        "annotations": [{"id": 0, "image_id": 1, "category_id": 1, "area": 25, "segmentation": rle(there)}],
    }
    truth["images"][0] |= {"neg_category_ids": [2], "not_exhaustive_category_ids": []}
    found = [{"image_id": 1, "category_id": 1, "score": 0.1, "segmentation": rle(there)}]
    decoy = {"image_id": 1, "category_id": of_category, "score": 0.9, "segmentation": rle(nowhere)}
    return truth, found + [decoy] * decoys


@pytest.mark.parametrize(("decoys", "expected"), [(299, 1.0), (300, 0.0)])
def test_lvis_cuts_detections_of_all_categories_together(tmp_path: Path, decoys: int, expected: float) -> None:
    truth, found = lvis_with_a_late_hit(decoys=decoys, of_category=2)
    assert value(measured(tmp_path, truth, found, protocol="lvis"), "AP") == expected


@pytest.mark.parametrize(("looked_for", "expected"), [(True, 0.5), (False, 1.0)])
def test_lvis_counts_detections_where_their_category_was_looked_for(
    tmp_path: Path, looked_for: bool, expected: float
) -> None:
    """A false alarm in an image without such objects scores higher than the only hit, which is in another image."""
    truth, found = lvis_with_a_late_hit(decoys=0, of_category=1)
    truth["images"].append(truth["images"][0] | {"id": 2, "neg_category_ids": [1] if looked_for else [2]})
    found.append(found[0] | {"image_id": 2, "score": 0.9})
    assert value(measured(tmp_path, truth, found, protocol="lvis"), "AP") == pytest.approx(expected)


def test_lvis_takes_more_than_a_hundred_of_one_category(tmp_path: Path) -> None:
    truth, found = lvis_with_a_late_hit(decoys=199, of_category=1)
    assert value(measured(tmp_path, truth, found, protocol="lvis"), "AP") == pytest.approx(1 / 200)
    assert value(measured(tmp_path, truth, found, protocol="coco"), "AP") == 0.0, "COCO takes a hundred"


@dataclass(frozen=True)
class Listed:
    """COCO annotations that come from no file, so there is nothing to read LVIS's lists from."""

    content: tuple[Sample, ...]
    format: str = "coco"

    def samples(self) -> tuple[Sample, ...]:
        return self.content


def test_what_is_not_lvis_is_refused(tmp_path: Path) -> None:
    truth, found = scene(1, images=3, tied=False)
    listed = Listed((Sample("1", Path("1.png"), (20, 30), ()),))
    with pytest.raises(UsageError, match="needs a file of LVIS annotations"):
        evaluate(listed, listed, protocol="lvis")
    with pytest.raises(UsageError, match="neg_category_ids"):
        measured(tmp_path, truth, found, protocol="lvis")
    broken = federated(truth)
    broken["images"][0]["neg_category_ids"] = ["x"]
    with pytest.raises(DataError, match="expected a list of numbers"):
        measured(tmp_path, broken, found, protocol="lvis")


# --- more of COCO's figures


@pytest.mark.parametrize("limit", [None, 2])
@pytest.mark.parametrize("agnostic", [False, True])
def test_recall_limits_and_categories_equal_pycocotools(tmp_path: Path, limit: int | None, agnostic: bool) -> None:
    truth, found = scene(1, images=14, tied=False)
    report = measured(tmp_path, truth, found, max_detections=limit, class_agnostic=agnostic)
    reference = coco_truth(truth)
    evaluation = COCOeval(reference, reference.loadRes(copy.deepcopy(found)), "segm")
    evaluation.params.maxDets = [limit or 100]
    evaluation.params.useCats = 0 if agnostic else 1
    evaluation.evaluate()
    evaluation.accumulate()
    precision, recall = evaluation.eval["precision"][..., 0, -1], evaluation.eval["recall"][..., 0, -1]
    assert value(report, "AP") == pytest.approx(precision[precision > -1].mean(), abs=1e-9)
    assert value(report, "AR") == pytest.approx(recall[recall > -1].mean(), abs=1e-9)
    if not agnostic:
        classes = {measure.name: measure.value for measure in report.per_class}
        for place, category in enumerate(evaluation.params.catIds):
            of_class = precision[:, :, place]
            if (of_class > -1).any():
                assert classes[f"AP of category {category}"] == pytest.approx(of_class[of_class > -1].mean(), abs=1e-9)


def test_ap_is_left_out_where_the_truth_is_not_complete(tmp_path: Path) -> None:
    truth, _ = scene(1, images=6, tied=False)
    partial = copy.deepcopy(truth)
    del partial["annotations"][::2]
    report = measured(tmp_path, partial, truth)
    names = [measure.name for measure in report.measures]
    assert names[:2] == ["IoU", "boundary IoU"]
    assert not any("AP" in name for name in names)
    assert any("AP is left out" in note and "--protocol coco" in note for note in report.notes())
    assert value(measured(tmp_path, partial, truth, protocol="coco"), "AP") is not None
    scored = copy.deepcopy(truth)
    for annotation in scored["annotations"]:
        annotation["score"] = 0.5
    assert value(measured(tmp_path, partial, scored), "AP") is not None, "detections"


# --- merging


def test_merged_evaluators_equal_one(tmp_path: Path) -> None:
    truth, found = scene(2, images=20, tied=True)
    files = [write(tmp_path / "found.json", found), write(tmp_path / "truth.json", truth)]
    opened = [open_dataset(path, need_images=False) for path in files]
    pairs = list(match_images(opened[0].samples(), opened[1].samples(), None))
    whole, first, rest = (ApEvaluator(False, RATIO, None) for _ in range(3))
    for match in pairs:
        whole.add(match)
    for match in pairs[::2]:
        rest.add(match)
    for match in pairs[1::2]:
        first.add(match)
    first.merge(rest)
    assert first.result() == whole.result()


@pytest.mark.slow
def test_a_federation_travels_to_other_processes(tmp_path: Path) -> None:
    truth, _ = scene(3, images=170, tied=False)
    truth = federated(truth)
    alone, shared = (measured(tmp_path, truth, truth, protocol="lvis", workers=workers) for workers in (1, 2))
    assert alone == shared
