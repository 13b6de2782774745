"""Mines the prompts of a segmenter from coarse masks ("prompt excavation", SAMRefiner, section 3).

The prompts of a region are a point deep inside it, a point deep in the background of its box, the box, and a mask
prompt that fades from the centre of the region. `excavate` makes the prompts that depend on the mask alone;
`expand_boxes` then widens boxes where the features beside them are similar to the region. Each step is a function of
one mask, applied to N.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal, TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray

from refinetool import release_prompts
from refinetool.masks import distance_inside, tight_box
from refinetool.records import (
    ABSENT,
    BACKGROUND,
    FOREGROUND,
    Box,
    FloatArray,
    FloatMaps,
    Mask,
    Masks,
    Point,
    Prompts,
    Size,
)
from refinetool.settings import PromptSettings

Depth: TypeAlias = Callable[[Mask], FloatArray]
"""bool (H, W) -> float32 (H, W): the distance of each mask pixel to the background, 0 outside the mask."""

LONGEST_GRID_SIDE = 1024
"""Mask prompts of larger views are made on a coarser grid: no supported model reads them finer than 256."""
LEAST_FADE = 1e-6
"""Without a bound, a Gaussian mask is 0 far from its centre, and parts of the object there look like background."""


def excavate(masks: Masks, *, settings: PromptSettings, seeds: Sequence[Sequence[int]]) -> Prompts:
    """Mine the prompts of N regions from their masks alone; boxes are still tight.

    Args:
        masks: bool (N, H, W) over the view, none of them empty.
        seeds: One per region, at least 0, for random points only. A random point depends on nothing but its mask and
            seed, so a batch of N gives the same points as N single calls.

    Returns:
        P = 0 to 2 points per region: the positive and the negative one, if they are switched on. A negative point is
        labelled absent (-1) where the mask fills its box. Mask prompts are on a grid whose longer side is at most 1024.
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


def expand_boxes(prompts: Prompts, masks: Masks, similarity: FloatMaps, *, settings: PromptSettings) -> Prompts:
    """Widen the tight boxes of `excavate` where the image beside them is similar to the region.

    Args:
        prompts: N regions. Without boxes they are returned unchanged.
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
    """Return the measure of depth in a mask: exact Euclidean distance, or the release's chamfer distance."""
    if settings.release:
        return release_prompts.chamfer_inside
    return partial(distance_inside, border_is_background=settings.border_is_background)


# --- points


def deepest_point(mask: Mask, box: Box, *, depth: Depth) -> Point:
    """Find the pixel that lies deepest in the mask, the first in row-major order on ties (SAMRefiner, section 3).

    Args:
        mask: bool (H, W), not empty.
        box: Its tight box.
        depth: How deep each pixel lies: see `depth_measure`.

    Returns:
        (x, y).
    """
    inside = _depth_in_box(mask, box, depth=depth)
    y, x = np.unravel_index(inside.argmax(), inside.shape)
    return box[0] + int(x), box[1] + int(y)


def background_point(mask: Mask, box: Box) -> Point | None:
    """Find the background pixel of the box that is farthest from the mask, the first in row-major order on ties.

    Args:
        mask: bool (H, W), not empty.
        box: Contains the whole mask, so there is no closer foreground outside it.

    Returns:
        (x, y), or None where the mask fills the box.
    """
    x0, y0, x1, y1 = box
    distance = distance_inside(~mask[y0:y1, x0:x1], border_is_background=False)
    if not distance.any():
        return None
    y, x = np.unravel_index(distance.argmax(), distance.shape)
    return x0 + int(x), y0 + int(y)


def random_point(mask: Mask, *, rng: np.random.Generator) -> Point:
    """Draw a pixel of a non-empty mask, each with the same probability."""
    inside = np.flatnonzero(mask)
    y, x = np.unravel_index(rng.choice(inside), mask.shape)
    return int(x), int(y)


def box_centre(box: Box) -> Point:
    """Return the centre pixel of a box (upper left of the centre if a side is even), inside the mask or not."""
    x0, y0, x1, y1 = box
    return (x0 + x1 - 1) // 2, (y0 + y1 - 1) // 2


def _positive_point(mask: Mask, box: Box, *, depth: Depth, settings: PromptSettings, seed: Sequence[int]) -> Point:
    match settings.point:
        case "distance":
            return deepest_point(mask, box, depth=depth)
        case "random":
            return random_point(mask, rng=np.random.default_rng(seed))
        case "box-center":
            return box_centre(box)


