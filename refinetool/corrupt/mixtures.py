"""Several defects on one mask: the random mixes that training draws from, and compositions of generators."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import TypeAlias

import numpy as np

from refinetool.corrupt import defects
from refinetool.corrupt.activations import biased_activation, low_resolution
from refinetool.corrupt.defects import DefectName
from refinetool.corrupt.edges import boundary_noise, grow_or_shrink
from refinetool.corrupt.geometry import Defect, zoom_on
from refinetool.corrupt.goals import Attempt, Corrupted, Goal, Rng, reach
from refinetool.corrupt.shapes import coarse_polygon, holes_and_islands, leak, shift_and_scale
from refinetool.corrupt.superpixels import superpixel_defects, superpixel_labels, superpixel_vote
from refinetool.records import ImageArray, IntArray, Mask

Generator: TypeAlias = Callable[[Mask, Rng, Goal], Corrupted]
"""A generator of which all but mask, randomness and goal are settled."""


def training_mix(
    image: ImageArray | None,
    gt: Mask,
    rng: Rng,
    *,
    goal: Goal,
    blobs: bool,
    neighbours: Sequence[Mask],
    compactness: float,
    min_side_px: int,
) -> Corrupted:
    """One or two random defects in a window around the object, as the embedded model is trained on.

    Args:
        image: uint8 (H, W, 3) RGB, which blobs do without.
        gt: bool (H, W).
        blobs: Whether to draw defects of low resolution only.
        neighbours: Masks of other objects, bool (H, W), one of which the mask may leak into.
        compactness: Of the superpixels, which are made for the window.
        min_side_px: Of the window, see `geometry.zoom_on`.
    """

    def attempts() -> Iterator[Attempt]:
        zoom = zoom_on(gt, margin=rng.uniform(*defects.WINDOW_MARGIN), min_side_px=min_side_px)
        inside = zoom.enter(gt)
        low, high = (math.log(count) for count in defects.SUPERPIXEL_COUNTS)
        count = int(np.exp(rng.uniform(low, high)))

        @cache
        def labels() -> IntArray:
            assert image is not None, "superpixels need an image"
            return superpixel_labels(zoom.enter_image(image), count=count, compactness=compactness)

        other = np.zeros_like(inside)
        if len(neighbours):
            other = zoom.enter(neighbours[int(rng.integers(len(neighbours)))]) & ~inside
        for attempt in mixed(inside, rng, blobs=blobs, low=goal.low, labels=labels, neighbour=other):
            yield attempt._replace(coarse=zoom.leave(attempt.coarse, gt.shape))

    return reach("blobs" if blobs else "mix", attempts(), gt, goal=goal)


def mixed(
    mask: Mask, rng: Rng, *, blobs: bool, low: float, labels: Callable[[], IntArray], neighbour: Mask
) -> Iterator[Attempt]:
    """Apply one or two defects of the table, drawn anew for each attempt.

    Args:
        mask: The good mask, bool (H, W), not empty.
        blobs: Whether to draw defects of low resolution only.
        low: Least IoU aimed at: masks that are to be nearly right get milder defects.
        labels: Gives superpixels of the image, int64 (H, W).
        neighbour: What the mask may leak into, bool (H, W), empty where there is nothing.
    """
    kinds = tuple(zip(defects.DEFECTS, defects.in_order(defects_beside(labels, neighbour)), strict=True))
    fractions = defects.fractions(blobs=blobs)
    factor = defects.BLOB_SEVERITY if blobs else 1.0
    if low >= defects.NEARLY_RIGHT:
        factor = defects.NEARLY_RIGHT_SEVERITY
    while True:
        severity = rng.uniform(*defects.SEVERITY) * factor
        name, defect = kinds[rng.choice(len(kinds), p=fractions)]
        coarse, names = defect(mask, rng, severity), [name]
        if rng.random() < defects.SECOND_CHANCE and coarse.sum() >= defects.MIN_AREA_PX:
            name, defect = kinds[rng.choice(len(kinds), p=fractions)]
            coarse, names = defect(coarse, rng, defects.SECOND_SEVERITY * severity), [*names, name]
        yield Attempt(coarse, tuple(names))


def defects_beside(labels: Callable[[], IntArray], neighbour: Mask) -> dict[DefectName, Defect]:
    """Every defect by name, for an object with these surroundings; see `mixed`."""
    return {
        "boundary-noise": boundary_noise,
        "grow-or-shrink": grow_or_shrink,
        "low-resolution": low_resolution,
        "biased-activation": biased_activation,
        "coarse-polygon": coarse_polygon,
        "shift-and-scale": shift_and_scale,
        "holes-and-islands": holes_and_islands,
        "leak": partial(leak, neighbour=neighbour),
        "superpixel-defects": lambda mask, rng, severity: superpixel_defects(mask, rng, severity, labels=labels()),
        "superpixel-vote": lambda mask, rng, severity: superpixel_vote(mask, rng, severity, labels=labels()),
    }


def compose(
    image: ImageArray | None,
    gt: Mask,
    rng: Rng,
    *,
    goal: Goal,
    generators: Sequence[Generator],
    more: float,
) -> Corrupted:
    """Apply one to three random generators in a row; the trail holds the IoU with the good mask after each.

    Each of n steps aims at the nth root of the band, as overlaps of steps about multiply.

    Args:
        image: Not looked at; the generators hold it where they need it.
        gt: bool (H, W).
        generators: What to draw from, each time anew.
        more: Probability of a second, and then of a third step.
    """
    del image

    def attempts() -> Iterator[Attempt]:
        while True:
            steps = 1 + (rng.random() < more)
            steps += steps == 2 and rng.random() < more
            coarse = gt
            names: tuple[str, ...] = ()
            trail: tuple[float, ...] = ()
            for _ in range(steps):
                step = generators[int(rng.integers(len(generators)))](coarse, rng, goal.root(steps))
                coarse = step.coarse
                names += step.info.defects
                trail += (goal.overlap(coarse, gt),)
            yield Attempt(coarse, names, trail)

    return reach("compose", attempts(), gt, goal=goal)
