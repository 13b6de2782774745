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


def colour_cue(colours: Tensor, coarse: Tensor) -> Tensor:
    """Compute how much more frequent a pixel's colour is inside the coarse mask: -1 (only outside) .. 1 (only inside).

    Args:
        colours: float32 (N, 3, h, w), RGB in 0..1.
        coarse: float32 (N, h, w), above 0 inside.

    Returns:
        float32 (N, h, w).
    """
    return _lookup(colours, coarse, balanced=True)


def place_cue(colours: Tensor, coarse: Tensor) -> Tensor:
    """Compute the same among nearby pixels of similar luminance, without balancing inside and outside."""
    count, _, height, width = colours.shape
    y = (torch.arange(height, device=colours.device) + 0.5) / height
    x = (torch.arange(width, device=colours.device) + 0.5) / width
    luminance = (colours * colours.new_tensor(LUMINANCE).view(1, 3, 1, 1)).sum(1)
    places = [y[:, None].expand(count, height, width), x.expand(count, height, width)]
    return _lookup(torch.stack((*places, luminance), 1), coarse, balanced=False)


def _lookup(coordinates: Tensor, coarse: Tensor, *, balanced: bool) -> Tensor:
    """Compute (inside - outside) / (inside + outside) of blurred counts, sampled at every pixel.

    Args:
        coordinates: float32 (N, 3, h, w) in 0..1.
        balanced: Whether inside and outside have the same weight, however many pixels each has.
    """
    n = len(coarse)
    cells = (coordinates * BINS).long().clamp(0, BINS - 1)
    index = ((cells[:, 0] * BINS + cells[:, 1]) * BINS + cells[:, 2]).flatten(1)
    inside = (coarse > 0).float().flatten(1)
    # Whole numbers: their sums are the same in any order.
    counts = torch.zeros(n, 2, BINS**3, device=coarse.device)
    for side, pixels in enumerate((inside, 1 - inside)):
        counts[:, side].scatter_add_(1, index, pixels)
    counts = _blurred(counts.view(n, 2, BINS, BINS, BINS))
    if balanced:
        counts = counts / (counts.sum((2, 3, 4), keepdim=True) + 1) * ALL_PIXELS
    contrast = (counts[:, :1] - counts[:, 1:]) / (counts.sum(1, keepdim=True) + RARE)
    # grid_sample wants the last axis first, from -1 to 1.
    at = (coordinates * 2 - 1).flip(1).permute(0, 2, 3, 1)[:, None]
    return F.grid_sample(contrast, at, mode="bilinear", padding_mode="border", align_corners=False)[:, 0, 0]


def _blurred(volumes: Tensor) -> Tensor:
    """Volumes (N, C, d, d, d) blurred by (1/4, 1/2, 1/4) along each axis."""
    kernel = volumes.new_tensor((0.25, 0.5, 0.25))
    flat = volumes.flatten(0, 1)[:, None]
    for axis in range(3):
        shape, padding = [1, 1, 1], [0, 0, 0]
        shape[axis], padding[axis] = 3, 1
        flat = F.conv3d(flat, kernel.view(1, 1, *shape), padding=padding)
    return flat.view(volumes.shape)
