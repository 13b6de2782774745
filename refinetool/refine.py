"""START HERE. Refinement in one sentence:

    read → split → view → embed → (excavate → segment → select) x passes → snap → guard → merge → write

A `Refiner` does all of it but reading and writing files, which belong to `formats`, for one image or, through
`runners`, for many. Its three steps suit three kinds of threads: `prepare` reads and mines prompts ahead of the model,
`segment` is the model, `finish` judges and encodes behind it. `Refiner.refine_image` is the three in a row.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from refinetool import masks, regions
from refinetool.backends import Backend, Embedding, Prediction, Selection
from refinetool.backends.models import load_backend
from refinetool.errors import DataError
from refinetool.guard import doubt
from refinetool.images import read_image
from refinetool.prompts import excavate, expand_boxes, tight_box
from refinetool.records import (
    REFINED,
    Annotation,
    BoolArray,
    Box,
    FloatArray,
    ImageArray,
    IntArray,
    Outcome,
    Prompts,
    Region,
    Rle,
    Sample,
    kept,
)
from refinetool.regions import Claim
from refinetool.settings import RefineSettings
from refinetool.snap import guided_snap
from refinetool.views import View, choose_views

EMPTY = "empty"


@dataclass(frozen=True, slots=True)
class Part:
    """What is refined at a time: a region, or a part of a class mask. `mask` is bool, cut to the half-open `box`."""

    region: int
    box: Box
    mask: BoolArray


@dataclass(frozen=True, slots=True)
class Job:
    """One view and the n parts the model is asked about in it: pixels (H, W, 3), coarse masks (n, H, W)."""

    view: View
    parts: tuple[Part, ...]
    pixels: ImageArray
    coarse: BoolArray
    prompts: Prompts


@dataclass(frozen=True, slots=True)
class Prepared:
    """A sample with everything the model is to be asked. `trivial` are pieces of class masks too small to refine."""

    sample: Sample
    jobs: tuple[Job, ...]
    trivial: tuple[Claim, ...]

    def __len__(self) -> int:
        """Views the model has to encode."""
        return len(self.jobs)


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model proposes for the n parts of a job: masks bool (n, H, W) in the view, predicted IoU (n,)."""

    masks: BoolArray
    predicted_iou: FloatArray


@dataclass(frozen=True, slots=True)
class Verdict:
    """What became of one part: the claim it makes on the image, its status, and how like the coarse mask it is."""

    claim: Claim
    status: str
    predicted_iou: float
    coarse_iou: float


@dataclass(frozen=True, slots=True)
class RefinedMask:
    """What `refine_image` returns for a mask: bool (H, W), and how it came about (see `records.Annotation`)."""

    mask: BoolArray
    status: str
    predicted_iou: float | None
    coarse_iou: float | None


