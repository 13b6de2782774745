"""Shows crops as if their picture had been smaller: in large pictures, most objects are only a few pixels wide."""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F

from refinetool.train.data.crops import Crops, nearest
from refinetool.train.data.draws import Draws

SIDES = (28, 128)
"""Pixels along a side of the smaller crop, drawn evenly on a logarithmic scale ..."""
LEAST_AREA_PX = 100
"""... but so many that the object keeps about this area."""


def shrunk(crops: Crops, draws: Draws, *, share: float) -> Crops:
    """Reduce a fraction of the crops and enlarge them again, so that image, ids and target have less detail.

    Crops are changed one at a time, so that an example does not depend on its batch.

    Args:
        draws: On the CPU, one row per crop.
        share: Probability that a crop is changed.
    """
    full = crops.ids.shape[-1]
    low, high = (math.log(side) for side in SIDES)
    sides = draws.between("smaller side", low, high).exp()
    image, ids, target = crops.image.clone(), crops.ids.clone(), crops.target.clone()
    for row in (draws.uniform("smaller") < share).nonzero()[:, 0].tolist():
        covered = float(target[row].float().mean())
        least = math.sqrt(LEAST_AREA_PX / covered) if covered else full
        side = round(max(float(sides[row]), least))
        if side >= full:
            continue
        small = F.interpolate(image[row, None], (side, side), mode="bilinear", antialias=True).round()
        image[row] = F.interpolate(small, (full, full), mode="bilinear")[0].round()
        cell, middle = (
            nearest(torch.tensor([length]), target=count, mirrored=torch.tensor([False]))[0]
            for length, count in ((side, full), (full, side))
        )
        pixel = middle[cell].to(ids.device)
        ids[row], target[row] = ids[row][pixel][:, pixel], target[row][pixel][:, pixel]
    return replace(crops, image=image, ids=ids, target=target)
