"""A segmentation model without a network: whatever is bright near the prompt's box is the object."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from refinetool.backends import Arbiter, Embedding, Prediction
from refinetool.masks import iou
from refinetool.records import BoolArray, FloatArray, ImageArray, IntArray, Prompts, Size
from refinetool.settings import GuardThresholds, ModelDefaults

BRIGHT = 128
CAUTIOUS = ModelDefaults(guard=GuardThresholds(min_predicted_iou=0.76, min_expected_gain=0.2))


@dataclass(frozen=True)
class BrightEmbedding:
    """The bright pixels of a view."""

    bright: BoolArray

    @property
    def size(self) -> Size:
        return self.bright.shape[0], self.bright.shape[1]

    def similarity(self, masks: BoolArray) -> FloatArray:
        return np.repeat(self.bright[None].astype(np.float32), len(masks), axis=0)


@dataclass(frozen=True)
class BrightPrediction:
    """Candidate 0 and 2 are the bright pixels, candidate 1 is everything in the box, candidate 3 nothing."""

    boxes: FloatArray
    bright: BoolArray
    score: float

    @property
    def scores(self) -> FloatArray:
        return np.tile(np.array([self.score, 0.1, self.score, 0.0], np.float32), (len(self.boxes), 1))

    def overlap(self, masks: BoolArray) -> FloatArray:
        n = len(masks)
        columns = [self.masks(np.full(n, k)) for k in range(4)]
        return np.array([[iou(column[row], masks[row]) for column in columns] for row in range(n)], np.float32)

    def masks(self, choice: IntArray) -> BoolArray:
        found = np.zeros((len(choice), *self.bright.shape), dtype=np.bool_)
        for row, k in enumerate(choice):
            x0, y0, x1, y1 = (int(side) for side in self.boxes[row])
            if k != 3:
                found[row, y0:y1, x0:x1] = self.bright[y0:y1, x0:x1] | (k == 1)
        return found

    def logits(self, choice: IntArray) -> FloatArray:
        return np.where(self.masks(choice), 8.0, -8.0).astype(np.float32)

    def stability(self, offset: float) -> FloatArray:
        return np.full((len(self.boxes), 4), 1.0 if offset < 8 else 0.0, np.float32)


@dataclass(frozen=True)
class BrightBackend:
    """A backend whose answers are known: `score` is what it predicts as IoU."""

    name: str = "bright"
    defaults: ModelDefaults = field(default_factory=lambda: CAUTIOUS)
    views_at_once: int = 8
    fingerprint: str = "0" * 64
    score: float = 0.9
    arbiters: Sequence[Arbiter] = ()

    def embed(self, images: Sequence[ImageArray]) -> list[Embedding]:
        return [BrightEmbedding(image.min(axis=2) > BRIGHT) for image in images]

    def predict(self, embeddings: Sequence[Embedding], prompts: Sequence[Prompts]) -> list[Prediction]:
        predictions: list[Prediction] = []
        for embedding, asked in zip(embeddings, prompts, strict=True):
            assert isinstance(embedding, BrightEmbedding)
            assert asked.boxes is not None
            predictions.append(BrightPrediction(asked.boxes, embedding.bright, self.score))
        return predictions
