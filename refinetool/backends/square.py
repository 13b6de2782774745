"""The base class of backends whose models take square inputs.

A model is added by a subclass of `SquareBackend` that implements how a view becomes pixels, how pixels become features
and how prompts become masks. N rows, K candidates, S the input side, m = S/4 the mask grid, g = S/16 the feature grid.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from threading import Lock, get_ident
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from refinetool.backends import Arbiter, Embedding, Prediction
from refinetool.backends.batches import in_batches, power_of_two
from refinetool.backends.cache import EmbeddingCache
from refinetool.backends.frames import Frame, rasterise
from refinetool.backends.predictions import SquareEmbedding, SquarePrediction, TokenAnswers
from refinetool.backends.questions import Question, group_by_layout, joined
from refinetool.errors import UsageError, first_line
from refinetool.modules.iou_adapter import IouAdapter, merged
from refinetool.records import ImageArray, Prompts, Size
from refinetool.settings import ModelDefaults

Precision: TypeAlias = Literal["fp32", "bf16"]

HOOKS = Lock()
"""Held while a hook is added or removed, since torch numbers hooks without a lock."""


class SquareBackend(ABC):
    """A promptable model with square inputs of a fixed side: the `Backend` protocol, apart from the model itself.

    `base_fingerprint` is the hash of the model without any head, for what depends on encoder and decoder alone.

    Encoder and decoder are called with batches of a fixed size, so that the rounding of a view or a region does not
    depend on the rest of the batch: see `batches.in_batches`.
    """

    mixes_images = True
    """Whether a decoder call may hold rows of several images."""
    arbiters: Sequence[Arbiter] = ()

    def __init__(
        self,
        model: nn.Module,
        *,
        name: str,
        defaults: ModelDefaults,
        fingerprint: str,
        base_fingerprint: str,
        device: str,
        precision: Precision,
        image_batch: int,
        prompt_batch: int,
    ) -> None:
        # eval() must follow loading: TinyViT caches its attention biases in this call.
        self.model: Any = model.to(device).eval()
        self.name = name
        self.defaults = defaults
        self.fingerprint = fingerprint
        self.base_fingerprint = base_fingerprint
        self.device = torch.device(device)
        self.precision = precision
        self.image_batch, self.prompt_batch = power_of_two(image_batch), power_of_two(prompt_batch)
        self._cache: EmbeddingCache | None = None
        self._compiled = False
        if precision == "bf16":
            # Autocast would convert the weights in every call.
            for layer in model.get_submodule("image_encoder").modules():
                if isinstance(layer, nn.Linear | nn.Conv2d):
                    layer.to(torch.bfloat16)

    @property
    def views_at_once(self) -> int:
        """Enough views that neither encoder nor decoder is called with a batch that is mostly padding."""
        return max(self.image_batch, self.prompt_batch)

    def remember(self, folder: Path, *, limit: int) -> None:
        """Keep embeddings in a folder of at most `limit` bytes from now on, and use those that it has.

        Raises:
            StorageError: The folder can't be made.
        """
        encoder = "compiled" if self._compiled else "plain"  # they round differently
        about = (self.fingerprint, encoder, self.precision, self.device.type, str(self.image_batch), version("torch"))
        self._cache = EmbeddingCache(folder, limit=limit, about=(*about, version("refinetool")))

    def compile(self) -> None:
        """Compile the encoder with `torch.compile`, and run it once, which takes a minute or more.

        Raises:
            UsageError: It can't be compiled here, for example because there is no C++ compiler.
        """
        self._encode = torch.compile(self._encode, dynamic=False)  # type: ignore[method-assign]
        self._compiled = True
        try:
            self.embed([np.zeros((64, 64, 3), dtype=np.uint8)])
        except Exception as error:
            raise UsageError(
                f"the encoder of {self.name} can't be compiled here: {first_line(error)}; drop --compile"
            ) from error

    def embed(self, images: Sequence[ImageArray]) -> list[Embedding]:
        cache = self._cache
        if cache is None:
            return list(self._encoded(images))
        held = [cache.find(image) for image in images]
        fresh = iter(self._encoded([image for image, tensors in zip(images, held, strict=True) if tensors is None]))
        embeddings: list[Embedding] = []
        for image, tensors in zip(images, held, strict=True):
            if tensors is None:
                embedding = next(fresh)
                cache.keep(image, (embedding.features, *embedding.extras))
            else:
                features, *extras = (tensor.to(self.device) for tensor in tensors)
                embedding = SquareEmbedding(self._frame((image.shape[0], image.shape[1])), features, tuple(extras))
            embeddings.append(embedding)
        return embeddings

    def _encoded(self, images: Sequence[ImageArray]) -> list[SquareEmbedding]:
        with torch.inference_mode():
            return in_batches(images, size=self.image_batch, call=self._embed)

    def _embed(self, images: Sequence[ImageArray]) -> list[SquareEmbedding]:
        frames = [self._frame((image.shape[0], image.shape[1])) for image in images]
        pixels = torch.stack([self._pixels(image, frame) for image, frame in zip(images, frames, strict=True)])
        with self._autocast():
            encoded = self._encode(pixels)
        pairs = zip(frames, encoded, strict=True)
        return [SquareEmbedding(frame, features, extras) for frame, (features, extras) in pairs]

    def predict(self, embeddings: Sequence[Embedding], prompts: Sequence[Prompts]) -> list[Prediction]:
        answers: dict[int, Prediction] = {}
        for members in group_by_layout(prompts, mixed=self.mixes_images):
            of_members = [_own(embeddings[i]) for i in members]
            with torch.inference_mode():
                rows = self._rows(of_members, [prompts[i] for i in members], call=self._answer)
            for i, embedding, own in zip(members, of_members, rows, strict=True):
                logits, scores = zip(*own, strict=True) if own else ((), ())
                shape = (len(own), self.candidates, self.mask_cells, self.mask_cells)
                answers[i] = SquarePrediction(
                    embedding.frame,
                    torch.stack(logits) if own else torch.zeros(shape, device=self.device),
                    torch.stack(scores) if own else torch.zeros(shape[:2], device=self.device),
                )
        return [answers[i] for i in range(len(prompts))]

    # --- prompts that are tokens

    def predict_from_tokens(self, embedding: Embedding, tokens: Tensor) -> SquarePrediction:
        """Predict masks for prompts that are embedded already, as by the reference encoder.

        Args:
            embedding: Of one view.
            tokens: float (N, T, C) on the model's device, T tokens for each of N >= 1 rows; C is `token_width`. They
                enter the decoder as they are, without positions, types or padding.
        """
        own = _own(embedding)
        with torch.inference_mode():
            rows = in_batches(
                range(len(tokens)),
                size=self.prompt_batch,
                call=lambda rows: self._answer([own] * len(rows), self._token_question(tokens[list(rows)])),
            )
        logits, scores = (torch.stack(parts) for parts in zip(*rows, strict=True))
        return SquarePrediction(own.frame, logits, scores)

    def decode_tokens(self, embeddings: Sequence[Embedding], tokens: Tensor) -> Tensor:
        """Do the same for one row per embedding, as training needs it: tokens get gradients.

        Returns:
            float32 (N, m, m): the logits of the single-mask output.
        """
        question = Question(None, None, None, tokens=tokens)
        own = [_own(embedding) for embedding in embeddings]
        if self.mixes_images:
            logits, _ = self._decode_tokens(own, question)
        else:
            each = [self._decode_tokens([one], question.take([row]))[0] for row, one in enumerate(own)]
            logits = torch.cat(each)
        return logits[:, 0].float()

    def _token_question(self, tokens: Tensor) -> Question:
        return Question(None, None, None, tokens=tokens)

    @property
    def token_width(self) -> int:
        """C, the channels of a prompt token."""
        return int(self._no_mask.shape[-1])

    def _rows(
        self,
        embeddings: list[SquareEmbedding],
        prompts: list[Prompts],
        *,
        call: Callable[[list[SquareEmbedding], Question], Sequence[tuple[Tensor, ...]]],
    ) -> list[list[tuple[Tensor, ...]]]:
        """Return the result of a call for each row of prompts of each view; all prompts have the same layout."""
        for one in prompts:
            if len(one) and not one.labels.shape[1] and one.boxes is None and one.masks is None:
                raise ValueError("the prompts hold neither points nor boxes nor masks")
        questions = [
            self._question(embedding, one) for embedding, one in zip(embeddings, prompts, strict=True) if len(one)
        ]
        if not questions:
            return [[] for _ in prompts]
        question = joined(questions)
        owner = [embedding for embedding, one in zip(embeddings, prompts, strict=True) for _ in range(len(one))]
        found = iter(
            in_batches(
                range(len(owner)),
                size=self.prompt_batch,
                call=lambda rows: call([owner[row] for row in rows], question.take(rows)),
            )
        )
        return [[next(found) for _ in range(len(one))] for one in prompts]

    def _answer(self, embeddings: list[SquareEmbedding], question: Question) -> list[tuple[Tensor, ...]]:
        logits, scores = self._decode(embeddings, question)
        return list(zip(logits.float(), scores.float(), strict=True))

    # --- predicted IoUs

    @property
    def score_layer(self) -> nn.Linear:
        """The last layer of the IoU head, with the adapter if there is one: H features -> T scores, one per token."""
        layer: nn.Linear | _TwoLayers = self._iou_head.layers[-1]
        return layer.without_mask if isinstance(layer, _TwoLayers) else layer

    def adapt(self, adapter: IouAdapter) -> None:
        """Use an adapter to predict IoUs from now on: for all prompts, or only for those without a mask.

        Raises:
            WeightsError: The adapter is for an IoU head of other sizes.
        """
        plain = self.score_layer
        corrected = merged(adapter, plain)
        self._iou_head.layers[-1] = _TwoLayers(corrected, corrected if adapter.with_masks else plain)

    def _scored(self, scores: Tensor, question: Question) -> Tensor:
        """Select the scores (N, T) to use from the output of the IoU head."""
        if not isinstance(self._iou_head.layers[-1], _TwoLayers):
            return scores
        without_mask, with_mask = scores.chunk(2, dim=1)
        return without_mask if question.masks is None else with_mask

    @property
    def scores_are_probabilities(self) -> bool:
        """Whether a sigmoid follows that layer."""
        return bool(self._iou_head.sigmoid_output)

    def predict_tokens(self, embedding: Embedding, prompts: Prompts) -> TokenAnswers:
        """Predict with all mask tokens for at least one row of prompts of one view, and return the scores' features.

        The scores are `score_layer` of the features, followed by a sigmoid if `scores_are_probabilities`.
        """
        own = _own(embedding)
        with torch.no_grad():
            (rows,) = self._rows([own], [prompts], call=self._answer_tokens)
        features, logits, scores = (torch.stack(parts) for parts in zip(*rows, strict=True))
        return TokenAnswers(features, SquarePrediction(own.frame, logits, scores))

    def _answer_tokens(self, embeddings: list[SquareEmbedding], question: Question) -> list[tuple[Tensor, ...]]:
        features: list[Tensor] = []
        thread = get_ident()

        def store_inputs(_layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            if get_ident() == thread:  # others may be in the same layer
                features.append(inputs[0].float())

        with HOOKS:
            handle = self._iou_head.layers[-1].register_forward_pre_hook(store_inputs)
        try:
            logits, scores = self._decode_tokens(embeddings, question)
        finally:
            with HOOKS:
                handle.remove()
        return list(zip(features[0], logits.float(), self._scored(scores, question).float(), strict=True))

    # --- prompts

    def _question(self, embedding: SquareEmbedding, prompts: Prompts) -> Question:
        """Convert the prompts of one view, at least one, to the model's format."""
        frame = embedding.frame
        has_points = prompts.labels.shape[1] > 0
        coordinates = torch.from_numpy(frame.place_points(prompts.points, prompts.labels)).to(self.device)
        labels = torch.from_numpy(prompts.labels.copy()).to(self.device)
        masks = None
        if prompts.masks is not None:
            masks = rasterise(torch.tensor(prompts.masks).to(self.device), frame, cells=self.mask_cells)[:, None]
        return Question(
            points=(coordinates, labels) if has_points else None,
            boxes=None if prompts.boxes is None else torch.from_numpy(frame.place_boxes(prompts.boxes)).to(self.device),
            masks=masks,
        )

    def _on_device(self, array: ImageArray) -> Tensor:
        """Copy pixels to the device; to a GPU from pinned memory, while it computes."""
        host = torch.tensor(array)
        return host.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else host

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    # --- the model itself

    @staticmethod
    @abstractmethod
    def network(variant: str) -> nn.Module:
        """Build the architecture from its official classes, with random weights from torch's global generator."""

    @property
    @abstractmethod
    def candidates(self) -> int:
        """K: number of candidate masks per region."""

    @property
    @abstractmethod
    def mask_cells(self) -> int:
        """m: rows and columns of the grid of mask prompts and predicted masks."""

    @abstractmethod
    def _frame(self, view: Size) -> Frame:
        """Return the position of a view of this size in the square."""

    @abstractmethod
    def _pixels(self, image: ImageArray, frame: Frame) -> Tensor:
        """Return the model's input for one view: float32 (3, S, S) on the device."""

    @abstractmethod
    def _encode(self, pixels: Tensor) -> list[tuple[Tensor, tuple[Tensor, ...]]]:
        """Return features and extras of each image of a batch (B, 3, S, S)."""

    @property
    @abstractmethod
    def _no_mask(self) -> Tensor:
        """(1, C), the embedding of the absence of a mask prompt."""

    def _dense_of_tokens(self, embeddings: list[SquareEmbedding]) -> Tensor:
        """Return the dense prompt embedding of rows without a mask: (N, C, g, g)."""
        g = embeddings[0].features.shape[-1]
        return self._no_mask.reshape(1, -1, 1, 1).expand(len(embeddings), -1, g, g)

    @property
    @abstractmethod
    def _iou_head(self) -> Any:
        """The `MLP` that predicts the IoU of each mask token."""

    @abstractmethod
    def _decode_tokens(self, embeddings: list[SquareEmbedding], question: Question) -> tuple[Tensor, Tensor]:
        """Return logits (N, T, m, m) and scores (N, T) of all mask tokens, for one embedding and one prompt per row."""

    def _decode(self, embeddings: list[SquareEmbedding], question: Question) -> tuple[Tensor, Tensor]:
        """Return logits (N, K, m, m) and predicted IoUs (N, K). By default every mask token is a candidate."""
        logits, scores = self._decode_tokens(embeddings, question)
        return logits, self._scored(scores, question)


class _TwoLayers(nn.Module):
    """Two last layers of an IoU head side by side; their scores (N, T) are concatenated to (N, 2 T)."""

    def __init__(self, without_mask: nn.Linear, with_mask: nn.Linear) -> None:
        super().__init__()
        self.without_mask, self.with_mask = without_mask, with_mask

    def forward(self, features: Tensor) -> Tensor:
        return torch.cat((self.without_mask(features), self.with_mask(features)), dim=-1)


def _own(embedding: Embedding) -> SquareEmbedding:
    assert isinstance(embedding, SquareEmbedding), "an embedding of another backend"
    return embedding
