"""Options that the commands share, grouped by their panel in `--help`.

Options of several commands are type aliases here. Options of refinement settings are rows of `SETTINGS`, and
`with_settings` adds the named ones to a command. They are None unless given: the default shown in `--help` is that of
`settings`, and `--compat` may set another.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, get_type_hints

import typer

from refinetool.errors import UsageError
from refinetool.formats import FORMATS
from refinetool.locations import location
from refinetool.settings import BATCHES, MAX_SEED, JobSettings, MethodName, RefineSettings

JOB, REFINE = JobSettings(), RefineSettings()

FILES = "Files"
MODEL = "Model"
RUN = "Run"
METHOD = "Refinement"
GUARD = "Guard: when the coarse mask is kept"
PROMPTS = "Prompts mined from the coarse mask"


def _given(*names: str, text: str, panel: str, default: object = None, **more: Any) -> Any:
    """Make an option that is None unless given; `default` is only shown in the help."""
    shown = "" if default is None else f" [dim]\\[default: {default}][/dim]"
    return typer.Option(*names, help=text + shown, rich_help_panel=panel, show_default=False, **more)


def worker_count(text: str) -> int | Literal["auto"]:
    """Parse the value of `--workers`."""
    if text == "auto":
        return "auto"
    if text.isdecimal() and 1 <= len(text) <= 4 and int(text):
        return int(text)
    raise UsageError(f"--workers is {text!r}; expected a number from 1 to 9999, or auto")


def _flag(*names: str, text: str, panel: str) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, show_default=False, metavar="")


# --- files

Coarse: TypeAlias = Annotated[
    Path,
    typer.Argument(
        metavar="COARSE",
        help="File or folder of masks: COCO, VOC, DAVIS, YOLO, LabelMe, Cityscapes, or images of masks.",
        parser=location,
    ),
]
Images: TypeAlias = Annotated[
    Path | None,
    _given(
        "--images",
        metavar="PATH",
        text="Image folder, on a disk or in a store such as s3://. Without it, images are looked for beside the masks.",
        panel=FILES,
        parser=location,
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
    str,
    typer.Option(
        "--format", help=f"Format of the masks: auto, {', '.join(FORMATS)}.", metavar="NAME", rich_help_panel=FILES
    ),
]
Sizes: TypeAlias = Annotated[
    Path | None,
    _given("--sizes", metavar="PATH", text="COCO JSON that lists the images, for COCO results.", panel=FILES),
]
FollowLinks: TypeAlias = Annotated[
    bool,
    _flag("--follow-links", text="Follow links in the folders of images and masks that lead out of them.", panel=FILES),
]
Categories: TypeAlias = Annotated[
    list[str] | None,
    _given(
        "--categories",
        metavar="NAME",
        text="Refine only this category, a name or a number; can be repeated, or several with commas.",
        panel=METHOD,
    ),
]
MaskSuffix: TypeAlias = Annotated[
    str,
    typer.Option(
        "--mask-suffix",
        help="What the names of mask files end in, and those of their images do not: _mask for a_mask.png and a.jpg. "
        "Other files are no masks.",
        metavar="TEXT",
        rich_help_panel=FILES,
        show_default=False,
    ),
]
Record: TypeAlias = Annotated[
    Path | None,
    _given("--record", metavar="PATH", text="CSV file to write: the status of every mask.", panel=FILES),
]
Overwrite: TypeAlias = Annotated[bool, _flag("--overwrite", text="Replace an existing output.", panel=FILES)]

# --- model

ModelName: TypeAlias = Annotated[
    str, typer.Option("--model", help="Model name; see refinetool models list.", metavar="NAME", rich_help_panel=MODEL)
]
Checkpoint: TypeAlias = Annotated[
    str | None,
    _given(
        "--checkpoint",
        text="Weights file, or random:SEED. Without it, the published weights.",
        panel=MODEL,
        metavar="PATH",
    ),
]
Device: TypeAlias = Annotated[
    str, typer.Option("--device", help="Device: auto, cpu, cuda or cuda:N.", metavar="DEVICE", rich_help_panel=MODEL)
]
Precision: TypeAlias = Annotated[
    Literal["auto", "fp32", "bf16"],
    typer.Option("--precision", help="Precision of the model; auto is bf16 on a GPU.", rich_help_panel=MODEL),
]
Head: TypeAlias = Annotated[
    str,
    typer.Option(
        "--head",
        help="Head of a SAM 2 model: auto, none, detail, sam2refiner, or a file that refinetool train head wrote.",
        metavar="HEAD",
        rich_help_panel=MODEL,
    ),
]
IouAdapter: TypeAlias = Annotated[
    Path | None,
    _given("--iou-adapter", metavar="PATH", text="File that refinetool adapt-iou wrote for this model.", panel=MODEL),
]

# --- run

Limit: TypeAlias = Annotated[
    int | None, _given("--limit", metavar="N", text="Process only the first N images.", panel=RUN, min=1)
]
DryRun: TypeAlias = Annotated[bool, _flag("--dry-run", text="Show what would be done; write nothing.", panel=RUN)]
Resume: TypeAlias = Annotated[bool, _flag("--resume", text="Continue an interrupted or limited run.", panel=RUN)]
Fresh: TypeAlias = Annotated[bool, _flag("--fresh", text="Discard the finished images of an earlier run.", panel=RUN)]
Threads: TypeAlias = Annotated[
    int | None,
    _given(
        "--threads",
        metavar="N",
        text="Threads per process that read images and encode masks.",
        panel=RUN,
        default="CPU cores, at most 8",
        min=1,
    ),
]
Compile: TypeAlias = Annotated[
    bool,
    _flag(
        "--compile",
        text="Compile the encoder with torch first. It takes a minute or more per process and needs a C++ compiler.",
        panel=RUN,
    ),
]
CacheEmbeddings: TypeAlias = Annotated[
    Path | None,
    _given(
        "--cache-embeddings",
        metavar="FOLDER",
        text="Keep the embeddings of images here, and use those that are here: another run on the same images, with "
        "other settings, skips the encoder.",
        panel=RUN,
    ),
]
CacheGigabytes: TypeAlias = Annotated[
    float,
    typer.Option(
        "--cache-gigabytes",
        metavar="GB",
        help="Size of that folder; what was not used for longest is deleted.",
        rich_help_panel=RUN,
        min=0.001,
    ),
]
Workers: TypeAlias = Annotated[
    str,
    typer.Option(
        "--workers",
        metavar="N",
        help="Processes that run the model: a number, or auto for one per GPU (or per four CPU cores where there is "
        "none).",
        rich_help_panel=RUN,
    ),
]
RayAddress: TypeAlias = Annotated[
    str | None,
    _given(
        "--ray-address",
        metavar="ADDRESS",
        text="Use the workers of a running Ray cluster: its address, or auto for the one on this machine.",
        panel=RUN,
    ),
]
Quiet: TypeAlias = Annotated[bool, _flag("--quiet", "-q", text="Show no progress and no summary.", panel=RUN)]
AsJson: TypeAlias = Annotated[bool, _flag("--json", text="Print the summary as JSON.", panel=RUN)]

# --- refinement

Method: TypeAlias = Annotated[
    MethodName,
    typer.Option("--method", help="samrefiner, or a baseline for comparison.", rich_help_panel=METHOD),
]
Truth: TypeAlias = Annotated[
    Path | None,
    _given("--truth", metavar="PATH", text="Ground truth, for --selection oracle.", panel=METHOD),
]
Candidates: TypeAlias = Annotated[
    Path | None,
    _given("--candidates", metavar="PATH", text="JSON Lines file to write: all candidates of each mask.", panel=FILES),
]
Compat: TypeAlias = Annotated[
    Literal["release"] | None,
    _given("--compat", text="Reproduce the release of SAMRefiner's authors, for comparison.", panel=METHOD),
]

# --- guard

NoGuard: TypeAlias = Annotated[
    bool, _flag("--no-guard", text="Accept every refined mask that is not empty.", panel=GUARD)
]

# --- prompts


# --- settings of refinement


@dataclass(frozen=True, slots=True)
class Setting:
    """An option that changes a setting. Type, choices and default are those of the setting.

    path: Name of the setting in `RefineSettings`, with the group before a dot.
    low, high: Bounds of the value.
    value: What an option without a value sets the setting to.
    default: Text to show in place of the default.
    """

    path: str
    flag: str
    panel: str
    text: str
    low: float | None = None
    high: float | None = None
    value: bool | None = None
    default: str | None = None

    @property
    def variable(self) -> str:
        return self.flag.removeprefix("--").replace("-", "_")

    @property
    def parameter(self) -> inspect.Parameter:
        """The option as a parameter of a command."""
        group, _, name = self.path.rpartition(".")
        owner: Any = getattr(REFINE, group) if group else REFINE
        if self.value is not None:
            hint: Any = Annotated[bool, _flag(self.flag, text=self.text, panel=self.panel)]
            return inspect.Parameter(self.variable, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=hint)
        kind = get_type_hints(type(owner))[name] | None
        metavar = {int: "N", float: "X"}.get(next(iter(set(getattr(kind, "__args__", ())) & {int, float}), str))
        option = _given(
            self.flag,
            text=self.text,
            panel=self.panel,
            default=self.default or getattr(owner, name),
            metavar=metavar,
            min=self.low,
            max=self.high,
        )
        hint = Annotated[kind, option]
        return inspect.Parameter(self.variable, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=hint)


MODEL_DEFAULT = "the model's default"
VIEWS, REGIONS = (f"{cpu} on a CPU, {gpu} on a GPU" for cpu, gpu in zip(*BATCHES.values(), strict=True))

SETTINGS = (
    Setting(
        "max_pixels", "--max-pixels", FILES, "Largest image size, in pixels. Masks of larger images are kept.", low=1
    ),
    Setting(
        "polygons.tolerance_px",
        "--polygon-tolerance",
        FILES,
        "Write polygons with fewer corners, whose outline is moved by at most this many pixels (0.25 or more).",
        low=0,
    ),
    Setting(
        "polygons.holes",
        "--holes",
        FILES,
        "A polygon whose refined mask has holes stays a polygon with cuts into the holes (keep), has them filled, or "
        "becomes RLE.",
    ),
    Setting("image_batch", "--image-batch", MODEL, "Views per encoder call.", low=1, default=VIEWS),
    Setting("prompt_batch", "--prompt-batch", MODEL, "Regions per decoder call.", low=1, default=REGIONS),
    Setting("seed", "--seed", RUN, "Random seed, used only by --point random.", low=0, high=MAX_SEED),
    Setting(
        "view.mode",
        "--view",
        METHOD,
        "What the model sees: the whole image, a crop around each mask, or crops only for small objects in large "
        "images (mixed).",
    ),
    Setting("view.margin", "--view-margin", METHOD, "Margin of a crop, as a fraction of the box side.", low=0),
    Setting("passes", "--passes", METHOD, "Number of passes; each refines the mask of the previous one.", low=1),
    Setting("cascade", "--cascade", METHOD, "What further passes are prompted with."),
    Setting("selection", "--selection", METHOD, "Which candidate to choose; oracle needs --truth."),
    Setting("snap.mode", "--snap", METHOD, "Edge-aware filter at full resolution."),
    Setting(
        "specks.max_px",
        "--speck-px",
        METHOD,
        "Islands and holes that the coarse mask did not have are removed up to this size, in pixels.",
        low=0,
    ),
    Setting("specks.max_share", "--speck-share", METHOD, "The same, as a fraction of the mask's area.", low=0, high=1),
    Setting(
        "exclusive.enabled",
        "--exclusive",
        METHOD,
        "COCO instances don't overlap after refinement, and neighbours that touched have no gap between them.",
        value=True,
    ),
    Setting("split.rule", "--split-rule", METHOD, "How the components of a class mask are joined into parts."),
    Setting("grid.points_per_side", "--grid-points", METHOD, "Points per side of the grid methods.", low=1),
    Setting(
        "grid.min_predicted_iou", "--grid-min-iou", METHOD, "Minimum predicted IoU of the masks of the grid methods."
    ),
    Setting(
        "grid.min_stability", "--grid-min-stability", METHOD, "Minimum stability of the masks of the grid methods."
    ),
    Setting("include_crowd", "--include-crowd", METHOD, "Refine crowds too.", value=True),
    Setting(
        "guard.min_predicted_iou",
        "--min-predicted-iou",
        GUARD,
        "Minimum IoU predicted by the model.",
        low=0,
        high=1,
        default=MODEL_DEFAULT,
    ),
    Setting(
        "guard.min_expected_gain",
        "--min-expected-gain",
        GUARD,
        "Minimum fraction of the coarse mask's error that the refined mask removes, estimated from the model's logits.",
        low=-1,
        high=1,
        default=MODEL_DEFAULT,
    ),
    Setting(
        "guard.sure_iou",
        "--sure-iou",
        GUARD,
        "IoU of the refined mask, estimated from the model's logits, from which half of that fraction is enough.",
        low=0,
        high=1,
        default=MODEL_DEFAULT,
    ),
    Setting(
        "guard.min_coarse_iou",
        "--min-coarse-iou",
        GUARD,
        "Minimum IoU with the coarse mask.",
        low=0,
        high=1,
        default=MODEL_DEFAULT,
    ),
    Setting(
        "guard.max_area_ratio",
        "--max-area-ratio",
        GUARD,
        "Maximum ratio of refined and coarse area.",
        low=1,
        default=MODEL_DEFAULT,
    ),
    Setting(
        "guard.min_left",
        "--min-left",
        GUARD,
        "Minimum fraction of its pixels that a mask keeps where others of a shared map take some.",
        low=0,
        high=1,
    ),
    Setting("prompts.point", "--point", PROMPTS, "Where to put the positive point."),
    Setting("prompts.use_point", "--no-point", PROMPTS, "No positive point.", value=False),
    Setting("prompts.use_negative", "--no-negative", PROMPTS, "No negative point.", value=False),
    Setting("prompts.use_box", "--no-box", PROMPTS, "No box.", value=False),
    Setting("prompts.use_mask", "--no-mask", PROMPTS, "No mask prompt.", value=False),
    Setting(
        "prompts.border_is_background",
        "--border-is-background",
        PROMPTS,
        "Keep the positive point away from the image border, too.",
        value=True,
    ),
    Setting("prompts.box", "--box", PROMPTS, "Box around the mask: tight, or extended towards similar pixels."),
    Setting(
        "prompts.elastic_threshold",
        "--elastic-threshold",
        PROMPTS,
        "Fraction of similar pixels above which an edge of the box moves (lambda).",
        low=0,
        high=1,
    ),
    Setting(
        "prompts.elastic_similarity",
        "--elastic-similarity",
        PROMPTS,
        "Cosine similarity above which a pixel counts as similar.",
        low=-1,
        high=1,
    ),
    Setting(
        "prompts.elastic_step",
        "--elastic-step",
        PROMPTS,
        "How far an edge moves, as a fraction of the box side.",
        low=0,
    ),
    Setting("prompts.elastic_step_px", "--elastic-step-px", PROMPTS, "Maximum move of an edge, in pixels.", low=0),
    Setting("prompts.elastic_rounds", "--elastic-rounds", PROMPTS, "Number of moves per pass.", low=0),
    Setting(
        "prompts.gaussian_shape",
        "--gaussian-shape",
        PROMPTS,
        "The mask prompt fades with the distance to the point (radial) or to the edge (distance).",
    ),
    Setting(
        "prompts.gaussian_amplitude",
        "--gaussian-amplitude",
        PROMPTS,
        "Peak logit of the mask prompt (omega).",
        low=0,
    ),
    Setting("prompts.gaussian_span", "--gaussian-span", PROMPTS, "How slowly the mask prompt fades (gamma).", low=1e-6),
    Setting(
        "prompts.gaussian_background",
        "--gaussian-background",
        PROMPTS,
        "Value of the mask prompt outside the mask.",
    ),
    Setting(
        "prompts.weaken_expanded",
        "--weaken-expanded",
        PROMPTS,
        "Use a weak mask prompt where the box was extended.",
        value=True,
    ),
)
"""All refinement settings that have an option."""


def with_settings(*paths: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add the options of the named settings to a command, or of all settings if none is named.

    The command must have a parameter `changes`; the given values are passed there, in the form that `changed` takes.
    """
    chosen = [setting for setting in SETTINGS if not paths or setting.path in paths]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(**arguments: Any) -> None:
            changes: dict[str, object] = {}
            for setting in chosen:
                given = arguments.pop(setting.variable)
                if setting.value is not None:
                    given = setting.value if given else None
                changes[setting.path] = given
            command(**arguments, changes=changes)

        own = [p for p in inspect.signature(command).parameters.values() if p.name != "changes"]
        parameters = [*own, *(setting.parameter for setting in chosen)]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters} | {"return": None}
        return run

    return decorate


def changed(settings: RefineSettings, changes: Mapping[str, Any]) -> RefineSettings:
    """Return settings with some values replaced.

    Args:
        changes: New values by name, with the group before a dot (`passes`, `view.mode`); None leaves a setting alone.
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
