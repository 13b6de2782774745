"""START HERE. Refines masks in these steps:

    read → split → view → embed → (excavate → segment → select) x passes → compete → post steps → merge → write

A `Refiner` does all of them except reading and writing annotation files, which is done by `formats`. It works on one
image, or on many through `running`. Its three methods run in three kinds of threads: `prepare` reads the image and
mines prompts ahead of the model, `segment` runs the model, `finish` judges and encodes masks behind it.
`Refiner.refine_image` calls the three in a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from refinetool import masks
from refinetool.backends import Backend, Embedding
from refinetool.backends.models import load_backend
from refinetool.baselines.classical import CLASSICAL, NoModel, answer_classically
from refinetool.baselines.grid import answer_by_grid
from refinetool.candidates import Answer, Job, ask
from refinetool.competition import compete
from refinetool.errors import DataError, UsageError
from refinetool.images import read_sample
from refinetool.inputs import ImageLike, MasksLike, as_image, as_masks, check_settings
from refinetool.masks import tight_box
from refinetool.post import post_steps
from refinetool.prompts import excavate, expand_boxes
from refinetool.records import ImageArray, Mask, Masks, Outcome, Prompts, Proposal, Region, Sample, Size, seed_of
from refinetool.regions import Claim, Part, Verdict, outcome_of, split_sample
from refinetool.settings import JobSettings, RefineSettings
from refinetool.views import View, choose_views

JOB = JobSettings()


@dataclass(frozen=True, slots=True)
class Prepared:
    """A sample with all jobs for the model. `trivial` holds components of class masks that are too small to refine."""

    sample: Sample
    jobs: tuple[Job, ...]
    trivial: tuple[Claim, ...]


@dataclass(frozen=True, slots=True)
class RefinedMask:
    """Result of `refine_image` for one mask: bool (H, W), its status and scores (see `records.Annotation`)."""

    mask: Mask
    status: str
    predicted_iou: float | None
    coarse_iou: float | None


@dataclass(frozen=True, slots=True)
class Refiner:
    """A model with its settings. Holds no state between calls.

    settings: `auto` and None are replaced by the model's defaults when a refiner is made.
    """

    backend: Backend
    settings: RefineSettings

    def __post_init__(self) -> None:
        check_settings(self.settings)
        object.__setattr__(self, "settings", self.settings.resolved(self.backend.defaults))

    @property
    def jobs_at_once(self) -> int:
        """Number of views to process together for the best speed."""
        return self.backend.views_at_once

    def prepare(self, sample: Sample) -> Prepared:
        """Read the image of a sample, split its regions, choose views and mine the first prompts.

        Raises:
            ImageError: The image is missing, broken, too large, or its size differs from that of the sample.
        """
        image = read_sample(sample, max_pixels=self.settings.max_pixels)
        return self.prepare_pixels(sample, image)

    def prepare_pixels(self, sample: Sample, image: ImageArray) -> Prepared:
        """Do the same for an image in memory, uint8 (H, W, 3) RGB of the sample's size."""
        parts, trivial = split_sample(sample, settings=self.settings.split)
        chosen = choose_views(
            [part.box for part in parts],
            [int(part.mask.sum()) for part in parts],
            size=sample.size,
            settings=self.settings.view,
        )
        jobs = (self._job(view, [parts[member] for member in members], sample, image) for view, members in chosen)
        return Prepared(sample, tuple(jobs), tuple(trivial))

    def _job(self, view: View, parts: Sequence[Part], sample: Sample, image: ImageArray) -> Job:
        coarse = np.stack([in_view(part, view) for part in parts])
        seeds = tuple((self.settings.seed, seed_of(sample.key), part.region, part.number) for part in parts)
        prompts = excavate(coarse, settings=self.settings.prompts, seeds=in_pass(0, seeds))
        truth = truth_in_view(parts, view, sample)
        return Job(view, tuple(parts), view.crop_image(image), coarse, truth, prompts, seeds)

    def segment(self, jobs: Sequence[Job]) -> list[Answer]:
        """Run the model on views of any samples. Returns one answer per job, independent of the other jobs."""
        match self.settings.method:
            case "prompts":
                return self._segment_prompts(jobs)
            case "grid-max-iou" | "grid-merge" as rule:
                return answer_by_grid(self.backend, jobs, rule=rule, settings=self.settings.grid)
            case "grabcut" | "guided" | "smooth" as method:
                return answer_classically(jobs, method=method, settings=self.settings.classical)

    def _segment_prompts(self, jobs: Sequence[Job]) -> list[Answer]:
        """Refine with SAMRefiner's method: (excavate → segment → select) x passes."""
        settings = self.settings
        embeddings = embed(self.backend, jobs)
        current = [job.coarse for job in jobs]
        answers: list[Answer] = []
        for number in range(settings.passes):
            if number > 0:
                current = [unless_empty(answer.masks, before) for answer, before in zip(answers, current, strict=True)]
            prompts = self._excavate(number, jobs, current, answers)
            if settings.prompts.box == "elastic":
                prompts = [
                    expand_boxes(mined, mined_from, embedding.similarity(mined_from), settings=settings.prompts)
                    for mined, mined_from, embedding in zip(prompts, current, embeddings, strict=True)
                ]
            last = number == settings.passes - 1
            answers = ask(
                self.backend,
                embeddings,
                prompts,
                jobs,
                selection=settings.selection,
                with_logits=last or settings.cascade != "regen",
                with_candidates=settings.keep_candidates and last,
            )
        return answers

    def _excavate(
        self, number: int, jobs: Sequence[Job], current: Sequence[Masks], answers: Sequence[Answer]
    ) -> list[Prompts]:
        """Return the prompts of pass `number`, mined from the masks of the previous pass, or including its logits."""
        settings = self.settings
        if number == 0:
            prompts = [job.prompts for job in jobs]
            return [replace(mined, masks=None) for mined in prompts] if settings.cascade == "logits-a" else prompts
        prompts = [
            excavate(previous, settings=settings.prompts, seeds=in_pass(number, job.seeds))
            for job, previous in zip(jobs, current, strict=True)
        ]
        if settings.cascade == "regen":
            return prompts
        return [replace(mined, masks=answer.logits) for mined, answer in zip(prompts, answers, strict=True)]

    def finish(self, prepared: Prepared, answers: Sequence[Answer]) -> Outcome:
        """Let the proposals compete, apply the post steps to each, and merge them where regions share a map.

        Args:
            answers: One per job of the sample.
        """
        answers = compete(
            prepared.jobs,
            answers,
            settings=self.settings.competition,
            arbiters=self.backend.arbiters if self.settings.competition.arbitrate else (),
            exclusive=prepared.sample.layout != "instances" or self.settings.exclusive.enabled,
        )
        verdicts = [
            self._judge(job, row, answer, size=prepared.sample.size)
            for job, answer in zip(prepared.jobs, answers, strict=True)
            for row in range(len(job.parts))
        ]
        return outcome_of(
            prepared.sample,
            verdicts,
            prepared.trivial,
            min_left=self.settings.guard.min_left,
            exclusive=self.settings.exclusive,
        )

    def _judge(self, job: Job, row: int, answer: Answer, *, size: Size) -> Verdict:
        score = None if np.isnan(answer.predicted_iou[row]) else float(answer.predicted_iou[row])
        logits = None if answer.logits is None else answer.logits[row]
        proposal = Proposal(job.pixels, job.coarse[row], answer.masks[row], logits, score)
        for step in post_steps(self.settings):
            proposal = step(proposal)
        candidates = None if answer.candidates is None else answer.candidates.of_row(row, job.view, size)
        claim = claim_of(job.parts[row], proposal, job.view)
        return Verdict(claim, proposal.reason, score, proposal.coarse_iou, candidates)

    def refine_image(self, image: ImageLike, coarse: MasksLike) -> list[RefinedMask]:
        """Refine N masks of one image: different objects, which may overlap, and compete for pixels (`competition`).

        Args:
            image: uint8 (H, W, 3) RGB, a PIL image, a path, or a torch tensor, uint8 (3, H, W) or (H, W, 3). The EXIF
                orientation of a file is applied where the masks need it, that of a PIL image never.
            coarse: (N, H, W), or (H, W) for a single mask, bool, or numbers that are all 0 and 1 or all 0 and 255: an
                array, a torch tensor, a PIL image, or a sequence of these.

        Returns:
            N refined masks in the same order, at image size.

        Raises:
            DataError: Shapes do not match, or values are not those of an image or a mask.
            ImageError: The file can't be read.
            UsageError: Candidates are to be chosen by ground truth, which is only read from files.
        """
        if self.settings.selection == "oracle":
            raise UsageError("selection='oracle' needs ground truth; call refine_dataset with truth=...")
        given = as_masks(coarse)
        pixels = as_image(image, size=given.shape[1:] if len(given) else None, max_pixels=self.settings.max_pixels)
        height, width = pixels.shape[:2]
        if len(given) and given.shape[1:] != (height, width):
            raise DataError(
                f"the coarse masks are {given.shape}; expected (N, {height}, {width}), the size of the image"
            )
        found = tuple(Region(n, None, masks.encode(mask)) for n, mask in enumerate(given))
        sample = Sample("image", Path(), (height, width), found)
        prepared = self.prepare_pixels(sample, pixels)
        outcome = self.finish(prepared, self.segment(prepared.jobs))
        return [
            RefinedMask(masks.decode(made.mask), made.status, made.predicted_iou, made.coarse_iou)
            for made in outcome.annotations
            if made.mask is not None
        ]


