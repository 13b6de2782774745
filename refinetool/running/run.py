"""Refines a data set: passes samples to a runner, keeps finished ones in the journal, and reports progress.

`run` leaves out samples that are in the journal, records the results, and stops when asked to or after an error. A
`Runner` maps samples to results; only the runner knows where the model is (`running.runners`).
"""

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal

from refinetool.errors import Interrupted, UsageError
from refinetool.formats import open_dataset
from refinetool.formats.categories import chosen_categories, only
from refinetool.formats.storage import IMAGE_FOLDER, refuse_clashes, refuse_existing
from refinetool.inputs import check_settings
from refinetool.locations import location
from refinetool.records import Outcome, Sample
from refinetool.running.interrupts import stop_on_interrupt
from refinetool.running.journal import Journal, holds_work, journal_path
from refinetool.running.outputs import check_beside, check_journal, check_output, folder_beside, folder_of, write
from refinetool.running.records import write_candidates, write_mask_record
from refinetool.running.runners import RefineJob, Runner, open_runner
from refinetool.running.summary import Progress, Summary, Tally
from refinetool.running.threads import Crashed, Result, stay_coarse
from refinetool.running.truth import with_truth
from refinetool.settings import JobSettings, RefineSettings
from refinetool.statuses import Reason

JOB, REFINE = JobSettings(), RefineSettings()