@dataclass(frozen=True, slots=True)
class Refiner:
    """A model and how to use it. Holds no state between calls."""

    backend: Backend
    settings: RefineSettings

    def prepare(self, sample: Sample) -> Prepared:
        """Read the image of a sample, split its regions, choose views and mine the first prompts.

        Raises:
            ImageError: the image is missing, broken, too large or of another size than the sample says.
        """
        image = read_image(sample.image, size=sample.size, max_pixels=self.settings.max_pixels)
        return self.prepare_pixels(sample, image)

    def prepare_pixels(self, sample: Sample, image: ImageArray) -> Prepared:
        """The same for pixels at hand, uint8 (H, W, 3) RGB of the sample's size."""
        parts, trivial = split(sample, settings=self.settings)
        chosen = choose_views(
            [part.box for part in parts],
            [int(part.mask.sum()) for part in parts],
            size=sample.size,
            settings=self.settings.view,
            backend_view=self.backend.view,
        )
        rng = np.random.default_rng((self.settings.seed, zlib.crc32(sample.key.encode())))
        jobs = []
        for view, members in chosen:
            shown = tuple(parts[member] for member in members)
            coarse = np.stack([in_view(part, view) for part in shown])
            prompts = excavate(coarse, settings=self.settings.prompts, rng=rng)
            jobs.append(Job(view, shown, view.crop_image(image), coarse, prompts))
        return Prepared(sample, tuple(jobs), tuple(trivial))

    def segment(self, batch: Sequence[Prepared]) -> list[tuple[Answer, ...]]:
        """Ask the model about several samples: per sample, one answer per job.

        Views of different samples never share a batch. What else is in a batch decides how its kernels round, and a
        resumed run, whose batches would hold other samples, must give the bytes of an uninterrupted one.
        """
        size = self.settings.image_batch
        return [
            tuple(
                answer
                for start in range(0, len(prepared.jobs), size)
                for answer in self._answer(prepared.jobs[start : start + size])
            )
            for prepared in batch
        ]

    def _answer(self, jobs: Sequence[Job]) -> list[Answer]:
        settings = self.settings
        embeddings = self.backend.embed([job.pixels for job in jobs])
        current = [job.coarse for job in jobs]
        prompts = [job.prompts for job in jobs]
        answers: list[Answer] = []
        for number in range(settings.passes):
            if number > 0:
                # A pass that lost a mask leaves nothing to mine from: it keeps the one before.
                current = [
                    np.where(answer.masks.any(axis=(1, 2), keepdims=True), answer.masks, before)
                    for answer, before in zip(answers, current, strict=True)
                ]
                rng = np.random.default_rng((settings.seed, number))
                prompts = [excavate(found, settings=settings.prompts, rng=rng) for found in current]
            if settings.prompts.box == "elastic":
                prompts = [
                    expand_boxes(asked, found, embedding.similarity(found), settings=settings.prompts)
                    for asked, found, embedding in zip(prompts, current, embeddings, strict=True)
                ]
            answers = ask(
                self.backend,
                embeddings,
                prompts,
                [job.coarse for job in jobs],
                selection=self.backend.selection if settings.selection == "auto" else settings.selection,
                prompt_batch=settings.prompt_batch,
            )
        return answers

    def finish(self, prepared: Prepared, segmented: Sequence[Answer]) -> Outcome:
        """Snap and judge what the model proposed, and merge it where regions share a map."""
        verdicts = [
            self._judge(job, row, answer)
            for job, answer in zip(prepared.jobs, segmented, strict=True)
            for row in range(len(job.parts))
        ]
        if prepared.sample.layout == "instances":
            annotations = alone(prepared.sample, verdicts)
        else:
            annotations = merged(prepared.sample, verdicts, prepared.trivial)
        return Outcome(prepared.sample.key, tuple(annotations))

    def _judge(self, job: Job, row: int, answer: Answer) -> Verdict:
        part, proposal = job.parts[row], answer.masks[row]
        score = float(answer.predicted_iou[row])
        snap = self.settings.snap
        if (self.backend.snap if snap.mode == "auto" else snap.mode) == "guided" and proposal.any():
            proposal = guided_snap(job.pixels, proposal, radius_share=snap.radius, epsilon=snap.epsilon)
        reason, overlap = doubt(job.coarse[row], proposal, score, settings=self.settings.guard)
        if reason is not None:
            return Verdict(Claim(part.region, part.box, part.mask, None), kept(reason), score, overlap)
        x0, y0, x1, y1 = tight_box(proposal)
        left, top, _, _ = job.view.window
        claim = Claim(part.region, (left + x0, top + y0, left + x1, top + y1), proposal[y0:y1, x0:x1].copy(), score)
        return Verdict(claim, REFINED, score, overlap)

    def refine_image(self, image: ImageArray, coarse: BoolArray) -> list[RefinedMask]:
        """Refine N masks of one image that are at hand as arrays; they may overlap.

        Args:
            image: uint8 (H, W, 3) RGB.
            coarse: (N, H, W), bool, or numbers that are all 0 and 1 or all 0 and 255.

        Returns:
            N refined masks in the same order, at image size.

        Raises:
            DataError: shapes do not match, or values are not those of a mask.
        """
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8:
            raise DataError(f"the image is {image.dtype} {image.shape}; expected uint8 (H, W, 3) in RGB order")
        height, width = image.shape[:2]
        if coarse.ndim != 3 or coarse.shape[1:] != (height, width):
            raise DataError(f"the coarse masks are {coarse.shape}; expected (N, {height}, {width})")
        binary = [masks.as_bool(mask, source=f"coarse mask {n}") for n, mask in enumerate(coarse)]
        found = tuple(Region(n, None, masks.encode(mask)) for n, mask in enumerate(binary))
        sample = Sample("image", Path(), (height, width), found)
        prepared = self.prepare_pixels(sample, image)
        outcome = self.finish(prepared, self.segment([prepared])[0])
        return [
            RefinedMask(masks.decode(given.mask), given.status, given.predicted_iou, given.coarse_iou)
            for given in outcome.annotations
            if given.mask is not None
        ]


def load_refiner(
    model: str, *, checkpoint: str | None, device: str, precision: str, settings: RefineSettings
) -> Refiner:
    """A refiner with the named model (`refinetool models list`).

    Args:
        checkpoint: A weights file, `random:SEED`, or None for the published weights.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        precision: `auto`, `fp32` or `bf16`.
    """
    return Refiner(load_backend(model, checkpoint=checkpoint, device=device, precision=precision), settings)


