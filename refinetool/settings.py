"""Settings with every default of the tool. Functions elsewhere take plain keyword arguments without defaults."""

import os
from dataclasses import asdict, dataclass, field, replace
from typing import Literal, TypeAlias

SuiteName: TypeAlias = Literal["davis-like", "boundary", "weak", "train-mix", "stress", "embedded-mix"]
"""Mixes of generators of coarse masks; `corrupt.suites` defines them, the generators and the bands."""
GeneratorName: TypeAlias = Literal[
    "superpixel",
    "boundary",
    "noise-band",
    "cam-like",
    "clip-like",
    "polygon",
    "shift-scale",
    "low-res",
    "partial",
    "merge-neighbour",
    "boundary-noise",
    "grow-shrink",
    "heat-map",
    "holes-islands",
    "biased-activation",
    "mix",
    "blobs",
    "compose",
]
HeadKind: TypeAlias = Literal["detail", "sam2refiner"]
"""Kinds of heads on SAM 2 models, see `modules.heads`."""
BandName: TypeAlias = Literal["easy", "default", "hard", "extreme"]

MAX_PIXELS = 178_956_970
"""Pillow's limit: twice the number of RGB pixels in a quarter of a gibibyte."""

MAX_SEED = (1 << 63) - 1
"""The largest seed that torch takes."""

UNBOUNDED = -1e9
"""A threshold that every value reaches; finite, so that it can be written as JSON."""


@dataclass(frozen=True, slots=True)
class PromptSettings:
    """How prompts are mined from a coarse mask. Values are the paper's unless stated otherwise."""

    point: Literal["distance", "random", "box-center"] = "distance"
    use_point: bool = True
    use_negative: bool = True
    use_box: bool = True
    use_mask: bool = True
    border_is_background: bool = False
    """Whether the image border counts as the mask's boundary when the deepest pixel is searched for."""
    box: Literal["tight", "elastic"] = "elastic"
    elastic_threshold: float = 0.1
    """Fraction of similar pixels in the strip beside a box edge above which the edge moves (the paper's lambda)."""
    elastic_similarity: float = 0.5
    """Cosine similarity above which a pixel counts as similar."""
    elastic_step: float = 0.1
    """Width of the strip as a fraction of the box side."""
    elastic_step_px: float = 10.0
    """Upper bound of that width, in pixels."""
    elastic_rounds: int = 1
    gaussian_shape: Literal["radial", "distance"] = "radial"
    gaussian_amplitude: float = 15.0
    """Peak logit of the mask prompt (the paper's omega)."""
    gaussian_span: float = 4.0
    """How slowly the mask prompt fades (the paper's gamma)."""
    gaussian_background: Literal["negative", "zero"] = "negative"
    weaken_expanded: bool = False
    """Whether a mask whose box was extended gets a mask prompt of amplitude 1, as in the release."""
    release: bool = False
    """Follow the authors' release: chamfer distances, fallback point (0, 0), inclusive boxes, unclipped steps."""


@dataclass(frozen=True, slots=True)
class ViewSettings:
    """What the model sees of the image for a region."""

    mode: Literal["auto", "frame", "crop", "mixed"] = "auto"
    """The whole image, a crop around each region, or crops for small regions of large images only."""
    margin: float = 0.25
    """Margin of a crop around the region's box, on each side, as a fraction of the box side."""
    min_side_px: int = 96
    """Minimum side of a crop."""
    max_aspect: float = 2.0
    """A crop's longer side is at most this many times the shorter one, where the image has room."""
    small_object: float = 0.001
    """Fraction of the image's area below which `mixed` crops a region, in large images."""
    large_image_px: int = 1500
    """Longer side from which an image counts as large, for `mixed`."""


@dataclass(frozen=True, slots=True)
class SplitSettings:
    """How a class mask is split into parts (SAMRefiner's split-then-merge)."""

    rule: Literal["paper", "relaxed", "off"] = "relaxed"
    """How components are joined into parts; `off` refines each class mask in one piece."""
    merge_ratio: float = 0.5
    """The paper's mu."""
    min_area_px: int = 5
    fixed_point: bool = False
    """Whether merging repeats until nothing changes, instead of one sweep."""