def _depth_in_box(mask: Mask, box: Box, *, depth: Depth) -> FloatArray:
    """Return the exact depth within the tight box: the nearest background is in the box or in the pixels around it.

    Where the box touches the image border there are no pixels around it, and `depth` decides how the border counts.
    """
    x0, y0, x1, y1 = box
    left, top = max(x0 - 1, 0), max(y0 - 1, 0)
    return depth(mask[top : y1 + 1, left : x1 + 1])[y0 - top : y1 - top, x0 - left : x1 - left]


# --- boxes


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
    """Widen a box towards pixels that are similar to the region (context-aware elastic box, SAMRefiner eq. 1 and 2).

    Beside each edge there is a strip as wide as a step and as long as the edge. The edge moves to the far side of its
    strip if more than a fraction `threshold` of the strip's pixels are similar. All four edges are tested on the same
    box, then moved together; strips are clipped at the image border.

    Args:
        box: The region's tight box in the view.
        similarity: float32 (h, w) cosine on a grid that covers exactly the view, read bilinearly between cell centres.
        size: (H, W) of the view.
        threshold: The paper's lambda.
        min_similarity: Cosine similarity above which a pixel counts as similar.
        step: Width of a strip as a fraction of the box's side across it, rounded to whole pixels (half a pixel up).
        step_px: Maximum width of a strip, in pixels.
        rounds: How often the edges are tested; each round starts from the box of the previous one.
    """
    height, width = size

    def is_similar(x0: int, y0: int, x1: int, y1: int) -> bool:
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
            left if is_similar(left, y0, x0, y1) else x0,
            top if is_similar(x0, top, x1, y0) else y0,
            right if is_similar(x1, y0, right, y1) else x1,
            bottom if is_similar(x0, y1, x1, bottom) else y1,
        )
    return box


def sample_bilinear(grid: FloatArray, box: Box, *, size: Size) -> NDArray[np.float64]:
    """Sample a coarse map at the pixels of a box, as if it had been upsampled to the whole view.

    Args:
        grid: float (h, w) over a view of `size`; cell and pixel centres are half a step from their edges, and beyond
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
    """Return the cells before and after each pixel, and its position between them in 0..1."""
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
    """Return a box as used in prompts: half-open, or ending at its last row and column as in the release."""
    x0, y0, x1, y1 = box
    return (x0, y0, x1 - 1, y1 - 1) if settings.release else box


# --- the mask prompt


def mask_prompt(mask: Mask, point: Point, *, settings: PromptSettings) -> FloatArray:
    """Make the Gaussian mask of a region with the parameters of the settings; see `gaussian_mask`."""
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
    mask: Mask,
    point: Point,
    *,
    shape: Literal["radial", "distance"],
    amplitude: float,
    span: float,
    background: Literal["negative", "zero"],
    depth: Depth,
) -> FloatArray:
    """Turn a mask into logits that fade from its centre (SAMRefiner eq. 3).

    With |M| the area in pixels, the foreground is one of these, and never less than `LEAST_FADE` times `amplitude`:

    - radial: `amplitude` * exp(-r² / (|M| * span)), r the distance to the point;
    - distance: `amplitude` * exp(-(deepest - d)² / (|M| / span)), d the depth in the mask, as in the authors' release.

    Args:
        mask: bool (H, W) over the view, not empty.
        point: The positive point, (x, y); only `radial` uses it.
        background: Value outside the mask: -`amplitude`, or 0 as in the paper.
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
    np.copyto(
        logits[y0:y1, x0:x1], amplitude * np.maximum(fade, LEAST_FADE), where=covered[y0:y1, x0:x1], casting="same_kind"
    )
    return logits


def prompt_grid(size: Size) -> Size:
    """Return (h, w) of the grid of a mask prompt: that of the view, or coarser if its longer side exceeds 1024."""
    height, width = size
    shrink = min(1.0, LONGEST_GRID_SIDE / max(size))
    return max(1, round(height * shrink)), max(1, round(width * shrink))


def _on_prompt_grid(mask: Mask) -> Mask:
    """Return the mask on its prompt grid: cells whose centre it covers; if there are none, the cells it touches."""
    height, width = mask.shape
    grid = prompt_grid((height, width))
    if grid == mask.shape:
        return mask
    covered: Mask = cv2.resize(mask.view(np.uint8), grid[::-1], interpolation=cv2.INTER_NEAREST_EXACT).view(np.bool_)
    if not covered.any():
        ys, xs = np.nonzero(mask)
        covered[ys * grid[0] // height, xs * grid[1] // width] = True
    return covered
