"""The results of an evaluation as rows, notes and JSON."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from refinetool.evaluate.gains import NOTABLE_CHANGE, GainBin


@dataclass(frozen=True, slots=True)
class Measure:
    """The value of one metric, and its value for the coarse masks.

    name: What is measured, such as `boundary IoU`.
    reduction: How it became one number, such as `mean over objects`.
    value: 0..1, None if nothing could be measured.
    before: The same for the coarse masks, None without them.
    """

    name: str
    reduction: str
    value: float | None
    before: float | None

    @property
    def gain(self) -> float | None:
        return None if self.value is None or self.before is None else self.value - self.before


@dataclass(frozen=True, slots=True)
class Report:
    """The results of one evaluation.

    measures: The metrics, the most important ones first.
    per_class: Metrics of single categories of objects, which are too many for a table.
    better, worse: Fractions of the scored objects whose IoU rose or fell by more than NOTABLE_CHANGE; None for label
        maps, without coarse masks and without objects.
    gain_error: Standard error of the mean gain of IoU over the scored objects: their standard deviation divided by the
        root of their number. None as above, and with fewer than two objects.
    counts: How many there were of what; MEANINGS says what they count.
    gain_by_size, gain_by_coarse_iou: Gain of IoU in bins of the object's side in pixels and of the coarse mask's IoU;
        empty for label maps and without coarse masks.
    remarks: Sentences about what was left out and why.
    """

    measures: tuple[Measure, ...]
    better: float | None = None
    worse: float | None = None
    gain_error: float | None = None
    counts: Mapping[str, int] = field(default_factory=dict)
    per_class: tuple[Measure, ...] = ()
    gain_by_size: tuple[GainBin, ...] = ()
    gain_by_coarse_iou: tuple[GainBin, ...] = ()
    remarks: tuple[str, ...] = ()

    def rows(self) -> list[tuple[str, str, str, str]]:
        """(name and reduction, coarse, prediction, gain) for a table, times 100, `-` for a missing value."""
        return [
            (
                f"{measure.name}, {measure.reduction}",
                _format_times_100(measure.before, style=".2f"),
                _format_times_100(measure.value, style=".2f"),
                _format_times_100(measure.gain, style="+.2f"),
            )
            for measure in self.measures
        ]

    def notes(self) -> list[str]:
        """What to know about the metrics, one phrase each."""
        notes = [f"{self.counts[name]} {words}" for name, words in MEANINGS.items() if self.counts.get(name)]
        if self.better is not None and self.worse is not None:
            notes.append(
                f"{self.better:.1%} of the objects better, {self.worse:.1%} worse by more than {NOTABLE_CHANGE} IoU"
            )
        if self.gain_error is not None:
            notes.append(f"the mean gain of IoU has a standard error of {100 * self.gain_error:.2f}")
        return [*notes, *self.remarks]

    def to_dict(self) -> dict[str, object]:
        """The report for JSON, with values in 0..1 that are not rounded."""
        return {
            "measures": [_dump_measure(measure) for measure in self.measures],
            "better": self.better,
            "worse": self.worse,
            "gain_error": self.gain_error,
            "notable_change": NOTABLE_CHANGE,
            "counts": dict(self.counts),
            "per_class": [_dump_measure(measure) for measure in self.per_class],
            "gain_by_size": [_dump_bin(bin) for bin in self.gain_by_size],
            "gain_by_coarse_iou": [_dump_bin(bin) for bin in self.gain_by_coarse_iou],
            "remarks": list(self.remarks),
        }


def join_reports(reports: Sequence[Report]) -> Report:
    """Join the reports of several evaluators, in order."""
    counts: dict[str, int] = {}
    for report in reports:
        counts |= report.counts
    bearer = next((report for report in reports if report.better is not None or report.gain_by_size), Report(()))
    return dataclasses.replace(
        bearer,
        measures=tuple(measure for report in reports for measure in report.measures),
        counts=counts,
        per_class=tuple(measure for report in reports for measure in report.per_class),
        remarks=tuple(remark for report in reports for remark in report.remarks),
    )


OBJECTS = {
    "scored": "scored",
    "missing": "in the ground truth but not in the file that is scored, left out",
    "lost": "missing or unreadable in the prediction, scored as if nothing had been found there",
    "lost_coarse": "missing or unreadable in the coarse file, scored as if nothing had been found there",
    "added": "in the prediction but not in the coarse file, left out",
    "extra": "without ground truth, left out",
    "crowd": "crowds in the ground truth, left out",
    "unreadable": "unreadable in the ground truth, left out",
    "empty_prediction": "scored with an empty mask in the prediction",
    "empty_ground_truth": "scored with an empty mask in the ground truth",
    "no_outline": "without an outline in the ground truth, left out of mBA",
}
PIXELS = {
    "compared_px": "pixels compared",
    "void_in_prediction_px": "pixels void or missing in the prediction only, counted as background",
    "unknown_classes": "classes of the prediction that the ground truth does not have, left out of the mean",
    "unknown_classes_px": "pixels of the prediction of such classes, counted as wrong",
}
CLIPS = {
    "clips": "clips",
    "clip_objects": "objects in them, averaged over the frames that count",
    "clip_frames_added": "frames of the prediction without ground truth, left out",
    "clip_frames_unreadable": "frames unreadable in the ground truth, left out",
    "clip_frames_lost": "frames missing or unreadable in the prediction, scored as if nothing had been found there",
}
PRECISION = {
    "detections": "detections for AP",
    "detections_unreadable": "of them empty or unreadable, so they can only be wrong",
    "detections_elsewhere": "detections in images that the ground truth does not have, left out",
    "crowd_detections": "crowds in the prediction, which are no detections",
    "truths_unreadable": "objects of the ground truth without a mask that can be decoded: AP counts them as missed",
}
SELECTION = {
    "selections": "objects with candidates to select from",
    "selections_hopeless": "objects without competing candidates, or with none that meets the ground truth, left out",
    "selections_unknown": "objects with candidates but no ground truth, left out",
}
STRANGERS = {"selection_images_unknown": "images with candidates that are in none of the files, left out"}
MEANINGS = OBJECTS | PIXELS | CLIPS | PRECISION | SELECTION | STRANGERS
"""What the counts of a report count: objects for instances, images for label maps, otherwise what the words say."""


def _dump_measure(measure: Measure) -> dict[str, object]:
    return {
        "name": measure.name,
        "reduction": measure.reduction,
        "value": measure.value,
        "before": measure.before,
        "gain": measure.gain,
    }


def _dump_bin(bin: GainBin) -> dict[str, object]:
    """A bin for JSON, which has no infinity: the last bin of sizes has no upper end there."""
    return dataclasses.asdict(bin) | {"high": bin.high if math.isfinite(bin.high) else None}


def _format_times_100(value: float | None, *, style: str) -> str:
    return "-" if value is None else format(100 * value, style)


def divide(total: float, count: float) -> float | None:
    """total / count, or None if the count is 0."""
    return float(total) / count if count else None
