"""Runs refinement on threads of this process, which prepare samples ahead of the model and finish them behind it.

    samples → prepare (threads) → segment (threads of its own) → finish (threads) → results

Each stage is a generator that pulls from the previous one, so a sample is read only when there is room for it, and
memory does not grow with the data set. Samples keep their order throughout. The model processes full batches of views,
which may belong to several samples; which views share a batch depends on the input and not on the timing of threads.
A GPU runs one batch at a time; on a CPU, a small model runs several (`ModelDefaults.single_threaded`).
"""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

from refinetool.errors import DataError, ImageError, is_out_of_memory
from refinetool.records import Annotation, Outcome, Sample
from refinetool.statuses import Reason

IN_FLIGHT_BYTES = 1 << 29
"""Approximate limit for the decoded pixels and masks in each of the three queues."""


class Prepared(Protocol):
    """What the runner needs to know of a sample that was read."""

    @property
    def jobs(self) -> Sequence[Any]:
        """The jobs for the model, one per view; empty if the model is not needed."""


P = TypeVar("P", bound=Prepared)
T = TypeVar("T")


class Stages(Protocol[P]):
    """The methods that the runner needs of a refiner. `refine.Refiner` has them."""

    @property
    def jobs_at_once(self) -> int:
        """Number of jobs to process together for the best speed."""

    def prepare(self, sample: Sample) -> P:
        """Read and mine prompts. Called from several threads; raises DataError if the sample can't be read."""

    def segment(self, jobs: Sequence[Any]) -> Sequence[Any]:
        """Run the model. Called from as many threads as there are batches at a time; returns one answer per job, for
        jobs of any samples.
        """

    def finish(self, prepared: P, answers: Sequence[Any]) -> Outcome:
        """Turn the answers to the jobs of a sample into annotations. Called from several threads."""


@dataclass(frozen=True, slots=True)
class Finished:
    """A sample that was refined, or is kept with a reason. `seconds` is the processing time."""

    sample: Sample
    outcome: Outcome
    seconds: float
    worker: int = 0
    """Number of the process that ran the model."""


@dataclass(frozen=True, slots=True)
class Crashed:
    """A sample whose processing raised an unexpected exception, which is a bug."""

    sample: Sample
    error: Exception
    worker: int = 0


Result: TypeAlias = Finished | Crashed


def in_process(
    samples: Iterable[Sample], refiner: Stages[P], *, threads: int, batches: int = 1, stopped: Callable[[], bool]
) -> Generator[Result, None, None]:
    """Map samples to results, in order, on threads of this process.

    Args:
        threads: Number of threads that prepare and finish.
        batches: Number of batches that the model runs at a time.
        stopped: Whether to end early. Samples that the model has processed are then finished; samples that were only
            prepared are dropped, since preparing them again is cheap.
    """
    load = _load_of(count=2 * refiner.jobs_at_once * batches + threads)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="refine")
    model = _Model(refiner, ThreadPoolExecutor(batches, thread_name_prefix="refine-model"), batches)
    try:
        prepared = _ahead(pool, lambda sample: _prepare(refiner, sample), samples, load=load)
        running = takewhile(lambda _: not stopped(), prepared)
        answered = _answer(model, running, load=load, stopped=stopped)
        yield from _behind(pool, lambda work: _finish(refiner, work), answered, load=load)
    finally:
        model.pool.shutdown(cancel_futures=True)
        pool.shutdown(cancel_futures=True)


def stay_coarse(sample: Sample, *, reason: Reason, error: str | None) -> Outcome:
    """Return the outcome of a sample that is kept as it is; regions that already have a reason keep theirs."""
    kept = (Annotation(region.mask, region.keep or reason) for region in sample.regions)
    return Outcome(sample.key, tuple(kept), error, sample.faults)


# --- stages --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Ready(Generic[P]):
    """A prepared sample that waits for the model."""

    sample: Sample
    prepared: P
    seconds: float


@dataclass(slots=True)
class _Answered(Generic[P]):
    """A sample with the answers to its jobs so far, or the error of one of them."""

    sample: Sample
    prepared: P
    seconds: float
    answers: list[Any] = field(default_factory=list)
    error: Exception | None = None

    @property
    def complete(self) -> bool:
        return len(self.answers) == len(self.prepared.jobs)

    def take(self, answer: Any) -> None:
        """Add the answer to the next job."""
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


@dataclass(slots=True)
class _Model(Generic[P]):
    """The model with the jobs that wait for it, and the batches that it is running, at most `most` at a time."""

    refiner: Stages[P]
    pool: ThreadPoolExecutor
    most: int
    jobs: "deque[tuple[_Answered[P], Any]]" = field(default_factory=deque)
    running: "deque[tuple[list[_Answered[P]], Future[tuple[list[Any], float]]]]" = field(default_factory=deque)

    def start(self) -> None:
        """Start the next batch; waits for the oldest if too many are running."""
        batch = [self.jobs.popleft() for _ in range(min(self.refiner.jobs_at_once, len(self.jobs)))]
        future = self.pool.submit(_timed, self.refiner, [job for _, job in batch])
        self.running.append(([work for work, _ in batch], future))
        if len(self.running) == self.most:
            self.wait()

    def wait(self) -> None:
        """Wait for the oldest batch, and add its answers to their samples."""
        works, future = self.running.popleft()
        answers, seconds = future.result()
        for work, answer in zip(works, answers, strict=True):
            work.take(answer)
            work.seconds += seconds / len(works)


