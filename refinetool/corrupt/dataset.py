"""Coarse masks for a whole file or folder: the same one back, with every good mask replaced by a coarse one.

    read → corrupt, object by object → share out the pixels of a map → write

The randomness of an object follows from the seed, its image's key and its own id, so its coarse mask does not depend
on what else is in the file, on the order, or on the number of threads.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import numpy as np

from refinetool import masks
from refinetool.corrupt.figures import BandFigures, Made, describe, figures, write_record
from refinetool.corrupt.geometry import radius, signed_depth
from refinetool.corrupt.goals import Corrupted
from refinetool.corrupt.sheet import sheet, tile, write_picture
from refinetool.corrupt.suites import SUITES, Scene, Suite, draw, scene_of, single
from refinetool.errors import ImageError, Interrupted
from refinetool.formats import open_dataset
from refinetool.formats.storage import IMAGE_FOLDER, refuse_clashes, refuse_existing
from refinetool.images import read_sample
from refinetool.locations import location
from refinetool.records import Annotation, FloatArray, ImageArray, Mask, Outcome, Region, Rle, Sample, seed_of
from refinetool.running.ahead import map_ahead
from refinetool.running.outputs import check_beside, check_output, folder_beside, folder_of, write
from refinetool.running.summary import Progress, Tally
from refinetool.running.threads import stay_coarse
from refinetool.settings import CorruptSettings, EvaluateSettings
from refinetool.statuses import Reason

CORRUPT = CorruptSettings()
BOUNDARY_RATIO = EvaluateSettings().boundary_ratio
NEIGHBOURS = 3
"""Other objects that an object may be merged with: the nearest of its category, else the nearest."""


@dataclass(frozen=True, slots=True)
class CorruptSummary:
    """What `corrupt_dataset` did."""

    suite: str
    images: int
    masks: int
    corrupted: int
    reached: int
    """Coarse masks whose IoU lies in the band that was asked for; the others are the closest that was drawn."""
    kept: Mapping[Reason, int]
    """Masks that stay as they are, by reason."""
    failed: int
    """Images kept as they are because of an error."""
    errors: tuple[str, ...]
    """Sentences about the first of them."""
    faulty: int
    """Masks that stay as they are because something is wrong with them in the file."""
    faults: tuple[str, ...]
    """What is wrong with the first of these masks."""
    bands: tuple[BandFigures, ...]
    seconds: float
    output: Path
    notes: tuple[str, ...]
    """What the user should know about the output."""


def corrupt_dataset(
    truth: Path | str,
    *,
    output: Path | str,
    suite: Suite = SUITES[CORRUPT.suite],
    images: Path | str | None = None,
    format: str | None = None,
    sizes: Path | str | None = None,
    follow_links: bool = False,
    mask_suffix: str = "",
    limit: int | None = None,
    overwrite: bool = False,
    record: Path | str | None = None,
    picture: Path | str | None = None,
    workers: int = CORRUPT.workers,
    settings: CorruptSettings = CORRUPT,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> CorruptSummary:
    """Write a file or folder of coarse masks made from good ones.

    Crowds, masks that can't be decoded and masks too small to be made worse stay as they are, as do the masks of images
    that can't be read where a generator needs pixels. In maps each value is corrupted on its own; a pixel that several
    claim goes to the one whose evidence is strongest, and void stays void.

    Args:
        truth: The file or folder of good masks.
        output: What to write; it appears when it is complete.
        suite: Which generators, how often, and to what IoU; see `suites.SUITES` and `suites.single`.
        images: The folder of their images; None looks beside the masks.
        format: A name of `formats.FORMATS`, None to detect it.
        sizes: A COCO file that lists the images, for a file of results, which does not.
        follow_links: Whether links in the folders of images and masks may lead out of these folders.
        mask_suffix: As for `running.run.refine_dataset`.
        limit: How many images, from the first, to corrupt; the rest comes back as it is.
        overwrite: Replace the output if it exists.
        record: A file to write with one entry per coarse mask, CSV or JSON by its suffix.
        picture: A PNG to write, a contact sheet of some coarse masks.
        workers: Threads that make masks.
        settings: The seed, and the parameters of the generators.
        on_progress: Called after each image; `refined` counts coarse masks that were made.

    Raises:
        UsageError: An output in the way.
        DataError: The masks can't be read.
        StorageError: An output can't be written.
        Interrupted: Stopped by the user; nothing is written.
    """
    source, destination = location(truth), Path(output)
    records = {"record": location(record), "picture": location(picture)}
    outputs = {"output": destination, **records}
    inputs = {"input": source, IMAGE_FOLDER: location(images), "list of images": location(sizes)}
    refuse_clashes(outputs, inputs)
    check_output(source, destination, replaced=overwrite, resume=False)
    refuse_existing(records, replaced=overwrite)
    needs_images = suite.needs_image or picture is not None
    dataset = open_dataset(
        source,
        images=location(images),
        format=format,
        sizes=location(sizes),
        need_images=needs_images,
        follow_links=follow_links,
        max_pixels=settings.max_pixels,
        mask_suffix=mask_suffix,
    )
    outputs |= folder_beside(dataset, destination)
    refuse_clashes(outputs, inputs | folder_of(dataset, "input"), images=dataset.image_paths())
    check_beside(dataset, source, destination, replaced=overwrite, resume=False)
    total = len(dataset) if limit is None else min(limit, len(dataset))
    tally = Tally(total)
    book = _Book(tally, settings.pictures, on_progress)
    samples = islice(dataset.samples(), total)
    made = map_ahead(
        lambda sample: corrupt_sample(sample, suite=suite, settings=settings), samples, threads=workers, name="corrupt"
    )
    try:
        with closing(made) as results:
            outcomes = map(book.enter, results)
            written = write(dataset, _Lookup(outcomes).find, destination, _notes(suite, settings))
        if record is not None:
            write_record(book.made, Path(record))
        if picture is not None:
            write_picture(_contact_sheet(book.shown, max_pixels=settings.max_pixels), Path(picture))
    except KeyboardInterrupt:
        raise Interrupted(f"stopped before {destination} was complete; run the command again") from None
    return CorruptSummary(
        suite=suite.name,
        images=total,
        masks=tally.masks,
        corrupted=len(book.made),
        reached=sum(each.reached for each in book.made),
        kept=book.kept,
        failed=tally.failed,
        errors=tuple(tally.errors),
        faulty=tally.faulty,
        faults=tuple(tally.faults),
        bands=tuple(figures(book.made)),
        seconds=tally.summary().seconds,
        output=destination,
        notes=(*dataset.remarks(), *written.notes),
    )


# --- one image


@dataclass(frozen=True, slots=True)
class Example:
    """One object for the contact sheet."""

    order: int
    sample: Sample
    gt: Rle
    coarse: Rle
    made: Made


@dataclass(frozen=True, slots=True)
class CorruptedSample:
    """One image: what becomes of its annotations, and what was done to those that were corrupted."""

    sample: Sample
    outcome: Outcome
    examples: tuple[Example, ...]


def corrupt_sample(sample: Sample, *, suite: Suite, settings: CorruptSettings) -> CorruptedSample:
    """Corrupt the regions of an image, each with randomness of its own."""
    sample = replace(sample, regions=tuple(_too_small(region, settings.min_area_px) for region in sample.regions))
    todo = [n for n, region in enumerate(sample.regions) if region.keep is None]
    if not todo:
        return CorruptedSample(sample, stay_coarse(sample, reason=Reason.EMPTY, error=None), ())
    image = None
    if suite.needs_image:
        try:
            image = read_sample(sample, max_pixels=settings.max_pixels)
        except ImageError as error:
            return CorruptedSample(sample, stay_coarse(sample, reason=error.reason, error=str(error)), ())

    void = _untouchable(sample)
    shared = scene_of(image, lambda: (), settings=settings)
    objects = [
        Subject(
            masks.decode(_mask(sample.regions[n])),
            replace(shared, neighbours=cache(lambda n=n: _neighbours(sample, n))),
            object_rng(settings.seed, sample.key, sample.regions[n].id),
        )
        for n in todo
    ]
    drawn = [each.draw(suite, ignore=void, settings=settings) for each in objects]
    if sample.layout != "instances":
        drawn = fit_together(objects, drawn, void=void, settings=settings)

    annotations = [Annotation(region.mask, region.keep or Reason.UNCHANGED) for region in sample.regions]
    examples = []
    for n, each, (coarse, info) in zip(todo, objects, drawn, strict=True):
        region = sample.regions[n]
        made = describe(sample, region, each.gt, coarse, info, boundary_ratio=BOUNDARY_RATIO)
        rle = masks.encode(coarse)
        order = seed_of(f"{settings.seed}/{sample.key}/{region.id}")
        examples.append(Example(order, sample, _mask(region), rle, made))
        if sample.layout != "instances" or rle != region.mask:  # an annotation with the same mask keeps its text
            annotations[n] = Annotation(rle, None)
    return CorruptedSample(sample, Outcome(sample.key, tuple(annotations), faults=sample.faults), tuple(examples))


def _too_small(region: Region, min_area_px: int) -> Region:
    """The region, to be kept where it has fewer pixels than a coarse mask may have."""
    if region.keep is None and masks.area(_mask(region)) < min_area_px:
        return replace(region, keep=Reason.TOO_SMALL)
    return region


def _untouchable(sample: Sample) -> Mask | None:
    """Pixels of a map that no coarse mask may hold, bool (H, W): void, and the regions that are kept."""
    if sample.layout == "instances":
        return None
    fixed = [region.mask for region in sample.regions if region.keep is not None and region.mask is not None]
    fixed += [] if sample.void is None else [sample.void]
    return masks.decode(masks.union(fixed)) if fixed else None


@dataclass(frozen=True, slots=True, eq=False)
class Subject:
    """One object to corrupt: its good mask, bool (H, W), what surrounds it, and its own randomness."""

    gt: Mask
    scene: Scene
    rng: np.random.Generator

    def draw(self, suite: Suite, *, ignore: Mask | None, settings: CorruptSettings) -> Corrupted:
        """A coarse mask without pixels of `ignore`."""
        return draw(suite, self.scene, self.gt, self.rng, ignore=ignore, settings=settings)


def object_rng(seed: int, key: str, number: int) -> np.random.Generator:
    """The randomness of one object, from the seed, the key of its image and its id alone."""
    return np.random.default_rng((seed, seed_of(key), number % (1 << 64)))


def fit_together(
    objects: Sequence[Subject], drawn: Sequence[Corrupted], *, void: Mask | None, settings: CorruptSettings
) -> list[Corrupted]:
    """Coarse masks that share a map, no two of them on a pixel.

    Pixels that several claim are shared out by `share_out`. Where that takes a mask out of its band, it is drawn once
    more, from the same generator, in the room that the others leave; if that does not help it stays.
    """
    coarse = share_out([each.gt for each in objects], drawn)
    fitted = list(drawn)
    for n, (each, before) in enumerate(zip(objects, drawn, strict=True)):
        info = before.info
        if info.low <= masks.iou(coarse[n], each.gt) <= info.high:
            continue
        taken = [mask for other, mask in enumerate(coarse) if other != n] + ([] if void is None else [void])
        same = single(info.generator).with_band(info.low, info.high)
        again = each.draw(same, ignore=np.any(taken, axis=0) if taken else None, settings=settings)
        if again.info.reached:
            coarse[n], fitted[n] = again.coarse, again
    return [Corrupted(mask, each.info) for mask, each in zip(coarse, fitted, strict=True)]


def share_out(gts: Sequence[Mask], drawn: Sequence[Corrupted]) -> list[Mask]:
    """Give each pixel of a map to one of the coarse masks that claim it.

    It goes to the one with the strongest evidence, or to the background, whose evidence is 1 minus the strongest. That
    is the activation, scaled so that the threshold lies at 0.5, where the mask was thresholded from one; else how deep
    the pixel lies in the mask, in radii. A mask that would vanish is replaced by the good one.

    Returns:
        bool (H, W) each, within the coarse masks or equal to the good one.
    """
    evidence = np.stack([_evidence(each) for each in drawn])
    strongest = evidence.max(axis=0)
    winner = evidence.argmax(axis=0)
    winner[1 - strongest > strongest] = -1
    for _ in gts:  # a good mask that is put back may cover all that was left of another one
        for n, gt in enumerate(gts):
            if not (winner == n).any():
                winner[gt] = n
    return [winner == n for n in range(len(gts))]


def _evidence(drawn: Corrupted) -> FloatArray:
    """float32 (H, W), 0.5 or more in the coarse mask and below it elsewhere."""
    if drawn.info.evidence is not None:
        return np.where(drawn.coarse, np.maximum(drawn.info.evidence, 0.5), 0).astype(np.float32)
    depth = np.tanh(signed_depth(drawn.coarse) / radius(drawn.coarse))
    return np.where(drawn.coarse, 0.5 + 0.5 * np.maximum(depth, 0), 0).astype(np.float32)


def _neighbours(sample: Sample, number: int) -> list[Mask]:
    """The nearest other objects of the same category; of any, where there is none of the same."""
    own = sample.regions[number]
    others = [region for n, region in enumerate(sample.regions) if n != number and region.keep is None]
    alike = [region for region in others if region.category == own.category]
    box = _box(own)
    found = sorted(alike or others, key=lambda region: _gap(box, _box(region)))[:NEIGHBOURS]
    return [masks.decode(_mask(region)) for region in found]


def _mask(region: Region) -> Rle:
    assert region.mask is not None, "a region without a mask has a reason to be kept"
    return region.mask


def _box(region: Region) -> tuple[int, int, int, int]:
    found = masks.decode_crop(_mask(region))
    assert found is not None, "a region without pixels has a reason to be kept"
    return found[1]


def _gap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> int:
    """Pixels between two boxes, the longer of both axes; 0 or less where they meet."""
    return max(b[0] - a[2], a[0] - b[2], b[1] - a[3], a[1] - b[3])


# --- many images


class _Lookup:
    """Outcomes by key from a stream of them; what comes before it is asked for is held."""

    def __init__(self, outcomes: Iterator[Outcome]) -> None:
        self._outcomes = outcomes
        self._held: dict[str, Outcome] = {}

    def find(self, key: str) -> Outcome | None:
        """The outcome of a sample, None where there is none."""
        while key not in self._held:
            outcome = next(self._outcomes, None)
            if outcome is None:
                return None
            self._held[outcome.key] = outcome
        return self._held.pop(key)


@dataclass(slots=True)
class _Book:
    """Counts what was done, and keeps the examples that come first in the random order of the sheet."""

    tally: Tally
    pictures: int
    on_progress: Callable[[Progress], None]
    made: list[Made] = field(default_factory=list)
    shown: list[Example] = field(default_factory=list)

    def enter(self, result: CorruptedSample) -> Outcome:
        """Count one image; returns its outcome."""
        self.tally.count(result.outcome)
        self.tally.ran[0] += 1
        self.made += [example.made for example in result.examples]
        nearest = sorted([*self.shown, *result.examples], key=lambda example: example.order)
        self.shown = nearest[: self.pictures]
        self.on_progress(self.tally.progress())
        return result.outcome

    @property
    def kept(self) -> dict[Reason, int]:
        """Masks that were not corrupted, by reason. One whose new mask is the old one was."""
        kept = sorted(self.tally.kept.items())
        return {reason: count for reason, count in kept if reason is not Reason.UNCHANGED}


def _contact_sheet(examples: Sequence[Example], *, max_pixels: int) -> ImageArray:
    tiles = []
    for example in examples:
        sample, made = example.sample, example.made
        try:
            image = read_sample(sample, max_pixels=max_pixels)
        except ImageError:
            image = np.full((*sample.size, 3), 128, dtype=np.uint8)
        text = f"{made.iou:.2f}{'' if made.reached else ', missed'}\n{made.generator}"
        tiles.append(tile(image, masks.decode(example.gt), masks.decode(example.coarse), text))
    return sheet(tiles)


def _notes(suite: Suite, settings: CorruptSettings) -> dict[str, object]:
    """What a COCO file says about how it was made; nothing that does not change a mask."""
    values = {name: value for name, value in asdict(settings).items() if name not in ("suite", "workers", "pictures")}
    return {"command": "corrupt", "version": version("refinetool"), "suite": asdict(suite), "settings": values}
