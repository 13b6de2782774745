"""What all models share that see a square: embeddings, predictions, and the way of prompts into the model.

A model is adapted by a subclass of `SquareBackend` that says how a view becomes pixels, how pixels become features
and how prompts are answered. N rows, K candidates, S the input side, m = S/4 the mask grid, g = S/16 the feature grid.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refinetool.backends import Embedding, Prediction, Selection
from refinetool.backends.frames import Frame, in_view, pick_cells, rasterise, sample
from refinetool.modules.iou_adapter import IouAdapter, merged
from refinetool.records import BoolArray, FloatArray, ImageArray, IntArray, Prompts, Size

Precision: TypeAlias = Literal["fp32", "bf16"]

PIXELS_AT_ONCE = 2**25
"""Full-size mask pixels, as float32, that are worked on at a time: 128 MiB."""

LARGEST_LOGIT = 32.0
"""Bound of logits that go in again as a mask prompt, as in the official predictors."""


@dataclass(frozen=True, slots=True, eq=False)
class SquareEmbedding:
    """What a model has seen of one view.

    features: (C, g, g), what the mask decoder gets.
    extras: further maps of the image that the decoder of this model wants.
    """

    frame: Frame
    features: Tensor
    extras: tuple[Tensor, ...]

    @property
    def size(self) -> Size:
        return self.frame.view

    def similarity(self, masks: BoolArray) -> FloatArray:
        """Cosine of every cell with the mean feature under each mask: see `Embedding` (SAMRefiner eq. 1 and 2).

        As in eq. 1 the mean is taken before normalisation.
        """
        cells = self.features.shape[-1]
        picked = torch.from_numpy(pick_cells(masks, self.frame, cells=cells)).to(self.features.device)
        height, width = picked.shape[1:]
        features = self.features[:, :height, :width].flatten(1).float()
        weights = picked.flatten(1).float()
        means = weights @ features.T / weights.sum(dim=1, keepdim=True).clamp(min=1)
        cosine = F.normalize(means, dim=1) @ F.normalize(features, dim=0)
        extent = self.frame.extent(cells)
        exact = sample(
            cosine.clamp(-1, 1).reshape(-1, height, width),
            (height, width),
            step=(extent[0] / height, extent[1] / width),
        )
        similarity: FloatArray = exact.cpu().numpy()
        return similarity


@dataclass(frozen=True, slots=True, eq=False)
class SquarePrediction:
    """Answers for N regions of one view: logits (N, K, m, m) and predicted IoUs (N, K), float32 on the device."""

    frame: Frame
    grid: Tensor
    predicted_iou: Tensor

    @property
    def scores(self) -> FloatArray:
        scores: FloatArray = self.predicted_iou.cpu().numpy()
        return scores

    def overlap(self, masks: BoolArray) -> FloatArray:
        """IoU of each candidate with its mask on the mask grid, padding left out; 1 where both are empty."""
        cells = self.grid.shape[-1]
        shown = in_view(self.frame, cells=cells).to(self.grid.device)
        ious = torch.zeros(self.predicted_iou.shape)
        for rows in _chunks(len(masks), self.frame.view):
            given = torch.tensor(masks[rows]).to(self.grid.device)
            mask = (rasterise(given * 2.0 - 1.0, self.frame, cells=cells) > 0)[:, None] & shown
            candidates = (self.grid[rows] > 0) & shown
            shared = (candidates & mask).sum(dim=(2, 3))
            either = (candidates | mask).sum(dim=(2, 3))
            ious[rows] = torch.where(either > 0, shared / either, 1.0).cpu()
        result: FloatArray = ious.numpy()
        return result

    def masks(self, choice: IntArray) -> BoolArray:
        """The chosen candidates at view size.

        The official way is m -> S pixels -> cut off padding -> view, bilinear twice. Here the part of the mask grid
        that the view covers is read bilinearly once, at the same positions.
        """
        view = self.frame.view
        chosen = self._chosen(choice)
        extent = self.frame.extent(chosen.shape[-1])
        masks = np.zeros((len(choice), *view), dtype=np.bool_)
        for part in _chunks(len(choice), view):
            full = sample(chosen[part], view, step=(extent[0] / view[0], extent[1] / view[1]))
            masks[part] = (full > 0).cpu().numpy()
        return masks

    def logits(self, choice: IntArray) -> FloatArray:
        chosen = self._chosen(choice).clamp(-LARGEST_LOGIT, LARGEST_LOGIT)
        extent = self.frame.extent(chosen.shape[-1])
        height, width = (math.ceil(cells) for cells in extent)
        exact = sample(chosen[:, :height, :width], (height, width), step=(extent[0] / height, extent[1] / width))
        result: FloatArray = exact.cpu().numpy()
        return result

    def stability(self, offset: float) -> FloatArray:
        shown = in_view(self.frame, cells=self.grid.shape[-1]).to(self.grid.device)
        inner = ((self.grid > offset) & shown).sum(dim=(2, 3))
        outer = ((self.grid > -offset) & shown).sum(dim=(2, 3))  # holds the inner one
        result: FloatArray = torch.where(outer > 0, inner / outer, 1.0).cpu().numpy()
        return result

    def _chosen(self, choice: IntArray) -> Tensor:
        rows = torch.arange(len(choice), device=self.grid.device)
        return self.grid[rows, torch.tensor(choice).to(self.grid.device)]


@dataclass(frozen=True, slots=True, eq=False)
class TokenAnswers:
    """What the decoder made of N rows before a candidate is chosen: what IoU adaption learns from.

    features: float32 (N, H), the input of the last layer of the IoU head.
    tokens: the answers of all T mask tokens, 0 the single-mask output, as the decoder gave them.
    """

    features: Tensor
    tokens: SquarePrediction


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """The prompts of N rows in the frame of the model, on its device.

    points: (N, P, 2) in model pixels, labels int (N, P); None where no row may have any.
    boxes: (N, 4) xyxy in model pixels, or None.
    masks: (N, 1, m, m) logits, or None.
    """

    points: tuple[Tensor, Tensor] | None
    boxes: Tensor | None
    masks: Tensor | None


class SquareBackend(ABC):
    """A promptable model that sees squares of a fixed side: the `Backend` protocol, apart from the model itself."""

    def __init__(
        self,
        model: nn.Module,
        *,
        name: str,
        view: Literal["frame", "crop"],
        selection: Selection,
        snap: Literal["none", "guided"],
        trust: Literal["none", "outline"],
        fingerprint: str,
        device: str,
        precision: Precision,
    ) -> None:
        # eval() belongs after loading: TinyViT caches its attention biases in that very call.
        self.model: Any = model.to(device).eval()
        self.name = name
        self.view: Literal["frame", "crop"] = view
        self.selection: Selection = selection
        self.snap: Literal["none", "guided"] = snap
        self.trust: Literal["none", "outline"] = trust
        self.fingerprint = fingerprint
        self.device = torch.device(device)
        self.precision = precision
        self._score_layers = (self.score_layer, self.score_layer)

    def embed(self, images: Sequence[ImageArray]) -> list[Embedding]:
        if not images:
            return []
        frames = [self._frame((image.shape[0], image.shape[1])) for image in images]
        with torch.no_grad():
            pixels = torch.stack([self._pixels(image, frame) for image, frame in zip(images, frames, strict=True)])
            with self._autocast():
                encoded = self._encode(pixels)
        pairs = zip(frames, encoded, strict=True)
        return [SquareEmbedding(frame, features, extras) for frame, (features, extras) in pairs]

    def predict(self, embeddings: Sequence[Embedding], prompts: Sequence[Prompts]) -> list[Prediction]:
        answers: dict[int, Prediction] = {}
        # A decoder call mixes images, but not layouts: padding the tokens of one row would change its answer.
        for members in _alike(prompts).values():
            asked = [_own(embeddings[i]) for i in members]
            rows = [len(prompts[i]) for i in members]
            with torch.no_grad():
                logits, scores = self._answer(asked, [prompts[i] for i in members])
            parts = zip(members, asked, torch.split(logits, rows), torch.split(scores, rows), strict=True)
            answers.update((i, SquarePrediction(embedding.frame, part, score)) for i, embedding, part, score in parts)
        return [answers[i] for i in range(len(prompts))]

    @property
    def score_layer(self) -> nn.Linear:
        """The last layer of the IoU head: H features -> T scores, one per mask token."""
        layer: nn.Linear = self._iou_head.layers[-1]
        return layer

    def adapt(self, adapter: IouAdapter) -> None:
        """Predict IoUs with an adapter from now on: for all prompts, or only for those without a mask.

        Raises:
            WeightsError: the adapter is for an IoU head of other sizes.
        """
        plain = self.score_layer
        corrected = merged(adapter, plain)
        self._score_layers = (corrected, corrected if adapter.with_masks else plain)

    @property
    def scores_are_probabilities(self) -> bool:
        """Whether a sigmoid follows that layer."""
        return bool(self._iou_head.sigmoid_output)

    def predict_tokens(self, embedding: Embedding, prompts: Prompts) -> TokenAnswers:
        """Answer at least one row of prompts about one view with all mask tokens, and show what the scores come from.

        The scores are `score_layer` of the features, through a sigmoid where `scores_are_probabilities`.
        """
        own = _own(embedding)
        seen: list[Tensor] = []

        def note(_layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen.append(inputs[0].float())

        question = self._question([own], [prompts])
        self._pick_score_layer(question)
        handle = self.score_layer.register_forward_pre_hook(note)
        try:
            with torch.no_grad():
                logits, scores = self._decode_tokens([own], [len(prompts)], question)
        finally:
            handle.remove()
        return TokenAnswers(torch.cat(seen), SquarePrediction(own.frame, logits.float(), scores.float()))

    def _answer(self, embeddings: list[SquareEmbedding], prompts: list[Prompts]) -> tuple[Tensor, Tensor]:
        rows = [len(asked) for asked in prompts]
        if not any(rows):
            empty = torch.zeros((0, self.candidates, self.mask_cells, self.mask_cells), device=self.device)
            return empty, empty[:, :, 0, 0]
        question = self._question(embeddings, prompts)
        self._pick_score_layer(question)
        logits, scores = self._decode(embeddings, rows, question)
        return logits.float(), scores.float()

    def _pick_score_layer(self, question: Question) -> None:
        """Put the layer into the IoU head that is to score the answers to a question."""
        without_mask, with_mask = self._score_layers
        self._iou_head.layers[-1] = without_mask if question.masks is None else with_mask

    def _question(self, embeddings: list[SquareEmbedding], prompts: list[Prompts]) -> Question:
        frames = [embedding.frame for embedding in embeddings]
        pairs = list(zip(frames, prompts, strict=True))
        coordinates = np.concatenate([frame.place_points(asked.points, asked.labels) for frame, asked in pairs])
        labels = np.concatenate([asked.labels for asked in prompts])
        boxes = [frame.place_boxes(asked.boxes) for frame, asked in pairs if asked.boxes is not None]
        masks = [
            rasterise(torch.tensor(asked.masks).to(self.device), frame, cells=self.mask_cells)
            for frame, asked in pairs
            if asked.masks is not None
        ]
        has_points = labels.shape[1] > 0
        if not (has_points or boxes or masks):
            raise ValueError("the prompts hold neither points nor boxes nor masks")
        return Question(
            points=(torch.from_numpy(coordinates).to(self.device), torch.from_numpy(labels).to(self.device))
            if has_points
            else None,
            boxes=torch.from_numpy(np.concatenate(boxes)).to(self.device) if boxes else None,
            masks=torch.cat(masks)[:, None] if masks else None,
        )

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    @property
    @abstractmethod
    def candidates(self) -> int:
        """K: how many masks the model offers for a region."""

    @property
    @abstractmethod
    def mask_cells(self) -> int:
        """m: rows and columns of the grid that masks come and go on."""

    @abstractmethod
    def _frame(self, view: Size) -> Frame:
        """Where a view of this size goes in the square."""

    @abstractmethod
    def _pixels(self, image: ImageArray, frame: Frame) -> Tensor:
        """The model's input for one view: float32 (3, S, S) on the device."""

    @abstractmethod
    def _encode(self, pixels: Tensor) -> list[tuple[Tensor, tuple[Tensor, ...]]]:
        """Features and extras of each image of a batch (B, 3, S, S)."""

    @property
    @abstractmethod
    def _iou_head(self) -> Any:
        """The `MLP` that predicts the IoU of each mask token."""

    @abstractmethod
    def _decode_tokens(
        self, embeddings: list[SquareEmbedding], rows: list[int], question: Question
    ) -> tuple[Tensor, Tensor]:
        """Logits (N, T, m, m) and scores (N, T) of all mask tokens; the first `rows[0]` rows are the first image's."""

    def _decode(self, embeddings: list[SquareEmbedding], rows: list[int], question: Question) -> tuple[Tensor, Tensor]:
        """Logits (N, K, m, m) and predicted IoUs (N, K): the mask tokens are the candidates, unless there are fewer."""
        return self._decode_tokens(embeddings, rows, question)


def owners(rows: list[int], *, device: torch.device) -> Tensor:
    """Which image each row belongs to: [2, 1] gives (0, 0, 1)."""
    return torch.repeat_interleave(torch.tensor(rows)).to(device)


def _own(embedding: Embedding) -> SquareEmbedding:
    assert isinstance(embedding, SquareEmbedding), "an embedding of another backend"
    return embedding


def _alike(prompts: Sequence[Prompts]) -> dict[tuple[int, bool, bool], list[int]]:
    """Indices of prompts with the same number of points and the same other parts."""
    groups: dict[tuple[int, bool, bool], list[int]] = {}
    for i, asked in enumerate(prompts):
        layout = (asked.labels.shape[1], asked.boxes is None, asked.masks is None)
        groups.setdefault(layout, []).append(i)
    return groups


def _chunks(count: int, size: Size) -> Iterator[slice]:
    at_once = max(1, PIXELS_AT_ONCE // math.prod(size))
    return (slice(start, start + at_once) for start in range(0, count, at_once))
