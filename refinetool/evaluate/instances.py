"""IoU, boundary IoU and boundary accuracy of objects, matched by image and id."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np
from numpy.typing import NDArray

from refinetool.errors import DataError
from refinetool.evaluate.boundary_accuracy import compute_boundary_accuracies
from refinetool.evaluate.gains import IOUS, SIDES_PX, GainHistogram
from refinetool.evaluate.pairing import Match
from refinetool.evaluate.report import OBJECTS, Measure, Report, divide
from refinetool.evaluate.shapes import LOST, Canvas, Overlap, count_common
from refinetool.records import Region, Rle, Sample
from refinetool.statuses import Reason


@dataclass(frozen=True, slots=True)
class MaskScore:
    """How one mask compares with its ground truth.

    overlap: IoU and boundary IoU.
    shared, covered: Pixels of intersection and union.
    boundary_accuracy: 0..1, None where the ground truth has no outline.
    """

    overlap: Overlap
    shared: int
    covered: int
    boundary_accuracy: float | None


@dataclass(frozen=True, slots=True)
class ObjectScore:
    """How the masks of one object compare with its ground truth.

    area: Pixels of the ground truth.
    after, before: Scores of the prediction and of the coarse mask; `before` is None without a coarse file.
    """

    key: str
    id: int
    category: int | None
    area: int
    after: MaskScore
    before: MaskScore | None


@dataclass(slots=True)
class MaskSums:
    """Sums over the masks of one file.

    iou, boundary_iou, boundary_accuracy: Sums of the scores of each object.
    shared, covered: Pixels of intersection and union over the data set.
    classes: The same two per category, int64 (2,).
    """

    iou: float = 0.0
    boundary_iou: float = 0.0
    boundary_accuracy: float = 0.0
    shared: int = 0
    covered: int = 0
    classes: dict[int, NDArray[np.int64]] = field(default_factory=dict)

    def add(self, score: MaskScore, category: int | None) -> None:
        self.iou += score.overlap.iou
        self.boundary_iou += score.overlap.boundary_iou
        self.boundary_accuracy += score.boundary_accuracy or 0.0
        self.shared += score.shared
        self.covered += score.covered
        if category is not None:
            self._add_class(category, np.array([score.shared, score.covered], dtype=np.int64))

    def merge(self, other: "MaskSums") -> None:
        self.iou += other.iou
        self.boundary_iou += other.boundary_iou
        self.boundary_accuracy += other.boundary_accuracy
        self.shared += other.shared
        self.covered += other.covered
        for category, pixels in other.classes.items():
            self._add_class(category, pixels)

    def compute_class_ious(self) -> dict[int, float]:
        """Divide the sum of intersections by the sum of unions, per category."""
        return {category: int(s) / int(c) for category, (s, c) in sorted(self.classes.items()) if c}

    def _add_class(self, category: int, pixels: NDArray[np.int64]) -> None:
        self.classes[category] = self.classes.get(category, np.zeros(2, dtype=np.int64)) + pixels


@dataclass(slots=True)
class InstanceEvaluator:
    """IoU (mean over objects, global, per category), boundary IoU, mBA, and gains by size and coarse IoU.

    The objects scored are those of the coarse file, or of the prediction if there is no coarse file, that the ground
    truth has and does not mark as crowds. Pixels that are void in the ground truth are left out of all masks.

    folder: Whether the masks are PNGs in a folder. If none of its images has several objects, means over objects are
        the means over images that HQ-SAM's benchmark calls mIoU and mBIoU.
    crowded_images: Number of images with more than one object.
    """

    with_coarse: bool
    boundary_ratio: float
    folder: bool = False
    after: MaskSums = field(default_factory=MaskSums)
    before: MaskSums = field(default_factory=MaskSums)
    by_size: GainHistogram = field(default_factory=lambda: GainHistogram(SIDES_PX))
    by_coarse_iou: GainHistogram = field(default_factory=lambda: GainHistogram(IOUS))
    counts: Counter[str] = field(default_factory=Counter)
    crowded_images: int = 0

    def add(self, match: Match) -> None:
        scores = list(self.score_objects(match))
        self.crowded_images += len(scores) > 1
        for score in scores:
            self.after.add(score.after, score.category)
            self.counts["no_outline"] += score.after.boundary_accuracy is None
            if score.before is not None:
                self.before.add(score.before, score.category)
                was, now = score.before.overlap.iou, score.after.overlap.iou
                self.by_size.add(score.area**0.5, before=was, after=now)
                self.by_coarse_iou.add(was, before=was, after=now)

    def score_objects(self, match: Match) -> Iterator[ObjectScore]:
        """Score the objects of one image in the order of the file, and count those left out."""
        prediction = _index_by_id(match.prediction, "prediction")
        truth = _index_by_id(match.truth, "ground truth")
        coarse = _index_by_id(match.coarse, "coarse file")
        scored = coarse if self.with_coarse else prediction
        reference = {
            id: region.mask
            for id, region in truth.items()
            if region.keep is not Reason.CROWD and region.mask is not None
        }
        crowds = sum(region.keep is Reason.CROWD for region in truth.values())
        ids = [id for id in scored if id in reference]
        lost = [id for id in ids if _readable(prediction.get(id)) is None]
        self.counts.update(
            scored=len(ids),
            missing=len(reference.keys() - scored.keys()),
            lost=len(lost),
            added=len(prediction.keys() - scored.keys()),
            extra=len(scored.keys() - truth.keys()),
            crowd=crowds,
            unreadable=len(truth) - len(reference) - crowds,
        )
        if match.truth is None:
            return
        canvas = match.canvas(self.boundary_ratio)
        for id in ids:
            after, before = (_readable(regions.get(id)) for regions in (prediction, coarse))
            yield self._score_object(match.key, truth[id], reference[id], canvas, after=after, before=before)

    def _score_object(
        self, key: str, truth: Region, mask: Rle, canvas: Canvas, *, after: Region | None, before: Region | None
    ) -> ObjectScore:
        reference = canvas.get_shape(mask)
        sides = (after, before) if self.with_coarse else (after,)
        others = [canvas.get_shape(_get_mask(region)) for region in sides]
        self.counts["empty_ground_truth"] += not reference.area
        self.counts["empty_prediction"] += not others[0].area
        accuracies = compute_boundary_accuracies(reference, others, size=canvas.size, void=canvas.void)
        scores = []
        for number, other in enumerate(others):
            pixels = count_common(reference, other)
            scores.append(
                MaskScore(
                    overlap=LOST if sides[number] is None else pixels.overlap,
                    shared=pixels.shared,
                    covered=pixels.covered,
                    boundary_accuracy=None if accuracies is None else accuracies[number],
                )
            )
        return ObjectScore(
            key=key,
            id=truth.id,
            category=truth.category,
            area=reference.area,
            after=scores[0],
            before=scores[1] if self.with_coarse else None,
        )

    def merge(self, other: Self) -> None:
        self.after.merge(other.after)
        self.before.merge(other.before)
        self.by_size.merge(other.by_size)
        self.by_coarse_iou.merge(other.by_coarse_iou)
        self.counts.update(other.counts)
        self.crowded_images += other.crowded_images

    def result(self) -> Report:
        scored, outlined = self.counts["scored"], self.counts["scored"] - self.counts["no_outline"]
        after, before = self.after, self.before
        classes = after.compute_class_ious(), before.compute_class_ious()
        rows: list[tuple[str, str, float | None, float | None]] = [
            ("IoU", MEAN, divide(after.iou, scored), divide(before.iou, scored)),
            ("boundary IoU", MEAN, divide(after.boundary_iou, scored), divide(before.boundary_iou, scored)),
        ]
        if self.folder and scored and not self.crowded_images:
            rows += [
                (name, "mean over images of one object each", value, coarse)
                for name, (_, _, value, coarse) in zip(("mIoU", "mBIoU"), rows, strict=True)
            ]
        rows += [
            ("global IoU", GLOBAL, divide(after.shared, after.covered), divide(before.shared, before.covered)),
            ("mBA", MEAN, divide(after.boundary_accuracy, outlined), divide(before.boundary_accuracy, outlined)),
        ]
        if classes[0]:
            now, was = (divide(sum(ious.values()), len(ious)) for ious in classes)
            rows.append(("category mIoU", PER_CATEGORY, now, was))
        gains = self.by_coarse_iou.total()
        return Report(
            measures=tuple(self._make_measure(*row) for row in rows),
            better=gains.better,
            worse=gains.worse,
            gain_error=gains.gain_error,
            counts={name: self.counts[name] for name in OBJECTS},
            per_class=tuple(
                self._make_measure(f"IoU of category {category}", GLOBAL, iou, classes[1].get(category))
                for category, iou in classes[0].items()
            ),
            gain_by_size=self.by_size.result() if self.with_coarse else (),
            gain_by_coarse_iou=self.by_coarse_iou.result() if self.with_coarse else (),
            remarks=_explain_fall(rows) if self.with_coarse else (),
        )

    def _make_measure(self, name: str, reduction: str, value: float | None, before: float | None) -> Measure:
        return Measure(name, reduction, value, before if self.with_coarse else None)


def _explain_fall(rows: Sequence[tuple[str, str, float | None, float | None]]) -> tuple[str, ...]:
    """Explain why mBA fell although IoU rose, where that is so."""
    gains = {name: now - was for name, _, now, was in rows if now is not None and was is not None}
    if not gains.get("mBA", 0.0) < 0 < gains.get("IoU", 0.0):
        return ()
    return (
        "mBA fell although IoU rose: it looks only at pixels near the true outline, where coarse masks that were made "
        "from the ground truth are right to the pixel wherever they have no defect; no refiner reproduces that",
    )


MEAN = "mean over objects"
GLOBAL = "sum of intersections / sum of unions"
PER_CATEGORY = "global IoU per category, mean over categories"


def _index_by_id(sample: Sample | None, name: str) -> dict[int, Region]:
    if sample is None:
        return {}
    regions = {region.id: region for region in sample.regions}
    if len(regions) < len(sample.regions):
        twice = next(id for id, times in Counter(region.id for region in sample.regions).items() if times > 1)
        raise DataError(
            f"Image {sample.key} has id {twice} twice in the {name}; objects are matched by id, so give each its own."
        )
    return regions


def _readable(region: Region | None) -> Region | None:
    """Return a region, or None if its mask can't be read; one without a mask is empty, which is readable."""
    unreadable = region is None or (region.mask is None and region.keep not in (Reason.EMPTY, Reason.CROWD))
    return None if unreadable else region


def _get_mask(region: Region | None) -> Rle | None:
    return None if region is None else region.mask
