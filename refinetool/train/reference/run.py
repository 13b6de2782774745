"""Trains a reference encoder: `train_reference` sets up a run and takes all its steps.

The image encoder and the decoder are frozen, so what they make of an image is computed once. After some steps the
encoder is measured on fixed validation episodes; the best one so far is what is saved.
"""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from refinetool.backends.image_encoders import ImageEncoder, load_image_encoder
from refinetool.backends.models import load_backend
from refinetool.backends.reference import Recipe, recipe_for
from refinetool.backends.square import SquareBackend
from refinetool.errors import DataError, first_line
from refinetool.evaluate.few_shot import FewShotScores, score_episode
from refinetool.formats.storage import new_file, refuse_clashes
from refinetool.modules.reference_encoder import ReferenceEncoder
from refinetool.settings import ReferenceSettings, ReferenceTrainSettings
from refinetool.train.data.sources import fingerprint
from refinetool.train.files import CHECKPOINT_FILE, METRICS_FILE, RUN_FILE, Position, read_arguments, write_arguments
from refinetool.train.ranks import ALONE
from refinetool.train.reference.data import ClassPicture, classes_of, list_class_pictures, named_classes
from refinetool.train.reference.episodes import ClassIndex, Episode, fixed_episodes, index_classes
from refinetool.train.reference.step import episode_logits, mask_loss
from refinetool.train.reference.store import SeenPictures
from refinetool.train.reference.weights import write_reference_encoder
from refinetool.train.step import Loss
from refinetool.train.steps import CountedRun, Pace, TrainProgress, take_steps

WEIGHTS_FILE = "reference.safetensors"
MEASURED_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class ReferenceRun:
    """What is trained on what, as given by the user.

    held_out: Classes to keep out of training, by name or as folds such as `coco-20i:0`.
    model, checkpoint: The decoder.
    """

    data: tuple[Path, ...]
    images: Path | None
    held_out: tuple[str, ...]
    model: str
    checkpoint: str | None
    image_encoder: str
    encoder_checkpoint: str | None
    settings: ReferenceTrainSettings


def train_reference(
    run: ReferenceRun,
    output: Path,
    *,
    device: str,
    resume: bool,
    on_progress: Callable[[TrainProgress], None],
) -> Path:
    """Train a reference encoder, and return the path of its weights.

    Args:
        run: Data folders with `split.json`, COCO files or VOC roots; the training splits are trained on, the validation
            splits of the same classes choose the best encoder.
        output: Folder for `run.json`, `checkpoint.pt`, `metrics.jsonl` and `reference.safetensors`.
        resume: Continue from the checkpoint; on a CPU, the run then ends like an uninterrupted one.

    Raises:
        DataError: Data are not as described, no class is left, or `resume` finds no checkpoint of these data.
        UsageError: A class, a fold, a model or an image encoder does not exist.
        WeightsError: Weights of the frozen networks can't be loaded.
        StorageError: The output can't be written.
        Interrupted: Stopped by the user, after a checkpoint.
    """
    checkpoint = output / CHECKPOINT_FILE
    if resume and not checkpoint.is_file():
        raise DataError(f"{checkpoint} does not exist, so there is nothing to resume; leave --resume out")
    refuse_clashes(
        {name: output / name for name in (RUN_FILE, CHECKPOINT_FILE, METRICS_FILE, WEIGHTS_FILE)},
        {f"data {path}": path for path in run.data},
    )
    trainer = _Trainer(run, output, device=device)
    if resume:
        trainer.restore(checkpoint)
    write_arguments(run, output / RUN_FILE)
    settings = run.settings
    pace = Pace(settings.steps, settings.episodes_per_step, settings.validate_every, settings.save_every)
    take_steps(trainer, output, pace=pace, device=device, ranks=ALONE, on_progress=on_progress)
    return output / WEIGHTS_FILE


