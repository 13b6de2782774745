"""Splits the regions of a sample into the parts that are refined, and merges the parts into one annotation per region.

A class mask may hold many objects, far apart, which one set of prompts can't describe. `split` cuts it into connected
components and joins those that are close (SAMRefiner, Algorithm 1), using only their boxes and areas. After refinement
`merge` paints the proposals into one map, in which each pixel has at most one owner, and `outcome_of` judges what is
left of each region in the map. Instances have one part each and may overlap.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from refinetool import masks
from refinetool.gaps import NOBODY, LabelMap, close_gaps
from refinetool.masks import bounding_box, components, tight_box
from refinetool.records import (
    Annotation,
    Box,
    Candidates,
    IntArray,
    Mask,
    Outcome,
    Region,
    Rle,
    Sample,
    Size,
)
from refinetool.settings import ExclusiveSettings, SplitSettings
from refinetool.statuses import Reason

DROPPED = -1
"""In place of a part's number: a component too small to be refined."""

RELAXATION = 0.1
"""How far the density of a joined part may fall below that of its sparser component under the `relaxed` rule."""

LOOK_AHEAD = 1024
"""How many components a growing component is compared with at a time. Affects only speed."""


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """The unit of refinement: a region, or a part of a class mask.

    region: Index of the region in the sample.
    number: Index of the part in the region.
    box: Half-open xyxy in the image.
    mask: bool (y1 - y0, x1 - x0), the coarse mask within the box.
    """

    region: int
    number: int
    box: Box
    mask: Mask


@dataclass(frozen=True, slots=True, eq=False)
class ClassParts:
    """The G parts of a class mask: unions of its connected components, in row-major order of their first pixels.

    size: (H, W) of the class mask.
    boxes: int64 (G, 4), half-open xyxy.
    areas: int64 (G,), pixels.
    """

    size: Size
    boxes: IntArray
    areas: IntArray
    _window: Box
    _components: NDArray[np.int32]
    """Component numbers from 1 within the window, 0 for background."""
    _part_of: IntArray
    """(R + 1,): the part of each component, or `DROPPED`; entry 0, the background, is `DROPPED` as well."""

    def __len__(self) -> int:
        return len(self.areas)

    def box(self, part: int) -> Box:
        """The tight box of one part."""
        x0, y0, x1, y1 = self.boxes[part].tolist()
        return x0, y0, x1, y1

    def crop(self, part: int) -> Mask:
        """The mask of one part within its box, bool (y1 - y0, x1 - x0)."""
        (x0, y0, x1, y1), (left, top, _, _) = self.box(part), self._window
        return np.equal(self._part_of[self._components[y0 - top : y1 - top, x0 - left : x1 - left]], part)

    def mask(self, part: int) -> Mask:
        """The mask of one part, bool (H, W)."""
        return masks.paste(self.crop(part), self.box(part), size=self.size)

    def dropped(self) -> Mask:
        """bool (H, W): the components that are in no part, because they are too small."""
        trivial = (self._components > 0) & (self._part_of[self._components] == DROPPED)
        return masks.paste(trivial, self._window, size=self.size)


@dataclass(frozen=True, slots=True)
class Claim:
    """The pixels that one part claims in the merged map.

    owner: Index of the region (the class, or the instance) it belongs to.
    box: Half-open xyxy in the image.
    mask: bool (y1 - y0, x1 - x0), the part within the box.
    predicted_iou: The model's estimate for the mask; None for a coarse mask that was kept or never refined.
    """

    owner: int
    box: Box
    mask: Mask
    predicted_iou: float | None


def split_sample(sample: Sample, *, settings: SplitSettings) -> tuple[list[Part], list[Claim]]:
    """Return the parts of a sample to refine, and the components of class masks that are too small to refine."""
    parts: list[Part] = []
    trivial: list[Claim] = []
    for number, region in enumerate(sample.regions):
        if region.mask is None or region.keep is not None or masks.area(region.mask) == 0:
            continue
        mask = masks.decode(region.mask)
        if sample.layout == "semantic":
            pieces = split(mask, settings=settings)
            parts += [Part(number, n, pieces.box(n), pieces.crop(n)) for n in range(len(pieces))]
            rest = pieces.dropped()
            if rest.any():
                trivial.append(whole_claim(number, rest))
        else:
            claim = whole_claim(number, mask)
            parts.append(Part(number, 0, claim.box, claim.mask))
    return parts, trivial