def _answer(
    model: _Model[P], works: Iterable[_Ready[P] | Result], *, load: "Load", stopped: Callable[[], bool]
) -> Iterator[_Answered[P] | Result]:
    """Run the model, in full batches as long as there are enough jobs and room for waiting samples."""
    waiting: deque[_Answered[P] | Result] = deque()
    for work in works:
        if isinstance(work, _Ready):
            partly = _Answered(work.sample, work.prepared, work.seconds)
            model.jobs.extend((partly, job) for job in work.prepared.jobs)
            waiting.append(partly)
        else:
            waiting.append(work)
        full = sum(load(one.sample) for one in waiting) >= 1
        while len(model.jobs) >= model.refiner.jobs_at_once or (full and model.jobs):
            model.start()
        while full and model.running:
            model.wait()
        yield from _completed(waiting)
    while model.jobs and not stopped():
        model.start()
    while model.running:
        model.wait()
    yield from _completed(waiting)


def _timed(refiner: Stages[P], jobs: Sequence[Any]) -> tuple[list[Any], float]:
    """Run the model on a batch; returns the answers and the seconds it took."""
    started = time.perf_counter()
    answers = _run(refiner, jobs)
    return answers, time.perf_counter() - started


def _completed(waiting: "deque[_Answered[P] | Result]") -> Iterator[_Answered[P] | Result]:
    """Yield samples from the front of the queue that have all their answers."""
    while waiting and not (isinstance(waiting[0], _Answered) and not waiting[0].complete):
        yield waiting.popleft()


def _run(refiner: Stages[P], jobs: Sequence[Any]) -> list[Any]:
    """Run the model on jobs. After an error, jobs are run in halves to find the ones that fail."""
    try:
        return list(refiner.segment(jobs))
    except Exception as error:
        if len(jobs) == 1:
            return [error]
    half = len(jobs) // 2  # outside the except block, so that the failed attempt's tensors are freed
    return [answer for part in (jobs[:half], jobs[half:]) for answer in _run(refiner, part)]


def _finish(refiner: Stages[P], work: _Answered[P] | Result) -> Result:
    if not isinstance(work, _Answered):
        return work
    started = time.perf_counter()
    try:
        if work.error is not None:
            raise work.error
        outcome = replace(refiner.finish(work.prepared, work.answers), faults=work.sample.faults)
    except Exception as error:
        return _failed(work.sample, error, seconds=work.seconds + time.perf_counter() - started)
    return Finished(work.sample, outcome, work.seconds + time.perf_counter() - started)


def _failed(sample: Sample, error: Exception, *, seconds: float) -> Result:
    """Return the result of a sample after an exception: kept as it is if the data or lack of memory caused it."""
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


Load: TypeAlias = Callable[[Sample], float]
"""The fraction of a queue that a sample fills."""


def _load_of(*, count: int) -> Load:
    """Return the load function of a queue that is full with `count` samples, or with fewer large ones."""

    def load(sample: Sample) -> float:
        height, width = sample.size
        masks = sum(region.keep is None for region in sample.regions)
        # Per pixel: three bytes of colour, and for each mask one byte of the mask and four of its prompt.
        return max(1 / count, height * width * (3 + 5 * masks) / IN_FLIGHT_BYTES)

    return load


class _Queue(Generic[T]):
    """Futures in the order of their samples."""

    def __init__(self) -> None:
        self._futures: deque[tuple[Future[T], float]] = deque()
        self._load = 0.0

    def put(self, future: Future[T], load: float) -> None:
        self._futures.append((future, load))
        self._load += load

    def take(self) -> T:
        """Wait for the first result and return it."""
        future, load = self._futures.popleft()
        self._load -= load
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
    pool: ThreadPoolExecutor, prepare: Callable[[Sample], T], samples: Iterable[Sample], *, load: Load
) -> Iterator[T]:
    """Prepare samples ahead of the consumer; the queue is filled first, so that the model need not wait."""
    queue: _Queue[T] = _Queue()
    for sample in samples:
        queue.put(pool.submit(prepare, sample), load(sample))
        while queue.full:
            yield queue.take()
    while queue:
        yield queue.take()


def _behind(
    pool: ThreadPoolExecutor,
    finish: Callable[[_Answered[P] | Result], Result],
    works: Iterable[_Answered[P] | Result],
    *,
    load: Load,
) -> Iterator[Result]:
    """Finish samples that the model has processed; results are yielded as soon as they are available."""
    queue: _Queue[Result] = _Queue()
    for work in works:
        queue.put(pool.submit(finish, work), load(work.sample))
        while queue.full or queue.ready:
            yield queue.take()
    while queue:
        yield queue.take()