@dataclass(frozen=True, slots=True)
class GuardThresholds:
    """Thresholds of the guard that suit a model: what None stands for in `GuardSettings`.

    The defaults are for models whose own quality estimates were not measured: they bound overlap and area, but
    neither predicted IoU nor expected gain. See docs/design/guard.md.
    """

    min_predicted_iou: float = UNBOUNDED
    min_expected_gain: float = UNBOUNDED
    sure_iou: float = 1.0
    min_coarse_iou: float = 0.4
    max_area_ratio: float = 2.5
    min_part_confidence: float = 0.0
    min_part_depth: float = 0.0


@dataclass(frozen=True, slots=True)
class GuardSettings:
    """When the coarse mask is kept; see docs/design/guard.md. None stands for the default of the model."""

    min_predicted_iou: float | None = None
    min_coarse_iou: float | None = None
    max_area_ratio: float | None = None
    """Refined area over coarse area, or its inverse, above which the refined mask is doubtful."""
    min_expected_gain: float | None = None
    """Fraction of the coarse mask's error that the model's mask must remove, as estimated from the model's logits."""
    sure_iou: float | None = None
    """Where the logits promise the model's mask at least this IoU, half of that fraction is enough."""
    min_part_confidence: float | None = None
    """Mean probability, by the model's logits, that a part of the refined mask which differs from the coarse one is
    right. Below it, the coarse mask is kept in that part."""
    min_part_depth: float | None = None
    """Minimum depth of such a part at its deepest place, in cells of the model's output; shallower changes of an
    outline are finer than the model can resolve."""
    min_left: float = 0.4
    """Fraction of its pixels that a refined mask must keep where regions share a map and others take some of them."""

    def thresholds(self, defaults: GuardThresholds) -> GuardThresholds:
        """The thresholds, with those of `defaults` for None."""
        chosen = {name: getattr(self, name) for name in asdict(defaults)}
        return replace(defaults, **{name: value for name, value in chosen.items() if value is not None})


@dataclass(frozen=True, slots=True)
class SnapSettings:
    """The edge-aware filter after selection, at native resolution."""

    mode: Literal["auto", "none", "guided"] = "auto"
    radius: float = 0.05
    """Filter radius as a fraction of the radius of a disc of the mask's area."""
    epsilon: float = 1e-4
    """Variance, on a 0..1 colour scale, below which the guide counts as flat."""


@dataclass(frozen=True, slots=True)
class SpeckSettings:
    """Specks: islands and holes of a refined mask that the coarse mask did not have. They are removed if they have at
    most `max_px` pixels, or at most the fraction `max_share` of the mask's area; with both 0, none is."""

    max_px: float = 16.0
    max_share: float = 0.001


@dataclass(frozen=True, slots=True)
class CompetitionSettings:
    """How the objects of an image compete for pixels once their masks are predicted. Masks may still overlap."""

    weight: float | None = None
    """What log(1 - p) of each rival is multiplied by before it is added to the logits of a mask: 0 refines each mask by
    itself, and 1 would be right if no pixel could belong to two objects. None is the model's default."""
    max_shared: float = 0.5
    """Objects whose coarse masks share more than this fraction of the smaller one don't compete."""
    arbitrate: bool = True
    """Whether the model's arbiters, if it has any, move the logits, too. They were trained for its own weight."""


@dataclass(frozen=True, slots=True)
class ExclusiveSettings:
    """Whether COCO's instances may overlap after refinement. Regions that share a map never do."""

    enabled: bool = False
    gap_px: float = 5.0
    """Pixels that two neighbours give up go to the nearer one if both are at most this far away and the neighbours
    touched in the coarse masks; with 0, gaps stay."""


@dataclass(frozen=True, slots=True)
class PolygonSettings:
    """How a refined mask is written where the coarse one was a polygon. This affects only the file, not the mask."""

    tolerance_px: float = 0.0
    """How far an outline may be moved to have fewer corners; with 0 it follows the edges of the pixels."""
    min_iou: float = 0.995
    """Minimum IoU between the area inside such an outline and the refined mask; otherwise a smaller tolerance is
    tried."""
    holes: Literal["keep", "fill", "rle"] = "rle"
    """A mask with holes stays a polygon, whose outline is led into the holes and back along cuts of no width (`keep`);
    or its holes are filled; or it becomes RLE."""


