"""Several defects on one mask: the random mix that training draws from, and compositions of generators."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeAlias

import numpy as np

from refinetool.corrupt.activations import low_resolution
from refinetool.corrupt.edges import boundary_noise, grow_or_shrink
from refinetool.corrupt.geometry import Defect, zoom_on
from refinetool.corrupt.goals import Attempt, Corrupted, Goal, Rng, reach
from refinetool.corrupt.shapes import coarse_polygon, holes_and_islands, leak, shift_and_scale
from refinetool.corrupt.superpixels import superpixel_defects, superpixel_labels, superpixel_vote
from refinetool.records import BoolArray, ImageArray, IntArray

MIN_AREA_PX = 10
"""A result smaller than this is no coarse mask any more and is drawn again."""

MIX: tuple[tuple[float, Defect], ...] = (
    (0.18, boundary_noise),
    (0.08, grow_or_shrink),
    (0.18, low_resolution),
    (0.08, coarse_polygon),
    (0.05, shift_and_scale),
    (0.05, holes_and_islands),
)
"""Shares of the defects that need nothing but the mask."""
SUPERPIXEL_SHARE, VOTE_SHARE, LEAK_SHARE = 0.34, 0.08, 0.06
"""Shares of those that need superpixels, or a neighbour."""
SECOND_SHARE, SECOND_SEVERITY = 0.3, 0.6
"""How often a second defect follows, and how much weaker it is."""
SEVERITIES = (0.4, 1.7)
SUPERPIXEL_COUNTS = (20, 250)

Generator: TypeAlias = Callable[[BoolArray, Rng, Goal], Corrupted]
"""A generator of which all but mask, randomness and goal are settled."""


def corrupt(
    mask: BoolArray,
    rng: Rng,
    *,
    labels: IntArray | None,
    neighbour: BoolArray | None,
    low: float,
    high: float,
    tries: int,
) -> BoolArray:
    """One coarse mask from one or two random defects, its IoU with the good mask in [low, high] where possible.

    Args:
        mask: The good mask, bool (H, W), not empty.
        labels: Superpixels of the image, int64 (H, W), for the superpixel defects; None leaves those out.
        neighbour: Another region, bool (H, W), to leak into; None leaves leaks out.
        tries: Draws before the closest attempt is returned.
    """
    goal = Goal(low, high, tries, MIN_AREA_PX, None)
    return reach("mix", mixed(mask, rng, labels=labels, neighbour=neighbour), mask, goal=goal).coarse


def mixed(mask: BoolArray, rng: Rng, *, labels: IntArray | None, neighbour: BoolArray | None) -> Iterator[Attempt]:
    """Draw one or two defects at a random severity, again and again; see `corrupt`."""
    kinds = list(MIX)
    if labels is not None:
        kinds += [(SUPERPIXEL_SHARE, partial(superpixel_defects, labels=labels))]
        kinds += [(VOTE_SHARE, partial(superpixel_vote, labels=labels))]
    if neighbour is not None:
        kinds += [(LEAK_SHARE, partial(leak, neighbour=neighbour))]
    weights = np.array([weight for weight, _ in kinds])
    weights /= weights.sum()
    while True:
        severity = rng.uniform(*SEVERITIES)
        first = kinds[rng.choice(len(kinds), p=weights)][1]
        coarse = first(mask, rng, severity)
        defects: tuple[str, ...] = (_name(first),)
        if rng.random() < SECOND_SHARE and coarse.sum() >= MIN_AREA_PX:
            second = kinds[rng.choice(len(kinds), p=weights)][1]
            coarse, defects = second(coarse, rng, SECOND_SEVERITY * severity), (*defects, _name(second))
        yield Attempt(coarse, defects)


def training_mix(
    image: ImageArray | None,
    gt: BoolArray,
    rng: Rng,
    *,
    goal: Goal,
    neighbours: Sequence[BoolArray],
    compactness: float,
    margin: float,
    min_side_px: int,
) -> Corrupted:
    """The mix of `corrupt` for an object of a whole image, drawn in a window around it as training does.

    Args:
        image: uint8 (H, W, 3) RGB; without one there are no superpixel defects.
        gt: bool (H, W).
        neighbours: Masks of other objects, bool (H, W), one of which the mask may leak into.
        compactness: Of the superpixels, which are made for the window.
        margin, min_side_px: Of the window, see `geometry.zoom_on`.
    """

    def attempts() -> Iterator[Attempt]:
        zoom = zoom_on(gt, margin=margin, min_side_px=min_side_px)
        labels = None
        if image is not None:
            count = int(np.exp(rng.uniform(*np.log(SUPERPIXEL_COUNTS))))
            labels = superpixel_labels(zoom.enter_image(image), count=count, compactness=compactness)
        inside = zoom.enter(gt)
        other = None
        if len(neighbours):
            seen = zoom.enter(neighbours[int(rng.integers(len(neighbours)))]) & ~inside
            other = seen if seen.any() else None
        for attempt in mixed(inside, rng, labels=labels, neighbour=other):
            yield attempt._replace(coarse=zoom.leave(attempt.coarse, gt.shape))

    return reach("mix", attempts(), gt, goal=goal)


def compose(
    image: ImageArray | None,
    gt: BoolArray,
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
            defects: tuple[str, ...] = ()
            trail: tuple[float, ...] = ()
            for _ in range(steps):
                step = generators[int(rng.integers(len(generators)))](coarse, rng, goal.root(steps))
                coarse = step.coarse
                defects += step.info.defects
                trail += (goal.overlap(coarse, gt),)
            yield Attempt(coarse, defects, trail)

    return reach("compose", attempts(), gt, goal=goal)


def _name(defect: Defect) -> str:
    """What a record calls a defect: the name of its function."""
    named = defect.func if isinstance(defect, partial) else defect
    return str(named.__name__).replace("_", "-")
