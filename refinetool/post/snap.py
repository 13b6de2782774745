"""Edge snapping: moves the border of a mask to nearby colour edges, at the resolution of the image.

The guided filter approximates a mask, in every small window, by a linear function of the colours (He, Sun and Tang,
"Guided Image Filtering", TPAMI 2013, colour guide). Where colours have an edge, so has the result; where they are flat,
the result is the mask averaged twice.

Axes: C = 3 colours, H W pixels of the image or of a crop of it.
"""

from dataclasses import replace
from typing import TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray

from refinetool.masks import bounding_box, disc_radius
from refinetool.records import FloatArray, ImageArray, Mask, Proposal
from refinetool.settings import SnapSettings

Planes: TypeAlias = NDArray[np.float64]
"""float64 (H, W). A variance is the difference of two means, for which float32 is too imprecise in flat regions."""

DENSE_RADIUS_PX = 32
"""From twice this radius on, windows are fitted on a reduced grid where the radius is about this many cells (He and
Sun, "Fast Guided Filter", 2015), because averages over so many pixels vary slowly. With a mask as large as a
12-megapixel photograph the process needs 0.7 GB instead of 3.0 GB, and a fifth of the time."""

STRIP_ROWS = 256
"""Rows at a time of what is computed pixel by pixel; affects only memory."""


def snap_to_edges(proposal: Proposal, *, settings: SnapSettings) -> Proposal:
    """Move the border of a proposed mask to colour edges."""
    if not proposal.mask.any():
        return proposal
    moved = guided_snap(proposal.image, proposal.mask, radius_share=settings.radius, epsilon=settings.epsilon)
    return replace(proposal, mask=moved)


def guided_snap(image: ImageArray, mask: Mask, *, radius_share: float, epsilon: float) -> Mask:
    """Move the border of a mask to where the output of the guided filter crosses 0.5.

    Only the mask's box and the filter's reach around it are computed. The result equals that on the whole image:
    exactly for radii below twice DENSE_RADIUS_PX, otherwise up to the accuracy of the reduced grid.

    Args:
        image: uint8 (H, W, 3) RGB.
        mask: bool (H, W), same frame.
        radius_share: Filter radius as a fraction of the radius of a disc of the mask's area; at least one pixel.
        epsilon: Colour variance on a 0..1 scale below which a window counts as flat.

    Returns:
        bool (H, W), a new array; empty for an empty mask, and possibly for one thinner than the filter.
    """
    snapped = np.zeros_like(mask)
    box = bounding_box(mask)
    if box is None:
        return snapped
    radius_px = snap_radius(mask, radius_share=radius_share)
    # A pixel uses windows up to one radius away, which use pixels up to one radius further: the output is zero beyond
    # twice the radius, and nonzero output depends on pixels up to twice the radius further.
    reach_px = 4 * radius_px
    x0, y0, x1, y1 = box
    crop = slice(max(0, y0 - reach_px), y1 + reach_px), slice(max(0, x0 - reach_px), x1 + reach_px)
    moved = guided_filter(image[crop], mask[crop], radius_px=radius_px, epsilon=epsilon) > 0.5
    snapped[crop] = without_new_pieces(moved, mask[crop])
    return snapped


def without_new_pieces(snapped: Mask, mask: Mask) -> Mask:
    """Drop islands outside the mask and fill holes inside it, because snapping should only move borders.

    Colours that occur on both sides of a border would otherwise leave specks and pinholes away from it.
    """
    return ~_pieces_that_touch(~_pieces_that_touch(snapped, mask), ~mask)


def _pieces_that_touch(mask: Mask, other: Mask) -> Mask:
    """Return the connected components (4-connectivity) of a mask that share a pixel with another mask."""
    count, labels = cv2.connectedComponents(mask.astype(np.uint8), connectivity=4)
    touching = np.zeros(count, dtype=np.bool_)
    touching[labels[mask & other]] = True
    kept: Mask = touching[labels]
    return kept


def snap_radius(mask: Mask, *, radius_share: float) -> int:
    """Return the filter radius in pixels for a mask."""
    return max(1, round(radius_share * disc_radius(mask)))


