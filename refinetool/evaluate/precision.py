"""Average precision of detections, as COCO and LVIS define it, for masks and for their boundaries.

Overlaps are measured image by image and kept as numbers, so no mask outlives its image and tallies of several
processes can be merged. Matching and precision are faster-coco-eval's.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from refinetool import masks
from refinetool.evaluate.instances import CROWD
from refinetool.evaluate.pairing import Match
from refinetool.evaluate.report import PRECISION, Measure, Report
from refinetool.evaluate.shapes import Canvas, common
from refinetool.formats.coco_lvis import Federation
from refinetool.records import Region, Rle, Sample

MATCHING = 0.5
"""The lowest IoU threshold: pairs below it are never matched, whatever their boundaries."""

LVIS_DETECTIONS = 300
"""Detections of an image that LVIS evaluates, over all categories."""

AREAS = ("all", "small", "medium", "large")


@dataclass(frozen=True, slots=True)
class Detections:
    """The D detections of one category in an image, in the order of the file, and their overlaps with its G objects.

    scores, areas: float64 (D,).
    mask_iou: float64 (D, G).
    boundary_iou: float64 (D, G), the lesser of mask and boundary IoU, except with crowds.
    """

    scores: NDArray[np.float64]
    areas: NDArray[np.float64]
    mask_iou: NDArray[np.float64]
    boundary_iou: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Truths:
    """The G true objects of one category in an image: float64 (G,) areas, bool (G,) whether they are crowds."""

    areas: NDArray[np.float64]
    crowds: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """What AP needs of an image, by category; `before` is empty without coarse masks."""

    truths: Mapping[int, Truths]
    after: Mapping[int, Detections]
    before: Mapping[int, Detections]


@dataclass(slots=True)
class ApTally:
    """AP, AP at IoU 0.50 and 0.75, and AP by area, for masks and for boundaries.

    Detections are the annotations of the prediction; those without a score count as sure of themselves (1.0), and ties
    are broken by the order of images and annotations, as pycocotools does it. An empty or unreadable mask stays a
    detection, which can only be wrong; such a true object stays one, which can only be missed. Crowds of the prediction
    are no detections; those of the ground truth are ignored as COCO has it. A true object has the area that its file
    states, a detection that of its mask.

    federation: What LVIS says about its images and categories; None for COCO's rules.
    """

    with_coarse: bool
    boundary_ratio: float
    federation: Federation | None
    images: dict[str, ImageRecord] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, match: Match) -> None:
        detections = [
            self._detections(sample, of_prediction=number == 0)
            for number, sample in enumerate((match.prediction, match.coarse if self.with_coarse else None))
        ]
        if match.truth is None:
            self.counts["detections_elsewhere"] += len(detections[0])
            return
        truths = match.truth.regions
        self.counts["truths_unreadable"] += sum(region.mask is None and region.keep != CROWD for region in truths)
        self.counts["uncategorised"] += sum(region.category is None for region in (*truths, *detections[0]))
        canvas = match.canvas(self.boundary_ratio)
        of_truth = _by_category(truths)
        self.images[match.key] = ImageRecord(
            truths={category: _truths(regions) for category, regions in of_truth.items()},
            after=_measured(detections[0], of_truth, canvas),
            before=_measured(detections[1], of_truth, canvas),
        )

    def _detections(self, sample: Sample | None, *, of_prediction: bool) -> list[Region]:
        regions: Sequence[Region] = () if sample is None else sample.regions
        found = [region for region in regions if region.keep != CROWD]
        if of_prediction:
            self.counts["detections"] += len(found)
            self.counts["crowd_detections"] += len(regions) - len(found)
            self.counts["detections_unreadable"] += sum(not _area(region.mask) for region in found)
            self.counts["unscored"] += sum(region.score is None for region in found)
        if self.federation is not None:
            found = sorted(found, key=lambda region: -_score(region))[:LVIS_DETECTIONS]
        return found

    def merge(self, other: Self) -> None:
        self.images |= other.images
        self.counts.update(other.counts)

    def result(self) -> Report:
        counts = {name: self.counts[name] for name in PRECISION}
        if self.counts["uncategorised"]:
            left_out = f"AP is left out: {self.counts['uncategorised']} annotations have no category_id."
            return Report((), counts=counts, remarks=(left_out,))
        after, before = self._precisions("after"), self._precisions("before")
        return Report(
            measures=tuple(
                Measure(
                    name=f"{kind}{name}",
                    reduction=reduction,
                    value=of_after,
                    before=before[kind][name][1] if self.with_coarse else None,
                )
                for kind, figures in after.items()
                for name, (reduction, of_after) in figures.items()
            ),
            counts=counts,
            remarks=tuple(self._remarks()),
        )

    def _remarks(self) -> Iterator[str]:
        if self.counts["unscored"]:
            yield (
                f"{self.counts['unscored']} detections have no score and count as 1.0: AP then depends on the order "
                "of the file, so compare it only with that of the same file refined"
            )

    def _precisions(self, side: str) -> dict[str, dict[str, tuple[str, float | None]]]:
        """By kind (mask AP is ``, boundary AP `boundary `) and name: how it was reduced, and the figure."""
        places, figures = self._places(), {}
        for kind, overlap in (("", "mask_iou"), ("boundary ", "boundary_iou")):
            precisions = {category: self._category(side, category, where, overlap) for category, where in places}
            figures[kind] = self._figures(precisions)
        return figures

    def _places(self) -> list[tuple[int, list[tuple[int, str]]]]:
        """Each category of the ground truth with the images, by number and key, that hold it on either side.

        Images are numbered in the order of their keys, as numbers if they are some: so pycocotools breaks ties.
        """
        numbers = all(key.isdecimal() for key in self.images)
        places: dict[int, list[tuple[int, str]]] = {}
        wanted = {category for image in self.images.values() for category in image.truths}
        for number, key in enumerate(sorted(self.images, key=int if numbers else None), start=1):
            image = self.images[key]
            for category in image.truths.keys() | image.after.keys() | image.before.keys():
                if category in wanted:
                    places.setdefault(category, []).append((number, key))
        return sorted(places.items())

    def _category(
        self, side: str, category: int, where: Sequence[tuple[int, str]], overlap: str
    ) -> NDArray[np.float64]:
        """float64 (T, R, A): precision by IoU threshold, recall point and area, -1 where it is not defined."""
        truths: list[dict[str, Any]] = []
        detections: list[dict[str, Any]] = []
        overlaps: dict[int, NDArray[np.float64]] = {}
        for number, key in where:
            objects = self.images[key].truths.get(category)
            found: Detections | None = getattr(self.images[key], side).get(category)
            if objects is not None:
                for area, crowd in zip(objects.areas.tolist(), objects.crowds.tolist(), strict=True):
                    truths.append(_annotation(len(truths) + 1, number, category, area=area, iscrowd=int(crowd)))
            if found is not None:
                overlaps[number] = getattr(found, overlap)
                for area, score in zip(found.areas.tolist(), found.scores.tolist(), strict=True):
                    detections.append(_annotation(len(detections) + 1, number, category, area=area, score=score))
        images = [{"id": number, "height": 1, "width": 1, **self._federated(key)} for number, key in where]
        shared = {"images": images, "categories": [{"id": category, "name": str(category), "frequency": "f"}]}
        evaluation = _Evaluation(
            COCO({**shared, "annotations": truths}),
            COCO({**shared, "annotations": detections}),
            overlaps=overlaps,
            lvis=self.federation is not None,
        )
        evaluation.evaluate()
        evaluation.accumulate()
        precision: NDArray[np.float64] = np.asarray(evaluation.eval["precision"], dtype=np.float64)
        return precision[:, :, 0, :, -1]

    def _federated(self, key: str) -> dict[str, Any]:
        if self.federation is None:
            return {}
        return {
            "neg_category_ids": list(self.federation.negative.get(key, ())),
            "not_exhaustive_category_ids": list(self.federation.not_exhaustive.get(key, ())),
        }

    def _figures(self, precisions: Mapping[int, NDArray[np.float64]]) -> dict[str, tuple[str, float | None]]:
        """AP by name, with its reduction; -1, which stands for undefined, becomes None."""
        if not precisions:
            return {}
        whole = np.stack(list(precisions.values()))  # category, threshold, recall, area
        rules = "COCO" if self.federation is None else "LVIS"
        figures = {
            "AP": (f"{rules}, mean over categories and IoU 0.50:0.95", _mean(whole[..., 0])),
            "AP50": (f"{rules}, IoU 0.50", _mean(whole[:, 0, :, 0])),
            "AP75": (f"{rules}, IoU 0.75", _mean(whole[:, 5, :, 0])),
        }
        for place, area in enumerate(AREAS[1:], start=1):
            figures[f"AP {area}"] = (f"{rules}, {area} objects", _mean(whole[..., place]))
        frequencies = {} if self.federation is None else self.federation.frequencies
        for letter, word in (("r", "rare"), ("c", "common"), ("f", "frequent")) if frequencies else ():
            rows = [row for row, category in enumerate(precisions) if frequencies.get(category) == letter]
            figures[f"AP{letter}"] = (f"{rules}, {word} categories", _mean(whole[rows, ..., 0]))
        return figures


class _Evaluation(COCOeval_faster):  # type: ignore[misc]
    """faster-coco-eval on overlaps that are known.

    It is told that it compares boxes, which keeps it from asking for masks, and asks for the overlaps of an image and
    a category through `computeIoU`, as pycocotools does: best scores first, as many as count.
    """

    def __init__(self, truth: COCO, found: COCO, *, overlaps: Mapping[int, NDArray[np.float64]], lvis: bool) -> None:
        super().__init__(truth, found, "bbox", print_function=lambda *_: None, lvis_style=lvis)
        self.overlaps = overlaps
        if lvis:
            self.params.maxDets = [LVIS_DETECTIONS]

    def computeIoU(self, imgId: int, catId: int) -> Any:  # noqa: N802, N803
        found = self.dt_dataset.get(imgId, catId)
        if not len(found) or not self.overlaps[imgId].size:
            return []
        order = np.argsort([-detection["score"] for detection in found], kind="mergesort")
        return self.overlaps[imgId][order[: self.params.maxDets[-1]]]


def _annotation(id: int, image: int, category: int, **more: Any) -> dict[str, Any]:
    """A record for faster-coco-eval, made anew each time, since it writes into them; ids begin at 1, since 0 means
    unmatched to it. The box is never looked at."""
    return {"id": id, "image_id": image, "category_id": category, "iscrowd": 0, "bbox": [0, 0, 0, 0], **more}


def _mean(precision: NDArray[np.float64]) -> float | None:
    defined = precision[precision > -1]
    return float(defined.mean()) if defined.size else None


def _by_category(regions: Sequence[Region]) -> dict[int, list[Region]]:
    found: dict[int, list[Region]] = {}
    for region in regions:
        if region.category is not None:
            found.setdefault(region.category, []).append(region)
    return found


def _truths(regions: Sequence[Region]) -> Truths:
    return Truths(
        areas=np.array([_area(region.mask) if region.area is None else region.area for region in regions]),
        crowds=np.array([region.keep == CROWD for region in regions]),
    )


def _measured(
    detections: Sequence[Region], truths: Mapping[int, Sequence[Region]], canvas: Canvas
) -> dict[int, Detections]:
    return {
        category: _detections_of(regions, truths.get(category, ()), canvas)
        for category, regions in _by_category(detections).items()
    }


def _detections_of(found: Sequence[Region], truths: Sequence[Region], canvas: Canvas) -> Detections:
    mask_iou = np.zeros((len(found), len(truths)))
    (rows, guesses), (columns, references) = _decodable(found), _decodable(truths)
    if rows and columns:
        crowds = [int(truths[column].keep == CROWD) for column in columns]
        mask_iou[np.ix_(rows, columns)] = coco_mask.iou(guesses, references, crowds)
    boundary_iou = mask_iou.copy()
    for row, column in zip(*np.nonzero(mask_iou >= MATCHING), strict=True):
        if truths[column].keep != CROWD:
            overlap = common(canvas.shape(truths[column].mask), canvas.shape(found[row].mask)).overlap
            boundary_iou[row, column] = min(mask_iou[row, column], overlap.boundary_iou)
    return Detections(
        scores=np.array([_score(region) for region in found]),
        areas=np.array([float(_area(region.mask)) for region in found]),
        mask_iou=mask_iou,
        boundary_iou=boundary_iou,
    )


def _score(region: Region) -> float:
    return 1.0 if region.score is None else region.score


def _area(rle: Rle | None) -> int:
    return 0 if rle is None else masks.area(rle)


def _decodable(regions: Sequence[Region]) -> tuple[list[int], list[dict[str, Any]]]:
    """The places of those whose mask can be decoded, and their masks for pycocotools; the others overlap nothing."""
    places = [place for place, region in enumerate(regions) if region.mask is not None]
    runs = [region.mask for region in regions if region.mask is not None]
    return places, [{"size": list(rle.size), "counts": rle.counts} for rle in runs]
