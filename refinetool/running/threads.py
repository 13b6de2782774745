"""A runner on threads of this process: they prepare ahead of the model and finish behind it.

    samples → prepare (threads) → segment (this thread) → finish (threads) → results

Each arrow is a generator that pulls from the one before, so a sample is read when there is room for it and memory does
not grow with the data set. Samples keep their order all the way. The model is asked about full batches of views, which
may belong to several samples; which ones follows from the input and not from the timing of threads.
"""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

from refinetool.errors import DataError, ImageError, is_out_of_memory
from refinetool.records import Annotation, Outcome, Sample
from refinetool.statuses import Reason

IN_FLIGHT_BYTES = 1 << 29
"""About how much the decoded pixels and masks in each of the three queues may weigh."""


class Prepared(Protocol):
    """A sample that was read, as far as the runner cares."""

    @property
    def jobs(self) -> Sequence[Any]:
        """What the model is to be asked, view by view; nothing where it need not be asked."""


P = TypeVar("P", bound=Prepared)
T = TypeVar("T")


class Stages(Protocol[P]):
    """What the runner needs of a refiner. `refine.Refiner` is one."""

    @property
    def jobs_at_once(self) -> int:
        """How many jobs are best asked about together."""

    def prepare(self, sample: Sample) -> P:
        """Read and mine. Called from several threads; raises DataError where the sample can't be read."""

    def segment(self, jobs: Sequence[Any]) -> Sequence[Any]:
        """Ask the model. Called from one thread; one answer per job, whichever samples they belong to."""

    def finish(self, prepared: P, answers: Sequence[Any]) -> Outcome:
        """Turn the answers to the jobs of a sample into annotations. Called from several threads."""


@dataclass(frozen=True, slots=True)
class Finished:
    """A sample that went through, or is kept as it is with the reason. `seconds` is the work it took."""

    sample: Sample
    outcome: Outcome
    seconds: float


@dataclass(frozen=True, slots=True)
class Crashed:
    """A sample that met a bug."""

    sample: Sample
    error: Exception


Result: TypeAlias = Finished | Crashed


def in_process(
    samples: Iterable[Sample], refiner: Stages[P], *, threads: int, stopped: Callable[[], bool]
) -> Generator[Result, None, None]:
    """Map samples to results, in order, on threads of this process.

    Args:
        threads: How many prepare and finish beside this one, which runs the model.
        stopped: Whether to end early. Samples that the model has answered are then finished; what was only prepared is
            dropped, since it costs less to prepare again than to wait for.
    """
    share = _share(count=2 * refiner.jobs_at_once + threads)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="refine")
    try:
        prepared = _ahead(pool, lambda sample: _prepare(refiner, sample), samples, share=share)
        running = takewhile(lambda _: not stopped(), prepared)
        answered = _answer(refiner, running, share=share, stopped=stopped)
        yield from _behind(pool, lambda work: _finish(refiner, work), answered, share=share)
    finally:
        pool.shutdown(cancel_futures=True)


def stay_coarse(sample: Sample, *, reason: Reason, error: str | None) -> Outcome:
    """The outcome of a sample that is kept as it is; regions that have a reason of their own keep that."""
    kept = (Annotation(region.mask, region.keep or reason) for region in sample.regions)
    return Outcome(sample.key, tuple(kept), error)


# --- stages --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Ready(Generic[P]):
    """A sample that waits for the model."""

    sample: Sample
    prepared: P
    seconds: float


@dataclass(slots=True)
class _Answered(Generic[P]):
    """A sample with the answers to the first of its jobs, in time to all of them, or the error that one of them met."""

    sample: Sample
    prepared: P
    seconds: float
    answers: list[Any] = field(default_factory=list)
    error: Exception | None = None

    @property
    def complete(self) -> bool:
        return len(self.answers) == len(self.prepared.jobs)

    def take(self, answer: Any) -> None:
        """Enter the answer to the next job."""
        self.answers.append(answer)
        if isinstance(answer, Exception):
            self.error = self.error or answer


def _prepare(refiner: Stages[P], sample: Sample) -> _Ready[P] | Result:
    started = time.perf_counter()
    try:
        prepared = refiner.prepare(sample)
    except Exception as error:
        return _failed(sample, error, seconds=time.perf_counter() - started)
    return _Ready(sample, prepared, time.perf_counter() - started)


def _answer(
    refiner: Stages[P], works: Iterable[_Ready[P] | Result], *, share: "Share", stopped: Callable[[], bool]
) -> Iterator[_Answered[P] | Result]:
    """Ask the model, in full batches as long as there are enough jobs and room for those that wait."""
    waiting: deque[_Answered[P] | Result] = deque()
    jobs: deque[tuple[_Answered[P], Any]] = deque()
    for work in works:
        if isinstance(work, _Ready):
            asked = _Answered(work.sample, work.prepared, work.seconds)
            jobs.extend((asked, job) for job in work.prepared.jobs)
            waiting.append(asked)
        else:
            waiting.append(work)
        full = sum(share(one.sample) for one in waiting) >= 1
        while len(jobs) >= refiner.jobs_at_once or (full and jobs):
            _ask_next(refiner, jobs)
        yield from _completed(waiting)
    while jobs and not stopped():
        _ask_next(refiner, jobs)
    yield from _completed(waiting)


