"""The batch of examples that a training step takes."""

from typing import NamedTuple

from torch import Tensor


class Example(NamedTuple):
    """B crops of side S with K prompts each.

    image: uint8 (B, 3, S, S) RGB.
    points: float32 (B, K, 4, 2) in model pixels: two box corners, a positive and a negative point.
    labels: int32 (B, K, 4), 2 3 1 0, or -1 where the box holds no background.
    masks: float32 (B, K, S/4, S/4), the Gaussian mask prompt.
    coarse: bool (B, K, S/2, S/2), the coarse mask.
    targets: uint8 (B, K, S/2, S/2), 255 times the fraction of each cell that the object covers.
    weights: uint8 (B, K, S/2, S/2), 40 times the loss weight: 1 far from the true edge, up to 4 on it, 0 where ignored.
    edges: uint8 (B, S/4, S/4), 1 where two annotated regions meet.
    coarse_iou: float32 (B, K), IoU of the coarse mask with the ground truth.
    truth: bool (B, K, S, S), the object.
    """

    image: Tensor
    points: Tensor
    labels: Tensor
    masks: Tensor
    coarse: Tensor
    targets: Tensor
    weights: Tensor
    edges: Tensor
    coarse_iou: Tensor
    truth: Tensor
