"""Many samples: hand them out, keep what is finished, say how far it is.

`run` leaves out what the journal holds, books what comes back, and stops handing out when told to or when something
breaks. A `Runner` maps samples to results in between, and alone knows where the model is.
"""

import shutil
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Protocol

from refinetool.errors import Interrupted, UsageError
from refinetool.formats import Dataset, Written, open_dataset
from refinetool.formats.storage import refuse_overlap
from refinetool.records import Outcome, Sample
from refinetool.refine import Refiner, load_refiner
from refinetool.running.identity import job_identity
from refinetool.running.interrupts import stop_on_interrupt
from refinetool.running.journal import Journal, holds_work, journal_path
from refinetool.running.records import write_candidates, write_mask_record
from refinetool.running.summary import Progress, Summary, Tally
from refinetool.running.threads import Crashed, Result, in_process, stay_coarse
from refinetool.running.truth import with_truth
from refinetool.settings import JobSettings, RefineSettings
from refinetool.statuses import Reason

JOB, REFINE = JobSettings(), RefineSettings()


class Runner(Protocol):
    """Maps samples to results, in their order, wherever the model is."""

    @property
    def identity(self) -> Mapping[str, object]:
        """All that decides a refined mask apart from masks and images, as JSON can hold it."""

    def results(self, samples: Iterable[Sample], *, stopped: Callable[[], bool]) -> Generator[Result, None, None]:
        """One result per sample; ends early once it is stopped."""


@dataclass(frozen=True, slots=True)
class ThreadRunner:
    """The model in this process, and threads around it."""

    refiner: Refiner
    threads: int
    identity: Mapping[str, object]

    def results(self, samples: Iterable[Sample], *, stopped: Callable[[], bool]) -> Generator[Result, None, None]:
        return in_process(samples, self.refiner, threads=self.threads, stopped=stopped)


