"""What a model is worth: figures and pictures of fixed examples from the val lists."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from refinetool.modules.embedded import EmbeddedModel, set_image_size
from refinetool.pictures import beside, draw, label, stack
from refinetool.records import ImageArray
from refinetool.settings import TrainSettings
from refinetool.train.data.examples import Example
from refinetool.train.data.sampler import Sampler
from refinetool.train.embedded.losses import hard_iou
from refinetool.train.embedded.step import BOX_ONLY, FULL, look, pose, refine

VALIDATION_SEED = 1_000_003
BATCH = 32
GOOD_IOU = 0.9
"""Coarse masks above this are good already; `harm` is what the model takes from them."""
SHOWN = 8


def fixed_examples(sampler: Sampler, *, count: int, side: int) -> list[Example]:
    """The examples that a run is measured on, in batches."""
    return [sampler.batch(numbers, side=side) for numbers in torch.split(torch.arange(count), BATCH)]


@torch.no_grad()
def validate(model: EmbeddedModel, batches: Sequence[Example], *, settings: TrainSettings) -> dict[str, float]:
    """Mean IoU on fixed examples of the val lists: the coarse masks, full prompts, box alone, and nearly right masks.

    `harm` is the mean loss of IoU on masks that were above 0.9, 0 if there are none; `better` the share of masks that
    improved; `iou_error` the mean error of the predicted IoU.
    """
    set_image_size(model, settings.side)
    sums: dict[str, list[Tensor]] = {"coarse": [], "full": [], "box": [], "score": []}
    every = list(range(settings.prompts_per_image))
    for batch in batches:
        encoded = look(model, batch.image)
        for name, kinds in (("full", FULL), ("box", BOX_ONLY)):
            question = pose(encoded, batch, rows=every, kinds=kinds, generator=None)
            logits, scores = refine(model, question)
            known = question.weights[:, None] > 0
            sums[name].append(hard_iou(logits[:, None] > 0, question.targets[:, None] >= 0.5, known=known)[:, 0])
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
def sample_picture(model: EmbeddedModel, batch: Example, *, settings: TrainSettings) -> ImageArray:
    """The first examples of a batch, a row each: image, coarse mask as prompted, refined mask, truth. uint8 RGB."""
    set_image_size(model, settings.side)
    some = Example(*(tensor[:SHOWN] for tensor in batch))
    side = some.image.shape[-1]
    logits, _ = refine(model, pose(look(model, some.image), some, rows=[0], kinds=FULL, generator=None))
    wide = F.interpolate(logits[:, None].float(), size=(side, side), mode="bilinear", align_corners=False)
    masks = {
        "coarse": _enlarged(some.coarse[:, :1], side),
        "refined": wide > 0,
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


def _enlarged(masks: Tensor, side: int) -> Tensor:
    return F.interpolate(masks.float(), size=(side, side), mode="nearest") > 0.5
