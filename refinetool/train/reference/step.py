"""One step of training: an episode per row, frozen networks, and the loss of the predicted mask."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from refinetool.backends.image_encoders import ImageEncoder
from refinetool.backends.square import SquareBackend
from refinetool.modules.reference_encoder import AnnotationResize, ReferenceEncoder, on_grid, pseudo_mask
from refinetool.train.reference.annotations import simulate
from refinetool.train.reference.episodes import Episode
from refinetool.train.reference.store import SeenPictures, as_tensor, features_of, whole

DICE_SMOOTH = 1.0


def episode_logits(
    model: ReferenceEncoder,
    encoder: ImageEncoder,
    backend: SquareBackend,
    seen: SeenPictures,
    episodes: Sequence[Episode],
    *,
    most: bool,
    normalise: bool,
    resize: AnnotationResize,
) -> tuple[Tensor, Tensor, Tensor]:
    """Predict the masks of B episodes with the same number of references.

    Args:
        most: See `annotations.simulate`.

    Returns:
        Logits float32 (B, T, T), true masks (B, T, T) of 0 and 1, and the pixels that count (B, T, T), 0 where void.
    """
    device = backend.device
    targets = [seen[episode.target] for episode in episodes]
    target = features_of(targets)
    tokens = []
    for shot in range(len(episodes[0].references)):
        shown = [seen[episode.references[shot]] for episode in episodes]
        drawn = [
            simulate(one.mask(episode.name), episode.kind, rng=np.random.default_rng((episode.seed, shot)), most=most)
            for episode, one in zip(episodes, shown, strict=True)
        ]
        reference = features_of(shown)
        annotation = on_grid(as_tensor(drawn, device), reference.grid, resize=resize)
        with torch.no_grad():
            pseudo = pseudo_mask(target.high, encoder.annotated(reference, annotation), normalise=normalise)
        tokens.append(model(reference.mid, annotation, target.mid, pseudo))
    logits = backend.decode_tokens([whole(one.embedding) for one in targets], torch.cat(tokens, dim=1))
    truth = as_tensor([one.mask(episode.name) for episode, one in zip(episodes, targets, strict=True)], device)
    counted = 1 - as_tensor([one.ignored for one in targets], device)
    # The decoder's grid covers the square; a view that doesn't fill it is in the upper left.
    covered = [
        _covering(row, one.embedding.frame.extent(row.shape[-1])) for row, one in zip(logits, targets, strict=True)
    ]
    full = [F.interpolate(row, truth.shape[-2:], mode="bilinear", align_corners=False)[0, 0] for row in covered]
    return torch.stack(full), truth, counted


def _covering(logits: Tensor, extent: tuple[float, float]) -> Tensor:
    """Return the part of logits (m, m) that a view covers: (1, 1, h, w)."""
    height, width = (max(1, round(side)) for side in extent)
    return logits[None, None, :height, :width]


def mask_loss(logits: Tensor, truth: Tensor, counted: Tensor) -> Tensor:
    """Return binary cross-entropy, the mean over pixels, plus the Dice loss, the mean over B masks.

    Args:
        logits, truth, counted: float (B, T, T); pixels where `counted` is 0 are left out.
    """
    each = F.binary_cross_entropy_with_logits(logits, truth, reduction="none") * counted
    cross_entropy = each.sum() / counted.sum().clamp(min=1)
    chance, mask = logits.sigmoid() * counted, truth * counted
    shared = 2 * (chance * mask).sum(dim=(1, 2)) + DICE_SMOOTH
    dice = 1 - shared / (chance.sum(dim=(1, 2)) + mask.sum(dim=(1, 2)) + DICE_SMOOTH)
    return cross_entropy + dice.mean()
