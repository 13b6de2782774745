"""Runs few-shot episodes: a reference encoder with its decoder, or a baseline without training, on the same features.

Episodes of a list differ in class, target and references. The same list is run for every kind of annotation and every
number of shots, so that their figures can be compared.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from refinetool import masks
from refinetool.backends.image_encoders import Features
from refinetool.backends.reference import Prompter, Shot
from refinetool.backends.square import SquareBackend
from refinetool.evaluate.few_shot import FewShotScores, score_episode
from refinetool.modules.reference_encoder import masked_mean
from refinetool.records import FloatMap, ImageArray, Mask, Region, Sample
from refinetool.refine import Refiner
from refinetool.settings import FewShotSettings
from refinetool.train.reference.annotations import Kind, simulate
from refinetool.train.reference.data import Classes, ClassPicture
from refinetool.train.reference.episodes import Episode

MethodName: TypeAlias = Literal["encoder", "prototype", "grabcut"]
KEPT_PICTURES = 512


class FewShotMethod(Protocol):
    """Predicts the mask of a class in a target, bool (H, W)."""

    def __call__(self, image: ImageArray, features: Features, shots: Sequence[Shot]) -> Mask:
        """Predict from the target's pixels, uint8 (H, W, 3), its features, and the shots."""


@dataclass(frozen=True, slots=True)
class ByEncoder:
    """VRP-SAM: tokens of the reference encoder, decoded."""

    prompter: Prompter
    backend: SquareBackend
    threshold: float

    def __call__(self, image: ImageArray, features: Features, shots: Sequence[Shot]) -> Mask:
        (embedding,) = self.backend.embed([image])
        prediction = self.backend.predict_from_tokens(embedding, self.prompter.tokens(features, shots))
        logits = masks.spread(prediction.logits(np.zeros(1, np.int64))[0], image.shape[:2])
        found: Mask = 1 / (1 + np.exp(-logits)) > self.threshold
        return found


@dataclass(frozen=True, slots=True)
class ByPrototype:
    """Baseline: cells whose features are similar to the mean feature under the annotation."""

    settings: FewShotSettings

    def __call__(self, image: ImageArray, features: Features, shots: Sequence[Shot]) -> Mask:
        similar = [
            F.cosine_similarity(features.high, masked_mean(shot.features.high, shot.annotation), dim=1)[0]
            for shot in shots
        ]
        stretched = _stretched(torch.stack(similar).mean(dim=0).cpu().numpy())
        found: Mask = masks.spread(stretched, image.shape[:2]) > self.settings.prototype_threshold
        return found


@dataclass(frozen=True, slots=True)
class ByGrabCut:
    """Baseline: GrabCut, with the pseudo mask as what is surely and probably foreground."""

    prompter: Prompter
    settings: FewShotSettings

    def __call__(self, image: ImageArray, features: Features, shots: Sequence[Shot]) -> Mask:
        each = [self.prompter.pseudo(features, shot)[0, 0].cpu().numpy() for shot in shots]
        soft = masks.spread(_stretched(np.mean(each, axis=0)), image.shape[:2])
        return grab_cut(image, soft, settings=self.settings)


def grab_cut(image: ImageArray, soft: FloatMap, *, settings: FewShotSettings) -> Mask:
    """Cut out what a soft mask, float32 (H, W) in 0..1, marks; without sure pixels of both sides, threshold it."""
    sides = np.where(soft > (settings.grabcut_low + settings.grabcut_high) / 2, cv2.GC_PR_FGD, cv2.GC_PR_BGD)
    sides[soft < settings.grabcut_low] = cv2.GC_BGD
    sides[soft > settings.grabcut_high] = cv2.GC_FGD
    sides = sides.astype(np.uint8)
    if not ((sides == cv2.GC_BGD).any() and (sides == cv2.GC_FGD).any()):
        plain: Mask = soft > settings.grabcut_high
        return plain
    cv2.setRNGSeed(0)
    models = np.zeros((1, 65)), np.zeros((1, 65))
    bgr = np.ascontiguousarray(image[..., ::-1])
    cv2.grabCut(bgr, sides, None, *models, settings.grabcut_rounds, cv2.GC_INIT_WITH_MASK)  # type: ignore[call-overload]
    found: Mask = (sides == cv2.GC_FGD) | (sides == cv2.GC_PR_FGD)
    return found