def split(class_mask: Mask, *, settings: SplitSettings) -> ClassParts:
    """Split a class mask into parts that are refined one by one.

    Components (8-connectivity) of fewer than `min_area_px` pixels are dropped; the others are joined by `group`, or all
    into one part where the rule is `off`.

    Args:
        class_mask: bool (H, W); an empty one has no parts.
    """
    height, width = class_mask.shape
    window = bounding_box(class_mask) or (0, 0, 1, 1)
    left, top, right, bottom = window
    found = components(class_mask[top:bottom, left:right])
    large = np.flatnonzero(found.areas >= settings.min_area_px)
    boxes, areas = found.boxes[large] + np.array([left, top, left, top]), found.areas[large]
    if settings.rule == "off":
        part_of_large = np.zeros(len(areas), dtype=np.int64)
    else:
        part_of_large = group(
            boxes, areas, rule=settings.rule, merge_ratio=settings.merge_ratio, fixed_point=settings.fixed_point
        )
    part_of = np.full(len(found) + 1, DROPPED, dtype=np.int64)
    part_of[large + 1] = part_of_large
    boxes, areas = _joined(boxes, areas, part_of_large)
    return ClassParts((height, width), boxes, areas, _window=window, _components=found.labels, _part_of=part_of)


def merge(claims: Iterable[Claim], *, void: Mask | None, size: Size) -> LabelMap:
    """Paint the parts of all regions into one map.

    Parts of one region are united. Where parts of different regions overlap, the one with the highest predicted IoU
    wins, or the later one if equal. Parts without a predicted IoU are coarse and have lower priority than all others.
    Void pixels and pixels that no part claims belong to nobody.

    Args:
        void: bool (H, W), or None where the sample has no void.
        size: (H, W).

    Returns:
        int32 (H, W): the owner of each pixel or `NOBODY`; `owners == n` is the mask of region n.
    """
    owners = np.full(size, NOBODY, dtype=np.int32)
    for claim in sorted(claims, key=lambda claim: -np.inf if claim.predicted_iou is None else claim.predicted_iou):
        x0, y0, x1, y1 = claim.box
        owners[y0:y1, x0:x1][claim.mask] = claim.owner
    if void is not None:
        owners[void] = NOBODY
    return owners


def whole_claim(owner: int, mask: Mask, *, predicted_iou: float | None = None) -> Claim:
    """Make a claim from a non-empty mask of the image, bool (H, W), cropped to its box."""
    x0, y0, x1, y1 = box = tight_box(mask)
    return Claim(owner, box, mask[y0:y1, x0:x1].copy(), predicted_iou)


# --- results per region


@dataclass(frozen=True, slots=True, eq=False)
class Verdict:
    """The result for one part.

    claim: Its claim in the image: the refined mask, or the coarse one where there is a reason to keep it.
    reason: Why the coarse mask is kept, or None.
    predicted_iou: The model's estimate for its mask, even if the mask was rejected; None where no model was run.
    coarse_iou: IoU of the proposal with the coarse mask.
    candidates: All candidates of the model, None unless they are kept.
    """

    claim: Claim
    reason: Reason | None
    predicted_iou: float | None
    coarse_iou: float | None
    candidates: Candidates | None = None


def outcome_of(
    sample: Sample,
    verdicts: Sequence[Verdict],
    trivial: Sequence[Claim],
    *,
    min_left: float,
    exclusive: ExclusiveSettings,
) -> Outcome:
    """Return the outcome of a sample: one annotation per region, in the order of the regions.

    Args:
        verdicts: One per part that was refined.
        trivial: Components of class masks that were too small to be parts.
        min_left: Fraction of its pixels that a refined region must keep in a merged map, where others may take some.
        exclusive: Whether instances are merged like regions of a map, and gaps between them closed.
    """
    if sample.layout == "instances" and exclusive.enabled:
        return Outcome(
            sample.key, tuple(_merged(sample, verdicts, trivial, min_left=min_left, gap_px=exclusive.gap_px))
        )
    if sample.layout == "instances":
        return Outcome(sample.key, tuple(_alone(sample, verdicts)))
    return Outcome(sample.key, tuple(_merged(sample, verdicts, trivial, min_left=min_left)))


def _alone(sample: Sample, verdicts: Sequence[Verdict]) -> list[Annotation]:
    """Return one annotation per region, where regions may overlap and none has more than one part."""
    judged = {verdict.claim.owner: verdict for verdict in verdicts}
    annotations = []
    for number, region in enumerate(sample.regions):
        verdict = judged.get(number)
        if verdict is None:
            annotations.append(_untouched(region))
        else:
            mask = _encode_claim(verdict.claim, sample.size) if verdict.reason is None else region.mask
            annotations.append(_judged(verdict, mask))
    return annotations


