"""Backend of SAM2 and SAM2.1 (`sam2`), with a head or without.

All sizes are read from the model. Images are resized to S x S with torch's antialiased bilinear filter, as in
`SAM2Transforms`, without padding. Candidates are the four mask tokens: 0 the single-mask output, 1 to 3 the
alternatives. A head replaces the single-mask output; the alternatives, which are for ambiguous prompts, stay as they
are.
"""

from dataclasses import replace
from importlib.resources import files
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refinetool.backends.frames import Frame, rasterise, squashed
from refinetool.backends.predictions import SquareEmbedding
from refinetool.backends.questions import Question
from refinetool.backends.square import SquareBackend
from refinetool.modules.detail import DetailHead
from refinetool.modules.folded import FoldedHead
from refinetool.modules.heads import Decoded, Features, Head, Prompted
from refinetool.modules.sam2_passes import decode, encode, normalised, see
from refinetool.modules.two_way import TwoWay
from refinetool.records import ABSENT, ImageArray, Prompts, Size

BOX_CORNERS = (2, 3)
"""Labels of the upper left and lower right corner of a box among SAM2's points."""


class Sam2Backend(SquareBackend):
    """The backend of any `SAM2Base`, used as an image model without its memory.

    Variants are packaged configurations, such as `sam2.1/sam2.1_hiera_t`.
    """

    def __init__(self, model: nn.Module, *, head: nn.Module | None, **options: Any) -> None:
        super().__init__(model, **options)
        self.head = None if head is None else self._prepared(head)
        decoder = self.model.sam_mask_decoder
        decoder.transformer = TwoWay(decoder.transformer, self.model.sam_prompt_encoder.get_dense_pe())
        self._fine_maps = 2 if self.model.use_high_res_features_in_sam else 0

    def _prepared(self, head: nn.Module) -> Head:
        """Put a head on the device, in the precision of the backend."""
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        head = head.to(self.device).eval().requires_grad_(False)
        if isinstance(head, DetailHead):
            return FoldedHead(head, dtype=dtype)
        for layer in head.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
                layer.to(dtype)
        return cast("Head", head)

    @staticmethod
    def network(variant: str) -> nn.Module:
        # `build_sam2` of the package is not used: it needs Hydra's global state, and by default turns on a fallback
        # that replaces the single-mask output.
        from hydra.utils import instantiate
        from omegaconf import OmegaConf

        text = files("sam2").joinpath("configs", f"{variant}.yaml").read_text()
        model: nn.Module = instantiate(OmegaConf.create(text).model, _recursive_=True)
        return model

    @property
    def candidates(self) -> int:
        return int(self.model.sam_mask_decoder.num_mask_tokens)

    @property
    def mask_cells(self) -> int:
        return int(self.model.sam_prompt_encoder.mask_input_size[0])

    def _frame(self, view: Size) -> Frame:
        return squashed(view, side=self.model.image_size)

    def _pixels(self, image: ImageArray, frame: Frame) -> Tensor:
        pixels = self._on_device(image).permute(2, 0, 1).float() / 255
        resized = F.interpolate(pixels[None], frame.filled, mode="bilinear", align_corners=False, antialias=True)[0]
        return normalised(resized)

    def _encode(self, pixels: Tensor) -> list[tuple[Tensor, tuple[Tensor, ...]]]:
        features = self._see(pixels)
        extras = list(features.fine_maps)
        if self.head is not None:
            seen = self.head.look(features, self._encode_again)
            extras += [*([] if seen.embedding is None else [seen.embedding]), *seen.maps]
        return [(embedding, tuple(level[i] for level in extras)) for i, embedding in enumerate(features.embedding)]

    def _see(self, images: Tensor) -> Features:
        """Compute the features of images (B, 3, S, S), ImageNet-normalised."""
        return see(self.model, images)

    def _encode_again(self, images: Tensor) -> Tensor:
        """Compute the features at S/16 of further images (B, 3, S, S)."""
        return encode(self.model, images)

    @property
    def _no_mask(self) -> Tensor:
        weight: Tensor = self.model.sam_prompt_encoder.no_mask_embed.weight
        return weight

    @property
    def _iou_head(self) -> Any:
        return self.model.sam_mask_decoder.iou_prediction_head

    def _question(self, embedding: SquareEmbedding, prompts: Prompts) -> Question:
        """Prepare the prompts of a view; with a head, also the sides of its masks, see `heads.Prompted`."""
        question = super()._question(embedding, prompts)
        if self.head is None:
            return question
        cells = 2 * self.mask_cells
        if prompts.masks is None:
            sides = torch.zeros((len(prompts), cells, cells), device=self.device)
        else:
            logits = rasterise(torch.tensor(prompts.masks).to(self.device), embedding.frame, cells=cells)
            sides = (logits > 0).float() * 2 - 1
        return replace(question, extras=(sides,))

    def _token_question(self, tokens: Tensor) -> Question:
        """Prepare tokens; with a head, there is no mask for it to see."""
        question = super()._token_question(tokens)
        if self.head is None:
            return question
        cells = 2 * self.mask_cells
        return replace(question, extras=(torch.zeros((len(tokens), cells, cells), device=self.device),))

    def _run_decoder(
        self, embeddings: list[SquareEmbedding], question: Question
    ) -> tuple[Decoded, tuple[Tensor, Tensor], list[Tensor]]:
        """Run the decoder; returns its output, its points, and the head's maps of the images, one row per prompt."""
        if question.tokens is not None:
            points = _no_points(len(question.tokens), self.device)
            sparse, dense = question.tokens, self._dense_of_tokens(embeddings)
        else:  # outside autocast: bf16 is too imprecise for coordinates
            points = _tokens(question)
            sparse, dense = self.model.sam_prompt_encoder(points=points, boxes=None, masks=question.masks)
        extras = [torch.stack(level) for level in zip(*(embedding.extras for embedding in embeddings), strict=True)]
        fine, maps = extras[: self._fine_maps], extras[self._fine_maps :]
        if self.head is not None and self.head.augments:
            features = maps.pop(0)
        else:
            features = torch.stack([embedding.features for embedding in embeddings])
        positions = self.model.sam_prompt_encoder.get_dense_pe()
        with self._autocast():
            decoded = decode(self.model, features, fine, sparse=sparse, dense=dense, positions=positions)
        return decoded, points, maps

    def _decode_tokens(self, embeddings: list[SquareEmbedding], question: Question) -> tuple[Tensor, Tensor]:
        decoded, _, _ = self._run_decoder(embeddings, question)
        return decoded.logits, decoded.scores

    def _decode(self, embeddings: list[SquareEmbedding], question: Question) -> tuple[Tensor, Tensor]:
        decoded, points, maps = self._run_decoder(embeddings, question)
        logits, scores = decoded.logits, self._scored(decoded.scores, question)
        if self.head is None:
            return logits, scores
        (sides,) = question.extras
        with self._autocast():
            answer = self.head(maps, Prompted(points, sides), decoded)
        logits = F.interpolate(logits.float(), answer.logits.shape[-2:], mode="bilinear", align_corners=False)
        logits[:, 0] = answer.logits.float()
        if answer.scores is not None:
            scores = torch.cat((answer.scores.float()[:, None], scores[:, 1:].float()), 1)
        return logits, scores


def _tokens(question: Question) -> tuple[Tensor, Tensor]:
    """Return points in the order of SAM2's image predictor: the corners of the box first, labelled 2 and 3.

    The prompt encoder itself appends one absent point. If there are only masks, it gets another absent point, as in
    `SAM2Base` with a mask prompt.
    """
    coordinates, labels = [], []
    if question.boxes is not None:
        corners = question.boxes.reshape(-1, 2, 2)
        coordinates.append(corners)
        labels.append(torch.tensor(BOX_CORNERS, device=corners.device).expand(len(corners), 2))
    if question.points is not None:
        coordinates.append(question.points[0])
        labels.append(question.points[1])
    if not coordinates:
        assert question.masks is not None
        return _no_points(len(question.masks), question.masks.device)
    return torch.cat(coordinates, dim=1), torch.cat(labels, dim=1)


def _no_points(count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return one absent point for each of some rows."""
    return torch.zeros((count, 1, 2), device=device), torch.full((count, 1), ABSENT, device=device)
