"""Many samples: hand them out, keep what is finished, say how far it is.

`run` leaves out what the journal holds, books what comes back, and stops handing out when told to or when something
breaks. What maps samples to results in between is `pipeline.in_process`; another runner is another such function.
"""

import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from types import FrameType

from refinetool.errors import Interrupted
from refinetool.journal import Journal
from refinetool.pipeline import Crashed, P, Result, S, Stages, in_process
from refinetool.records import Outcome, Sample, kept

ERRORS_TOLD = 10
"""How many sentences about failed images a summary holds."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is. Counts include images taken over from an earlier run, the rate does not."""

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
    """None as long as there is no rate."""


@dataclass(frozen=True, slots=True)
class Summary:
    """What a run did. Counts cover the whole output, the time only this run."""

    images: int
    masks: int
    refined: int
    kept: Mapping[str, int]
    """Masks that stay coarse, by reason."""
    failed: int
    """Images kept as they are because of an error."""
    errors: tuple[str, ...]
    """Sentences about the first of them."""
    mean_change: float | None
    """Mean of 1 - IoU(refined, coarse) over the refined masks, None without any."""
    reused: int
    """Images taken over from an earlier run."""
    redone: int
    """Images an earlier run had been through with other settings, another input, or an error."""
    seconds: float
    images_per_second: float


def run(
    samples: Iterable[Sample],
    refiner: Stages[P, S],
    *,
    journal: Journal,
    threads: int,
    batch: int,
    total: int,
    on_progress: Callable[[Progress], None],
    stop: threading.Event,
) -> Summary:
    """Refine samples in this process and keep what is finished in the journal.

    Args:
        samples: read as they are needed, each key once.
        refiner: prepare, segment and finish.
        journal: samples it holds are not run again.
        threads: how many prepare and finish beside the calling thread, which runs the model.
        batch: views to gather, over images, before the model is asked.
        total: how many samples there are, for the progress.
        on_progress: called in this thread after each sample.
        stop: once set, no sample is handed out any more; those in flight are finished and kept.

    Raises:
        Interrupted: stopped before the end.
        StorageError: the journal can't be written.
        Exception: a bug, or an error in `samples`; raised after what was in flight is in the journal.
    """
    book = _Book(journal=journal, total=total, on_progress=on_progress, stop=stop)
    with closing(in_process(book.hand_out(samples), refiner, threads=threads, batch=batch)) as results:
        for result in results:
            book.enter(result)
    return book.close()


@contextmanager
def stop_on_interrupt() -> Iterator[threading.Event]:
    """Ctrl-C sets the event instead of raising; a second one kills at once. Only in the main thread."""
    stop = threading.Event()
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield stop
        return

    def first(_signal: int, _frame: FrameType | None) -> None:
        stop.set()
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    before = signal.signal(signal.SIGINT, first)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


@dataclass(slots=True)
class _Book:
    """Hands samples out and enters what comes back: into the journal, the counts and the progress."""

    journal: Journal
    total: int
    on_progress: Callable[[Progress], None]
    stop: threading.Event
    started: float = field(default_factory=time.perf_counter)
    images: int = 0
    masks: int = 0
    refined: int = 0
    kept: Counter[str] = field(default_factory=Counter)
    failed: int = 0
    errors: list[str] = field(default_factory=list)
    change: float = 0.0
    changed: int = 0
    ran: int = 0
    reused: int = 0
    redone: int = 0
    failure: Exception | None = None

    def hand_out(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        """The samples that have to be run. Ends early on a stop or a failure."""
        try:
            for sample in samples:
                if self.stop.is_set() or self.failure is not None:
                    return
                if sample.regions and not self._reuse(sample):
                    yield sample
                elif not sample.regions:
                    self._count(Outcome(sample.key, ()))
        except Exception as error:
            self._fail(error)

    def _reuse(self, sample: Sample) -> bool:
        outcome = self.journal.reuse(sample)
        if outcome is None:
            self.redone += self.journal.knows(sample.key)
            return False
        self.reused += 1
        self._count(outcome)
        return True

    def enter(self, result: Result) -> None:
        """Keep a result. A bug is raised later, when what is in flight has been kept as well."""
        if isinstance(result, Crashed):
            result.error.add_note(f"while refining {result.sample.key} ({result.sample.image})")
            self._fail(result.error)
            return
        self.journal.append(result.outcome, seconds=result.seconds)
        self.ran += 1
        self._count(result.outcome)

    def close(self) -> Summary:
        """The sum of it all, or the reason why there is none."""
        if self.failure is not None:
            raise self.failure
        if self.stop.is_set() and self.images < self.total:
            raise Interrupted(
                f"stopped after {self.images} of {self.total} images; they are kept in {self.journal.path}"
            )
        seconds = time.perf_counter() - self.started
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
            images_per_second=self.ran / seconds,
        )

    def _fail(self, error: Exception) -> None:
        self.failure = self.failure or error

    def _count(self, outcome: Outcome) -> None:
        self.images += 1
        self.masks += len(outcome.annotations)
        for annotation in outcome.annotations:
            if not annotation.refined:
                self.kept[annotation.status.removeprefix(kept(""))] += 1
                continue
            self.refined += 1
            if annotation.coarse_iou is not None:
                self.change += 1 - annotation.coarse_iou
                self.changed += 1
        if outcome.error is not None:
            self.failed += 1
            self.errors.extend([outcome.error][: ERRORS_TOLD - len(self.errors)])
        self.on_progress(self._progress())

    def _progress(self) -> Progress:
        rate = self.ran / (time.perf_counter() - self.started)
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
        )
