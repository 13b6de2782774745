"""Computes exact Euclidean distances in torch, for N masks at once, on their device.

There are two passes: along columns by running maxima, then along rows by the minimum over neighbours (the min-plus form
of Felzenszwalb and Huttenlocher, written out). Squared distances are whole numbers, exact in float32.
"""

import torch
from torch import Tensor


def signed_distance(masks: Tensor, *, reach: int) -> Tensor:
    """Compute the distance in pixels to the nearest pixel of the other kind, positive inside the mask, else negative.

    Args:
        masks: bool (N, H, W).
        reach: Distances are exact up to this value, and clamped beyond.

    Returns:
        float32 (N, H, W), in -reach..-1 and 1..reach; pixels beyond the image border are of neither kind.
    """
    across = _to_other_kind(masks).clamp(max=reach) ** 2
    inside = _min_plus(torch.where(masks, across, 0.0), reach=reach)
    outside = _min_plus(torch.where(masks, 0.0, across), reach=reach)
    squared = torch.where(masks, inside, outside).clamp(max=reach * reach)
    return torch.where(masks, squared.sqrt(), -squared.sqrt())


def squared_depth(masks: Tensor) -> Tensor:
    """Compute the squared distance of each mask pixel to the nearest pixel outside the mask; 0 outside.

    Args:
        masks: bool (N, H, W). As in `refinetool.masks.distance_inside`, the image border is not background, except for
            a mask that fills the image.

    Returns:
        int64 (N, H, W), whole numbers.
    """
    _, height, width = masks.shape
    far = float(height + width)
    column = torch.where(masks, _to_other_kind(masks).clamp(max=far), 0.0)
    inside = _min_plus(column**2, reach=width - 1)
    down, across = (torch.arange(n, device=masks.device, dtype=torch.float32) for n in (height, width))
    to_frame = torch.minimum(
        torch.minimum(down + 1, height - down)[:, None], torch.minimum(across + 1, width - across)[None]
    )
    full = masks.flatten(1).all(1)[:, None, None]
    return torch.where(full, to_frame**2, inside).long()


def first_deepest(squared: Tensor) -> Tensor:
    """Return the pixel with the maximum of int64 (N, H, W), the first in row-major order on ties: int64 (N,)."""
    flat = squared.flatten(1)
    order = torch.arange(flat.shape[1], device=flat.device)
    return (flat * flat.shape[1] + (flat.shape[1] - 1 - order)).argmax(1)


def _to_other_kind(masks: Tensor) -> Tensor:
    """Compute the distance along the column to the nearest pixel of the other kind, float32 (N, H, W); huge if none."""
    height = masks.shape[1]
    row = torch.arange(height, device=masks.device, dtype=torch.float32)[None, :, None]
    far = float(1 << 20)
    kind = masks[:, 1:] != masks[:, :-1]
    # The last row before a change, seen from above, and the first row after one, seen from below.
    above = torch.full(masks.shape, -far, device=masks.device)
    above[:, 1:] = torch.where(kind, row[:, :-1], -far)
    below = torch.full(masks.shape, far, device=masks.device)
    below[:, :-1] = torch.where(kind, row[:, 1:], far)
    before = above.cummax(1).values
    after = below.flip(1).cummin(1).values.flip(1)
    return torch.minimum(row - before, after - row)


def _min_plus(squares: Tensor, *, reach: int) -> Tensor:
    """Compute the minimum over j of squares[..., j] + (i - j)², with |i - j| up to reach."""
    width = squares.shape[2]
    nearest = squares.clone()
    for step in range(1, min(reach, width - 1) + 1):
        shifted = squares + step * step
        torch.minimum(nearest[..., step:], shifted[..., :-step], out=nearest[..., step:])
        torch.minimum(nearest[..., :-step], shifted[..., step:], out=nearest[..., :-step])
    return nearest
