"""The embedded model behind the `Backend` protocol: SAM2's way, and then the detail head.

The detail head corrects the single-mask output only. The three alternatives of the decoder stay as they are: they
answer ambiguous prompts, and the head was made for coarse masks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from refinetool.backends.frames import Frame, rasterise
from refinetool.backends.sam2 import IMAGE_MEAN, IMAGE_STD, Sam2Backend
from refinetool.backends.square import SquareEmbedding, owners
from refinetool.modules.embedded import encode
from refinetool.records import Prompts

DECODER_MAPS = 2
"""How many of the extras of an embedding are the decoder's; the rest are the detail head's."""


class EmbeddedBackend(Sam2Backend):
    """`EmbeddedModel` as an image model. Its masks come on a grid of S/2."""

    def _encode(self, pixels: Tensor) -> list[tuple[Tensor, tuple[Tensor, ...]]]:
        mean, std = (torch.tensor(values, device=self.device).view(3, 1, 1) for values in (IMAGE_MEAN, IMAGE_STD))
        encoded = encode(self.model, pixels, (pixels * std + mean).clamp(0, 1))
        extras = (*encoded.fine_maps, *encoded.seen)
        return [(features, tuple(level[i] for level in extras)) for i, features in enumerate(encoded.embedding)]

    def _fine_maps(self, embedding: SquareEmbedding) -> tuple[Tensor, ...]:
        return embedding.extras[:DECODER_MAPS]

    def _answer(self, embeddings: list[SquareEmbedding], prompts: list[Prompts]) -> tuple[Tensor, Tensor]:
        rows = [len(asked) for asked in prompts]
        decoded, scores = super()._answer(embeddings, prompts)
        if not any(rows):
            return decoded, scores
        cells = 2 * self.mask_cells
        coarse = torch.cat(
            [self._sides(asked, e.frame, cells=cells) for e, asked in zip(embeddings, prompts, strict=True)]
        )
        owner = owners(rows, device=self.device)
        own = (embedding.extras[DECODER_MAPS:] for embedding in embeddings)
        seen = [torch.stack(level)[owner] for level in zip(*own, strict=True)]
        with self._autocast():
            refined, score = self.model.detail(seen, coarse, decoded[:, 0])
        logits = F.interpolate(decoded, (cells, cells), mode="bilinear", align_corners=False)
        logits[:, 0], scores[:, 0] = refined.float(), score.float()
        return logits, scores

    def _sides(self, prompts: Prompts, frame: Frame, *, cells: int) -> Tensor:
        """1 inside each prompted mask, -1 outside; 0 where there is none: float32 (N, cells, cells)."""
        if prompts.masks is None:
            return torch.zeros((len(prompts), cells, cells), device=self.device)
        logits = rasterise(torch.tensor(prompts.masks).to(self.device), frame, cells=cells)
        return (logits > 0).float() * 2 - 1
