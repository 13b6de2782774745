"""Defects made of whole superpixels: pieces that follow colour edges, as a segmenter's own mistakes do."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache
from itertools import chain, islice
from typing import TypeAlias

import cv2
import numpy as np

from refinetool.corrupt import defects
from refinetool.corrupt.geometry import radius, reach_px, signed_depth, zoom_on
from refinetool.corrupt.goals import Attempt, Corrupted, Goal, Rng, reach
from refinetool.records import ImageArray, IntArray, Mask

LabelMaps: TypeAlias = Callable[[int], IntArray]
"""From a number of superpixels to the map of their labels, int64 (H, W), for one image."""

BANDS = ("boundary", "inner-hole", "outer-island")
"""Names of toggled superpixels, by the band they were drawn from: a boundary error, an internal false negative, an
external false positive."""

TOO_FEW_PX = 5
"""Where a band has fewer pixels, the object itself takes its place."""
IOU_BAND_WIDTH = 0.10
"""Width of the IoU band of the original set."""


def superpixel_labels(image: ImageArray, *, count: int, compactness: float) -> IntArray:
    """SLIC superpixels of an image, uint8 (H, W, 3) RGB: int64 (H, W) labels from 0 (Achanta et al. 2012)."""
    from skimage.segmentation import slic

    labels: IntArray = slic(image, n_segments=count, compactness=compactness, start_label=0).astype(np.int64)
    return labels


def label_maps(image: ImageArray, *, compactness: float) -> LabelMaps:
    """The label maps of an image, each made when it is first asked for: the objects of an image share them."""
    return cache(lambda count: superpixel_labels(image, count=count, compactness=compactness))


def superpixel(
    image: ImageArray,
    gt: Mask,
    rng: Rng,
    *,
    goal: Goal,
    labels: LabelMaps,
    counts: Sequence[int],
    compactness: float,
    fractions: Sequence[float],
    kernel_px: int,
    iterations: int,
    max_defects: int,
    margin: float,
    min_side_px: int,
) -> Corrupted:
    """Toggle superpixels at the boundary, inside and outside until the IoU is in the band, as DAVIS-585 was made.

    An attempt starts from the good mask and makes up to `max_defects` defects. Each picks a band of pixels, a number
    of superpixels and a pixel of the band, and toggles the superpixel of that pixel: added if the pixel is background,
    removed if not. An attempt ends when the IoU is in the band or below it.

    Two things are ours. A band wider than that of the original (0.1) is covered by drawing one of that width within
    it, or most masks would stop at the first defect. And where the superpixels of the whole image are too large for an
    object, those of an enlarged window around it are tried for as many attempts again.

    Args:
        image: uint8 (H, W, 3) RGB.
        gt: bool (H, W).
        labels: Label maps of the image, see `label_maps`.
        counts: Numbers of superpixels to draw from.
        fractions: How often each band is drawn: boundary, inside, outside.
        kernel_px, iterations: The boundary band is what this many dilations with a square of that side add to what as
            many erosions take away.
        margin, min_side_px: Of the window, see `geometry.zoom_on`.
    """
    part = goal.narrowed(rng, IOU_BAND_WIDTH)

    def toggles(mask: Mask, maps: LabelMaps, ignore: Mask | None) -> Iterator[Attempt]:
        inside = replace(part, ignore=ignore)
        places = _places(mask, kernel_px=kernel_px, iterations=iterations)
        while True:
            yield _toggle_until(
                mask, places, rng, goal=inside, maps=maps, counts=counts, fractions=fractions, most=max_defects
            )

    def zoomed() -> Iterator[Attempt]:
        zoom = zoom_on(gt, margin=margin, min_side_px=min_side_px)
        maps = label_maps(zoom.enter_image(image), compactness=compactness)
        ignore = None if goal.ignore is None else zoom.enter(goal.ignore)
        for attempt in toggles(zoom.enter(gt), maps, ignore):
            yield attempt._replace(coarse=zoom.leave(attempt.coarse, gt.shape))

    attempts = chain(islice(toggles(gt, labels, goal.ignore), goal.tries), zoomed())
    return reach("superpixel", attempts, gt, goal=replace(goal, tries=2 * goal.tries))


def _places(mask: Mask, *, kernel_px: int, iterations: int) -> tuple[IntArray, ...]:
    """The pixels (flat indices) of the bands: around the boundary, inside of it, outside of it."""
    pixels, kernel = mask.view(np.uint8), np.ones((kernel_px, kernel_px), np.uint8)
    grown = cv2.dilate(pixels, kernel, iterations=iterations).astype(bool)
    core = cv2.erode(pixels, kernel, iterations=iterations).astype(bool)
    places = (np.flatnonzero(band) for band in (grown & ~core, core, ~grown))
    return tuple(place if len(place) >= TOO_FEW_PX else np.flatnonzero(mask) for place in places)


def _toggle_until(
    mask: Mask,
    places: Sequence[IntArray],
    rng: Rng,
    *,
    goal: Goal,
    maps: LabelMaps,
    counts: Sequence[int],
    fractions: Sequence[float],
    most: int,
) -> Attempt:
    """One attempt: toggle until the IoU is in the band or below it, or `most` superpixels are toggled."""
    coarse, toggled = mask.copy(), []
    for _ in range(most):
        band = rng.choice(len(places), p=fractions)
        _toggle(coarse, maps(int(rng.choice(counts))), places[band], rng)
        toggled.append(BANDS[band])
        if goal.overlap(coarse, mask) <= goal.high:
            break
    return Attempt(coarse, tuple(toggled))


def _toggle(coarse: Mask, labels: IntArray, places: IntArray, rng: Rng) -> None:
    """Pick one of some pixels and toggle its superpixel in place: added if the pixel is background, else removed."""
    pixel = rng.choice(places)
    coarse[labels == labels.flat[pixel]] = not coarse.flat[pixel]


def superpixel_defects(mask: Mask, rng: Rng, severity: float, *, labels: IntArray) -> Mask:
    """Toggle whole superpixels at the boundary, inside and outside, as the DAVIS-585 set was made.

    The number of toggled superpixels grows with severity. A superpixel becomes what the pixel that it was chosen by is
    not in the good mask, so that none is toggled back. Where `superpixel` aims at an IoU, this only draws.
    """
    size, depth = radius(mask), signed_depth(mask)
    width = max(defects.LEAST_BAND_PX, defects.BAND_WIDTH * size)
    boundary, inside = np.abs(depth) <= width, depth > width
    outside = (depth < -width) & (depth > -min(defects.OUTSIDE_REACH * size, reach_px(mask)))
    fallback = inside if inside.any() else boundary & mask
    coarse = mask.copy()
    for _ in range(min(1 + rng.poisson(defects.TOGGLES * severity), defects.MOST_TOGGLES)):
        band = (boundary, inside, outside)[rng.choice(3, p=defects.BAND_FRACTIONS)]
        pixel = rng.choice(np.flatnonzero(band if band.any() else fallback))
        coarse[labels == labels.flat[pixel]] = not mask.flat[pixel]
    return coarse


def superpixel_vote(mask: Mask, rng: Rng, severity: float, *, labels: IntArray) -> Mask:
    """Snap the mask to superpixels: each becomes foreground if, give or take noise, half of it is."""
    total = np.bincount(labels.ravel())
    inside = np.bincount(labels.ravel(), weights=mask.ravel(), minlength=len(total))
    noise = defects.VOTE_NOISE * severity * rng.standard_normal(len(total)) * (inside > 0)
    voted: Mask = (inside / np.maximum(total, 1) + noise > 0.5)[labels]
    return voted
