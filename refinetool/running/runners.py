"""Where the model runs: in this process, or in worker processes on one machine or on many.

A `Runner` maps samples to results. `open_runner` returns the one that suits the number of workers. With a single one,
Ray is not even imported. `open_team` starts workers for anything: refining, or gathering features for training.
"""

import pickle
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Semaphore
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, Self, TypeAlias, TypeVar

from refinetool.backends import Backend
from refinetool.cores import cores, limited_threads, use_threads, wait_passively
from refinetool.errors import UsageError
from refinetool.records import Outcome, Sample
from refinetool.refine import Refiner, load_refiner
from refinetool.running.crew import share_out, unit_size
from refinetool.running.identity import job_identity
from refinetool.running.threads import Crashed, Finished, Result, Stages, in_process, stay_coarse
from refinetool.settings import JobSettings, RefineSettings
from refinetool.statuses import Reason

if TYPE_CHECKING:
    from refinetool.running.ray import Loaded, RayCrew

T = TypeVar("T")
U = TypeVar("U")

WorkerCount: TypeAlias = int | Literal["auto"]
"""Number of processes that run the model; `auto` is one per GPU, or per four cores where there is none."""

JOB = JobSettings()
CORES_PER_WORKER = 4
"""What `auto` counts per worker on machines without a GPU."""


class Runner(Protocol):
    """Maps samples to results in order, wherever the model is."""

    @property
    def identity(self) -> Mapping[str, object]:
        """Everything that affects refined masks, apart from masks and images, in JSON types."""

    @property
    def workers(self) -> int:
        """Number of processes that run the model."""

    @property
    def crashes(self) -> Sequence[str]:
        """How workers died so far: a sentence each, and the end of the log."""

    def results(self, samples: Iterable[Sample], *, stopped: Callable[[], bool]) -> Generator[Result, None, None]:
        """Yield one result per sample; ends early when stopped."""


class BackedStages(Stages[Any], Protocol):
    """Stages whose model is a backend, such as a `Refiner`."""

    @property
    def backend(self) -> Backend:
        """The model."""


R_co = TypeVar("R_co", bound=BackedStages, covariant=True)
S = TypeVar("S", bound=BackedStages)


class RunJob(Protocol[R_co]):
    """What to run on samples, as given by the user; it is picklable, and any process can load it."""

    @property
    def device(self) -> str:
        """`auto`, `cpu`, `cuda` or `cuda:N`."""

    def on(self, device: str) -> Self:
        """Return the same job for another device."""

    def load(self) -> tuple[R_co, Mapping[str, object]]:
        """Load the model into this process; returns it with the identity of the job."""


@dataclass(frozen=True, slots=True)
class RefineJob:
    """A model and its settings, as given by the user; any process can load it. See `run.refine_dataset`.

    format: Format of the coarse masks, which is part of the identity.
    """

    model: str
    checkpoint: str | None
    device: str
    precision: str
    settings: RefineSettings
    iou_adapter: Path | None
    format: str
    head: str = JOB.head
    arbiter: Path | None = None
    embeddings: Path | None = None
    embeddings_gigabytes: float = JOB.embeddings_gigabytes
    compiled: bool = False

    def on(self, device: str) -> Self:
        """Return the same job for another device."""
        return replace(self, device=device)

    def load(self) -> tuple[Refiner, Mapping[str, object]]:
        """Load the model into this process; returns it with the identity of the job."""
        refiner = load_refiner(
            self.model,
            checkpoint=self.checkpoint,
            device=self.device,
            precision=self.precision,
            settings=self.settings,
            head=self.head,
            iou_adapter=self.iou_adapter,
            arbiter=self.arbiter,
            embeddings=self.embeddings,
            embeddings_gigabytes=self.embeddings_gigabytes,
            compiled=self.compiled,
        )
        identity = job_identity(
            refiner.backend,
            refiner.settings,
            model=self.model,
            device=self.device,
            precision=self.precision,
            format=self.format,
        )
        return refiner, identity | {"compiled": True} if self.compiled else identity


