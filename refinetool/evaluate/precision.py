"""Average precision of detections, as COCO and LVIS define it, for masks and for their boundaries.

Overlaps are measured image by image and kept as numbers, so that no mask outlives its image and the evaluators of
several processes can be merged. Matching and precision are left to faster-coco-eval.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from refinetool import masks
from refinetool.evaluate.pairing import Match, in_order
from refinetool.evaluate.report import PRECISION, Measure, Report
from refinetool.evaluate.shapes import Canvas, count_common
from refinetool.formats.coco_lvis import Federation
from refinetool.records import Region, Rle, Sample
from refinetool.statuses import Reason

LOWEST_THRESHOLD = 0.5
"""The lowest IoU threshold. Pairs below it are never matched, so their boundaries need not be compared."""

COCO_DETECTIONS = 100
"""How many detections of an image and a category COCO evaluates."""

LVIS_DETECTIONS = 300
"""How many detections of an image LVIS evaluates, over all categories."""

AREAS = ("all", "small", "medium", "large")


@dataclass(frozen=True, slots=True)
class Detections:
    """The D detections of one category in an image, in the order of the file, and their overlaps with its G objects.

    scores, areas: float64 (D,).
    mask_iou: float64 (D, G).
    boundary_iou: float64 (D, G), the smaller of mask and boundary IoU; the mask IoU with crowds.
    """

    scores: NDArray[np.float64]
    areas: NDArray[np.float64]
    mask_iou: NDArray[np.float64]
    boundary_iou: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Truths:
    """The G true objects of one category in an image: areas, float64 (G,), and whether they are crowds, bool (G,)."""

    areas: NDArray[np.float64]
    crowds: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """What AP needs to know of an image, by category; `before` is empty without coarse masks."""

    truths: Mapping[int, Truths]
    after: Mapping[int, Detections]
    before: Mapping[int, Detections]


@dataclass(frozen=True, slots=True)
class Curves:
    """Precision by IoU threshold, recall point and area, float64 (T, R, A), and recall by threshold and area, float64
    (T, A); -1 where they are not defined."""

    precision: NDArray[np.float64]
    recall: NDArray[np.float64]


@dataclass(slots=True)
class ApEvaluator:
    """AP, AP at IoU 0.50 and 0.75, and AP by area, for masks and for boundaries.

    Detections are the annotations of the prediction. Those without a score get 1.0, and ties are broken by the order of
    images and annotations, as in pycocotools. A detection whose mask is empty or unreadable stays one, which can only
    be wrong, and such a true object stays one, which can only be missed. Crowds in the prediction are no detections;
    crowds in the ground truth are ignored by COCO's rules. The area of a true object is the one that its file states,
    that of a detection is the area of its mask.

    federation: What LVIS says about its images and categories; None for COCO's rules.
    max_detections: Detections of an image and a category that count; by LVIS's rules, of an image.
    class_agnostic: Whether all categories count as one.
    if_complete: Whether AP is left out where masks without a score have no ground truth of their id: then the ground
        truth is not complete, and AP would count them as wrong.
    """

    with_coarse: bool
    boundary_ratio: float
    federation: Federation | None
    max_detections: int = COCO_DETECTIONS
    class_agnostic: bool = False
    if_complete: bool = False
    images: dict[str, ImageRecord] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, match: Match) -> None:
        detections = [
            self._select_detections(sample, of_prediction=number == 0)
            for number, sample in enumerate((match.prediction, match.coarse if self.with_coarse else None))
        ]
        if match.truth is None:
            self.counts["detections_elsewhere"] += len(detections[0])
            return
        truths: Sequence[Region] = match.truth.regions
        self.counts["truths_unreadable"] += sum(
            region.mask is None and region.keep is not Reason.CROWD for region in truths
        )
        known = {region.id for region in truths}
        self.counts["untold"] += sum(region.score is None and region.id not in known for region in detections[0])
        if self.class_agnostic:
            truths, detections = _as_one(truths), [_as_one(regions) for regions in detections]
        self.counts["uncategorised"] += sum(region.category is None for region in (*truths, *detections[0]))
        canvas = match.canvas(self.boundary_ratio)
        of_truth = _group_by_category(truths)
        self.images[match.key] = ImageRecord(
            truths={category: _summarise_truths(regions) for category, regions in of_truth.items()},
            after=_measure_detections(detections[0], of_truth, canvas),
            before=_measure_detections(detections[1], of_truth, canvas),
        )

    def _select_detections(self, sample: Sample | None, *, of_prediction: bool) -> list[Region]:
        regions: Sequence[Region] = () if sample is None else sample.regions
        found = [region for region in regions if region.keep is not Reason.CROWD]
        if of_prediction:
            self.counts["detections"] += len(found)
            self.counts["crowd_detections"] += len(regions) - len(found)
            self.counts["detections_unreadable"] += sum(not _count_pixels(region.mask) for region in found)
            self.counts["unscored"] += sum(region.score is None for region in found)
        if self.federation is not None:
            found = sorted(found, key=lambda region: -_get_score(region))[: self.max_detections]
        return found

    def merge(self, other: Self) -> None:
        self.images |= other.images
        self.counts.update(other.counts)

    def result(self) -> Report:
        counts = {name: self.counts[name] for name in PRECISION}
        if self.counts["uncategorised"]:
            left_out = f"AP is left out: {self.counts['uncategorised']} annotations have no category_id."
            return Report((), counts=counts, remarks=(left_out,))
        if self.if_complete and self.counts["untold"]:
            left_out = (
                f"AP is left out: {self.counts['untold']} masks have no ground truth, which is therefore not complete, "
                "and would count as wrong; --protocol coco computes it all the same"
            )
            return Report((), counts=counts, remarks=(left_out,))
        (after, classes), (before, coarse) = (self._compute_precisions(side) for side in ("after", "before"))
        return Report(
            measures=tuple(
                Measure(
                    name=f"{kind}{name}",
                    reduction=reduction,
                    value=of_after,
                    before=before[kind][name][1] if self.with_coarse else None,
                )
                for kind, values in after.items()
                for name, (reduction, of_after) in values.items()
            ),
            counts=counts,
            per_class=tuple(
                Measure(f"AP of category {category}", "mean over IoU 0.50:0.95", value, coarse.get(category))
                for category, value in classes.items()
            ),
            remarks=tuple(self._write_remarks()),
        )

    def _write_remarks(self) -> Iterator[str]:
        if self.counts["unscored"]:
            yield (
                f"{self.counts['unscored']} detections have no score and count as 1.0, so AP depends on the order of "
                "the file; compare it only with the AP of the same file before or after refinement"
            )

    def _compute_precisions(
        self, side: str
    ) -> tuple[dict[str, dict[str, tuple[str, float | None]]], dict[int, float | None]]:
        """The reduction and the value of each AP, by kind (`` for masks, `boundary ` for boundaries) and name; and the
        AP of masks by category."""
        places, values = self._locate_categories(), {}
        classes: dict[int, float | None] = {}
        for kind, overlap in (("", "mask_iou"), ("boundary ", "boundary_iou")):
            curves = {category: self._compute_curves(side, category, where, overlap) for category, where in places}
            values[kind] = self._summarise(curves)
            classes = classes or {category: _average_defined(of.precision[..., 0]) for category, of in curves.items()}
        return values, classes

    def _locate_categories(self) -> list[tuple[int, list[tuple[int, str]]]]:
        """Each category of the ground truth with the images, by number and key, that hold it on either side.

        Images are numbered in the order of their keys, because pycocotools breaks ties in that order.
        """
        places: dict[int, list[tuple[int, str]]] = {}
        wanted = {category for image in self.images.values() for category in image.truths}
        for number, key in enumerate(in_order(self.images), start=1):
            image = self.images[key]
            for category in image.truths.keys() | image.after.keys() | image.before.keys():
                if category in wanted:
                    places.setdefault(category, []).append((number, key))
        return sorted(places.items())

    def _compute_curves(self, side: str, category: int, where: Sequence[tuple[int, str]], overlap: str) -> Curves:
        truths: list[dict[str, Any]] = []
        detections: list[dict[str, Any]] = []
        overlaps: dict[int, NDArray[np.float64]] = {}
        for number, key in where:
            objects = self.images[key].truths.get(category)
            found: Detections | None = getattr(self.images[key], side).get(category)
            if objects is not None:
                for area, crowd in zip(objects.areas.tolist(), objects.crowds.tolist(), strict=True):
                    truths.append(_make_annotation(len(truths) + 1, number, category, area=area, iscrowd=int(crowd)))
            if found is not None:
                overlaps[number] = getattr(found, overlap)
                for area, score in zip(found.areas.tolist(), found.scores.tolist(), strict=True):
                    detections.append(_make_annotation(len(detections) + 1, number, category, area=area, score=score))
        images = [{"id": number, "height": 1, "width": 1, **self._list_federation(key)} for number, key in where]
        shared = {"images": images, "categories": [{"id": category, "name": str(category), "frequency": "f"}]}
        evaluation = _Evaluation(
            COCO({**shared, "annotations": truths}),
            COCO({**shared, "annotations": detections}),
            overlaps=overlaps,
            lvis=self.federation is not None,
            max_detections=self.max_detections,
        )
        evaluation.evaluate()
        evaluation.accumulate()
        precision, recall = (np.asarray(evaluation.eval[name], dtype=np.float64) for name in ("precision", "recall"))
        return Curves(precision[:, :, 0, :, -1], recall[:, 0, :, -1])

    def _list_federation(self, key: str) -> dict[str, Any]:
        if self.federation is None:
            return {}
        return {
            "neg_category_ids": list(self.federation.negative.get(key, ())),
            "not_exhaustive_category_ids": list(self.federation.not_exhaustive.get(key, ())),
        }

    def _summarise(self, curves: Mapping[int, Curves]) -> dict[str, tuple[str, float | None]]:
        """AP, AR and their reductions by name; None where they are not defined."""
        if not curves:
            return {}
        whole = np.stack([of.precision for of in curves.values()])  # category, threshold, recall, area
        recalls = np.stack([of.recall for of in curves.values()])  # category, threshold, area
        rules = "COCO" if self.federation is None else "LVIS"
        if self.class_agnostic:
            rules += ", class-agnostic"
        values = {
            "AP": (f"{rules}, mean over categories and IoU 0.50:0.95", _average_defined(whole[..., 0])),
            "AP50": (f"{rules}, IoU 0.50", _average_defined(whole[:, 0, :, 0])),
            "AP75": (f"{rules}, IoU 0.75", _average_defined(whole[:, 5, :, 0])),
        }
        for place, area in enumerate(AREAS[1:], start=1):
            values[f"AP {area}"] = (f"{rules}, {area} objects", _average_defined(whole[..., place]))
        frequencies = {} if self.federation is None else self.federation.frequencies
        for letter, word in (("r", "rare"), ("c", "common"), ("f", "frequent")) if frequencies else ():
            rows = [row for row, category in enumerate(curves) if frequencies.get(category) == letter]
            values[f"AP{letter}"] = (f"{rules}, {word} categories", _average_defined(whole[rows, ..., 0]))
        per = "image and category" if self.federation is None else "image"
        values["AR"] = (f"{rules}, {self.max_detections} detections per {per}", _average_defined(recalls[..., 0]))
        return values


class _Evaluation(COCOeval_faster):  # type: ignore[misc]
    """faster-coco-eval, given overlaps instead of masks.

    It is told to compare boxes, so that it does not ask for masks. It gets the overlaps of an image and a category from
    `computeIoU`, as pycocotools does: those of the best scores first, and only as many as count.
    """

    def __init__(
        self,
        truth: COCO,
        found: COCO,
        *,
        overlaps: Mapping[int, NDArray[np.float64]],
        lvis: bool,
        max_detections: int,
    ) -> None:
        super().__init__(truth, found, "bbox", print_function=lambda *_: None, lvis_style=lvis)
        self.overlaps = overlaps
        self.params.maxDets = [max_detections]

    def computeIoU(self, imgId: int, catId: int) -> Any:  # noqa: N802, N803
        found = self.dt_dataset.get(imgId, catId)
        if not len(found) or not self.overlaps[imgId].size:
            return []
        order = np.argsort([-detection["score"] for detection in found], kind="mergesort")
        return self.overlaps[imgId][order[: self.params.maxDets[-1]]]


def _make_annotation(id: int, image: int, category: int, **more: Any) -> dict[str, Any]:
    """Make a record for faster-coco-eval, a new one each time because it writes into them. Ids begin at 1, since it
    takes 0 for unmatched. It never looks at the box."""
    return {"id": id, "image_id": image, "category_id": category, "iscrowd": 0, "bbox": [0, 0, 0, 0], **more}


def _average_defined(precision: NDArray[np.float64]) -> float | None:
    defined = precision[precision > -1]
    return float(defined.mean()) if defined.size else None


def _as_one(regions: Sequence[Region]) -> list[Region]:
    """Return regions that are all of one category."""
    return [replace(region, category=1) for region in regions]


def _group_by_category(regions: Sequence[Region]) -> dict[int, list[Region]]:
    found: dict[int, list[Region]] = {}
    for region in regions:
        if region.category is not None:
            found.setdefault(region.category, []).append(region)
    return found


def _summarise_truths(regions: Sequence[Region]) -> Truths:
    return Truths(
        areas=np.array([_count_pixels(region.mask) if region.area is None else region.area for region in regions]),
        crowds=np.array([region.keep is Reason.CROWD for region in regions]),
    )


def _measure_detections(
    detections: Sequence[Region], truths: Mapping[int, Sequence[Region]], canvas: Canvas
) -> dict[int, Detections]:
    return {
        category: _measure_category(regions, truths.get(category, ()), canvas)
        for category, regions in _group_by_category(detections).items()
    }


def _measure_category(found: Sequence[Region], truths: Sequence[Region], canvas: Canvas) -> Detections:
    mask_iou = np.zeros((len(found), len(truths)))
    (rows, guesses), (columns, references) = _encode_masks(found), _encode_masks(truths)
    if rows and columns:
        crowds = [int(truths[column].keep is Reason.CROWD) for column in columns]
        mask_iou[np.ix_(rows, columns)] = coco_mask.iou(guesses, references, crowds)
    boundary_iou = mask_iou.copy()
    for row, column in zip(*np.nonzero(mask_iou >= LOWEST_THRESHOLD), strict=True):
        if truths[column].keep is not Reason.CROWD:
            overlap = count_common(canvas.get_shape(truths[column].mask), canvas.get_shape(found[row].mask)).overlap
            boundary_iou[row, column] = min(mask_iou[row, column], overlap.boundary_iou)
    return Detections(
        scores=np.array([_get_score(region) for region in found]),
        areas=np.array([float(_count_pixels(region.mask)) for region in found]),
        mask_iou=mask_iou,
        boundary_iou=boundary_iou,
    )


def _get_score(region: Region) -> float:
    return 1.0 if region.score is None else region.score


def _count_pixels(rle: Rle | None) -> int:
    return 0 if rle is None else masks.area(rle)


def _encode_masks(regions: Sequence[Region]) -> tuple[list[int], list[dict[str, Any]]]:
    """The places of the regions with a mask that can be decoded, and these masks as pycocotools takes them."""
    places = [place for place, region in enumerate(regions) if region.mask is not None]
    runs = [region.mask for region in regions if region.mask is not None]
    return places, [{"size": list(rle.size), "counts": rle.counts} for rle in runs]