@dataclass(frozen=True, slots=True)
class ModelDefaults:
    """Defaults of a model: the values that `auto` and None stand for in `RefineSettings`."""

    view: Literal["frame", "crop", "mixed"] = "mixed"
    selection: Literal["single", "predicted", "coarse"] = "predicted"
    snap: Literal["none", "guided"] = "none"
    guard: GuardThresholds = field(default_factory=GuardThresholds)
    competition: float = 0.0
    """The weight of `CompetitionSettings`."""
    single_threaded: bool = False
    """Whether, on a CPU, batches run side by side on one thread each instead of one after the other on all threads. It
    is faster for a small model, whose operations are too short to divide; a large one would need its memory many times.
    """


@dataclass(frozen=True, slots=True)
class GridSettings:
    """The automatic masks that the grid baselines choose from, made like those of SAM's automatic mask generator."""

    points_per_side: int = 32
    min_predicted_iou: float = 0.88
    min_stability: float = 0.95
    """Minimum IoU of the masks thresholded `stability_offset` above and below the usual threshold."""
    stability_offset: float = 1.0
    merge_overlap: float = 0.5
    """Fraction of an automatic mask inside the coarse one above which `grid-merge` takes it."""


@dataclass(frozen=True, slots=True)
class ClassicalSettings:
    """The baselines without a model. Lengths are fractions of r, the radius of a disc of the mask's area."""

    grabcut_band: float = 0.15
    """Pixels this close to the outline are undecided; the others are fixed."""
    grabcut_rounds: int = 3
    guided_radius: float = 0.2
    guided_epsilon: float = 1e-4
    """Epsilon of the colour guided filter; `snap` is the same filter with a smaller radius."""
    smooth_sigma: float = 0.06
    """Standard deviation of the Gaussian blur."""


@dataclass(frozen=True, slots=True)
class RefineSettings:
    """Settings of a refinement job, apart from model and files."""

    method: Literal["prompts", "grid-max-iou", "grid-merge", "grabcut", "guided", "smooth"] = "prompts"
    """`prompts` is SAMRefiner's method; the others are baselines for comparison."""
    passes: int = 1
    cascade: Literal["regen", "logits-a", "logits-b"] = "regen"
    """What a further pass is prompted with: prompts mined from the previous mask; or the previous logits in place of
    the mask prompt, where the first pass used points and box only (a), or all prompts (b)."""
    selection: Literal["auto", "single", "predicted", "coarse", "oracle"] = "auto"
    """Which candidate is chosen; `oracle` is the one most similar to the ground truth, an upper bound."""
    keep_candidates: bool = False
    """Whether annotations hold every candidate of the last pass."""
    include_crowd: bool = False
    seed: int = 0
    """Seed of random points; everything else is deterministic."""
    prompt_batch: int | None = None
    """Regions per decoder call, rounded down to a power of two; None for the default of the device, see `BATCHES`."""
    image_batch: int | None = None
    """Views per encoder call; None as above."""
    max_pixels: int = MAX_PIXELS
    """Images that claim more pixels are refused without being decoded."""
    prompts: PromptSettings = field(default_factory=PromptSettings)
    view: ViewSettings = field(default_factory=ViewSettings)
    split: SplitSettings = field(default_factory=SplitSettings)
    guard: GuardSettings = field(default_factory=GuardSettings)
    snap: SnapSettings = field(default_factory=SnapSettings)
    specks: SpeckSettings = field(default_factory=SpeckSettings)
    competition: CompetitionSettings = field(default_factory=CompetitionSettings)
    exclusive: ExclusiveSettings = field(default_factory=ExclusiveSettings)
    polygons: PolygonSettings = field(default_factory=PolygonSettings)
    grid: GridSettings = field(default_factory=GridSettings)
    classical: ClassicalSettings = field(default_factory=ClassicalSettings)

    def resolved(self, defaults: ModelDefaults) -> "RefineSettings":
        """Replace `auto` and None by the defaults of a model. Resolving twice changes nothing."""
        return replace(
            self,
            selection=defaults.selection if self.selection == "auto" else self.selection,
            view=replace(self.view, mode=defaults.view if self.view.mode == "auto" else self.view.mode),
            snap=replace(self.snap, mode=defaults.snap if self.snap.mode == "auto" else self.snap.mode),
            guard=replace(self.guard, **asdict(self.guard.thresholds(defaults.guard))),
            competition=replace(
                self.competition,
                weight=defaults.competition if self.competition.weight is None else self.competition.weight,
            ),
        )


