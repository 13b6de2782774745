"""Mean IoU of label maps, compared pixel by pixel, with sums over the whole data set."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Self

import numpy as np
from numpy.typing import NDArray

from refinetool import masks
from refinetool.errors import DataError
from refinetool.evaluate.pairing import Match
from refinetool.evaluate.report import PIXELS, Measure, Report, divide
from refinetool.records import VOID, Mask, Sample

LABELS = 256
"""Label maps have 8 bits."""

BACKGROUND = 0
"""Labels of PASCAL VOC. Pixels that are void in the ground truth don't count."""


@dataclass(frozen=True, slots=True)
class LabelCounts:
    """Pixels per label over a data set, int64 (LABELS,): the diagonal and both margins of the confusion matrix."""

    right: NDArray[np.int64] = field(default_factory=lambda: np.zeros(LABELS, dtype=np.int64))
    truth: NDArray[np.int64] = field(default_factory=lambda: np.zeros(LABELS, dtype=np.int64))
    predicted: NDArray[np.int64] = field(default_factory=lambda: np.zeros(LABELS, dtype=np.int64))

    def add(self, predicted: NDArray[np.uint8], truth: NDArray[np.uint8]) -> None:
        """Count the pixels of one image, given as two lists of labels, uint8 (pixels,)."""
        self.right[:] += np.bincount(truth[truth == predicted], minlength=LABELS)
        self.truth[:] += np.bincount(truth, minlength=LABELS)
        self.predicted[:] += np.bincount(predicted, minlength=LABELS)

    def merge(self, other: "LabelCounts") -> None:
        for mine, theirs in ((self.right, other.right), (self.truth, other.truth), (self.predicted, other.predicted)):
            mine[:] += theirs

    def compute_ious(self) -> dict[int, float]:
        """The IoU of each label that occurs on either side, over all pixels of the data set."""
        union = self.truth + self.predicted - self.right
        return {int(label): float(self.right[label] / union[label]) for label in np.flatnonzero(union)}

    def compute_mean_iou(self) -> float | None:
        """The mean IoU over the labels that the ground truth has; None if it has none."""
        ious = [iou for label, iou in self.compute_ious().items() if self.truth[label]]
        return divide(sum(ious), len(ious))

    def compute_foreground_iou(self) -> float | None:
        """The mean of two IoUs: of all classes taken as one, and of the background; None without pixels."""
        total, right = int(self.truth.sum()), int(self.right[BACKGROUND])
        background = int(self.truth[BACKGROUND] + self.predicted[BACKGROUND]) - right
        ious = [divide(right, background), divide(total - background, total - right)]
        known = [iou for iou in ious if iou is not None]
        return divide(sum(known), len(known))

    def count_unknown(self) -> dict[int, int]:
        """The number of pixels of each label that occurs only in the prediction."""
        return {int(label): int(self.predicted[label]) for label in np.flatnonzero(self.predicted * (self.truth == 0))}


@dataclass(slots=True)
class LabelMapEvaluator:
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
        if _is_unreadable(match.truth):
            self.counts["unreadable"] += 1
            return
        truth = _draw_label_map(match.truth)
        valid = truth != VOID
        predicted = _read_labels(match.prediction, valid)
        self.counts["scored"] += 1
        self.counts["lost"] += _is_lost(match.prediction)
        self.counts["compared_px"] += len(predicted)
        self.counts["void_in_prediction_px"] += int(np.count_nonzero(predicted == VOID))
        self.after.add(_replace_void(predicted), truth[valid])
        if self.with_coarse:
            self.counts["lost_coarse"] += _is_lost(match.coarse)
            self.before.add(_replace_void(_read_labels(match.coarse, valid)), truth[valid])

    def merge(self, other: Self) -> None:
        self.after.merge(other.after)
        self.before.merge(other.before)
        self.counts.update(other.counts)

    def result(self) -> Report:
        after, before = self.after.compute_ious(), self.before.compute_ious()
        mean = Measure(
            name="mIoU",
            reduction="mean over classes",
            value=self.after.compute_mean_iou(),
            before=self.before.compute_mean_iou() if self.with_coarse else None,
        )
        parts = [counts.compute_foreground_iou() for counts in (self.after, self.before)]
        halves = Measure(
            name="FB-IoU",
            reduction="mean of all classes as one, and background",
            value=parts[0],
            before=parts[1] if self.with_coarse else None,
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
        unknown = self.after.count_unknown()
        counts = self.counts | Counter(unknown_classes=len(unknown), unknown_classes_px=sum(unknown.values()))
        return Report(
            measures=(mean, halves, *classes),
            counts={name: counts[name] for name in LABEL_COUNTS},
        )


LABEL_COUNTS = ("scored", "lost", "lost_coarse", "extra", "unreadable", *PIXELS)


def _is_lost(sample: Sample | None) -> bool:
    return sample is None or _is_unreadable(sample)


def _is_unreadable(sample: Sample) -> bool:
    return any(region.mask is None for region in sample.regions)


def _read_labels(sample: Sample | None, valid: Mask) -> NDArray[np.uint8]:
    """The labels of the pixels that count, uint8 (pixels,); all are void if there is no map to read."""
    if sample is None or _is_unreadable(sample):
        return np.full(np.count_nonzero(valid), VOID, dtype=np.uint8)
    return _draw_label_map(sample)[valid]


def _draw_label_map(sample: Sample) -> NDArray[np.uint8]:
    """The label of each pixel, uint8 (H, W), which is the id of its region."""
    labels = np.full(sample.size, BACKGROUND, dtype=np.uint8)
    for region in sample.regions:
        if region.mask is not None:
            if not 0 <= region.id < VOID:
                raise DataError(f"Image {sample.key} has a class {region.id}; label maps hold classes from 0 to 254.")
            labels[masks.decode(region.mask)] = region.id
    if sample.void is not None:
        labels[masks.decode(sample.void)] = VOID
    return labels


def _replace_void(labels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.where(labels == VOID, np.uint8(BACKGROUND), labels)
