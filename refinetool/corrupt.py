"""Coarse masks made from good ones, for training and for measuring refiners where no real coarse masks exist.

Every generator takes a good mask, bool (H, W), a NumPy generator, and a `severity` around 1; it returns a new mask of
the same shape and never changes its input. Lengths scale with the object: r is the radius of a disc of its area. The
defects are inconsistent with the image and biased (grown, shifted, missing or leaking pieces), because symmetric
noise could be undone by smoothing alone and would teach a model nothing about images.
"""

from collections.abc import Callable
from typing import TypeAlias

import cv2
import numpy as np

from refinetool.masks import iou
from refinetool.records import BoolArray, FloatArray, ImageArray, IntArray

Generator: TypeAlias = np.random.Generator
Corruption: TypeAlias = Callable[[BoolArray, Generator, float], BoolArray]

MIN_AREA_PX = 10
"""A result smaller than this is no coarse mask any more and is drawn again."""


def superpixel_labels(image: ImageArray, *, count: int, compactness: float) -> IntArray:
    """SLIC superpixels of an image, uint8 (H, W, 3) RGB: int64 (H, W) labels from 0 (Achanta et al. 2012)."""
    from skimage.segmentation import slic

    labels: IntArray = slic(image, n_segments=count, compactness=compactness, start_label=0).astype(np.int64)
    return labels


def superpixel_defects(mask: BoolArray, rng: Generator, severity: float, *, labels: IntArray) -> BoolArray:
    """Toggle whole superpixels, as the DAVIS-585 set was made: at the boundary (65 %), inside (25 %), outside (10 %).

    The number of toggled superpixels grows with severity; the band is 6 % of r wide on each side of the boundary.
    """
    depth = signed_depth(mask)
    width = max(1.5, 0.06 * radius(mask))
    bands = (np.abs(depth) <= width, depth > width, (depth < -width) & (depth > -4 * radius(mask)))
    coarse = mask.copy()
    for _ in range(1 + rng.poisson(2.5 * severity)):
        band = bands[rng.choice(3, p=(0.65, 0.25, 0.10))]
        candidates = np.flatnonzero(band) if band.any() else np.flatnonzero(mask)
        pixel = rng.choice(candidates)
        coarse[labels == labels.flat[pixel]] = not coarse.flat[pixel]
    return coarse


def superpixel_vote(mask: BoolArray, rng: Generator, severity: float, *, labels: IntArray) -> BoolArray:
    """Snap the mask to superpixels: one is foreground if enough of it is, the share being drawn around one half."""
    total = np.bincount(labels.ravel())
    inside = np.bincount(labels.ravel(), weights=mask.ravel(), minlength=len(total))
    share = inside / np.maximum(total, 1) + 0.15 * severity * rng.standard_normal(len(total)) * (inside > 0)
    voted: BoolArray = (share > 0.5)[labels]
    return voted


def boundary_noise(mask: BoolArray, rng: Generator, severity: float) -> BoolArray:
    """Move the boundary in and out by smooth noise of up to about r / 4, with a bias to one side."""
    r = radius(mask)
    noise = smooth_noise(mask.shape, rng, cells=int(rng.integers(4, 20)))
    return _shifted_boundary(mask, 0.20 * r * severity * noise + np.float32(0.08 * r * severity * rng.normal()))


def grow_or_shrink(mask: BoolArray, rng: Generator, severity: float) -> BoolArray:
    """Move the whole boundary out or in by 8 to 25 % of r."""
    offset = rng.choice((-1, 1)) * rng.uniform(0.08, 0.25) * radius(mask) * severity
    noise = 0.04 * radius(mask) * smooth_noise(mask.shape, rng, cells=6)
    return _shifted_boundary(mask, np.float32(offset) + noise)


def low_resolution(mask: BoolArray, rng: Generator, severity: float) -> BoolArray:
    """Blur, shrink to a grid of a few cells per object, add noise, enlarge: what heat maps and mask heads give."""
    _, _, *box_sides = cv2.boundingRect(mask.astype(np.uint8))
    height, width = mask.shape
    cells_per_object = rng.uniform(3.0, 12.0) / severity
    scale = max(cells_per_object / max(box_sides), 2.0 / min(height, width))
    grid = (max(2, round(width * scale)), max(2, round(height * scale)))
    soft = cv2.GaussianBlur(mask.astype(np.float32), (0, 0), max(0.5, 0.1 * radius(mask) * severity))
    small = cv2.resize(soft, grid, interpolation=cv2.INTER_AREA)
    small = small + rng.normal(0, 0.06 * severity, small.shape)
    how = cv2.INTER_NEAREST if rng.random() < 0.3 else cv2.INTER_LINEAR
    large = cv2.resize(small, (width, height), interpolation=how)
    coarse: BoolArray = large > rng.uniform(0.3, 0.6)
    return coarse


def coarse_polygon(mask: BoolArray, rng: Generator, severity: float) -> BoolArray:
    """Redraw each outline with few, slightly misplaced corners, as a person in a hurry does."""
    r = radius(mask)
    outlines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    canvas = np.zeros(mask.shape, np.uint8)
    for outline in outlines:
        corners = cv2.approxPolyDP(outline, r * rng.uniform(0.05, 0.25) * severity, True)
        if rng.random() < 0.25:
            corners = cv2.convexHull(outline)
        moved = corners + rng.normal(0, 0.05 * r * severity, corners.shape)
        cv2.fillPoly(canvas, [moved.round().astype(np.int32)], 1)
    return canvas.astype(bool)


