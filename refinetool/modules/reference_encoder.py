"""VRP-SAM's reference encoder: turns an annotated reference image and a target image into prompt tokens for a decoder.

Feature augmenter (section 4.1): the features of both images are reduced, the mean of the reference's features under its
annotation is the prototype of the class, and both maps get the prototype and a mask as further channels: the reference
its annotation, the target a pseudo mask, which says how similar its cells are to annotated cells. Prompt generator
(section 4.2): learned queries attend to the reference, to each other, to the target, and to each other again.

B pairs of images, N queries, C channels of a token, h w the grid of the image features, T tokens of one prompt.
"""

import math
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from refinetool.records import Size

AnnotationResize: TypeAlias = Literal["max", "nearest"]

PROTOTYPE_EPSILON = 5e-4
SIMILARITY_EPSILON = 1e-7
MASK_GAIN = 10.0
"""Factor of the mask channel: a single one among so many would hardly be seen. From the authors' release."""
DROPOUT = 0.5
TEMPERATURE = 10_000.0


class ReferenceEncoder(nn.Module):
    """Feature augmenter and prompt generator. With 1536 channels of image features and C = 256, 1.59 M parameters.

    Args:
        mid_channels: Channels of the image features.
        width: C, the width of the decoder's tokens; a multiple of 4 and of `heads`.
        queries: N, the number of tokens per reference.
    """

    def __init__(self, *, mid_channels: int, width: int, queries: int, heads: int) -> None:
        super().__init__()
        self.augmenter = FeatureAugmenter(mid_channels=mid_channels, width=width)
        self.generator = PromptGenerator(width=width, queries=queries, heads=heads)

    @property
    def width(self) -> int:
        return int(self.generator.queries.shape[1])

    def forward(self, reference: Tensor, annotation: Tensor, target: Tensor, pseudo: Tensor) -> Tensor:
        """Compute the tokens of B pairs: float (B, N, C). A pair's tokens do not depend on the other pairs.

        Args:
            reference, target: Image features, float (B, mid_channels, h, w); the grids of the two may differ.
            annotation: float (B, 1, h, w) in 0..1, the annotation on the reference's grid; see `on_grid`.
            pseudo: float (B, 1, h, w), the pseudo mask on the target's grid; see `pseudo_mask`.
        """
        augmented = self.augmenter(reference, annotation, target, pseudo)
        tokens: Tensor = self.generator(*augmented)
        return tokens


class FeatureAugmenter(nn.Module):
    """Adds what is known of the class to the features of both images (eq. 1 to 3)."""

    def __init__(self, *, mid_channels: int, width: int) -> None:
        super().__init__()
        self.reduce = nn.Sequential(nn.Conv2d(mid_channels, width, 1, bias=False), nn.ReLU(), nn.Dropout2d(DROPOUT))
        self.merge = nn.Sequential(nn.Conv2d(2 * width + 1, width, 1, bias=False), nn.ReLU())

    def forward(self, reference: Tensor, annotation: Tensor, target: Tensor, pseudo: Tensor) -> tuple[Tensor, Tensor]:
        """Return the augmented features of reference and target, (B, C, h, w) each."""
        reference, target = self.reduce(reference), self.reduce(target)
        prototype = masked_mean(reference, annotation)
        return self._augmented(reference, prototype, annotation), self._augmented(target, prototype, pseudo)

    def _augmented(self, features: Tensor, prototype: Tensor, mask: Tensor) -> Tensor:
        everywhere = prototype.expand(-1, -1, *features.shape[-2:])
        augmented: Tensor = self.merge(torch.cat((features, everywhere, MASK_GAIN * mask), dim=1))
        return augmented


