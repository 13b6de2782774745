"""Masks as thresholded activations of low resolution: class activation maps, and the grids of mask heads."""

import math
from collections.abc import Callable, Iterator
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from refinetool.corrupt import defects
from refinetool.corrupt.geometry import radius, smooth_noise
from refinetool.corrupt.goals import Attempt, Corrupted, Goal, Rng, reach
from refinetool.masks import bounding_box
from refinetool.records import FloatArray, ImageArray, Mask
from refinetool.settings import GeneratorName

THRESHOLDS = np.linspace(0.1, 0.9, 161)
"""Where a map may be thresholded, as fractions of its peak."""
BIAS_GAIN = 1.5
BIAS_REACH = 0.35
"""Reach of the bias towards one part, as a fraction of the square root of the object's area."""
MIN_CELL_PX = 2.0
BLUR_STEP = 1.5
WIDEST_BLUR = 0.25
"""Standard deviation, as a fraction of the longer side, beyond which more blur only costs time."""
MASK_HEAD_CELLS = (28, 56)


def activation_map(
    image: ImageArray | None,
    gt: Mask,
    rng: Rng,
    *,
    goal: Goal,
    name: GeneratorName,
    cell_px: float,
    blur: float,
    bias: bool,
    leak: float,
    mode: Literal["under", "over", "either"],
) -> Corrupted:
    """Threshold a blurred activation of low resolution, as weak supervision gives.

    The IoU aimed at is drawn from the band, and the threshold is the one between 0.1 and 0.9 of the peak that comes
    closest to it: above the threshold of the best IoU the mask is too small, below it too large. Where no threshold
    gives the IoU because the map is too coarse for the object, the next attempt halves the cells; where it is too
    fine, it blurs more.

    Args:
        image: Not looked at.
        gt: bool (H, W).
        name: What to call the generator.
        cell_px, blur, bias, leak: See `activation`.
        mode: Whether the mask is to be too small, too large, or either.
    """
    del image

    def attempts() -> Iterator[Attempt]:
        cell, sigma = cell_px, blur
        target = rng.uniform(goal.low, goal.high)
        while True:
            scores = activation(gt, rng, cell_px=cell, blur=sigma, bias=bias, leak=leak)
            overlaps = overlap_by_threshold(scores, gt, goal.ignore)
            side = ("under", "over")[rng.integers(2)] if mode == "either" else mode
            threshold = _threshold_for(overlaps, target, too_small=side == "under")
            yield Attempt(scores >= threshold, (f"{side}-segmented",), evidence=_centred(scores, threshold))
            if overlaps.max() < target:
                cell = max(MIN_CELL_PX, cell / 2)
            else:
                sigma = min(sigma * BLUR_STEP, WIDEST_BLUR * max(gt.shape) / cell)

    return reach(name, attempts(), gt, goal=goal)


def activation(gt: Mask, rng: Rng, *, cell_px: float, blur: float, bias: bool, leak: float) -> FloatArray:
    """The map that a class activation method might give for a mask, float32 (H, W) in 0..1.

    Args:
        gt: bool (H, W), not empty.
        cell_px: Side of a cell of the grid.
        blur: Standard deviation of the Gaussian, in cells.
        bias: Whether one part of the object, around a random pixel of it, excites more than the rest.
        leak: Amplitude of smooth noise all over the image, as a fraction of the peak.
    """
    height, width = gt.shape
    columns, rows = max(2, round(width / cell_px)), max(2, round(height / cell_px))
    grid = cv2.resize(gt.astype(np.float32), (columns, rows), interpolation=cv2.INTER_AREA)
    heat = _blurred(np.asarray(grid, np.float32), blur)
    if bias:
        y, x = np.divmod(rng.choice(np.flatnonzero(gt)), width)
        across = (np.arange(columns) + 0.5) * width / columns - x
        down = (np.arange(rows) + 0.5) * height / rows - y
        heat = heat * (1 + BIAS_GAIN * _bell(down, across, sigma=BIAS_REACH * np.sqrt(gt.sum())))
    if leak:
        noise = _blurred(rng.standard_normal((rows, columns)).astype(np.float32), max(1.0, blur))
        heat = heat + leak * heat.max() * noise / (np.abs(noise).max() + np.float32(1e-6))
    large = np.asarray(cv2.resize(heat.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR), np.float32)
    positive = np.maximum(large, 0)
    scaled: FloatArray = (positive / max(float(positive.max()), 1e-12)).astype(np.float32)
    return scaled


