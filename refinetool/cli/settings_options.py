"""Options that change a refinement setting: one row of `SETTINGS` each.

`with_settings` adds the named ones to a command. They are None unless given: the default shown in `--help` is that of
`settings`, and `--compat` may set another.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, get_type_hints

from refinetool.cli.options import FILES, GUARD, METHOD, MODEL, PROMPTS, REFINE, RUN, flag, optional
from refinetool.settings import BATCHES, MAX_SEED, RefineSettings


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
            hint: Any = Annotated[bool, flag(self.flag, text=self.text, panel=self.panel)]
            return inspect.Parameter(self.variable, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=hint)
        kind = get_type_hints(type(owner))[name] | None
        metavar = {int: "N", float: "X"}.get(next(iter(set(getattr(kind, "__args__", ())) & {int, float}), str))
        option = optional(
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
        "Simplify polygons, moving their outline by at most this many pixels. Below 0.25, the outline is exact.",
        low=0,
    ),
    Setting(
        "polygons.holes",
        "--holes",
        FILES,
        "Where a polygon's refined mask has holes: keep a polygon, with cuts into the holes, fill them, or write RLE.",
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
    Setting("cascade", "--cascade", METHOD, "What later passes are prompted with; see --passes."),
    Setting("selection", "--selection", METHOD, "Which candidate to choose; oracle needs --truth."),
    Setting("snap.mode", "--snap", METHOD, "Edge-aware filter at full resolution."),
    Setting(
        "specks.max_px",
        "--speck-px",
        METHOD,
        "Islands and holes that the coarse mask did not have are removed up to this size, in pixels.",
        low=0,
    ),
    Setting(
        "specks.max_share",
        "--speck-share",
        METHOD,
        "The same, as a fraction of the mask's area; the larger of the two counts.",
        low=0,
        high=1,
    ),
    Setting(
        "competition.weight",
        "--competition",
        METHOD,
        "How strongly the objects of an image compete for pixels; 0 refines each by itself.",
        low=0,
        default=MODEL_DEFAULT,
    ),
    Setting(
        "competition.arbitrate",
        "--no-arbiter",
        METHOD,
        "Leave out the model's arbiters, small networks that see all masks of an image and correct each.",
        value=False,
    ),
    Setting(
        "exclusive.enabled",
        "--exclusive",
        METHOD,
        "Refined COCO instances don't overlap, and neighbours that touched have no gap between them.",
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
        "IoU of the refined mask, estimated from the model's logits, from which half of --min-expected-gain is enough.",
        low=0,
        high=1,
        default=MODEL_DEFAULT,
    ),
    Setting(
        "guard.min_part_confidence",
        "--min-part-confidence",
        GUARD,
        "Changed parts are undone if their mean probability of being right, by the model's logits, is below this.",
        low=0,
        high=1,
        default=MODEL_DEFAULT,
    ),
    Setting(
        "guard.min_part_depth",
        "--min-part-depth",
        GUARD,
        "Changed parts of the outline are undone if they are shallower than this, in cells of the model's output.",
        low=0,
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
        "Minimum fraction of a refined mask that must be left where other masks of a shared map take pixels.",
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
        low=1e-6,
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
