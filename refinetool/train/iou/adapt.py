"""IoU adaption (SAMRefiner++): trains a model, on coarse masks alone, to choose among its candidates.

The model is frozen; only a low-rank correction of the last layer of its IoU head is trained (see
`modules.iou_adapter`). The coarse mask is the training signal: prompted with a point or a box alone, the model is often
unsure how large the object is, and the candidate most similar to the coarse mask is taken as the right one. Some images
are held out to measure whether it helps.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from refinetool.backends.names import EMBEDDED
from refinetool.cores import limited_threads
from refinetool.errors import DataError, Interrupted, UsageError
from refinetool.formats import open_dataset
from refinetool.formats.storage import IMAGE_FOLDER, new_file, refuse_clashes, refuse_existing
from refinetool.inputs import check_finite, check_settings
from refinetool.locations import location
from refinetool.modules.iou_adapter import IouAdapter, fresh_factors, serialise
from refinetool.records import FloatArray, IntArray, Sample, seed_of
from refinetool.running.interrupts import stop_on_interrupt
from refinetool.running.runners import RefineJob, WorkerCount
from refinetool.settings import ADAPT_RECIPES, AdaptSettings, JobSettings, RefineSettings
from refinetool.train.iou.features import (
    ALL,
    BOX,
    POINT,
    QUESTIONS,
    SINGLE,
    FeatureFile,
    Features,
    features_path,
    holds_features,
)
from refinetool.train.iou.gathering import gather, open_gatherer
from refinetool.train.iou.head import Head

JOB, REFINE = JobSettings(), RefineSettings()
SINGLE_NAME = "single"

Read: TypeAlias = Callable[[str], Features]
"""A function that returns the features of an image by its key."""


@dataclass(frozen=True, slots=True)
class Figures:
    """How well candidates were chosen for some of the held-out answers, before and after.

    top1: Fraction of masks for which the chosen candidate is the one most similar to the coarse mask, or as similar.
    coarse_iou: Mean IoU of the chosen candidate with the coarse mask.
    changed: Fraction of masks for which another candidate is chosen than before.
    """

    prompts: str
    answers: int
    top1_before: float
    top1_after: float
    coarse_iou_before: float
    coarse_iou_after: float
    changed: float


@dataclass(frozen=True, slots=True)
class AdaptSummary:
    """The result of a run. Figures are for points, boxes, both pooled (`single`), and all prompts at once (`all`)."""

    images: int
    """Images with masks that were used."""
    masks: int
    fit_images: int
    held_out_images: int
    reused: int
    """Images whose features an earlier run gathered."""
    failed: int
    errors: tuple[str, ...]
    crashes: tuple[str, ...]
    """How workers died: a sentence each, and the end of the log."""
    model: str
    recipe: AdaptSettings
    figures: tuple[Figures, ...]
    helps: bool
    gather_seconds: float
    train_seconds: float
    output: Path | None
    """None if nothing was written."""
    features: Path | None
    """The file of features, kept for another attempt; None if it was removed."""
    notes: tuple[str, ...] = ()
    """Sentences about what the data set holds and was not read."""

    def of(self, prompts: str) -> Figures:
        """Return the figures for one kind of prompts."""
        return next(figures for figures in self.figures if figures.prompts == prompts)


def adapt_iou(
    coarse: Path | str,
    *,
    output: Path | str,
    images: Path | str | None = None,
    model: str = JOB.model,
    checkpoint: str | None = None,
    device: str = JOB.device,
    precision: str = JOB.precision,
    head: str = JOB.head,
    recipe: AdaptSettings | None = None,
    settings: RefineSettings = REFINE,
    format: str | None = None,
    sizes: Path | str | None = None,
    follow_links: bool = False,
    mask_suffix: str = "",
    resume: bool = False,
    fresh: bool = False,
    overwrite: bool = False,
    keep: bool = False,
    keep_features: bool = False,
    workers: WorkerCount = JOB.workers,
    ray_address: str | None = None,
    threads: int | None = None,
    on_progress: Callable[[int, int], None] = lambda *_: None,
) -> AdaptSummary:
    """Train an IoU adapter on coarse masks, without labels, and measure it on held-out images.

    During the run, a file beside the output holds the features gathered so far. It is removed once an adapter is
    written, and kept otherwise: with `resume`, another recipe takes seconds.

    Args:
        coarse: The file or folder of masks.
        output: The adapter to write, a safetensors file.
        recipe: How to train; None takes the default of the model (see `recipe_for`).
        settings: How views are chosen and prompts mined; the same as for `refine`.
        follow_links: Whether links in the folders of images and masks may lead out of these folders.
        resume: Continue from features gathered before.
        fresh: Discard features gathered before.
        overwrite: Replace an existing output.
        keep: Write the adapter even if it does not help.
        keep_features: Keep the features in any case.
        images, model, checkpoint, device, precision, head, format, sizes, mask_suffix: As for
            `running.run.refine_dataset`.
        workers, ray_address, threads: As for `running.run.refine_dataset`; the adapter is the same for any number.
        on_progress: Called after each image with (images done, images in total).

    Raises:
        UsageError: The output exists, there are features of an earlier run, or the model or device does not exist.
        DataError: The masks can't be read, or fewer than two images have any.
        WeightsError: The weights can't be loaded.
        StorageError: The output or the features can't be written.
        Interrupted: Stopped by the user.
    """
    source, destination = location(coarse), location(output)
    kept_at = features_path(destination)
    inputs = {
        "input": source,
        IMAGE_FOLDER: location(images),
        "list of images": location(sizes),
        "checkpoint": location(checkpoint),
        "head": location(head),
    }
    outputs = {"adapter": destination, "file of features": kept_at}
    refuse_clashes(outputs, inputs)
    check_settings(settings)
    if recipe is not None:
        check_finite(asdict(recipe))
    prompts = settings.prompts
    if not (prompts.use_box and (prompts.use_point or prompts.use_negative)):
        raise UsageError("an adapter is trained with points and boxes; keep use_box, and use_point or use_negative")
    _check(destination, kept_at, resume=resume, fresh=fresh, overwrite=overwrite)
    chosen = recipe_for(model) if recipe is None else recipe
    dataset = open_dataset(
        source,
        images=location(images),
        format=format,
        sizes=location(sizes),
        follow_links=follow_links,
        max_pixels=settings.max_pixels,
        mask_suffix=mask_suffix,
    )
    refuse_clashes(outputs, {}, images=dataset.image_paths())
    job = RefineJob(model, checkpoint, device, precision, settings, iou_adapter=None, format=dataset.format, head=head)
    wanted = drawn(len(dataset), chosen.max_images, seed=chosen.seed)
    try:
        with (
            open_gatherer(job, workers=workers, address=ray_address, threads=threads, total=len(wanted)) as gatherer,
            FeatureFile(kept_at, job=gatherer.identity, fresh=fresh) as cache,
        ):
            started = perf_counter()
            with stop_on_interrupt(after="the model has answered") as stop:
                found = gather(
                    _picked(dataset.samples(), wanted),
                    gatherer,
                    cache=cache,
                    total=len(wanted),
                    on_progress=on_progress,
                    stop=stop,
                )
            gathered = perf_counter()
            fit_keys, held_out = split(found.keys, held_out=chosen.held_out, seed=chosen.seed, source=source)
            scorer = gatherer.head
            # On matrices this small, several threads only wait for each other.
            with limited_threads(1):
                down, up = fit(fit_keys, cache.load, scorer, recipe=chosen)
                figures = compare(held_out, cache.load, scorer, down=down, up=up, with_masks=chosen.with_masks)
            trained = perf_counter()
            single = next(one for one in figures if one.prompts == SINGLE_NAME)
            helps = single.top1_after > single.top1_before
            if helps or keep:
                identity = gatherer.identity
                about = {"recipe": asdict(chosen), "held_out": [asdict(one) for one in figures], "job": identity}
                adapter = IouAdapter(down, up, model, str(identity["fingerprint"]), chosen.with_masks, about)
                with new_file(destination) as file:
                    file.write(serialise(adapter))
                if not keep_features:
                    cache.remove()
    except KeyboardInterrupt:  # while the model was loaded or the adapter trained
        raise Interrupted(f"stopped; features are kept in {kept_at}: continue with --resume") from None
    return AdaptSummary(
        images=len(found.keys),
        masks=found.masks,
        fit_images=len(fit_keys),
        held_out_images=len(held_out),
        reused=found.reused,
        failed=found.failed,
        errors=found.errors,
        crashes=tuple(gatherer.crashes),
        model=model,
        recipe=chosen,
        figures=figures,
        helps=helps,
        gather_seconds=gathered - started,
        train_seconds=trained - gathered,
        output=destination if helps or keep else None,
        features=kept_at if kept_at.exists() else None,
        notes=dataset.remarks(),
    )


def recipe_for(model: str) -> AdaptSettings:
    """Return the default recipe of a model: `single` for the embedded model, else the paper's.

    The paper's recipe has hardly any effect on the embedded model.
    """
    return ADAPT_RECIPES["single" if model == EMBEDDED else "paper"]


# --- training


def ranking_loss(scores: Tensor, overlaps: Tensor, *, margin: float) -> Tensor:
    """Compute the pairwise ranking loss of SAMRefiner eq. 4, mean over N answers.

    With j the candidate with the highest overlap, the first on ties:

        sum over i != j of max(0, x_i - x_j + margin)

    Args:
        scores: x, float (N, C).
        overlaps: IoU of each candidate with the coarse mask, float (N, C).
    """
    best = overlaps.argmax(dim=1, keepdim=True)
    behind = (scores - scores.gather(1, best) + margin).clamp(min=0)
    return behind.scatter(1, best, 0.0).sum(dim=1).mean()


def fit(keys: Sequence[str], read: Read, head: Head, *, recipe: AdaptSettings) -> tuple[Tensor, Tensor]:
    """Train the two factors of an adapter with SGD on single prompts.

    Images are used in a new order in each epoch, `images_per_step` per step, for `steps` steps. Each step reads its
    images from the file, so memory does not grow with the data set.

    Returns:
        A, float32 (r, H), and B, float32 (T, r). The first row of B is zero: the single-mask output keeps its score.
    """
    down, up = fresh_factors(
        rank=recipe.rank,
        features=head.layer.in_features,
        scores=head.layer.out_features,
        generator=torch.Generator().manual_seed(recipe.seed),
    )
    factors = (down.requires_grad_(), up.requires_grad_())
    speeds = tuple(torch.zeros_like(factor) for factor in factors)
    for step, batch in zip(range(recipe.steps), _batches(keys, recipe=recipe), strict=False):
        examples = [_single_answers(read(key), key, epoch, recipe=recipe) for epoch, key in batch]
        inputs, overlaps = (torch.from_numpy(np.concatenate(arrays)) for arrays in zip(*examples, strict=True))
        loss = ranking_loss(head.scores(inputs, down=down, up=up), overlaps, margin=recipe.margin)
        rate = recipe.learning_rate * 0.1 ** sum(step >= passed for passed in recipe.decay_steps)
        # Custom SGD: the first step of torch's optimizers imports its compiler, which takes longer than the training.
        with torch.no_grad():
            for factor, speed, slope in zip(factors, speeds, torch.autograd.grad(loss, factors), strict=True):
                speed.mul_(recipe.momentum).add_(slope + recipe.weight_decay * factor)
                factor.sub_(rate * speed)
    return down.detach(), up.detach()


def _batches(keys: Sequence[str], *, recipe: AdaptSettings) -> Iterator[list[tuple[int, str]]]:
    """Yield batches of (epoch, image) endlessly, with the images in a new order in each epoch."""
    rng = np.random.default_rng((recipe.seed, 1))
    epoch = 0
    while True:
        order = rng.permutation(len(keys))
        for start in range(0, len(order), recipe.images_per_step):
            yield [(epoch, keys[n]) for n in order[start : start + recipe.images_per_step]]
        epoch += 1


def _single_answers(
    features: Features, key: str, epoch: int, *, recipe: AdaptSettings
) -> tuple[FloatArray, FloatArray]:
    """Return inputs (N, H) and overlaps (N, C) of single prompts: both of each mask, or one drawn in this epoch."""
    if recipe.both_prompts:
        rows, prompts = np.repeat(np.arange(len(features)), len(SINGLE)), np.tile(SINGLE, len(features))
    else:
        rng = np.random.default_rng((recipe.seed, epoch, seed_of(key)))
        rows, prompts = np.arange(len(features)), rng.choice(SINGLE, len(features))
    return features.inputs[rows, prompts], features.overlaps[rows, prompts]


# --- measuring


def compare(
    keys: Sequence[str], read: Read, head: Head, *, down: Tensor, up: Tensor, with_masks: bool
) -> tuple[Figures, Figures, Figures, Figures]:
    """Choose candidates for held-out masks with and without an adapter: for points, boxes, both pooled, and all.

    Args:
        with_masks: Whether the adapter also scores the candidates of all prompts at once.
    """
    none = torch.zeros_like(up)
    counts = np.zeros(len(QUESTIONS), dtype=np.int64)
    sums = np.zeros((5, len(QUESTIONS)))
    for key in keys:
        features = read(key)
        inputs = torch.from_numpy(features.inputs)
        before, after = (head.scores(inputs, down=down, up=factor).numpy().argmax(axis=2) for factor in (none, up))
        if not with_masks:
            after[:, QUESTIONS.index(ALL)] = before[:, QUESTIONS.index(ALL)]
        was, now = (np.take_along_axis(features.overlaps, c[..., None], 2)[..., 0] for c in (before, after))
        best = features.overlaps.max(axis=2)
        counts += len(features)
        sums += [measured.sum(axis=0) for measured in (was == best, now == best, was, now, before != after)]

    def figures(prompts: str, *columns: int) -> Figures:
        n = int(counts[list(columns)].sum())
        return Figures(prompts, n, *(float(total) / max(n, 1) for total in sums[:, list(columns)].sum(axis=1)))

    point, box, everything = (QUESTIONS.index(name) for name in (POINT, BOX, ALL))
    return (
        figures(POINT, point),
        figures(BOX, box),
        figures(SINGLE_NAME, point, box),
        figures(ALL, everything),
    )


# --- choosing images


def drawn(count: int, most: int, *, seed: int) -> IntArray:
    """Choose which of `count` images to use: all, or `most` of them drawn at random; ascending."""
    if count <= most:
        return np.arange(count)
    chosen: IntArray = np.sort(np.random.default_rng((seed, 2)).choice(count, most, replace=False))
    return chosen


def _picked(samples: Iterator[Sample], wanted: IntArray) -> Iterator[Sample]:
    """Return the samples with these numbers, ascending."""
    numbers = set(wanted.tolist())
    return (sample for number, sample in enumerate(samples) if number in numbers)


def split(keys: Sequence[str], *, held_out: float, seed: int, source: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Split images at random into training and held-out images, at least one each, both in their original order."""
    if len(keys) < 2:
        raise DataError(
            f"{source}: {len(keys)} readable images have masks; IoU adaption needs at least two, and hundreds to be "
            f"useful: some are used for training, the others to measure whether it helps"
        )
    apart = min(max(1, round(held_out * len(keys))), len(keys) - 1)
    chosen = set(np.random.default_rng((seed, 0)).permutation(len(keys))[:apart].tolist())
    return (
        tuple(key for n, key in enumerate(keys) if n not in chosen),
        tuple(key for n, key in enumerate(keys) if n in chosen),
    )


def _check(destination: Path, left: Path, *, resume: bool, fresh: bool, overwrite: bool) -> None:
    if resume and fresh:
        raise UsageError("--resume continues from features gathered before and --fresh discards them; choose one")
    if not destination.parent.is_dir():
        raise UsageError(f"{destination}: there is no folder {destination.parent}; make it, or name another output")
    refuse_existing({"adapter": destination}, replaced=overwrite)
    if not resume and not fresh and holds_features(left):
        raise UsageError(
            f"{left}: an earlier run left features here; --resume continues from them, --fresh starts over"
        )
