"""J, F and J&F of clips (Perazzi et al. 2016; Pont-Tuset et al. 2017: DAVIS; Hong et al. 2023: LVOS)."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np
from scipy import ndimage

from refinetool import masks
from refinetool.errors import DataError
from refinetool.evaluate.pairing import Match
from refinetool.evaluate.report import CLIPS, Measure, Report, share
from refinetool.records import BoolArray, Sample

CONTOUR_WIDTH = 0.008
"""How far from each other contours may be, as a share of the image diagonal."""


@dataclass(frozen=True, slots=True)
class FrameScore:
    """J and F of an object in a frame, and whether the ground truth shows it there."""

    region: float
    contour: float
    visible: bool


ABSENT = FrameScore(region=1.0, contour=1.0, visible=False)
"""An object that neither side shows in a frame."""

Frames = dict[str, dict[int, FrameScore]]
"""By frame and object."""


def contour(mask: BoolArray) -> BoolArray:
    """Pixels that differ from their right, lower or lower right neighbour, bool (H, W)."""
    edge = np.zeros(mask.shape, dtype=np.bool_)
    edge[:, :-1] |= mask[:, :-1] != mask[:, 1:]
    edge[:-1] |= mask[:-1] != mask[1:]
    edge[:-1, :-1] |= mask[:-1, :-1] != mask[1:, 1:]
    return edge


def contour_f(truth: BoolArray, guess: BoolArray) -> float:
    """F, 0..1: the harmonic mean of precision and recall of the contour pixels of two masks, bool (H, W).

    A contour pixel is right if the other contour has one within b = ceil(0.008 sqrt(H^2 + W^2)) px. A contour that one
    side alone has gives 0; none on either side 1.
    """
    reach_px = math.ceil(CONTOUR_WIDTH * math.hypot(*truth.shape))
    ours, theirs = contour(guess), contour(truth)
    if not ours.any() or not theirs.any():
        return float(not ours.any() and not theirs.any())
    precision = np.count_nonzero(ours & _near(theirs, reach_px)) / np.count_nonzero(ours)
    recall = np.count_nonzero(theirs & _near(ours, reach_px)) / np.count_nonzero(theirs)
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def _near(pixels: BoolArray, reach_px: int) -> BoolArray:
    """What lies within a distance of some pixels, bool (H, W): they, dilated by a disc."""
    x0, y0, x1, y1 = masks.bounding_box(pixels) or (0, 0, 0, 0)
    here = (slice(max(0, y0 - reach_px), y1 + reach_px), slice(max(0, x0 - reach_px), x1 + reach_px))
    near = np.zeros(pixels.shape, dtype=np.bool_)
    near[here] = ndimage.distance_transform_edt(~pixels[here]) <= reach_px
    return near


@dataclass(slots=True)
class ClipTally:
    """J (IoU), F (contours) and their mean over the objects of clips.

    An object's figures are means over the frames that count: with `davis` all of the clip but the first and the last,
    an object that both sides leave out counting as right; with `lvos` those strictly between the first and the last
    frame in which the ground truth shows the object. The data set's are means over the objects of all clips.

    Frames are the images of the ground truth; keys are `clip/frame`. What is kept is two numbers per object and frame.
    """

    with_coarse: bool
    rule: str
    after: dict[str, Frames] = field(default_factory=dict)
    before: dict[str, Frames] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, match: Match) -> None:
        clip, _, frame = match.key.rpartition("/")
        if match.truth is None:
            self.counts["clip_frames_added"] += match.prediction is not None
            return
        if _unreadable(match.truth):
            self.counts["clip_frames_unreadable"] += 1
            return
        self.counts["clip_frames_lost"] += match.prediction is None or _unreadable(match.prediction)
        self.after.setdefault(clip, {})[frame] = _scores(match.truth, match.prediction)
        if self.with_coarse:
            self.before.setdefault(clip, {})[frame] = _scores(match.truth, match.coarse)

    def merge(self, other: Self) -> None:
        for mine, theirs in ((self.after, other.after), (self.before, other.before)):
            for clip, frames in theirs.items():
                mine.setdefault(clip, {}).update(frames)
        self.counts.update(other.counts)

    def result(self) -> Report:
        after, before = (list(self._objects(clips)) for clips in (self.after, self.before))
        values, coarse = _figures(after), _figures(before)
        counts = self.counts | Counter(clips=len(self.after), clip_objects=len(after))
        return Report(
            measures=tuple(
                Measure(name, f"{self.rule.upper()}, mean over frames, then over objects", value, was)
                for name, value, was in zip(("J&F", "J", "F"), values, coarse, strict=True)
            ),
            counts={name: counts[name] for name in CLIPS},
        )

    def _objects(self, clips: Mapping[str, Frames]) -> Iterator[tuple[float, float]]:
        """(J, F) of each object of each clip, without those that have no frame that counts."""
        for clip, frames in sorted(clips.items()):
            ordered = [scores for _, scores in sorted(frames.items())]
            seen = {id for scores in ordered for id in scores}
            for id in sorted(seen):
                scores = [frame.get(id, ABSENT) for frame in ordered]
                visible = [number for number, score in enumerate(scores) if score.visible]
                if not visible:
                    raise DataError(
                        f"Clip {clip}: object {id} is in no frame of the ground truth; remove it from the other file, "
                        "or score each frame for itself with --protocol none."
                    )
                counted = scores[1:-1] if self.rule == "davis" else scores[visible[0] + 1 : visible[-1]]
                if counted:
                    yield (
                        sum(score.region for score in counted) / len(counted),
                        sum(score.contour for score in counted) / len(counted),
                    )


def _figures(objects: Sequence[tuple[float, float]]) -> tuple[float | None, float | None, float | None]:
    """J&F, J and F of a data set from (J, F) of its objects."""
    region, contour = (share(sum(figures[place] for figures in objects), len(objects)) for place in (0, 1))
    return (None if region is None or contour is None else (region + contour) / 2), region, contour


def _unreadable(sample: Sample) -> bool:
    return any(region.mask is None for region in sample.regions)


def _scores(truth: Sample, guess: Sample | None) -> dict[int, FrameScore]:
    """The objects that either side shows in a frame."""
    valid = None if truth.void is None else ~masks.decode(truth.void)
    theirs, ours = _masks(truth, valid), _masks(guess, valid)
    scores = {}
    for id in theirs.keys() | ours.keys():
        blank = np.zeros(truth.size, dtype=np.bool_)
        a, b = theirs.get(id, blank), ours.get(id, blank)
        scores[id] = FrameScore(region=masks.iou(a, b), contour=contour_f(a, b), visible=id in theirs)
    return scores


def _masks(sample: Sample | None, valid: BoolArray | None) -> dict[int, BoolArray]:
    """The masks of a frame that hold a pixel that counts, by id."""
    if sample is None:
        return {}
    decoded = {region.id: masks.decode(region.mask) for region in sample.regions if region.mask is not None}
    if valid is not None:
        decoded = {id: mask & valid for id, mask in decoded.items()}
    return {id: mask for id, mask in decoded.items() if mask.any()}
