"""The backend of the embedded model: that of SAM 2, with an encoder prepared for one size of input."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from refinetool.backends.predictions import SquareEmbedding
from refinetool.backends.questions import Question
from refinetool.backends.sam2 import Sam2Backend
from refinetool.modules.embedded import IMAGE_SIZE, build_embedded
from refinetool.modules.folded import FoldedEncoder
from refinetool.modules.heads import Features
from refinetool.records import ABSENT, Prompts

POINTS = 2
"""Number of points per prompt. The model was trained with a positive and a negative point in every prompt, labelled
absent where there is none."""


class EmbeddedBackend(Sam2Backend):
    """The backend of `EmbeddedModel`."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__(model, **options)
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        self._encoder = FoldedEncoder(self.model, dtype=dtype)

    @staticmethod
    def network(variant: str) -> nn.Module:
        assert not variant, "there is one embedded model"
        model: nn.Module = build_embedded(image_size=IMAGE_SIZE)
        return model

    def _see(self, images: Tensor) -> Features:
        wants_pyramid = self.head is not None and self.head.wants_pyramid
        return super()._see(images) if wants_pyramid else self._encoder.see(images)

    def _encode_again(self, images: Tensor) -> Tensor:
        return self._encoder.encode(images)

    def _question(self, embedding: SquareEmbedding, prompts: Prompts) -> Question:
        return super()._question(embedding, _with_all_points(prompts))


def _with_all_points(prompts: Prompts) -> Prompts:
    missing = max(POINTS - prompts.labels.shape[1], 0)
    return replace(
        prompts,
        points=np.pad(prompts.points, ((0, 0), (0, missing), (0, 0))),
        labels=np.pad(prompts.labels, ((0, 0), (0, missing)), constant_values=ABSENT),
    )
