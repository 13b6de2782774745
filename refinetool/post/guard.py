"""The guard: keep the coarse mask where the refined one is doubtful, and say why."""

import numpy as np
from scipy.special import expit

from refinetool.masks import iou, spread
from refinetool.records import BoolArray, FloatArray
from refinetool.settings import GuardSettings

EMPTY_RESULT = "empty-result"
LOW_SCORE = "low-score"
NO_GAIN = "no-gain"
DRIFT = "drift"

LEAST_ERROR = 1e-6
"""Expected errors are taken to be at least this, so that they can be divided by."""


def doubt(
    coarse: BoolArray,
    refined: BoolArray,
    *,
    predicted_iou: float | None,
    logits: FloatArray | None,
    settings: GuardSettings,
) -> tuple[str | None, float]:
    """Judge one refined mask.

    Args:
        coarse, refined: bool (H, W), the same frame; the coarse one is not empty.
        predicted_iou: The model's own estimate, 0..1; None where no model was asked.
        logits: float32 (h, w), the model's on its own grid over that frame; None where no model was asked.

    Returns:
        The reason to keep the coarse mask, or None to take the refined one: `empty-result`; `low-score`, the model
        trusts its mask too little; `no-gain`, by its own logits it is hardly better; `drift`, too little overlap
        with the coarse mask or too different an area. And the IoU of the two masks.
    """
    overlap = iou(coarse, refined)
    if not refined.any():
        return EMPTY_RESULT, overlap
    if predicted_iou is not None and predicted_iou < settings.min_predicted_iou:
        return LOW_SCORE, overlap
    if logits is not None and expected_gain(coarse, logits) < settings.min_expected_gain:
        return NO_GAIN, overlap
    growth = np.count_nonzero(refined) / np.count_nonzero(coarse)
    if overlap < settings.min_coarse_iou or max(growth, 1 / growth) > settings.max_area_ratio:
        return DRIFT, overlap
    return None, overlap


def expected_gain(coarse: BoolArray, logits: FloatArray) -> float:
    """Which share of the coarse mask's error the model's mask removes, if its logits are those of probabilities.

    The expected IoU of a mask M with an object that covers each pixel with probability p is taken to be that of the
    expected areas: sum(p in M) / (area(M) + sum(p outside M)). With E for the model's mask and C for the coarse one,
    the gain is (E - C) / (1 - C). It is asked of the model's mask as it is: what snap and trust make of it is finer
    than the grid of the logits.

    Args:
        coarse: bool (H, W), not empty.
        logits: float32 (h, w) over the same frame; above 0 is the model's mask.

    Returns:
        At most 1; 0 where the model agrees with the coarse mask, or is sure of nothing.
    """
    fine = spread(logits, coarse.shape)
    chance = expit(fine)
    total = chance.sum(dtype=np.float64)

    def expected_iou(mask: BoolArray) -> float:
        inside = chance[mask].sum(dtype=np.float64)
        either = np.count_nonzero(mask) + total - inside
        return float(inside / either) if either > 0 else 0.0

    before = expected_iou(coarse)
    return (expected_iou(fine > 0) - before) / max(1 - before, LEAST_ERROR)
