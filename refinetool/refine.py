"""START HERE. Refinement in one sentence:

    read → split → view → embed → (excavate → segment → select) x passes → snap → trust → guard → merge → write

A `Refiner` does all of it but reading and writing files, which belong to `formats`, for one image or, through
`runners`, for many. Its three steps suit three kinds of threads: `prepare` reads and mines prompts ahead of the model,
`segment` is the model, `finish` judges and encodes behind it. `Refiner.refine_image` is the three in a row.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from refinetool import masks
from refinetool.backends import Backend, Selection
from refinetool.backends.models import load_backend
from refinetool.baselines.classical import CLASSICAL, NoModel, answer_classically
from refinetool.baselines.grid import answer_by_grid
from refinetool.candidates import Answer, Offer, ask
from refinetool.errors import DataError, UsageError
from refinetool.images import read_image
from refinetool.outcomes import Verdict, outcome_of
from refinetool.parts import Job, in_view, split_sample, truth_in_view
from refinetool.post.guard import doubt
from refinetool.post.snap import guided_snap, without_new_pieces
from refinetool.post.trust import settled
from refinetool.prompts import excavate, expand_boxes, tight_box
from refinetool.records import (
    REFINED,
    BoolArray,
    Candidates,
    ImageArray,
    Outcome,
    Prompts,
    Region,
    Sample,
    Size,
    kept,
)
from refinetool.regions import Claim
from refinetool.settings import RefineSettings
from refinetool.views import View, choose_views


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
        parts, trivial = split_sample(sample, settings=self.settings.split)
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
            truth = truth_in_view(shown, view, sample)
            prompts = excavate(coarse, settings=self.settings.prompts, rng=rng)
            jobs.append(Job(view, shown, view.crop_image(image), coarse, truth, prompts))
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
        match self.settings.method:
            case "prompts":
                return self._answer_prompts(jobs)
            case "grid-max-iou" | "grid-merge" as rule:
                return answer_by_grid(self.backend, jobs, rule=rule, settings=self.settings)
            case "grabcut" | "guided" | "smooth" as method:
                return answer_classically(jobs, method=method, settings=self.settings.classical)

    def _answer_prompts(self, jobs: Sequence[Job]) -> list[Answer]:
        """SAMRefiner's way: (excavate → segment → select) x passes."""
        settings = self.settings
        embeddings = self.backend.embed([job.pixels for job in jobs])
        current = [job.coarse for job in jobs]
        answers: list[Answer] = []
        for number in range(settings.passes):
            if number > 0:
                # A pass that lost a mask leaves nothing to mine from: it keeps the one before.
                current = [
                    np.where(answer.masks.any(axis=(1, 2), keepdims=True), answer.masks, before)
                    for answer, before in zip(answers, current, strict=True)
                ]
            prompts = self._excavate(number, jobs, current, answers)
            if settings.prompts.box == "elastic":
                prompts = [
                    expand_boxes(asked, found, embedding.similarity(found), settings=settings.prompts)
                    for asked, found, embedding in zip(prompts, current, embeddings, strict=True)
                ]
            last = number == settings.passes - 1
            answers = ask(
                self.backend,
                embeddings,
                prompts,
                jobs,
                selection=self.backend.selection if settings.selection == "auto" else settings.selection,
                prompt_batch=settings.prompt_batch,
                with_logits=last or settings.cascade != "regen",
                with_offer=settings.keep_candidates and last,
            )
        return answers

    def _excavate(
        self, number: int, jobs: Sequence[Job], current: Sequence[BoolArray], answers: Sequence[Answer]
    ) -> list[Prompts]:
        """The prompts of pass `number`, mined from the masks of the one before, or with its logits among them."""
        settings = self.settings
        if number == 0:
            prompts = [job.prompts for job in jobs]
            return [replace(asked, masks=None) for asked in prompts] if settings.cascade == "logits-a" else prompts
        rng = np.random.default_rng((settings.seed, number))
        prompts = [excavate(found, settings=settings.prompts, rng=rng) for found in current]
        if settings.cascade == "regen":
            return prompts
        return [replace(asked, masks=answer.logits) for asked, answer in zip(prompts, answers, strict=True)]

    def finish(self, prepared: Prepared, segmented: Sequence[Answer]) -> Outcome:
        """Snap, settle and judge what the model proposed, and merge it where regions share a map."""
        verdicts = [
            self._judge(job, row, answer, size=prepared.sample.size)
            for job, answer in zip(prepared.jobs, segmented, strict=True)
            for row in range(len(job.parts))
        ]
        return outcome_of(prepared.sample, verdicts, prepared.trivial)

    def _judge(self, job: Job, row: int, answer: Answer, *, size: Size) -> Verdict:
        part, proposal = job.parts[row], answer.masks[row]
        score = None if np.isnan(answer.predicted_iou[row]) else float(answer.predicted_iou[row])
        logits = None if answer.logits is None else answer.logits[row]
        offered = None if answer.offer is None else candidates_of(answer.offer, row, job.view, size)
        snap = self.settings.snap
        if (self.backend.snap if snap.mode == "auto" else snap.mode) == "guided" and proposal.any():
            proposal = guided_snap(job.pixels, proposal, radius_share=snap.radius, epsilon=snap.epsilon)
        if self._trusts and logits is not None and proposal.any():
            mixed = settled(job.pixels, job.coarse[row], proposal, logits, settings=self.settings.trust)
            proposal = without_new_pieces(mixed, proposal)
        guard = self.settings.guard
        reason, overlap = doubt(job.coarse[row], proposal, predicted_iou=score, logits=logits, settings=guard)
        if reason is not None:
            return Verdict(Claim(part.region, part.box, part.mask, None), kept(reason), score, overlap, offered)
        x0, y0, x1, y1 = tight_box(proposal)
        left, top, _, _ = job.view.window
        claim = Claim(part.region, (left + x0, top + y0, left + x1, top + y1), proposal[y0:y1, x0:x1].copy(), score)
        return Verdict(claim, REFINED, score, overlap, offered)

    @property
    def _trusts(self) -> bool:
        mode = self.settings.trust.mode
        return (self.backend.trust if mode == "auto" else mode) == "outline"

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


