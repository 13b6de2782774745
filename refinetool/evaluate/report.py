"""The figures of an evaluation, in words, rows and JSON."""

from collections.abc import Mapping
from dataclasses import dataclass

NOTABLE_CHANGE = 0.01
"""A change of an object's IoU by more than this counts as better or worse."""


@dataclass(frozen=True, slots=True)
class Measure:
    """One figure, and what it was for the coarse masks.

    name: what is measured, such as `boundary IoU`.
    reduction: how it became one number, such as `mean over objects`.
    value: 0..1, None where nothing could be measured.
    before: the same for the coarse masks, None without them.
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
    """The figures of one evaluation.

    measures: the figures, the headline first.
    better, worse: share of the scored objects whose IoU rose or fell by more than NOTABLE_CHANGE; None for label maps,
        without coarse masks and without objects.
    counts: how many there were of what; MEANINGS has the words.
    """

    measures: tuple[Measure, ...]
    better: float | None
    worse: float | None
    counts: Mapping[str, int]

    def rows(self) -> list[tuple[str, str, str, str]]:
        """(name and reduction, coarse, prediction, gain) for a table, times 100, `-` where there is no figure."""
        return [
            (
                f"{measure.name}, {measure.reduction}",
                _times_100(measure.before, style=".2f"),
                _times_100(measure.value, style=".2f"),
                _times_100(measure.gain, style="+.2f"),
            )
            for measure in self.measures
        ]

    def notes(self) -> list[str]:
        """What to know beside the figures, one sentence part each."""
        notes = [f"{self.counts[name]} {words}" for name, words in MEANINGS.items() if self.counts.get(name)]
        if self.better is not None and self.worse is not None:
            notes.append(
                f"{self.better:.1%} of the objects better, {self.worse:.1%} worse by more than {NOTABLE_CHANGE} IoU"
            )
        return notes

    def to_dict(self) -> dict[str, object]:
        """The report for JSON: figures in 0..1, not rounded."""
        measures = [
            {
                "name": measure.name,
                "reduction": measure.reduction,
                "value": measure.value,
                "before": measure.before,
                "gain": measure.gain,
            }
            for measure in self.measures
        ]
        shares = {"better": self.better, "worse": self.worse, "notable_change": NOTABLE_CHANGE}
        return {"measures": measures, **shares, "counts": dict(self.counts)}


MEANINGS = {
    "scored": "scored",
    "missing": "in the ground truth but not in the file that is scored, left out",
    "lost": "missing or unreadable in the prediction, scored as if nothing was found",
    "added": "in the prediction but not in the coarse file, left out",
    "extra": "without ground truth, left out",
    "crowd": "crowds in the ground truth, left out",
    "unreadable": "unreadable in the ground truth, left out",
    "empty_prediction": "scored with an empty mask in the prediction",
    "empty_ground_truth": "scored with an empty mask in the ground truth",
    "compared_px": "pixels compared",
    "void_in_prediction_px": "pixels void or lost in the prediction alone, counted as background",
}
"""What the counts of a report count: objects for instances, images for label maps, pixels where the name says so."""


def _times_100(value: float | None, *, style: str) -> str:
    return "-" if value is None else format(100 * value, style)


def share(part: float, whole: int) -> float | None:
    """part / whole, None where there is no whole."""
    return float(part) / whole if whole else None
