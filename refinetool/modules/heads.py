"""What a SAM 2 model computes of an image and of a prompt, and the protocol of heads, which make finer masks of it.

A head sits on a SAM 2 model whose weights it does not change. It sees each image once (`look`) and answers each prompt
(`forward`), in training and in inference alike. B images of side S, N prompts, C the model's channels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""ImageNet normalisation of RGB in 0..1, which SAM 2 expects."""

Encode = Callable[[Tensor], Tensor]
"""Encodes further images (B, 3, S, S), ImageNet-normalised, to features at S/16, (B, C, S/16, S/16)."""


@dataclass(frozen=True, slots=True, eq=False)
class Features:
    """What a SAM 2 model computes of B images.

    images: float32 (B, 3, S, S), ImageNet-normalised.
    pyramid: the feature pyramid at S/4, S/8 and S/16, float (B, C, h, w) each; empty unless a head wants it.
    embedding: (B, C, S/16, S/16), the coarsest of them with the embedding for "no memory".
    fine_maps: the decoder's projections of the finer ones, (B, C/8, S/4, S/4) and (B, C/4, S/8, S/8); or none.
    """

    images: Tensor
    pyramid: Sequence[Tensor]
    embedding: Tensor
    fine_maps: Sequence[Tensor]


class Seen(NamedTuple):
    """What a head computes of B images.

    embedding: (B, C, S/16, S/16), which replaces that of the model in the decoder; None to leave it as it is.
    maps: further maps, one row per image each.
    """

    embedding: Tensor | None
    maps: list[Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Prompted:
    """N prompts, as a head gets them.

    points: coordinates float (N, P, 2) in model pixels and labels int (N, P): 1, 0, -1 (absent), and 2 and 3 for the
        corners of a box; None without points and boxes.
    sides: float32 (N, S/2, S/2): 1 inside the coarse mask, -1 outside, or 0 everywhere if the prompt has none.
    """

    points: tuple[Tensor, Tensor] | None
    sides: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Decoded:
    """What a SAM 2 decoder computes of N prompts, T mask tokens each.

    logits: (N, T, S/4, S/4), token 0 being the single-mask output.
    scores: (N, T), the predicted IoUs as the IoU head returns them.
    queries: (N, K, C), the tokens as they enter the decoder: its own, then those of the prompt.
    tokens: (N, K, C), the same as they leave it.
    cells: (N, C, S/16, S/16), the image embedding as it leaves the decoder.
    fine_maps: the maps that it used, as in `Features`, one row per prompt.
    """

    logits: Tensor
    scores: Tensor
    queries: Tensor
    tokens: Tensor
    cells: Tensor
    fine_maps: Sequence[Tensor]


class HeadAnswer(NamedTuple):
    """A head's masks.

    logits: (N, h, h), on a grid of the head's choice over the square input.
    scores: (N,), predicted IoUs in 0..1; None to keep the decoder's.
    auxiliary: further logits (N, h, h), on coarser grids, which are supervised in training.
    """

    logits: Tensor
    scores: Tensor | None
    auxiliary: list[Tensor]


class Head(Protocol):
    """A head on a SAM 2 model."""

    wants_pyramid: bool
    """Whether `look` uses `Features.pyramid`."""
    augments: bool
    """Whether it replaces the image embedding of the decoder."""
    reads_tokens: bool
    """Whether it uses the tokens, the points, and the decoder's fine maps."""

    def look(self, features: Features, encode: Encode) -> Seen:
        """Compute what depends on the images alone."""

    def __call__(self, seen: list[Tensor], prompted: Prompted, decoded: Decoded) -> HeadAnswer:
        """Make masks for N prompts.

        Args:
            seen: `Seen.maps` of the images, one row per prompt.
        """


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
