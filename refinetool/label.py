"""Labels a folder of images by a few annotated reference images: `label_dataset`. One image: `labeller`."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Literal

from refinetool.errors import DataError, Interrupted, UsageError
from refinetool.formats import Request
from refinetool.formats.class_maps import NAMES_FILE, write_class_maps
from refinetool.formats.coco_writer import write_coco
from refinetool.formats.image_files import by_stem, fence, header_size
from refinetool.formats.references import References, read_references
from refinetool.formats.storage import IMAGE_FOLDER, refuse_clashes, refuse_existing, replacing_folder
from refinetool.labeller import LabelJob, empty_target
from refinetool.locations import check_reachable, location
from refinetool.records import VOID, Outcome, Region, Sample
from refinetool.running.interrupts import stop_on_interrupt
from refinetool.running.journal import Journal, holds_work, journal_path
from refinetool.running.outputs import check_journal
from refinetool.running.records import write_mask_record
from refinetool.running.run import run
from refinetool.running.runners import open_runner
from refinetool.running.summary import Progress, Summary
from refinetool.settings import JobSettings, LabelSettings, RefineSettings

JOB, LABEL = JobSettings(), LabelSettings()
UNKNOWN = (1, 1)
"""The size of an image whose header can't be read; the image is reported when it is opened."""


@dataclass(frozen=True, slots=True)
class Targets:
    """The images to label, by key: the path within the folder without suffix."""

    folder: Path
    images: Mapping[str, Path]
    within: Path | None

    def samples(self, categories: tuple[int, ...]) -> Iterator[Sample]:
        """Yield the targets in the order of their keys, with one empty region per class."""
        for key, path in self.images.items():
            size = header_size(path, within=self.within) or UNKNOWN
            yield empty_target(key, path, size=size, categories=categories, within=self.within)


