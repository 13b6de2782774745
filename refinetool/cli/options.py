"""The options of the commands, by the panel of `--help` they stand in.

Options that several commands have are types here. Options of refinement settings are rows of `SETTINGS`, stated once;
`with_settings` gives a command those that it names. They are None unless they are given: the default stands in
`settings`, is shown from there, and gives way to `--compat` where that asks for something else.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias, get_type_hints

import typer

from refinetool.formats import FORMATS
from refinetool.settings import BATCHES, JobSettings, RefineSettings

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
    str,
    typer.Option("--format", help=f"auto, {', '.join(FORMATS)}.", metavar="NAME", rich_help_panel=FILES),
]
Sizes: TypeAlias = Annotated[
    Path | None,
    _given("--sizes", metavar="PATH", text="COCO JSON with the sizes of the images, for COCO results.", panel=FILES),
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

# --- refinement

Method: TypeAlias = Annotated[
    Literal["samrefiner", "tight-box", "grid-max-iou", "grid-merge", "grabcut", "guided", "smooth"],
    typer.Option("--method", help="The tool's own way, or a baseline to compare with.", rich_help_panel=METHOD),
]
Truth: TypeAlias = Annotated[
    Path | None,
    _given("--truth", metavar="PATH", text="Ground truth, for --selection oracle.", panel=METHOD),
]
Candidates: TypeAlias = Annotated[
    Path | None,
    _given("--candidates", metavar="PATH", text="JSON lines to write: all the model offered.", panel=FILES),
]
Compat: TypeAlias = Annotated[
    Literal["release"] | None,
    _given("--compat", text="Do as SAMRefiner's authors' release, for comparison.", panel=METHOD),
]

# --- guard

NoGuard: TypeAlias = Annotated[bool, _flag("--no-guard", text="Take every refined mask that isn't empty.", panel=GUARD)]

# --- prompts


# --- settings of refinement


@dataclass(frozen=True, slots=True)
class Setting:
    """An option that changes a setting. Type, choices and default are the setting's.

    path: Its name in `RefineSettings`, with the group before a dot.
    low, high: Bounds of its value.
    value: What an option without a value sets it to.
    default: What is shown instead of the default.
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


SUITS_MODEL = "what suits the model"
VIEWS, REGIONS = (f"{cpu} on a CPU, {gpu} on a GPU" for cpu, gpu in zip(*BATCHES.values(), strict=True))

SETTINGS = (
    Setting("max_pixels", "--max-pixels", FILES, "Larger images are left alone.", low=1),
    Setting("image_batch", "--image-batch", MODEL, "Views per encoder call.", low=1, default=VIEWS),
    Setting("prompt_batch", "--prompt-batch", MODEL, "Regions per decoder call.", low=1, default=REGIONS),
    Setting("seed", "--seed", RUN, "Seed of what is random: points with --point random.", low=0),
    Setting("view.mode", "--view", METHOD, "What the model sees; mixed: crops for small objects in large images."),
    Setting("view.margin", "--view-margin", METHOD, "Room around the box of a crop, in box sides.", low=0),
    Setting("passes", "--passes", METHOD, "Refine the refined mask again, N passes in all.", low=1),
    Setting("cascade", "--cascade", METHOD, "What further passes are prompted with."),
    Setting("selection", "--selection", METHOD, "Which candidate to take; oracle needs --truth."),
    Setting("snap.mode", "--snap", METHOD, "Edge-aware filter at full resolution."),
    Setting("split.rule", "--split-rule", METHOD, "Which parts of a class mask are joined."),
    Setting("grid.points_per_side", "--grid-points", METHOD, "Points per side of the grid methods.", low=1),
    Setting("grid.min_predicted_iou", "--grid-min-iou", METHOD, "Predicted IoU below which they drop a mask."),
    Setting("grid.min_stability", "--grid-min-stability", METHOD, "Stability below which they drop a mask."),
    Setting("include_crowd", "--include-crowd", METHOD, "Refine crowds too.", value=True),
    Setting(
        "guard.min_predicted_iou",
        "--min-predicted-iou",
        GUARD,
        "The IoU that the model predicts, at least.",
        low=0,
        high=1,
        default=SUITS_MODEL,
    ),
    Setting(
        "guard.min_expected_gain",
        "--min-expected-gain",
        GUARD,
        "Fraction of the coarse mask's error that the model's logits promise to remove, at least.",
        low=-1,
        high=1,
        default=SUITS_MODEL,
    ),
    Setting("guard.min_coarse_iou", "--min-coarse-iou", GUARD, "IoU with the coarse mask, at least.", low=0, high=1),
    Setting("guard.max_area_ratio", "--max-area-ratio", GUARD, "How many times larger or smaller, at most.", low=1),
    Setting("prompts.point", "--point", PROMPTS, "Where the positive point goes."),
    Setting("prompts.use_point", "--no-point", PROMPTS, "No positive point.", value=False),
    Setting("prompts.use_negative", "--no-negative", PROMPTS, "No negative point.", value=False),
    Setting("prompts.use_box", "--no-box", PROMPTS, "No box.", value=False),
    Setting("prompts.use_mask", "--no-mask", PROMPTS, "No mask prompt.", value=False),
    Setting(
        "prompts.border_is_background",
        "--border-is-background",
        PROMPTS,
        "Points keep away from the image border too.",
        value=True,
    ),
    Setting("prompts.box", "--box", PROMPTS, "Box around the mask, as it is or stretched towards similar pixels."),
    Setting(
        "prompts.elastic_threshold",
        "--elastic-threshold",
        PROMPTS,
        "Fraction of similar pixels that stretches an edge (lambda).",
        low=0,
        high=1,
    ),
    Setting(
        "prompts.elastic_similarity",
        "--elastic-similarity",
        PROMPTS,
        "Cosine above which a pixel is similar.",
        low=-1,
        high=1,
    ),
    Setting("prompts.elastic_step", "--elastic-step", PROMPTS, "Stretch, as a fraction of the box side.", low=0),
    Setting("prompts.elastic_step_px", "--elastic-step-px", PROMPTS, "Stretch in pixels, at most.", low=0),
    Setting("prompts.elastic_rounds", "--elastic-rounds", PROMPTS, "Stretches per pass.", low=0),
    Setting(
        "prompts.gaussian_shape",
        "--gaussian-shape",
        PROMPTS,
        "The mask prompt fades with the distance to the point, or to the edge.",
    ),
    Setting("prompts.gaussian_amplitude", "--gaussian-amplitude", PROMPTS, "Its peak logit (omega).", low=0),
    Setting("prompts.gaussian_span", "--gaussian-span", PROMPTS, "How slowly it fades (gamma).", low=1e-6),
    Setting("prompts.gaussian_background", "--gaussian-background", PROMPTS, "Its value outside the mask."),
    Setting(
        "prompts.weaken_expanded",
        "--weaken-expanded",
        PROMPTS,
        "A weak mask prompt where the box was stretched.",
        value=True,
    ),
)
"""Every setting of refinement that has an option."""


def with_settings(*paths: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of some settings, or of all if none is named.

    The command has a parameter `changes`, and gets there what was given, as `changed` takes it.
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
