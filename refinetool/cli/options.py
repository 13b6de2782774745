"""The options of the commands, by the panel of `--help` they stand in.

An option of a setting is None unless it is given: the default stands in `settings`, is shown from there, and gives way
to `--compat` where that asks for something else.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import typer

from refinetool.settings import JobSettings, RefineSettings

JOB, REFINE = JobSettings(), RefineSettings()

FILES = "Files"
MODEL = "Model"
RUN = "Run"
METHOD = "Refinement"
GUARD = "Guard: when the coarse mask is kept"
PROMPTS = "Prompts mined from the coarse mask"


def _given(*names: str, text: str, panel: str, default: object = None, **more: Any) -> Any:
    """An option that is None unless it is given; `default` is only shown."""
    shown = "" if default is None else f" [dim]\\[default: {default}][/dim]"
    return typer.Option(*names, help=text + shown, rich_help_panel=panel, show_default=False, **more)


def _flag(*names: str, text: str, panel: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, show_default=False, metavar="")


# --- files

Images: TypeAlias = Annotated[
    Path | None,
    _given(
        "--images", metavar="PATH", text="Folder of the images; else they are sought beside the masks.", panel=FILES
    ),
]
Output: TypeAlias = Annotated[
    Path | None,
    _given(
        "--output",
        "-o",
        metavar="PATH",
        text="File or folder to write.",
        default="COARSE.refined.json, COARSE-refined",
        panel=FILES,
    ),
]
Format: TypeAlias = Annotated[
    Literal["auto", "coco", "coco-results", "voc-class", "voc-object", "davis", "masks"],
    typer.Option(
        "--format",
        help="coco, coco-results, voc-class, voc-object, davis or masks.",
        metavar="NAME",
        rich_help_panel=FILES,
    ),
]
Sizes: TypeAlias = Annotated[
    Path | None,
    _given("--sizes", metavar="PATH", text="COCO JSON with the sizes of the images, for COCO results.", panel=FILES),
]
MaxPixels: TypeAlias = Annotated[
    int | None,
    _given(
        "--max-pixels", metavar="N", text="Larger images are left alone.", panel=FILES, default=REFINE.max_pixels, min=1
    ),
]
Record: TypeAlias = Annotated[
    Path | None,
    _given("--record", metavar="PATH", text="CSV to write: what became of every mask, by id.", panel=FILES),
]
Overwrite: TypeAlias = Annotated[bool, _flag("--overwrite", text="Replace an output that exists.", panel=FILES)]

# --- model

ModelName: TypeAlias = Annotated[
    str, typer.Option("--model", help="Segmenter; see refinetool models list.", metavar="NAME", rich_help_panel=MODEL)
]
Checkpoint: TypeAlias = Annotated[
    str | None,
    _given(
        "--checkpoint", text="File of weights, or random:SEED. Else the published ones.", panel=MODEL, metavar="PATH"
    ),
]
Device: TypeAlias = Annotated[
    str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.", metavar="DEVICE", rich_help_panel=MODEL)
]
Precision: TypeAlias = Annotated[
    Literal["auto", "fp32", "bf16"],
    typer.Option("--precision", help="Arithmetic of the model; auto is bf16 on a GPU.", rich_help_panel=MODEL),
]
IouAdapter: TypeAlias = Annotated[
    Path | None,
    _given("--iou-adapter", metavar="PATH", text="What refinetool adapt-iou made for this model.", panel=MODEL),
]
ImageBatch: TypeAlias = Annotated[
    int | None,
    _given(
        "--image-batch", metavar="N", text="Views per encoder call.", panel=MODEL, default=REFINE.image_batch, min=1
    ),
]
PromptBatch: TypeAlias = Annotated[
    int | None,
    _given(
        "--prompt-batch", metavar="N", text="Regions per decoder call.", panel=MODEL, default=REFINE.prompt_batch, min=1
    ),
]

# --- run

Limit: TypeAlias = Annotated[
    int | None, _given("--limit", metavar="N", text="Refine the first N images only.", panel=RUN, min=1)
]
DryRun: TypeAlias = Annotated[bool, _flag("--dry-run", text="Say what would be done, touch nothing.", panel=RUN)]
Resume: TypeAlias = Annotated[bool, _flag("--resume", text="Continue an interrupted or limited run.", panel=RUN)]
Fresh: TypeAlias = Annotated[bool, _flag("--fresh", text="Forget what an earlier run left.", panel=RUN)]
Threads: TypeAlias = Annotated[
    int | None,
    _given(
        "--threads",
        metavar="N",
        text="Readers and writers around the model.",
        panel=RUN,
        default="CPU cores, 8 at most",
        min=1,
    ),
]
Quiet: TypeAlias = Annotated[bool, _flag("--quiet", "-q", text="No progress, no summary.", panel=RUN)]
AsJson: TypeAlias = Annotated[bool, _flag("--json", text="Print the summary as JSON.", panel=RUN)]
Seed: TypeAlias = Annotated[
    int | None,
    _given(
        "--seed",
        metavar="N",
        text="Seed of what is random: points with --point random.",
        panel=RUN,
        default=REFINE.seed,
        min=0,
    ),
]

# --- refinement

View: TypeAlias = Annotated[
    Literal["auto", "frame", "crop"] | None,
    _given("--view", text="What the model sees: the image, or a crop.", panel=METHOD, default=REFINE.view.mode),
]
ViewMargin: TypeAlias = Annotated[
    float | None,
    _given(
        "--view-margin",
        metavar="X",
        text="Room around a crop's box, in sides.",
        panel=METHOD,
        default=REFINE.view.margin,
        min=0,
    ),
]
Passes: TypeAlias = Annotated[
    int | None,
    _given(
        "--passes",
        metavar="N",
        text="Refine the refined mask again, N in all.",
        panel=METHOD,
        default=REFINE.passes,
        min=1,
    ),
]
Selection: TypeAlias = Annotated[
    Literal["auto", "single", "predicted", "coarse", "oracle"] | None,
    _given("--selection", text="Candidate to take; oracle needs --truth.", panel=METHOD, default=REFINE.selection),
]
Method: TypeAlias = Annotated[
    Literal["samrefiner", "tight-box", "grid-max-iou", "grid-merge", "grabcut", "guided", "smooth"],
    typer.Option("--method", help="The tool's own way, or a baseline to compare with.", rich_help_panel=METHOD),
]
Cascade: TypeAlias = Annotated[
    Literal["regen", "logits-a", "logits-b"] | None,
    _given("--cascade", text="What further passes are prompted with.", panel=METHOD, default=REFINE.cascade),
]
Truth: TypeAlias = Annotated[
    Path | None,
    _given("--truth", metavar="PATH", text="Ground truth, for --selection oracle.", panel=METHOD),
]
Candidates: TypeAlias = Annotated[
    Path | None,
    _given("--candidates", metavar="PATH", text="JSON lines to write: all the model offered.", panel=FILES),
]
Snap: TypeAlias = Annotated[
    Literal["auto", "none", "guided"] | None,
    _given("--snap", text="Edge-aware filter at full resolution.", panel=METHOD, default=REFINE.snap.mode),
]
Trust: TypeAlias = Annotated[
    Literal["auto", "none", "outline"] | None,
    _given(
        "--trust",
        text="Where the model is unsure, a coarse outline that lies on colour edges stays.",
        panel=METHOD,
        default=REFINE.trust.mode,
    ),
]
SplitRule: TypeAlias = Annotated[
    Literal["paper", "relaxed", "off"] | None,
    _given("--split-rule", text="How parts of a class mask join.", panel=METHOD, default=REFINE.split.rule),
]
GridPoints: TypeAlias = Annotated[
    int | None,
    _given(
        "--grid-points",
        metavar="N",
        text="Points per side of the grid methods.",
        panel=METHOD,
        default=REFINE.grid.points_per_side,
        min=1,
    ),
]
GridMinIou: TypeAlias = Annotated[
    float | None,
    _given(
        "--grid-min-iou",
        metavar="X",
        text="Predicted IoU below which they drop a mask.",
        panel=METHOD,
        default=REFINE.grid.min_predicted_iou,
    ),
]
GridMinStability: TypeAlias = Annotated[
    float | None,
    _given(
        "--grid-min-stability",
        metavar="X",
        text="Stability below which they drop a mask.",
        panel=METHOD,
        default=REFINE.grid.min_stability,
    ),
]
IncludeCrowd: TypeAlias = Annotated[bool, _flag("--include-crowd", text="Refine crowds too.", panel=METHOD)]
Compat: TypeAlias = Annotated[
    Literal["release"] | None,
    _given("--compat", text="Do as SAMRefiner's authors' release, for comparison.", panel=METHOD),
]

# --- guard

MinPredictedIou: TypeAlias = Annotated[
    float | None,
    _given(
        "--min-predicted-iou",
        metavar="X",
        text="The model's own estimate, at least.",
        panel=GUARD,
        default=REFINE.guard.min_predicted_iou,
        min=0,
        max=1,
    ),
]
MinExpectedGain: TypeAlias = Annotated[
    float | None,
    _given(
        "--min-expected-gain",
        metavar="X",
        text="Share of the coarse mask's error that the model's logits promise to remove, at least.",
        panel=GUARD,
        default=REFINE.guard.min_expected_gain,
        min=-1,
        max=1,
    ),
]
MinCoarseIou: TypeAlias = Annotated[
    float | None,
    _given(
        "--min-coarse-iou",
        metavar="X",
        text="IoU with the coarse mask, at least.",
        panel=GUARD,
        default=REFINE.guard.min_coarse_iou,
        min=0,
        max=1,
    ),
]
MaxAreaRatio: TypeAlias = Annotated[
    float | None,
    _given(
        "--max-area-ratio",
        metavar="X",
        text="How many times larger or smaller, at most.",
        panel=GUARD,
        default=REFINE.guard.max_area_ratio,
        min=1,
    ),
]
NoGuard: TypeAlias = Annotated[bool, _flag("--no-guard", text="Take every refined mask that isn't empty.", panel=GUARD)]

# --- prompts

Point: TypeAlias = Annotated[
    Literal["distance", "random", "box-center"] | None,
    _given("--point", text="Where the positive point goes.", panel=PROMPTS, default=REFINE.prompts.point),
]
NoPoint: TypeAlias = Annotated[bool, _flag("--no-point", text="No positive point.", panel=PROMPTS)]
NoNegative: TypeAlias = Annotated[bool, _flag("--no-negative", text="No negative point.", panel=PROMPTS)]
NoBox: TypeAlias = Annotated[bool, _flag("--no-box", text="No box.", panel=PROMPTS)]
NoMask: TypeAlias = Annotated[bool, _flag("--no-mask", text="No mask prompt.", panel=PROMPTS)]
BorderIsBackground: TypeAlias = Annotated[
    bool, _flag("--border-is-background", text="Points keep away from the image border too.", panel=PROMPTS)
]
BoxKind: TypeAlias = Annotated[
    Literal["tight", "elastic"] | None,
    _given("--box", text="Box around the mask, or stretched.", panel=PROMPTS, default=REFINE.prompts.box),
]
ElasticThreshold: TypeAlias = Annotated[
    float | None,
    _given(
        "--elastic-threshold",
        metavar="X",
        text="Share of similar pixels that stretches an edge (lambda).",
        panel=PROMPTS,
        default=REFINE.prompts.elastic_threshold,
        min=0,
        max=1,
    ),
]
ElasticSimilarity: TypeAlias = Annotated[
    float | None,
    _given(
        "--elastic-similarity",
        metavar="X",
        text="Cosine above which a pixel is similar.",
        panel=PROMPTS,
        default=REFINE.prompts.elastic_similarity,
        min=-1,
        max=1,
    ),
]
ElasticStep: TypeAlias = Annotated[
    float | None,
    _given(
        "--elastic-step",
        metavar="X",
        text="Stretch, as a share of the box side.",
        panel=PROMPTS,
        default=REFINE.prompts.elastic_step,
        min=0,
    ),
]
ElasticStepPx: TypeAlias = Annotated[
    float | None,
    _given(
        "--elastic-step-px",
        metavar="X",
        text="Stretch in pixels, at most.",
        panel=PROMPTS,
        default=REFINE.prompts.elastic_step_px,
        min=0,
    ),
]
ElasticRounds: TypeAlias = Annotated[
    int | None,
    _given(
        "--elastic-rounds",
        metavar="N",
        text="Stretches per pass.",
        panel=PROMPTS,
        default=REFINE.prompts.elastic_rounds,
        min=0,
    ),
]
GaussianShape: TypeAlias = Annotated[
    Literal["radial", "distance"] | None,
    _given(
        "--gaussian-shape",
        text="The mask prompt fades with the distance to the point, or to the edge.",
        panel=PROMPTS,
        default=REFINE.prompts.gaussian_shape,
    ),
]
GaussianAmplitude: TypeAlias = Annotated[
    float | None,
    _given(
        "--gaussian-amplitude",
        metavar="X",
        text="Its peak logit (omega).",
        panel=PROMPTS,
        default=REFINE.prompts.gaussian_amplitude,
        min=0,
    ),
]
GaussianSpan: TypeAlias = Annotated[
    float | None,
    _given(
        "--gaussian-span",
        metavar="X",
        text="Its width (gamma).",
        panel=PROMPTS,
        default=REFINE.prompts.gaussian_span,
        min=1e-6,
    ),
]
GaussianBackground: TypeAlias = Annotated[
    Literal["negative", "zero"] | None,
    _given(
        "--gaussian-background",
        text="Its value outside the mask.",
        panel=PROMPTS,
        default=REFINE.prompts.gaussian_background,
    ),
]
WeakenExpanded: TypeAlias = Annotated[
    bool, _flag("--weaken-expanded", text="A weak mask prompt where the box was stretched.", panel=PROMPTS)
]


def changed(settings: RefineSettings, changes: Mapping[str, Any]) -> RefineSettings:
    """Settings with some of them replaced.

    Args:
        changes: By name, with the group before a dot (`passes`, `view.mode`); None leaves a setting as it is.
    """
    for path, value in changes.items():
        if value is None:
            continue
        group, _, name = path.rpartition(".")
        if group:
            part = dataclasses.replace(getattr(settings, group), **{name: value})
            settings = dataclasses.replace(settings, **{group: part})
        else:
            settings = dataclasses.replace(settings, **{name: value})
    return settings
