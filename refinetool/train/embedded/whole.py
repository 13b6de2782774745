"""Trains the SAM 2 part of the embedded model, alone or together with the detail head."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refinetool.modules.embedded import CHANNELS, EmbeddedModel, build_embedded
from refinetool.modules.sam2_passes import set_image_size
from refinetool.settings import TrainSettings
from refinetool.train.data.examples import Example
from refinetool.train.head.on_frozen import head_loss
from refinetool.train.kernels import mixed_precision
from refinetool.train.losses import edge_loss, mask_loss
from refinetool.train.questions import Looked, answer, ask, draw_groups, look, pose
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
        """Compute the losses of decoder and edges and, if it is trained along, of the detail head."""
        settings, model = self.settings, self.model
        self.train()
        set_image_size(model, batch.image.shape[-1])
        detail = model.detail if settings.part == "all" else None
        groups = draw_groups(settings, host)
        with mixed_precision(batch.image.device):
            looked = look(model, detail, batch.image)
            questions = [pose(looked, batch, rows=rows, kinds=kinds, generator=noise) for rows, kinds in groups]
            decoded = [answer(model, question) for question in questions]
            refined = None if detail is None else ask(detail, questions, decoded)
            total = settings.edge_loss * self._edge_losses(looked, batch.edges.float())
        full, count = len(questions[0].targets), sum(len(question.targets) for question in questions)
        reached = []
        for question, one in zip(questions, decoded, strict=True):
            losses = mask_loss(one.logits, one.scores, question.targets, question.weights)
            total = total + (losses.mask + losses.iou) * len(question.targets) / count
            reached.append(losses.true_iou[:, 0])
        if refined is not None:
            of_head, true_iou = head_loss(refined, questions, settings=settings, generator=noise)
            total, reached = total + of_head, [true_iou]
        return Loss(total, reached[0][:full].mean())  # full prompts are the first group

    def _edge_losses(self, looked: Looked, edges: Tensor) -> Tensor:
        """Compute the loss of predicting edges (B, S/4, S/4) from the features at S/4 and S/16."""
        fine = edge_loss(self.fine_edges(looked.fine_maps[0]), edges)
        return fine + edge_loss(self.coarse_edges(looked.embedding), F.max_pool2d(edges[:, None], 4)[:, 0])
