"""Generators by name, and suites: named mixes of them with the band of IoU that each is to reach.

| suite | generators | IoU |
| --- | --- | --- |
| `davis-like` | superpixel | 0.75 to 0.85 |
| `boundary` | boundary | 0.70 to 0.95 |
| `weak` | cam-like, clip-like | 0.40 to 0.65, 0.60 to 0.80 |
| `train-mix` | boundary 50 %, noise-band 20 %, superpixel 20 %, cam-like and clip-like 5 % each | 0.60 to 1.00 |
| `stress` | partial, merge-neighbour, superpixel | 0.20 to 0.60, superpixel 0.40 to 0.60 |
| `embedded-mix` | mix, blobs | as the embedded model is trained, see `TrainSettings` |
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np

from refinetool.corrupt import activations, edges, mixtures, shapes, superpixels
from refinetool.corrupt.defects import NEARLY_RIGHT
from refinetool.corrupt.geometry import Defect, aimed
from refinetool.corrupt.goals import Corrupted, Goal, Rng, reach
from refinetool.records import ImageArray, Mask
from refinetool.settings import BandName, CorruptSettings, GeneratorName, SuiteName, TrainSettings

TRAIN = TrainSettings()


@dataclass(frozen=True, slots=True, eq=False)
class Scene:
    """What a generator may look at besides the good mask.

    image: uint8 (H, W, 3) RGB, or None.
    labels: Label maps of the image, None without an image.
    neighbours: Gives the masks of other objects of the image, bool (H, W) each, the likeliest to be confused first.
    """

    image: ImageArray | None
    labels: superpixels.LabelMaps | None
    neighbours: Callable[[], Sequence[Mask]]


def scene_of(image: ImageArray | None, neighbours: Callable[[], Sequence[Mask]], *, settings: CorruptSettings) -> Scene:
    """The scene of an image, for all of its objects, so that the label maps are made once."""
    labels = None if image is None else superpixels.label_maps(image, compactness=settings.compactness)
    return Scene(image, labels, neighbours)


Draw: TypeAlias = Callable[[Scene, Mask, Rng, Goal, CorruptSettings], Corrupted]


@dataclass(frozen=True, slots=True)
class Kind:
    """A generator with its usual band, and whether it needs an image or neighbours."""

    draw: Draw
    low: float
    high: float
    needs_image: bool = False
    needs_neighbours: bool = False


@dataclass(frozen=True, slots=True)
class Part:
    """A generator of a suite.

    fraction: How often it is drawn.
    low, high: The band of IoU that it is to reach.
    tries: Attempts before the one closest to the band is taken; None takes those of the settings.
    """

    generator: GeneratorName
    fraction: float
    low: float
    high: float
    tries: int | None = None


@dataclass(frozen=True, slots=True)
class Suite:
    """A mix of generators."""

    name: str
    parts: tuple[Part, ...]

    @property
    def needs_image(self) -> bool:
        return any(KINDS[part.generator].needs_image for part in self.parts)

    def with_band(self, low: float, high: float) -> "Suite":
        """The same mix with another band for all of its parts, and as many tries to reach it as other suites have."""
        return replace(self, parts=tuple(replace(part, low=low, high=high, tries=None) for part in self.parts))


def draw(
    suite: Suite, scene: Scene, gt: Mask, rng: Rng, *, ignore: Mask | None, settings: CorruptSettings
) -> Corrupted:
    """One coarse mask from a generator of the suite, drawn by its fraction.

    Args:
        gt: The good mask, bool (H, W).
        ignore: bool (H, W), pixels that no mask may hold, or None.

    Generators that need a neighbour are left out where the scene has none, unless the suite has no others.
    """
    parts = [part for part in suite.parts if not KINDS[part.generator].needs_neighbours or len(scene.neighbours())]
    parts = parts or list(suite.parts)
    fractions = np.array([part.fraction for part in parts])
    part = parts[rng.choice(len(parts), p=fractions / fractions.sum())]
    goal = Goal(part.low, part.high, part.tries or settings.tries, settings.min_area_px, ignore)
    return KINDS[part.generator].draw(scene, gt, rng, goal, settings)


# --- generators, with their parameters taken from the settings


def _superpixel(scene: Scene, gt: Mask, rng: Rng, goal: Goal, settings: CorruptSettings) -> Corrupted:
    assert scene.image is not None and scene.labels is not None, "superpixels need an image"
    return superpixels.superpixel(
        scene.image,
        gt,
        rng,
        goal=goal,
        labels=scene.labels,
        counts=settings.superpixel_counts,
        compactness=settings.compactness,
        fractions=settings.superpixel_shares,
        kernel_px=settings.superpixel_kernel_px,
        iterations=settings.superpixel_iterations,
        max_defects=settings.superpixel_defects,
        margin=settings.window_margin,
        min_side_px=settings.window_side_px,
    )


def _boundary(scene: Scene, gt: Mask, rng: Rng, goal: Goal, settings: CorruptSettings) -> Corrupted:
    return edges.boundary(
        scene.image,
        gt,
        rng,
        goal=goal,
        cut=settings.outline_cut,
        keep=settings.outline_keep,
        jitter=settings.outline_jitter,
        rounds=settings.morphology_rounds,
        margin=settings.window_margin,
        min_side_px=settings.window_side_px,
    )


def _noise_band(scene: Scene, gt: Mask, rng: Rng, goal: Goal, settings: CorruptSettings) -> Corrupted:
    return edges.noise_band(
        scene.image,
        gt,
        rng,
        goal=goal,
        grid_side=settings.noise_side_px,
        factor=settings.noise_factor,
        residue=settings.noise_residue,
    )


def _cam_like(scene: Scene, gt: Mask, rng: Rng, goal: Goal, settings: CorruptSettings) -> Corrupted:
    return activations.activation_map(
        scene.image,
        gt,
        rng,
        goal=goal,
        name="cam-like",
        cell_px=settings.cam_cell_px,
        blur=settings.cam_blur,
        bias=True,
        leak=settings.cam_leak,
        mode=settings.activation_mode,
    )


def _clip_like(scene: Scene, gt: Mask, rng: Rng, goal: Goal, settings: CorruptSettings) -> Corrupted:
    return activations.activation_map(
        scene.image,
        gt,
        rng,
        goal=goal,
        name="clip-like",
        cell_px=settings.clip_cell_px,
        blur=settings.clip_blur,
        bias=True,
        leak=settings.clip_leak,
        mode=settings.activation_mode,
    )


def _partial(scene: Scene, gt: Mask, rng: Rng, goal: Goal, _: CorruptSettings) -> Corrupted:
    return shapes.partial(scene.image, gt, rng, goal=goal)


def _merge_neighbour(scene: Scene, gt: Mask, rng: Rng, goal: Goal, _: CorruptSettings) -> Corrupted:
    return shapes.merge_neighbour(scene.image, gt, rng, goal=goal, neighbours=scene.neighbours())


def _training_mix(*, blobs: bool) -> Draw:
    def mix(scene: Scene, gt: Mask, rng: Rng, goal: Goal, settings: CorruptSettings) -> Corrupted:
        return mixtures.training_mix(
            scene.image,
            gt,
            rng,
            goal=goal,
            blobs=blobs,
            neighbours=scene.neighbours(),
            compactness=settings.compactness,
            min_side_px=settings.window_side_px,
        )

    return mix


def _compose(scene: Scene, gt: Mask, rng: Rng, goal: Goal, settings: CorruptSettings) -> Corrupted:
    def settled(name: GeneratorName) -> mixtures.Generator:
        return lambda mask, rng, goal: KINDS[name].draw(scene, mask, rng, goal, settings)

    names = [name for name in COMPOSED if scene.image is not None or not KINDS[name].needs_image]
    return mixtures.compose(
        scene.image, gt, rng, goal=goal, generators=[settled(name) for name in names], more=settings.compose_more
    )


def _by_severity(name: GeneratorName, defect: Defect) -> Draw:
    """The generator of a defect that knows a severity only."""

    def aim(_: Scene, gt: Mask, rng: Rng, goal: Goal, settings: CorruptSettings) -> Corrupted:
        margin, side = settings.window_margin, settings.window_side_px
        attempts = aimed(name, defect, gt, rng, goal=goal, margin=margin, min_side_px=side)
        return reach(name, attempts, gt, goal=goal)

    return aim


KINDS: Mapping[GeneratorName, Kind] = {
    "superpixel": Kind(_superpixel, 0.75, 0.85, needs_image=True),
    "boundary": Kind(_boundary, 0.70, 0.95),
    "noise-band": Kind(_noise_band, 0.60, 1.00),
    "cam-like": Kind(_cam_like, 0.40, 0.65),
    "clip-like": Kind(_clip_like, 0.60, 0.80),
    "polygon": Kind(_by_severity("polygon", shapes.drawn_polygon), 0.85, 0.95),
    "shift-scale": Kind(_by_severity("shift-scale", shapes.shift_and_scale), 0.60, 0.90),
    "low-res": Kind(_by_severity("low-res", activations.mask_head), 0.85, 0.95),
    "partial": Kind(_partial, 0.20, 0.60),
    "merge-neighbour": Kind(_merge_neighbour, 0.20, 0.60, needs_neighbours=True),
    "boundary-noise": Kind(_by_severity("boundary-noise", edges.boundary_noise), 0.60, 0.90),
    "grow-shrink": Kind(_by_severity("grow-shrink", edges.grow_or_shrink), 0.60, 0.90),
    "heat-map": Kind(_by_severity("heat-map", activations.low_resolution), 0.60, 0.80),
    "holes-islands": Kind(_by_severity("holes-islands", shapes.holes_and_islands), 0.60, 0.90),
    "biased-activation": Kind(
        _by_severity("biased-activation", activations.biased_activation), TRAIN.blob_low, TRAIN.blob_high
    ),
    "mix": Kind(_training_mix(blobs=False), TRAIN.coarse_low, TRAIN.coarse_high, needs_image=True),
    "blobs": Kind(_training_mix(blobs=True), TRAIN.blob_low, TRAIN.blob_high),
    "compose": Kind(_compose, 0.60, 0.90, needs_image=True),
}

COMPOSED: tuple[GeneratorName, ...] = ("boundary", "superpixel", "clip-like", "polygon", "shift-scale")
"""What `compose` draws from."""

BANDS: Mapping[BandName, tuple[float, float]] = {
    "easy": (0.85, 0.95),
    "default": (0.75, 0.85),
    "hard": (0.60, 0.75),
    "extreme": (0.40, 0.60),
}
"""Bands for curves of difficulty; the default is that of the DAVIS-585 set."""


def single(generator: GeneratorName) -> Suite:
    """A suite of one generator, with its usual band."""
    kind = KINDS[generator]
    return Suite(generator, (Part(generator, 1.0, kind.low, kind.high),))


_WIDE = (0.60, 1.00)

SUITES: Mapping[SuiteName, Suite] = {
    "davis-like": Suite("davis-like", (Part("superpixel", 1.0, *BANDS["default"]),)),
    "boundary": Suite("boundary", single("boundary").parts),
    "weak": Suite("weak", (Part("cam-like", 0.5, 0.40, 0.65), Part("clip-like", 0.5, 0.60, 0.80))),
    "train-mix": Suite(
        "train-mix",
        (
            Part("boundary", 0.50, *_WIDE),
            Part("noise-band", 0.20, *_WIDE),
            Part("superpixel", 0.20, *_WIDE),
            Part("cam-like", 0.05, *_WIDE),
            Part("clip-like", 0.05, *_WIDE),
        ),
    ),
    "stress": Suite(
        "stress",
        (
            Part("partial", 1 / 3, 0.20, 0.60),
            Part("merge-neighbour", 1 / 3, 0.20, 0.60),
            Part("superpixel", 1 / 3, *BANDS["extreme"]),
        ),
    ),
    "embedded-mix": Suite(
        "embedded-mix",
        (
            Part(
                "mix",
                1 - TRAIN.good_share - TRAIN.blob_share,
                TRAIN.coarse_low,
                TRAIN.coarse_high,
                TRAIN.corruption_tries,
            ),
            Part("mix", TRAIN.good_share, NEARLY_RIGHT, 1.0, TRAIN.corruption_tries),
            Part("blobs", TRAIN.blob_share, TRAIN.blob_low, TRAIN.blob_high, TRAIN.corruption_tries),
        ),
    ),
}