BATCHES = {"cpu": (1, 4), "cuda": (8, 32)}
"""Views per encoder call and regions per decoder call, by kind of device. On a CPU larger batches gain nothing."""

NO_GUARD = GuardSettings(
    min_predicted_iou=UNBOUNDED,
    min_expected_gain=UNBOUNDED,
    sure_iou=1.0,
    min_coarse_iou=0.0,
    max_area_ratio=-UNBOUNDED,
    min_part_confidence=0.0,
    min_part_depth=0.0,
    min_left=0.0,
)
"""Thresholds that only an empty mask fails."""

ALL_SPECKS = SpeckSettings(max_px=0.0, max_share=0.0)
"""Keeps every speck."""

ALONE = CompetitionSettings(weight=0.0)
"""Refines each mask by itself."""

RELEASE = RefineSettings(
    passes=5,
    selection="predicted",
    prompts=PromptSettings(
        box="tight", gaussian_shape="distance", gaussian_amplitude=30.0, weaken_expanded=True, release=True
    ),
    view=ViewSettings(mode="frame"),
    guard=NO_GUARD,
    snap=SnapSettings(mode="none"),
    specks=ALL_SPECKS,
    competition=ALONE,
)
"""The defaults of the authors' public release, for comparison; its elastic box is switched off."""

_PLAIN = RefineSettings(guard=NO_GUARD, snap=SnapSettings(mode="none"), specks=ALL_SPECKS, competition=ALONE)

ABLATION = replace(_PLAIN, selection="predicted")
"""The base of every row of an ablation: the model's own masks, chosen by predicted IoU as in the paper."""

MethodName: TypeAlias = Literal["samrefiner", "tight-box", "grid-max-iou", "grid-merge", "grabcut", "guided", "smooth"]

METHODS: dict[MethodName, RefineSettings] = {
    "samrefiner": RefineSettings(),
    "tight-box": replace(
        _PLAIN,
        selection="single",
        prompts=PromptSettings(use_point=False, use_negative=False, use_mask=False, box="tight"),
    ),
    "grid-max-iou": replace(_PLAIN, method="grid-max-iou", view=ViewSettings(mode="frame")),
    "grid-merge": replace(_PLAIN, method="grid-merge", view=ViewSettings(mode="frame")),
    "grabcut": replace(_PLAIN, method="grabcut", view=ViewSettings(mode="crop")),
    "guided": replace(_PLAIN, method="guided", view=ViewSettings(mode="crop")),
    "smooth": replace(_PLAIN, method="smooth", view=ViewSettings(mode="crop")),
}
"""The base of each `refine --method`: the tool's own method, and baselines, which have no post steps."""


@dataclass(frozen=True, slots=True)
class JobSettings:
    """The model of a job, and the device it runs on."""

    model: str = "embedded"
    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    head: str = "auto"
    """The head of a SAM 2 model: `auto`, `none`, a kind, or a file."""
    threads: int = field(default_factory=lambda: min(8, os.cpu_count() or 1))
    """Threads that read images and mine prompts ahead of the model, and encode masks behind it."""
    workers: int = 1
    """Processes that run the model."""
    embeddings_gigabytes: float = 20.0
    """Size of a folder of embeddings; the files that were not used for longest are deleted."""


@dataclass(frozen=True, slots=True)
class EvaluateSettings:
    """How masks are measured."""

    boundary_ratio: float = 0.02
    """Width of the band of the boundary IoU as a fraction of the image diagonal, as in Cheng et al. 2021."""
    protocol: Literal["auto", "coco", "lvis", "davis", "lvos", "none"] = "auto"
    """Rules that AP and J&F follow; `auto` is COCO for COCO files and DAVIS for clips."""
    workers: int = field(default_factory=lambda: max(1, min(8, (os.cpu_count() or 1) - 1)))
    """Processes that the command starts, beside one that reads: with two cores, two of them are slower than one.
    `evaluate` in Python starts none by default."""


