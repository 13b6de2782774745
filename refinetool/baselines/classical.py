"""Baselines without a model: GrabCut, the guided filter, and a blur that ignores the image.

Lengths are fractions of r, the radius of a disc of the mask's area.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import cv2
import numpy as np

from refinetool.backends import Arbiter, Embedding, Prediction
from refinetool.candidates import Answer, Job
from refinetool.masks import disc_radius, distance_inside
from refinetool.post.snap import guided_snap
from refinetool.records import ImageArray, Mask, Prompts
from refinetool.settings import ClassicalSettings, ModelDefaults

Method: TypeAlias = Literal["grabcut", "guided", "smooth"]
CLASSICAL: tuple[Method, ...] = ("grabcut", "guided", "smooth")

SMALLEST_SIGMA_PX = 0.3
RNG_SEED = 0
NO_RECTANGLE = (0, 0, 0, 0)
"""Rectangle argument of GrabCut when it starts from a trimap."""


def answer_classically(jobs: Sequence[Job], *, method: Method, settings: ClassicalSettings) -> list[Answer]:
    """Return one answer per job. Predicted IoUs are NaN, since there is no model."""
    return [
        Answer(
            np.stack([refined(job.pixels, mask, method=method, settings=settings) for mask in job.coarse]),
            np.full(len(job.coarse), np.nan, dtype=np.float32),
        )
        for job in jobs
    ]


def refined(image: ImageArray, mask: Mask, *, method: Method, settings: ClassicalSettings) -> Mask:
    """Refine one mask, bool (H, W), of an image, uint8 (H, W, 3) RGB, with a method."""
    match method:
        case "grabcut":
            return grabcut(image, mask, band_share=settings.grabcut_band, rounds=settings.grabcut_rounds)
        case "guided":
            return guided_snap(image, mask, radius_share=settings.guided_radius, epsilon=settings.guided_epsilon)
        case "smooth":
            return smooth(mask, sigma_share=settings.smooth_sigma)


def grabcut(image: ImageArray, mask: Mask, *, band_share: float, rounds: int) -> Mask:
    """Refine with GrabCut (Rother et al. 2004): pixels within `band_share` r of the outline are undecided.

    Args:
        image: uint8 (H, W, 3) RGB.
        mask: bool (H, W), not empty. One that fills the image is returned: there is no background to learn from.
        rounds: Iterations of colour models and cut.
    """
    if mask.all():
        return mask
    band_px = max(1.0, band_share * disc_radius(mask))
    inside, outside = (distance_inside(side, border_is_background=False) for side in (mask, ~mask))
    trimap = np.full(mask.shape, cv2.GC_BGD, dtype=np.uint8)
    trimap[(outside > 0) & (outside <= band_px)] = cv2.GC_PR_BGD
    trimap[(inside > 0) & (inside <= band_px)] = cv2.GC_PR_FGD
    trimap[inside > band_px] = cv2.GC_FGD
    cv2.setRNGSeed(RNG_SEED)  # GrabCut initialises its colour clusters at random
    models = np.zeros((1, 65)), np.zeros((1, 65))
    cv2.grabCut(np.ascontiguousarray(image), trimap, NO_RECTANGLE, *models, rounds, cv2.GC_INIT_WITH_MASK)
    return np.isin(trimap, (cv2.GC_FGD, cv2.GC_PR_FGD))


def smooth(mask: Mask, *, sigma_share: float) -> Mask:
    """Blur a mask, bool (H, W), with a standard deviation of `sigma_share` r and threshold it at one half."""
    sigma_px = max(sigma_share * disc_radius(mask), SMALLEST_SIGMA_PX)
    blurred: Mask = cv2.GaussianBlur(mask.astype(np.float32), (0, 0), sigma_px) > 0.5
    return blurred


@dataclass(slots=True)
class NoModel:
    """The backend of methods without a model: it predicts nothing, and its only default is to use crops."""

    name: str = "none"
    defaults: ModelDefaults = field(default_factory=lambda: ModelDefaults(view="crop", selection="single"))
    views_at_once: int = 1
    arbiters: Sequence[Arbiter] = ()
    fingerprint: str = hashlib.sha256(f"opencv {cv2.__version__}".encode()).hexdigest()

    def embed(self, images: Sequence[ImageArray]) -> list[Embedding]:
        raise NotImplementedError("methods without a model embed nothing")

    def predict(self, embeddings: Sequence[Embedding], prompts: Sequence[Prompts]) -> list[Prediction]:
        raise NotImplementedError("methods without a model predict nothing")
