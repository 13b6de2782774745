"""The commands: parse, build settings, make one library call, print, exit.

Nothing heavy is imported before a command runs, so that `--help` is instant.
"""

import shlex
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from refinetool import __version__, console, options
from refinetool.errors import DataError, Interrupted, RefinetoolError, UsageError
from refinetool.options import JOB, REFINE
from refinetool.settings import NO_GUARD, RELEASE, EvaluateSettings, TrainSettings

if TYPE_CHECKING:
    from refinetool.backends.weights import Status

EVALUATE, TRAIN = EvaluateSettings(), TrainSettings()

app = typer.Typer(
    name="refinetool",
    help="Turn coarse segmentation masks into precise ones: the same file back, with better masks.",
    epilog="First steps: refinetool demo, then refinetool refine masks.json --images photos",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
models = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")
train = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")
app.add_typer(models, name="models", help="List models, fetch their weights, verify them.")
app.add_typer(train, name="train", help="Train a model on your own images.")


def main() -> None:
    """Entry point of the `refinetool` command."""
    try:
        app()
    except RefinetoolError as error:
        console.complain(str(error))
        sys.exit(error.exit_code)


@app.callback(invoke_without_command=True)
def version(
    show: Annotated[bool, typer.Option("--version", help="Show the version and exit.", is_eager=True)] = False,
) -> None:
    if show:
        console.say(f"refinetool {__version__}")
        raise typer.Exit


# --- refine


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
    image_batch: options.ImageBatch = None,
    prompt_batch: options.PromptBatch = None,
    limit: options.Limit = None,
    dry_run: options.DryRun = False,
    record: options.Record = None,
    resume: options.Resume = False,
    fresh: options.Fresh = False,
    threads: options.Threads = None,
    seed: options.Seed = None,
    quiet: options.Quiet = False,
    as_json: options.AsJson = False,
    view: options.View = None,
    view_margin: options.ViewMargin = None,
    passes: options.Passes = None,
    selection: options.Selection = None,
    snap: options.Snap = None,
    split_rule: options.SplitRule = None,
    include_crowd: options.IncludeCrowd = False,
    compat: options.Compat = None,
    min_predicted_iou: options.MinPredictedIou = None,
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
    settings = options.changed(
        RELEASE if compat == "release" else REFINE,
        {
            "guard": NO_GUARD if no_guard else None,
            "passes": passes,
            "selection": selection,
            "include_crowd": include_crowd or None,
            "seed": seed,
            "image_batch": image_batch,
            "prompt_batch": prompt_batch,
            "max_pixels": max_pixels,
            "view.mode": view,
            "view.margin": view_margin,
            "snap.mode": snap,
            "split.rule": split_rule,
            "guard.min_predicted_iou": min_predicted_iou,
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
    from refinetool.runners import refine_dataset

    find_model(model)
    destination = output or default_output(coarse)
    try:
        with console.listening(quiet=quiet or dry_run) as listener:
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


# --- demo


@app.command()
def demo(
    *,
    folder: Annotated[Path, typer.Argument(metavar="[FOLDER]", help="Where to write.")] = Path("refinetool-demo"),
    model: options.ModelName = JOB.model,
    checkpoint: options.Checkpoint = None,
    device: options.Device = JOB.device,
    precision: options.Precision = JOB.precision,
    quiet: options.Quiet = False,
    as_json: options.AsJson = False,
) -> None:
    """Refine hand-drawn outlines of objects in built-in photographs: no network, no data, a few seconds."""
    from refinetool.demo import run_demo

    with console.listening(quiet=quiet) as listener:
        result = run_demo(
            folder,
            model=model,
            checkpoint=checkpoint,
            device=device,
            precision=precision,
            settings=REFINE,
            threads=JOB.threads,
            on_progress=listener,
        )
    if as_json:
        console.dump({**console.as_json(result.summary), "pictures": [str(path) for path in result.pictures]})
    elif not quiet:
        console.summarise(result.summary)
        console.say("\nLook at the pictures, coarse on the left and refined on the right:")
        for path in result.pictures:
            console.say(f"  {path}", markup=False)
        console.say("\nThe same by hand:")
        command = ["refinetool", "refine", str(result.coarse), "--images", str(result.images), "-o", "refined.json"]
        console.say(f"  {shlex.join(command)}", markup=False)


# --- models


@models.command("list")
def models_list(as_json: options.AsJson = False) -> None:
    """Show the models, where their weights come from, and which are here."""
    from refinetool.backends.models import MODELS
    from refinetool.backends.weights import cache_folder, listing

    states = {status.weights.model: status for status in listing()}
    if as_json:
        console.dump({"cache": str(cache_folder()), "models": [_model_record(name, states) for name in MODELS]})
        return
    rows = []
    for name, model in MODELS.items():
        status = states.get(name)
        size = f"{status.weights.size / 1e6:.0f} MB" if status else ""
        rows.append((name, model.about, size, status.state if status else "built in"))
    console.table("", ("name", "what", "weights", "state"), rows, numbers=(2,))
    console.say(f"\nWeights are kept in {cache_folder()}", markup=False)
    console.say("refinetool models fetch NAME brings them there; --checkpoint takes a file from anywhere.")


def _model_record(name: str, states: "Mapping[str, Status]") -> dict[str, object]:
    from refinetool.backends.models import MODELS

    record: dict[str, object] = {"name": name, "about": MODELS[name].about, "state": "built in"}
    if status := states.get(name):
        weights = status.weights
        origin = {"url": weights.url, "bytes": weights.size, "sha256": weights.sha256, "sha256_from": weights.origin}
        record |= {"state": status.state, "path": str(status.path), **origin}
    return record


@models.command("fetch")
def models_fetch(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Models, as `models list` names them.")],
    quiet: options.Quiet = False,
) -> None:
    """Download published weights, continue where a download stopped, and check their SHA-256."""
    from refinetool.backends import weights

    for weight in [weights.find(name) for name in names]:
        with console.downloading(weight.filename, quiet=quiet) as on_progress:
            path = weights.fetch(weight.model, on_progress=on_progress)
        if not quiet:
            console.say(f"{weight.model}: {path}", markup=False)


@models.command("verify")
def models_verify(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME...]", help="Models; without any, all that are here.")
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Check weights that are here against the published SHA-256."""
    from refinetool.backends import weights

    here = [status.weights.model for status in weights.listing() if status.state != "missing"]
    found = [weights.verify(name) for name in names or here]
    if as_json:
        console.dump({status.weights.model: {"state": status.state, "detail": status.detail} for status in found})
    else:
        for status in found:
            console.say(f"{status.weights.model}: {status.state}: {status.path}: {status.detail}", markup=False)
        if not found:
            console.say(f"there are no weights in {weights.cache_folder()}", markup=False)
    if any(status.state != "verified" for status in found):
        raise typer.Exit(1)


# --- eval


@app.command("eval")
def evaluate(
    *,
    prediction: Annotated[Path, typer.Argument(metavar="PRED", help="Masks to measure.")],
    truth: Annotated[Path, typer.Argument(metavar="GT", help="Their ground truth: the same ids.")],
    coarse: Annotated[
        Path | None, typer.Option("--coarse", help="What PRED was refined from: adds before and gain.")
    ] = None,
    images: options.Images = None,
    file_format: options.Format = "auto",
    sizes: options.Sizes = None,
    boundary_ratio: Annotated[
        float,
        typer.Option(
            "--boundary-ratio", min=0, max=1, help="Width of the boundary band, as a share of the image diagonal."
        ),
    ] = EVALUATE.boundary_ratio,
    as_json: options.AsJson = False,
) -> None:
    """Measure masks against ground truth: IoU and boundary IoU by id, mIoU for class maps."""
    from refinetool.evaluate import evaluate as measure
    from refinetool.formats import open_dataset

    opened = [
        open_dataset(
            path,
            images=images,
            format=None if file_format == "auto" else file_format,
            sizes=sizes,
            need_images=False,
        )
        for path in (prediction, truth, *(() if coarse is None else (coarse,)))
    ]
    report = measure(
        opened[0], opened[1], coarse=opened[2] if coarse is not None else None, boundary_ratio=boundary_ratio
    )
    if as_json:
        console.dump(report.to_dict())
        return
    rows = report.rows()
    if coarse is None:
        console.table("", ("", "value"), [(name, value) for name, _, value, _ in rows], numbers=(1,))
    else:
        console.table("", ("", "coarse", "refined", "gain"), rows, numbers=(1, 2, 3))
    for note in report.notes():
        console.say(note, markup=False)


# --- train


@train.command("embedded")
def train_embedded_model(
    *,
    data: Annotated[
        list[Path],
        typer.Option("--data", help="Folder with images/, masks/ and split.json; may be given several times."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for checkpoint, metrics and weights.")],
    steps: Annotated[int, typer.Option("--steps", min=1, help="Optimiser steps.")] = TRAIN.steps,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Seed of weights and examples.")] = TRAIN.seed,
    workers: Annotated[int, typer.Option("--workers", min=0, help="Processes that make examples.")] = TRAIN.workers,
    device: options.Device = JOB.device,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the checkpoint in the output.")] = False,
    quiet: options.Quiet = False,
) -> None:
    """Train the embedded model from scratch."""
    from refinetool.backends.models import pick_device
    from refinetool.train.embedded import train_embedded

    with console.training(quiet=quiet) as listener:
        weights = train_embedded(
            data,
            output,
            settings=replace(TRAIN, steps=steps, seed=seed, workers=workers),
            device=pick_device(device),
            resume=resume,
            on_progress=listener,
        )
    if not quiet:
        console.say(f"written to {weights}; refinetool refine takes it with --checkpoint", markup=False)
