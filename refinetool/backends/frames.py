"""Maps coordinates, masks and feature maps between a view and the square input of a model.

A model works on squares: S pixels of input, S/4 cells of mask, S/16 cells of features, all covering the same area. A
view fills the square from the top left corner; the rest, on the right or below, is padding. Because the view rarely
ends at a cell border, its extent on a grid is a fractional number of cells.
"""

import math
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from refinetool.records import ABSENT, BoolArray, FloatArray, IntArray, Masks, Size

Extent: TypeAlias = tuple[float, float]
"""(height, width) of the view on a grid, in cells."""


@dataclass(frozen=True, slots=True)
class Frame:
    """The position of one view in the square of a model.

    view: (H, W) of the view in pixels.
    filled: (height, width) of the area that the view fills, in pixels of the square.
    side: S, the side of the square in pixels.
    """

    view: Size
    filled: Size
    side: int

    @property
    def scale(self) -> Extent:
        """Model pixels per view pixel, (down, across)."""
        return self.filled[0] / self.view[0], self.filled[1] / self.view[1]

    def extent(self, cells: int) -> Extent:
        """The extent of the view on a grid of `cells` x `cells` over the square."""
        return self.filled[0] * cells / self.side, self.filled[1] * cells / self.side

    def place_points(self, points: FloatArray, labels: IntArray) -> FloatArray:
        """Map pixel indices of the view, (N, P, 2) as (x, y), into the square.

        Pixel centres are mapped to pixel centres: the centre of pixel x is at x + 0.5 in both frames. Coordinates of
        absent points become 0.
        """
        down, across = self.scale
        placed = (points + 0.5) * np.array((across, down)) - 0.5
        return np.where(labels[..., None] == ABSENT, 0.0, placed).astype(np.float32)

    def place_boxes(self, boxes: FloatArray) -> FloatArray:
        """Map half-open xyxy boxes (N, 4) into the square: edges are scaled, as in the official predictors."""
        down, across = self.scale
        placed: FloatArray = (boxes * np.array((across, down, across, down))).astype(np.float32)
        return placed


def letterboxed(view: Size, *, side: int) -> Frame:
    """Fit the longer side of a view to the square and keep the aspect ratio (SAM)."""
    shrink = side / max(view)
    return Frame(view, (max(1, int(view[0] * shrink + 0.5)), max(1, int(view[1] * shrink + 0.5))), side)


def squashed(view: Size, *, side: int) -> Frame:
    """Fit a view to the whole square, whatever its aspect ratio (SAM2)."""
    return Frame(view, (side, side), side)


def sample(maps: Tensor, size: Size, *, step: Extent) -> Tensor:
    """Sample maps bilinearly at the cell centres of another grid that starts at the same top left corner.

    Args:
        maps: float (N, h, w); beyond the outermost cell centres they are constant.
        size: (rows, columns) of the other grid.
        step: Cells of `maps` per cell of the other grid, (down, across).

    Returns:
        float (N, rows, columns).
    """
    if len(maps) == 0:
        return maps.new_zeros((0, *size))
    height, width = maps.shape[-2:]
    # grid_sample takes positions from -1 to 1.
    y = (torch.arange(size[0], device=maps.device) + 0.5) * (2 * step[0] / height) - 1
    x = (torch.arange(size[1], device=maps.device) + 0.5) * (2 * step[1] / width) - 1
    positions = torch.stack((x.expand(size), y[:, None].expand(size)), dim=-1)
    return F.grid_sample(maps[None], positions[None], mode="bilinear", padding_mode="border", align_corners=False)[0]