def overlap_by_threshold(scores: FloatArray, gt: Mask, ignore: Mask | None) -> FloatArray:
    """IoU of `scores >= threshold` with a mask for each of THRESHOLDS, float32, from one pass over the pixels."""
    counted = np.ones_like(gt) if ignore is None else ~ignore
    # Position 0 is below all thresholds, position n reaches the first n of them.
    level = np.searchsorted(THRESHOLDS, scores, side="right")
    hits, alarms = (
        np.bincount(level[where], minlength=len(THRESHOLDS) + 1)[::-1].cumsum()[::-1][1:]
        for where in (gt & counted, counted & ~gt)
    )
    overlaps: FloatArray = (hits / (np.count_nonzero(gt & counted) + alarms)).astype(np.float32)
    return overlaps


def _threshold_for(overlaps: FloatArray, target: float, *, too_small: bool) -> float:
    """The threshold whose IoU is closest to the target, among those above or below the one of the best IoU."""
    peak = int(overlaps.argmax())
    side = slice(peak, None) if too_small else slice(0, peak + 1)
    return float(THRESHOLDS[side][np.abs(overlaps[side] - target).argmin()])


def _centred(scores: FloatArray, threshold: float) -> FloatArray:
    """The scores, bent so that the threshold lies at 0.5; 0 and 1 stay."""
    above = 0.5 + 0.5 * (scores - threshold) / max(1 - threshold, 1e-6)
    centred: FloatArray = np.where(scores < threshold, 0.5 * scores / threshold, above).astype(np.float32)
    return centred


def _bell(down: NDArray[np.floating], across: NDArray[np.floating], *, sigma: float) -> FloatArray:
    """A Gaussian of height 1, float32 (h, w), of the distances from its centre along both axes."""
    squared = down[:, None] ** 2 + across**2
    bell: FloatArray = np.exp(-squared / (2 * sigma**2)).astype(np.float32)
    return bell


def _blurred(values: FloatArray, sigma: float) -> FloatArray:
    return np.asarray(cv2.GaussianBlur(values, (0, 0), sigma, borderType=cv2.BORDER_REFLECT), np.float32)


# --- by severity


def low_resolution(mask: Mask, rng: Rng, severity: float) -> Mask:
    """Shrink the mask to a grid of a few cells, add noise, enlarge, threshold: masks like those of mask heads."""
    small, enlarge = _shrunk(mask, rng, cells=rng.uniform(*defects.MASK_CELLS) / severity)
    noisy = small + defects.CELL_NOISE * severity * rng.standard_normal(small.shape)
    coarse: Mask = enlarge(noisy) > rng.uniform(*defects.MASK_LEVEL)
    return coarse


def biased_activation(mask: Mask, rng: Rng, severity: float) -> Mask:
    """Threshold an activation of low resolution, stronger in one part of the object, with some noise everywhere."""
    heat = _excited(mask, rng, cells=np.exp(rng.uniform(*np.log(defects.ACTIVATION_CELLS))) / severity)
    height, width = mask.shape
    y, x = np.divmod(rng.choice(np.flatnonzero(mask)), width)
    reach = defects.ACTIVATION_REACH * np.sqrt(np.pi) * radius(mask)
    bell = _bell(np.arange(height) - float(y), np.arange(width) - float(x), sigma=reach)
    heat = heat * (1 + rng.uniform(*defects.ACTIVATION_BIAS) * bell)
    noise = smooth_noise(mask.shape, rng, cells=int(rng.integers(*defects.ACTIVATION_BUMPS)))
    heat = heat + rng.uniform(*defects.ACTIVATION_LEAK) * heat.max() * noise
    coarse: Mask = heat > rng.uniform(*defects.ACTIVATION_LEVEL) * heat.max()
    return coarse


