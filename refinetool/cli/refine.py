"""`refinetool refine`."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from refinetool.cli import console, options
from refinetool.cli.app import app
from refinetool.cli.options import JOB
from refinetool.errors import DataError, Interrupted, UsageError
from refinetool.settings import METHODS, NO_GUARD, RELEASE


@app.command(
    help="Refine coarse masks: the same file back, with better masks.\n\n"
    "Ids, order and everything else stay as they are. A mask that can't be refined, or whose refined version is "
    "doubtful, stays coarse, and the summary says why; if images could not be read, the exit code is 1. What was "
    "interrupted continues with --resume."
)
def refine(
    *,
    coarse: Annotated[Path, typer.Argument(metavar="COARSE", help="COCO JSON, COCO results, or a folder of PNGs.")],
    images: options.Images = None,
    output: options.Output = None,
    file_format: options.Format = "auto",
    sizes: options.Sizes = None,
    max_pixels: options.MaxPixels = None,
    overwrite: options.Overwrite = False,
    model: options.ModelName = JOB.model,
    checkpoint: options.Checkpoint = None,
    device: options.Device = JOB.device,
    precision: options.Precision = JOB.precision,
    iou_adapter: options.IouAdapter = None,
    image_batch: options.ImageBatch = None,
    prompt_batch: options.PromptBatch = None,
    limit: options.Limit = None,
    dry_run: options.DryRun = False,
    record: options.Record = None,
    candidates: options.Candidates = None,
    resume: options.Resume = False,
    fresh: options.Fresh = False,
    threads: options.Threads = None,
    seed: options.Seed = None,
    quiet: options.Quiet = False,
    as_json: options.AsJson = False,
    method: options.Method = "samrefiner",
    view: options.View = None,
    view_margin: options.ViewMargin = None,
    passes: options.Passes = None,
    cascade: options.Cascade = None,
    selection: options.Selection = None,
    truth: options.Truth = None,
    snap: options.Snap = None,
    trust: options.Trust = None,
    split_rule: options.SplitRule = None,
    grid_points: options.GridPoints = None,
    grid_min_iou: options.GridMinIou = None,
    grid_min_stability: options.GridMinStability = None,
    include_crowd: options.IncludeCrowd = False,
    compat: options.Compat = None,
    min_predicted_iou: options.MinPredictedIou = None,
    min_expected_gain: options.MinExpectedGain = None,
    min_coarse_iou: options.MinCoarseIou = None,
    max_area_ratio: options.MaxAreaRatio = None,
    no_guard: options.NoGuard = False,
    point: options.Point = None,
    no_point: options.NoPoint = False,
    no_negative: options.NoNegative = False,
    no_box: options.NoBox = False,
    no_mask: options.NoMask = False,
    border_is_background: options.BorderIsBackground = False,
    box: options.BoxKind = None,
    elastic_threshold: options.ElasticThreshold = None,
    elastic_similarity: options.ElasticSimilarity = None,
    elastic_step: options.ElasticStep = None,
    elastic_step_px: options.ElasticStepPx = None,
    elastic_rounds: options.ElasticRounds = None,
    gaussian_shape: options.GaussianShape = None,
    gaussian_amplitude: options.GaussianAmplitude = None,
    gaussian_span: options.GaussianSpan = None,
    gaussian_background: options.GaussianBackground = None,
    weaken_expanded: options.WeakenExpanded = False,
) -> None:
    if compat == "release" and method != "samrefiner":
        raise UsageError(f"--compat release is about the method samrefiner; leave it or --method {method} out")
    settings = options.changed(
        RELEASE if compat == "release" else METHODS[method],
        {
            "guard": NO_GUARD if no_guard else None,
            "passes": passes,
            "cascade": cascade,
            "selection": selection,
            "include_crowd": include_crowd or None,
            "seed": seed,
            "image_batch": image_batch,
            "prompt_batch": prompt_batch,
            "max_pixels": max_pixels,
            "view.mode": view,
            "view.margin": view_margin,
            "snap.mode": snap,
            "trust.mode": trust,
            "split.rule": split_rule,
            "grid.points_per_side": grid_points,
            "grid.min_predicted_iou": grid_min_iou,
            "grid.min_stability": grid_min_stability,
            "guard.min_predicted_iou": min_predicted_iou,
            "guard.min_expected_gain": min_expected_gain,
            "guard.min_coarse_iou": min_coarse_iou,
            "guard.max_area_ratio": max_area_ratio,
            "prompts.point": point,
            "prompts.use_point": False if no_point else None,
            "prompts.use_negative": False if no_negative else None,
            "prompts.use_box": False if no_box else None,
            "prompts.use_mask": False if no_mask else None,
            "prompts.border_is_background": border_is_background or None,
            "prompts.box": box,
            "prompts.elastic_threshold": elastic_threshold,
            "prompts.elastic_similarity": elastic_similarity,
            "prompts.elastic_step": elastic_step,
            "prompts.elastic_step_px": elastic_step_px,
            "prompts.elastic_rounds": elastic_rounds,
            "prompts.gaussian_shape": gaussian_shape,
            "prompts.gaussian_amplitude": gaussian_amplitude,
            "prompts.gaussian_span": gaussian_span,
            "prompts.gaussian_background": gaussian_background,
            "prompts.weaken_expanded": weaken_expanded or None,
        },
    )
    asked = settings.prompts
    if not (asked.use_point or asked.use_negative or asked.use_box or asked.use_mask):
        raise UsageError("nothing is left to ask the model; leave one of the prompts on")

    from refinetool.backends.models import find_model
    from refinetool.running.run import refine_dataset

    find_model(model)
    destination = output or default_output(coarse)
    try:
        with console.listening(waiting="loading the model", quiet=quiet or dry_run) as listener:
            summary = refine_dataset(
                coarse,
                images=images,
                output=destination,
                model=model,
                checkpoint=checkpoint,
                device=device,
                precision=precision,
                settings=settings,
                format=None if file_format == "auto" else file_format,
                sizes=sizes,
                limit=limit,
                resume=resume,
                fresh=fresh,
                overwrite=overwrite,
                dry_run=dry_run,
                record=record,
                candidates=candidates,
                truth=truth,
                iou_adapter=iou_adapter,
                threads=threads or JOB.threads,
                on_progress=listener,
            )
    except Interrupted as interrupted:
        raise Interrupted(f"{interrupted}\nContinue with: {resume_command(sys.argv[1:])}") from None
    if as_json:
        console.dump(console.as_json(summary))
    elif dry_run:
        console.foretell(summary, model=model, output=destination)
    elif not quiet:
        console.summarise(summary)
    if summary.failed:
        console.complain_of_images(summary)
        raise typer.Exit(DataError.exit_code)


def resume_command(arguments: list[str]) -> str:
    """The command line that continues an interrupted one."""
    kept = [argument for argument in arguments if argument not in ("--fresh", "--resume")]
    return shlex.join(["refinetool", *kept, "--resume"])


def default_output(coarse: Path) -> Path:
    """`masks.json` -> `masks.refined.json`; folder `masks` -> `masks-refined`."""
    absolute = coarse.absolute()
    if coarse.is_dir():
        return absolute.with_name(f"{absolute.name}-refined")
    return coarse.with_name(f"{coarse.stem}.refined{coarse.suffix}")
