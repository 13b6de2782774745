"""Answers: asking a backend in batches, and taking one of its candidates for each part."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from refinetool.backends import Backend, Embedding, Prediction, Selection
from refinetool.records import BoolArray, FloatArray, IntArray, Prompts


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model proposes for the n parts of a job: masks bool (n, H, W) in the view, predicted IoU (n,)."""

    masks: BoolArray
    predicted_iou: FloatArray


def ask(
    backend: Backend,
    embeddings: Sequence[Embedding],
    prompts: Sequence[Prompts],
    coarse: Sequence[BoolArray],
    *,
    selection: Selection,
    prompt_batch: int,
) -> list[Answer]:
    """Answer the prompts of each embedding, at most `prompt_batch` regions in a decoder call, and select."""
    pieces = [
        (number, slice(start, start + prompt_batch))
        for number, asked in enumerate(prompts)
        for start in range(0, len(asked), prompt_batch)
    ]
    found: list[list[Answer]] = [[] for _ in prompts]
    for group in packed(pieces, [len(prompts[number].labels[rows]) for number, rows in pieces], limit=prompt_batch):
        predictions = backend.predict(
            [embeddings[number] for number, _ in group], [prompts[number].take(rows) for number, rows in group]
        )
        for (number, rows), prediction in zip(group, predictions, strict=True):
            choice = select(prediction, coarse[number][rows], selection=selection)
            # SAM's IoU head has no sigmoid and can leave 0..1.
            scores = prediction.scores[np.arange(len(choice)), choice].clip(0, 1)
            found[number].append(Answer(prediction.masks(choice), scores))
    return [
        Answer(np.concatenate([a.masks for a in answers]), np.concatenate([a.predicted_iou for a in answers]))
        for answers in found
    ]


def packed(pieces: Sequence[tuple[int, slice]], lengths: Sequence[int], *, limit: int) -> list[list[tuple[int, slice]]]:
    """Group pieces, in order, so that the lengths in a group add up to no more than the limit."""
    groups: list[list[tuple[int, slice]]] = []
    room = 0
    for piece, length in zip(pieces, lengths, strict=True):
        if length > room:
            groups.append([])
            room = limit
        groups[-1].append(piece)
        room -= length
    return groups


def select(prediction: Prediction, coarse: BoolArray, *, selection: Selection) -> IntArray:
    """Which of K candidates to take for each of N regions: (N,). Candidate 0 is the single-mask output."""
    n, k = prediction.scores.shape
    if selection == "single" or k == 1:
        return np.zeros(n, dtype=np.int64)
    criterion = prediction.scores if selection == "predicted" else prediction.overlap(coarse)
    best: IntArray = 1 + criterion[:, 1:].argmax(axis=1)
    return best
