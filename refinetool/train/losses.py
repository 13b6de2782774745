"""Losses of the embedded model. Targets are on the grid (N, S/2, S/2)."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class MaskLoss(NamedTuple):
    """Scalars to minimise, and the true IoU of each mask, (N, T), for reporting."""

    mask: Tensor
    iou: Tensor
    true_iou: Tensor


def mask_loss(logits: Tensor, predicted_iou: Tensor, target: Tensor, weight: Tensor) -> MaskLoss:
    """Compute the loss of four mask tokens and of their predicted IoUs.

    Token 0, the single-mask output, always contributes. Of the other three the best one contributes, plus 0.1 times
    their mean, so that none stops learning. The IoU head is trained on the true IoU of every token with the absolute
    error, as in SAM 2.

    Args:
        logits: (N, 4, S/4, S/4).
        predicted_iou: (N, 4), 0..1.
        target: (N, S/2, S/2), 0..1, the fraction of each cell that the object covers.
        weight: (N, S/2, S/2), at least 0.
    """
    fine = F.interpolate(logits.float(), size=target.shape[-2:], mode="bilinear", align_corners=False)
    truth, weight = target[:, None].expand_as(fine), weight[:, None]
    per_token = _per_mask(fine, truth, weight)

    others = per_token[:, 1:]
    combined = per_token[:, 0] + others.amin(1) + 0.1 * others.mean(1)
    true_iou = hard_iou(fine > 0, truth >= 0.5, known=weight > 0)
    return MaskLoss(combined.mean(), (predicted_iou.float() - true_iou).abs().mean(), true_iou)


def detail_loss(logits: Tensor, predicted_iou: Tensor, *, target: Tensor, weight: Tensor) -> MaskLoss:
    """Compute the loss of the detail head's masks (N, S/2, S/2) and predicted IoUs (N,); see `mask_loss`."""
    fine, truth, weight = logits[:, None].float(), target[:, None], weight[:, None]
    true_iou = hard_iou(fine > 0, truth >= 0.5, known=weight > 0)
    error = (predicted_iou.float() - true_iou[:, 0]).abs().mean()
    return MaskLoss(_per_mask(fine, truth, weight).mean(), error, true_iou)


def harm_loss(logits: Tensor, *, coarse: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Compute the mean of max(0, IoU(coarse) - IoU(mask)): what a mask loses against its coarse mask.

    The IoU of a mask is computed from its probabilities, so that it has a gradient. Prompts without a mask count as 0.

    Args:
        logits: (N, S/2, S/2), of the refined masks.
        coarse: (N, S/2, S/2), above 0 inside the coarse mask and below outside, or 0 everywhere if there is none.
        target, weight: (N, S/2, S/2), as for `mask_loss`.
    """
    known = weight > 0
    truth = (target >= 0.5) & known
    before = hard_iou(coarse > 0, truth, known=known)
    after = soft_iou(logits.float().sigmoid(), truth.float(), known=known)
    return (F.relu(before - after) * (coarse != 0).any(2).any(1)).mean()


def _per_mask(logits: Tensor, truth: Tensor, weight: Tensor) -> Tensor:
    """Compute 2 x weighted cross-entropy + dice of each mask: (N, T, h, w) → (N, T); weight is (N, 1, h, w)."""
    entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    entropy = (entropy * weight).sum((2, 3)) / weight.sum((2, 3)).clamp(min=1e-6)
    return 2 * entropy + dice_loss(logits.sigmoid(), truth, known=weight > 0)


def dice_loss(probability: Tensor, target: Tensor, *, known: Tensor) -> Tensor:
    """Compute 1 - (2 sum(p t) + 1) / (sum(p) + sum(t) + 1) over the known cells: (N, T, h, w) → (N, T)."""
    p, t = probability * known, target * known
    return 1 - (2 * (p * t).sum((2, 3)) + 1) / (p.sum((2, 3)) + t.sum((2, 3)) + 1)


@torch.no_grad()
def hard_iou(prediction: Tensor, target: Tensor, *, known: Tensor) -> Tensor:
    """Compute the IoU of bool masks over the known cells: (..., h, w) → float (...)."""
    either = ((prediction | target) & known).sum((-2, -1))
    return (prediction & target & known).sum((-2, -1)) / either.clamp(min=1)


def soft_iou(probability: Tensor, target: Tensor, *, known: Tensor) -> Tensor:
    """Compute the IoU of probabilities with fractions in 0..1 over the known cells: (..., h, w) → float (...)."""
    probability, target = probability * known, target * known
    shared = (probability * target).sum((-2, -1))
    either = (probability + target - probability * target).sum((-2, -1))
    return shared / either.clamp(min=1)


def edge_loss(logits: Tensor, edges: Tensor) -> Tensor:
    """Compute the cross-entropy of edge logits (B, 1, h, w) and edges (B, h, w) in 0..1; edges count three times."""
    return F.binary_cross_entropy_with_logits(logits[:, 0].float(), edges, pos_weight=edges.new_tensor(3.0))


POINTS = 112 * 112
"""Number of points at which masks are compared, as in HQ-SAM."""
OVERSAMPLED = 3
"""Points are chosen from this many times their number ..."""
UNCERTAIN = 0.75
"""... and this fraction of them are the most uncertain ones; the others are drawn anew."""


def point_loss(logits: Tensor, truth: Tensor, weight: Tensor, *, generator: torch.Generator) -> Tensor:
    """Compute cross-entropy + dice at uncertain points (eq. 3 of SAM2Refiner, for one output).

    Points are positions in the square, so logits of any grid are compared with the same masks.

    Args:
        logits: (N, h, h).
        truth: bool (N, S, S).
        weight: (N, S/2, S/2); points where it is 0 do not count.
    """
    logits = logits[:, None].float()
    n, device = len(logits), logits.device
    with torch.no_grad():
        many = torch.rand(n, OVERSAMPLED * POINTS, 2, generator=generator, device=device)
        doubt = -_at(logits, many).abs()
        certain = round(UNCERTAIN * POINTS)
        chosen = doubt.topk(certain, dim=1).indices
        rest = torch.rand(n, POINTS - certain, 2, generator=generator, device=device)
        places = torch.cat((many.gather(1, chosen[..., None].expand(-1, -1, 2)), rest), 1)
        target = _at(truth[:, None].float(), places)
        known = _at((weight[:, None] > 0).float(), places) > 0.5
    found = _at(logits, places)
    entropy = F.binary_cross_entropy_with_logits(found, target, reduction="none")
    entropy = (entropy * known).sum(1) / known.sum(1).clamp(min=1)
    p, t = found.sigmoid() * known, target * known
    dice = 1 - (2 * (p * t).sum(1) + 1) / (p.sum(1) + t.sum(1) + 1)
    return (entropy + dice).mean()


def _at(maps: Tensor, places: Tensor) -> Tensor:
    """Sample maps (N, 1, h, w) bilinearly at places (N, P, 2) in 0..1, (x, y): (N, P)."""
    # Near the border of a coarse grid there is no cell on the other side; zeros would pull logits towards doubt.
    return F.grid_sample(maps, 2 * places[:, None] - 1, padding_mode="border", align_corners=False)[:, 0, 0]
