"""The stages of a run: threads prepare ahead of the model and finish behind it.

    samples → prepare (threads) → segment (this thread) → finish (threads) → results

Each arrow is a generator that pulls from the one before, so a sample is read when there is room for it and memory does
not grow with the data set. Samples keep their order all the way, so which of them share a batch follows from the input
and not from the timing of threads.
"""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import takewhile
from typing import Generic, Protocol, TypeAlias, TypeVar

from refinetool.errors import DataError, ImageError
from refinetool.records import Annotation, Outcome, Sample, kept

IN_FLIGHT_BYTES = 1 << 29
"""About how much the decoded pixels and masks in each of the three queues may weigh."""


class Prepared(Protocol):
    """A sample that was read, as far as the runner cares."""

    def __len__(self) -> int:
        """Views the model has to encode; 0 where it need not be asked."""


P = TypeVar("P", bound=Prepared)
S = TypeVar("S")
T = TypeVar("T")


class Stages(Protocol[P, S]):
    """What the runner needs of a refiner. `refine.Refiner` is one."""

    def prepare(self, sample: Sample) -> P:
        """Read and mine. Called from several threads; raises DataError where the sample can't be read."""

    def segment(self, batch: Sequence[P]) -> Sequence[S]:
        """Ask the model. Called from one thread; one answer per prepared sample."""

    def finish(self, prepared: P, segmented: S) -> Outcome:
        """Turn answers into annotations. Called from several threads."""


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
    samples: Iterable[Sample], refiner: Stages[P, S], *, threads: int, batch: int, stopped: Callable[[], bool]
) -> Generator[Result, None, None]:
    """Map samples to results, in order, on threads of this process.

    Args:
        threads: How many prepare and finish beside this one, which runs the model.
        batch: Views to gather, over samples, before the model is asked.
        stopped: Whether to end early. What the model has answered is then finished; what was only prepared is dropped,
            since it costs less to prepare again than to wait for.
    """
    share = _share(count=2 * batch + threads)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="refine")
    try:
        prepared = _ahead(pool, lambda sample: _prepare(refiner, sample), samples, share=share)
        groups = _groups(takewhile(lambda _: not stopped(), prepared), batch=batch, share=share)
        segmented = (work for group in groups for work in _segment(refiner, group))
        yield from _behind(pool, lambda work: _finish(refiner, work), segmented, share=share)
    finally:
        pool.shutdown(cancel_futures=True)


def stay_coarse(sample: Sample, *, reason: str, error: str | None) -> Outcome:
    """The outcome of a sample that is kept as it is; regions that have a reason of their own keep that."""
    statuses = (kept(region.keep or reason) for region in sample.regions)
    return Outcome(sample.key, tuple(map(Annotation, (region.mask for region in sample.regions), statuses)), error)


# --- stages --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Ready(Generic[P]):
    """A sample that waits for the model."""

    sample: Sample
    prepared: P
    seconds: float


@dataclass(frozen=True, slots=True)
class _Answered(Generic[P, S]):
    """A sample that the model has answered."""

    sample: Sample
    prepared: P
    segmented: S
    seconds: float


def _prepare(refiner: Stages[P, S], sample: Sample) -> _Ready[P] | Result:
    started = time.perf_counter()
    try:
        prepared = refiner.prepare(sample)
    except Exception as error:
        return _failed(sample, error, seconds=time.perf_counter() - started)
    return _Ready(sample, prepared, time.perf_counter() - started)


def _segment(refiner: Stages[P, S], group: Sequence[_Ready[P] | Result]) -> Iterator[_Answered[P, S] | Result]:
    """Ask the model about a group; what needs no asking passes through, in its place."""
    waiting = [work for work in group if isinstance(work, _Ready)]
    started = time.perf_counter()
    answers: list[S | Exception] = _ask(refiner, [work.prepared for work in waiting])
    seconds = (time.perf_counter() - started) / max(len(waiting), 1)
    following = iter(answers)
    for work in group:
        if not isinstance(work, _Ready):
            yield work
            continue
        answer = next(following)
        if isinstance(answer, Exception):
            yield _failed(work.sample, answer, seconds=work.seconds + seconds)
        else:
            yield _Answered(work.sample, work.prepared, answer, work.seconds + seconds)


def _ask(refiner: Stages[P, S], batch: Sequence[P]) -> list[S | Exception]:
    """The model's answers; a batch that does not fit into memory is halved until it does or is a single sample."""
    if not batch:
        return []
    try:
        return list(refiner.segment(batch))
    except Exception as error:
        if len(batch) == 1 or not _out_of_memory(error):
            return [error] * len(batch)
    half = len(batch) // 2  # out of the except block, so that the failed attempt's tensors are gone
    halves: list[list[S | Exception]] = [_ask(refiner, batch[:half]), _ask(refiner, batch[half:])]
    return [answer for answers in halves for answer in answers]


def _finish(refiner: Stages[P, S], work: _Answered[P, S] | Result) -> Result:
    if not isinstance(work, _Answered):
        return work
    started = time.perf_counter()
    try:
        outcome = refiner.finish(work.prepared, work.segmented)
    except Exception as error:
        return _failed(work.sample, error, seconds=work.seconds + time.perf_counter() - started)
    return Finished(work.sample, outcome, work.seconds + time.perf_counter() - started)


def _failed(sample: Sample, error: Exception, *, seconds: float) -> Result:
    """What becomes of a sample after an exception: kept as it is where the data or the memory are to blame."""
    if isinstance(error, DataError):
        reason = error.reason if isinstance(error, ImageError) else "unreadable"
        return Finished(sample, stay_coarse(sample, reason=reason, error=str(error)), seconds)
    if _out_of_memory(error):
        sentence = (
            f"{sample.image}: out of memory with this image alone; lower the image batch or the prompt batch, "
            f"then run again with --resume."
        )
        return Finished(sample, stay_coarse(sample, reason="out-of-memory", error=sentence), seconds)
    return Crashed(sample, error)


def _out_of_memory(error: Exception) -> bool:
    """Python's, NumPy's, torch's on a device, or torch's on the CPU, which has no class of its own."""
    return (
        isinstance(error, MemoryError)
        or any(base.__name__ == "OutOfMemoryError" for base in type(error).__mro__)
        or "DefaultCPUAllocator" in str(error)
    )


# --- queues --------------------------------------------------------------------------------------------------------


Share: TypeAlias = Callable[[Sample], float]
"""Which part of a queue a sample fills."""


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
    finish: Callable[[_Answered[P, S] | Result], Result],
    works: Iterable[_Answered[P, S] | Result],
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


def _groups(works: Iterable[_Ready[P] | Result], *, batch: int, share: Share) -> Iterator[list[_Ready[P] | Result]]:
    """Neighbours, until they have `batch` views between them, are as many samples, or fill a queue."""
    group: list[_Ready[P] | Result] = []
    views, load = 0, 0.0
    for work in works:
        group.append(work)
        views += len(work.prepared) if isinstance(work, _Ready) else 0
        load += share(work.sample)
        if views >= batch or len(group) >= batch or load >= 1:
            yield group
            group, views, load = [], 0, 0.0
    if group:
        yield group
