"""What a SAM 2 model computes of an image and of a prompt, and the protocol of heads, which make finer masks of it.

A head sits on a SAM 2 model whose weights it does not change. It sees each image once (`look`) and answers each prompt
(`forward`), in training and in inference alike. B images of side S, N prompts, C the model's channels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

Encode = Callable[[Tensor], Tensor]
"""Encodes further images (B, 3, S, S), ImageNet-normalised, to features at S/16, (B, C, S/16, S/16)."""


@dataclass(frozen=True, slots=True, eq=False)
class Features:
    """What a SAM 2 model computes of B images.

    images: float32 (B, 3, S, S), ImageNet-normalised.
    pyramid: The feature pyramid at S/4, S/8 and S/16, float (B, C, h, w) each; empty unless a head wants it.
    embedding: (B, C, S/16, S/16), the coarsest of them with the embedding for "no memory".
    fine_maps: The decoder's projections of the finer ones, (B, C/8, S/4, S/4) and (B, C/4, S/8, S/8); or none.
    """

    images: Tensor
    pyramid: Sequence[Tensor]
    embedding: Tensor
    fine_maps: Sequence[Tensor]


class Seen(NamedTuple):
    """What a head computes of B images.

    embedding: (B, C, S/16, S/16), which replaces that of the model in the decoder; None to leave it as it is.
    maps: Further maps, one row per image each.
    """

    embedding: Tensor | None
    maps: list[Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class Prompted:
    """N prompts, as a head gets them.

    points: Coordinates float (N, P, 2) in model pixels and labels int (N, P): 1, 0, -1 (absent), and 2 and 3 for the
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
    fine_maps: The maps that it used, as in `Features`, one row per prompt.
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
    auxiliary: Further logits (N, h, h), on coarser grids, which are supervised in training.
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
