"""Gathers features with the model, in this process or in worker processes, and keeps them in the file of features.

A `Gatherer` maps samples to features, as a `running.runners.Runner` maps them to refined masks, with the same workers.
`gather` hands it the samples that are not in the file, and alone writes the file.
"""

import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from threading import Semaphore
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from refinetool.backends.square import SquareBackend
from refinetool.errors import DataError, Interrupted, UsageError
from refinetool.records import Sample
from refinetool.refine import Refiner
from refinetool.running.ahead import map_ahead
from refinetool.running.journal import digest_of
from refinetool.running.runners import (
    LoadedJob,
    RefineJob,
    Share,
    Team,
    WorkerCount,
    died_twice,
    is_here,
    loaded_here,
    open_team,
    portable,
)
from refinetool.running.summary import ERRORS_TOLD
from refinetool.running.threads import Crashed
from refinetool.settings import JobSettings
from refinetool.train.iou.features import FeatureFile, Features, answers
from refinetool.train.iou.head import Head

if TYPE_CHECKING:
    from refinetool.running.ray import Loaded

JOB = JobSettings()
HEAD = "head"
"""Name of the head in what a worker says about itself, beside the identity of its job."""


@dataclass(frozen=True, slots=True, eq=False)
class Answered:
    """The features of a sample."""

    key: str
    features: Features


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A sample without features, and a sentence that says why."""

    key: str
    why: str


Found: TypeAlias = Answered | LeftOut | Crashed


class Gatherer(Protocol):
    """Maps samples to features in order, wherever the model is."""

    @property
    def identity(self) -> Mapping[str, object]:
        """Everything that affects features, apart from masks and images, in JSON types."""

    @property
    def head(self) -> Head:
        """The part of the model that is to be trained."""

    @property
    def crashes(self) -> Sequence[str]:
        """How workers died so far: a sentence each, and the end of the log."""

    def results(self, samples: Iterable[Sample], *, stopped: Callable[[], bool]) -> Generator[Found, None, None]:
        """Yield one result per sample; ends early when stopped, and then perhaps over gaps."""


@contextmanager
def open_gatherer(
    job: RefineJob, *, workers: WorkerCount, address: str | None, threads: int | None, total: int
) -> Iterator[Gatherer]:
    """Load the model where it will run, and yield the gatherer. Arguments and errors: `running.runners.open_team`."""
    if is_here(workers, address):
        with loaded_here(job) as here:
            yield LocalGatherer(here, threads=threads or JOB.threads)
        return
    load = partial(_WorkerJob, job)
    with open_team(load, device=job.device, workers=workers, address=address, threads=threads, total=total) as team:
        yield CrewGatherer(team)


class LocalGatherer:
    """Makes features in this process. Threads read images ahead of the model, which runs on some images at a time."""

    crashes: Sequence[str] = ()

    def __init__(self, job: LoadedJob[Refiner], *, threads: int) -> None:
        """Take a model with its settings, as in `refine`.

        Args:
            threads: Number of threads that read images and mine prompts.
        """
        backend = job.refiner.backend
        if not isinstance(backend, SquareBackend):
            raise UsageError(f"the method {job.refiner.settings.method} has no model that could be adapted")
        self.identity = job.identity
        self.head = Head.of(backend)
        self._backend, self._refiner = backend, job.refiner
        self._threads = threads + job.batches
        self._turn = Semaphore(job.batches)

    def results(self, samples: Iterable[Sample], *, stopped: Callable[[], bool]) -> Generator[Found, None, None]:
        """Yield one result per sample, in order. May be called from several threads.

        After a stop, images that the model has begun are finished; those that were only read are dropped.
        """
        work = partial(self._found, stopped=stopped)
        with closing(map_ahead(work, samples, threads=self._threads, name="adapt")) as every:
            for found in every:
                if found is not None:
                    yield found

    def _found(self, sample: Sample, *, stopped: Callable[[], bool]) -> Found | None:
        """Return the result of a sample, None after a stop."""
        try:
            if stopped():
                return None
            jobs = self._refiner.prepare(sample).jobs
            with self._turn:
                if stopped():
                    return None
                return Answered(sample.key, answers(self._backend, jobs, settings=self._refiner.settings))
        except DataError as error:
            return LeftOut(sample.key, str(error))
        except Exception as error:
            return Crashed(sample, error)


@dataclass(frozen=True, slots=True)
class CrewGatherer:
    """Makes features in worker processes. Samples and features travel; pixels stay in the worker."""

    team: Team[Sample, Found]

    @property
    def identity(self) -> Mapping[str, object]:
        return {name: value for name, value in self.team.crew.about.items() if name != HEAD}

    @property
    def head(self) -> Head:
        packed: Any = self.team.crew.about[HEAD]
        return Head.unpacked(packed)

    @property
    def crashes(self) -> Sequence[str]:
        return self.team.crew.crashes

    def results(self, samples: Iterable[Sample], *, stopped: Callable[[], bool]) -> Generator[Found, None, None]:
        with closing(self.team.results(samples, give_up=given_up, stopped=stopped)) as shared:
            for _, found in shared:
                yield found


def given_up(sample: Sample, why: str) -> Found:
    """Return the result of a sample whose worker died twice."""
    sentence = f"{died_twice(sample, why, did='prompted the model for')}, or name fewer --workers if memory is short."
    return LeftOut(sample.key, sentence)


# --- in the worker


@dataclass(frozen=True, slots=True)
class _WorkerJob:
    """Loads the job in a worker with its share of the machine."""

    job: RefineJob
    share: Share

    def __call__(self) -> "Loaded[Sample, Found]":
        from refinetool.running.ray import Loaded

        gatherer = LocalGatherer(self.share.load(self.job), threads=self.share.threads)
        # The driver trains the head, so that it needs neither the model nor a GPU.
        return Loaded(FeatureUnits(gatherer), {**gatherer.identity, HEAD: gatherer.head.packed()})


@dataclass(frozen=True, slots=True)
class FeatureUnits:
    """Makes the features of units of samples."""

    gatherer: LocalGatherer

    def __call__(self, items: Sequence[Sample]) -> list[Found]:
        found = self.gatherer.results(items, stopped=lambda: False)
        return [portable(one) if isinstance(one, Crashed) else one for one in found]


# --- in the driver


@dataclass(frozen=True, slots=True)
class Gathered:
    """The result of gathering; `keys` are those of the images with masks, in the order of the samples."""

    keys: tuple[str, ...]
    masks: int
    reused: int
    failed: int
    errors: tuple[str, ...]
    """Error messages of the first images that have no features."""


def gather(
    samples: Iterable[Sample],
    gatherer: Gatherer,
    *,
    cache: FeatureFile,
    total: int,
    on_progress: Callable[[int, int], None],
    stop: threading.Event,
) -> Gathered:
    """Run the model on every mask that is not in the file yet.

    Args:
        samples: Streamed: only a few are in memory at a time. Samples without a mask to refine are skipped.
        total: Number of samples.
        on_progress: Called in this thread after each sample with (samples done, samples in total).
        stop: Once set, the model is not run any more; what it has answered is kept in the file.

    Raises:
        Interrupted: Stopped before the end.
        StorageError: The file can't be written.
        Exception: A bug, or an error in `samples`.
    """
    book = _Book(cache, total, on_progress, stop)
    with closing(gatherer.results(book.hand_out(samples), stopped=stop.is_set)) as results:
        for found in results:
            book.enter(found)
    return book.close()


@dataclass(slots=True)
class _Book:
    """Passes samples to the gatherer and records the results in the file, the counts and the progress."""

    cache: FeatureFile
    total: int
    on_progress: Callable[[int, int], None]
    stop: threading.Event
    masks: dict[str, int] = field(default_factory=dict)
    """Number of masks with features by the key of the sample, in the order of the samples."""
    digests: dict[str, str] = field(default_factory=dict)
    """Those of the samples that are handed out."""
    done: int = 0
    reused: int = 0
    failed: int = 0
    errors: list[str] = field(default_factory=list)

    def hand_out(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        """Yield the samples whose features have to be made. Ends early on a stop."""
        for sample in samples:
            if self.stop.is_set():
                return
            if all(region.keep is not None for region in sample.regions):
                self._count()
                continue
            digest = digest_of(sample)  # before the image is read, so that a later change is always detected
            held = self.cache.find(sample.key, digest=digest)
            self.masks[sample.key] = 0 if held is None else len(held)
            if held is None:
                self.digests[sample.key] = digest
                yield sample
            else:
                self.reused += 1
                self._count()

    def enter(self, found: Found) -> None:
        """Record a result; raises the exception of a crash."""
        match found:
            case Answered(key, features):
                self.cache.append(key, features, digest=self.digests.pop(key))
                self.masks[key] = len(features)
            case LeftOut(_, why):
                self.failed += 1
                self.errors += [why][: ERRORS_TOLD - len(self.errors)]
            case Crashed(sample, error):
                error.add_note(f"while prompting the model for {sample.key} ({sample.image})")
                raise error
        self._count()

    def close(self) -> Gathered:
        """Return the counts, or raise the interruption."""
        if self.stop.is_set() and self.done < self.total:
            raise Interrupted(
                f"stopped after {self.done} of {self.total} images; features are kept in {self.cache.path}: continue "
                "with --resume"
            )
        keys = tuple(key for key, count in self.masks.items() if count)
        return Gathered(keys, sum(self.masks.values()), self.reused, self.failed, tuple(self.errors))

    def _count(self) -> None:
        self.done += 1
        self.on_progress(self.done, self.total)
