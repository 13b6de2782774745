"""Runs a backend on the parts of a sample, and chooses one of the candidate masks for each part.

Axes: n parts of a view, K candidates, H W the pixels of the view, h w the model's mask grid over it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from refinetool import masks
from refinetool.backends import Backend, Embedding, Prediction
from refinetool.records import BoolArray, Candidates, FloatArray, FloatMaps, ImageArray, IntArray, Masks, Prompts, Size
from refinetool.regions import Part
from refinetool.views import View

Selection: TypeAlias = Literal["auto", "single", "predicted", "coarse", "oracle"]
"""Which candidate becomes the refined mask: the single-mask output, the one with the highest predicted IoU, the one
most similar to the coarse mask, or the one most similar to the ground truth. `auto` is resolved before."""


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """One view and the n parts that are refined in it.

    pixels: uint8 (H, W, 3), the image in the view.
    coarse: bool (n, H, W).
    truth: bool (n, H, W), the ground truth of the parts, None where it is not known.
    prompts: The prompts of the first pass.
    seeds: One per part; with the number of the pass they seed its random points.
    """

    view: View
    parts: tuple[Part, ...]
    pixels: ImageArray
    coarse: Masks
    truth: Masks | None
    prompts: Prompts
    seeds: tuple[tuple[int, ...], ...]
    embedding: Embedding | None = None
    """The view's embedding, if it was computed before."""


@dataclass(frozen=True, slots=True, eq=False)
class AllCandidates:
    """All candidates of the n parts of a job: masks bool (n, K, H, W), scores (n, K), and the chosen index, (n,)."""

    masks: BoolArray
    scores: FloatArray
    selected: IntArray

    def of_row(self, row: int, view: View, size: Size) -> Candidates:
        """Return the candidates of one part, in the frame of the image, whose size is (H, W)."""
        whole = (view.paste_masks(mask, size=size) for mask in self.masks[row])
        scores = tuple(float(score) for score in self.scores[row])
        return Candidates(tuple(masks.encode(mask) for mask in whole), scores, int(self.selected[row]))


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """The proposed masks for the n parts of a job.

    masks: bool (n, H, W) in the view.
    predicted_iou: float32 (n,) in 0..1, or NaN where no model was run.
    logits: float32 (n, h, w), for a further pass, or to judge the masks by; None unless requested.
    candidates: All of them; None unless requested.
    """

    masks: Masks
    predicted_iou: FloatArray
    logits: FloatMaps | None = None
    candidates: AllCandidates | None = None


def ask(
    backend: Backend,
    embeddings: Sequence[Embedding],
    prompts: Sequence[Prompts],
    jobs: Sequence[Job],
    *,
    selection: Selection,
    with_logits: bool,
    with_candidates: bool,
) -> list[Answer]:
    """Predict masks for the prompts of each job, and choose a candidate for each part.

    Args:
        embeddings: One per job, from the backend.
        prompts: One per job.
        selection: Resolved: not `auto`.
        with_logits, with_candidates: Whether answers contain these optional fields.
    """
    answers = []
    for job, prediction in zip(jobs, backend.predict(embeddings, prompts), strict=True):
        chosen = choose(prediction, coarse=job.coarse, truth=job.truth, selection=selection)
        # SAM's IoU head has no sigmoid and can leave 0..1.
        scores = prediction.scores.clip(0, 1)
        answers.append(
            Answer(
                prediction.masks(chosen),
                scores[np.arange(len(chosen)), chosen],
                prediction.logits(chosen) if with_logits else None,
                AllCandidates(every_candidate(prediction), prediction.scores, chosen) if with_candidates else None,
            )
        )
    return answers


def choose(prediction: Prediction, *, coarse: Masks, truth: Masks | None, selection: Selection) -> IntArray:
    """Choose one of K candidates for each of N regions: indices (N,). Candidate 0 is the single-mask output.

    Args:
        coarse: bool (N, H, W).
        truth: bool (N, H, W), for `oracle`, which compares at full resolution; None for the others.
    """
    n, k = prediction.scores.shape
    if selection == "single" or k == 1:
        return np.zeros(n, dtype=np.int64)
    match selection:
        case "predicted":
            criterion = prediction.scores
        case "coarse":
            criterion = prediction.overlap(coarse)
        case "oracle":
            assert truth is not None, "regions without ground truth are kept back"
            criterion = agreement(every_candidate(prediction), truth)
        case "auto":
            raise AssertionError("unresolved settings")
    best: IntArray = 1 + criterion[:, 1:].argmax(axis=1)
    return best


def every_candidate(prediction: Prediction) -> BoolArray:
    """Return all candidates at view size: bool (N, K, H, W)."""
    n, k = prediction.scores.shape
    return np.stack([prediction.masks(np.full(n, column)) for column in range(k)], axis=1)


def agreement(candidates: BoolArray, reference: Masks) -> FloatArray:
    """Compute the IoU of each candidate, bool (N, K, H, W), with its region's reference (N, H, W): float32 (N, K)."""
    ious = [[masks.iou(candidate, mask) for candidate in row] for row, mask in zip(candidates, reference, strict=True)]
    return np.array(ious, dtype=np.float32).reshape(candidates.shape[:2])