def _stretched(values: NDArray[Any]) -> FloatMap:
    low, high = values.min(), values.max()
    stretched: FloatMap = ((values - low) / max(high - low, 1e-7)).astype(np.float32)
    return stretched


def refined(mask: Mask, image: ImageArray, refiner: Refiner) -> Mask:
    """Refine the mask of a class, which may have several parts, as `label --refine` does."""
    if not mask.any():
        return mask
    rle = masks.encode(mask)
    sample = Sample("target", Path(), rle.size, (Region(1, 1, rle),), layout="semantic")
    prepared = refiner.prepare_pixels(sample, image)
    (annotation,) = refiner.finish(prepared, refiner.segment(prepared.jobs)).annotations
    return mask if annotation.mask is None else masks.decode(annotation.mask)


@dataclass(frozen=True, slots=True)
class Row:
    """The scores of one kind of annotation and one number of shots; `refined` where masks were refined too."""

    kind: Kind
    shots: int
    scores: FewShotScores
    refined: FewShotScores | None


def run_episodes(
    episodes: Sequence[Episode],
    pictures: Sequence[ClassPicture],
    method: FewShotMethod,
    prompter: Prompter,
    *,
    kinds: Sequence[Kind],
    shots: Sequence[int],
    refiner: Refiner | None,
    on_progress: Callable[[int, int], None],
) -> list[Row]:
    """Run episodes with every kind of annotation and number of shots.

    Args:
        episodes: With at least as many references as the largest number of shots, where the class has them.
        prompter: Looks at images; its tokens are used by `ByEncoder` alone.
        refiner: To measure refined masks too, or None.
        on_progress: Called with (targets done, targets in total).
    """
    by_key = {picture.key: picture for picture in pictures}
    seen = _Pictures(by_key, prompter)
    asked = [(kind, count) for kind in kinds for count in shots]
    found = {key: [FewShotScores(), FewShotScores()] for key in asked}
    done, total = 0, len(episodes) * len(asked)
    for episode in episodes:
        target, features = seen[episode.target]
        truth = target.masks[episode.name]
        for kind, count in asked:
            one = replace(episode, kind=kind, references=episode.references[:count])
            mask = method(target.image, features, _shots(one, seen, prompter))
            scores = found[kind, count]
            scores[0] += score_episode(episode.name, mask, truth, void=target.void)
            if refiner is not None:
                after = refined(mask, target.image, refiner)
                scores[1] += score_episode(episode.name, after, truth, void=target.void)
            done += 1
            on_progress(done, total)
    return [
        Row(kind, count, plain, None if refiner is None else better) for (kind, count), (plain, better) in found.items()
    ]


def _shots(episode: Episode, seen: "_Pictures", prompter: Prompter) -> list[Shot]:
    shots = []
    for number, key in enumerate(episode.references):
        reference, features = seen[key]
        rng = np.random.default_rng((episode.seed, number))
        drawn = simulate(reference.masks[episode.name], episode.kind, rng=rng, most=True)
        shots.append(prompter.shot_of(features, drawn))
    return shots


class _Pictures:
    """Reads images and computes their features when they are first needed, and keeps the last ones."""

    def __init__(self, pictures: dict[str, ClassPicture], prompter: Prompter) -> None:
        self._pictures, self._prompter = pictures, prompter
        self._kept: OrderedDict[str, tuple[Classes, Features]] = OrderedDict()

    def __getitem__(self, key: str) -> tuple[Classes, Features]:
        if key not in self._kept:
            classes = self._pictures[key].read()
            self._kept[key] = classes, self._prompter.look(classes.image)
            if len(self._kept) > KEPT_PICTURES:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]
