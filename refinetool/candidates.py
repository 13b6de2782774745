"""Answers: asking a backend in batches, and taking one of its candidates for each part."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from refinetool.backends import Backend, Embedding, Prediction
from refinetool.masks import iou
from refinetool.parts import Job
from refinetool.records import BoolArray, FloatArray, IntArray, Prompts

Selection: TypeAlias = Literal["single", "predicted", "coarse", "oracle"]
"""Which candidate becomes the refined mask: see `backends.Selection`; `oracle` is the one most like the truth."""


@dataclass(frozen=True, slots=True)
class Offer:
    """Every candidate of the n parts of a job: masks bool (n, K, H, W), scores (n, K), and which was taken, (n,)."""

    masks: BoolArray
    scores: FloatArray
    selected: IntArray


@dataclass(frozen=True, slots=True)
class Answer:
    """What is proposed for the n parts of a job.

    masks: bool (n, H, W) in the view.
    predicted_iou: float32 (n,) in 0..1, or NaN where no model was asked.
    logits: float32 (n, h, w), for a further pass, or to judge the masks by; None unless they were asked for.
    offer: all candidates; None unless they were asked for.
    """

    masks: BoolArray
    predicted_iou: FloatArray
    logits: FloatArray | None = None
    offer: Offer | None = None


def ask(
    backend: Backend,
    embeddings: Sequence[Embedding],
    prompts: Sequence[Prompts],
    jobs: Sequence[Job],
    *,
    selection: Selection,
    prompt_batch: int,
    with_logits: bool,
    with_offer: bool,
) -> list[Answer]:
    """Answer the prompts of each job, at most `prompt_batch` parts in a decoder call, and select.

    Args:
        embeddings, prompts: One per job, as the backend gave and as it takes them.
        with_logits, with_offer: Whether answers hold what they otherwise leave out.
    """
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
            job = jobs[number]
            truth = None if job.truth is None else job.truth[rows]
            choice = select(prediction, coarse=job.coarse[rows], truth=truth, selection=selection)
            # SAM's IoU head has no sigmoid and can leave 0..1.
            scores = prediction.scores.clip(0, 1)
            masks = prediction.masks(choice)
            logits = prediction.logits(choice) if with_logits else None
            offer = Offer(every_candidate(prediction), prediction.scores, choice) if with_offer else None
            found[number].append(Answer(masks, scores[np.arange(len(choice)), choice], logits, offer))
    return [joined(answers) for answers in found]


def joined(answers: Sequence[Answer]) -> Answer:
    """The answers for pieces of a job as one for all of it."""
    if len(answers) == 1:
        return answers[0]
    logits = [answer.logits for answer in answers if answer.logits is not None]
    offers = [answer.offer for answer in answers if answer.offer is not None]
    return Answer(
        np.concatenate([answer.masks for answer in answers]),
        np.concatenate([answer.predicted_iou for answer in answers]),
        np.concatenate(logits) if logits else None,
        Offer(
            np.concatenate([offer.masks for offer in offers]),
            np.concatenate([offer.scores for offer in offers]),
            np.concatenate([offer.selected for offer in offers]),
        )
        if offers
        else None,
    )


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


def select(prediction: Prediction, *, coarse: BoolArray, truth: BoolArray | None, selection: Selection) -> IntArray:
    """Which of K candidates to take for each of N regions: (N,). Candidate 0 is the single-mask output.

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
    best: IntArray = 1 + criterion[:, 1:].argmax(axis=1)
    return best


def every_candidate(prediction: Prediction) -> BoolArray:
    """All candidates at view size: bool (N, K, H, W)."""
    n, k = prediction.scores.shape
    return np.stack([prediction.masks(np.full(n, column)) for column in range(k)], axis=1)


def agreement(candidates: BoolArray, reference: BoolArray) -> FloatArray:
    """IoU of each candidate, bool (N, K, H, W), with its region's reference, bool (N, H, W): float32 (N, K)."""
    ious = [[iou(candidate, mask) for candidate in row] for row, mask in zip(candidates, reference, strict=True)]
    return np.array(ious, dtype=np.float32).reshape(candidates.shape[:2])
