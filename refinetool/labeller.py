"""Labels an image by example: makes coarse masks from a few annotated reference images (VRP-SAM), and refines them.

    read → embed → (reference encoder → decode) per class → share out pixels → [refine] → reject → write

`label` maps whole folders. A target is a `Sample` with one empty region per class, so that it passes through the same
runner and the same journal as in `refine`: N classes in, N annotations out, each with a mask or the reason why there is
none.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

import numpy as np

from refinetool import masks
from refinetool.backends import Backend, Embedding
from refinetool.backends.models import load_backend
from refinetool.errors import DataError
from refinetool.formats.references import Reference, References
from refinetool.images import read_image, read_sample
from refinetool.records import (
    Annotation,
    FloatArray,
    FloatMap,
    FloatMaps,
    ImageArray,
    Mask,
    Outcome,
    Region,
    Rle,
    Sample,
)
from refinetool.refine import Prepared, Refiner
from refinetool.running.identity import job_identity
from refinetool.settings import LabelSettings, ReferenceSettings, RefineSettings
from refinetool.statuses import Reason

SINGLE = 0
"""The single-mask output among a model's candidates."""


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """One image to label, uint8 (H, W, 3), and its sample."""

    sample: Sample
    pixels: ImageArray


@dataclass(frozen=True, slots=True)
class ReadTarget:
    """A target that was read: the one job for the model."""

    jobs: tuple[Target, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """What was found in a target of K classes.

    labels: bool (K, H, W), no pixel in more than one.
    scores: float32 (K,), the mean probability of a mask's pixels times the predicted IoU; 0 where the mask is empty.
    refined: The masks as a sample in the hands of the refiner, with its answers; None without refinement.
    """

    labels: Sequence[Rle]
    scores: FloatArray
    refined: tuple[Prepared, Sequence[Any]] | None = None


class Labeller:
    """A reference encoder, a model that decodes its tokens, and references. Holds no state between calls.

    Args:
        prompter: A `backends.reference.Prompter`.
        backend: The `SquareBackend` that the encoder was trained for.
        refiner: With the same backend, to refine what is found; None to leave it as it is.
    """

    def __init__(
        self, prompter: Any, backend: Any, references: References, *, settings: LabelSettings, refiner: Refiner | None
    ) -> None:
        self.backend: Backend = backend
        self.refiner, self.settings = refiner, settings
        self._prompter, self._decoder = prompter, backend
        self._threshold = prompter.recipe.threshold if settings.threshold is None else settings.threshold
        self._shots = {
            category: [self._shot(shot) for shot in shots] for category, shots in references.by_category().items()
        }

    def _shot(self, reference: Reference) -> Any:
        from refinetool.images import leads_out

        if leads_out(reference.image, reference.within):
            raise DataError(f"{reference.image}: is a link that leads out of its folder; --follow-links allows that.")
        image = read_image(reference.image, size=reference.annotation.size, max_pixels=self.settings.max_pixels)
        return self._prompter.shot(image, masks.decode(reference.annotation))

    @property
    def categories(self) -> tuple[int, ...]:
        """The ids of the classes with references, in the order of a sample's regions."""
        return tuple(self._shots)

    @property
    def jobs_at_once(self) -> int:
        """Number of targets to process together for the best speed."""
        return self.backend.views_at_once

    def prepare(self, sample: Sample) -> ReadTarget:
        """Read a target.

        Raises:
            ImageError: The image is missing, broken or too large.
        """
        return ReadTarget((Target(sample, read_sample(sample, max_pixels=self.settings.max_pixels)),))

    def segment(self, jobs: Sequence[Target]) -> list[Found]:
        """Find the classes in some targets. An image is embedded once, for labelling and for refinement."""
        embeddings = self.backend.embed([target.pixels for target in jobs])
        found = [self._find(target, embedding) for target, embedding in zip(jobs, embeddings, strict=True)]
        if self.refiner is None:
            return found
        return self._refine(jobs, embeddings, found, self.refiner)

    def _find(self, target: Target, embedding: Embedding) -> Found:
        logits, predicted = self.soft_masks(target.pixels, embedding)
        owners, chances = share_out(logits, size=target.sample.size, threshold=self._threshold)
        labels: list[Rle] = []
        scores = np.zeros(len(logits), np.float32)
        for number in range(len(logits)):
            mask: Mask = owners == number
            labels.append(masks.encode(mask))
            if mask.any():
                scores[number] = float(chances[mask].mean()) * float(predicted[number])
        return Found(labels, scores)

    def soft_masks(self, image: ImageArray, embedding: Embedding) -> tuple[FloatMaps, FloatArray]:
        """Predict the masks of all K classes in an image, whose whole frame is embedded.

        Returns:
            Logits float32 (K, h, w) over the image, and predicted IoUs float32 (K,) in 0..1.
        """
        features = self._prompter.look(image)
        tokens = [self._prompter.tokens(features, shots) for shots in self._shots.values()]
        logits: dict[int, FloatMap] = {}
        predicted = np.zeros(len(tokens), np.float32)
        for same in _same_length(tokens):
            prediction = self._decoder.predict_from_tokens(embedding, self._prompter.joined([tokens[n] for n in same]))
            logits |= dict(zip(same, prediction.logits(np.full(len(same), SINGLE)), strict=True))
            predicted[same] = prediction.scores[:, SINGLE].clip(0, 1)
        return np.stack([logits[n] for n in range(len(tokens))]), predicted

    def _refine(
        self, jobs: Sequence[Target], embeddings: Sequence[Embedding], found: Sequence[Found], refiner: Refiner
    ) -> list[Found]:
        """Refine the masks of some targets, and let the refiner use their embeddings where it sees the whole image."""
        prepared = [
            _with_embedding(refiner.prepare_pixels(_coarse(target.sample, one.labels), target.pixels), embedding)
            for target, embedding, one in zip(jobs, embeddings, found, strict=True)
        ]
        answers = iter(refiner.segment([job for one in prepared for job in one.jobs]))
        return [
            replace(one, refined=(ready, [next(answers) for _ in ready.jobs]))
            for one, ready in zip(found, prepared, strict=True)
        ]

    def finish(self, prepared: ReadTarget, answers: Sequence[Found]) -> Outcome:
        """Reject what is doubtful, and return one annotation per class: a mask, or the reason why there is none."""
        (target,), (found,) = prepared.jobs, answers
        refined: Sequence[Annotation | None] = [None] * len(found.labels)
        if found.refined is not None:
            assert self.refiner is not None
            refined = self.refiner.finish(*found.refined).annotations
        annotations = (
            judge(region, label, float(score), after, settings=self.settings)
            for region, label, score, after in zip(
                target.sample.regions, found.labels, found.scores, refined, strict=True
            )
        )
        return Outcome(target.sample.key, tuple(annotations))


def _same_length(tokens: Sequence[Any]) -> list[list[int]]:
    """Group the indices of prompts (1, T, C) with the same number of tokens: a decoder call can't mix them."""
    groups: dict[int, list[int]] = {}
    for number, one in enumerate(tokens):
        groups.setdefault(one.shape[1], []).append(number)
    return list(groups.values())


def share_out(logits: FloatMaps, *, size: tuple[int, int], threshold: float) -> tuple[Any, FloatArray]:
    """Give every pixel to the likeliest class, if its probability exceeds a threshold.

    Args:
        logits: float32 (K, h, w) over the whole image.
        size: (H, W) of the image.

    Returns:
        int64 (H, W), the number of the class or -1, and the probability of the likeliest class, float32 (H, W).
    """
    best = np.full(size, -np.inf, np.float32)
    owners = np.full(size, -1, np.int64)
    for number, coarse in enumerate(logits):
        full = masks.spread(coarse, size)
        better = full > best
        best[better], owners[better] = full[better], number
    chances: FloatArray = (1 / (1 + np.exp(-best))).astype(np.float32)
    owners[chances <= threshold] = -1
    return owners, chances


def judge(
    region: Region, label: Rle, score: float, refined: Annotation | None, *, settings: LabelSettings
) -> Annotation:
    """Return the mask of a class, or the reason why it is rejected.

    Args:
        refined: What the refiner made of the mask; None if it was not asked. Where it kept the mask, for whatever
            reason, so do we; a mask that it changed beyond recognition is rejected, because one of the two is wrong.
    """
    area = masks.area(label)
    if area == 0:
        return Annotation(region.mask, Reason.EMPTY_RESULT, score)
    if area < settings.min_area_px:
        return Annotation(region.mask, Reason.TOO_SMALL, score)
    if score < settings.min_score:
        return Annotation(region.mask, Reason.LOW_SCORE, score)
    if refined is None or not refined.refined or refined.mask is None:
        return Annotation(label, None, score)
    agreement = masks.iou(masks.decode(label), masks.decode(refined.mask))
    if agreement < settings.min_agreement:
        return Annotation(region.mask, Reason.DRIFT, score, agreement)
    return Annotation(refined.mask, None, score, agreement)


def _coarse(sample: Sample, labels: Sequence[Rle]) -> Sample:
    """Return the sample with what was found in it, as classes that share a map, for the refiner."""
    regions = (
        replace(region, mask=label, keep=None if masks.area(label) else Reason.EMPTY)
        for region, label in zip(sample.regions, labels, strict=True)
    )
    return replace(sample, regions=tuple(regions), layout="semantic")


def _with_embedding(prepared: Prepared, embedding: Embedding) -> Prepared:
    whole = (0, 0, embedding.size[1], embedding.size[0])
    jobs = (replace(job, embedding=embedding) if job.view.window == whole else job for job in prepared.jobs)
    return replace(prepared, jobs=tuple(jobs))


def empty_target(key: str, image: Path, *, size: tuple[int, int], categories: Sequence[int], **more: Any) -> Sample:
    """Return a target: an image with one empty region per class."""
    nothing = masks.encode(np.zeros(size, np.bool_))
    regions = tuple(Region(number, number, nothing) for number in categories)
    return Sample(key, image, size, regions, layout="semantic", **more)


# --- loading


@dataclass(frozen=True, slots=True)
class LabelJob:
    """A labeller as given by the user; any process can load it. See `label.label_dataset`.

    weights: Of the reference encoder; see `backends.reference.load_prompter`.
    refine: Settings of the refinement; None without.
    """

    model: str
    checkpoint: str | None
    device: str
    precision: str
    weights: str | None
    image_encoder: str | None
    encoder_checkpoint: str | None
    references: References
    settings: LabelSettings
    refine: RefineSettings | None
    head: str = "auto"
    encoder: ReferenceSettings = field(default_factory=ReferenceSettings)

    def on(self, device: str) -> Self:
        """Return the same job for another device."""
        return replace(self, device=device)

    def load(self) -> tuple[Labeller, Mapping[str, object]]:
        """Load the models into this process, and look at the references; returns the labeller with its identity."""
        from refinetool.backends.reference import load_prompter

        chosen = self.refine or RefineSettings()
        backend = load_backend(
            self.model,
            checkpoint=self.checkpoint,
            device=self.device,
            precision=self.precision,
            head=self.head,
            image_batch=chosen.image_batch,
            prompt_batch=chosen.prompt_batch,
        )
        prompter = load_prompter(
            self.weights,
            image_encoder=self.image_encoder,
            encoder_checkpoint=self.encoder_checkpoint,
            backend=backend,
            settings=self.encoder,
        )
        refiner = None if self.refine is None else Refiner(backend, self.refine)
        labeller = Labeller(prompter, backend, self.references, settings=self.settings, refiner=refiner)
        return labeller, self._identity(labeller, prompter.fingerprint)

    def _identity(self, labeller: Labeller, prompter: str) -> dict[str, object]:
        refiner = labeller.refiner
        base = job_identity(
            labeller.backend,
            RefineSettings() if refiner is None else refiner.settings,
            model=self.model,
            device=self.device,
            precision=self.precision,
            format="label",
        )
        labels = {name: value for name, value in asdict(self.settings).items() if name != "max_pixels"}
        if refiner is None:
            del base["settings"]
        return base | {"reference_encoder": prompter, "references": self.references.digest, "labels": labels}
