"""Backends of SAM (`segment_anything`) and HQ-SAM (`segment_anything_hq`), built from the official classes.

Images are resized with Pillow's bilinear filter, as in the official predictor, the longer side to S = 1024, then
normalised and padded with zeros. Candidates: SAM has its four mask tokens, 0 the single-mask output and 1 to 3 the
alternatives. HQ-SAM corrects a mask of SAM by adding the logits of its own token, so it has two candidates: 0 the
single-mask output and 1 the alternative with the highest predicted IoU, both corrected.
"""

import warnings
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from refinetool.backends.frames import Frame, letterboxed
from refinetool.backends.predictions import SquareEmbedding
from refinetool.backends.questions import Question
from refinetool.backends.square import SquareBackend
from refinetool.modules.fused_attention import fuse_attention
from refinetool.modules.two_way import TwoWay, masks_of_cells
from refinetool.records import ImageArray, Size


def import_hq_sam() -> ModuleType:
    """Import `segment_anything_hq` without its warnings about old names in timm and its own TinyViT."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Importing from timm.models", category=FutureWarning)
        warnings.filterwarnings("ignore", message="Overwriting tiny_vit_", category=UserWarning)
        import segment_anything_hq
    package: ModuleType = segment_anything_hq
    return package


class SamBackend(SquareBackend):
    """The backend of SAM. Scores are the model's raw predictions and may leave 0..1.

    Variants are `vit_b`, `vit_l` and `vit_h`.
    """

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__(model, **options)
        if hasattr(self.model.image_encoder, "blocks"):  # TinyViT has its own attention
            fuse_attention(self.model.image_encoder)
        decoder = self.model.mask_decoder
        decoder.transformer = TwoWay(decoder.transformer, self.model.prompt_encoder.get_dense_pe())

    @staticmethod
    def network(variant: str) -> nn.Module:
        from segment_anything import sam_model_registry

        model: nn.Module = sam_model_registry[variant]()
        return model

    @property
    def candidates(self) -> int:
        return int(self.model.mask_decoder.num_mask_tokens)

    @property
    def mask_cells(self) -> int:
        return int(self.model.prompt_encoder.mask_input_size[0])

    def _frame(self, view: Size) -> Frame:
        return letterboxed(view, side=self.model.image_encoder.img_size)

    def _pixels(self, image: ImageArray, frame: Frame) -> Tensor:
        height, width = frame.filled
        resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
        pixels: Tensor = self.model.preprocess(self._on_device(np.asarray(resized)).permute(2, 0, 1))
        return pixels

    def _encode(self, pixels: Tensor) -> list[tuple[Tensor, tuple[Tensor, ...]]]:
        return [(features, ()) for features in self.model.image_encoder(pixels)]

    @property
    def _iou_head(self) -> Any:
        return self.model.mask_decoder.iou_prediction_head

    def _decode_tokens(self, embeddings: list[SquareEmbedding], question: Question) -> tuple[Tensor, Tensor]:
        sparse, dense = self._prompt(embeddings, question)
        features = torch.stack([embedding.features for embedding in embeddings]).float()
        decoder = self.model.mask_decoder
        own = torch.cat((decoder.iou_token.weight, decoder.mask_tokens.weight)).expand(len(sparse), -1, -1)
        with self._autocast():
            tokens, cells = decoder.transformer(features + dense, None, torch.cat((own, sparse), 1))
            of_masks = zip(decoder.output_hypernetworks_mlps, tokens[:, 1:].unbind(1), strict=False)
            logits = masks_of_cells(decoder, cells, torch.stack([mlp(token) for mlp, token in of_masks], 1))
            scores = decoder.iou_prediction_head(tokens[:, 0])
        return logits, scores

    @property
    def _no_mask(self) -> Tensor:
        weight: Tensor = self.model.prompt_encoder.no_mask_embed.weight
        return weight

    def _prompt(self, embeddings: list[SquareEmbedding], question: Question) -> tuple[Tensor, Tensor]:
        """Return sparse (N, tokens, C) and dense (N, C, g, g) prompt embeddings, in float32 for exact coordinates."""
        if question.tokens is not None:
            return question.tokens, self._dense_of_tokens(embeddings)
        sparse, dense = self.model.prompt_encoder(points=question.points, boxes=question.boxes, masks=question.masks)
        return sparse, dense


class HqSamBackend(SamBackend):
    """The backend of HQ-SAM. Variants are `vit_b`, `vit_l`, `vit_h` and `vit_tiny`."""

    mixes_images = False  # the decoder adds the fine features of one image to all rows

    @staticmethod
    def network(variant: str) -> nn.Module:
        model: nn.Module = import_hq_sam().sam_model_registry[variant]()
        return model

    @property
    def candidates(self) -> int:
        return 2

    def _encode(self, pixels: Tensor) -> list[tuple[Tensor, tuple[Tensor, ...]]]:
        features, early = self.model.image_encoder(pixels)
        decoder = self.model.mask_decoder
        # The decoder's features from the first global attention block are the same for all prompts: compute them once.
        fine = decoder.embedding_encoder(features) + decoder.compress_vit_feat(early[0].permute(0, 3, 1, 2))
        return [(features[i], (fine[i],)) for i in range(len(features))]

    def _decode(self, embeddings: list[SquareEmbedding], question: Question) -> tuple[Tensor, Tensor]:
        logits, scores = super()._decode(embeddings, question)
        single = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        best = 1 + scores[:, 1:].argmax(dim=1)
        chosen = torch.stack((single, best), dim=1)
        each = torch.arange(len(logits), device=logits.device)[:, None]
        return logits[each, chosen], scores[each, chosen]

    def _decode_tokens(self, embeddings: list[SquareEmbedding], question: Question) -> tuple[Tensor, Tensor]:
        sparse, dense = self._prompt(embeddings, question)
        (fine,) = embeddings[0].extras
        position = self.model.prompt_encoder.get_dense_pe()
        with self._autocast():
            logits, scores = self.model.mask_decoder.predict_masks(
                image_embeddings=embeddings[0].features[None],
                image_pe=position,
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                hq_features=fine[None],
            )
        return logits[:, :-1].float() + logits[:, -1:].float(), scores