class PromptGenerator(nn.Module):
    """Lets learned queries ask the reference for the class, and the target for its objects (eq. 4 and 5)."""

    def __init__(self, *, width: int, queries: int, heads: int) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(queries, width))
        self.ask_reference = _Attention(width, heads)
        self.exchange_first = _Attention(width, heads)
        self.ask_target = _Attention(width, heads)
        self.exchange_second = _Attention(width, heads)

    def forward(self, reference: Tensor, target: Tensor) -> Tensor:
        """Return tokens (B, N, C) for augmented features (B, C, h, w)."""
        tokens = self.queries.expand(len(reference), -1, -1)
        for cells, ask, exchange in (
            (reference, self.ask_reference, self.exchange_first),
            (target, self.ask_target, self.exchange_second),
        ):
            height, width = cells.shape[-2:]
            values = cells.flatten(2).transpose(1, 2)
            positions = sine_positions((height, width), channels=values.shape[-1]).to(values)
            tokens = ask(tokens, values + positions, values)
            tokens = exchange(tokens, tokens, tokens)
        return tokens


class _Attention(nn.Module):
    """Attention with a residual connection, followed by layer normalisation."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm = nn.LayerNorm(width)

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        answer, _ = self.attention(queries, keys, values, need_weights=False)
        normed: Tensor = self.norm(queries + answer)
        return normed


def masked_mean(features: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of features (B, C, h, w) weighted by a mask (B, 1, h, w): (B, C, 1, 1); eq. 1."""
    total: Tensor = (features * mask).sum(dim=(2, 3), keepdim=True)
    return total / (mask.sum(dim=(2, 3), keepdim=True) + PROTOTYPE_EPSILON)


def pseudo_mask(target: Tensor, reference: Tensor, *, normalise: bool) -> Tensor:
    """Compute how similar each cell of the target is to the annotated cell of the reference most similar to it.

    Args:
        target: float (B, D, h, w), high-level features.
        reference: float (B, D, h', w'), zero outside the annotation. Such cells have a similarity of 0.
        normalise: Whether to stretch the values of each image to 0..1, as the paper does and its release does not.

    Returns:
        float (B, 1, h, w): the largest cosine similarity.
    """
    cells, annotated = target.flatten(2), reference.flatten(2)
    lengths = cells.norm(dim=1, keepdim=True).transpose(1, 2) * annotated.norm(dim=1, keepdim=True)
    cosine = cells.transpose(1, 2) @ annotated / (lengths + SIMILARITY_EPSILON)
    similar: Tensor = cosine.amax(dim=2)
    if normalise:
        low, high = similar.amin(dim=1, keepdim=True), similar.amax(dim=1, keepdim=True)
        similar = (similar - low) / (high - low + SIMILARITY_EPSILON)
    return similar.reshape(len(target), 1, *target.shape[-2:])


def on_grid(annotation: Tensor, size: Size, *, resize: AnnotationResize) -> Tensor:
    """Bring annotations, float (B, H, W) of 0 and 1, onto a grid (h, w): float (B, 1, h, w) of 0 and 1.

    With `max`, a cell is annotated if any pixel in it is, so that not even a single pixel is lost. `nearest`, as in the
    authors' release, looks at one pixel per cell, and loses most points.
    """
    if resize == "max":
        pooled: Tensor = F.adaptive_max_pool2d(annotation[:, None], size)
        return pooled
    picked: Tensor = F.interpolate(annotation[:, None], size, mode="nearest")
    return picked


def sine_positions(size: Size, *, channels: int) -> Tensor:
    """Return sine position embeddings of a grid (h, w): float32 (h * w, channels), rows first, half of them for y.

    Positions of an axis run to 2 pi, and channels alternate between sine and cosine of falling frequencies.
    """
    height, width = size
    per_axis = channels // 2
    frequencies = TEMPERATURE ** (-2 * (torch.arange(per_axis) // 2) / per_axis)

    def of_axis(length: int) -> Tensor:
        places = 2 * math.pi * torch.arange(1, length + 1) / length
        angles = places[:, None] * frequencies
        return torch.stack((angles[:, 0::2].sin(), angles[:, 1::2].cos()), dim=2).flatten(1)

    rows = of_axis(height)[:, None].expand(-1, width, -1)
    columns = of_axis(width)[None].expand(height, -1, -1)
    return torch.cat((rows, columns), dim=2).reshape(height * width, channels)
