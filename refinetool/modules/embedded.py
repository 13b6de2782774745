"""The network of the embedded model: a SAM2 small enough to ship, with a detail head that sees the coarse mask.

Hiera trunk (strides 4 to 32) → feature pyramid (C = 128) → SAM's prompt encoder and two-way mask decoder → detail head.
The SAM2 part is built from the classes of the `sam2` package with smaller sizes; without the tensors named `detail.`,
the weights load into a plain `SAM2Base`. There is no memory, so the model refines images and can't track video.

At input side S = 256 the embedding is 16 x 16, the decoder predicts on a 64 x 64 grid, the detail head on 128 x 128.
The weights do not depend on S (any multiple of 32 works), because Hiera's position embeddings are interpolated.
"""

from typing import Any, NamedTuple

import torch
from sam2.modeling.backbones.hieradet import Hiera
from sam2.modeling.backbones.image_encoder import FpnNeck, ImageEncoder
from sam2.modeling.position_encoding import PositionEmbeddingSine
from sam2.modeling.sam2_base import SAM2Base
from torch import Tensor, nn

from refinetool.modules.detail import DetailHead

IMAGE_SIZE = 256
"""Side of the square model input in pixels."""
CHANNELS = 128
DETAIL_PREFIX = "detail."
"""Prefix of the names of the detail head's tensors."""


class EmbeddedModel(SAM2Base):  # type: ignore[misc]
    """`SAM2Base` and a detail head beside it."""

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        detail = DetailHead(fine_channels=(CHANNELS // 8, CHANNELS // 4), channels=CHANNELS)
        # Twice as fast on a CPU.
        self.detail = detail.to(memory_format=torch.channels_last)


class Encoded(NamedTuple):
    """The features of B images of side S.

    embedding: (B, C, S/16, S/16).
    fine_maps: the decoder's maps, (B, C/8, S/4, S/4) and (B, C/4, S/8, S/8).
    seen: the detail head's maps, see `DetailHead.look`.
    """

    embedding: Tensor
    fine_maps: list[Tensor]
    seen: list[Tensor]

    def rows(self, owner: Tensor) -> "Encoded":
        """Return one row per prompt; `owner` is the image index of each prompt."""
        return Encoded(self.embedding[owner], [m[owner] for m in self.fine_maps], [m[owner] for m in self.seen])


def build_embedded(*, image_size: int) -> EmbeddedModel:
    """Build the architecture with random weights (torch's global generator), in training mode.

    Args:
        image_size: Side S of the square input; a multiple of 32.
    """
    trunk = Hiera(
        embed_dim=32,
        num_heads=1,
        stages=(1, 2, 5, 1),
        global_att_blocks=(5, 7),
        window_spec=(8, 4, 8, 4),
        window_pos_embed_bkg_spatial_size=(7, 7),
        q_pool=3,
    )
    # sam2 initialises these to zero, which is fine only if weights are loaded afterwards.
    nn.init.trunc_normal_(trunk.pos_embed, std=0.02)
    nn.init.trunc_normal_(trunk.pos_embed_window, std=0.02)
    neck = FpnNeck(
        position_encoding=PositionEmbeddingSine(num_pos_feats=CHANNELS, normalize=True, scale=None, temperature=10000),
        d_model=CHANNELS,
        backbone_channel_list=trunk.channel_list,
        fpn_top_down_levels=[0, 1, 2, 3],  # the fine maps come from shallow blocks: add the deep ones
        fpn_interp_model="nearest",
    )
    return EmbeddedModel(
        image_encoder=ImageEncoder(trunk=trunk, neck=neck, scalp=1),
        memory_attention=None,
        memory_encoder=None,
        num_maskmem=0,
        image_size=image_size,
        backbone_stride=16,
        directly_add_no_mem_embed=True,
        use_high_res_features_in_sam=True,
        multimask_output_in_sam=True,
        iou_prediction_use_sigmoid=True,
        pred_obj_scores=False,
        use_obj_ptrs_in_encoder=False,
    )


def set_image_size(model: EmbeddedModel, image_size: int) -> None:
    """Set the side of a model's square inputs, a multiple of 32; the weights do not depend on it."""
    cells = image_size // model.backbone_stride
    prompt_encoder = model.sam_prompt_encoder
    model.image_size = image_size
    prompt_encoder.input_image_size = (image_size, image_size)
    prompt_encoder.image_embedding_size = (cells, cells)
    prompt_encoder.mask_input_size = (4 * cells, 4 * cells)
    model.sam_image_embedding_size = cells


def encode(model: EmbeddedModel, images: Tensor, colours: Tensor) -> Encoded:
    """Embed images as in SAM2's image predictor, and compute the detail head's features of them.

    Args:
        images: float (B, 3, S, S), ImageNet-normalised.
        colours: float (B, 3, S, S), the same as RGB in 0..1.
    """
    fine, middle, coarse = model.forward_image(images)["backbone_fpn"]
    embedding = coarse + model.no_mem_embed.reshape(1, -1, 1, 1)
    return Encoded(embedding, [fine, middle], model.detail.look(images, colours, embedding, [fine, middle]))


def decode(
    model: EmbeddedModel, encoded: Encoded, *, points: tuple[Tensor, Tensor] | None, masks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Predict all four mask tokens for one prompt per row.

    Args:
        encoded: One row per prompt.
        points: coordinates float (N, P, 2) in model pixels and labels int (N, P): 1, 0, -1 for points, 2 and 3 for the
            corners of a box. With None the prompt encoder gets no points at all.
        masks: float (N, 1, S/4, S/4) logits, or None.

    Returns:
        Mask logits (N, 4, S/4, S/4), token 0 being the single-mask output, and predicted IoUs (N, 4) in 0..1.
    """
    n = len(encoded.embedding)
    sparse, dense = model.sam_prompt_encoder(points=points, boxes=None, masks=masks)
    logits, predicted_iou, _, _ = model.sam_mask_decoder.predict_masks(
        image_embeddings=encoded.embedding,
        image_pe=model.sam_prompt_encoder.get_dense_pe(),
        sparse_prompt_embeddings=sparse.expand(n, -1, -1),
        dense_prompt_embeddings=dense.expand(n, -1, -1, -1),
        repeat_image=False,
        high_res_features=encoded.fine_maps,
    )
    return logits, predicted_iou
