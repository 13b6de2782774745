"""Makes examples of a second pass: the model's own masks take the place of the coarse ones."""

from typing import Any

import torch
from torch import nn

from refinetool.modules.heads import Head
from refinetool.train.data.corruptions import overlap
from refinetool.train.data.draws import Draws
from refinetool.train.data.examples import Example
from refinetool.train.data.prompts import mine
from refinetool.train.data.sampler import at_least_half, per_crop
from refinetool.train.kernels import mixed_precision
from refinetool.train.questions import FULL, look, pose, refine

KEYS = 1 << 62


@torch.no_grad()
def second_pass(batch: Example, sam: Any, head: Head | None, *, generator: torch.Generator) -> Example:
    """Refine the coarse masks of a batch, and mine its prompts from the refined ones.

    Masks that come back empty stay coarse.

    Args:
        sam, head: In evaluation mode.
        generator: On the device, for the boxes.
    """
    count, prompts, *_ = batch.coarse.shape
    with mixed_precision(batch.image.device):
        question = pose(look(sam, head, batch.image), batch, rows=list(range(prompts)), kinds=FULL, generator=None)
        logits, _ = refine(sam, head, question)
    before = batch.coarse.flatten(0, 1)
    refined = nn.functional.interpolate(logits[:, None].float(), before.shape[-2:], mode="bilinear")[:, 0] > 0
    coarse = torch.where(refined.flatten(1).any(1)[:, None, None], refined, before)
    keys = torch.randint(KEYS, (len(coarse),), generator=generator, device=coarse.device)
    mined = mine(coarse, Draws(keys))
    truth = at_least_half(batch.targets.float() / 255).flatten(0, 1)
    return batch._replace(
        points=per_crop(mined.points, count),
        labels=per_crop(mined.labels, count),
        masks=per_crop(mined.masks, count),
        coarse=per_crop(coarse, count),
        coarse_iou=per_crop(overlap(coarse, truth), count),
    )
