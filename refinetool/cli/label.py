"""`refinetool label`."""

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from refinetool.cli import console, options
from refinetool.cli.app import app
from refinetool.cli.options import FILES, JOB, METHOD, MODEL
from refinetool.cli.refine import resume_command
from refinetool.cli.settings_options import changed, with_settings
from refinetool.errors import DataError, Interrupted
from refinetool.locations import location
from refinetool.settings import LabelSettings, RefineSettings
from refinetool.statuses import Reason

if TYPE_CHECKING:
    from refinetool.running.summary import Summary

LABEL = LabelSettings()
LABELS = "Labels: which masks are rejected"

REJECTED: dict[Reason, str] = {
    Reason.EMPTY_RESULT: "the class was not found",
    Reason.TOO_SMALL: "the mask is too small; --min-area allows smaller ones",
    Reason.LOW_SCORE: "the score is too low; --min-score allows lower ones",
    Reason.DRIFT: "refining changed the mask too much; a lower --min-agreement allows that",
    Reason.IMAGE_MISSING: "the image is missing",
    Reason.IMAGE_OUTSIDE: "the image is a link out of its folder; --follow-links allows that",
    Reason.IMAGE_TOO_LARGE: "the image is too large; --max-pixels allows more",
    Reason.IMAGE_UNREADABLE: "the image can't be read",
    Reason.OUT_OF_MEMORY: "the image needs more memory than there is",
    Reason.SIZE_MISMATCH: "the size of the image is not that in its header",
    Reason.UNREADABLE: "the file can't be read",
    Reason.WORKER_DIED: "the worker process died twice over the image",
}
"""How a summary explains why a class has no mask in an image."""


@app.command(
    help="Make coarse masks from a few annotated reference images, and refine them.\n\n"
    "REFS marks objects in some images by masks, boxes, points or scribbles: a COCO JSON file as annotation tools "
    "export it, or a folder of class maps. In every image of IMAGES, one mask per class is written, with a score. "
    "Masks that are doubtful are left out, and the summary says why. Continue an interrupted run with --resume."
)
@with_settings("max_pixels", "image_batch", "prompt_batch", "view.mode", "snap.mode")
def label(
    *,
    images: Annotated[
        Path, typer.Argument(metavar="IMAGES", help="Folder of the images to label, or one image.", parser=location)
    ],
    references: Annotated[
        Path,
        typer.Option(
            "--references",
            metavar="REFS",
            help="Annotated references: COCO JSON with segmentation, scribble, points or bbox; or a folder of class "
            "maps.",
            rich_help_panel=FILES,
            parser=location,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="PATH",
            help="COCO file to write, such as labels.json; without .json, a folder of class maps.",
            rich_help_panel=FILES,
        ),
    ],
    reference_images: Annotated[
        Path | None,
        typer.Option(
            "--reference-images",
            metavar="PATH",
            help="Folder of the reference images. Without it, they are looked for beside REFS.",
            rich_help_panel=FILES,
            show_default=False,
            parser=location,
        ),
    ] = None,
    follow_links: options.FollowLinks = False,
    record: options.Record = None,
    overwrite: options.Overwrite = False,
    model: options.ModelName = JOB.model,
    checkpoint: options.Checkpoint = None,
    device: options.Device = JOB.device,
    precision: options.Precision = JOB.precision,
    head: options.Head = JOB.head,
    reference_encoder: Annotated[
        str | None,
        typer.Option(
            "--reference-encoder",
            metavar="PATH",
            help="Weights that refinetool train reference wrote for the model, or random:SEED. Without it, those in "
            "the package, for the embedded model.",
            rich_help_panel=MODEL,
            show_default=False,
        ),
    ] = None,
    encoder: Annotated[
        Literal["embedded", "resnet50", "vgg16", "dinov2-b14"] | None,
        typer.Option(
            "--encoder",
            help="Image encoder, needed only with --reference-encoder random:SEED; trained encoders name theirs.",
            rich_help_panel=MODEL,
            show_default=False,
        ),
    ] = None,
    encoder_checkpoint: Annotated[
        str | None,
        typer.Option(
            "--encoder-checkpoint",
            metavar="PATH",
            help="Weights of the image encoder, or random:SEED. Without it, those in the package or the cache.",
            rich_help_panel=MODEL,
            show_default=False,
        ),
    ] = None,
    refine: Annotated[
        bool,
        typer.Option(
            "--refine",
            help="Refine the masks in the same pass.",
            rich_help_panel=METHOD,
            show_default=False,
            metavar="",
        ),
    ] = False,
    threshold: Annotated[
        float | None,
        typer.Option(
            "--threshold",
            min=0,
            max=1,
            help="Probability above which a pixel belongs to a class; the likeliest class wins. "
            "[dim]\\[default: that of the reference encoder][/dim]",
            rich_help_panel=LABELS,
            show_default=False,
        ),
    ] = None,
    min_score: Annotated[
        float, typer.Option("--min-score", min=0, max=1, help="Minimum score of a mask.", rich_help_panel=LABELS)
    ] = LABEL.min_score,
    min_area: Annotated[
        int, typer.Option("--min-area", min=1, help="Minimum area of a mask, in pixels.", rich_help_panel=LABELS)
    ] = LABEL.min_area_px,
    min_agreement: Annotated[
        float,
        typer.Option(
            "--min-agreement",
            min=0,
            max=1,
            help="With --refine: minimum IoU of a mask before and after it was refined.",
            rich_help_panel=LABELS,
        ),
    ] = LABEL.min_agreement,
    limit: options.Limit = None,
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
    from refinetool.label import label_dataset

    find_model(model)
    settings = changed(RefineSettings(), changes)
    labels = replace(
        LABEL,
        threshold=threshold,
        min_score=min_score,
        min_area_px=min_area,
        min_agreement=min_agreement,
        max_pixels=settings.max_pixels,
    )
    try:
        with console.listening(waiting="loading the models", quiet=quiet) as listener:
            summary = label_dataset(
                images,
                references,
                output=output,
                reference_images=reference_images,
                model=model,
                checkpoint=checkpoint,
                device=device,
                precision=precision,
                head=head,
                reference_encoder=reference_encoder,
                image_encoder=encoder,
                encoder_checkpoint=encoder_checkpoint,
                settings=labels,
                refine=settings if refine else None,
                follow_links=follow_links,
                limit=limit,
                resume=resume,
                fresh=fresh,
                overwrite=overwrite,
                record=record,
                workers=options.worker_count(workers),
                ray_address=ray_address,
                threads=threads,
                on_progress=listener,
            )
    except Interrupted as interrupted:
        raise Interrupted(f"{interrupted}\nContinue with: {resume_command(sys.argv[1:])}") from None
    if as_json:
        console.dump(console.as_json(summary))
    elif not quiet:
        summarise(summary)
    if summary.failed:
        console.complain_of_images(summary)
        raise typer.Exit(DataError.exit_code)


def summarise(summary: "Summary") -> None:
    """Print what was found, in a few lines on stdout."""
    change = "" if summary.mean_change is None else f"; refining changed {100 * summary.mean_change:.1f} % (1 - IoU)"
    console.say(f"[bold]{summary.refined} masks in {summary.images} images[/bold]{change}")
    for reason, count in sorted(summary.kept.items(), key=lambda item: (-item[1], item[0])):
        console.say(f"  {count} without: {REJECTED[reason]}", markup=False)
    console.say_run(summary)