def read_record(folder: Path) -> ReferenceRun:
    """Read the arguments of the run in a folder; raises DataError if there is none."""

    def build(content: dict[str, Any]) -> ReferenceRun:
        given = dict(content["settings"])
        tuples = {name: tuple(given[name]) for name in ("kinds", "thresholds")}
        settings = ReferenceTrainSettings(**{**given, **tuples, "encoder": ReferenceSettings(**given["encoder"])})
        return ReferenceRun(**{**content, "held_out": tuple(content["held_out"]), "settings": settings})

    return read_arguments(folder, build)


def rate_at(step: int, *, settings: ReferenceTrainSettings) -> float:
    """Return the learning rate: a cosine from its full value to 0 over all steps."""
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * step / settings.steps))


def step_episodes(index: ClassIndex, step: int, *, settings: ReferenceTrainSettings) -> list[Episode]:
    """Draw the one-shot episodes of a step; they depend on nothing but seed and step."""
    names = sorted(index.targets)
    episodes = []
    for row in range(settings.episodes_per_step):
        rng = np.random.default_rng((settings.seed, step, row))
        name = names[int(rng.integers(len(names)))]
        kind = settings.kinds[int(rng.integers(len(settings.kinds)))]
        episodes.append(index.draw(name, shots=1, kind=kind, rng=rng))
    return episodes


class _Trainer(CountedRun):
    """The state of a run between two steps."""

    def __init__(self, run: ReferenceRun, output: Path, *, device: str) -> None:
        self.run, self.output, self.settings, self.steps = run, output, run.settings, run.settings.steps
        settings = run.settings
        pictures = [
            picture
            for path in run.data
            for picture in list_class_pictures(
                path,
                images=run.images,
                validation_share=settings.validation_share,
                max_pixels=settings.max_pixels,
            )
        ]
        known = classes_of(pictures)
        self.held_out = held_out_classes(run.held_out, known=known)
        self.index, self.fixed = split_episodes(pictures, held_out=self.held_out, settings=settings)
        self.digest = _digest(run.data, self.held_out)
        self.backend: SquareBackend = load_backend(
            run.model, checkpoint=run.checkpoint, device=device, precision="fp32"
        )
        self.backend.model.requires_grad_(False)
        self.encoder: ImageEncoder = load_image_encoder(
            run.image_encoder, checkpoint=run.encoder_checkpoint, device=device
        )
        self.recipe: Recipe = replace(
            recipe_for(self.encoder, self.backend, settings=settings.encoder),
            kinds=tuple(settings.kinds),
            held_out=tuple(sorted(self.held_out)),
        )
        self.seen = SeenPictures(
            pictures, self.encoder, self.backend, side=settings.side, limit=1e9 * settings.cache_gigabytes
        )
        torch.manual_seed(settings.seed)
        self.model: ReferenceEncoder = self.recipe.build().to(self.backend.device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        self.position, self.best = Position(0, 0.0, self.digest), -1.0

    def draw(self, step: int) -> list[Episode]:
        """Draw the episodes of a step."""
        return step_episodes(self.index, step, settings=self.settings)

    def take(self, step: int, batch: list[Episode]) -> Loss:
        """Take a step; its IoU is the mean over the episodes' masks."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate_at(step - 1, settings=self.settings)
        torch.manual_seed(self.settings.seed * 1_000_003 + step)  # of dropout, so that a resumed run is the same
        logits, truth, counted = self._logits(batch, most=False)
        loss = mask_loss(logits, truth, counted)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        found, true = (logits.detach() > 0) & (counted > 0), (truth > 0) & (counted > 0)
        either = (found | true).sum(dim=(1, 2)).clamp(min=1)
        return Loss(loss.detach(), ((found & true).sum(dim=(1, 2)) / either).mean())

    def _logits(self, episodes: Sequence[Episode], *, most: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        self.model.train(not most)
        return episode_logits(
            self.model,
            self.encoder,
            self.backend,
            self.seen,
            episodes,
            most=most,
            normalise=self.recipe.normalise,
            resize=self.recipe.resize,
        )

    def measured(self, step: int) -> dict[str, float]:
        """Measure the mIoU at each threshold on the fixed episodes, and save the encoder if it is the best so far."""
        scores = {threshold: FewShotScores() for threshold in self.settings.thresholds}
        for start in range(0, len(self.fixed), MEASURED_AT_ONCE):
            some = self.fixed[start : start + MEASURED_AT_ONCE]
            with torch.no_grad():
                logits, truth, counted = self._logits(some, most=True)
            chances, true, void = logits.sigmoid().cpu().numpy(), truth.cpu().numpy() > 0, counted.cpu().numpy() == 0
            for row, episode in enumerate(some):
                for threshold in self.settings.thresholds:
                    scores[threshold] += score_episode(
                        episode.name, chances[row] > threshold, true[row], void=void[row]
                    )
        means = {threshold: one.mean_iou for threshold, one in scores.items()}
        best = max(means, key=lambda threshold: means[threshold])
        if means[best] > self.best:
            self.best = means[best]
            self._write(step, threshold=best)
        return {"mean_iou": means[best], "threshold": best}

    def _write(self, step: int, *, threshold: float) -> None:
        trained = {
            "data": [path.name for path in self.run.data],
            "steps": step,
            "validation_mean_iou": round(self.best, 4),
        }
        recipe = replace(self.recipe, threshold=threshold, trained=trained)
        write_reference_encoder(self.model, recipe, self.output / WEIGHTS_FILE)

    def save(self) -> None:
        """Write a checkpoint; the weights of the best encoder are written when it is measured."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "position": asdict(self.position),
            "best": self.best,
        }
        with new_file(self.output / CHECKPOINT_FILE) as file:
            torch.save(state, file)

    def restore(self, path: Path) -> None:
        """Continue from a checkpoint; raises DataError if it can't be read, or was made with other data."""
        try:
            state: dict[str, Any] = torch.load(path, weights_only=True, map_location=self.backend.device)
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.position, self.best = Position(**state["position"]), float(state["best"])
        except Exception as error:
            raise DataError(f"{path}: can't be read as a checkpoint ({first_line(error)}); start afresh.") from error
        if self.position.data != self.digest:
            raise DataError(f"{path}: the run began with other data; put them back, or start afresh without --resume.")


