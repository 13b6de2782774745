"""How the gain of IoU depends on the size of an object and on the quality of its coarse mask."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np
from numpy.typing import NDArray

NOTABLE_CHANGE = 0.01
"""A change of an object's IoU by more than this counts as better or worse."""

SIDES_PX = (0.0, 16.0, 32.0, 64.0, 96.0, 192.0, math.inf)
"""Edges of the bins of size, which is the side of a square with the true object's area. COCO's small objects end at 32,
its large ones begin at 96."""

IOUS = (0.0, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
"""Edges of the bins of the coarse mask's IoU; the last bin includes 1.0."""


@dataclass(frozen=True, slots=True)
class GainBin:
    """The objects whose size or coarse IoU is at least `low` and below `high`.

    before, gain: Means over the objects, None without objects.
    gain_error: Standard error of the mean gain, None with fewer than two objects.
    better, worse: Fractions of the objects whose IoU rose or fell by more than NOTABLE_CHANGE.
    """

    low: float
    high: float
    objects: int
    before: float | None
    gain: float | None
    gain_error: float | None
    better: float | None
    worse: float | None


@dataclass(slots=True)
class GainHistogram:
    """Sums per bin, float64 (6, bins): objects, IoU before, gain, squared gain, better, worse."""

    edges: tuple[float, ...]
    sums: NDArray[np.float64] = field(init=False)

    def __post_init__(self) -> None:
        self.sums = np.zeros((6, len(self.edges) - 1))

    def add(self, value: float, *, before: float, after: float) -> None:
        """Add an object to the bin that `value` falls into, with its IoU before and after."""
        bin = min(int(np.searchsorted(self.edges, value, side="right")), len(self.edges) - 1) - 1
        gain = after - before
        self.sums[:, bin] += (1, before, gain, gain * gain, gain > NOTABLE_CHANGE, gain < -NOTABLE_CHANGE)

    def merge(self, other: Self) -> None:
        self.sums += other.sums

    def result(self) -> tuple[GainBin, ...]:
        return tuple(
            _make_bin(low, high, sums)
            for low, high, sums in zip(self.edges[:-1], self.edges[1:], self.sums.T.tolist(), strict=True)
        )

    def total(self) -> GainBin:
        """All objects as one bin."""
        return _make_bin(self.edges[0], self.edges[-1], self.sums.sum(axis=1).tolist())


def _make_bin(low: float, high: float, sums: Sequence[float]) -> GainBin:
    objects, before, gain, squares, better, worse = sums
    count = int(objects)
    if not count:
        return GainBin(low, high, 0, None, None, None, None, None)
    spread = max(0.0, squares - gain * gain / count)
    return GainBin(
        low=low,
        high=high,
        objects=count,
        before=before / count,
        gain=gain / count,
        gain_error=math.sqrt(spread / (count - 1) / count) if count > 1 else None,
        better=better / count,
        worse=worse / count,
    )