def _merged(
    sample: Sample, verdicts: Sequence[Verdict], trivial: Sequence[Claim], *, min_left: float, gap_px: float = 0.0
) -> list[Annotation]:
    """Return one annotation per region, where regions share a map and no pixel has two owners (see `merge`).

    A region counts as refined if any of its parts is; its predicted IoU is the mean of those parts, weighted by area.
    A region without refined parts keeps its coarse mask to the pixel: no other region can claim these pixels. A region
    that is empty after the merge, or has less than `min_left` of the pixels that it claimed outside void, because
    others took them, also keeps its coarse mask; the rest is then merged around it. Crowds of instances don't take
    part.
    """
    by_region = [[verdict for verdict in verdicts if verdict.claim.owner == n] for n in range(len(sample.regions))]
    refined = {n for n, own in enumerate(by_region) if any(verdict.reason is None for verdict in own)}
    coarse = {
        n: masks.decode(region.mask)
        for n, region in enumerate(sample.regions)
        if region.mask is not None and masks.area(region.mask) > 0 and not _is_crowd(sample, region)
    }
    void = None if sample.void is None else masks.decode(sample.void)
    fixed = {n: whole_claim(n, mask, predicted_iou=math.inf) for n, mask in coarse.items()}
    moving = refined
    while True:
        claims = [claim for claim in (*trivial, *(verdict.claim for verdict in verdicts)) if claim.owner in moving]
        claims += [claim for n, claim in fixed.items() if n not in moving]
        owners = merge(claims, void=void, size=sample.size)
        claimed = {n: _claimed([claim for claim in claims if claim.owner == n], void=void) for n in moving}
        left = {n: int(np.count_nonzero(owners == n)) for n in moving}
        lost = {n for n in moving if left[n] == 0 or left[n] < min_left * claimed[n]}
        if not lost:
            break
        moving = moving - lost
    if gap_px > 0:
        owners = close_gaps(owners, coarse, moving=moving, gap_px=gap_px)
    overlaps = {n: masks.iou(owners == n, coarse[n]) for n in moving}

    annotations = []
    for n, (region, own) in enumerate(zip(sample.regions, by_region, strict=True)):
        if n in moving:
            accepted = [verdict for verdict in own if verdict.reason is None]
            candidates = own[0].candidates if len(own) == 1 else None
            refined_mask = masks.encode(owners == n)
            annotations.append(Annotation(refined_mask, None, _mean_score(accepted), overlaps[n], candidates))
        elif n in refined:
            annotations.append(Annotation(region.mask, Reason.CROWDED_OUT, _mean_score(own)))
        elif own:
            largest = max(own, key=lambda verdict: int(verdict.claim.mask.sum()))
            annotations.append(Annotation(region.mask, largest.reason, largest.predicted_iou, largest.coarse_iou))
        else:
            annotations.append(_untouched(region))
    return annotations


def _claimed(claims: Sequence[Claim], *, void: Mask | None) -> int:
    """Count the pixels that a region can own: those that its claims cover together, without void."""
    boxes = np.array([claim.box for claim in claims])
    (x0, y0), (x1, y1) = boxes[:, :2].min(axis=0), boxes[:, 2:].max(axis=0)
    covered = np.zeros((y1 - y0, x1 - x0), dtype=np.bool_)
    for claim in claims:
        left, top, right, bottom = claim.box
        covered[top - y0 : bottom - y0, left - x0 : right - x0] |= claim.mask
    if void is not None:
        covered &= ~void[y0:y1, x0:x1]
    return int(np.count_nonzero(covered))


def _is_crowd(sample: Sample, region: Region) -> bool:
    return sample.layout == "instances" and region.keep is Reason.CROWD


def _judged(verdict: Verdict, mask: Rle | None) -> Annotation:
    """Return the annotation of a region that is one part."""
    return Annotation(mask, verdict.reason, verdict.predicted_iou, verdict.coarse_iou, verdict.candidates)


def _mean_score(verdicts: Sequence[Verdict]) -> float | None:
    """Return the mean predicted IoU of some parts, weighted by area; None where no model was run."""
    scores = [verdict.predicted_iou for verdict in verdicts if verdict.predicted_iou is not None]
    if len(scores) < len(verdicts):
        return None
    return float(np.average(scores, weights=[float(verdict.claim.mask.sum()) for verdict in verdicts]))


def _untouched(region: Region) -> Annotation:
    """Return the annotation of a region on which the model was not run."""
    reason = Reason.EMPTY if region.mask is None or masks.area(region.mask) == 0 else Reason.TOO_SMALL
    return Annotation(region.mask, region.keep or reason)


