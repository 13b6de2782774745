"""The network of the embedded model: a SAM2 small enough to ship, with a detail head that sees the coarse mask.

Hiera trunk (strides 4 to 32) → feature pyramid (C = 128) → SAM's prompt encoder and two-way mask decoder → detail head.
The SAM2 part is built from the classes of the `sam2` package with smaller sizes; without the tensors named `detail.`,
the weights load into a plain `SAM2Base`. There is no memory, so the model refines images and can't track video.

At input side S = 256 the embedding is 16 x 16, the decoder predicts on a 64 x 64 grid, the detail head on 128 x 128.
The weights do not depend on S (any multiple of 32 works), because Hiera's position embeddings are interpolated.
"""

from typing import Any

import torch
from sam2.modeling.backbones.hieradet import Hiera
from sam2.modeling.backbones.image_encoder import FpnNeck, ImageEncoder
from sam2.modeling.position_encoding import PositionEmbeddingSine
from sam2.modeling.sam2_base import SAM2Base
from torch import nn

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