def refine_dataset(
    coarse: Path | str,
    *,
    output: Path | str,
    images: Path | str | None = None,
    model: str = JOB.model,
    checkpoint: str | None = None,
    device: str = JOB.device,
    precision: str = JOB.precision,
    settings: RefineSettings = REFINE,
    format: str | None = None,
    sizes: Path | str | None = None,
    limit: int | None = None,
    resume: bool = False,
    fresh: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    record: Path | str | None = None,
    candidates: Path | str | None = None,
    truth: Path | str | None = None,
    iou_adapter: Path | str | None = None,
    threads: int = JOB.threads,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> Summary:
    """Refine the masks of a file or folder: the same one back, with better masks.

    While it runs, a journal beside the output holds what is finished. It is removed at the end, unless images failed
    or were left out by `limit`: the next run with `resume` then does only those.

    Args:
        coarse: the file or folder of masks.
        output: what to write; it appears when it is complete.
        images: the folder of their images; None looks beside the masks.
        model: a name of `backends.models.MODELS`.
        checkpoint: a file of weights, `random:SEED`, or None for those that belong to the name.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        precision: `auto`, `fp32` or `bf16`.
        settings: how to refine.
        format: a name of `formats.FORMATS`, None to detect it.
        sizes: a COCO file that lists the images, for a file of results, which does not.
        limit: how many images, from the first, to refine; the rest comes back as it is.
        resume: go on from the journal, and replace the output that it belongs to.
        fresh: drop the journal.
        overwrite: replace the output if it exists.
        dry_run: only look; every mask that would be refined counts as kept for `dry-run`.
        record: a CSV file to write with one line per mask: what became of it.
        candidates: a file of JSON lines to write with all that the model offered for every mask.
        truth: ground truth in the format of the coarse masks, for the selection `oracle`.
        iou_adapter: what `adapt-iou` made for this model.
        threads: how many prepare and finish beside the one that runs the model.
        on_progress: called after each image.

    Raises:
        UsageError: an output in the way, a journal of an earlier run, a model or device that does not exist.
        DataError: the masks can't be read. A broken image does not raise, its masks are kept.
        WeightsError: the weights can't be loaded.
        StorageError: the output or the journal can't be written.
        Interrupted: stopped by the user.
    """
    source, destination = Path(coarse), Path(output)
    left = journal_path(destination)
    check_journal(left, resume=resume, fresh=fresh)
    check_output(source, destination, replaced=overwrite or (resume and holds_work(left)))
    dataset = open_dataset(
        source, images=_path(images), format=format, sizes=_path(sizes), include_crowd=settings.include_crowd
    )
    total = len(dataset) if limit is None else min(limit, len(dataset))
    samples: Iterable[Sample] = islice(dataset.samples(), total)
    if (settings.selection == "oracle") != (truth is not None):
        raise UsageError("--selection oracle chooses by the ground truth that --truth names: give both or neither")
    if truth is not None:
        known = open_dataset(Path(truth), images=_path(images), sizes=_path(sizes), need_images=False)
        samples = with_truth(samples, known.samples())
    if candidates is not None:
        settings = replace(settings, keep_candidates=True)
    if dry_run:
        return look(samples, total=total, on_progress=on_progress)
    try:
        runner = local_runner(
            model,
            checkpoint=checkpoint,
            device=device,
            precision=precision,
            settings=settings,
            iou_adapter=_path(iou_adapter),
            threads=threads,
            format=dataset.format,
        )
        with Journal(left, job=runner.identity, fresh=fresh) as journal:
            with stop_on_interrupt(after="the model has answered") as stop:
                summary = run(samples, runner, journal=journal, total=total, on_progress=on_progress, stop=stop)
            written = write(dataset, journal.find, destination, runner.identity)
            if record is not None:
                write_mask_record(dataset.samples(), journal.find, Path(record))
            if candidates is not None:
                write_candidates(dataset.samples(), journal.find, Path(candidates))
            complete = total == len(dataset) and summary.failed == 0
            if complete:
                journal.remove()
    except KeyboardInterrupt:  # while the model was loaded or the output written
        raise Interrupted(f"stopped before {destination} was written; what is finished is kept in {left}") from None
    return replace(summary, output=destination, journal=None if complete else left, notes=written.notes)


def local_runner(
    model: str,
    *,
    checkpoint: str | None,
    device: str,
    precision: str,
    settings: RefineSettings,
    iou_adapter: Path | None,
    threads: int,
    format: str,
) -> Runner:
    """Load the model into this process; arguments are those of `refine_dataset`."""
    refiner = load_refiner(
        model,
        checkpoint=checkpoint,
        device=device,
        precision=precision,
        settings=settings,
        iou_adapter=iou_adapter,
    )
    identity = job_identity(
        refiner.backend, refiner.settings, model=model, device=device, precision=precision, format=format
    )
    return ThreadRunner(refiner, threads, identity)


def run(
    samples: Iterable[Sample],
    runner: Runner,
    *,
    journal: Journal,
    total: int,
    on_progress: Callable[[Progress], None],
    stop: threading.Event,
) -> Summary:
    """Refine samples and keep what is finished in the journal.

    Args:
        samples: read as they are needed, each key once.
        journal: samples it holds are not run again.
        total: how many samples there are, for the progress.
        on_progress: called in this thread after each sample.
        stop: once set, the model is asked no more; what it has answered is finished and kept.

    Raises:
        Interrupted: stopped before the end.
        StorageError: the journal can't be written.
        Exception: a bug, or an error in `samples`; raised after what the model has answered is in the journal.
    """
    book = _Book(journal, Tally(total), on_progress, stop)
    with closing(runner.results(book.hand_out(samples), stopped=book.stopped)) as results:
        for result in results:
            book.enter(result)
    return book.close()


def look(samples: Iterable[Sample], *, total: int, on_progress: Callable[[Progress], None]) -> Summary:
    """What a run would have to do, without model, journal or output: `dry-run` is the reason to keep its masks."""
    tally = Tally(total)
    for sample in samples:
        missing = bool(sample.regions) and not sample.image.is_file()
        error = f"{sample.image}: there is no such image" if missing else None
        tally.count(stay_coarse(sample, reason=Reason.IMAGE_MISSING if missing else Reason.DRY_RUN, error=error))
        on_progress(tally.progress())
    return tally.summary()


def check_journal(path: Path, *, resume: bool, fresh: bool) -> None:
    """Raise UsageError where an earlier run left work and it is not said what to do with it."""
    if resume and fresh:
        raise UsageError("--resume goes on from an earlier run and --fresh drops it; choose one")
    if not resume and not fresh and holds_work(path):
        raise UsageError(
            f"{path}: an earlier run left finished images here; --resume goes on from them, --fresh starts anew"
        )


def check_output(source: Path, destination: Path, *, replaced: bool) -> None:
    """Raise UsageError where the output can't be, or would take the place of something that is not to be replaced.

    A folder is replaced only if the input has all of its files: then it can't hold anything but an output.
    """
    refuse_overlap(source, destination)
    if not destination.parent.is_dir():
        raise UsageError(f"{destination}: there is no folder {destination.parent}; make it, or name another output")
    if not destination.exists() or (source.is_dir() and destination.is_dir() and not any(destination.iterdir())):
        return
    if source.is_dir() != destination.is_dir():
        kinds = ("folder", "file") if source.is_dir() else ("file", "folder")
        raise UsageError(
            f"{destination}: the output will be a {kinds[0]} and here is a {kinds[1]}; name another output"
        )
    if not replaced:
        raise UsageError(f"{destination}: exists already; --overwrite replaces it, --output names another")
    foreign = sorted(_files(destination) - _files(source)) if source.is_dir() else []
    if foreign:
        raise UsageError(f"{destination}: holds {foreign[0]}, which is no output of {source}; name another output")


def write(
    dataset: Dataset, find: Callable[[str], Outcome | None], destination: Path, notes: Mapping[str, object]
) -> Written:
    """Write the output; a folder that is there already is replaced when the new one is complete."""
    if not destination.is_dir():
        return dataset.write(find, destination, notes)
    fresh, old = (destination.with_name(f".{destination.name}.refinetool-{which}") for which in ("new", "old"))
    for folder in (fresh, old):
        shutil.rmtree(folder, ignore_errors=True)
    written = dataset.write(find, fresh, notes)
    destination.rename(old)
    fresh.rename(destination)
    shutil.rmtree(old)
    return replace(written, path=destination)


def _path(path: Path | str | None) -> Path | None:
    return None if path is None else Path(path)


def _files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


@dataclass(slots=True)
class _Book:
    """Hands samples out and enters what comes back: into the journal, the counts and the progress."""

    journal: Journal
    tally: Tally
    on_progress: Callable[[Progress], None]
    stop: threading.Event
    failure: Exception | None = None

    def hand_out(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        """The samples that have to be run. Ends early on a stop or a failure."""
        try:
            for sample in samples:
                if self.stopped():
                    return
                if sample.regions and not self._reuse(sample):
                    yield sample
                elif not sample.regions:
                    self._count(Outcome(sample.key, ()))
        except Exception as error:
            self._fail(error)

    def stopped(self) -> bool:
        """Whether no more is to be done."""
        return self.stop.is_set() or self.failure is not None

    def enter(self, result: Result) -> None:
        """Keep a result. A bug is raised later, when what the model has answered has been kept as well."""
        if isinstance(result, Crashed):
            result.error.add_note(f"while refining {result.sample.key} ({result.sample.image})")
            self._fail(result.error)
            return
        self.journal.append(result.outcome, seconds=result.seconds)
        self.tally.ran += 1
        self._count(result.outcome)

    def close(self) -> Summary:
        """The sum of it all, or the reason why there is none."""
        done, total = self.tally.images, self.tally.total
        if self.failure is not None:
            raise self.failure
        if self.stop.is_set() and done < total:
            raise Interrupted(f"stopped after {done} of {total} images; they are kept in {self.journal.path}")
        return self.tally.summary()

    def _reuse(self, sample: Sample) -> bool:
        outcome = self.journal.reuse(sample)
        if outcome is None:
            self.tally.redone += self.journal.knows(sample.key)
            return False
        self.tally.reused += 1
        self._count(outcome)
        return True

    def _count(self, outcome: Outcome) -> None:
        self.tally.count(outcome)
        self.on_progress(self.tally.progress())

    def _fail(self, error: Exception) -> None:
        self.failure = self.failure or error