def _shrunk(
    mask: Mask, rng: Rng, *, cells: float
) -> tuple[NDArray[np.float64], Callable[[NDArray[np.float64]], NDArray[np.float64]]]:
    """Shrink a mask to a grid of about so many cells along the object.

    Returns:
        float64 (h, w), the mask on the grid, and what enlarges such a grid to the mask's own shape.
    """
    extent = _extent(mask)
    # With more cells than pixels, some cells would cover none.
    counts = [round(min(max(side * cells / extent, 2), defects.MOST_CELLS, max(side, 2))) for side in mask.shape]
    blocks = rng.random() < defects.BLOCKS
    (to_rows, rows), (to_columns, columns) = (
        _resizing(side, count, blocks=blocks) for side, count in zip(mask.shape, counts, strict=True)
    )
    return to_rows @ mask.astype(np.float64) @ to_columns.T, lambda small: rows @ small @ columns.T


def _resizing(side: int, cells: int, *, blocks: bool) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Matrices that shrink a line of pixels to cells, (cells, side), and that enlarge it again, (side, cells)."""
    width = side / cells
    pixel, number = np.arange(side) + 0.5, np.arange(cells)
    shrink = np.maximum(1 - np.abs(pixel - (number[:, None] + 0.5) * width) / width, 0)  # averages and blurs at once
    at = np.clip(pixel / width - 0.5, 0, cells - 1)
    enlarge = np.maximum(1 - np.abs((at.round() if blocks else at)[:, None] - number), 0)
    return shrink / shrink.sum(1, keepdims=True), enlarge


def _excited(mask: Mask, rng: Rng, *, cells: float) -> NDArray[np.float64]:
    """Blur a mask onto a grid of about so many cells along the object, which lies anywhere, and enlarge it again.

    The unit is arbitrary.
    """
    width = max(_extent(mask) / cells, max(mask.shape) / (defects.MOST_CELLS - 3))
    blur, blocks = rng.uniform(*defects.ACTIVATION_BLUR), rng.random() < defects.BLOCKS
    rows, columns = (_through_cells(side, width, rng.random(), blur=blur, blocks=blocks) for side in mask.shape)
    heat: NDArray[np.float64] = rows @ mask.astype(np.float64) @ columns.T
    return heat


def _through_cells(side: int, width: float, phase: float, *, blur: float, blocks: bool) -> NDArray[np.float64]:
    """Matrix (side, side) that blurs a line of pixels onto cells of some width and enlarges them again.

    Args:
        phase: The fraction of the first cell that lies before the first pixel.
        blur: Standard deviation in cells.
    """
    at = (np.arange(side) + 0.5) / width + phase
    centre = np.arange(-1, math.ceil(at[-1]) + 1) + 0.5
    shrink = np.exp(-(((at - centre[:, None]) / blur) ** 2) / 2)
    nearest = np.floor(at) + 0.5
    enlarge: NDArray[np.float64] = np.maximum(1 - np.abs((nearest if blocks else at)[:, None] - centre), 0)
    return enlarge @ shrink


def _extent(mask: Mask) -> int:
    """The longer side of the mask's box in pixels."""
    return int(max(1, mask.any(0).sum(), mask.any(1).sum()))


def mask_head(mask: Mask, rng: Rng, severity: float) -> Mask:
    """The mask on a square grid over its box, 28 or 56 cells a side at severity 1, nearest neighbour there and back."""
    box = bounding_box(mask)
    if box is None:
        return mask.copy()
    x0, y0, x1, y1 = box
    cells = max(2, round(int(rng.choice(MASK_HEAD_CELLS)) / severity))
    inside = mask[y0:y1, x0:x1].astype(np.uint8)
    grid = cv2.resize(inside, (cells, cells), interpolation=cv2.INTER_NEAREST)
    coarse = np.zeros_like(mask)
    coarse[y0:y1, x0:x1] = cv2.resize(grid, (x1 - x0, y1 - y0), interpolation=cv2.INTER_NEAREST).astype(bool)
    return coarse
