"""Where the model runs: in this process, or in worker processes on one machine or on many.

A `Runner` maps samples to results. `open_runner` returns the one that suits the number of workers. With a single one,
Ray is not even imported.
"""

import pickle
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Semaphore
from typing import TYPE_CHECKING, Any, Literal, Protocol

from refinetool.cores import cores, limited_threads, use_threads, wait_passively
from refinetool.errors import UsageError
from refinetool.records import Outcome, Sample
from refinetool.refine import Prepared, Refiner, load_refiner
from refinetool.running.crew import share_out, unit_size
from refinetool.running.identity import job_identity
from refinetool.running.threads import Crashed, Finished, Result, in_process, stay_coarse
from refinetool.settings import JobSettings, RefineSettings
from refinetool.statuses import Reason

if TYPE_CHECKING:
    from refinetool.candidates import Answer, Job
    from refinetool.running.ray import Loaded, RayCrew

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
    embeddings: Path | None
    embeddings_gigabytes: float
    compiled: bool
    format: str

    def load(self) -> tuple[Refiner, Mapping[str, object]]:
        """Load the model into this process; returns it with the identity of the job."""
        refiner = load_refiner(
            self.model,
            checkpoint=self.checkpoint,
            device=self.device,
            precision=self.precision,
            settings=self.settings,
            iou_adapter=self.iou_adapter,
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
    job: RefineJob, *, workers: int | Literal["auto"], address: str | None, threads: int | None, total: int
) -> Iterator[Runner]:
    """Load the model where it will run, and yield the runner.

    Args:
        workers: Number of processes that run the model; `auto` is one per GPU, or per four cores where there is none.
        address: The address of a Ray cluster to use; None starts workers on this machine.
        threads: Threads per worker that read and finish images; None means up to eight, divided among the workers.
        total: Number of samples.

    Raises:
        UsageError: The device does not exist, or there is no such cluster, or not enough of it.
        WeightsError: The weights can't be loaded.
    """
    if workers == 1 and address is None:
        refiner, identity = job.load()
        batches = batches_at_once(refiner, identity, cpus=cores())
        with limited_threads(cores() // batches):
            yield ThreadRunner(refiner, threads or JOB.threads, identity, batches)
        return
    from refinetool.running import ray

    if job.device.startswith("cuda:"):
        raise UsageError(
            f"--device {job.device} names a single GPU, and every worker has its own; use --device cuda, and choose "
            "GPUs with CUDA_VISIBLE_DEVICES"
        )
    with ray.cluster(address, cpus=cores() if workers == "auto" else max(cores(), workers)) as cluster:
        on_gpu = cluster.gpus > 0 if job.device == "auto" else job.device == "cuda"
        one_each = max(1, cluster.gpus if on_gpu else cluster.cpus // CORES_PER_WORKER)
        count = one_each if workers == "auto" else workers
        share = max(1, cluster.cpus // count)
        job = replace(job, device="cuda" if on_gpu else "cpu")
        load = _WorkerJob(job, threads or min(JOB.threads, share), share)
        # A GPU worker asks for one core only: what it needs most is its GPU, and cores are not alike on all machines.
        place = ray.Place(cpus=1, gpus=1) if on_gpu else ray.Place(cpus=share, gpus=0)
        with ray.RayCrew(load, workers=count, place=place, folder=Path.cwd()) as crew:
            yield CrewRunner(crew, count, unit_size(total, workers=count))


def batches_at_once(refiner: Refiner, identity: Mapping[str, object], *, cpus: int) -> int:
    """Return how many batches the model should run at a time; see `ModelDefaults.single_threaded`."""
    return cpus if identity["device"] == "cpu" and refiner.backend.defaults.single_threaded else 1


@dataclass(frozen=True, slots=True)
class ThreadRunner:
    """Runs the model in this process, with threads for the other steps."""

    refiner: Refiner
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

    crew: "RayCrew[Sample, Result]"
    workers: int
    unit: int

    @property
    def identity(self) -> Mapping[str, object]:
        return self.crew.about

    @property
    def crashes(self) -> Sequence[str]:
        return self.crew.crashes

    def results(self, samples: Iterable[Sample], *, stopped: Callable[[], bool]) -> Generator[Result, None, None]:
        shared = share_out(samples, self.crew, size=self.unit, workers=self.workers, give_up=given_up, stopped=stopped)
        try:
            for worker, result in shared:
                yield replace(result, worker=worker)
        finally:
            shared.close()


def given_up(sample: Sample, why: str) -> Result:
    """Return the result of a sample whose worker died twice."""
    sentence = (
        f"{sample.image}: the worker process died twice while it refined this image ({why}); look at the image, and "
        "run again with --resume, with fewer --workers if memory is short."
    )
    return Finished(sample, stay_coarse(sample, reason=Reason.WORKER_DIED, error=sentence), 0.0)


# --- in the worker


@dataclass(frozen=True, slots=True)
class _WorkerJob:
    """Loads the job in a worker that may use a number of cores."""

    job: RefineJob
    threads: int
    cpus: int

    def __call__(self) -> "Loaded[Sample, Result]":
        from refinetool.running.ray import Loaded

        wait_passively()
        refiner, identity = self.job.load()
        batches = batches_at_once(refiner, identity, cpus=self.cpus)
        use_threads(self.cpus // batches)
        return Loaded(RefineUnits(refiner, self.threads, batches), identity)


class RefineUnits:
    """Refines units of samples, several at a time; together they run as many batches at a time as one would alone."""

    def __init__(self, refiner: Refiner, threads: int, batches: int) -> None:
        self.refiner, self.threads, self.batches = refiner, threads, batches
        self._turn = Semaphore(batches)

    @property
    def jobs_at_once(self) -> int:
        return self.refiner.jobs_at_once

    def prepare(self, sample: Sample) -> Prepared:
        return self.refiner.prepare(sample)

    def segment(self, jobs: "Sequence[Job]") -> "list[Answer]":
        with self._turn:
            return self.refiner.segment(jobs)

    def finish(self, prepared: Prepared, answers: "Sequence[Answer]") -> Outcome:
        return self.refiner.finish(prepared, answers)

    def __call__(self, items: Sequence[Sample]) -> list[Result]:
        found = in_process(items, self, threads=self.threads, batches=self.batches, stopped=lambda: False)
        return [_portable(result) for result in found]


def _portable(result: Result) -> Result:
    """Return a result that can be sent to another process; an exception keeps its traceback as a note."""
    if not isinstance(result, Crashed):
        return result
    from refinetool.running.ray import with_traceback

    error: Any = with_traceback(result.error)
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = with_traceback(RuntimeError(f"{type(result.error).__name__}: {result.error}"))
    return replace(result, error=error)
