"""The backend of the embedded model: SAM2's steps, followed by the detail head.

The detail head corrects only the single-mask output. The three alternatives of the decoder stay as they are: they are
for ambiguous prompts, and the head was trained for coarse masks.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refinetool.backends.frames import rasterise
from refinetool.backends.sam2 import IMAGE_MEAN, IMAGE_STD, Sam2Backend
from refinetool.backends.square import Question, SquareEmbedding
from refinetool.modules.embedded import IMAGE_SIZE, build_embedded
from refinetool.modules.folded import FoldedEncoder, FoldedHead
from refinetool.records import ABSENT, Prompts

DECODER_MAPS = 2
"""How many of an embedding's extras belong to the decoder; the others belong to the detail head."""
POINTS = 2
"""Number of points per prompt. The model was trained with a positive and a negative point in every prompt, labelled
absent where there is none."""


class EmbeddedBackend(Sam2Backend):
    """The backend of `EmbeddedModel`. Its masks are on a grid of S/2."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__(model, **options)
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        self._head = FoldedHead(self.model.detail, dtype=dtype)
        self._encoder = FoldedEncoder(self.model, self._head, dtype=dtype)

    @staticmethod
    def network(variant: str) -> nn.Module:
        assert not variant, "there is one embedded model"
        model: nn.Module = build_embedded(image_size=IMAGE_SIZE)
        return model

    def _encode(self, pixels: Tensor) -> list[tuple[Tensor, tuple[Tensor, ...]]]:
        mean, std = (torch.tensor(values, device=self.device).view(3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD))
        encoded = self._encoder(pixels, (pixels * std + mean).clamp(0, 1))
        extras = (*encoded.fine_maps, *encoded.seen)
        return [(features, tuple(level[i] for level in extras)) for i, features in enumerate(encoded.embedding)]

    def _fine_maps(self, embedding: SquareEmbedding) -> tuple[Tensor, ...]:
        return embedding.extras[:DECODER_MAPS]

    def _question(self, embedding: SquareEmbedding, prompts: Prompts) -> Question:
        """Prepare the prompts of a view, with masks for the detail head: 1 inside, -1 outside, 0 without a mask."""
        question = super()._question(embedding, _with_all_points(prompts))
        cells = 2 * self.mask_cells
        if prompts.masks is None:
            sides = torch.zeros((len(prompts), cells, cells), device=self.device)
        else:
            logits = rasterise(torch.tensor(prompts.masks).to(self.device), embedding.frame, cells=cells)
            sides = (logits > 0).float() * 2 - 1
        return replace(question, extras=(sides,))

    def _token_question(self, tokens: Tensor) -> Question:
        """Prepare tokens, with no mask for the detail head to see."""
        cells = 2 * self.mask_cells
        sides = torch.zeros((len(tokens), cells, cells), device=self.device)
        return replace(super()._token_question(tokens), extras=(sides,))

    def _decode(self, embeddings: list[SquareEmbedding], question: Question) -> tuple[Tensor, Tensor]:
        decoded, scores = super()._decode(embeddings, question)
        decoded, scores = decoded.float(), scores.float()
        (sides,) = question.extras
        own = (embedding.extras[DECODER_MAPS:] for embedding in embeddings)
        seen = [torch.stack(level) for level in zip(*own, strict=True)]
        with self._autocast():
            refined, score = self._head(seen, sides, decoded[:, 0])
        logits = F.interpolate(decoded, sides.shape[-2:], mode="bilinear", align_corners=False)
        logits[:, 0], scores[:, 0] = refined.float(), score.float()
        return logits, scores


def _with_all_points(prompts: Prompts) -> Prompts:
    missing = max(POINTS - prompts.labels.shape[1], 0)
    return replace(
        prompts,
        points=np.pad(prompts.points, ((0, 0), (0, missing), (0, 0))),
        labels=np.pad(prompts.labels, ((0, 0), (0, missing)), constant_values=ABSENT),
    )