def split(sample: Sample, *, settings: RefineSettings) -> tuple[list[Part], list[Claim]]:
    """The parts of a sample that are to be refined, and the pieces of class masks that are too small for it."""
    parts: list[Part] = []
    trivial: list[Claim] = []
    for number, region in enumerate(sample.regions):
        if region.mask is None or region.keep is not None or masks.area(region.mask) == 0:
            continue
        mask = masks.decode(region.mask)
        if sample.layout == "semantic":
            pieces = regions.split(mask, settings=settings.split)
            parts += [Part(number, pieces.box(n), pieces.crop(n)) for n in range(len(pieces))]
            rest = pieces.dropped()
            if rest.any():
                trivial.append(whole_claim(number, rest))
        else:
            claim = whole_claim(number, mask)
            parts.append(Part(number, claim.box, claim.mask))
    return parts, trivial


def in_view(part: Part, view: View) -> BoolArray:
    """The mask of a part in the frame of a view that holds all of it, bool (H, W)."""
    mask = np.zeros(view.size, dtype=np.bool_)
    left, top, _, _ = view.window
    x0, y0, x1, y1 = part.box
    mask[y0 - top : y1 - top, x0 - left : x1 - left] = part.mask
    return mask


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
            scores = prediction.scores[np.arange(len(choice)), choice]
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


def alone(sample: Sample, verdicts: Sequence[Verdict]) -> list[Annotation]:
    """One annotation per region, where regions may overlap and none has more than one part."""
    judged = {verdict.claim.owner: verdict for verdict in verdicts}
    annotations = []
    for number, region in enumerate(sample.regions):
        verdict = judged.get(number)
        if verdict is None:
            annotations.append(untouched(region))
        elif verdict.status == REFINED:
            mask = encode_claim(verdict.claim, sample)
            annotations.append(Annotation(mask, REFINED, verdict.predicted_iou, verdict.coarse_iou))
        else:
            annotations.append(Annotation(region.mask, verdict.status, verdict.predicted_iou, verdict.coarse_iou))
    return annotations


def merged(sample: Sample, verdicts: Sequence[Verdict], trivial: Sequence[Claim]) -> list[Annotation]:
    """One annotation per region, where regions share a map: no pixel has two owners (`regions.merge` has the rule).

    A region counts as refined if any of its parts is; its predicted IoU is the mean of those parts, weighted by area.
    A kept region can lose pixels to a refined one that claims them: in a map of one owner per pixel one must give way.
    """
    claims = [*trivial, *(verdict.claim for verdict in verdicts)]
    for number, region in enumerate(sample.regions):
        if region.keep is not None and region.mask is not None and masks.area(region.mask) > 0:
            claims.append(whole_claim(number, masks.decode(region.mask)))
    void = None if sample.void is None else masks.decode(sample.void)
    owners = regions.merge(claims, void=void, size=sample.size)

    annotations = []
    for number, region in enumerate(sample.regions):
        if region.mask is None:
            annotations.append(untouched(region))
            continue
        mask = owners == number
        own = [verdict for verdict in verdicts if verdict.claim.owner == number]
        accepted = [verdict for verdict in own if verdict.status == REFINED]
        if accepted:
            weights = [float(verdict.claim.mask.sum()) for verdict in accepted]
            score = float(np.average([verdict.predicted_iou for verdict in accepted], weights=weights))
            overlap = masks.iou(mask, masks.decode(region.mask))
            annotations.append(Annotation(masks.encode(mask), REFINED, score, overlap))
        elif own:
            largest = max(own, key=lambda verdict: int(verdict.claim.mask.sum()))
            annotations.append(
                Annotation(masks.encode(mask), largest.status, largest.predicted_iou, largest.coarse_iou)
            )
        else:
            annotations.append(Annotation(masks.encode(mask), untouched(region).status))
    return annotations


def untouched(region: Region) -> Annotation:
    """The annotation of a region that the model was not asked about."""
    return Annotation(region.mask, kept(region.keep or EMPTY))


def whole_claim(owner: int, mask: BoolArray) -> Claim:
    """A coarse mask, bool (H, W) and not empty, as a claim cut to its box."""
    x0, y0, x1, y1 = box = tight_box(mask)
    return Claim(owner, box, mask[y0:y1, x0:x1].copy(), None)


def encode_claim(claim: Claim, sample: Sample) -> Rle:
    """The run lengths of a claim in the frame of its image."""
    full = np.zeros(sample.size, dtype=np.bool_)
    x0, y0, x1, y1 = claim.box
    full[y0:y1, x0:x1] = claim.mask
    return masks.encode(full)