def _encode_claim(claim: Claim, size: Size) -> Rle:
    """Encode a claim as RLE in the frame of its image."""
    return masks.encode(masks.paste(claim.mask, claim.box, size=size))


# --- Algorithm 1, on boxes and areas


def group(
    boxes: IntArray, areas: IntArray, *, rule: Literal["paper", "relaxed"], merge_ratio: float, fixed_point: bool
) -> IntArray:
    """Decide which components form one part.

    Two components are joined if together they fill enough of the box around both (the paper's mu = `merge_ratio`):
    their boxes more than mu of it, and their pixels more than mu of it.

    - `paper` tests pairs of the original components; components joined directly or through others form one part.
    - `relaxed`, as in the authors' release, lets a component grow while it is compared with the following ones. The
      pixels need not exceed the density of the sparser of the two minus 0.1.

    Args:
        boxes: int64 (R, 4), half-open xyxy.
        areas: int64 (R,), pixels.
        fixed_point: Whether parts are joined again like components, until nothing changes.

    Returns:
        int64 (R,): the number 0..G-1 of each component's part, in the order of the parts' first components.
    """
    sweep = _sweep_pairs if rule == "paper" else _sweep_growing
    part_of = np.arange(len(areas))
    while True:
        # A part is identified by its first component; the rank of that component is the number of the part.
        firsts, step = np.unique(sweep(boxes, areas, merge_ratio), return_inverse=True)
        part_of = step[part_of]
        if not fixed_point or len(firsts) == len(areas):
            return part_of
        boxes, areas = _joined(boxes, areas, step)


def _sweep_pairs(boxes: IntArray, areas: IntArray, merge_ratio: float) -> IntArray:
    """Return the first component of each component's part, by the `paper` rule."""
    first = np.arange(len(areas))
    corners, box_areas = np.ascontiguousarray(boxes.T), _area(boxes.T)
    for i in range(len(areas)):
        limit = merge_ratio * _area(_around(corners[:, i, None], corners))
        partners = (box_areas[i] + box_areas > limit) & (areas[i] + areas > limit)
        partners[i] = True
        met = np.unique(first[partners])
        if len(met) > 1:
            first[np.isin(first, met)] = met[0]
    return first


def _sweep_growing(boxes: IntArray, areas: IntArray, merge_ratio: float) -> IntArray:
    """Return the first component of each component's part, by the `relaxed` rule."""
    first = np.arange(len(areas))
    corners, areas = boxes.T.copy(), areas.copy()
    box_areas = _area(corners)
    alone = np.ones(len(areas), dtype=np.bool_)
    for i in range(len(areas)):
        start = i + 1 if alone[i] else len(areas)
        while start < len(areas):
            rest = start + np.flatnonzero(alone[start : start + LOOK_AHEAD])
            together = _area(_around(corners[:, i, None], corners[:, rest]))
            density = np.minimum(areas[i] / box_areas[i], areas[rest] / box_areas[rest])
            close = box_areas[i] + box_areas[rest] > merge_ratio * together
            dense = (areas[i] + areas[rest]) / together > np.minimum(merge_ratio, density - RELAXATION)
            partners = rest[close & dense]
            if not partners.size:
                start += LOOK_AHEAD
                continue
            j = partners[0]
            first[j], alone[j] = i, False
            corners[:, i], areas[i] = _around(corners[:, i], corners[:, j]), areas[i] + areas[j]
            box_areas[i] = _area(corners[:, i])
            start = j + 1
    return first


def _around(corners: IntArray, others: IntArray) -> IntArray:
    """Return the boxes around one box and each of the others; coordinates come first: (4, ...)."""
    return np.concatenate([np.minimum(corners[:2], others[:2]), np.maximum(corners[2:], others[2:])])


def _area(corners: IntArray) -> IntArray:
    return np.asarray((corners[2] - corners[0]) * (corners[3] - corners[1]))


def _joined(boxes: IntArray, areas: IntArray, part_of: IntArray) -> tuple[IntArray, IntArray]:
    """Return boxes (G, 4) and areas (G,) of the parts, given those of the R components and the part of each."""
    count = int(part_of.max(initial=-1)) + 1
    corners = np.full((count, 4), np.iinfo(np.int64).max)
    np.minimum.at(corners, part_of, boxes * [1, 1, -1, -1])  # the largest end is the smallest of the negatives
    total = np.zeros(count, dtype=np.int64)
    np.add.at(total, part_of, areas)
    return corners * [1, 1, -1, -1], total