def label_dataset(
    images: Path | str,
    references: Path | str,
    *,
    output: Path | str,
    reference_images: Path | str | None = None,
    model: str = JOB.model,
    checkpoint: str | None = None,
    device: str = JOB.device,
    precision: str = JOB.precision,
    head: str = JOB.head,
    reference_encoder: str | None = None,
    image_encoder: str | None = None,
    encoder_checkpoint: str | None = None,
    settings: LabelSettings = LABEL,
    refine: RefineSettings | None = None,
    follow_links: bool = False,
    limit: int | None = None,
    resume: bool = False,
    fresh: bool = False,
    overwrite: bool = False,
    record: Path | str | None = None,
    workers: int | Literal["auto"] = JOB.workers,
    ray_address: str | None = None,
    threads: int | None = None,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> Summary:
    """Find the classes of some annotated reference images in all images of a folder, and write their masks.

    Args:
        images: A folder of images, or a single image.
        references: COCO-shaped JSON, a folder of class maps, or a VOC root; see `formats.references`.
        output: A COCO file, if it ends in `.json`; else a folder of class maps.
        reference_images: The folder of the reference images; None looks beside the references.
        model, checkpoint, device, precision, head: The model that decodes, and refines; as in `refine_dataset`.
        reference_encoder: Weights that `train reference` wrote for this model; `random:SEED`; None for those in the
            package, which are for the model `embedded`.
        image_encoder: A name in `IMAGE_ENCODERS`, for random weights; others name theirs.
        encoder_checkpoint: Weights of the image encoder; None for those in the package or the cache.
        settings: How masks are made, and which are rejected.
        refine: How to refine them in the same pass; None leaves them as they are.
        limit: Number of images to label, from the first; the others are not written.
        follow_links, resume, fresh, overwrite, record, workers, ray_address, threads, on_progress: As in
            `refine_dataset`.

    Returns:
        A summary in which refined masks are those that were found, and kept ones the classes without a mask.

    Raises:
        UsageError: The output exists, there is a journal of an earlier run, or a name does not exist.
        DataError: The references can't be used, or there are no images. A broken image does not raise an exception.
        WeightsError: Weights can't be loaded.
        StorageError: The output or the journal can't be written.
        Interrupted: Stopped by the user.
    """
    source, marked, destination = location(images), location(references), location(output)
    for given in (source, marked, location(reference_images)):
        check_reachable(given)
    left = journal_path(destination)
    records = {"record": location(record)}
    outputs = {"output": destination, "journal": left, **records}
    inputs = {
        "references": marked,
        IMAGE_FOLDER: source if source.is_dir() else None,
        "folder of the reference images": location(reference_images),
        "checkpoint": location(checkpoint),
        "head": location(head),
        "reference encoder": location(reference_encoder),
        "checkpoint of the image encoder": location(encoder_checkpoint),
    }
    refuse_clashes(outputs, {name: path for name, path in inputs.items() if name != "folder of the reference images"})
    check_journal(left, resume=resume, fresh=fresh)
    replaced = overwrite or (resume and holds_work(left))
    check_label_output(destination, replaced=replaced)
    refuse_existing(records, replaced=replaced)
    shown = read_references(
        marked, images=location(reference_images), follow_links=follow_links, max_pixels=settings.max_pixels
    )
    if destination.suffix != ".json":
        refuse_large_values(shown)
    targets = find_targets(source, follow_links=follow_links)
    refuse_clashes(outputs, {}, images=[*targets.images.values(), *(shot.image for shot in shown.shots)])
    categories = tuple(shown.by_category())
    total = len(targets.images) if limit is None else min(limit, len(targets.images))
    job = LabelJob(
        model,
        checkpoint,
        device,
        precision,
        reference_encoder,
        image_encoder,
        encoder_checkpoint,
        shown,
        settings,
        refine,
        head=head,
    )
    try:
        with (
            open_runner(job, workers=workers, address=ray_address, threads=threads, total=total) as runner,
            Journal(left, job=runner.identity, fresh=fresh) as journal,
        ):
            samples = islice(targets.samples(categories), total)
            with stop_on_interrupt(after="the model has answered") as stop:
                summary = run(samples, runner, journal=journal, total=total, on_progress=on_progress, stop=stop)
            write_labels(
                targets, journal.find, destination, names=shown.names, categories=categories, notes=runner.identity
            )
            if record is not None:
                write_mask_record(targets.samples(categories), journal.find, Path(record))
            complete = total == len(targets.images) and summary.failed == 0
            if complete:
                journal.remove()
    except KeyboardInterrupt:  # while the model was loaded or the output written
        raise Interrupted(f"stopped before {destination} was written; finished images are kept in {left}") from None
    return replace(summary, output=destination, journal=None if complete else left)


def find_targets(source: Path, *, follow_links: bool) -> Targets:
    """List the images of a folder and its sub-folders, or a single image.

    Raises:
        DataError: There are none.
    """
    if source.is_file():
        return Targets(source.parent, {source.stem: source}, None)
    if not source.is_dir():
        raise DataError(f"{source}: there is no such folder; name the folder of the images to label.")
    found = by_stem(source)
    if not found:
        raise DataError(f"{source}: holds no images; name the folder of the images to label.")
    return Targets(source, dict(sorted(found.items())), fence(source, Request(follow_links=follow_links)))


def check_label_output(destination: Path, *, replaced: bool) -> None:
    """Raise UsageError if the output can't be written, or would replace something that is not an earlier output."""
    if not destination.parent.is_dir():
        raise UsageError(f"{destination}: there is no folder {destination.parent}; make it, or name another output")
    as_file = destination.suffix == ".json"
    if not destination.exists() or (not as_file and destination.is_dir() and not any(destination.iterdir())):
        return
    if destination.is_dir() == as_file:
        kinds = ("file", "folder") if as_file else ("folder", "file")
        raise UsageError(
            f"{destination}: the output will be a {kinds[0]}, but this is a {kinds[1]}; name another output"
        )
    if not replaced:
        raise UsageError(f"{destination}: exists already; --overwrite replaces it, --output names another")
    if not as_file:
        foreign = [
            path for path in sorted(destination.rglob("*")) if path.is_file() and not _is_label(path, destination)
        ]
        if foreign:
            raise UsageError(f"{destination}: holds {foreign[0].name}, which is no class map; name another output")


def _is_label(path: Path, folder: Path) -> bool:
    return path.suffix == ".png" or path == folder / NAMES_FILE


def refuse_large_values(references: References) -> None:
    """Raise UsageError if a category can't be the value of a class map."""
    for number in references.names:
        if not 0 < number < VOID:
            raise UsageError(
                f"{references.path}: category {number} can't be a value of a class map, which are 1 to 254; write COCO "
                "instead: -o labels.json"
            )


def write_labels(
    targets: Targets,
    find: Callable[[str], Outcome | None],
    destination: Path,
    *,
    names: Mapping[int, str],
    categories: tuple[int, ...],
    notes: Mapping[str, object],
) -> None:
    """Write what was found; images that could not be read are left out. The output appears when it is complete."""
    labelled = labelled_samples(targets, find, categories)
    if destination.suffix == ".json":
        folder = targets.folder
        write_coco(labelled, destination, images=folder, categories=names, info=notes)
        return
    with replacing_folder(destination) as fresh:
        write_class_maps(labelled, fresh, names=names)


def labelled_samples(
    targets: Targets, find: Callable[[str], Outcome | None], categories: tuple[int, ...]
) -> Iterator[Sample]:
    """Yield the labelled images with the masks that were found, numbered from 1."""
    number = 0
    for sample in targets.samples(categories):
        outcome = find(sample.key)
        if outcome is None or outcome.error is not None:
            continue
        regions = []
        for region, annotation in zip(sample.regions, outcome.annotations, strict=True):
            if annotation.refined and annotation.mask is not None:
                number += 1
                regions.append(Region(number, region.category, annotation.mask, score=annotation.predicted_iou))
        yield replace(sample, regions=tuple(regions))
