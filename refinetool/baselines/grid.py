"""Baselines that don't show the coarse mask to the model: they compare automatic masks of the image with it.

The model is prompted with a regular grid of points. Masks with a high predicted IoU and a stable outline are used, as
in SAM's automatic mask generator; duplicates are not removed, since they change neither a maximum nor a union.
`grid-max-iou` takes the mask most similar to the coarse mask, `grid-merge` unites the masks that lie mostly inside it.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, TypeAlias

import numpy as np

from refinetool.backends import Backend, Embedding
from refinetool.candidates import Answer, Job
from refinetool.records import FOREGROUND, FloatArray, Masks, Prompts, Size
from refinetool.settings import GridSettings

Rule: TypeAlias = Literal["grid-max-iou", "grid-merge"]

POINTS_AT_ONCE = 32
"""Points whose masks are in memory at a time."""


def answer_by_grid(backend: Backend, jobs: Sequence[Job], *, rule: Rule, settings: GridSettings) -> list[Answer]:
    """Return one answer per job. A part for which nothing is found gets an empty mask.

    The predicted IoU is that of the chosen mask, or the mean over the united masks.
    """
    choose = max_iou if rule == "grid-max-iou" else merged
    answers = []
    for job, embedding in zip(jobs, backend.embed([job.pixels for job in jobs]), strict=True):
        found = automatic_masks(backend, embedding, settings=settings)
        answers.append(choose(found, job.coarse, settings=settings))
    return answers


def automatic_masks(
    backend: Backend, embedding: Embedding, *, settings: GridSettings
) -> Iterator[tuple[Masks, FloatArray]]:
    """Yield masks of the image in portions of m >= 1: bool (m, H, W) and their predicted IoUs, float32 (m,)."""
    points = grid_points(embedding.size, per_side=settings.points_per_side)
    for start in range(0, len(points), POINTS_AT_ONCE):
        some = points[start : start + POINTS_AT_ONCE, None]
        prompts = Prompts(some, np.full(some.shape[:2], FOREGROUND, dtype=np.int64), boxes=None, masks=None)
        (prediction,) = backend.predict([embedding], [prompts])
        confident = prediction.scores >= settings.min_predicted_iou
        good = confident & (prediction.stability(settings.stability_offset) >= settings.min_stability)
        for column in range(1, good.shape[1]):
            rows = np.flatnonzero(good[:, column])
            if len(rows):
                masks = prediction.masks(np.full(len(some), column))[rows]
                filled = masks.any(axis=(1, 2))
                if filled.any():
                    yield masks[filled], prediction.scores[rows[filled], column].clip(0, 1)


def grid_points(size: Size, *, per_side: int) -> FloatArray:
    """Return the centres of `per_side` x `per_side` equal tiles of an image as (x, y), float32 (per_side², 2)."""
    height, width = size
    steps = (np.arange(per_side) + 0.5) / per_side
    x, y = np.meshgrid(steps * width - 0.5, steps * height - 0.5)
    return np.stack((x.ravel(), y.ravel()), axis=1).astype(np.float32)


def max_iou(portions: Iterator[tuple[Masks, FloatArray]], coarse: Masks, *, settings: GridSettings) -> Answer:
    """Take, for each coarse mask, bool (n, H, W), the automatic mask with the highest IoU."""
    del settings
    best, scores, ious = np.zeros_like(coarse), np.zeros(len(coarse), np.float32), np.zeros(len(coarse))
    for masks, predicted in portions:
        shared = shared_pixels(masks, coarse)
        union = masks.sum(axis=(1, 2))[:, None] + coarse.sum(axis=(1, 2)) - shared
        overlap = shared / union
        for n in np.flatnonzero(overlap.max(axis=0) > ious):
            first = overlap[:, n].argmax()
            best[n], scores[n], ious[n] = masks[first], predicted[first], overlap[first, n]
    return Answer(best, scores)


def merged(portions: Iterator[tuple[Masks, FloatArray]], coarse: Masks, *, settings: GridSettings) -> Answer:
    """Unite, for each coarse mask, bool (n, H, W), the automatic masks that lie mostly inside it."""
    union, total, count = np.zeros_like(coarse), np.zeros(len(coarse)), np.zeros(len(coarse))
    for masks, predicted in portions:
        inside = shared_pixels(masks, coarse) / masks.sum(axis=(1, 2))[:, None] > settings.merge_overlap
        for n in np.flatnonzero(inside.any(axis=0)):
            union[n] |= masks[inside[:, n]].any(axis=0)
        total += predicted @ inside
        count += inside.sum(axis=0)
    return Answer(union, (total / np.maximum(count, 1)).astype(np.float32))


def shared_pixels(masks: Masks, coarse: Masks) -> FloatArray:
    """Count the pixels that each of m masks shares with each of n: float32 (m, n), exact up to 2 ** 24."""
    product: FloatArray = masks.reshape(len(masks), -1).astype(np.float32) @ coarse.reshape(len(coarse), -1).T.astype(
        np.float32
    )
    return product
