"""Runs ablations: refines the same masks in many ways and measures each against ground truth, as in SAMRefiner's
tables.

A table has rows; a row is a name with settings. All rows of a table use the same images, and where only the prompts
differ, an image is encoded once. The model's own proposal is measured: without guard and snapping unless the base
settings have them, and an empty proposal counts as empty.
"""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, TypeAlias

from refinetool import masks
from refinetool.backends import Backend, Embedding, Prediction
from refinetool.backends.models import load_backend
from refinetool.baselines.classical import CLASSICAL, NoModel
from refinetool.errors import DataError, UsageError
from refinetool.evaluate.labels import LabelMapEvaluator
from refinetool.evaluate.pairing import Match, match_images
from refinetool.evaluate.selection import TIE
from refinetool.evaluate.shapes import Canvas, count_common
from refinetool.formats import VOC_CLASS, open_dataset
from refinetool.images import read_sample
from refinetool.records import Annotation, ImageArray, Outcome, Prompts, Region, Rle, Sample
from refinetool.refine import Refiner
from refinetool.running.truth import with_truth
from refinetool.settings import METHODS, PromptSettings, RefineSettings

TableName: TypeAlias = Literal["prompts", "points", "boxes", "selection", "cascade", "methods", "split"]


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a table: a name, and the settings to refine with."""

    name: str
    settings: RefineSettings


@dataclass(frozen=True, slots=True)
class Score:
    """The result of one row over all objects; values are 0..1.

    iou, boundary_iou: Means over objects.
    top1: Fraction of the objects whose chosen candidate is the best of the alternatives (ties count as right). Objects
        for which no candidate overlaps the ground truth are left out. None for rows that choose nothing.
    seconds: Time of refinement, without reading and measuring.
    """

    name: str
    objects: int
    iou: float
    boundary_iou: float
    top1: float | None
    seconds: float


@dataclass(frozen=True, slots=True)
class SplitScore:
    """mIoU of class maps, 0..1, for one way of splitting classes."""

    name: str
    images: int
    miou: float


@dataclass(frozen=True, slots=True)
class Table:
    """One table: its name, its scores without an adapter, and its scores with the adapter if there is one."""

    name: TableName
    plain: tuple[Score, ...]
    adapted: tuple[Score, ...] | None


@dataclass(frozen=True, slots=True)
class SplitTable:
    """Table 2c, with class maps instead of objects."""

    name: Literal["split"]
    plain: tuple[SplitScore, ...]


def ablate(
    coarse: Path,
    truth: Path,
    *,
    images: Path | None,
    tables: Sequence[TableName] | None,
    model: str,
    checkpoint: str | None,
    device: str,
    precision: str,
    head: str,
    iou_adapter: Path | None,
    base: RefineSettings,
    format: str | None,
    sizes: Path | None,
    follow_links: bool,
    mask_suffix: str,
    limit: int | None,
    boundary_ratio: float,
    on_progress: Callable[[int, int], None],
) -> list[Table | SplitTable]:
    """Refine a data set with every row of some tables, and measure each against the ground truth.

    Objects and class maps have different tables: `split` is for class maps, the others are for objects.

    Args:
        coarse, truth: Masks of the same images in the same format, with the same ids.
        tables: Names of tables; None for those of the paper: 1, 2a, 2b and 7 for objects, 2c for class maps.
        head: As for `running.run.refine_dataset`.
        iou_adapter: A file that `adapt-iou` wrote; every row is then measured without and with it.
        base: The settings that the rows change; `settings.ABLATION` is the model alone.
        follow_links: Whether links in the folders of images and masks may lead out of these folders.
        mask_suffix: As for `running.run.refine_dataset`.
        limit: Use only this many images, from the first.
        on_progress: Called with (images done over all tables, images in total).

    Raises:
        UsageError: A table does not fit the masks.
        DataError: Masks can't be read, or there is nothing to measure.
    """
    open_masks = partial(
        open_dataset, images=images, format=format, sizes=sizes, follow_links=follow_links, mask_suffix=mask_suffix
    )
    given, known = open_masks(coarse), open_masks(truth, need_images=False)
    total = len(given) if limit is None else min(limit, len(given))
    load = partial(load_backend, model, checkpoint=checkpoint, device=device, precision=precision, head=head)
    backends = [load()] if iou_adapter is None else [load(), load(iou_adapter=iou_adapter)]
    tables = tables or (("split",) if given.format == VOC_CLASS else ("prompts", "points", "boxes", "methods"))
    steps = sum(1 if name == "split" else len(backends) for name in tables) * total
    count = itertools.count(1)
    found: list[Table | SplitTable] = []
    for name in tables:
        rows = ROWS[name](base)
        first = itertools.islice(given.samples(), total)
        if name == "split":
            pairs = _class_maps(first, known.samples())
            splits = score_splits(
                pairs,
                rows,
                backends[0],
                max_pixels=base.max_pixels,
                on_image=lambda: on_progress(next(count), steps),
            )
            found.append(SplitTable("split", tuple(splits)))
            continue
        scores = [
            tuple(
                score_rows(
                    with_truth(itertools.islice(given.samples(), total), known.samples()),
                    rows,
                    backend,
                    boundary_ratio=boundary_ratio,
                    max_pixels=base.max_pixels,
                    on_image=lambda: on_progress(next(count), steps),
                )
            )
            for backend in backends
        ]
        found.append(Table(name, scores[0], scores[1] if len(scores) > 1 else None))
    return found


def _class_maps(coarse: Iterable[Sample], truth: Iterable[Sample]) -> Iterator[tuple[Sample, Sample]]:
    for match in match_images(coarse, truth, None):
        if not match.semantic:
            raise UsageError(f"Image {match.key} holds objects; the table split is for class maps")
        if match.prediction is not None and match.truth is not None:
            yield match.prediction, match.truth


def prompt_rows(base: RefineSettings) -> tuple[Row, ...]:
    """Table 1: every combination of point, box and mask prompt. The point includes the negative point."""
    combinations = ("point", "box", "mask", "point + box", "point + mask", "box + mask", "all")
    return tuple(Row(name, _with_prompts(base, name)) for name in combinations)


def point_rows(base: RefineSettings) -> tuple[Row, ...]:
    """Table 2a: position of the positive point, used alone."""
    alone = _with_prompts(base, "point")
    return (
        Row("point, random", replace(alone, prompts=replace(alone.prompts, point="random"))),
        Row("point, box centre", replace(alone, prompts=replace(alone.prompts, point="box-center"))),
        Row("point, distance", replace(alone, prompts=replace(alone.prompts, point="distance"))),
    )


def box_rows(base: RefineSettings) -> tuple[Row, ...]:
    """Table 2b: tight and elastic box, alone and with all prompts."""
    return tuple(
        Row(f"{prompts}, {box} box", replace(settings, prompts=replace(settings.prompts, box=box)))
        for prompts in ("box", "all")
        for settings in (_with_prompts(base, prompts),)
        for box in ("tight", "elastic")
    )


def selection_rows(base: RefineSettings) -> tuple[Row, ...]:
    """Selection of the candidate, for single prompts and for all prompts together."""
    selections: tuple[Literal["single", "predicted", "coarse", "oracle"], ...] = (
        "single",
        "predicted",
        "coarse",
        "oracle",
    )
    return tuple(
        Row(f"{prompts}, {selection}", replace(_with_prompts(base, prompts), selection=selection))
        for prompts in ("point", "box", "all")
        for selection in selections
    )


def cascade_rows(base: RefineSettings) -> tuple[Row, ...]:
    """Number of passes, and what further passes are prompted with."""
    return (
        Row("1 pass", replace(base, passes=1)),
        *(
            Row(f"{passes} passes, {cascade}", replace(base, passes=passes, cascade=cascade))
            for passes in (2, 3)
            for cascade in ("regen", "logits-a", "logits-b")
        ),
    )


def method_rows(base: RefineSettings) -> tuple[Row, ...]:
    """Table 7, and the baselines without a model."""
    baselines = (Row(name, settings) for name, settings in METHODS.items() if name != "samrefiner")
    return (*baselines, Row("samrefiner", base))


def split_rows(base: RefineSettings) -> tuple[Row, ...]:
    """Table 2c: class maps with and without split-then-merge; the boxes are tight, as in the paper."""
    tight = replace(base, prompts=replace(base.prompts, box="tight"))
    return (
        Row("without splitting", replace(tight, split=replace(tight.split, rule="off"))),
        Row("split, paper's rule", replace(tight, split=replace(tight.split, rule="paper"))),
        Row("split, relaxed rule", replace(tight, split=replace(tight.split, rule="relaxed"))),
    )


ROWS: dict[TableName, Callable[[RefineSettings], tuple[Row, ...]]] = {
    "prompts": prompt_rows,
    "points": point_rows,
    "boxes": box_rows,
    "selection": selection_rows,
    "cascade": cascade_rows,
    "methods": method_rows,
    "split": split_rows,
}


def tables_named(names: Iterable[str]) -> tuple[TableName, ...]:
    """Return tables by name; raises UsageError if there is no such table."""
    known = {name: name for name in ROWS}
    for name in names:
        if name not in known:
            raise UsageError(f"there is no table {name!r}; choose among {', '.join(ROWS)}")
    return tuple(known[name] for name in ROWS if name in set(names))


def score_rows(
    samples: Iterable[Sample],
    rows: Sequence[Row],
    backend: Backend,
    *,
    boundary_ratio: float,
    max_pixels: int,
    on_image: Callable[[], None],
) -> list[Score]:
    """Refine the objects of all samples with each row, and measure.

    Args:
        samples: Objects with their ground truth (`running.truth.with_truth`).
        backend: Used by the rows that run a model.
        boundary_ratio: Width of the boundary band as a fraction of the image diagonal.
        on_image: Called after each image.

    Returns:
        The score of the coarse masks, named `coarse mask`, and one score per row.

    Raises:
        DataError: An image can't be read, or no object has a ground truth.
    """
    once = EmbedOnce(backend)
    refiners = [Refiner(NoModel() if row.settings.method in CLASSICAL else once, _kept(row.settings)) for row in rows]
    before = _Sums()
    sums = [_Sums() for _ in rows]
    for sample in samples:
        known = [region for region in sample.regions if region.keep is None and region.truth is not None]
        to_refine = replace(sample, regions=tuple(region for region in known if _filled(region)))
        if not to_refine.regions:
            continue
        image = read_sample(sample, max_pixels=max_pixels)
        canvas = Canvas(sample.size, None, masks.boundary_width(sample.size, boundary_ratio))
        for region in to_refine.regions:
            before.add(region.mask, region, canvas)
        for refiner, total in zip(refiners, sums, strict=True):
            started = time.perf_counter()
            prepared = refiner.prepare_pixels(to_refine, image)
            outcome = refiner.finish(prepared, refiner.segment(prepared.jobs))
            total.seconds += time.perf_counter() - started
            for region, annotation in zip(to_refine.regions, outcome.annotations, strict=True):
                total.add(proposal_of(annotation), region, canvas)
                total.judge(annotation, region)
        once.forget()
        on_image()
    if not before.objects:
        raise DataError("nothing to measure: no coarse mask has a ground truth; both are matched by image and id")
    names = ["coarse mask", *(row.name for row in rows)]
    return [total.score(name) for name, total in zip(names, [before, *sums], strict=True)]


def score_splits(
    pairs: Iterable[tuple[Sample, Sample]],
    rows: Sequence[Row],
    backend: Backend,
    *,
    max_pixels: int,
    on_image: Callable[[], None],
) -> list[SplitScore]:
    """Refine class maps with each row, and measure mIoU over all pixels.

    Args:
        pairs: Coarse and true class maps of the same image.

    Returns:
        The score of the coarse maps, named `coarse mask`, and one per row.
    """
    once = EmbedOnce(backend)
    refiners = [Refiner(once, row.settings) for row in rows]
    evaluators = [LabelMapEvaluator(with_coarse=False) for _ in (None, *rows)]
    images = 0
    for coarse, truth in pairs:
        image = read_sample(coarse, max_pixels=max_pixels)
        evaluators[0].add(Match(coarse.key, coarse, truth, None))
        for refiner, evaluator in zip(refiners, evaluators[1:], strict=True):
            prepared = refiner.prepare_pixels(coarse, image)
            outcome = refiner.finish(prepared, refiner.segment(prepared.jobs))
            evaluator.add(Match(coarse.key, with_masks(coarse, outcome), truth, None))
        once.forget()
        images += 1
        on_image()
    if not images:
        raise DataError("nothing to measure: no class map has a ground truth; both are matched by image")
    names = ["coarse mask", *(row.name for row in rows)]
    found = [evaluator.result().measures[0].value for evaluator in evaluators]
    return [SplitScore(name, images, value or 0.0) for name, value in zip(names, found, strict=True)]


def with_masks(sample: Sample, outcome: Outcome) -> Sample:
    """Return the sample as it would be written: its regions with the masks of an outcome."""
    pairs = zip(sample.regions, outcome.annotations, strict=True)
    return replace(sample, regions=tuple(replace(region, mask=annotation.mask) for region, annotation in pairs))


def proposal_of(annotation: Annotation) -> Rle | None:
    """Return the proposal for a region, None where it was empty."""
    if annotation.refined:
        return annotation.mask
    if annotation.candidates is not None:
        return annotation.candidates.masks[annotation.candidates.selected]
    return None


def is_top1(ious: Sequence[float], selected: int) -> bool | None:
    """Whether the selected one of K candidates is the best by IoU with the ground truth; None where all IoUs are 0."""
    best = max(ious)
    return None if best <= 0 else ious[selected] >= best - TIE


class EmbedOnce:
    """A backend that caches the embeddings of an image, which is used by several rows."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._seen: dict[tuple[int, ...], Embedding] = {}
        self.name, self.defaults, self.fingerprint = backend.name, backend.defaults, backend.fingerprint
        self.arbiters = backend.arbiters

    @property
    def views_at_once(self) -> int:
        return self._backend.views_at_once

    def embed(self, images: Sequence[ImageArray]) -> list[Embedding]:
        keys = [(*image.shape, hash(image.tobytes())) for image in images]
        new = {key: image for key, image in zip(keys, images, strict=True) if key not in self._seen}
        if new:
            self._seen |= dict(zip(new, self._backend.embed(list(new.values())), strict=True))
        return [self._seen[key] for key in keys]

    def predict(self, embeddings: Sequence[Embedding], prompts: Sequence[Prompts]) -> list[Prediction]:
        return self._backend.predict(embeddings, prompts)

    def forget(self) -> None:
        """Drop all embeddings."""
        self._seen.clear()


