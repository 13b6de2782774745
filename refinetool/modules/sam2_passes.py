"""The passes of a SAM 2 model, with what heads need: encode images, decode prompts.

They do what SAM 2's own predictor and `predict_masks` do, in the same order, so results are the same to the bit.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from refinetool.modules.heads import Decoded, Features

IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet normalisation of RGB in 0..1, which SAM 2 expects."""


def normalised(colours: Tensor) -> Tensor:
    """Apply ImageNet normalisation to RGB in 0..1, (B, 3, H, W)."""
    mean, std = _normalisation(colours)
    return (colours - mean) / std


def colours_of(images: Tensor) -> Tensor:
    """Undo `normalised`: RGB in 0..1."""
    mean, std = _normalisation(images)
    return (images * std + mean).clamp(0, 1)


def _normalisation(like: Tensor) -> list[Tensor]:
    return [torch.tensor(values, device=like.device).view(3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD)]


def see(sam: Any, images: Tensor) -> Features:
    """Encode images (B, 3, S, S), ImageNet-normalised, with a `SAM2Base`, as its image predictor does."""
    pyramid = list(sam.image_encoder(images)["backbone_fpn"][-sam.num_feature_levels :])
    embedding = pyramid[-1]
    if sam.directly_add_no_mem_embed:
        embedding = embedding + sam.no_mem_embed.reshape(1, -1, 1, 1)
    fine: list[Tensor] = []
    if sam.use_high_res_features_in_sam:
        decoder = sam.sam_mask_decoder
        fine = [decoder.conv_s0(pyramid[0]), decoder.conv_s1(pyramid[1])]
    return Features(images, pyramid, embedding, fine)


def encode(sam: Any, images: Tensor) -> Tensor:
    """Encode images (B, 3, S, S) to the features at S/16 alone, without the embedding for "no memory"."""
    features: Tensor = sam.image_encoder(images)["backbone_fpn"][-1]
    return features


def decode(
    sam: Any, embedding: Tensor, fine_maps: Sequence[Tensor], *, sparse: Tensor, dense: Tensor, positions: Tensor
) -> Decoded:
    """Run the mask decoder of a `SAM2Base`, as its `predict_masks` does, and keep what heads need.

    Args:
        embedding, fine_maps: Of the images, one row per prompt.
        sparse, dense: Embedded prompts, (N, P, C) and (N, C, S/16, S/16), as the prompt encoder returns them.
        positions: (1, C, S/16, S/16), the prompt encoder's dense position embeddings.
    """
    decoder = sam.sam_mask_decoder
    own = [decoder.iou_token.weight, decoder.mask_tokens.weight]
    if decoder.pred_obj_scores:
        own.insert(0, decoder.obj_score_token.weight)
    first = len(own) - 1  # the position of the first mask token
    queries = torch.cat((torch.cat(own).expand(len(sparse), -1, -1), sparse), dim=1)
    sources = embedding + dense
    tokens, cells = decoder.transformer(sources, positions.expand(len(sparse), -1, -1, -1), queries)
    cells = cells.transpose(1, 2).reshape(sources.shape)
    chosen = tokens[:, first : first + decoder.num_mask_tokens]
    logits = masks_of_tokens(sam, cells, chosen, fine_maps)
    return Decoded(logits, decoder.iou_prediction_head(tokens[:, first - 1]), queries, tokens, cells, fine_maps)


def masks_of_tokens(sam: Any, cells: Tensor, mask_tokens: Tensor, fine_maps: Sequence[Tensor]) -> Tensor:
    """Predict masks with SAM 2's own upscaling and hypernetworks: logits (N, T, S/4, S/4).

    Args:
        cells: (N, C, S/16, S/16).
        mask_tokens: (N, T, C), the first T mask tokens after the decoder.
        fine_maps: As in `Decoded`.
    """
    decoder = sam.sam_mask_decoder
    if fine_maps:
        first, norm, activation, second, last_activation = decoder.output_upscaling
        at_4, at_8 = fine_maps
        upscaled = last_activation(second(activation(norm(first(cells) + at_8))) + at_4)
    else:
        upscaled = decoder.output_upscaling(cells)
    weights = [
        mlp(mask_tokens[:, n]) for n, mlp in enumerate(decoder.output_hypernetworks_mlps[: mask_tokens.shape[1]])
    ]
    n, channels, height, width = upscaled.shape
    logits: Tensor = torch.stack(weights, dim=1) @ upscaled.reshape(n, channels, height * width)
    return logits.reshape(n, -1, height, width)


def set_image_size(sam: Any, image_size: int) -> None:
    """Set the side of the square inputs of a `SAM2Base`, a multiple of 32; the weights do not depend on it."""
    cells = image_size // sam.backbone_stride
    prompt_encoder = sam.sam_prompt_encoder
    sam.image_size = image_size
    prompt_encoder.input_image_size = (image_size, image_size)
    prompt_encoder.image_embedding_size = (cells, cells)
    prompt_encoder.mask_input_size = (4 * cells, 4 * cells)
    sam.sam_image_embedding_size = cells