def _ask_next(refiner: Stages[P], jobs: "deque[tuple[_Answered[P], Any]]") -> None:
    """Ask about the next jobs, and enter the answers where they belong."""
    batch = [jobs.popleft() for _ in range(min(refiner.jobs_at_once, len(jobs)))]
    started = time.perf_counter()
    answers = _ask(refiner, [job for _, job in batch])
    seconds = (time.perf_counter() - started) / len(batch)
    for (asked, _), answer in zip(batch, answers, strict=True):
        asked.take(answer)
        asked.seconds += seconds


def _completed(waiting: "deque[_Answered[P] | Result]") -> Iterator[_Answered[P] | Result]:
    """Hand on from the front what waits for no answer any more."""
    while waiting and not (isinstance(waiting[0], _Answered) and not waiting[0].complete):
        yield waiting.popleft()


def _ask(refiner: Stages[P], jobs: Sequence[Any]) -> list[Any]:
    """The model's answers. Where some can't be had, jobs are asked about in halves until it is clear which."""
    try:
        return list(refiner.segment(jobs))
    except Exception as error:
        if len(jobs) == 1:
            return [error]
    half = len(jobs) // 2  # out of the except block, so that the failed attempt's tensors are gone
    return [answer for part in (jobs[:half], jobs[half:]) for answer in _ask(refiner, part)]


def _finish(refiner: Stages[P], work: _Answered[P] | Result) -> Result:
    if not isinstance(work, _Answered):
        return work
    started = time.perf_counter()
    try:
        if work.error is not None:
            raise work.error
        outcome = refiner.finish(work.prepared, work.answers)
    except Exception as error:
        return _failed(work.sample, error, seconds=work.seconds + time.perf_counter() - started)
    return Finished(work.sample, outcome, work.seconds + time.perf_counter() - started)


def _failed(sample: Sample, error: Exception, *, seconds: float) -> Result:
    """What becomes of a sample after an exception: kept as it is where the data or the memory are to blame."""
    if isinstance(error, DataError):
        reason = error.reason if isinstance(error, ImageError) else Reason.UNREADABLE
        return Finished(sample, stay_coarse(sample, reason=reason, error=str(error)), seconds)
    if is_out_of_memory(error):
        sentence = (
            f"{sample.image}: out of memory with a single view and a single region of this image; run again with "
            "--resume on a device with more memory, or with --device cpu."
        )
        return Finished(sample, stay_coarse(sample, reason=Reason.OUT_OF_MEMORY, error=sentence), seconds)
    return Crashed(sample, error)


# --- queues --------------------------------------------------------------------------------------------------------


Share: TypeAlias = Callable[[Sample], float]
"""The fraction of a queue that a sample fills."""


def _share(*, count: int) -> Share:
    """A queue is full with `count` samples, or with fewer large ones."""

    def share(sample: Sample) -> float:
        height, width = sample.size
        masks = sum(region.keep is None for region in sample.regions)
        # Three bytes of colour, and for each mask one of pixels and four of its prompt.
        return max(1 / count, height * width * (3 + 5 * masks) / IN_FLIGHT_BYTES)

    return share


class _Queue(Generic[T]):
    """Futures in the order of their samples."""

    def __init__(self) -> None:
        self._futures: deque[tuple[Future[T], float]] = deque()
        self._load = 0.0

    def put(self, future: Future[T], share: float) -> None:
        self._futures.append((future, share))
        self._load += share

    def take(self) -> T:
        """The first result; waits for it."""
        future, share = self._futures.popleft()
        self._load -= share
        return future.result()

    @property
    def full(self) -> bool:
        return self._load >= 1 and bool(self._futures)

    @property
    def ready(self) -> bool:
        return bool(self._futures) and self._futures[0][0].done()

    def __len__(self) -> int:
        return len(self._futures)


def _ahead(
    pool: ThreadPoolExecutor, prepare: Callable[[Sample], T], samples: Iterable[Sample], *, share: Share
) -> Iterator[T]:
    """Prepare samples before they are asked for; the queue is filled first, so that the model need not wait."""
    queue: _Queue[T] = _Queue()
    for sample in samples:
        queue.put(pool.submit(prepare, sample), share(sample))
        while queue.full:
            yield queue.take()
    while queue:
        yield queue.take()


def _behind(
    pool: ThreadPoolExecutor,
    finish: Callable[[_Answered[P] | Result], Result],
    works: Iterable[_Answered[P] | Result],
    *,
    share: Share,
) -> Iterator[Result]:
    """Finish what the model has answered; results are passed on as soon as they are there."""
    queue: _Queue[Result] = _Queue()
    for work in works:
        queue.put(pool.submit(finish, work), share(work.sample))
        while queue.full or queue.ready:
            yield queue.take()
    while queue:
        yield queue.take()
