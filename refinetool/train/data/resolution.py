"""Few pixels: crops as if their image had been smaller, and coarse masks made of the image's pixels.

In large images, most objects are only a few pixels wide, and so are the steps of their outlines.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from refinetool.train.data.crops import Crops, under_centre


def shrunk(crops: Crops, pixels: Tensor, *, rows: Tensor) -> Crops:
    """Reduce some crops and enlarge them again, so that image, ids and target have less detail.

    Crops are changed one at a time, so that an example does not depend on its batch.

    Args:
        pixels: int64 (B, 2), width and height to reduce a crop to.
        rows: bool (B,), on the CPU, which crops to reduce.
    """
    if not rows.any():
        return crops
    image, ids, target, shown = (each.clone() for each in (crops.image, crops.ids, crops.target, crops.pixels))
    full = ids.shape[-1]
    over = cells_of_pixels(pixels, side=full).to(ids.device)
    for row in rows.nonzero()[:, 0].tolist():
        width, height = (min(int(count), full) for count in pixels[row])
        small = F.interpolate(image[row, None], (height, width), mode="bilinear", antialias=True).round()
        image[row] = F.interpolate(small, (full, full), mode="bilinear")[0].round()
        across, down = over[row]
        ids[row], target[row] = ids[row][down][:, across], target[row][down][:, across]
        shown[row] = torch.minimum(shown[row], pixels[row].to(shown.device))
    return replace(crops, image=image, ids=ids, target=target, pixels=shown)


def in_pixels(masks: Tensor, pixels: Tensor) -> Tensor:
    """Redraw masks with the pixels of their image, where these are larger than the cells of the masks.

    Defects are drawn on a fine grid. A coarse mask in use has the pixels of its image, and so has the true mask of a
    crop. A mask that would vanish stays as it is.

    Args:
        masks: bool (n, h, h).
        pixels: int64 (n, 2), see `Crops`.
    """
    across, down = cells_of_pixels(pixels, side=masks.shape[-1]).unbind(1)
    rows = torch.arange(len(masks), device=masks.device)[:, None, None]
    redrawn = masks[rows, down[:, :, None], across[:, None, :]]
    return torch.where(redrawn.flatten(1).any(1)[:, None, None], redrawn, masks)


def cells_of_pixels(pixels: Tensor, *, side: int) -> Tensor:
    """Find the cell under the centre of the pixel under the centre of each cell, of `side` cells along an axis.

    Args:
        pixels: int64 (n, 2), the number of pixels along two axes.

    Returns:
        int64 (n, 2, side); the cells themselves where pixels are no larger.
    """
    cell = torch.arange(side, device=pixels.device)
    count = pixels[..., None]
    pixel = under_centre(cell, count=side, of=count)
    return torch.where(count < side, under_centre(pixel, count=count, of=side), cell)
