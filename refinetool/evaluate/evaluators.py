"""Which metrics suit which files, and the evaluators that compute them, in one process or several.

Images are scored in tasks of a fixed size, whose evaluators are merged in order, so the results are the same to the
last bit however many processes there are.
"""

import multiprocessing
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol, Self, TypeAlias

from refinetool.errors import UsageError
from refinetool.evaluate.clips import ClipEvaluator
from refinetool.evaluate.instances import InstanceEvaluator
from refinetool.evaluate.labels import LabelMapEvaluator
from refinetool.evaluate.pairing import Match
from refinetool.evaluate.precision import COCO_DETECTIONS, ApEvaluator
from refinetool.evaluate.report import Report
from refinetool.evaluate.selection import SelectionEvaluator
from refinetool.formats.coco_lvis import Federation

IMAGES_PER_TASK = 32
ALONE = 4
"""Tasks to do before starting further processes is worth it."""

AHEAD = 2
"""Tasks that wait for each process."""


class Evaluator(Protocol):
    """Sums and counts over images."""

    counts: Counter[str]

    def add(self, match: Match) -> None:
        """Score one image and add its scores."""

    def merge(self, other: Self) -> None:
        """Add the sums of another evaluator of the same kind."""

    def result(self) -> Report:
        """The metrics over everything added so far."""


@dataclass(frozen=True, slots=True)
class Metrics:
    """The metrics to compute.

    label_maps: mIoU of class maps, which excludes all others.
    objects: Metrics of objects that are matched by id.
    folder: Whether these objects are PNGs in a folder.
    clips: The rule for J&F, `davis` or `lvos`; None leaves J&F out.
    precision: AP.
    federation: What LVIS's rules for AP need; None for COCO's rules.
    max_detections, class_agnostic, if_complete: See `ApEvaluator`.
    unseen: Names of clips that are reported apart; None for no such groups.
    selection: Top-1 accuracy of the candidates that the matches carry.
    """

    with_coarse: bool
    boundary_ratio: float
    label_maps: bool
    objects: bool
    folder: bool
    clips: str | None
    precision: bool
    federation: Federation | None
    selection: bool
    max_detections: int = COCO_DETECTIONS
    class_agnostic: bool = False
    if_complete: bool = False
    unseen: frozenset[str] | None = None

    def make_evaluators(self) -> "Evaluators":
        """An empty evaluator for each kind of metric."""
        if self.label_maps:
            return (LabelMapEvaluator(with_coarse=self.with_coarse),)
        found: list[Evaluator] = []
        if self.objects:
            found.append(InstanceEvaluator(self.with_coarse, self.boundary_ratio, self.folder))
        if self.clips is not None:
            found.append(ClipEvaluator(self.with_coarse, self.clips, self.unseen))
        if self.precision:
            found.append(
                ApEvaluator(
                    self.with_coarse,
                    self.boundary_ratio,
                    self.federation,
                    self.max_detections,
                    self.class_agnostic,
                    self.if_complete,
                )
            )
        if self.selection:
            found.append(SelectionEvaluator(self.with_coarse))
        return tuple(found)


Evaluators: TypeAlias = tuple[Evaluator, ...]


def evaluate_all(
    metrics: Metrics, matches: Iterable[Match], *, workers: int, on_progress: Callable[[int], None]
) -> Evaluators:
    """Score all images.

    Args:
        workers: Number of processes; none is started for 1, or for a few images.
        on_progress: Called with the number of images done.
    """
    total = metrics.make_evaluators()
    done = 0
    for images, evaluators in _score_in_order(metrics, _split_into_tasks(matches), workers=workers):
        for mine, theirs in zip(total, evaluators, strict=True):
            _merge(mine, theirs)
        done += images
        on_progress(done)
    return total


def score_images(metrics: Metrics, matches: Sequence[Match]) -> Evaluators:
    """Score some images with evaluators of their own."""
    evaluators = metrics.make_evaluators()
    for match in matches:
        for evaluator in evaluators:
            evaluator.add(match)
        match.canvases.clear()  # masks are large, and tasks hold many
    return evaluators


def _merge(mine: Any, theirs: Any) -> None:
    """Merge evaluators of one kind, which the types of two tuples can't express."""
    mine.merge(theirs)


def _split_into_tasks(matches: Iterable[Match]) -> Iterator[list[Match]]:
    remaining = iter(matches)
    while task := list(islice(remaining, IMAGES_PER_TASK)):
        yield task


def _score_in_order(
    metrics: Metrics, tasks: Iterator[list[Match]], *, workers: int
) -> Iterator[tuple[int, Evaluators]]:
    """The number of images of each task and its evaluators, in order."""
    for task in tasks if workers == 1 else islice(tasks, ALONE):
        yield len(task), score_images(metrics, task)
    first = next(tasks, None)
    if first is None:
        return
    context = multiprocessing.get_context("spawn")  # a fork of threads can hang
    waiting: deque[tuple[int, Future[Evaluators]]] = deque()
    try:
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            waiting.append((len(first), pool.submit(score_images, metrics, first)))
            for task in tasks:
                waiting.append((len(task), pool.submit(score_images, metrics, task)))
                if len(waiting) > AHEAD * workers:
                    images, future = waiting.popleft()
                    yield images, future.result()
            while waiting:
                images, future = waiting.popleft()
                yield images, future.result()
    except BrokenProcessPool as error:
        raise UsageError(
            "A process that scores images could not be started or was killed, perhaps for lack of memory; run with one "
            'worker. In a Python script, call evaluate below `if __name__ == "__main__":`.'
        ) from error
