"""Measures a model on fixed examples of the validation splits, and draws pictures of them."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from refinetool.modules.heads import Head
from refinetool.pictures import beside, draw, label, stack
from refinetool.records import ImageArray
from refinetool.settings import TrainSettings
from refinetool.train.data.examples import Example
from refinetool.train.data.sampler import Sampler
from refinetool.train.losses import hard_iou
from refinetool.train.questions import BOX_ONLY, FULL, look, pose, refine

VALIDATION_SEED = 1_000_003
BATCH = 32
GOOD_IOU = 0.9
"""Coarse masks with a higher IoU count as good; `harm` is the IoU that they lose."""
SHOWN = 8


def fixed_examples(sampler: Sampler, *, count: int, side: int) -> list[Example]:
    """Return the examples that a run is measured on, in batches."""
    return [sampler.batch(numbers, side=side) for numbers in torch.split(torch.arange(count), BATCH)]


@torch.no_grad()
def validate(sam: Any, head: Head | None, batches: Sequence[Example], *, settings: TrainSettings) -> dict[str, float]:
    """Measure the mean IoU on fixed validation examples: of the coarse masks, with full prompts, and with the box
    alone.

    `harm` is the mean loss of IoU on masks that were above 0.9, 0 if there are none; `better` is the fraction of masks
    that improved; `iou_error` is the mean error of the predicted IoU.
    """
    sums: dict[str, list[Tensor]] = {"coarse": [], "full": [], "box": [], "score": []}
    every = list(range(settings.prompts_per_image))
    for batch in batches:
        looked = look(sam, head, batch.image)
        for name, kinds in (("full", FULL), ("box", BOX_ONLY)):
            question = pose(looked, batch, rows=every, kinds=kinds, generator=None)
            logits, scores = refine(sam, head, question)
            known = question.weights[:, None] > 0
            masks = _on(logits, question.targets.shape[-1]) > 0
            sums[name].append(hard_iou(masks, question.targets[:, None] >= 0.5, known=known)[:, 0])
            if name == "full":
                sums["score"].append(scores.float())
        sums["coarse"].append(batch.coarse_iou.flatten())
    figures = {name: torch.cat(values) for name, values in sums.items()}
    good = figures["coarse"] > GOOD_IOU
    lost = (figures["coarse"] - figures["full"])[good]
    result = {name: float(figures[name].mean()) for name in ("coarse", "full", "box")}
    result["harm"] = float(lost.mean()) if len(lost) else 0.0
    result["better"] = float((figures["full"] > figures["coarse"]).float().mean())
    result["iou_error"] = float((figures["score"] - figures["full"]).abs().mean())
    return result


@torch.no_grad()
def sample_picture(sam: Any, head: Head | None, batch: Example) -> ImageArray:
    """Draw the first examples of a batch, one per row: image, coarse mask, refined mask, ground truth. uint8 RGB."""
    some = Example(*(tensor[:SHOWN] for tensor in batch))
    side = some.image.shape[-1]
    logits, _ = refine(sam, head, pose(look(sam, head, some.image), some, rows=[0], kinds=FULL, generator=None))
    masks = {
        "coarse": _enlarged(some.coarse[:, :1], side),
        "refined": _on(logits, side) > 0,
        "truth": _enlarged(some.targets[:, :1] >= 128, side),
    }
    rows = []
    for number, pixels in enumerate(some.image):
        image = pixels.permute(1, 2, 0).contiguous().cpu().numpy()
        tiles = [label(image, "image")] if number == 0 else [image]
        for name, mask in masks.items():
            tile = draw(image, mask[number].cpu().numpy(), (0, 0, side, side), scale=1.0, dim=0.5)
            tiles.append(label(tile, name) if number == 0 else tile)
        rows.append(beside(tiles))
    return stack(rows)


def _on(logits: Tensor, cells: int) -> Tensor:
    """Sample logits (N, h, h) on a grid: (N, 1, cells, cells)."""
    return F.interpolate(logits[:, None].float(), size=(cells, cells), mode="bilinear", align_corners=False)


def _enlarged(masks: Tensor, side: int) -> Tensor:
    return F.interpolate(masks.float(), size=(side, side), mode="nearest") > 0.5
