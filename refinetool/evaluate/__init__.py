"""How good masks are against ground truth, and what refinement gained.

    pair the files up by image → score each image → add up → report

Objects are matched by image and id, never by overlap: refinement keeps ids, so nothing has to be guessed. What is
scored are the objects that the coarse file holds (without one: the prediction); the ground truth may hold more, and the
report says how many. Label maps are compared pixel by pixel, with sums over the whole data set.

Tallies hold sums and counts, never averages, so those of several processes merge into the figures of one.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Protocol, Self

from refinetool.errors import DataError, UsageError
from refinetool.evaluate.instances import InstanceTally, ObjectScore, Overlap, overlaps
from refinetool.evaluate.labels import LabelTally
from refinetool.evaluate.pairing import Match, matches
from refinetool.evaluate.report import Measure, Report
from refinetool.formats import COCO_RESULTS
from refinetool.records import Sample

__all__ = [
    "InstanceTally",
    "LabelTally",
    "Match",
    "Measure",
    "ObjectScore",
    "Overlap",
    "Report",
    "Source",
    "Tally",
    "evaluate",
    "matches",
    "overlaps",
]


class Source(Protocol):
    """What is asked of a data set here: its images, one after the other."""

    @property
    def format(self) -> str:
        """One of `refinetool.formats.FORMATS`."""

    def samples(self) -> Iterable[Sample]:
        """The samples, each time from the start."""


def evaluate(prediction: Source, truth: Source, *, coarse: Source | None, boundary_ratio: float) -> Report:
    """Score a data set against its ground truth.

    Args:
        prediction: What to score.
        truth: Its ground truth: the same keys for the same images, the same ids for the same objects.
        coarse: What the prediction was refined from. Adds the figures before, and decides which objects are scored.
        boundary_ratio: Width of the band of the boundary IoU as a share of the image diagonal.

    Raises:
        DataError: The files have no image or no object in common, an id occurs twice in an image, or sizes differ.
        UsageError: Label maps on one side, instances on the other; or COCO results against a file with ids.
    """
    _check_ids(prediction, truth, *(() if coarse is None else (coarse,)))
    tally: Tally | None = None
    for match in matches(prediction.samples(), truth.samples(), None if coarse is None else coarse.samples()):
        if tally is None:
            tally = _tally(match, with_coarse=coarse is not None, boundary_ratio=boundary_ratio)
        tally.add(match)
    if tally is None or not tally.counts["scored"]:
        raise DataError(
            "Nothing to score: the files have no object in common. "
            "Objects are matched by image and id, so both files must come from the same annotations."
        )
    return tally.result()


class Tally(Protocol):
    """Sums and counts over images."""

    counts: Counter[str]

    def add(self, match: Match) -> None:
        """Score one image and add it."""

    def merge(self, other: Self) -> None:
        """Add what another tally of the same kind has seen."""

    def result(self) -> Report:
        """The figures of everything added so far."""


def _tally(match: Match, *, with_coarse: bool, boundary_ratio: float) -> Tally:
    if match.semantic:
        return LabelTally(with_coarse=with_coarse)
    return InstanceTally(with_coarse=with_coarse, boundary_ratio=boundary_ratio)


def _check_ids(*sources: Source) -> None:
    if len({source.format == COCO_RESULTS for source in sources}) > 1:
        raise UsageError(
            "COCO results hold no annotation ids, so their masks can't be matched with those of another format. "
            "Evaluate the annotation file that they come from, or compare results with results."
        )