@dataclass(frozen=True, slots=True)
class CorruptSettings:
    """How coarse masks are made from good ones. The superpixel values are those of the DAVIS-585 set, the outline and
    morphology values those of CascadePSP, the noise values those of HQ-SAM; the others were chosen for this tool. The
    defects used in training are defined in `corrupt.defects`."""

    suite: SuiteName = "davis-like"
    seed: int = 0
    workers: int = field(default_factory=lambda: min(8, os.cpu_count() or 1))
    """Threads that make masks."""
    tries: int = 31
    """Attempts before the one closest to the band is used."""
    min_area_px: int = 10
    """A coarse mask with fewer pixels is drawn again."""
    window_margin: float = 0.5
    """Margin of the window around an object, on each side, as a fraction of the longer side of its box."""
    window_side_px: int = 128
    """Smaller windows are enlarged by repeating pixels until the longer side has this many, so that defects scale with
    objects."""
    compactness: float = 10.0
    """Weight of position relative to colour in SLIC: larger values give squarer superpixels."""
    superpixel_counts: tuple[int, ...] = (50, 100, 200, 300, 500, 700)
    superpixel_shares: tuple[float, float, float] = (0.65, 0.25, 0.10)
    """Probabilities that a superpixel defect starts at the boundary, inside and outside."""
    superpixel_kernel_px: int = 5
    superpixel_iterations: int = 3
    """Number of dilations and erosions, with a square of that side, that make the boundary band."""
    superpixel_defects: int = 10
    """Maximum number of superpixels toggled in an attempt."""
    outline_cut: float = 0.1
    """Fraction of consecutive outline pixels that are left out, where the ends of the gap are close."""
    outline_keep: float = 0.1
    """Fraction of the other outline pixels that are kept as corners."""
    outline_jitter: float = 0.0
    """Standard deviation of the relative shift of a corner away from the centre of its outline."""
    morphology_rounds: int = 250
    """Maximum number of rounds of four local dilations and erosions."""
    noise_side_px: int = 256
    """Longer side of the grid of the noise band."""
    noise_factor: int = 8
    noise_residue: float = 0.01
    """Noise is added where a mask differs by this much from its copy downscaled by the factor and upscaled again."""
    cam_cell_px: float = 32.0
    cam_blur: float = 1.0
    """In cells, also in `clip_blur`."""
    cam_leak: float = 0.15
    """Amplitude of the noise over the whole image, as a fraction of the peak, also in `clip_leak`."""
    clip_cell_px: float = 16.0
    clip_blur: float = 1.0
    clip_leak: float = 0.1
    activation_mode: Literal["under", "over", "either"] = "either"
    """Whether thresholded activations are too small, too large, or either."""
    compose_more: float = 0.5
    """Probability that a composition takes a second, and then a third step."""
    pictures: int = 12
    """Objects on the contact sheet."""
    max_pixels: int = MAX_PIXELS
    """The masks of images that claim more pixels are not changed."""


@dataclass(frozen=True, slots=True)
class ReferenceSettings:
    """The reference encoder. Values are the paper's unless stated otherwise."""

    queries: int = 50
    """Tokens per reference."""
    heads: int = 4
    normalise: bool = True
    """Whether pseudo masks are stretched to 0..1; the authors' release leaves that out."""
    resize: Literal["max", "nearest"] = "max"
    """How annotations reach the grid of features. `max` keeps every point; `nearest` is the release's."""


@dataclass(frozen=True, slots=True)
class LabelSettings:
    """How masks are made from references, and which are rejected."""

    threshold: float | None = None
    """Probability above which a pixel belongs to a class; where several classes exceed it, the likeliest wins. None
    for the one that suits the reference encoder, which its file names."""
    min_score: float = 0.0
    """Minimum score: the mean probability of the mask's pixels times the predicted IoU."""
    min_area_px: int = 50
    min_agreement: float = 0.5
    """With refinement: minimum IoU of the mask before and after it."""
    max_pixels: int = MAX_PIXELS
    """Images that claim more pixels are refused without being decoded."""


