"""IoU and boundary IoU of objects, matched by image and id."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np
from numpy.typing import NDArray

from refinetool import masks
from refinetool.errors import DataError
from refinetool.evaluate.pairing import Match
from refinetool.evaluate.report import MEANINGS, NOTABLE_CHANGE, Measure, Report, share
from refinetool.records import BoolArray, Region, Rle, Sample, Size

CROWD = "crowd"
"""The reason for which formats keep a crowd as it is."""


@dataclass(frozen=True, slots=True)
class Overlap:
    """IoU and boundary IoU of a mask with its ground truth, both in 0..1."""

    iou: float
    boundary_iou: float


LOST = Overlap(iou=0.0, boundary_iou=0.0)
"""What an object scores that the prediction does not have, even if its ground truth is empty."""


@dataclass(frozen=True, slots=True)
class ObjectScore:
    """How the masks of one object overlap with its ground truth; `before` is None without a coarse mask."""

    key: str
    id: int
    after: Overlap
    before: Overlap | None


def overlaps(truth: BoolArray, others: Sequence[BoolArray], *, boundary_ratio: float) -> list[Overlap]:
    """IoU and boundary IoU of some masks, bool (H, W), with one ground truth mask.

    Computed on the box of all of them, which changes nothing: boundary bands lie inside their masks, and what is
    outside the box is background for each. Two empty masks are equal: both figures are 1, as DAVIS has it.
    """
    width_px = masks.boundary_width((truth.shape[0], truth.shape[1]), boundary_ratio)
    box = masks.bounding_box(np.logical_or.reduce([truth, *others]))
    if box is None:
        return [Overlap(iou=1.0, boundary_iou=1.0)] * len(others)
    x0, y0, x1, y1 = box
    truth, *others = (mask[y0:y1, x0:x1] for mask in (truth, *others))
    band = masks.boundary(truth, width_px)
    return [
        Overlap(iou=masks.iou(truth, other), boundary_iou=masks.iou(band, masks.boundary(other, width_px)))
        for other in others
    ]


@dataclass(slots=True)
class InstanceTally:
    """Mean IoU and mean boundary IoU over objects.

    Scored are the objects of the coarse file, without one those of the prediction, that the ground truth has and does
    not mark as crowd. Pixels that are void in the ground truth are left out of all masks.

    after, before: float64 (2,), the sums of IoU and boundary IoU of the prediction and of the coarse masks.
    """

    with_coarse: bool
    boundary_ratio: float
    after: NDArray[np.float64] = field(default_factory=lambda: np.zeros(2))
    before: NDArray[np.float64] = field(default_factory=lambda: np.zeros(2))
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, match: Match) -> None:
        for score in self.scores(match):
            self.after += (score.after.iou, score.after.boundary_iou)
            if score.before is not None:
                self.before += (score.before.iou, score.before.boundary_iou)
                change = score.after.iou - score.before.iou
                self.counts["better"] += change > NOTABLE_CHANGE
                self.counts["worse"] += change < -NOTABLE_CHANGE

    def scores(self, match: Match) -> Iterator[ObjectScore]:
        """Score the objects of one image in the order of the file, and count what is left out."""
        prediction = _by_id(match.prediction, "prediction")
        truth = _by_id(match.truth, "ground truth")
        coarse = _by_id(match.coarse, "coarse file")
        scored = coarse if self.with_coarse else prediction
        reference = {
            id: region.mask for id, region in truth.items() if region.keep != CROWD and region.mask is not None
        }
        crowds = sum(region.keep == CROWD for region in truth.values())
        ids = [id for id in scored if id in reference]
        self.counts.update(
            scored=len(ids),
            missing=len(reference.keys() - scored.keys()),
            lost=len(set(ids) - prediction.keys()),
            added=len(prediction.keys() - scored.keys()),
            extra=len(scored.keys() - truth.keys()),
            crowd=crowds,
            unreadable=len(truth) - len(reference) - crowds,
        )
        void = None if match.truth is None else match.truth.void
        for id in ids:
            yield self._score(match.key, id, reference[id], void, after=prediction.get(id), before=coarse.get(id))

    def _score(
        self, key: str, id: int, truth: Rle, void: Rle | None, *, after: Region | None, before: Region | None
    ) -> ObjectScore:
        valid = None if void is None else ~masks.decode(void)
        reference, *others = (
            _pixels(rle, size=truth.size, valid=valid)
            for rle in (truth, _mask_of(after), *([_mask_of(before)] if self.with_coarse else []))
        )
        self.counts["empty_ground_truth"] += not reference.any()
        self.counts["empty_prediction"] += not others[0].any()
        of_after, *of_before = overlaps(reference, others, boundary_ratio=self.boundary_ratio)
        if after is None:
            of_after = LOST
        return ObjectScore(key=key, id=id, after=of_after, before=of_before[0] if of_before else None)

    def merge(self, other: Self) -> None:
        self.after += other.after
        self.before += other.before
        self.counts.update(other.counts)

    def result(self) -> Report:
        scored = self.counts["scored"]
        measures = tuple(
            Measure(
                name=name,
                reduction="mean over objects",
                value=share(after, scored),
                before=share(before, scored) if self.with_coarse else None,
            )
            for name, after, before in zip(("IoU", "boundary IoU"), self.after, self.before, strict=True)
        )
        return Report(
            measures=measures,
            better=share(self.counts["better"], scored) if self.with_coarse else None,
            worse=share(self.counts["worse"], scored) if self.with_coarse else None,
            counts={name: self.counts[name] for name in MEANINGS if not name.endswith("_px")},
        )


def _by_id(sample: Sample | None, name: str) -> dict[int, Region]:
    if sample is None:
        return {}
    regions = {region.id: region for region in sample.regions}
    if len(regions) < len(sample.regions):
        twice = next(id for id, times in Counter(region.id for region in sample.regions).items() if times > 1)
        raise DataError(
            f"Image {sample.key} has id {twice} twice in the {name}. Objects are matched by id: give each its own."
        )
    return regions


def _mask_of(region: Region | None) -> Rle | None:
    return None if region is None else region.mask


def _pixels(rle: Rle | None, *, size: Size, valid: BoolArray | None) -> BoolArray:
    """The mask, bool (H, W), without the pixels that do not count."""
    if rle is None:
        return np.zeros(size, dtype=np.bool_)
    pixels = masks.decode(rle)
    return pixels if valid is None else pixels & valid
