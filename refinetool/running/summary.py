"""Counts the outcomes of a run, for its progress and its summary."""

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from refinetool.records import Outcome
from refinetool.statuses import Reason

SHORTEST_S = 1e-6
"""Some clocks stand still for a short run; rates divide by the time."""

ERRORS_TOLD = 10
"""Maximum number of error messages in a summary."""

FAULTS_TOLD = 5
"""Maximum number of faulty masks that a summary explains."""


@dataclass(frozen=True, slots=True)
class Progress:
    """The progress of a run. Counts include images reused from an earlier run, the rate does not."""

    done: int
    total: int
    reused: int
    masks: int
    refined: int
    kept: int
    failed: int
    """Images kept as they are because of an error."""
    images_per_second: float
    seconds_left: float | None
    """None until a rate is known."""
    worker_rates: tuple[float, ...] = ()
    """Images per second of each worker."""


@dataclass(frozen=True, slots=True)
class Summary:
    """The result of a run. Counts cover the whole output, the time only this run."""

    images: int
    masks: int
    refined: int
    kept: Mapping[Reason, int]
    """Masks that stay coarse, by reason."""
    failed: int
    """Images kept as they are because of an error."""
    errors: tuple[str, ...]
    """Error messages of the first of these images."""
    mean_change: float | None
    """Mean of 1 - IoU(refined, coarse) over the refined masks, None if there are none."""
    reused: int
    """Images reused from an earlier run."""
    redone: int
    """Images refined again, because an earlier run had other settings, another input, or an error."""
    seconds: float
    images_per_second: float
    output: Path | None = None
    """The path that was written, None if nothing was written."""
    journal: Path | None = None
    """The journal, kept for the next run with `resume` because images failed or were left out; else None."""
    notes: tuple[str, ...] = ()
    """Remarks on files that were not read, and on the output."""
    crashes: tuple[str, ...] = ()
    """How worker processes died, if any did: a sentence each, and the end of the log."""
    faulty: int = 0
    """Masks that stay coarse because something is wrong with them in the file."""
    faults: tuple[str, ...] = ()
    """What is wrong with the first of these masks."""


@dataclass(slots=True)
class Tally:
    """Counts the outcomes of a run."""

    total: int
    workers: int = 1
    started: float = field(default_factory=time.perf_counter)
    images: int = 0
    masks: int = 0
    refined: int = 0
    kept: Counter[Reason] = field(default_factory=Counter)
    failed: int = 0
    errors: list[str] = field(default_factory=list)
    faulty: int = 0
    faults: list[str] = field(default_factory=list)
    change: float = 0.0
    changed: int = 0
    ran: Counter[int] = field(default_factory=Counter)
    """Number of samples that were run, by worker."""
    reused: int = 0
    redone: int = 0

    def count(self, outcome: Outcome) -> None:
        self.images += 1
        self.masks += len(outcome.annotations)
        for annotation in outcome.annotations:
            if annotation.reason is not None:
                self.kept[annotation.reason] += 1
                continue
            self.refined += 1
            if annotation.coarse_iou is not None:
                self.change += 1 - annotation.coarse_iou
                self.changed += 1
        if outcome.error is not None:
            self.failed += 1
            self.errors.extend([outcome.error][: ERRORS_TOLD - len(self.errors)])
        self.faulty += len(outcome.faults)
        self.faults.extend(outcome.faults[: FAULTS_TOLD - len(self.faults)])

    def _elapsed(self) -> float:
        return max(time.perf_counter() - self.started, SHORTEST_S)

    def progress(self) -> Progress:
        seconds = self._elapsed()
        rate = self.ran.total() / seconds
        return Progress(
            done=self.images,
            total=self.total,
            reused=self.reused,
            masks=self.masks,
            refined=self.refined,
            kept=self.masks - self.refined,
            failed=self.failed,
            images_per_second=rate,
            seconds_left=(self.total - self.images) / rate if rate else None,
            worker_rates=tuple(self.ran[worker] / seconds for worker in range(self.workers)),
        )

    def summary(self) -> Summary:
        seconds = self._elapsed()
        return Summary(
            images=self.images,
            masks=self.masks,
            refined=self.refined,
            kept=dict(sorted(self.kept.items())),
            failed=self.failed,
            errors=tuple(self.errors),
            mean_change=self.change / self.changed if self.changed else None,
            reused=self.reused,
            redone=self.redone,
            seconds=seconds,
            images_per_second=self.ran.total() / seconds,
            faulty=self.faulty,
            faults=tuple(self.faults),
        )
