"""Trains the whole embedded model: its SAM 2 part and its detail head together."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refinetool.modules.embedded import CHANNELS, EmbeddedModel, build_embedded
from refinetool.modules.sam2_passes import set_image_size
from refinetool.settings import TrainSettings
from refinetool.train.data.examples import Example
from refinetool.train.losses import detail_loss, edge_loss, harm_loss, mask_loss
from refinetool.train.questions import Looked, answer, ask, look, mined_groups, pose
from refinetool.train.step import Loss


class Whole(nn.Module):
    """The model with the edge heads that are needed only for training. The product is the model."""

    def __init__(self, *, settings: TrainSettings) -> None:
        super().__init__()
        self.settings = settings
        self.model = build_embedded(image_size=settings.side)
        self.fine_edges = nn.Conv2d(CHANNELS // 8, 1, 3, padding=1)
        self.coarse_edges = nn.Conv2d(CHANNELS, 1, 1)

    @property
    def module(self) -> nn.Module:
        return self

    @property
    def product(self) -> EmbeddedModel:
        return self.model

    def loss(self, batch: Example, *, host: torch.Generator, noise: torch.Generator) -> Loss:
        """Compute the losses of decoder, detail head and edges."""
        settings, model = self.settings, self.model
        self.train()
        set_image_size(model, batch.image.shape[-1])
        groups = mined_groups(settings.prompts_per_image, host)
        with torch.autocast(batch.image.device.type, torch.bfloat16):
            looked = look(model, model.detail, batch.image)
            questions = [pose(looked, batch, rows=rows, kinds=kinds, generator=noise) for rows, kinds in groups]
            decoded = [answer(model, question) for question in questions]
            refined = ask(model.detail, questions, decoded)
            total = settings.edge_loss * self._edge_losses(looked, batch.edges.float())
        for question, one in zip(questions, decoded, strict=True):
            losses = mask_loss(one.logits, one.scores, question.targets, question.weights)
            total = total + (losses.mask + losses.iou) * len(question.targets) / len(refined.logits)
        target, weight, coarse = (
            torch.cat([getattr(question, name) for question in questions]) for name in ("targets", "weights", "sides")
        )
        assert refined.scores is not None
        losses = detail_loss(refined.logits, refined.scores, target=target, weight=weight)
        total = total + losses.mask + losses.iou
        total = total + settings.harm_loss * harm_loss(refined.logits, coarse=coarse, target=target, weight=weight)
        # Full prompts are the first group.
        return Loss(total, losses.true_iou[: len(questions[0].targets), 0].mean())

    def _edge_losses(self, looked: Looked, edges: Tensor) -> Tensor:
        """Compute the loss of predicting edges (B, S/4, S/4) from the features at S/4 and S/16."""
        fine = edge_loss(self.fine_edges(looked.fine_maps[0]), edges)
        return fine + edge_loss(self.coarse_edges(looked.embedding), F.max_pool2d(edges[:, None], 4)[:, 0])
