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
from refinetool.evaluate.report import CLIPS, Measure, Report, divide
from refinetool.records import Mask, Sample

CONTOUR_WIDTH = 0.008
"""How far apart two contours may be and still agree, as a fraction of the image diagonal."""


@dataclass(frozen=True, slots=True)
class FrameScore:
    """J (`region`) and F (`contour`) of an object in a frame, and whether the ground truth shows it there."""

    region: float
    contour: float
    visible: bool


ABSENT = FrameScore(region=1.0, contour=1.0, visible=False)
"""The score of an object that neither side shows in a frame."""

Frames = dict[str, dict[int, FrameScore]]
"""Scores by frame and object."""


def find_contour(mask: Mask) -> Mask:
    """The pixels that differ from their right, lower or lower right neighbour, bool (H, W)."""
    edge = np.zeros(mask.shape, dtype=np.bool_)
    edge[:, :-1] |= mask[:, :-1] != mask[:, 1:]
    edge[:-1] |= mask[:-1] != mask[1:]
    edge[:-1, :-1] |= mask[:-1, :-1] != mask[1:, 1:]
    return edge


def compute_contour_f(truth: Mask, prediction: Mask) -> float:
    """F, 0..1: the harmonic mean of precision and recall of the contour pixels of two masks, bool (H, W).

    A contour pixel is right if the other contour passes within b = ceil(0.008 sqrt(H^2 + W^2)) px of it. F is 0 if only
    one of the masks has a contour, and 1 if neither has.
    """
    reach_px = math.ceil(CONTOUR_WIDTH * math.hypot(*truth.shape))
    ours, theirs = find_contour(prediction), find_contour(truth)
    if not ours.any() or not theirs.any():
        return float(not ours.any() and not theirs.any())
    precision = np.count_nonzero(ours & _dilate(theirs, reach_px)) / np.count_nonzero(ours)
    recall = np.count_nonzero(theirs & _dilate(ours, reach_px)) / np.count_nonzero(theirs)
    return float(2 * precision * recall / (precision + recall)) if precision + recall else 0.0


def _dilate(pixels: Mask, reach_px: int) -> Mask:
    """Dilate some pixels, bool (H, W), by a disc."""
    x0, y0, x1, y1 = masks.bounding_box(pixels) or (0, 0, 0, 0)
    here = (slice(max(0, y0 - reach_px), y1 + reach_px), slice(max(0, x0 - reach_px), x1 + reach_px))
    near = np.zeros(pixels.shape, dtype=np.bool_)
    near[here] = ndimage.distance_transform_edt(~pixels[here]) <= reach_px
    return near


@dataclass(slots=True)
class ClipEvaluator:
    """J (IoU), F (contours) and their mean over the objects of clips.

    Each object is averaged over the frames that count. By the rule `davis` these are all of the clip except the first
    and the last, and an object that neither side shows in a frame counts as right there; by `lvos` they are those
    strictly between the first and the last frame in which the ground truth shows the object. The data set is averaged
    over the objects of all clips.

    The frames are the images of the ground truth; keys are `clip/frame`. Two numbers are kept per object and frame.
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
        if _is_unreadable(match.truth):
            self.counts["clip_frames_unreadable"] += 1
            return
        self.counts["clip_frames_lost"] += match.prediction is None or _is_unreadable(match.prediction)
        self.after.setdefault(clip, {})[frame] = _score_frame(match.truth, match.prediction)
        if self.with_coarse:
            self.before.setdefault(clip, {})[frame] = _score_frame(match.truth, match.coarse)

    def merge(self, other: Self) -> None:
        for mine, theirs in ((self.after, other.after), (self.before, other.before)):
            for clip, frames in theirs.items():
                mine.setdefault(clip, {}).update(frames)
        self.counts.update(other.counts)

    def result(self) -> Report:
        after, before = (list(self._score_objects(clips)) for clips in (self.after, self.before))
        values, coarse = _average_objects(after), _average_objects(before)
        counts = self.counts | Counter(clips=len(self.after), clip_objects=len(after))
        return Report(
            measures=tuple(
                Measure(name, f"{self.rule.upper()}, mean over frames, then over objects", value, was)
                for name, value, was in zip(("J&F", "J", "F"), values, coarse, strict=True)
            ),
            counts={name: counts[name] for name in CLIPS},
        )

    def _score_objects(self, clips: Mapping[str, Frames]) -> Iterator[tuple[float, float]]:
        """(J, F) of each object of each clip, leaving out objects without a frame that counts."""
        for clip, frames in sorted(clips.items()):
            ordered = [scores for _, scores in sorted(frames.items())]
            seen = {id for scores in ordered for id in scores}
            for id in sorted(seen):
                scores = [frame.get(id, ABSENT) for frame in ordered]
                visible = [number for number, score in enumerate(scores) if score.visible]
                if not visible:
                    raise DataError(
                        f"Clip {clip}: object {id} is in no frame of the ground truth; remove it from the other files, "
                        "or score each frame by itself with --protocol none."
                    )
                counted = scores[1:-1] if self.rule == "davis" else scores[visible[0] + 1 : visible[-1]]
                if counted:
                    yield (
                        sum(score.region for score in counted) / len(counted),
                        sum(score.contour for score in counted) / len(counted),
                    )


def _average_objects(objects: Sequence[tuple[float, float]]) -> tuple[float | None, float | None, float | None]:
    """J&F, J and F of a data set, given (J, F) of its objects."""
    region, contour = (divide(sum(scores[place] for scores in objects), len(objects)) for place in (0, 1))
    return (None if region is None or contour is None else (region + contour) / 2), region, contour


def _is_unreadable(sample: Sample) -> bool:
    return any(region.mask is None for region in sample.regions)


def _score_frame(truth: Sample, prediction: Sample | None) -> dict[int, FrameScore]:
    """Score the objects that at least one side shows in a frame."""
    valid = None if truth.void is None else ~masks.decode(truth.void)
    theirs, ours = _decode_masks(truth, valid), _decode_masks(prediction, valid)
    scores = {}
    for id in theirs.keys() | ours.keys():
        blank = np.zeros(truth.size, dtype=np.bool_)
        a, b = theirs.get(id, blank), ours.get(id, blank)
        scores[id] = FrameScore(region=masks.iou(a, b), contour=compute_contour_f(a, b), visible=id in theirs)
    return scores


def _decode_masks(sample: Sample | None, valid: Mask | None) -> dict[int, Mask]:
    """The masks of a frame by id, leaving out those without a pixel that counts."""
    if sample is None:
        return {}
    decoded = {region.id: masks.decode(region.mask) for region in sample.regions if region.mask is not None}
    if valid is not None:
        decoded = {id: mask & valid for id, mask in decoded.items()}
    return {id: mask for id, mask in decoded.items() if mask.any()}
