"""Measures few-shot segmentation: the foreground mIoU over classes, and the mean IoU of foreground and background.

As in the literature on PASCAL-5i and COCO-20i, pixels are summed over all episodes of a class before its IoU is
computed, and void pixels are left out.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from refinetool.records import Mask


@dataclass(frozen=True, slots=True)
class Overlap:
    """Pixels in both of two areas, and pixels in either."""

    shared: int = 0
    either: int = 0

    def __add__(self, other: "Overlap") -> "Overlap":
        return Overlap(self.shared + other.shared, self.either + other.either)

    @property
    def iou(self) -> float:
        """The intersection over union; 1 if there is nothing in either."""
        return self.shared / self.either if self.either else 1.0


def overlap(a: Mask, b: Mask) -> Overlap:
    """Count the overlap of two masks, bool (H, W)."""
    return Overlap(int(np.count_nonzero(a & b)), int(np.count_nonzero(a | b)))


@dataclass(frozen=True, slots=True)
class FewShotScores:
    """The overlap of foregrounds by class, and of backgrounds over all classes; mergeable with `+`."""

    classes: Mapping[str, Overlap] = field(default_factory=dict)
    background: Overlap = Overlap()
    episodes: int = 0

    def __add__(self, other: "FewShotScores") -> "FewShotScores":
        names = sorted({*self.classes, *other.classes})
        nothing = Overlap()
        return FewShotScores(
            {name: self.classes.get(name, nothing) + other.classes.get(name, nothing) for name in names},
            self.background + other.background,
            self.episodes + other.episodes,
        )

    @property
    def mean_iou(self) -> float:
        """The mean of the classes' foreground IoUs in 0..1; 0 without classes."""
        return float(np.mean([one.iou for one in self.classes.values()])) if self.classes else 0.0

    @property
    def foreground_background_iou(self) -> float:
        """FB-IoU in 0..1: the mean of the IoUs of foreground and background, each over all episodes."""
        whole = sum(self.classes.values(), Overlap())
        return (whole.iou + self.background.iou) / 2


def score_episode(name: str, predicted: Mask, truth: Mask, *, void: Mask) -> FewShotScores:
    """Score the mask predicted for a class in one target.

    Args:
        predicted, truth, void: bool (H, W); void pixels are left out.
    """
    foreground = overlap(predicted & ~void, truth & ~void)
    background = overlap(~predicted & ~void, ~truth & ~void)
    return FewShotScores({name: foreground}, background, 1)
