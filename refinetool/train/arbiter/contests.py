"""Gathers contests to learn from: all objects of an image get coarse masks, and the model refines them.

An object that has its place to itself is one of them: nothing is denied to it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from refinetool import masks
from refinetool.competition import contest_of, denials, on_grid
from refinetool.corrupt.suites import SUITES, Suite, draw, scene_of, single
from refinetool.errors import DataError
from refinetool.records import Contest, ImageArray, Mask, Region, Sample, seed_of
from refinetool.refine import Refiner
from refinetool.settings import ArbiterTrainSettings, CorruptSettings, OverlapSettings
from refinetool.train.arbiter.overlaps import overlapping
from refinetool.train.data.pictures import AnnotatedPicture, SourcePicture

MIX: tuple[tuple[Suite, float], ...] = (
    (single("blobs").with_band(0.45, 0.85), 0.34),
    (SUITES["weak"], 0.2),
    (SUITES["davis-like"], 0.15),
    (single("heat-map"), 0.06),
    (SUITES["boundary"], 0.07),
    (single("boundary").with_band(0.95, 0.99), 0.18),
)
"""Suites of coarse masks, one of which is drawn for each image, and how often."""
MOST_ROUNDS = 20
"""An image is used at most so many times, each time with other coarse masks."""
LEAST_OF_ITS_OWN = 0.1
"""The fraction of an object's pixels that must not be in smaller ones."""


@dataclass(frozen=True, slots=True)
class Contests:
    """Contests of n objects with what is true, on the grid (h, w) of the logits; see `records.Contest`.

    logits, denied: float16 (n, h, w).
    coarse, others, truth: uint8 (n, h, w), 255 times the fraction of each cell.
    known: bool (n, h, w), where most of a cell is not void.
    pixels: uint8 (n, h, w, 3).
    exclusive: bool (n,).
    """

    logits: Tensor
    denied: Tensor
    coarse: Tensor
    others: Tensor
    pixels: Tensor
    exclusive: Tensor
    truth: Tensor
    known: Tensor

    def __len__(self) -> int:
        return len(self.logits)

    def rows(self, rows: Tensor) -> "Contests":
        """Return some of them."""
        return Contests(*(getattr(self, each.name)[rows] for each in fields(self)))

    def mirrored(self) -> "Contests":
        """Return them with left and right exchanged."""
        every: list[Tensor] = [getattr(self, each.name) for each in fields(self)]
        return Contests(*(values.flip(2) if values.dim() > 1 else values for values in every))


class Case(NamedTuple):
    """A contest with what is true of it, in its view.

    truth: bool (H, W), the object.
    void: bool (H, W), pixels of which nothing is known.
    """

    contest: Contest
    truth: Mask
    void: Mask


def gather_contests(
    pictures: Sequence[SourcePicture],
    refiner: Refiner,
    *,
    count: int,
    settings: ArbiterTrainSettings,
    on_progress: Callable[[int, int], None],
) -> Contests:
    """Refine corrupted objects until there are `count` contests, or every image was used `MOST_ROUNDS` times.

    What is drawn for an image depends on nothing but the seed, its key, and how often it was used before.

    Args:
        on_progress: Called with (contests found, `count`).

    Raises:
        DataError: No image holds an object that is large enough.
        ImageError: An image can't be read.
    """
    found: list[Case] = []
    for turn in range(MOST_ROUNDS):
        before = len(found)
        for picture in shuffled(pictures, (settings.seed, turn)):
            rng = np.random.default_rng((settings.seed, seed_of(picture.key), turn))
            found += contests_in(picture.key, picture.read(), refiner, rng, settings=settings)
            on_progress(min(len(found), count), count)
            if len(found) >= count:
                return stacked(found[:count])
        if len(found) == before:
            break
    if not found:
        raise DataError(
            f"no image holds an object of at least {settings.min_object_px} px; expected true masks of such objects."
        )
    return stacked(found)


def shuffled(pictures: Sequence[SourcePicture], seed: tuple[int, ...]) -> list[SourcePicture]:
    """Return images in an order that depends on a seed."""
    return [pictures[n] for n in np.random.default_rng(seed).permutation(len(pictures))]


