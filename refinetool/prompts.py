"""Prompt excavation: what to ask a segmenter about a coarse mask (SAMRefiner, section 3).

One region is asked about with a point deep inside it, a point deep in the background of its box, the box, and a mask
prompt that fades from the centre of the region. `excavate` makes what the mask alone gives; `expand_boxes` then widens
boxes where the features beside them resemble the region. Each step is a function of one mask, applied to N.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray

from refinetool import release_prompts
from refinetool.masks import bounding_box, distance_inside
from refinetool.records import (
    ABSENT,
    BACKGROUND,
    FOREGROUND,
    BoolArray,
    Box,
    FloatArray,
    Point,
    Prompts,
    Size,
)
from refinetool.settings import PromptSettings

Depth: TypeAlias = Callable[[BoolArray], FloatArray]
"""bool (H, W) -> float32 (H, W): how far each mask pixel is from the background, 0 outside the mask."""

LONGEST_GRID_SIDE = 1024
"""Mask prompts of larger views are made on a coarser grid: no supported model reads them finer than 256."""


def excavate(masks: BoolArray, *, settings: PromptSettings, seeds: Sequence[Sequence[int]]) -> Prompts:
    """Mine the prompts of N regions from their masks alone; boxes are still tight.

    Args:
        masks: bool (N, H, W) over the view, none of them empty.
        seeds: One per region, at least 0, for random points only. A region's point depends on nothing else, so a batch
            equals singles.

    Returns:
        P = 0 to 2 points per region: the positive and the negative one, as far as they are switched on. A negative
        point is labelled absent (-1) where the mask fills its box. Masks lie on a grid whose longer side is at most
        1024.
    """
    depth = depth_measure(settings)
    find_negative = release_prompts.background_point if settings.release else background_point
    count = settings.use_point + settings.use_negative
    points = np.zeros((len(masks), count, 2), dtype=np.float32)
    labels = np.full((len(masks), count), ABSENT, dtype=np.int64)
    boxes = np.zeros((len(masks), 4), dtype=np.float32)
    logits = np.zeros((len(masks), *prompt_grid(masks.shape[1:])), dtype=np.float32) if settings.use_mask else None
    for n, (mask, seed) in enumerate(zip(masks, seeds, strict=True)):
        box = tight_box(mask)
        centre = _positive_point(mask, box, depth=depth, settings=settings, seed=seed)
        if settings.use_point:
            points[n, 0], labels[n, 0] = centre, FOREGROUND
        if settings.use_negative:
            negative = find_negative(mask, box)
            if negative is not None:
                points[n, -1], labels[n, -1] = negative, BACKGROUND
        boxes[n] = _corners(box, settings=settings)
        if logits is not None:
            logits[n] = mask_prompt(mask, centre, settings=settings)
    return Prompts(points=points, labels=labels, boxes=boxes if settings.use_box else None, masks=logits)


def expand_boxes(prompts: Prompts, masks: BoolArray, similarity: FloatArray, *, settings: PromptSettings) -> Prompts:
    """Widen the tight boxes of `excavate` where the picture beside them resembles the region.

    Args:
        prompts: N regions. Without boxes they come back as they are.
        masks: bool (N, H, W), the masks the prompts were mined from.
        similarity: float32 (N, h, w), cosine in -1..1 between the region's mean feature and each cell of a grid that
            covers exactly the view.

    Returns:
        The prompts with wider boxes, whatever `settings.box` says. With `weaken_expanded`, mask prompts of regions
        whose box grew have amplitude 1.
    """
    if prompts.boxes is None:
        return prompts
    boxes, logits = prompts.boxes.copy(), prompts.masks
    grew = np.zeros(len(prompts), dtype=np.bool_)
    for n, (mask, cosine) in enumerate(zip(masks, similarity, strict=True)):
        tight = tight_box(mask)
        wide = _stretched(tight, cosine, size=mask.shape, settings=settings)
        boxes[n] = _corners(wide, settings=settings)
        grew[n] = wide != tight
    if logits is not None and settings.weaken_expanded:
        logits = logits.copy()
        logits[grew] /= settings.gaussian_amplitude
    return Prompts(points=prompts.points, labels=prompts.labels, boxes=boxes, masks=logits)


def depth_measure(settings: PromptSettings) -> Depth:
    """How the depth of a pixel in a mask is measured: exact Euclidean, or as the release does."""
    if settings.release:
        return release_prompts.chamfer_inside
    return partial(distance_inside, border_is_background=settings.border_is_background)


# --- points


def foreground_point(mask: BoolArray, *, border_is_background: bool) -> Point | None:
    """Find the pixel that lies deepest in the mask, the first in row-major order on ties.

    Args:
        mask: bool (H, W).
        border_is_background: Whether the frame of the image bounds the mask. A mask that fills the image is always
            bounded by it.

    Returns:
        (x, y), or None for an empty mask.
    """
    box = bounding_box(mask)
    if box is None:
        return None
    return _deepest(mask, box, depth=partial(distance_inside, border_is_background=border_is_background))


def background_point(mask: BoolArray, box: Box) -> Point | None:
    """Find the background pixel of the box that is farthest from the mask, the first in row-major order on ties.

    Args:
        mask: bool (H, W), not empty.
        box: Contains the whole mask, so no foreground outside it can be nearer.

    Returns:
        (x, y), or None where the mask fills the box.
    """
    x0, y0, x1, y1 = box
    distance = distance_inside(~mask[y0:y1, x0:x1], border_is_background=False)
    if not distance.any():
        return None
    y, x = np.unravel_index(distance.argmax(), distance.shape)
    return x0 + int(x), y0 + int(y)


def random_point(mask: BoolArray, *, rng: np.random.Generator) -> Point:
    """Draw a pixel of the mask, which is not empty, each with the same probability."""
    inside = np.flatnonzero(mask)
    y, x = np.unravel_index(rng.choice(inside), mask.shape)
    return int(x), int(y)


def box_centre(box: Box) -> Point:
    """The pixel in the middle of a box (upper left of the middle if a side is even), inside the mask or not."""
    x0, y0, x1, y1 = box
    return (x0 + x1 - 1) // 2, (y0 + y1 - 1) // 2


def _positive_point(mask: BoolArray, box: Box, *, depth: Depth, settings: PromptSettings, seed: Sequence[int]) -> Point:
    match settings.point:
        case "distance":
            return _deepest(mask, box, depth=depth)
        case "random":
            return random_point(mask, rng=np.random.default_rng(seed))
        case "box-center":
            return box_centre(box)


def _deepest(mask: BoolArray, box: Box, *, depth: Depth) -> Point:
    inside = _depth_in_box(mask, box, depth=depth)
    y, x = np.unravel_index(inside.argmax(), inside.shape)
    return box[0] + int(x), box[1] + int(y)


def _depth_in_box(mask: BoolArray, box: Box, *, depth: Depth) -> FloatArray:
    """Depth within the tight box, exact: the nearest background lies in the box or in the ring of pixels around it.

    Where the box ends at the frame there is no ring, so the frame counts for what `depth` takes it for.
    """
    x0, y0, x1, y1 = box
    left, top = max(x0 - 1, 0), max(y0 - 1, 0)
    return depth(mask[top : y1 + 1, left : x1 + 1])[y0 - top : y1 - top, x0 - left : x1 - left]


# --- boxes


def tight_box(mask: BoolArray) -> Box:
    """The smallest box, half-open, around a mask, bool (H, W), that is not empty."""
    box = bounding_box(mask)
    assert box is not None, "empty masks are kept back before prompts are mined"
    return box


def elastic_box(
    box: Box,
    similarity: FloatArray,
    *,
    size: Size,
    threshold: float,
    min_similarity: float,
    step: float,
    step_px: float,
    rounds: int,
) -> Box:
    """Widen a box towards pixels that resemble the region (context-aware elastic box, SAMRefiner eq. 1 and 2).

    Beside each edge lies a strip as wide as a step and as long as the edge. The edge moves to the far side of its strip
    if more than a fraction `threshold` of the strip's pixels is similar. All four edges are tested on the same box,
    then moved together; strips are cut at the frame.

    Args:
        box: The region's tight box in the view.
        similarity: float32 (h, w) cosine on a grid that covers exactly the view, read bilinearly between cell centres.
        size: (H, W) of the view.
        threshold: The paper's lambda.
        min_similarity: Cosine above which a pixel is similar.
        step: Width of a strip as a share of the box's side across it, rounded to whole pixels (half a pixel up) ...
        step_px: ... and at most this.
        rounds: How often the edges are tested; each round starts from the box of the one before.
    """
    height, width = size

    def alike(x0: int, y0: int, x1: int, y1: int) -> bool:
        if x0 >= x1 or y0 >= y1:
            return False
        similar = sample_bilinear(similarity, (x0, y0, x1, y1), size=size) > min_similarity
        return float(similar.mean()) > threshold

    for _ in range(rounds):
        x0, y0, x1, y1 = box
        step_x, step_y = _step(x1 - x0, step=step, step_px=step_px), _step(y1 - y0, step=step, step_px=step_px)
        left, right = max(x0 - step_x, 0), min(x1 + step_x, width)
        top, bottom = max(y0 - step_y, 0), min(y1 + step_y, height)
        box = (
            left if alike(left, y0, x0, y1) else x0,
            top if alike(x0, top, x1, y0) else y0,
            right if alike(x1, y0, right, y1) else x1,
            bottom if alike(x0, y1, x1, bottom) else y1,
        )
    return box


def sample_bilinear(grid: FloatArray, box: Box, *, size: Size) -> NDArray[np.float64]:
    """Read a coarse map at the pixels of a box, as if it had been upsampled to the whole view.

    Args:
        grid: float (h, w) over a view of `size`; cell and pixel centres lie half a step from their edges, and beyond
            the outermost cell centres the map is constant.
        box: (x0, y0, x1, y1) in the view, half-open.

    Returns:
        float64 (y1 - y0, x1 - x0).
    """
    x0, y0, x1, y1 = box
    upper, lower, down = _between_cells(np.arange(y0, y1), cells=grid.shape[0], pixels=size[0])
    left, right, across = _between_cells(np.arange(x0, x1), cells=grid.shape[1], pixels=size[1])
    rows = grid[upper] * (1 - down[:, None]) + grid[lower] * down[:, None]
    sampled: NDArray[np.float64] = rows[:, left] * (1 - across) + rows[:, right] * across
    return sampled


def _between_cells(
    positions: NDArray[np.int64], *, cells: int, pixels: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """The cells before and after each pixel, and how far it lies from the first to the second."""
    at = np.clip((positions + 0.5) * (cells / pixels) - 0.5, 0, cells - 1)
    before = np.floor(at).astype(np.int64)
    return before, np.minimum(before + 1, cells - 1), at - before


def _step(side: int, *, step: float, step_px: float) -> int:
    return int(min(step * side, step_px) + 0.5)


def _stretched(box: Box, similarity: FloatArray, *, size: Size, settings: PromptSettings) -> Box:
    if settings.release:
        height, width = size
        full_size = cv2.resize(similarity, (width, height), interpolation=cv2.INTER_LINEAR)
        return release_prompts.stretch_box(
            box,
            full_size > settings.elastic_similarity,
            threshold=settings.elastic_threshold,
            step=settings.elastic_step,
            step_px=settings.elastic_step_px,
        )
    return elastic_box(
        box,
        similarity,
        size=size,
        threshold=settings.elastic_threshold,
        min_similarity=settings.elastic_similarity,
        step=settings.elastic_step,
        step_px=settings.elastic_step_px,
        rounds=settings.elastic_rounds,
    )


def _corners(box: Box, *, settings: PromptSettings) -> Box:
    """A box as it goes into prompts: the release has its last row and column where others have the end."""
    x0, y0, x1, y1 = box
    return (x0, y0, x1 - 1, y1 - 1) if settings.release else box


# --- the mask prompt


def mask_prompt(mask: BoolArray, point: Point, *, settings: PromptSettings) -> FloatArray:
    """The Gaussian mask of a region as the settings want it; see `gaussian_mask`."""
    return gaussian_mask(
        mask,
        point,
        shape=settings.gaussian_shape,
        amplitude=settings.gaussian_amplitude,
        span=settings.gaussian_span,
        background=settings.gaussian_background,
        depth=depth_measure(settings),
    )


def gaussian_mask(
    mask: BoolArray,
    point: Point,
    *,
    shape: Literal["radial", "distance"],
    amplitude: float,
    span: float,
    background: Literal["negative", "zero"],
    depth: Depth,
) -> FloatArray:
    """Turn a mask into logits that fade from its centre (SAMRefiner eq. 3).

    With |M| the area in pixels, the foreground is

    - radial: `amplitude` * exp(-r² / (|M| * span)), r the distance to the point;
    - distance: `amplitude` * exp(-(deepest - d)² / (|M| / span)), d the depth in the mask, as in the authors' release.

    Args:
        mask: bool (H, W) over the view, not empty.
        point: The positive point, (x, y); only `radial` looks at it.
        background: What lies outside the mask: -`amplitude`, or 0 as in the paper.
        depth: Only `distance` uses it.

    Returns:
        float32 (h, w) on `prompt_grid`; on a grid coarser than the view, values are taken at cell centres.
    """
    covered = _on_prompt_grid(mask)
    pixels_per_cell = mask.shape[0] / covered.shape[0], mask.shape[1] / covered.shape[1]
    area = int(np.count_nonzero(mask))
    box = tight_box(covered)
    x0, y0, x1, y1 = box
    if shape == "radial":
        exponents = [
            ((np.arange(first, last) + 0.5) * scale - 0.5 - centre) ** 2 / (area * span)
            for first, last, scale, centre in (
                (y0, y1, pixels_per_cell[0], point[1]),
                (x0, x1, pixels_per_cell[1], point[0]),
            )
        ]
        fade = np.outer(np.exp(-exponents[0]), np.exp(-exponents[1]))
    else:
        inside = _depth_in_box(covered, box, depth=depth) * max(pixels_per_cell)
        fade = np.exp(-((inside.max() - inside) ** 2) * (span / area))
    logits = np.full(covered.shape, -amplitude if background == "negative" else 0.0, dtype=np.float32)
    np.copyto(logits[y0:y1, x0:x1], amplitude * fade, where=covered[y0:y1, x0:x1], casting="same_kind")
    return logits


def prompt_grid(size: Size) -> Size:
    """(h, w) of the grid a mask prompt is made on: the view's own, or coarser if its longer side exceeds 1024."""
    height, width = size
    shrink = min(1.0, LONGEST_GRID_SIDE / max(size))
    return max(1, round(height * shrink)), max(1, round(width * shrink))


def _on_prompt_grid(mask: BoolArray) -> BoolArray:
    """The mask on its prompt grid: cells whose centre it covers; if there are none, the cells it touches."""
    height, width = mask.shape
    grid = prompt_grid((height, width))
    if grid == mask.shape:
        return mask
    covered: BoolArray = cv2.resize(mask.view(np.uint8), grid[::-1], interpolation=cv2.INTER_NEAREST_EXACT).view(
        np.bool_
    )
    if not covered.any():
        ys, xs = np.nonzero(mask)
        covered[ys * grid[0] // height, xs * grid[1] // width] = True
    return covered
