"""`refinetool ablate`."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from refinetool.cli import console, options
from refinetool.cli.app import app
from refinetool.cli.options import JOB
from refinetool.settings import ABLATION, EvaluateSettings, RefineSettings

if TYPE_CHECKING:
    from refinetool.ablation import Score, SplitTable, Table

EVALUATE = EvaluateSettings()

TITLES = {
    "prompts": "Prompts (SAMRefiner, table 1)",
    "points": "Position of the point (table 2a)",
    "boxes": "Tight and elastic box (table 2b)",
    "split": "Split, then merge (table 2c)",
    "methods": "Methods (table 7)",
    "selection": "Selection of the candidate",
    "cascade": "Further passes",
}


@app.command()
def ablate(
    *,
    coarse: Annotated[Path, typer.Argument(metavar="COARSE", help="Coarse masks.")],
    truth: Annotated[Path, typer.Argument(metavar="GT", help="Ground truth with the same ids.")],
    images: options.Images = None,
    file_format: options.Format = "auto",
    sizes: options.Sizes = None,
    follow_links: options.FollowLinks = False,
    mask_suffix: options.MaskSuffix = "",
    model: options.ModelName = JOB.model,
    checkpoint: options.Checkpoint = None,
    device: options.Device = JOB.device,
    precision: options.Precision = JOB.precision,
    head: options.Head = JOB.head,
    iou_adapter: options.IouAdapter = None,
    tables: Annotated[
        list[str] | None,
        typer.Option(
            "--table",
            metavar="NAME",
            help=f"Table to print: {', '.join(TITLES)}. May be given several times. Without it, the paper's tables.",
            show_default=False,
        ),
    ] = None,
    limit: options.Limit = None,
    guarded: Annotated[
        bool, typer.Option("--guarded", help="Use guard and snapping. Without it, the model's own masks are measured.")
    ] = False,
    boundary_ratio: Annotated[
        float,
        typer.Option(
            "--boundary-ratio", min=0, max=1, help="Width of the boundary band, as a fraction of the image diagonal."
        ),
    ] = EVALUATE.boundary_ratio,
    quiet: options.Quiet = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print the tables as Markdown.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Print the tables of the SAMRefiner paper for your data and model: the effect of each prompt, box and method."""
    from refinetool.ablation import ablate as measure
    from refinetool.ablation import tables_named

    base = replace(RefineSettings(), selection="predicted") if guarded else ABLATION
    with console.counting("refining in every way", unit="images", quiet=quiet) as on_progress:
        found = measure(
            coarse,
            truth,
            images=images,
            tables=tables_named(tables) if tables else None,
            model=model,
            checkpoint=checkpoint,
            device=device,
            precision=precision,
            head=head,
            iou_adapter=iou_adapter,
            base=base,
            format=None if file_format == "auto" else file_format,
            sizes=sizes,
            follow_links=follow_links,
            mask_suffix=mask_suffix,
            limit=limit,
            boundary_ratio=boundary_ratio,
            on_progress=on_progress,
        )
    if as_json:
        console.dump({"model": model, "tables": [console.as_json(table) for table in found]})
        return
    for table in found:
        headings, rows = laid_out(table)
        show = console.markdown if as_markdown else console.table
        show(TITLES[table.name], headings, rows, numbers=range(1, len(headings)))
        console.say("")


def laid_out(table: "Table | SplitTable") -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return headings and rows of one table; values are multiplied by 100."""
    from refinetool.ablation import SplitTable

    if isinstance(table, SplitTable):
        return ("", "mIoU", "gain"), [
            (score.name, f"{100 * score.miou:.2f}", f"{100 * (score.miou - table.plain[0].miou):+.2f}")
            for score in table.plain
        ]
    headings: tuple[str, ...] = ("", "IoU", "boundary IoU", "top-1", "min")
    rows: list[tuple[str, ...]] = [
        (score.name, *_figures(score), f"{score.seconds / 60:.1f}" if number else "")
        for number, score in enumerate(table.plain)
    ]
    if table.adapted is not None:
        headings = (*headings, "IoU, adapted", "boundary IoU, adapted", "top-1, adapted")
        rows = [(*row, *_figures(score)) for row, score in zip(rows, table.adapted, strict=True)]
    return headings, rows


def _figures(score: "Score") -> tuple[str, str, str]:
    top1 = "-" if score.top1 is None else f"{100 * score.top1:.1f}"
    return f"{100 * score.iou:.2f}", f"{100 * score.boundary_iou:.2f}", top1
