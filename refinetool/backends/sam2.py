"""Backend of SAM2 and SAM2.1 (`sam2`).

All sizes are read from the model. Images are resized to S x S with torch's antialiased bilinear filter, as in
`SAM2Transforms`, without padding. Candidates are the four mask tokens: 0 the single-mask output, 1 to 3 the
alternatives.
"""

from importlib.resources import files
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refinetool.backends.frames import Frame, squashed
from refinetool.backends.square import Question, SquareBackend, SquareEmbedding
from refinetool.modules.two_way import TwoWay
from refinetool.records import ABSENT, ImageArray, Size

IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BOX_CORNERS = (2, 3)
"""Labels of the upper left and lower right corner of a box among SAM2's points."""


class Sam2Backend(SquareBackend):
    """The backend of any `SAM2Base`, used as an image model without its memory.

    Variants are packaged configurations, such as `sam2.1/sam2.1_hiera_t`.
    """

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__(model, **options)
        decoder = self.model.sam_mask_decoder
        decoder.transformer = TwoWay(decoder.transformer, self.model.sam_prompt_encoder.get_dense_pe())

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
        mean, std = (torch.tensor(values, device=self.device).view(3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD))
        pixels = self._on_device(image).permute(2, 0, 1).float() / 255
        resized = F.interpolate(pixels[None], frame.filled, mode="bilinear", align_corners=False, antialias=True)[0]
        return (resized - mean) / std

    def _encode(self, pixels: Tensor) -> list[tuple[Tensor, tuple[Tensor, ...]]]:
        *fine, features = self.model.forward_image(pixels)["backbone_fpn"][-self.model.num_feature_levels :]
        if self.model.directly_add_no_mem_embed:
            features = features + self.model.no_mem_embed.reshape(1, -1, 1, 1)
        return [(features[i], tuple(level[i] for level in fine)) for i in range(len(features))]

    @property
    def _no_mask(self) -> Tensor:
        weight: Tensor = self.model.sam_prompt_encoder.no_mask_embed.weight
        return weight

    @property
    def _iou_head(self) -> Any:
        return self.model.sam_mask_decoder.iou_prediction_head

    def _fine_maps(self, embedding: SquareEmbedding) -> tuple[Tensor, ...]:
        """Return the decoder's maps at S/4 and S/8, or none."""
        return embedding.extras

    def _decode_tokens(self, embeddings: list[SquareEmbedding], question: Question) -> tuple[Tensor, Tensor]:
        if question.tokens is not None:
            sparse, dense = question.tokens, self._dense_of_tokens(embeddings)
        else:  # outside autocast: bf16 is too imprecise for coordinates
            sparse, dense = self.model.sam_prompt_encoder(points=_tokens(question), boxes=None, masks=question.masks)
        fine = [torch.stack(level) for level in zip(*map(self._fine_maps, embeddings), strict=True)]
        position = self.model.sam_prompt_encoder.get_dense_pe()
        with self._autocast():
            logits, scores, _, _ = self.model.sam_mask_decoder.predict_masks(
                image_embeddings=torch.stack([embedding.features for embedding in embeddings]),
                image_pe=position,
                sparse_prompt_embeddings=sparse,
                dense_prompt_embeddings=dense,
                repeat_image=False,
                high_res_features=fine or None,
            )
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
        n, device = len(question.masks), question.masks.device
        return torch.zeros((n, 1, 2), device=device), torch.full((n, 1), ABSENT, device=device)
    return torch.cat(coordinates, dim=1), torch.cat(labels, dim=1)
