"""How good masks are, measured against ground truth, and what refinement gained.

    pair the files up by image → score each image → add up → report

Objects are matched by image and id, never by overlap: refinement keeps ids, so there is no need to guess. The objects
of the coarse file are scored, or those of the prediction where there is no coarse file; the ground truth may hold more,
and the report says how many. Only average precision matches by overlap and score. Label maps are compared pixel by
pixel, with sums over the whole data set.

Evaluators hold sums and counts, never averages, so that the work can be divided among processes and merged:
`InstanceEvaluator` for IoU, boundary IoU and boundary accuracy of objects, `ApEvaluator` for average precision,
`LabelMapEvaluator` for the mIoU of class maps, `ClipEvaluator` for the J&F of clips, `SelectionEvaluator` for the top-1
accuracy of candidates.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Protocol, TypeGuard

from refinetool.errors import DataError, UsageError
from refinetool.evaluate.clips import ClipEvaluator
from refinetool.evaluate.evaluators import Evaluator, Evaluators, Metrics, evaluate_all
from refinetool.evaluate.gains import GainBin
from refinetool.evaluate.instances import InstanceEvaluator, MaskScore, ObjectScore
from refinetool.evaluate.labels import LabelMapEvaluator
from refinetool.evaluate.pairing import COARSE, PREDICTION, TRUTH, Match, SharedImages, match_images, share_ids
from refinetool.evaluate.precision import COCO_DETECTIONS, LVIS_DETECTIONS, ApEvaluator
from refinetool.evaluate.report import Measure, Report, join_reports
from refinetool.evaluate.selection import SelectionEvaluator, open_candidates
from refinetool.evaluate.shapes import Overlap, measure_overlaps
from refinetool.formats import COCO, COCO_RESULTS, DAVIS, MASKS, VOC_CLASS
from refinetool.formats.coco import CocoDataset
from refinetool.formats.coco_lvis import Federation, read_federation
from refinetool.records import Sample
from refinetool.settings import EvaluateSettings

__all__ = [
    "ApEvaluator",
    "ClipEvaluator",
    "Evaluator",
    "Federation",
    "GainBin",
    "InstanceEvaluator",
    "LabelMapEvaluator",
    "MaskScore",
    "Match",
    "Measure",
    "ObjectScore",
    "Overlap",
    "Report",
    "SelectionEvaluator",
    "Source",
    "evaluate",
    "match_images",
    "measure_overlaps",
]

EVALUATE = EvaluateSettings()


class Source(Protocol):
    """What evaluation needs of a data set: its images, one after the other."""

    @property
    def format(self) -> str:
        """One of `refinetool.formats.FORMATS`."""

    def samples(self) -> Iterable[Sample]:
        """The samples, from the start at every call."""


def evaluate(
    prediction: Source,
    truth: Source,
    *,
    coarse: Source | None = None,
    candidates: Path | None = None,
    boundary_ratio: float = EVALUATE.boundary_ratio,
    protocol: str = EVALUATE.protocol,
    max_detections: int | None = None,
    class_agnostic: bool = False,
    unseen: Collection[str] | None = None,
    workers: int = 1,
    on_progress: Callable[[int], None] = lambda _: None,
) -> Report:
    """Score a data set against its ground truth.

    Args:
        prediction: What to score.
        truth: Its ground truth, with the same keys for the same images and the same ids for the same objects.
        coarse: What the prediction was refined from. Adds values before refinement and decides which objects are
            scored.
        candidates: A file written by `refine --candidates`. Adds how well candidates were selected.
        boundary_ratio: Width of the band of the boundary IoU as a fraction of the image diagonal.
        protocol: `coco` or `lvis` for average precision by the rules of the one or the other, `davis` or `lvos` for J&F
            of clips; `auto` takes COCO's for COCO files and those of DAVIS for clips, `none` leaves both out.
        max_detections: Detections that count for AP, per image and category (COCO) or per image (LVIS); None for 100
            and 300, as in the benchmarks.
        class_agnostic: Whether AP takes all categories as one.
        unseen: Clips whose J&F is reported apart from that of the others, and averaged with it, as LVOS does.
        workers: Number of processes. With more than one, a script has to call this below `if __name__ == "__main__":`.
        on_progress: Called with the number of images scored so far.

    Raises:
        DataError: The files have no image or no object in common, an id occurs twice in an image, or mask sizes differ.
        UsageError: Label maps are compared with instances, the protocol does not fit the files, or ids are needed and
            COCO results have none.
    """
    sources = _add_sizes((prediction, truth) if coarse is None else (prediction, truth, coarse))
    _refuse_other_layouts(sources)
    shared = SharedImages()
    with nullcontext() if candidates is None else open_candidates(candidates) as lines:
        paired = shared.watch(match_images(*(source.samples() for source in sources)))
        found = paired if lines is None else (replace(match, candidates=lines.find(match.key)) for match in paired)
        first = next(found, None)
        if first is None:
            raise DataError("Nothing to score: the files hold no images, so they have no object in common.")
        metrics = _choose_metrics(
            sources, first, boundary_ratio=boundary_ratio, protocol=protocol, selection=candidates is not None
        )
        limit = LVIS_DETECTIONS if protocol == "lvis" else COCO_DETECTIONS
        metrics = replace(
            metrics,
            max_detections=limit if max_detections is None else max_detections,
            class_agnostic=class_agnostic,
            unseen=None if unseen is None else frozenset(unseen),
        )
        evaluators = evaluate_all(
            metrics,
            chain([first], found),
            workers=workers,
            on_progress=on_progress,
        )
    shared.refuse_strangers(matched_by=_describe_matching(sources))
    _refuse_strangers(evaluators)
    report = join_reports([evaluator.result() for evaluator in evaluators])
    unknown = {} if lines is None else {"selection_images_unknown": lines.never_found}
    remarks = (*_explain_missing_ids(metrics), *report.remarks)
    return replace(report, counts={**report.counts, **unknown}, remarks=remarks)


def _add_sizes(sources: tuple[Source, ...]) -> tuple[Source, ...]:
    """Give COCO results, which state no image sizes, those of the ground truth; leave other data sets as they are."""
    if not any(_is_results(source) for source in sources):
        return sources
    truth = sources[1]
    sizes = truth.sizes() if isinstance(truth, CocoDataset) else {}
    return tuple(source.with_sizes(sizes) if _is_results(source) else source for source in sources)


def _is_results(source: Source) -> TypeGuard[CocoDataset]:
    return isinstance(source, CocoDataset) and source.format == COCO_RESULTS


def _choose_metrics(
    sources: tuple[Source, ...], first: Match, *, boundary_ratio: float, protocol: str, selection: bool
) -> Metrics:
    """What can be measured with these files. Raises UsageError if that is not what was asked for."""
    formats = {source.format for source in sources}
    truth = sources[1]
    same_ids = share_ids(formats)
    detections = truth.format == COCO and formats <= {COCO, COCO_RESULTS}
    # Masks of one object per frame are clips if frames are numbered; other folders of masks may be splits.
    numbered = protocol in ("davis", "lvos") or first.key.rpartition("/")[2].isdecimal()
    clips = "/" in first.key and (formats == {DAVIS} or (formats == {MASKS} and numbered))
    if protocol in ("coco", "lvis") and not detections:
        raise UsageError(
            f"--protocol {protocol} needs COCO annotations as ground truth, and COCO annotations or results to measure;"
            f" these files are {' and '.join(sorted(formats))}."
        )
    if protocol in ("davis", "lvos") and not clips:
        raise UsageError(
            f"--protocol {protocol} needs index PNGs or masks in folders, one per clip; name the format of index PNGs "
            "with --format davis."
        )
    precision = detections and protocol in ("auto", "coco", "lvis")
    if not same_ids and not precision:
        raise UsageError(
            "COCO results hold no annotation ids, so their masks can't be matched with those of another format. "
            "Evaluate the annotation file they were made from, or compare results with results."
        )
    if selection and (first.semantic or not same_ids):
        raise UsageError("--candidates needs objects with ids; class maps and COCO results have none.")
    return Metrics(
        with_coarse=len(sources) > 2,
        boundary_ratio=boundary_ratio,
        label_maps=first.semantic,
        objects=same_ids,
        folder=truth.format == MASKS,
        clips=None if not clips or protocol == "none" else "davis" if protocol == "auto" else protocol,
        precision=precision,
        if_complete=same_ids and protocol == "auto",
        federation=_read_federation(truth) if protocol == "lvis" else None,
        selection=selection,
    )


def _read_federation(truth: Source) -> Federation:
    if not isinstance(truth, CocoDataset):
        raise UsageError("--protocol lvis needs a file of LVIS annotations as ground truth.")
    return read_federation(truth.annotations.path)


def _refuse_other_layouts(sources: tuple[Source, ...]) -> None:
    """Raise UsageError if only some of the files are class maps, which shows even where no image is in all of them."""
    named = dict(zip((PREDICTION, TRUTH, COARSE), (source.format for source in sources), strict=False))
    if VOC_CLASS in named.values() and set(named.values()) != {VOC_CLASS}:
        (first, format), *others = named.items()
        rest = " and ".join(f"the {name} {other}" for name, other in others)
        raise UsageError(
            f"The {first} is {format} and {rest}: class maps can only be compared with class maps; name folders of "
            "such maps on all sides, or another --format if their values number objects."
        )


def _describe_matching(sources: tuple[Source, ...]) -> str:
    """Say what images are matched by."""
    listed = {source.format in (COCO, COCO_RESULTS) for source in sources}
    if listed == {True}:
        return "id"
    return "the id in COCO files and the name of the file in folders" if True in listed else "the names of their files"


def _refuse_strangers(evaluators: Evaluators) -> None:
    """Raise DataError if the files have no object in common, which means that they don't belong together."""
    counts = {name: count for evaluator in evaluators for name, count in evaluator.counts.items()}
    nothing_found = "detections" in counts and not counts["detections"]
    if counts.get("scored") == 0 and not nothing_found:
        raise DataError(
            "Nothing to score: the files have no object in common. "
            "Objects are matched by image and id, so both files must come from the same annotations."
        )


def _explain_missing_ids(metrics: Metrics) -> Iterator[str]:
    if not (metrics.objects or metrics.label_maps):
        yield (
            "COCO results hold no annotation ids, so metrics of objects matched by id are left out; evaluate the "
            "annotation file they were made from to get them"
        )