@dataclass(frozen=True, slots=True)
class ReferenceTrainSettings:
    """How the reference encoder is trained. Optimiser and losses are the paper's; the run is shorter and the model
    smaller, so the learning rate is higher."""

    kinds: tuple[Literal["point", "scribble", "box", "mask"], ...] = ("point", "scribble", "box", "mask")
    """Kinds of annotations, one of which is drawn for each episode. The paper trains an encoder for each kind."""
    steps: int = 6_000
    episodes_per_step: int = 8
    learning_rate: float = 6e-4
    weight_decay: float = 1e-6
    seed: int = 0
    side: int = 256
    """Side of the square on which masks are compared, in pixels."""
    min_area: float = 0.002
    """Smallest area of a class in an image that is drawn, as a fraction of the image."""
    validation_share: float = 0.1
    """Fraction of the images used for validation, where the data have no split."""
    validation_episodes: int = 160
    validation_seed: int = 321
    thresholds: tuple[float, ...] = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)
    """Probabilities of which the one with the best validation mIoU becomes the encoder's threshold. An encoder that is
    often unsure gives low probabilities, and 0.5 would leave most of a class out."""
    validate_every: int = 500
    save_every: int = 500
    cache_gigabytes: float = 4.0
    """Memory for what the frozen networks see in images; each is then computed once."""
    max_pixels: int = MAX_PIXELS
    encoder: ReferenceSettings = field(default_factory=ReferenceSettings)


@dataclass(frozen=True, slots=True)
class OverlapSettings:
    """How objects without overlaps are made to overlap, for training."""

    seam_share: float = 0.7
    """Fraction of the objects that get a seam of their neighbours."""
    seam_width: float = 0.04
    """Mean width of a seam, relative to the root of the object's area; one pixel is added."""
    hull_share: float = 0.12
    """Fraction that get what of their neighbours lies in their convex hull."""
    taken_share: float = 0.7
    """Fraction of the neighbours of which that is taken."""
    whole_share: float = 0.05
    """How many wholes, which are unions of neighbours, are added for each object."""


@dataclass(frozen=True, slots=True)
class ArbiterTrainSettings:
    """How an arbiter is trained, which corrects each mask once all masks of its image are predicted."""

    steps: int = 4_000
    contests_per_step: int = 24
    learning_rate: float = 2e-3
    weight_decay: float = 0.02
    warmup_steps: int = 50
    decay_share: float = 0.6
    """The learning rate falls over the last part of the run, along a cosine."""
    final_rate: float = 0.02
    """Learning rate at the end, relative to its plateau."""
    average_decay: float = 0.995
    """Decay of the moving average of the weights, which is what is measured and saved."""
    competition: float = 0.35
    """The weight of `CompetitionSettings` that it will be used with."""
    contested_below: float = -0.1
    contested_weight: float = 2.0
    """How much more a cell counts in the cross-entropy if log(1 - p), summed over its rivals, is below that bound."""
    harm_weight: float = 3.0
    """How much more it counts if a mask loses IoU, compared with no competition or with the weight alone."""
    coarse_harm_weight: float = 1.0
    """How much more it counts if a mask has a lower IoU than the coarse one."""
    contests: int = 10_000
    validation_contests: int = 600
    """Contests to measure on; never more than there are to learn from."""
    min_object_px: int = 200
    """Objects with fewer pixels are left out, and the arbiter is not asked for coarse masks with fewer."""
    flat_share: float = 0.3
    """Fraction of the images without overlaps in which none are made."""
    told_share: float = 0.6
    """Fraction of these of which the arbiter is told that no pixel belongs to two objects."""
    sparse_share: float = 0.5
    """Fraction of the images of which some objects are left out, as if they were not annotated."""
    least_kept: float = 0.4
    """At least this fraction of such an image's objects is kept, and never fewer than two if it has as many."""
    seed: int = 0
    validation_share: float = 0.1
    """Fraction of the images used for validation, where the data have no split."""
    validate_every: int = 500
    save_every: int = 500
    max_pixels: int = MAX_PIXELS