def guided_filter(
    image: ImageArray, values: Mask | FloatArray, *, radius_px: int, epsilon: float
) -> NDArray[np.float64]:
    """Filter a map so that its edges follow those of the image.

    In each window of side 2 r + 1 the map is fitted by a linear function of the colours, regularised by epsilon; each
    pixel is the mean of the fits of all windows that contain it. Windows are clipped at the image border.

    Args:
        image: uint8 (H, W, 3) RGB.
        values: bool or float (H, W), usually in 0..1: a mask or a probability.
        radius_px: r, at least 1.
        epsilon: Variance on a 0..1 colour scale.

    Returns:
        float64 (H, W); may leave the range of `values` slightly.
    """
    reduced_by = max(1, radius_px // DENSE_RADIUS_PX)
    height, width = values.shape
    grid = max(1, width // reduced_by), max(1, height // reduced_by)
    planes = _mean_fit(
        np.asarray(cv2.resize(image, grid, interpolation=cv2.INTER_AREA), dtype=np.uint8),
        np.asarray(cv2.resize(values.astype(np.float64), grid, interpolation=cv2.INTER_AREA), dtype=np.float64),
        radius_px=round(radius_px / reduced_by),
        epsilon=epsilon,
    )
    *slopes, offset = planes

    def enlarged(plane: Planes) -> Planes:
        return np.asarray(cv2.resize(plane, (width, height)), dtype=np.float64)

    def add(slope: Planes, channel: int) -> None:
        for top in range(0, height, STRIP_ROWS):
            rows = slice(top, top + STRIP_ROWS)
            filtered[rows] += slope[rows] * _colour(image[rows], channel)

    filtered = enlarged(offset)
    for channel, slope in enumerate(slopes):  # one at a time: each may have a gigabyte
        add(enlarged(slope), channel)
    return filtered


def _mean_fit(image: ImageArray, target: Planes, *, radius_px: int, epsilon: float) -> list[Planes]:
    """Compute, at each pixel, the mean over its windows of the fit's three slopes and of its offset."""
    weight = 1 / _window_sum(np.ones_like(target), radius_px)

    def mean(plane: Planes) -> Planes:
        return _window_sum(plane, radius_px) * weight

    colours = [_colour(image, channel) for channel in range(3)]
    mean_colours = [mean(colour) for colour in colours]
    mean_target = mean(target)
    covariance = {
        (i, j): mean(colours[i] * colours[j]) - mean_colours[i] * mean_colours[j] + (epsilon if i == j else 0)
        for i in range(3)
        for j in range(i, 3)
    }
    slopes = _solve(covariance, [mean(colours[i] * target) - mean_colours[i] * mean_target for i in range(3)])
    offset = mean_target.copy()
    for slope, mean_colour in zip(slopes, mean_colours, strict=True):
        offset -= slope * mean_colour
    return [mean(plane) for plane in (*slopes, offset)]


def _colour(image: ImageArray, channel: int) -> Planes:
    return image[..., channel] / 255 - 0.5


def _window_sum(plane: Planes, radius_px: int) -> Planes:
    side = 2 * radius_px + 1
    total = cv2.boxFilter(plane, -1, (side, side), normalize=False, borderType=cv2.BORDER_CONSTANT)
    return np.asarray(total, dtype=np.float64)


def _solve(matrix: dict[tuple[int, int], Planes], right: list[Planes]) -> list[Planes]:
    """Solve a symmetric positive definite 3 x 3 system at every pixel by elimination (upper triangle given)."""
    m01, m02 = matrix[0, 1] / matrix[0, 0], matrix[0, 2] / matrix[0, 0]
    pivot1, rest12 = matrix[1, 1] - m01 * matrix[0, 1], matrix[1, 2] - m01 * matrix[0, 2]
    m12 = rest12 / pivot1
    pivot2 = matrix[2, 2] - m02 * matrix[0, 2] - m12 * rest12
    right1 = right[1] - m01 * right[0]
    right2 = right[2] - m02 * right[0] - m12 * right1
    x2 = right2 / pivot2
    x1 = right1 / pivot1 - m12 * x2
    x0 = right[0] / matrix[0, 0] - m01 * x1 - m02 * x2
    return [x0, x1, x2]