def embed(backend: Backend, jobs: Sequence[Job]) -> list[Embedding]:
    """Return the embeddings of the views of jobs; only those that no job brings along are computed."""
    fresh = iter(backend.embed([job.pixels for job in jobs if job.embedding is None]))
    return [next(fresh) if job.embedding is None else job.embedding for job in jobs]


def in_view(part: Part, view: View) -> Mask:
    """Return the mask of a part, bool (H, W), in the frame of a view that contains the whole part."""
    left, top, _, _ = view.window
    x0, y0, x1, y1 = part.box
    return masks.paste(part.mask, (x0 - left, y0 - top, x1 - left, y1 - top), size=view.size)


def truth_in_view(parts: Sequence[Part], view: View, sample: Sample) -> Masks | None:
    """Return the ground truth of the regions of n parts, bool (n, H, W) in a view; None unless it is known for all."""
    rles = [sample.regions[part.region].truth for part in parts]
    known = [masks.decode(rle) for rle in rles if rle is not None]
    return view.crop_masks(np.stack(known)) if len(known) == len(rles) else None


def in_pass(number: int, seeds: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Return the seeds of a pass."""
    return [(*seed, number) for seed in seeds]


def unless_empty(current: Masks, previous: Masks) -> Masks:
    """Return the masks of a pass, bool (n, H, W), with empty ones replaced by those of the previous pass."""
    kept: Masks = np.where(current.any(axis=(1, 2), keepdims=True), current, previous)
    return kept


def claim_of(part: Part, proposal: Proposal, view: View) -> Claim:
    """Return the claim of a part in the image: the proposal, or the coarse mask where there is a reason to keep it."""
    if proposal.reason is not None:
        return Claim(part.region, part.box, part.mask, None)
    x0, y0, x1, y1 = tight_box(proposal.mask)
    left, top, _, _ = view.window
    box = (left + x0, top + y0, left + x1, top + y1)
    return Claim(part.region, box, proposal.mask[y0:y1, x0:x1].copy(), proposal.predicted_iou)


def load_refiner(
    model: str,
    *,
    checkpoint: str | None,
    device: str,
    precision: str,
    settings: RefineSettings,
    head: str = JOB.head,
    iou_adapter: Path | None = None,
    arbiter: Path | None = None,
    embeddings: Path | None = None,
    embeddings_gigabytes: float = JOB.embeddings_gigabytes,
    compiled: bool = False,
) -> Refiner:
    """Load a refiner with the named model (`refinetool models list`). Methods without a model load none.

    Args:
        checkpoint: A weights file, `random:SEED`, or None for the published weights.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        precision: `auto`, `fp32` or `bf16`.
        head: For SAM 2 models: `auto`, `none`, a kind of head, or a file that `refinetool train head` wrote.
        iou_adapter: A file that `refinetool adapt-iou` wrote for this model, or None.
        arbiter: A file that `refinetool train arbiter` wrote, or None for the model's own, if it has one.
        embeddings: A folder in which to keep the embeddings of images, and to find those of earlier runs, or None.
        embeddings_gigabytes: What that folder may take.
        compiled: Whether to compile the encoder with torch, which takes a minute or more.

    Raises:
        UsageError: The settings would not use the adapter or the arbiter, or a name does not exist.
        WeightsError: The weights, the adapter or the arbiter can't be used.
        StorageError: The folder of embeddings can't be made.
    """
    if arbiter is not None:  # a contradiction is told before any file is read
        refuse_unused_arbiter(arbiter, settings=settings)
    if settings.method in CLASSICAL:
        return Refiner(NoModel(), settings)
    backend = load_backend(
        model,
        checkpoint=checkpoint,
        device=device,
        precision=precision,
        head=head,
        iou_adapter=iou_adapter,
        arbiter=arbiter,
        image_batch=settings.image_batch,
        prompt_batch=settings.prompt_batch,
    )
    if compiled:
        backend.compile()
    if embeddings is not None:
        backend.remember(embeddings, limit=int(1e9 * embeddings_gigabytes))
    refiner = Refiner(backend, settings)
    if iou_adapter is not None:
        refuse_unused_adapter(iou_adapter, settings=refiner.settings)
    if arbiter is not None:
        refuse_unused_arbiter(arbiter, settings=refiner.settings)
    return refiner


def refuse_unused_arbiter(arbiter: Path, *, settings: RefineSettings) -> None:
    """Raise UsageError if settings would not use an arbiter; where the model is to say, only resolved ones tell."""
    competition = settings.competition
    if competition.weight == 0 or not competition.arbitrate or settings.method != "prompts":
        raise UsageError(
            f"{arbiter}: with these settings the arbiter has nothing to settle, because the objects of an image don't "
            "compete, or it is left out; give --competition 0.35 without --no-arbiter, or leave --arbiter out"
        )


def refuse_unused_adapter(adapter: Path, *, settings: RefineSettings) -> None:
    """Raise UsageError if resolved settings would not use an IoU adapter."""
    from refinetool.modules.iou_adapter import scores_masks

    if settings.selection != "predicted":
        raise UsageError(
            f"{adapter}: an IoU adapter corrects the predicted IoUs that candidates are chosen by, and --selection "
            f"{settings.selection} does not use them; add --selection predicted, or leave the adapter out"
        )
    if settings.prompts.use_mask and not scores_masks(adapter):
        raise UsageError(
            f"{adapter}: this IoU adapter is for points and boxes and leaves prompts with a mask as they are; add "
            "--no-mask, or train one for all prompts: refinetool adapt-iou --recipe paper"
        )
