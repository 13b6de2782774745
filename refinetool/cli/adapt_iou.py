"""`refinetool adapt-iou`."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from refinetool.cli import console, options
from refinetool.cli.app import app
from refinetool.cli.options import JOB, REFINE
from refinetool.cli.settings_options import changed, with_settings
from refinetool.errors import DataError
from refinetool.settings import ADAPT_RECIPES, MAX_SEED, AdaptSettings

if TYPE_CHECKING:
    from refinetool.train.iou.adapt import AdaptSummary

ADAPT = AdaptSettings()
TRAINING = "Training"
FEW = 100
"""Number of held-out answers below which a change of a few points may be chance."""


@app.command(
    "adapt-iou",
    help="Train an IoU adapter on your coarse masks, without labels: it learns which candidate to choose.\n\n"
    "The adapter is meant for prompts without a mask and refine --selection predicted. Some images are held out to "
    "measure whether it helps; if it does not, nothing is written and the exit code is 1. Use the adapter with refine "
    "--iou-adapter.",
)
@with_settings("max_pixels", "image_batch", "prompt_batch", "view.mode", "prompts.box")
def adapt_iou(
    *,
    coarse: options.Coarse,
    images: options.Images = None,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="Adapter file to write (.safetensors).", rich_help_panel=options.FILES),
    ],
    file_format: options.Format = "auto",
    sizes: options.Sizes = None,
    follow_links: options.FollowLinks = False,
    mask_suffix: options.MaskSuffix = "",
    overwrite: options.Overwrite = False,
    model: options.ModelName = JOB.model,
    checkpoint: options.Checkpoint = None,
    device: options.Device = JOB.device,
    precision: options.Precision = JOB.precision,
    head: options.Head = JOB.head,
    recipe: Annotated[
        Literal["auto", "paper", "release", "single"],
        typer.Option(
            "--recipe",
            help="Training recipe; auto is single for the embedded model and paper for others.",
            rich_help_panel=TRAINING,
        ),
    ] = "auto",
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps",
            metavar="N",
            min=1,
            help="Training steps of 5 images each. [dim]\\[default: the recipe's][/dim]",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            "--learning-rate",
            metavar="X",
            min=0,
            help="Initial learning rate. [dim]\\[default: the recipe's][/dim]",
            rich_help_panel=TRAINING,
        ),
    ] = None,
    held_out: Annotated[
        float,
        typer.Option(
            "--held-out",
            metavar="X",
            min=0,
            max=1,
            help="Fraction of the images held out for measuring.",
            rich_help_panel=TRAINING,
        ),
    ] = ADAPT.held_out,
    max_images: Annotated[
        int,
        typer.Option(
            "--max-images",
            metavar="N",
            min=2,
            help="Maximum number of images to use, drawn at random.",
            rich_help_panel=TRAINING,
        ),
    ] = ADAPT.max_images,
    seed: Annotated[
        int,
        typer.Option(
            "--seed",
            metavar="N",
            min=0,
            max=MAX_SEED,
            help="Random seed of weights, order and held-out images.",
            rich_help_panel=TRAINING,
        ),
    ] = ADAPT.seed,
    keep: Annotated[
        bool, typer.Option("--keep", help="Write the adapter even if it does not help.", rich_help_panel=TRAINING)
    ] = False,
    keep_features: Annotated[
        bool,
        typer.Option(
            "--keep-features",
            help="Keep the stored model features, to try another recipe.",
            rich_help_panel=TRAINING,
        ),
    ] = False,
    resume: options.Resume = False,
    fresh: options.Fresh = False,
    workers: options.Workers = str(JOB.workers),
    ray_address: options.RayAddress = None,
    threads: options.Threads = None,
    quiet: options.Quiet = False,
    as_json: options.AsJson = False,
    changes: Mapping[str, object],
) -> None:
    from refinetool.backends.models import find_model
    from refinetool.train.iou.adapt import adapt_iou as adapt
    from refinetool.train.iou.adapt import recipe_for

    find_model(model)
    chosen = recipe_for(model) if recipe == "auto" else ADAPT_RECIPES[recipe]
    given = {"steps": steps, "learning_rate": learning_rate}
    chosen = dataclasses.replace(
        chosen,
        held_out=held_out,
        max_images=max_images,
        seed=seed,
        **{name: value for name, value in given.items() if value is not None},  # type: ignore[arg-type]
    )
    settings = changed(REFINE, changes)
    with console.counting("collecting features", unit="images", quiet=quiet) as listener:
        summary = adapt(
            coarse,
            output=output,
            images=images,
            model=model,
            checkpoint=checkpoint,
            device=device,
            precision=precision,
            head=head,
            recipe=chosen,
            settings=settings,
            format=None if file_format == "auto" else file_format,
            sizes=sizes,
            follow_links=follow_links,
            mask_suffix=mask_suffix,
            resume=resume,
            fresh=fresh,
            overwrite=overwrite,
            keep=keep,
            keep_features=keep_features,
            workers=options.worker_count(workers),
            ray_address=ray_address,
            threads=threads,
            on_progress=listener,
        )
    if as_json:
        console.dump(console.as_json(summary))
    elif not quiet:
        tell(summary)
    for sentence in summary.errors:
        console.complain(sentence)
    if not summary.helps:
        console.complain(verdict(summary))
    if summary.output is None:
        raise typer.Exit(DataError.exit_code)


def tell(summary: "AdaptSummary") -> None:
    """Print the results as a table, and what was done, on stdout."""
    words = {"point": "points alone", "box": "box alone", "single": "both of these", "all": "all prompts"}
    console.table(
        "",
        ("held out", "answers", "top-1", "after", "coarse IoU", "after", "changed"),
        [
            (
                words[one.prompts],
                str(one.answers),
                f"{one.top1_before:.1%}",
                f"{one.top1_after:.1%}",
                f"{one.coarse_iou_before:.3f}",
                f"{one.coarse_iou_after:.3f}",
                f"{one.changed:.1%}",
            )
            for one in summary.figures
        ],
        numbers=range(1, 7),
    )
    reused = f", {summary.reused} of them from an earlier run" if summary.reused else ""
    images, masks = console.counted(summary.images, "image"), console.counted(summary.masks, "mask")
    console.say(f"{images} with {masks}{reused}: {summary.fit_images} for training, {summary.held_out_images} held out")
    console.say(
        f"features took {console.duration(summary.gather_seconds)}, training {console.duration(summary.train_seconds)}"
    )
    console.say_notes(summary.notes)
    console.say_crashes(summary.crashes)
    single = summary.of("single")
    if summary.helps:
        gain = 100 * (single.top1_after - single.top1_before)
        console.say(f"[bold]adaption helps: top-1 of single prompts rises by {gain:.1f} points[/bold]")
    if single.answers < FEW:
        console.say(f"only {single.answers} answers were held out: a difference of a few points may be chance")
    if summary.features is not None:
        console.say(f"features are kept in {summary.features}: --resume tries another recipe in seconds", markup=False)
    if summary.output is not None:
        console.say(f"written to {summary.output}; use it with refinetool refine --iou-adapter", markup=False)


def verdict(summary: "AdaptSummary") -> str:
    """Return the message for an adapter that does not help."""
    single = summary.of("single")
    written = (
        "the adapter was written because of --keep"
        if summary.output is not None
        else "nothing was written; refine without an adapter, give more images, or try another --recipe with --resume"
    )
    return (
        f"adaption does not help here: top-1 accuracy of single prompts on held-out masks is {single.top1_after:.1%} "
        f"with the adapter and {single.top1_before:.1%} without; {written}"
    )
