"""Mean IoU of label maps, compared pixel by pixel with sums over the whole data set."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Self

import numpy as np
from numpy.typing import NDArray

from refinetool import masks
from refinetool.errors import DataError
from refinetool.evaluate.pairing import Match
from refinetool.evaluate.report import PIXELS, Measure, Report, share
from refinetool.records import BoolArray, Sample

LABELS = 256
"""Label maps have 8 bits."""

BACKGROUND, VOID = 0, 255
"""Labels of PASCAL VOC; no figure counts pixels that are void in the ground truth."""


@dataclass(frozen=True, slots=True)
class LabelCounts:
    """Pixels per label over a data set, int64 (LABELS,): the diagonal and the margins of the confusion matrix."""

    right: NDArray[np.int64] = field(default_factory=lambda: np.zeros(LABELS, dtype=np.int64))
    truth: NDArray[np.int64] = field(default_factory=lambda: np.zeros(LABELS, dtype=np.int64))
    guess: NDArray[np.int64] = field(default_factory=lambda: np.zeros(LABELS, dtype=np.int64))

    def add(self, guess: NDArray[np.uint8], truth: NDArray[np.uint8]) -> None:
        """Count the pixels of one image: two lists of labels, uint8 (pixels,)."""
        self.right[:] += np.bincount(truth[truth == guess], minlength=LABELS)
        self.truth[:] += np.bincount(truth, minlength=LABELS)
        self.guess[:] += np.bincount(guess, minlength=LABELS)

    def merge(self, other: "LabelCounts") -> None:
        for mine, theirs in ((self.right, other.right), (self.truth, other.truth), (self.guess, other.guess)):
            mine[:] += theirs

    def iou(self) -> dict[int, float]:
        """IoU of each label that occurs on either side, over all pixels of the data set."""
        union = self.truth + self.guess - self.right
        return {int(label): float(self.right[label] / union[label]) for label in np.flatnonzero(union)}

    def mean_iou(self) -> float | None:
        """The mean over the labels that the ground truth has; None where it has none."""
        ious = [iou for label, iou in self.iou().items() if self.truth[label]]
        return share(sum(ious), len(ious))

    def unknown(self) -> dict[int, int]:
        """Pixels of each label that occurs in the prediction alone."""
        return {int(label): int(self.guess[label]) for label in np.flatnonzero(self.guess * (self.truth == 0))}


@dataclass(slots=True)
class LabelTally:
    """Mean IoU over the classes that the ground truth has somewhere in the data set.

    Pixels that are void in the ground truth are left out. Elsewhere a prediction can't abstain: void pixels count as
    background, as is common for pseudo-labels, and so does every pixel of an image that it lacks. The same holds for
    the coarse file, so both are compared with all of the ground truth.
    """

    with_coarse: bool
    after: LabelCounts = field(default_factory=LabelCounts)
    before: LabelCounts = field(default_factory=LabelCounts)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, match: Match) -> None:
        if match.truth is None:
            self.counts["extra"] += 1
            return
        if _unreadable(match.truth):
            self.counts["unreadable"] += 1
            return
        truth = _label_map(match.truth)
        valid = truth != VOID
        guess = _guess(match.prediction, valid)
        self.counts["scored"] += 1
        self.counts["lost"] += _lost(match.prediction)
        self.counts["compared_px"] += len(guess)
        self.counts["void_in_prediction_px"] += int(np.count_nonzero(guess == VOID))
        self.after.add(_without_void(guess), truth[valid])
        if self.with_coarse:
            self.counts["lost_coarse"] += _lost(match.coarse)
            self.before.add(_without_void(_guess(match.coarse, valid)), truth[valid])

    def merge(self, other: Self) -> None:
        self.after.merge(other.after)
        self.before.merge(other.before)
        self.counts.update(other.counts)

    def result(self) -> Report:
        after, before = self.after.iou(), self.before.iou()
        mean = Measure(
            name="mIoU",
            reduction="mean over classes",
            value=self.after.mean_iou(),
            before=self.before.mean_iou() if self.with_coarse else None,
        )
        classes = tuple(
            Measure(
                name=f"IoU of class {label}",
                reduction="over all pixels",
                value=after.get(label),
                before=before.get(label),
            )
            for label in sorted(after.keys() | before.keys())
        )
        unknown = self.after.unknown()
        counts = self.counts | Counter(unknown_classes=len(unknown), unknown_classes_px=sum(unknown.values()))
        return Report(
            measures=(mean, *classes), better=None, worse=None, counts={name: counts[name] for name in LABEL_COUNTS}
        )


LABEL_COUNTS = ("scored", "lost", "lost_coarse", "extra", "unreadable", *PIXELS)


def _lost(sample: Sample | None) -> bool:
    return sample is None or _unreadable(sample)


def _unreadable(sample: Sample) -> bool:
    return any(region.mask is None for region in sample.regions)


def _guess(sample: Sample | None, valid: BoolArray) -> NDArray[np.uint8]:
    """uint8 (pixels,): the labels of the pixels that count, void if there is no map to read."""
    if sample is None or _unreadable(sample):
        return np.full(np.count_nonzero(valid), VOID, dtype=np.uint8)
    return _label_map(sample)[valid]


def _label_map(sample: Sample) -> NDArray[np.uint8]:
    """uint8 (H, W): the label, which is the region's id, of each pixel."""
    labels = np.full(sample.size, BACKGROUND, dtype=np.uint8)
    for region in sample.regions:
        if region.mask is not None:
            if not 0 <= region.id < VOID:
                raise DataError(f"Image {sample.key} has a class {region.id}; label maps hold classes from 0 to 254.")
            labels[masks.decode(region.mask)] = region.id
    if sample.void is not None:
        labels[masks.decode(sample.void)] = VOID
    return labels


def _without_void(labels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.where(labels == VOID, np.uint8(BACKGROUND), labels)
