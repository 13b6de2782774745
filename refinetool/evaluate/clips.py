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
from refinetool.evaluate.pairing import Match, in_order
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

    Recall is the fraction of frames above 0.5, and decay the mean over the first quarter of the frames minus that over
    the last (Perazzi et al. 2016). With `unseen`, clips of these names are reported apart, and all as the mean of the
    two groups, as in LVOS's second version.

    The frames are the images of the ground truth; keys are `clip/frame`. Two numbers are kept per object and frame.
    """

    with_coarse: bool
    rule: str
    unseen: frozenset[str] | None = None
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
        counts = self.counts | Counter(clips=len(self.after), clip_objects=len(after))
        groups = [] if self.unseen is None else [("seen", False), ("unseen", True)]
        measures = []
        if groups:
            of_groups = [
                [_average([score for score in side if (score.clip in self.unseen) == new]) for _, new in groups]  # type: ignore[operator]
                for side in (after, before)
            ]
            both = [_average_groups(group) for group in of_groups]
            measures += self._name_measures("", both[0], both[1], rule="mean of seen and unseen clips")
            for place, (group, _) in enumerate(groups):
                rule = f"objects of {group} clips"
                measures += self._name_measures(f" {group}", of_groups[0][place], of_groups[1][place], rule=rule)
        else:
            measures += self._name_measures("", _average(after), _average(before), rule="then over objects")
        clips = sorted(self.after)
        return Report(
            measures=tuple(measures),
            counts={name: counts[name] for name in CLIPS},
            per_class=tuple(
                Measure(
                    f"J&F of clip {clip}",
                    f"{self.rule.upper()}, mean over frames, then over objects",
                    _average([score for score in after if score.clip == clip])["J&F"],
                    _average([score for score in before if score.clip == clip])["J&F"] if self.with_coarse else None,
                )
                for clip in clips
            ),
        )

    def _name_measures(
        self, suffix: str, values: Mapping[str, float | None], coarse: Mapping[str, float | None], *, rule: str
    ) -> list[Measure]:
        reduction = f"{self.rule.upper()}, mean over frames, {rule}"
        return [
            Measure(f"{name}{suffix}", reduction, value, coarse[name] if self.with_coarse else None)
            for name, value in values.items()
        ]

    def _score_objects(self, clips: Mapping[str, Frames]) -> "Iterator[ObjectInClip]":
        """Score each object of each clip, leaving out objects without a frame that counts."""
        for clip, frames in sorted(clips.items()):
            ordered = [frames[frame] for frame in in_order(frames)]
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
                    yield ObjectInClip(
                        clip,
                        _summarise_frames([score.region for score in counted]),
                        _summarise_frames([score.contour for score in counted]),
                    )


RECALLED = 0.5
"""The score above which a frame counts as recalled."""


@dataclass(frozen=True, slots=True)
class FrameSummary:
    """Mean over the frames of an object; fraction of frames above RECALLED; first minus last quarter."""

    mean: float
    recall: float
    decay: float


@dataclass(frozen=True, slots=True)
class ObjectInClip:
    """J (`region`) and F (`contour`) of an object over the frames of its clip."""

    clip: str
    region: FrameSummary
    contour: FrameSummary


def _summarise_frames(scores: Sequence[float]) -> FrameSummary:
    """Summarise N scores in the order of the frames. Quarters share the frames at their bounds, as in DAVIS's code."""
    values = np.array(scores)
    bounds = np.round(np.linspace(1, len(values), 5) + 1e-10).astype(int) - 1
    first, last = values[bounds[0] : bounds[1] + 1], values[bounds[3] : bounds[4] + 1]
    return FrameSummary(
        mean=sum(scores) / len(scores),
        recall=float((values > RECALLED).mean()),
        decay=float(first.mean() - last.mean()),
    )


def _average(objects: Sequence[ObjectInClip]) -> dict[str, float | None]:
    """J&F, J and F, their recall and decay, as means over objects."""
    sides = {name: [getattr(score, side) for score in objects] for name, side in (("J", "region"), ("F", "contour"))}
    means = {name: divide(sum(one.mean for one in found), len(found)) for name, found in sides.items()}
    both = [value for value in means.values() if value is not None]
    return {
        "J&F": sum(both) / 2 if both else None,
        **means,
        **{
            f"{name} {word}": divide(sum(getattr(one, word) for one in found), len(found))
            for name, found in sides.items()
            for word in ("recall", "decay")
        },
    }


def _average_groups(groups: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """J&F, J and F as means over groups of clips; None where a group is empty."""
    found = {}
    for name in ("J&F", "J", "F"):
        values = [group[name] for group in groups]
        known = [value for value in values if value is not None]
        found[name] = sum(known) / len(known) if len(known) == len(values) else None
    return found


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