@dataclass(frozen=True, slots=True)
class FewShotSettings:
    """How few-shot segmentation is measured."""

    episodes: int = 200
    seed: int = 321
    """The paper's."""
    min_area: float = 0.002
    validation_share: float = 0.1
    prototype_threshold: float = 0.6
    """Similarity to the prototype, stretched to 0..1 in each image, above which the baseline calls a cell foreground.
    Chosen on training images."""
    grabcut_low: float = 0.3
    grabcut_high: float = 0.8
    """Values of the pseudo mask below and above which GrabCut takes pixels as surely background and foreground."""
    grabcut_rounds: int = 3
    max_pixels: int = MAX_PIXELS


@dataclass(frozen=True, slots=True)
class RefinerOptions:
    """Which SAM2Refiner head is built; the defaults are the paper's."""

    la: bool = True
    """Localization Augment."""
    pr: bool = True
    """Prompt Retargeting."""
    mr: bool = True
    """Mask Refinement. Without it, masks come from SAM 2's own upscaling."""
    residual: bool = False
    """Whether the decoder's mask is added to the logits of MR, so that an untrained head returns it."""
    cues: bool = False
    """Whether MR also sees the coarse mask, and the detail head's colour and place cues. Neither is in the paper."""


@dataclass(frozen=True, slots=True)
class PackSettings:
    """How training data are packed into a few files."""

    side: int = 448
    """Maximum longer side of a packed image, in pixels."""
    max_megabytes: float | None = 50.0
    """Quality and size of the images are lowered until the pack is smaller; None means no limit."""
    min_object_px: int = 100
    """Objects with fewer pixels in the packed image are left out."""
    validation_share: float = 0.1
    """Fraction of the images used for validation, where the data have no split."""
    max_pixels: int = MAX_PIXELS
    """Images that claim more pixels are refused."""


@dataclass(frozen=True, slots=True)
class AdaptSettings:
    """How an IoU adapter is trained (SAMRefiner++). Values are the paper's unless stated otherwise."""

    rank: int = 4
    margin: float = 0.02
    """How far the best candidate's score should be above the others."""
    learning_rate: float = 0.01
    momentum: float = 0.0
    weight_decay: float = 0.0
    images_per_step: int = 5
    steps: int = 117
    """One epoch of the paper's 585 images; a smaller set is used several times."""
    decay_steps: tuple[int, ...] = (60, 100)
    """Steps at which the learning rate is divided by ten."""
    both_prompts: bool = False
    """Whether each mask is trained on with its point and its box, instead of with one of them drawn at random."""
    with_masks: bool = True
    """Whether the adapter also scores candidates of prompts with a mask, as in the paper, and not only those of points
    and boxes."""
    held_out: float = 0.3
    """Fraction of the images held out for measuring."""
    max_images: int = 1000
    """Maximum number of images, drawn at random; more would only cost time, since `steps` is fixed."""
    seed: int = 0


RecipeName: TypeAlias = Literal["paper", "release", "single"]

ADAPT_RECIPES: dict[RecipeName, AdaptSettings] = {
    "paper": AdaptSettings(),
    "release": AdaptSettings(momentum=0.9, weight_decay=5e-4),
    "single": AdaptSettings(
        margin=0.1, learning_rate=1.0, steps=234, decay_steps=(120, 200), both_prompts=True, with_masks=False
    ),
}
"""`single` is not from the paper. It is for points and boxes only; its values were chosen on validation splits for the
embedded model: see docs/design/iou-adaption.md."""


