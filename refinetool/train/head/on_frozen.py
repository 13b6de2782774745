"""Trains a head on a frozen SAM 2 model."""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from refinetool.modules.heads import Head, HeadAnswer
from refinetool.settings import TrainSettings
from refinetool.train.data.examples import Example
from refinetool.train.losses import detail_loss, hard_iou, harm_loss, point_loss
from refinetool.train.questions import Question, draw_groups, put
from refinetool.train.second_pass import second_pass
from refinetool.train.step import Loss


class OnFrozen:
    """A head and the model below it, which stays in evaluation mode and gets no gradients.

    Gradients flow through the model's decoder to what the head does before it.

    Args:
        sam: A `SAM2Base`, on the device.
        head: A head on it that is an `nn.Module`, on the device.
        set_side: Sets the side of the model's inputs.
    """

    def __init__(self, sam: Any, head: nn.Module, *, settings: TrainSettings, set_side: Callable[[int], None]) -> None:
        self.sam, self.head, self.settings, self.set_side = sam, head, settings, set_side
        sam.requires_grad_(False)
        sam.eval()
        head.requires_grad_(True)

    @property
    def module(self) -> nn.Module:
        return self.head

    @property
    def product(self) -> nn.Module:
        return self.head

    def loss(self, batch: Example, *, host: torch.Generator, noise: torch.Generator) -> Loss:
        """Compute the loss of the head's masks, of their predicted IoUs if it has any, and of what they harm."""
        settings, head = self.settings, cast("Head", self.head)
        self.set_side(batch.image.shape[-1])
        if settings.second_pass_share and float(torch.rand((), generator=host)) < settings.second_pass_share:
            self.head.eval()
            batch = second_pass(batch, self.sam, head, generator=noise)
        self.head.train()
        groups = draw_groups(settings, host)
        questions, answered = put(self.sam, head, batch, groups, generator=noise)
        total, true_iou = head_loss(answered, questions, settings=settings, generator=noise)
        return Loss(total, true_iou[: len(questions[0].targets)].mean())  # full prompts are the first group


def head_loss(
    answered: HeadAnswer, questions: list[Question], *, settings: TrainSettings, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return the loss of a head's answers, and the true IoU of each mask, (N,)."""
    target, weight, coarse, truth = (
        torch.cat([getattr(question, name) for question in questions])
        for name in ("targets", "weights", "sides", "truth")
    )
    if settings.mask_loss == "points":
        total = point_loss(answered.logits, truth, weight, generator=generator)
        for logits in answered.auxiliary:
            total = total + settings.auxiliary_loss * point_loss(logits, truth, weight, generator=generator)
        with torch.no_grad():
            grid = nn.functional.interpolate(answered.logits[:, None].float(), target.shape[-2:], mode="bilinear")
        true_iou = hard_iou(grid > 0, target[:, None] >= 0.5, known=weight[:, None] > 0)[:, 0]
        return total, true_iou
    assert answered.scores is not None, "the weighted loss is that of heads that predict an IoU"
    losses = detail_loss(answered.logits, answered.scores, target=target, weight=weight)
    harm = harm_loss(answered.logits, coarse=coarse, target=target, weight=weight)
    return losses.mask + losses.iou + settings.harm_loss * harm, losses.true_iou[:, 0]