def held_out_classes(given: Sequence[str], *, known: Sequence[str]) -> set[str]:
    """Return the classes to keep out of training: those of a fold even where the data have none of them."""
    return set(named_classes(given, known=known)) if given else set()


def split_episodes(
    pictures: Sequence[ClassPicture], *, held_out: set[str], settings: ReferenceTrainSettings
) -> tuple[ClassIndex, list[Episode]]:
    """Return what training draws from, and the fixed validation episodes, both without the held-out classes.

    Validation targets are validation images; their references are training images.

    Raises:
        DataError: No class is left that has two images.
    """
    training, validating = ([p for p in pictures if p.validation == wanted] for wanted in (False, True))
    classes = [name for name in classes_of(pictures) if name not in held_out]
    index = index_classes(training, training, classes=classes, min_area=settings.min_area)
    measured = index_classes(validating, training, classes=classes, min_area=settings.min_area)
    for what, found in (("training", index), ("validation", measured)):
        if not found.targets:
            raise DataError(
                f"no class with {what} episodes is left: each needs two images; add data, or hold out less."
            )
    episodes = fixed_episodes(
        measured,
        count=settings.validation_episodes,
        shots=1,
        kinds=settings.kinds,
        seed=settings.validation_seed,
    )
    return index, episodes


def _digest(data: Sequence[Path], held_out: set[str]) -> str:
    described = json.dumps([*map(fingerprint, data), sorted(held_out)])
    return hashlib.sha256(described.encode()).hexdigest()
