"""The guard: keep the coarse mask where the refined one is doubtful, and say why."""

import numpy as np

from refinetool.masks import iou
from refinetool.records import BoolArray
from refinetool.settings import GuardSettings

EMPTY_RESULT = "empty-result"
LOW_SCORE = "low-score"
DRIFT = "drift"


def doubt(
    coarse: BoolArray, refined: BoolArray, predicted_iou: float | None, *, settings: GuardSettings
) -> tuple[str | None, float]:
    """Judge one refined mask.

    Args:
        coarse, refined: bool (H, W), the same frame; the coarse one is not empty.
        predicted_iou: The model's own estimate, 0..1; None where no model was asked.

    Returns:
        The reason to keep the coarse mask, or None to take the refined one: `empty-result`; `low-score`, the model
        trusts its mask too little; `drift`, too little overlap with the coarse mask or too different an area. And the
        IoU of the two masks.
    """
    overlap = iou(coarse, refined)
    if not refined.any():
        return EMPTY_RESULT, overlap
    if predicted_iou is not None and predicted_iou < settings.min_predicted_iou:
        return LOW_SCORE, overlap
    growth = np.count_nonzero(refined) / np.count_nonzero(coarse)
    if overlap < settings.min_coarse_iou or max(growth, 1 / growth) > settings.max_area_ratio:
        return DRIFT, overlap
    return None, overlap
