"""Which figures are taken of which files, and the tallies that take them, in one process or several.

Images are scored in tasks of a fixed number, whose tallies are merged in order: the figures are the same to the last
bit however many processes there are.
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
from refinetool.evaluate.clips import ClipTally
from refinetool.evaluate.instances import InstanceTally
from refinetool.evaluate.labels import LabelTally
from refinetool.evaluate.pairing import Match
from refinetool.evaluate.precision import ApTally
from refinetool.evaluate.report import Report
from refinetool.evaluate.selection import SelectionTally
from refinetool.formats.coco_lvis import Federation

IMAGES_PER_TASK = 32
ALONE = 4
"""Tasks that are done before it is worth starting further processes."""

AHEAD = 2
"""Tasks per process that wait for it."""


class Tally(Protocol):
    """Sums and counts over images."""

    counts: Counter[str]

    def add(self, match: Match) -> None:
        """Score one image and add it."""

    def merge(self, other: Self) -> None:
        """Add what another tally of the same kind has seen."""

    def result(self) -> Report:
        """The figures of everything added so far."""


@dataclass(frozen=True, slots=True)
class Families:
    """The families of figures that some files allow.

    label_maps: mIoU; the files are class maps, which have nothing else.
    objects: Figures of objects that are matched by id.
    folder: Whether these objects are PNGs in a folder.
    clips: The rule by which J&F is taken, None without.
    precision: AP.
    federation: LVIS's rules for AP, None for COCO's.
    selection: Top-1 accuracy; the matches bring candidates along.
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

    def tallies(self) -> "Tallies":
        """An empty tally for each."""
        if self.label_maps:
            return (LabelTally(with_coarse=self.with_coarse),)
        found: list[Tally] = []
        if self.objects:
            found.append(InstanceTally(self.with_coarse, self.boundary_ratio, self.folder))
        if self.clips is not None:
            found.append(ClipTally(self.with_coarse, self.clips))
        if self.precision:
            found.append(ApTally(self.with_coarse, self.boundary_ratio, self.federation))
        if self.selection:
            found.append(SelectionTally(self.with_coarse))
        return tuple(found)


Tallies: TypeAlias = tuple[Tally, ...]


def tally_all(
    families: Families, matches: Iterable[Match], *, workers: int, on_progress: Callable[[int], None]
) -> Tallies:
    """Score all images.

    Args:
        workers: Processes; with 1 none is started, nor for a few images.
        on_progress: Is told how many images are done.
    """
    total = families.tallies()
    done = 0
    for images, tallies in _scored(families, _tasks(matches), workers=workers):
        for mine, theirs in zip(total, tallies, strict=True):
            _merge(mine, theirs)
        done += images
        on_progress(done)
    return total


def score(families: Families, matches: Sequence[Match]) -> Tallies:
    """The tallies of some images."""
    tallies = families.tallies()
    for match in matches:
        for tally in tallies:
            tally.add(match)
        match.canvases.clear()  # masks are large, and tasks hold many
    return tallies


def _merge(mine: Any, theirs: Any) -> None:
    """Both are of one kind, which types can't say of two tuples."""
    mine.merge(theirs)


def _tasks(matches: Iterable[Match]) -> Iterator[list[Match]]:
    remaining = iter(matches)
    while task := list(islice(remaining, IMAGES_PER_TASK)):
        yield task


def _scored(families: Families, tasks: Iterator[list[Match]], *, workers: int) -> Iterator[tuple[int, Tallies]]:
    """Each task's number of images and tallies, in order."""
    for task in tasks if workers == 1 else islice(tasks, ALONE):
        yield len(task), score(families, task)
    first = next(tasks, None)
    if first is None:
        return
    context = multiprocessing.get_context("spawn")  # a fork of threads can hang
    waiting: deque[tuple[int, Future[Tallies]]] = deque()
    try:
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            waiting.append((len(first), pool.submit(score, families, first)))
            for task in tasks:
                waiting.append((len(task), pool.submit(score, families, task)))
                if len(waiting) > AHEAD * workers:
                    images, future = waiting.popleft()
                    yield images, future.result()
            while waiting:
                images, future = waiting.popleft()
                yield images, future.result()
    except BrokenProcessPool as error:
        raise UsageError(
            "A process that scores images could not be started or was killed, maybe for want of memory; run with one "
            'worker. In a Python script, call evaluate below `if __name__ == "__main__":`.'
        ) from error