def shift_and_scale(mask: BoolArray, rng: Generator, severity: float) -> BoolArray:
    """Shift, scale and shear the mask about its centre by a few percent."""
    height, width = mask.shape
    rows, columns = np.nonzero(mask)
    centre = np.array((columns.mean(), rows.mean()))
    linear = np.eye(2) + rng.normal(0, 0.06 * severity, (2, 2))
    offset = centre - linear @ centre + rng.normal(0, 0.12 * radius(mask) * severity, 2)
    matrix = np.hstack((linear, offset[:, None]))
    moved = cv2.warpAffine(mask.astype(np.uint8), matrix, (width, height), flags=cv2.INTER_NEAREST)
    return moved.astype(bool)


def holes_and_islands(mask: BoolArray, rng: Generator, severity: float) -> BoolArray:
    """Punch blob-shaped holes into the mask and drop blobs beside it."""
    noise = smooth_noise(mask.shape, rng, cells=int(rng.integers(6, 16)))
    level = 1.9 - 0.5 * severity
    beside = signed_depth(mask) > -0.8 * radius(mask)
    coarse: BoolArray = (mask & (noise <= level)) | ((noise < -level) & beside)
    return coarse


def leak(mask: BoolArray, rng: Generator, severity: float, *, neighbour: BoolArray) -> BoolArray:
    """Let the mask run over into a neighbouring region, as far as a draw allows."""
    reach = signed_depth(mask) > -radius(mask) * rng.uniform(0.2, 1.0) * severity
    coarse: BoolArray = mask | (neighbour & reach)
    return coarse


def corrupt(
    mask: BoolArray,
    rng: Generator,
    *,
    labels: IntArray | None,
    neighbour: BoolArray | None,
    low: float,
    high: float,
    tries: int,
) -> BoolArray:
    """One coarse mask from one or two random generators, its IoU with the good mask in [low, high] where possible.

    Args:
        mask: The good mask, bool (H, W), not empty.
        labels: Superpixels of the image, int64 (H, W), for the superpixel defects; None leaves those out.
        neighbour: Another region, bool (H, W), to leak into; None leaves leaks out.
        tries: Draws before the closest attempt is returned.
    """
    kinds = list(_PLAIN)
    if labels is not None:
        kinds += [(0.34, lambda m, g, s: superpixel_defects(m, g, s, labels=labels))]
        kinds += [(0.08, lambda m, g, s: superpixel_vote(m, g, s, labels=labels))]
    if neighbour is not None:
        kinds += [(0.06, lambda m, g, s: leak(m, g, s, neighbour=neighbour))]
    weights = np.array([weight for weight, _ in kinds])
    weights /= weights.sum()

    best, distance = mask, np.inf
    for _ in range(tries):
        severity = rng.uniform(0.4, 1.7)
        coarse = kinds[rng.choice(len(kinds), p=weights)][1](mask, rng, severity)
        if rng.random() < 0.3 and coarse.sum() >= MIN_AREA_PX:
            coarse = kinds[rng.choice(len(kinds), p=weights)][1](coarse, rng, 0.6 * severity)
        if coarse.sum() < MIN_AREA_PX:
            continue
        reached = iou(coarse, mask)
        miss = max(low - reached, reached - high, 0.0)
        if miss < distance:
            best, distance = coarse, miss
        if miss == 0:
            break
    return best


_PLAIN: tuple[tuple[float, Corruption], ...] = (
    (0.18, boundary_noise),
    (0.08, grow_or_shrink),
    (0.18, low_resolution),
    (0.08, coarse_polygon),
    (0.05, shift_and_scale),
    (0.05, holes_and_islands),
)
"""Shares of the generators that need nothing but the mask."""


def radius(mask: BoolArray) -> float:
    """Radius in pixels of a disc of the mask's area, plus one so that lengths made from it never vanish."""
    return float(np.sqrt(mask.sum() / np.pi)) + 1.0


def signed_depth(mask: BoolArray) -> FloatArray:
    """Distance in pixels to the boundary, float32 (H, W): positive inside, negative outside (accurate to about 2 %)."""
    inside = mask.astype(np.uint8)
    if mask.all() or not mask.any():
        return np.full(mask.shape, 50.0 if mask.all() else -50.0, np.float32)
    depth: FloatArray = cv2.distanceTransform(inside, cv2.DIST_L2, 3) - cv2.distanceTransform(
        1 - inside, cv2.DIST_L2, 3
    )
    return depth


def smooth_noise(shape: tuple[int, ...], rng: Generator, *, cells: int) -> FloatArray:
    """Zero-mean noise of unit variance, float32 (H, W), with about `cells` bumps along each side."""
    grid = rng.standard_normal((cells, cells)).astype(np.float32)
    noise = cv2.resize(grid, (shape[1], shape[0]), interpolation=cv2.INTER_CUBIC)
    scaled: FloatArray = (noise / (noise.std() + 1e-6)).astype(np.float32)
    return scaled


def _shifted_boundary(mask: BoolArray, offset: FloatArray | float) -> BoolArray:
    shifted: BoolArray = signed_depth(mask) + offset > 0
    return shifted
