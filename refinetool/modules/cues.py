"""Computes colour cues from a coarse mask: how typical each pixel is of the inside, from a histogram.

GrabCut and bilateral filters use the same observation: a pixel whose colour is common inside the mask and rare outside
probably belongs inside, wherever the outline is. A convolution can't represent this; a histogram can. Pixels inside and
outside the coarse mask are counted in bins of three coordinates, the counts are blurred, and each pixel looks up the
difference in its bin. With coordinates (R, G, B) this is the colour model of GrabCut, with (y, x, luminance) a
bilateral grid (Chen, Paris and Durand 2007).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

BINS = 16
"""Bins along each coordinate."""
LUMINANCE = (0.299, 0.587, 0.114)
ALL_PIXELS = 1000.0
"""Sum of the balanced counts inside, and of those outside."""
RARE = 0.05
"""Counts below this carry little information."""


def colour_cue(colours: Tensor, masks: Tensor) -> Tensor:
    """Compute how much more frequent a pixel's colour is inside each mask: -1 (only outside) .. 1 (only inside).

    Args:
        colours: float32 (N, 3, h, w), RGB in 0..1.
        masks: float32 (N, M, h, w), M masks of each image, above 0 inside.

    Returns:
        float32 (N, M, h, w).
    """
    return _lookup(colours, masks, balanced=True)


def place_cue(colours: Tensor, masks: Tensor) -> Tensor:
    """Compute the same among nearby pixels of similar luminance, without balancing inside and outside."""
    count, _, height, width = colours.shape
    y = (torch.arange(height, device=colours.device) + 0.5) / height
    x = (torch.arange(width, device=colours.device) + 0.5) / width
    luminance = (colours * colours.new_tensor(LUMINANCE).view(1, 3, 1, 1)).sum(1)
    places = [y[:, None].expand(count, height, width), x.expand(count, height, width)]
    return _lookup(torch.stack((*places, luminance), 1), masks, balanced=False)


def _lookup(coordinates: Tensor, masks: Tensor, *, balanced: bool) -> Tensor:
    """Compute (inside - outside) / (inside + outside) of blurred counts, sampled at every pixel.

    Args:
        coordinates: float32 (N, 3, h, w) in 0..1.
        balanced: Whether inside and outside have the same weight, however many pixels each has.
    """
    n, m = masks.shape[:2]
    cells = (coordinates * BINS).long().clamp(0, BINS - 1)
    index = ((cells[:, 0] * BINS + cells[:, 1]) * BINS + cells[:, 2]).flatten(1)
    # Whole numbers: their sums are the same in any order.
    inside = (masks > 0).float().flatten(2)
    pixels = torch.cat((inside, torch.ones_like(inside[:, :1])), 1)
    counts = torch.zeros(n, m + 1, BINS**3, device=masks.device)
    counts.scatter_add_(2, index[:, None].expand_as(pixels), pixels)
    counts = _blurred(torch.cat((counts[:, :-1], counts[:, -1:] - counts[:, :-1]), 1))
    if balanced:
        counts = counts / (counts.sum(2, keepdim=True) + 1) * ALL_PIXELS
    inner, outer = counts.chunk(2, 1)
    contrast = ((inner - outer) / (inner + outer + RARE)).view(n, m, BINS, BINS, BINS)
    # grid_sample wants the last axis first, from -1 to 1.
    at = (coordinates * 2 - 1).flip(1).permute(0, 2, 3, 1)[:, None]
    return F.grid_sample(contrast, at, mode="bilinear", padding_mode="border", align_corners=False)[:, :, 0]


def _blurred(counts: Tensor) -> Tensor:
    """Volumes (N, C, BINS^3) blurred by (1/4, 1/2, 1/4) along each axis: products with a matrix of three diagonals."""
    n, channels = counts.shape[:2]
    diagonals = [torch.full((BINS - abs(k),), 0.25 * (2 - abs(k)), device=counts.device).diag(k) for k in (-1, 0, 1)]
    blur = torch.stack(diagonals).sum(0)
    across = blur @ counts.reshape(n * channels, BINS, BINS**2)
    down = blur @ across.view(n * channels * BINS, BINS, BINS)
    return (down.view(-1, BINS) @ blur).view(n, channels, BINS**3)