def candidates_of(offer: Offer, row: int, view: View, size: Size) -> Candidates:
    """What was offered for one part of a view, in the frame of the image, whose size is (H, W)."""
    whole = (view.paste_masks(mask, size=size) for mask in offer.masks[row])
    scores = tuple(float(score) for score in offer.scores[row])
    return Candidates(tuple(masks.encode(mask) for mask in whole), scores, int(offer.selected[row]))


def load_refiner(
    model: str,
    *,
    checkpoint: str | None,
    device: str,
    precision: str,
    settings: RefineSettings,
    iou_adapter: Path | None = None,
) -> Refiner:
    """A refiner with the named model (`refinetool models list`); methods that ask no model load none.

    Args:
        checkpoint: A weights file, `random:SEED`, or None for the published weights.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        precision: `auto`, `fp32` or `bf16`.
        iou_adapter: What `refinetool adapt-iou` made for this model, or None.

    Raises:
        UsageError: An adapter that would have nothing to do, or names that do not exist.
        WeightsError: Weights or an adapter that can't be used.
    """
    if settings.method in CLASSICAL:
        return Refiner(NoModel(), settings)
    backend = load_backend(model, checkpoint=checkpoint, device=device, precision=precision, iou_adapter=iou_adapter)
    if iou_adapter is not None:
        refuse_idle_adapter(iou_adapter, settings=settings, usual=backend.selection)
    return Refiner(backend, settings)


def refuse_idle_adapter(adapter: Path, *, settings: RefineSettings, usual: Selection) -> None:
    """Raise UsageError where an IoU adapter would not be asked.

    Args:
        usual: What the model is best taken from, which is what the selection `auto` means.
    """
    from refinetool.modules.iou_adapter import scores_masks

    selection = usual if settings.selection == "auto" else settings.selection
    if selection != "predicted":
        raise UsageError(
            f"{adapter}: an IoU adapter corrects the predicted IoUs that candidates are chosen by, and --selection "
            f"{selection} does not ask for them; add --selection predicted, or leave the adapter out"
        )
    if settings.prompts.use_mask and not scores_masks(adapter):
        raise UsageError(
            f"{adapter}: this IoU adapter is for points and boxes and leaves prompts with a mask as they are; add "
            "--no-mask, or train one for all prompts: refinetool adapt-iou --recipe paper"
        )