def rasterise(logits: Tensor, frame: Frame, *, cells: int) -> Tensor:
    """Resample mask logits from a grid of any size over the view to the model's mask grid.

    A cell is foreground if more than half of it is covered (antialiased bilinear). Its value is the mean of either the
    foreground or the background logits in it, because averaging both would put small logits along edges. Padding gets
    the lowest value of the background. A mask too small for the grid keeps the cells it touches.

    Args:
        logits: float32 (N, h, w) on the model's device; above 0 is foreground.

    Returns:
        float32 (N, cells, cells).
    """
    if len(logits) == 0:
        return logits.new_zeros((0, cells, cells))
    covered = _on_cells((logits > 0).float(), frame, cells=cells)
    front = _on_cells(logits.clamp(min=0), frame, cells=cells) / covered
    back = _on_cells(logits.clamp(max=0), frame, cells=cells) / (1 - covered)
    lowest, highest = logits.amin(dim=(1, 2)), logits.amax(dim=(1, 2))
    padding = torch.where(lowest > 0, -highest, lowest)[:, None, None]
    grid = torch.where(covered > 0.5, front, back)
    grid = torch.where(in_view(frame, cells=cells).to(grid.device), grid, padding)
    vanished = (highest > 0) & ~(grid > 0).any(dim=2).any(dim=1)
    for n in vanished.nonzero().flatten().tolist():
        _keep_touched(grid[n], logits[n], frame)
    return grid


def in_view(frame: Frame, *, cells: int) -> Tensor:
    """Return which cells of a grid have their centre in the view and not in the padding: bool (cells, cells)."""
    height, width = frame.extent(cells)
    centres = torch.arange(cells) + 0.5
    return (centres[:, None] < height) & (centres < width)


def pick_cells(masks: Masks, frame: Frame, *, cells: int) -> Masks:
    """Return the grid cells of each mask: those whose centre the mask covers.

    If a mask covers no cell centre, the cells it touches are used.

    Args:
        masks: bool (N, H, W) over the view.

    Returns:
        bool (N, h, w), h and w being the extent of the view, rounded up.
    """
    rows, in_rows = _nearest(frame.view[0], frame.extent(cells)[0])
    columns, in_columns = _nearest(frame.view[1], frame.extent(cells)[1])
    picked: Masks = masks[:, rows[:, None], columns] & in_rows[:, None] & in_columns
    for n in np.flatnonzero(~picked.any(axis=(1, 2))):
        ys, xs = np.nonzero(masks[n])
        down, across = (extent / pixels for extent, pixels in zip(frame.extent(cells), frame.view, strict=True))
        picked[n, ((ys + 0.5) * down).astype(np.int64), ((xs + 0.5) * across).astype(np.int64)] = True
    return picked


def _nearest(pixels: int, extent: float) -> tuple[IntArray, BoolArray]:
    """Return the pixel under the centre of each cell that the view reaches, and whether there is one."""
    positions = (np.arange(math.ceil(extent)) + 0.5) * (pixels / extent)
    return np.minimum(positions.astype(np.int64), pixels - 1), positions < pixels


def _on_cells(maps: Tensor, frame: Frame, *, cells: int) -> Tensor:
    extent = frame.extent(cells)
    reached = (math.ceil(extent[0]), math.ceil(extent[1]))
    fitted = _resized(maps, reached)
    if extent == (cells, cells):
        return fitted
    return sample(fitted, (cells, cells), step=(reached[0] / extent[0], reached[1] / extent[1]))


def _resized(maps: Tensor, size: Size) -> Tensor:
    """Resize (N, h, w) to (N, rows, columns), antialiased bilinear."""
    if size[1] == 1 < size[0]:  # torch 2.15 repeats the first row down a single column
        return _resized(maps.transpose(1, 2), (1, size[0])).transpose(1, 2)
    return F.interpolate(maps[None], size, mode="bilinear", align_corners=False, antialias=True)[0]


def _keep_touched(grid: Tensor, logits: Tensor, frame: Frame) -> None:
    """Put the foreground logits of a vanished mask into the cells that contain them, the highest logit per cell."""
    ys, xs = (logits > 0).nonzero(as_tuple=True)
    height, width = frame.extent(len(grid))
    rows = ((ys + 0.5) * (height / logits.shape[0])).long()
    columns = ((xs + 0.5) * (width / logits.shape[1])).long()
    grid.view(-1).scatter_reduce_(0, rows * len(grid) + columns, logits[ys, xs], "amax")
