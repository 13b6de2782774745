"""`refinetool eval`."""

from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from refinetool.cli import console, few_shot, options
from refinetool.cli.app import app
from refinetool.cli.options import JOB, MODEL
from refinetool.errors import UsageError
from refinetool.settings import EvaluateSettings, FewShotSettings

if TYPE_CHECKING:
    from refinetool.evaluate import Report

EVALUATE, FEW_SHOT = EvaluateSettings(), FewShotSettings()
FEW_SHOT_PANEL = "Few-shot: with --protocol few-shot"


@app.command("eval")
def evaluate(
    *,
    prediction: Annotated[Path, typer.Argument(metavar="PRED", help="Masks to evaluate.")],
    truth: Annotated[Path, typer.Argument(metavar="GT", help="Ground truth with the same ids.")],
    coarse: Annotated[
        Path | None,
        typer.Option("--coarse", help="Coarse masks that PRED was refined from; adds their values and the gains."),
    ] = None,
    candidates: Annotated[
        Path | None,
        typer.Option("--candidates", help="File written by refine --candidates; adds how well candidates were chosen."),
    ] = None,
    images: options.Images = None,
    file_format: options.Format = "auto",
    sizes: options.Sizes = None,
    follow_links: options.FollowLinks = False,
    mask_suffix: options.MaskSuffix = "",
    protocol: Annotated[
        Literal["auto", "coco", "lvis", "davis", "lvos", "none", "few-shot"],
        typer.Option(
            "--protocol",
            help="Rules for computing AP (coco, lvis) or J&F (davis, lvos). With few-shot, PRED is a reference "
            "encoder (embedded, or a weights file) or a baseline (prototype, grabcut), and GT annotated images.",
        ),
    ] = EVALUATE.protocol,
    max_dets: Annotated[
        int | None,
        typer.Option(
            "--max-dets",
            min=1,
            metavar="N",
            help="Detections that count for AP, per image and category; per image with lvis. "
            "[dim]\\[default: 100, lvis 300][/dim]",
            show_default=False,
        ),
    ] = None,
    class_agnostic: Annotated[bool, typer.Option("--class-agnostic", help="AP takes all categories as one.")] = False,
    unseen: Annotated[
        Path | None,
        typer.Option(
            "--unseen", help="Text file with one clip per line; their J&F is reported separately, as in LVOS."
        ),
    ] = None,
    boundary_ratio: Annotated[
        float,
        typer.Option(
            "--boundary-ratio", min=0, max=1, help="Width of the boundary band, as a fraction of the image diagonal."
        ),
    ] = EVALUATE.boundary_ratio,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers", min=1, help="Number of processes. [dim]\\[default: CPU cores less one, at most 8][/dim]"
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            "--plot", help="PNG to write: gain by object size and by quality of the coarse mask. Needs --coarse."
        ),
    ] = None,
    episodes: Annotated[
        Path | None,
        typer.Option(
            "--episodes",
            help="JSON file of the episodes: written, or read if it exists.",
            rich_help_panel=FEW_SHOT_PANEL,
            show_default=False,
        ),
    ] = None,
    count: Annotated[
        int, typer.Option("--count", min=1, help="Number of episodes to draw.", rich_help_panel=FEW_SHOT_PANEL)
    ] = FEW_SHOT.episodes,
    shots: Annotated[
        list[int] | None,
        typer.Option(
            "--shots",
            min=1,
            help="Number of references; may be given several times. [dim]\\[default: 1 and 5][/dim]",
            rich_help_panel=FEW_SHOT_PANEL,
            show_default=False,
        ),
    ] = None,
    kinds: Annotated[
        list[str] | None,
        typer.Option(
            "--kind",
            metavar="KIND",
            help="Kind of annotation: point, scribble, box or mask; may be given several times. "
            "[dim]\\[default: all four][/dim]",
            rich_help_panel=FEW_SHOT_PANEL,
            show_default=False,
        ),
    ] = None,
    classes: Annotated[
        list[str] | None,
        typer.Option(
            "--classes",
            metavar="NAME",
            help="Class, or a fold such as coco-20i:0 or pascal-5i:3; may be given several times. "
            "[dim]\\[default: all][/dim]",
            rich_help_panel=FEW_SHOT_PANEL,
            show_default=False,
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", min=0, help="Seed of the episodes.", rich_help_panel=FEW_SHOT_PANEL)
    ] = FEW_SHOT.seed,
    refine: Annotated[
        bool,
        typer.Option(
            "--refine",
            help="Measure refined masks too.",
            rich_help_panel=FEW_SHOT_PANEL,
            show_default=False,
            metavar="",
        ),
    ] = False,
    model: options.ModelName = JOB.model,
    checkpoint: options.Checkpoint = None,
    encoder_checkpoint: Annotated[
        str | None,
        typer.Option(
            "--encoder-checkpoint",
            metavar="PATH",
            help="Weights of the image encoder. Without it, those in the package or the cache.",
            rich_help_panel=MODEL,
            show_default=False,
        ),
    ] = None,
    device: options.Device = JOB.device,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print a Markdown table.")] = False,
    as_json: options.AsJson = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
) -> None:
    """Measure masks against ground truth: AP, IoU, boundary IoU, mBA; mIoU for class maps, J&F for clips."""
    if plot is not None and coarse is None:
        raise UsageError("--plot shows the gain over the coarse masks; name them with --coarse.")
    if as_json and as_markdown:
        raise UsageError("--json and --markdown exclude each other; choose one.")
    if protocol == "few-shot":
        few_shot.check_usage(coarse=coarse, candidates=candidates, plot=plot)
        few_shot.evaluate_few_shot(
            str(prediction),
            truth,
            images=images,
            episodes=episodes,
            count=count,
            shots=shots or (1, 5),
            kinds=kinds or (),
            classes=classes or (),
            seed=seed,
            refine=refine,
            model=model,
            checkpoint=checkpoint,
            encoder_checkpoint=encoder_checkpoint,
            device=device,
            as_json=as_json,
            as_markdown=as_markdown,
            quiet=quiet,
        )
        return
    from refinetool.evaluate import evaluate as measure
    from refinetool.formats import open_dataset

    paths = (prediction, truth) if coarse is None else (prediction, truth, coarse)
    opened = [
        open_dataset(
            path,
            images=images,
            format=None if file_format == "auto" else file_format,
            sizes=sizes,
            need_images=False,
            follow_links=follow_links,
            mask_suffix=mask_suffix,
        )
        for path in paths
    ]
    if plot is not None:
        from refinetool.evaluate import plot as plots
        from refinetool.formats.storage import IMAGE_FOLDER, refuse_clashes

        inputs = {"prediction": prediction, "ground truth": truth, "coarse file": coarse, "list of images": sizes}
        refuse_clashes(
            {"plot": plot},
            {**inputs, "file of candidates": candidates, IMAGE_FOLDER: images},
            images=chain.from_iterable(dataset.image_paths() for dataset in opened),
        )
        plots.check_plot({dataset.format for dataset in opened}, plot)
    total = len(opened[1])
    with console.counting("measuring", unit="images", quiet=quiet) as tell:
        report = measure(
            opened[0],
            opened[1],
            coarse=opened[2] if coarse is not None else None,
            candidates=candidates,
            boundary_ratio=boundary_ratio,
            protocol=protocol,
            max_detections=max_dets,
            class_agnostic=class_agnostic,
            unseen=None if unseen is None else unseen.read_text().split(),
            workers=EVALUATE.workers if workers is None else workers,
            on_progress=lambda done: tell(done, max(done, total)),
        )
    told = [f"{path}: {remark}" for path, dataset in zip(paths, opened, strict=True) for remark in dataset.remarks()]
    report = replace(report, remarks=(*told, *report.remarks))
    _print_report(report, with_coarse=coarse is not None, as_json=as_json, as_markdown=as_markdown)
    if plot is not None:
        plots.write_plot(report, plot)


def _print_report(report: "Report", *, with_coarse: bool, as_json: bool, as_markdown: bool) -> None:
    if as_json:
        console.dump(report.to_dict())
        return
    headings: tuple[str, ...] = ("", "coarse", "refined", "gain")
    rows: list[tuple[str, ...]] = [*report.rows()]
    if not with_coarse:
        headings, rows = ("", "value"), [(name, value) for name, _, value, _ in report.rows()]
    if as_markdown:
        console.markdown("", headings, rows, numbers=range(1, len(headings)))
        console.say("")
    else:
        console.table("", headings, rows, numbers=range(1, len(headings)))
    for note in report.notes():
        console.say(f"- {note}" if as_markdown else note, markup=False)
