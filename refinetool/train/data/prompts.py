"""Mines the prompts of `refinetool.prompts` at model resolution, for N coarse masks at once, on the training device.

Points and the mask prompt are mined on the grid of mask prompts, a quarter of the model's side.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from refinetool.backends.sam2 import BOX_CORNERS
from refinetool.records import ABSENT, BACKGROUND, FOREGROUND
from refinetool.settings import PromptSettings
from refinetool.train.data.distance import first_deepest, squared_depth
from refinetool.train.data.draws import Draws

TIGHT_FRACTION = 0.4
"""Fraction of the boxes that stay tight, since tight boxes are used as prompts, too."""


class MinedPrompts(NamedTuple):
    """Prompts of N masks for a model of side S.

    points: float32 (N, 4, 2) in model pixels: two box corners, a positive and a negative point.
    labels: int32 (N, 4), 2 3 1 0, or -1 where the box holds no background.
    masks: float32 (N, S/4, S/4), the Gaussian mask prompt.
    """

    points: Tensor
    labels: Tensor
    masks: Tensor


def mine(coarse: Tensor, draws: Draws) -> MinedPrompts:
    """Mine the prompts of masks at half the model's side, bool (N, S/2, S/2), none of them empty.

    Boxes are tight, or each edge is moved by -2 to 12 % of the box side, like those of elastic boxes, and by at most 2
    % of the frame.
    """
    side = 2 * coarse.shape[1]
    tight = 2.0 * tight_boxes(coarse).float()
    extent = (tight[:, 2:] - tight[:, :2]).repeat(1, 2)
    moves = (draws.between("box", -0.02, 0.12, 4) * extent).clamp(max=0.02 * side)
    moves = moves * (draws.uniform("tight box") >= TIGHT_FRACTION)[:, None]
    corners = (tight + moves * torch.tensor((-1, -1, 1, 1), device=tight.device)).clamp(0, side)

    grid = on_quarter_grid(coarse)
    positive, negative = deepest_points(grid)
    found = negative >= 0
    cells = torch.stack((positive, negative.clamp(min=0)), 1)
    points = torch.stack((cells % grid.shape[1], cells // grid.shape[1]), 2).float() * 4 + 2
    labels = torch.tensor((*BOX_CORNERS, FOREGROUND, BACKGROUND), device=grid.device, dtype=torch.int32)
    labels = labels.repeat(len(grid), 1)
    labels[:, 3] = torch.where(found, BACKGROUND, ABSENT)
    masks = gaussian_masks(grid, positive, settings=PromptSettings())
    return MinedPrompts(torch.cat((corners.view(-1, 2, 2), points), 1), labels, masks)


def on_quarter_grid(coarse: Tensor) -> Tensor:
    """Halve the side of masks: take cells that are at least half covered or, if there are none, all touched cells."""
    covered = F.avg_pool2d(coarse[:, None].float(), 2)[:, 0]
    grid = covered >= 0.5
    return torch.where(grid.flatten(1).any(1)[:, None, None], grid, covered > 0)


def tight_boxes(masks: Tensor) -> Tensor:
    """Return the half-open xyxy boxes of masks, bool (N, h, w), none of them empty: int64 (N, 4)."""
    columns, rows = masks.any(1), masks.any(2)
    first = [line.int().argmax(1) for line in (columns, rows)]
    last = [line.shape[1] - line.flip(1).int().argmax(1) for line in (columns, rows)]
    return torch.stack((*first, *last), 1)


def deepest_points(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Find the deepest pixel of each mask, and the background pixel of its box that is farthest from the mask.

    Args:
        masks: bool (N, h, w), none of them empty.

    Returns:
        Two int64 (N,): y * w + x, the first in row-major order on ties; the second is -1 where the mask fills its box.
    """
    _, height, width = masks.shape
    boxes = tight_boxes(masks)
    y, x = torch.arange(height, device=masks.device)[:, None], torch.arange(width, device=masks.device)
    x0, y0, x1, y1 = (edge[:, None, None] for edge in boxes.unbind(1))
    beside = ~masks & (x >= x0) & (x < x1) & (y >= y0) & (y < y1)
    away = torch.where(beside, squared_depth(~masks), 0)
    negative = torch.where(beside.flatten(1).any(1), first_deepest(away), -1)
    return first_deepest(squared_depth(masks)), negative


def gaussian_masks(masks: Tensor, points: Tensor, *, settings: PromptSettings) -> Tensor:
    """Make the masks of `prompts.gaussian_mask` with the shape `radial`: float32 (N, h, w).

    Args:
        masks: bool (N, h, w), none of them empty.
        points: int64 (N,), y * w + x, the centre.
    """
    _, height, width = masks.shape
    area = masks.flatten(1).sum(1)[:, None, None]
    down = torch.arange(height, device=masks.device) - (points // width)[:, None]
    across = torch.arange(width, device=masks.device) - (points % width)[:, None]
    squared = down[:, :, None] ** 2 + across[:, None] ** 2
    fade = settings.gaussian_amplitude * torch.exp(-squared / (area * settings.gaussian_span))
    outside = -settings.gaussian_amplitude if settings.gaussian_background == "negative" else 0.0
    return torch.where(masks, fade, outside)
