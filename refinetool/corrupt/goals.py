"""What a generator is asked for, what it gives back, and the one loop that draws until it fits."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias

import numpy as np

from refinetool.masks import iou
from refinetool.records import FloatArray, Mask
from refinetool.settings import GeneratorName

Rng: TypeAlias = np.random.Generator


@dataclass(frozen=True, slots=True, eq=False)
class Goal:
    """How wrong a coarse mask is to be.

    low, high: The band its IoU with the good mask should lie in, ends included.
    tries: Attempts before the closest one is taken.
    min_area: Pixels below which a result is no coarse mask any more.
    ignore: bool (H, W), pixels that no mask may hold (the void of a map), None if there are none.
    """

    low: float
    high: float
    tries: int
    min_area: int
    ignore: Mask | None

    def allowed(self, mask: Mask) -> Mask:
        """The mask without the pixels that it may not hold."""
        return mask if self.ignore is None else mask & ~self.ignore

    def overlap(self, coarse: Mask, gt: Mask) -> float:
        """IoU of the two, ignored pixels left out."""
        return iou(self.allowed(coarse), gt)

    def miss(self, overlap: float) -> float:
        """How far an IoU is outside the band; 0 inside."""
        return max(self.low - overlap, overlap - self.high, 0.0)

    def narrowed(self, rng: Rng, width: float) -> "Goal":
        """A band of at most that width, drawn within this one."""
        room = self.high - self.low - width
        if room <= 0:
            return self
        low = self.low + rng.uniform(0, room)
        return replace(self, low=low, high=low + width)

    def root(self, steps: int) -> "Goal":
        """The band for each of several steps in a row, since the overlaps of steps about multiply."""
        return replace(self, low=self.low ** (1 / steps), high=self.high ** (1 / steps))


class Attempt(NamedTuple):
    """One draw.

    coarse: bool (H, W).
    defects: What was done to the mask, in order.
    trail: IoU with the good mask after each step of a composition, empty for a single step.
    evidence: float32 (H, W), above 0.5 inside the mask, where the mask was thresholded from something.
    """

    coarse: Mask
    defects: tuple[str, ...]
    trail: tuple[float, ...] = ()
    evidence: FloatArray | None = None


@dataclass(frozen=True, slots=True, eq=False)
class CorruptionInfo:
    """How a coarse mask came about.

    generator: Name of what made it, one of `suites.KINDS`.
    low, high: The band that was asked for.
    iou: IoU with the good mask.
    tries: Attempts it took.
    reached: Whether the IoU lies in the band, and the mask is no smaller than allowed.
    defects, trail, evidence: Those of the attempt that was taken.
    """

    generator: GeneratorName
    low: float
    high: float
    iou: float
    tries: int
    reached: bool
    defects: tuple[str, ...]
    trail: tuple[float, ...]
    evidence: FloatArray | None


class Corrupted(NamedTuple):
    """A coarse mask, bool (H, W), and how it came about."""

    coarse: Mask
    info: CorruptionInfo


def reach(generator: GeneratorName, attempts: Iterable[Attempt], gt: Mask, *, goal: Goal) -> Corrupted:
    """Draw attempts until one lies in the band, else take the closest.

    Attempts below the least area don't count; where all are, the good mask itself comes back. A good mask without
    pixels gives a coarse one without pixels, and draws nothing. In neither case the band counts as reached.
    """
    best, closest, tries = Attempt(gt.copy(), ()), np.inf, 0
    if gt.any():
        for tries, attempt in zip(range(1, goal.tries + 1), attempts, strict=False):  # noqa: B007 - used below
            coarse = goal.allowed(attempt.coarse)
            if coarse.sum() < goal.min_area:
                continue
            miss = goal.miss(iou(coarse, gt))
            if miss < closest:
                best, closest = attempt._replace(coarse=coarse), miss
            if miss == 0:
                break
    info = CorruptionInfo(
        generator=generator,
        low=goal.low,
        high=goal.high,
        iou=iou(best.coarse, gt),
        tries=tries,
        reached=closest == 0,
        defects=best.defects,
        trail=best.trail,
        evidence=best.evidence,
    )
    return Corrupted(best.coarse, info)