def contests_in(
    key: str,
    picture: AnnotatedPicture,
    refiner: Refiner,
    rng: np.random.Generator,
    *,
    settings: ArbiterTrainSettings,
) -> Iterator[Case]:
    """Give the objects of an image coarse masks and refine them; yield the contest of each.

    Objects that overlap in the source are taken as they are; others are often made to overlap.
    """
    own = distinct(picture.objects)
    crossing = share_pixels(own)
    flat, told = rng.random() < settings.flat_share, rng.random() < settings.told_share
    objects = annotated(own, rng, made=not (crossing or flat), settings=settings)
    if not objects:
        return
    suite = MIX[rng.choice(len(MIX), p=[share for _, share in MIX])][0]
    coarse = corrupted(picture.image, objects, suite, rng)
    regions = tuple(Region(n, None, masks.encode(mask)) for n, mask in enumerate(coarse))
    size = (picture.image.shape[0], picture.image.shape[1])
    prepared = refiner.prepare_pixels(Sample(key, Path(), size, regions), picture.image)
    jobs, answers = prepared.jobs, refiner.segment(prepared.jobs)
    every_part = [part for job in jobs for part in job.parts]
    for number, row, denied in denials(jobs, answers, max_shared=refiner.settings.competition.max_shared):
        job, logits = jobs[number], answers[number].logits
        assert logits is not None
        contest = contest_of(job, row, logits[row], denied, every_part, exclusive=flat and told and not crossing)
        truth, void = job.view.crop_masks(np.stack((objects[job.parts[row].region], picture.void)))
        yield Case(contest, truth, void)


def distinct(objects: Sequence[Mask]) -> list[Mask]:
    """Return objects without wholes that are nothing but their parts, such as a class beside its components.

    From the smallest on, an object needs `LEAST_OF_ITS_OWN` of its pixels to be in none of the smaller ones.
    """
    chosen: list[Mask] = []
    covered: Mask | None = None
    for mask in sorted(objects, key=np.count_nonzero):
        if covered is None or np.count_nonzero(mask & ~covered) >= LEAST_OF_ITS_OWN * np.count_nonzero(mask):
            chosen.append(mask)
            covered = mask if covered is None else covered | mask
    return chosen


def share_pixels(objects: Sequence[Mask]) -> bool:
    """Whether any pixel belongs to two objects."""
    return bool(np.count_nonzero(np.logical_or.reduce(objects)) < sum(map(np.count_nonzero, objects)))


def annotated(
    objects: Sequence[Mask], rng: np.random.Generator, *, made: bool, settings: ArbiterTrainSettings
) -> list[Mask]:
    """Return what of an image a file might hold: with made overlaps or as it is, and sometimes without all objects."""
    shown = overlapping(objects, rng, settings=OverlapSettings()) if made else list(objects)
    if rng.random() < settings.sparse_share:
        count = max(2, round(len(shown) * rng.uniform(settings.least_kept, 1)))
        shown = [shown[n] for n in sorted(rng.permutation(len(shown))[:count])]
    return shown


def corrupted(image: ImageArray, objects: Sequence[Mask], suite: Suite, rng: np.random.Generator) -> list[Mask]:
    """Return a coarse mask for each object, bool (H, W)."""
    how = CorruptSettings()
    scene = scene_of(image if suite.needs_image else None, lambda: (), settings=how)
    return [draw(suite, scene, mask, rng, ignore=None, settings=how).coarse for mask in objects]


def stacked(found: Sequence[Case]) -> Contests:
    """Stack contests of one grid, and put on it what is true of them."""
    grid = found[0].contest.logits.shape

    def of(name: str) -> Tensor:
        return torch.from_numpy(np.stack([getattr(case.contest, name) for case in found]))

    def fractions(masks: Iterable[Mask]) -> Tensor:
        return torch.from_numpy(np.stack([on_grid(mask.astype(np.float32), grid) for mask in masks]))

    return Contests(
        of("logits").half(),
        of("denied").half(),
        as_bytes(of("coarse")),
        as_bytes(of("others")),
        of("pixels"),
        of("exclusive"),
        as_bytes(fractions(case.truth for case in found)),
        fractions(case.void for case in found) < 0.5,
    )


def as_bytes(fractions: Tensor) -> Tensor:
    """Return fractions in 0..1 as uint8."""
    return (fractions * 255).round().byte()