@dataclass(slots=True)
class _Sums:
    """Sums over objects."""

    objects: int = 0
    iou: float = 0.0
    boundary_iou: float = 0.0
    judged: int = 0
    right: int = 0
    seconds: float = 0.0

    def add(self, mask: Rle | None, region: Region, canvas: Canvas) -> None:
        found = count_common(canvas.get_shape(region.truth), canvas.get_shape(mask)).overlap
        self.objects += 1
        self.iou += found.iou
        self.boundary_iou += found.boundary_iou

    def judge(self, annotation: Annotation, region: Region) -> None:
        """Count whether the best alternative was chosen, where there was a choice of several."""
        candidates = annotation.candidates
        if candidates is None or candidates.selected == 0 or len(candidates.masks) < 3:
            return
        assert region.truth is not None
        truth = masks.decode(region.truth)
        ious = [masks.iou(masks.decode(rle), truth) for rle in candidates.masks[1:]]
        right = is_top1(ious, candidates.selected - 1)
        if right is not None:
            self.judged += 1
            self.right += right

    def score(self, name: str) -> Score:
        n = self.objects
        top1 = self.right / self.judged if self.judged else None
        return Score(name, n, self.iou / n, self.boundary_iou / n, top1, self.seconds)


def _with_prompts(base: RefineSettings, name: str) -> RefineSettings:
    point, box, mask = (word in name or name == "all" for word in ("point", "box", "mask"))
    prompts: PromptSettings = replace(
        base.prompts, use_point=point, use_negative=point and base.prompts.use_negative, use_box=box, use_mask=mask
    )
    return replace(base, prompts=prompts)


def _kept(settings: RefineSettings) -> RefineSettings:
    return replace(settings, keep_candidates=True)


def _filled(region: Region) -> bool:
    return region.mask is not None and masks.area(region.mask) > 0