@contextmanager
def open_runner(
    job: RunJob[BackedStages], *, workers: WorkerCount, address: str | None, threads: int | None, total: int
) -> Iterator[Runner]:
    """Load the model where it will run, and yield the runner. Arguments and errors are those of `open_team`."""
    if is_here(workers, address):
        with loaded_here(job) as here:
            yield ThreadRunner(here.refiner, threads or JOB.threads, here.identity, here.batches)
        return
    load = partial(_WorkerJob, job)
    with open_team(load, device=job.device, workers=workers, address=address, threads=threads, total=total) as team:
        yield CrewRunner(team)


def is_here(workers: WorkerCount, address: str | None) -> bool:
    """Whether the model is to run in this process, without Ray."""
    return workers == 1 and address is None


@dataclass(frozen=True, slots=True)
class LoadedJob(Generic[S]):
    """A job in the process that runs the model.

    batches: Number of batches that the model should run at a time, each on its part of the cores.
    """

    refiner: S
    identity: Mapping[str, object]
    batches: int


@contextmanager
def loaded_here(job: RunJob[S]) -> Iterator[LoadedJob[S]]:
    """Load a job into this process, and use all its cores within the context."""
    refiner, identity = job.load()
    batches = batches_at_once(refiner, identity, cpus=cores())
    with limited_threads(cores() // batches):
        yield LoadedJob(refiner, identity, batches)


@dataclass(frozen=True, slots=True)
class Share:
    """What a worker gets of its machine: `cpu` or its own GPU (`cuda`), cores, and threads that read images."""

    device: str
    cpus: int
    threads: int

    def load(self, job: RunJob[S]) -> LoadedJob[S]:
        """Load a job into this process, the worker, which then uses no more than its share."""
        wait_passively()
        refiner, identity = job.on(self.device).load()
        batches = batches_at_once(refiner, identity, cpus=self.cpus)
        use_threads(self.cpus // batches)
        return LoadedJob(refiner, identity, batches)


@dataclass(frozen=True, slots=True)
class Team(Generic[T, U]):
    """A crew with the number of its workers, and the number of items in the units that it is handed."""

    crew: "RayCrew[T, U]"
    workers: int
    unit: int

    def results(
        self, items: Iterable[T], *, give_up: Callable[[T, str], U], stopped: Callable[[], bool]
    ) -> Generator[tuple[int, U], None, None]:
        """Map items to (worker, result); see `crew.share_out`."""
        return share_out(items, self.crew, size=self.unit, workers=self.workers, give_up=give_up, stopped=stopped)


@contextmanager
def open_team(
    load_for: "Callable[[Share], Callable[[], Loaded[T, U]]]",
    *,
    device: str,
    workers: WorkerCount,
    address: str | None,
    threads: int | None,
    total: int,
) -> Iterator[Team[T, U]]:
    """Start workers, and yield them. Leaving the context stops them.

    Args:
        load_for: Returns, for the share of each worker, what it calls once to load its work; that must be picklable.
        device: As given by the user: `auto`, `cpu` or `cuda`.
        workers: Number of workers.
        address: The address of a Ray cluster to use; None starts workers on this machine.
        threads: Threads per worker that read and finish images; None means up to eight, divided among the workers.
        total: Number of items.

    Raises:
        UsageError: The device does not exist, or there is no such cluster, or not enough of it.
        WeightsError: The weights can't be loaded.
    """
    from refinetool.running import ray

    if device.startswith("cuda:"):
        raise UsageError(
            f"--device {device} names a single GPU, and every worker has its own; use --device cuda, and choose "
            "GPUs with CUDA_VISIBLE_DEVICES"
        )
    with ray.cluster(address, cpus=cores() if workers == "auto" else max(cores(), workers)) as cluster:
        on_gpu = cluster.gpus > 0 if device == "auto" else device == "cuda"
        one_each = max(1, cluster.gpus if on_gpu else cluster.cpus // CORES_PER_WORKER)
        count = one_each if workers == "auto" else workers
        cpus = max(1, cluster.cpus // count)
        share = Share("cuda" if on_gpu else "cpu", cpus, threads or min(JOB.threads, cpus))
        # A GPU worker asks for one core only: what it needs most is its GPU, and cores are not alike on all machines.
        place = ray.Place(cpus=1, gpus=1) if on_gpu else ray.Place(cpus=cpus, gpus=0)
        with ray.RayCrew(load_for(share), workers=count, place=place, folder=Path.cwd()) as crew:
            yield Team(crew, count, unit_size(total, workers=count))


def batches_at_once(refiner: BackedStages, identity: Mapping[str, object], *, cpus: int) -> int:
    """Return how many batches the model should run at a time; see `ModelDefaults.single_threaded`."""
    return cpus if identity["device"] == "cpu" and refiner.backend.defaults.single_threaded else 1


@dataclass(frozen=True, slots=True)
class ThreadRunner:
    """Runs the model in this process, with threads for the other steps."""

    refiner: Stages[Any]
    threads: int
    identity: Mapping[str, object]
    batches: int = 1
    workers: int = 1
    crashes: Sequence[str] = ()

    def results(self, samples: Iterable[Sample], *, stopped: Callable[[], bool]) -> Generator[Result, None, None]:
        return in_process(samples, self.refiner, threads=self.threads, batches=self.batches, stopped=stopped)


@dataclass(frozen=True, slots=True)
class CrewRunner:
    """Runs the model in worker processes. Samples and run-length encoded masks travel; pixels stay in the worker."""

    team: Team[Sample, Result]

    @property
    def identity(self) -> Mapping[str, object]:
        return self.team.crew.about

    @property
    def workers(self) -> int:
        return self.team.workers

    @property
    def crashes(self) -> Sequence[str]:
        return self.team.crew.crashes

    def results(self, samples: Iterable[Sample], *, stopped: Callable[[], bool]) -> Generator[Result, None, None]:
        with closing(self.team.results(samples, give_up=given_up, stopped=stopped)) as shared:
            for worker, result in shared:
                yield replace(result, worker=worker)


def given_up(sample: Sample, why: str) -> Result:
    """Return the result of a sample whose worker died twice."""
    advice = "and run again with --resume, with fewer --workers if memory is short."
    sentence = f"{died_twice(sample, why, did='refined')}, {advice}"
    return Finished(sample, stay_coarse(sample, reason=Reason.WORKER_DIED, error=sentence), 0.0)


def died_twice(sample: Sample, why: str, *, did: str) -> str:
    """Return the beginning of a sentence about a sample whose worker died twice while it `did` the image."""
    return f"{sample.image}: the worker process died twice while it {did} this image ({why}); look at the image"


# --- in the worker


@dataclass(frozen=True, slots=True)
class _WorkerJob:
    """Loads the job in a worker with its share of the machine."""

    job: RunJob[BackedStages]
    share: Share

    def __call__(self) -> "Loaded[Sample, Result]":
        from refinetool.running.ray import Loaded

        here = self.share.load(self.job)
        return Loaded(RefineUnits(here.refiner, self.share.threads, here.batches), here.identity)


class RefineUnits:
    """Refines units of samples, several at a time; together they run as many batches at a time as one would alone."""

    def __init__(self, refiner: Stages[Any], threads: int, batches: int) -> None:
        self.refiner, self.threads, self.batches = refiner, threads, batches
        self._turn = Semaphore(batches)

    @property
    def jobs_at_once(self) -> int:
        return self.refiner.jobs_at_once

    def prepare(self, sample: Sample) -> Any:
        return self.refiner.prepare(sample)

    def segment(self, jobs: Sequence[Any]) -> Sequence[Any]:
        with self._turn:
            return self.refiner.segment(jobs)

    def finish(self, prepared: Any, answers: Sequence[Any]) -> Outcome:
        return self.refiner.finish(prepared, answers)

    def __call__(self, items: Sequence[Sample]) -> list[Result]:
        found = in_process(items, self, threads=self.threads, batches=self.batches, stopped=lambda: False)
        return [_portable(result) for result in found]


def _portable(result: Result) -> Result:
    """Return a result that can be sent to another process."""
    return portable(result) if isinstance(result, Crashed) else result


def portable(crashed: Crashed) -> Crashed:
    """Return a crash that can be sent to another process: the exception keeps its traceback as a note."""
    from refinetool.running.ray import with_traceback

    error: Any = with_traceback(crashed.error)
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = with_traceback(RuntimeError(f"{type(crashed.error).__name__}: {crashed.error}"))
    return replace(crashed, error=error)
