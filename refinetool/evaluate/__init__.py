"""How good masks are against ground truth, and what refinement gained.

    pair the files up by image → score each image → add up → report

Objects are matched by image and id, never by overlap: refinement keeps ids, so nothing has to be guessed. What is
scored are the objects that the coarse file holds (without one: the prediction); the ground truth may hold more, and the
report says how many. Average precision alone matches by overlap and score. Label maps are compared pixel by pixel, with
sums over the whole data set.

Tallies hold sums and counts, never averages, so those of several processes merge into the figures of one:
`InstanceTally` IoU, boundary IoU and boundary accuracy of objects, `ApTally` average precision, `LabelTally` mIoU of
class maps, `ClipTally` J&F of clips, `SelectionTally` top-1 accuracy of candidates.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Protocol, TypeGuard

from refinetool.errors import DataError, UsageError
from refinetool.evaluate.clips import ClipTally
from refinetool.evaluate.families import Families, Tallies, Tally, tally_all
from refinetool.evaluate.gains import GainBin
from refinetool.evaluate.instances import InstanceTally, MaskScore, ObjectScore
from refinetool.evaluate.labels import LabelTally
from refinetool.evaluate.pairing import COARSE, PREDICTION, TRUTH, Match, SharedImages, matches, share_ids
from refinetool.evaluate.precision import ApTally
from refinetool.evaluate.report import Measure, Report, joined
from refinetool.evaluate.selection import SelectionTally, candidates_file
from refinetool.evaluate.shapes import Overlap, overlaps
from refinetool.formats import COCO, COCO_RESULTS, DAVIS, MASKS, VOC_CLASS
from refinetool.formats.coco import CocoDataset
from refinetool.formats.coco_lvis import Federation, read_federation
from refinetool.records import Sample
from refinetool.settings import EvaluateSettings

__all__ = [
    "ApTally",
    "ClipTally",
    "Federation",
    "GainBin",
    "InstanceTally",
    "LabelTally",
    "MaskScore",
    "Match",
    "Measure",
    "ObjectScore",
    "Overlap",
    "Report",
    "SelectionTally",
    "Source",
    "Tally",
    "evaluate",
    "matches",
    "overlaps",
]

EVALUATE = EvaluateSettings()


class Source(Protocol):
    """What is asked of a data set here: its images, one after the other."""

    @property
    def format(self) -> str:
        """One of `refinetool.formats.FORMATS`."""

    def samples(self) -> Iterable[Sample]:
        """The samples, each time from the start."""


def evaluate(
    prediction: Source,
    truth: Source,
    *,
    coarse: Source | None = None,
    candidates: Path | None = None,
    boundary_ratio: float = EVALUATE.boundary_ratio,
    protocol: str = EVALUATE.protocol,
    workers: int = 1,
    on_progress: Callable[[int], None] = lambda _: None,
) -> Report:
    """Score a data set against its ground truth.

    Args:
        prediction: What to score.
        truth: Its ground truth: the same keys for the same images, the same ids for the same objects.
        coarse: What the prediction was refined from. Adds the figures before, and decides which objects are scored.
        candidates: A file that `refine --candidates` wrote. Adds how well candidates were chosen.
        boundary_ratio: Width of the band of the boundary IoU as a share of the image diagonal.
        protocol: `coco` or `lvis`: average precision by the rules of one or the other; `davis` or `lvos`: J&F of clips;
            `auto`: COCO's for COCO files, those of DAVIS for clips; `none`: neither.
        workers: Processes. With more than one, a script has to call this below `if __name__ == "__main__":`.
        on_progress: Is told how many images are scored.

    Raises:
        DataError: The files have no image or no object in common, an id occurs twice in an image, or sizes differ.
        UsageError: Label maps on one side, instances on the other; files that the protocol is not made for; or COCO
            results, which have no ids, where ids are needed.
    """
    sources = _sized((prediction, truth) if coarse is None else (prediction, truth, coarse))
    _refuse_other_layouts(sources)
    shared = SharedImages()
    with nullcontext() if candidates is None else candidates_file(candidates) as lines:
        paired = shared.watch(matches(*(source.samples() for source in sources)))
        found = paired if lines is None else (replace(match, candidates=lines.find(match.key)) for match in paired)
        first = next(found, None)
        if first is None:
            raise DataError("Nothing to score: the files hold no images, so they have no object in common.")
        families = _families(
            sources, first, boundary_ratio=boundary_ratio, protocol=protocol, selection=candidates is not None
        )
        tallies = tally_all(
            families,
            chain([first], found),
            workers=workers,
            on_progress=on_progress,
        )
    shared.refuse_strangers(matched_by=_matched_by(sources))
    _refuse_strangers(tallies)
    report = joined([tally.result() for tally in tallies])
    unknown = {} if lines is None else {"selection_images_unknown": lines.never_found}
    return replace(report, counts={**report.counts, **unknown}, remarks=(*_without_ids(families), *report.remarks))


def _sized(sources: tuple[Source, ...]) -> tuple[Source, ...]:
    """COCO results, which state no sizes of images, with those of the ground truth; any other data set as it is."""
    if not any(_is_results(source) for source in sources):
        return sources
    truth = sources[1]
    sizes = truth.sizes() if isinstance(truth, CocoDataset) and not _is_results(truth) else {}
    return tuple(source.with_sizes(sizes) if _is_results(source) else source for source in sources)


def _is_results(source: Source) -> TypeGuard[CocoDataset]:
    return isinstance(source, CocoDataset) and source.format == COCO_RESULTS


def _families(
    sources: tuple[Source, ...], first: Match, *, boundary_ratio: float, protocol: str, selection: bool
) -> Families:
    """What can be measured of these files by this protocol; raises UsageError if that is not what was asked for."""
    formats = {source.format for source in sources}
    truth = sources[1]
    same_ids = share_ids(formats)
    detections = truth.format == COCO and formats <= {COCO, COCO_RESULTS}
    clips = formats == {DAVIS} and "/" in first.key
    if protocol in ("coco", "lvis") and not detections:
        raise UsageError(
            f"--protocol {protocol} needs COCO annotations as ground truth, and COCO annotations or results to measure;"
            f" these files are {' and '.join(sorted(formats))}."
        )
    if protocol in ("davis", "lvos") and not clips:
        raise UsageError(
            f"--protocol {protocol} needs index PNGs in folders, one per clip; name their format with --format davis."
        )
    precision = detections and protocol in ("auto", "coco", "lvis")
    if not same_ids and not precision:
        raise UsageError(
            "COCO results hold no annotation ids, so their masks can't be matched with those of another format. "
            "Evaluate the annotation file that they come from, or compare results with results."
        )
    if selection and (first.semantic or not same_ids):
        raise UsageError("--candidates belong to objects with ids; class maps and COCO results have none.")
    return Families(
        with_coarse=len(sources) > 2,
        boundary_ratio=boundary_ratio,
        label_maps=first.semantic,
        objects=same_ids,
        folder=truth.format == MASKS,
        clips=None if not clips or protocol == "none" else "davis" if protocol == "auto" else protocol,
        precision=precision,
        federation=_federation(truth) if protocol == "lvis" else None,
        selection=selection,
    )


def _federation(truth: Source) -> Federation:
    if not isinstance(truth, CocoDataset):
        raise UsageError("--protocol lvis needs a file of LVIS annotations as ground truth.")
    return read_federation(truth.annotations.path)


def _refuse_other_layouts(sources: tuple[Source, ...]) -> None:
    """Raise UsageError if some files are class maps and others are not, whatever their images are called."""
    named = dict(zip((PREDICTION, TRUTH, COARSE), (source.format for source in sources), strict=False))
    if VOC_CLASS in named.values() and set(named.values()) != {VOC_CLASS}:
        (first, format), *others = named.items()
        rest = " and ".join(f"the {name} {other}" for name, other in others)
        raise UsageError(
            f"The {first} is {format} and {rest}: class maps can only be compared with class maps; name folders of "
            "such maps on all sides, or another --format if their values number objects."
        )


def _matched_by(sources: tuple[Source, ...]) -> str:
    """What images are known by, in words."""
    listed = {source.format in (COCO, COCO_RESULTS) for source in sources}
    if listed == {True}:
        return "id"
    return "the id in COCO files and the name of the file in folders" if True in listed else "the names of their files"


def _refuse_strangers(tallies: Tallies) -> None:
    """Raise DataError if the files share no object, which means that they don't belong together."""
    counts = {name: count for tally in tallies for name, count in tally.counts.items()}
    nothing_found = "detections" in counts and not counts["detections"]
    if counts.get("scored") == 0 and not nothing_found:
        raise DataError(
            "Nothing to score: the files have no object in common. "
            "Objects are matched by image and id, so both files must come from the same annotations."
        )


def _without_ids(families: Families) -> Iterator[str]:
    if not (families.objects or families.label_maps):
        yield (
            "COCO results hold no annotation ids: figures of objects matched by id are left out. Evaluate the "
            "annotation file that they come from to have them"
        )