@dataclass(frozen=True, slots=True)
class TrainSettings:
    """How the embedded model is trained. Names with `share` are probabilities or fractions, as their text says."""

    part: Literal["all", "sam2", "detail"] = "all"
    """What is trained: everything, only the SAM 2 part, or only the detail head on top of weights to start from."""
    steps: int = 4_250
    minutes: float | None = None
    """Train for this many minutes and ignore `steps`: the schedule then follows the clock."""
    seed: int = 0
    side: int = 256
    """Side of the square input in pixels, a multiple of 32."""
    small_side: int = 192
    """Side of the square input at first. It is twice as fast as the full side, and the weights fit both."""
    small_share: float = 10 / 17
    """Fraction of the run spent at that side before the full one."""
    images_per_step: int = 8
    prompts_per_image: int = 4
    learning_rate: float = 1e-3
    weight_decay: float = 0.05
    second_beta: float = 0.98
    """AdamW's decay of the squared gradients."""
    warmup_steps: int = 200
    decay_share: float = 7 / 17
    """Fraction of the run, at the end, over which the learning rate falls to `final_rate` times its plateau."""
    final_rate: float = 0.02
    average_decay: float = 0.998
    """Decay of the moving average of the weights; the average is what is saved as the model."""
    composite_share: float = 0.2
    """Probability that the object of an example is pasted from another image; only these have exact edges."""
    frame_share: float = 0.12
    """Probability that an example shows much of the image instead of a crop around the object."""
    smaller_share: float = 0.35
    """Probability that an object is shown as small as most are in large images: the crop is reduced and enlarged
    again."""
    other_object_share: float = 0.25
    """Probability that a prompt is for another object of the crop."""
    good_share: float = 0.25
    """Probability that a prompt's coarse mask is nearly right (IoU above 0.9), so that the model learns to leave good
    masks alone."""
    coarse_low: float = 0.4
    coarse_high: float = 0.97
    """Range of IoU of the coarse masks that are neither nearly right nor blobs."""
    blob_share: float = 0.3
    """Probability that a prompt's coarse mask is a blob of low resolution, like those of activation maps and mask
    heads."""
    blob_low: float = 0.4
    blob_high: float = 0.8
    """Range of IoU of the blobs."""
    corruption_tries: int = 4
    """Draws of a coarse mask before the one closest to its range of IoU is used."""
    second_pass_share: float = 0.2
    """Probability that, in a step, the detail head (trained alone) gets its own masks as coarse masks."""
    edge_loss: float = 0.3
    """Weight of the auxiliary loss that makes the image features predict edges, independently of the prompts."""
    harm_loss: float = 2.0
    """Weight of the loss of the detail head's masks that are worse than their coarse masks."""
    full_share: float = 0.5
    """Fraction of an image's mined prompts that are complete, as in use. Half of the others lack the mask, the other
    half have the mask and some of the rest."""
    prompts: Literal["mined", "mixed"] = "mined"
    """Prompts of an example: those of the method, some of them left out; or as in SAM2Refiner also boxes, clicks and
    coarse masks alone."""
    mask_loss: Literal["weighted", "points"] = "weighted"
    """The loss of a head's masks: over all cells, with more weight at the edge; or as in HQ-SAM at uncertain points."""
    auxiliary_loss: float = 0.3
    """Weight of the loss of each of SAM2Refiner's intermediate masks (the paper's lambda_i)."""
    save_every: int = 250
    validate_every: int = 500
    validation_examples: int = 160


TRAIN_ON_GPU = TrainSettings(
    images_per_step=256,
    prompts_per_image=8,
    learning_rate=2e-3,
    warmup_steps=500,
    average_decay=0.9995,
    save_every=1000,
    validate_every=1000,
    validation_examples=512,
)
"""Defaults of training on a GPU: larger batches."""

TRAIN_HEAD = TrainSettings(
    part="detail",
    steps=27_700,
    side=1024,
    small_share=0.0,
    images_per_step=32,
    learning_rate=1e-3,
    weight_decay=0.0,
    second_beta=0.999,
    decay_share=0.2,
    frame_share=0.5,
    smaller_share=0.0,
    second_pass_share=0.0,
    harm_loss=0.0,
    prompts="mixed",
    mask_loss="points",
    save_every=500,
    validate_every=1000,
)
"""The recipe of SAM2Refiner: 20 epochs of the 44,320 images of HQSeg-44K, 32 at a time, with Adam."""

TRAIN_EMBEDDED_HEAD = replace(
    TRAIN_HEAD,
    steps=1_000,
    side=256,
    small_side=192,
    small_share=0.5,
    images_per_step=8,
    warmup_steps=20,
    decay_share=0.4,
    frame_share=0.12,
    save_every=100,
    validate_every=250,
)
"""The same for the embedded model, on a CPU: crops of its size, smaller at first, and an hour or two."""

AVERAGE_EXAMPLES = 480
"""Examples from which the statistics of batch normalisation are computed anew for averaged weights."""

FINE_TUNE_RATE = 0.2
"""Learning rate of a run that starts from weights, relative to a run that starts from random weights."""