def refine_dataset(
    coarse: Path | str,
    *,
    output: Path | str,
    images: Path | str | None = None,
    model: str = JOB.model,
    checkpoint: str | None = None,
    device: str = JOB.device,
    precision: str = JOB.precision,
    head: str = JOB.head,
    settings: RefineSettings = REFINE,
    format: str | None = None,
    sizes: Path | str | None = None,
    follow_links: bool = False,
    mask_suffix: str = "",
    categories: Sequence[str] = (),
    limit: int | None = None,
    resume: bool = False,
    fresh: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    record: Path | str | None = None,
    candidates: Path | str | None = None,
    truth: Path | str | None = None,
    iou_adapter: Path | str | None = None,
    arbiter: Path | str | None = None,
    cache_embeddings: Path | str | None = None,
    cache_gigabytes: float = JOB.embeddings_gigabytes,
    compile: bool = False,
    workers: int | Literal["auto"] = JOB.workers,
    ray_address: str | None = None,
    threads: int | None = None,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> Summary:
    """Refine the masks of a file or folder, and write the same file or folder with refined masks.

    During the run, a journal beside the output holds the finished images. It is removed at the end, unless images
    failed or were left out by `limit`; the next run with `resume` then refines only those.

    Args:
        coarse: The file or folder of masks.
        output: The file or folder to write; it appears only when it is complete.
        images: The folder of the images; None looks beside the masks.
        model: A name in `backends.models.MODELS`.
        checkpoint: A weights file, `random:SEED`, or None for the published weights of the model.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        precision: `auto`, `fp32` or `bf16`.
        head: For SAM 2 models: `auto`, `none`, `detail`, `sam2refiner`, or a file that `train head` wrote.
        settings: How to refine.
        format: A name in `formats.FORMATS`, None to detect it.
        sizes: A COCO file that lists the images, for COCO results, which don't.
        follow_links: Whether links in the folders of images and masks may lead out of these folders.
        mask_suffix: What the names of mask files end in, before the suffix, and those of their images do not: `_mask`.
        categories: Names or numbers of the categories to refine; the masks of all others are kept. Empty means all.
        limit: Number of images to refine, from the first; the others are written unchanged.
        resume: Continue from the journal, and replace the output that it belongs to.
        fresh: Discard the journal.
        overwrite: Replace an existing output.
        dry_run: Write nothing; every mask that would be refined counts as kept for `dry-run`.
        record: A CSV file to write with the status of every mask.
        candidates: A JSON Lines file to write with all candidates of every mask.
        truth: Ground truth in the format of the coarse masks, for the selection `oracle`.
        iou_adapter: A file that `adapt-iou` wrote for this model.
        arbiter: A file that `train arbiter` wrote, or None for the model's own, if it has one.
        cache_embeddings: A folder in which to keep the embeddings of images for later runs, and to find those of
            earlier ones; it is made if it does not exist.
        cache_gigabytes: What that folder may take; the embeddings that were not used for longest are deleted.
        compile: Whether to compile the encoder with torch, which takes a minute or more and changes masks by rounding.
        workers: Number of processes that run the model. `auto` is one per GPU, or per four cores where there is none.
            With 1, the model runs in this process.
        ray_address: A running Ray cluster to use; None starts the workers on this machine.
        threads: Number of threads per process that prepare and finish images; None means up to eight, as cores allow.
        on_progress: Called once before the model is loaded, and after each image.

    Raises:
        UsageError: The output exists, there is a journal of an earlier run, the model or device does not exist, or no
            mask can be refined with the settings.
        DataError: The masks can't be read. A broken image does not raise an exception; its masks are kept.
        WeightsError: The weights can't be loaded.
        StorageError: The output or the journal can't be written.
        Interrupted: Stopped by the user.
    """
    check_settings(settings)  # before the model is loaded
    source, destination = location(coarse), location(output)
    left = journal_path(destination)
    records = {"record": location(record), "file of candidates": location(candidates)}
    outputs = {"output": destination, "journal": left, "cache of embeddings": location(cache_embeddings), **records}
    inputs = {
        "input": source,
        IMAGE_FOLDER: location(images),
        "list of images": location(sizes),
        "ground truth": location(truth),
        "checkpoint": location(checkpoint),
        "head": location(head),
        "IoU adapter": location(iou_adapter),
        "arbiter": location(arbiter),
    }
    refuse_clashes(outputs, inputs)
    replaced = overwrite
    if not dry_run:
        check_journal(left, resume=resume, fresh=fresh)
        replaced = overwrite or (resume and holds_work(left))
        check_output(source, destination, replaced=replaced, resume=resume)
        refuse_existing(records, replaced=replaced)
    dataset = open_dataset(
        source,
        images=location(images),
        format=format,
        sizes=location(sizes),
        include_crowd=settings.include_crowd,
        follow_links=follow_links,
        max_pixels=settings.max_pixels,
        polygons=settings.polygons,
        mask_suffix=mask_suffix,
    )
    outputs |= folder_beside(dataset, destination)
    refuse_clashes(outputs, inputs | folder_of(dataset, "input"), images=dataset.image_paths())
    if not dry_run:
        check_beside(dataset, source, destination, replaced=replaced, resume=resume)
    total = len(dataset) if limit is None else min(limit, len(dataset))
    samples: Iterable[Sample] = islice(dataset.samples(), total)
    if categories:
        samples = only(samples, chosen_categories(dataset, categories))
    if (settings.selection == "oracle") != (truth is not None):
        raise UsageError("--selection oracle chooses by the ground truth given with --truth: give both or neither")
    if truth is not None:
        known = open_dataset(
            location(truth),
            images=location(images),
            sizes=location(sizes),
            need_images=False,
            follow_links=follow_links,
            max_pixels=settings.max_pixels,
            mask_suffix=mask_suffix,
        )
        refuse_clashes(outputs, folder_of(known, "ground truth"))
        samples = with_truth(samples, known.samples())
    if candidates is not None:
        settings = replace(settings, keep_candidates=True)
    if dry_run:
        return replace(look(samples, total=total, on_progress=on_progress), notes=dataset.remarks())
    job = RefineJob(
        model,
        checkpoint,
        device,
        precision,
        settings,
        head=head,
        iou_adapter=location(iou_adapter),
        arbiter=location(arbiter),
        embeddings=location(cache_embeddings),
        embeddings_gigabytes=cache_gigabytes,
        compiled=compile,
        format=dataset.format,
    )
    on_progress(Tally(total).progress())  # before the model is loaded, which takes seconds
    try:
        with (
            open_runner(job, workers=workers, address=ray_address, threads=threads, total=total) as runner,
            Journal(left, job=runner.identity, fresh=fresh) as journal,
        ):
            with stop_on_interrupt(after="the model has answered") as stop:
                summary = run(samples, runner, journal=journal, total=total, on_progress=on_progress, stop=stop)
            notes = {**runner.identity, "polygons": asdict(settings.polygons)}
            written = write(dataset, journal.find, destination, notes)
            if record is not None:
                write_mask_record(dataset.samples(), journal.find, Path(record))
            if candidates is not None:
                write_candidates(dataset.samples(), journal.find, Path(candidates))
            complete = total == len(dataset) and summary.failed == 0
            if complete:
                journal.remove()
    except KeyboardInterrupt:  # while the model was loaded or the output written
        raise Interrupted(f"stopped before {destination} was written; finished images are kept in {left}") from None
    remarks = (*dataset.remarks(), *written.notes)
    return replace(summary, output=destination, journal=None if complete else left, notes=remarks)


def run(
    samples: Iterable[Sample],
    runner: Runner,
    *,
    journal: Journal,
    total: int,
    on_progress: Callable[[Progress], None],
    stop: threading.Event,
) -> Summary:
    """Refine samples and keep finished ones in the journal.

    Args:
        samples: Read as they are needed, each key once.
        journal: Samples in the journal are not run again.
        total: Number of samples, for the progress.
        on_progress: Called in this thread after each sample.
        stop: Once set, the model is not run any more; samples it has already processed are finished and kept.

    Raises:
        Interrupted: Stopped before the end.
        StorageError: The journal can't be written.
        Exception: A bug, or an error in `samples`; raised after all processed samples are in the journal.
    """
    book = _Book(journal, Tally(total, workers=runner.workers), on_progress, stop)
    with closing(runner.results(book.hand_out(samples), stopped=book.stopped)) as results:
        for result in results:
            book.enter(result)
    return replace(book.close(), crashes=tuple(runner.crashes))


def look(samples: Iterable[Sample], *, total: int, on_progress: Callable[[Progress], None]) -> Summary:
    """Summarise what a run would do, without model, journal or output; masks to refine are kept for `dry-run`."""
    tally = Tally(total)
    for sample in samples:
        missing = bool(sample.regions) and not sample.image.is_file()
        error = f"{sample.image}: there is no such image" if missing else None
        tally.count(stay_coarse(sample, reason=Reason.IMAGE_MISSING if missing else Reason.DRY_RUN, error=error))
        on_progress(tally.progress())
    return tally.summary()


@dataclass(slots=True)
class _Book:
    """Passes samples to the runner and records the results in the journal, the counts and the progress."""

    journal: Journal
    tally: Tally
    on_progress: Callable[[Progress], None]
    stop: threading.Event
    failure: Exception | None = None

    def hand_out(self, samples: Iterable[Sample]) -> Iterator[Sample]:
        """Yield the samples that have to be run. Ends early on a stop or a failure."""
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
        """Whether to stop."""
        return self.stop.is_set() or self.failure is not None

    def enter(self, result: Result) -> None:
        """Record a result. A bug is raised later, when the other processed samples are in the journal."""
        if isinstance(result, Crashed):
            result.error.add_note(f"while refining {result.sample.key} ({result.sample.image})")
            self._fail(result.error)
            return
        self.journal.append(result.outcome, seconds=result.seconds)
        self.tally.ran[result.worker] += 1
        self._count(result.outcome)

    def close(self) -> Summary:
        """Return the summary, or raise the failure or the interruption."""
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
