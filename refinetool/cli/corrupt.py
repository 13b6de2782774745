"""`refinetool corrupt`."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from refinetool.cli import console, options
from refinetool.cli.app import app
from refinetool.errors import DataError, UsageError
from refinetool.settings import MAX_SEED, BandName, CorruptSettings, GeneratorName, SuiteName
from refinetool.statuses import Reason

if TYPE_CHECKING:
    from refinetool.corrupt.dataset import CorruptSummary
    from refinetool.corrupt.figures import BandFigures
    from refinetool.corrupt.suites import Suite

CORRUPT = CorruptSettings()

FILES, WHAT, RUN = "Files", "Defects", "Run"

REASONS = console.REASONS | {
    Reason.CROWD: "crowds",
    Reason.TOO_SMALL: f"masks under {CORRUPT.min_area_px} pixels",
}
"""How the summary explains why a mask was not changed."""


@app.command(
    help="Make coarse masks from good ones. The output is the same file with worse masks.\n\n"
    "A suite is a mix of generators, each with a band of IoU to reach; the report says how many masks reached it. An "
    "object's mask depends only on the seed, its image and its id. Crowds, tiny masks and masks that can't be read "
    "are not changed."
)
def corrupt(
    *,
    truth: Annotated[Path, typer.Argument(metavar="GT", help="Good masks, in any format that refine reads.")],
    images: options.Images = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="PATH",
            help="File or folder to write. [dim]\\[default: GT.coarse.json, GT-coarse][/dim]",
            rich_help_panel=FILES,
            show_default=False,
        ),
    ] = None,
    file_format: options.Format = "auto",
    sizes: options.Sizes = None,
    follow_links: options.FollowLinks = False,
    mask_suffix: options.MaskSuffix = "",
    max_pixels: Annotated[
        int,
        typer.Option(
            "--max-pixels",
            min=1,
            metavar="N",
            help="Largest image size, in pixels. The masks of larger images are not changed.",
            rich_help_panel=FILES,
        ),
    ] = CORRUPT.max_pixels,
    record: Annotated[
        Path | None,
        typer.Option(
            "--record",
            metavar="PATH",
            help="CSV or JSON file to write, saying how each coarse mask was made.",
            rich_help_panel=FILES,
        ),
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(
            "--picture", metavar="PATH", help="PNG to write: a contact sheet of a dozen masks.", rich_help_panel=FILES
        ),
    ] = None,
    overwrite: options.Overwrite = False,
    suite: Annotated[
        SuiteName,
        typer.Option(
            "--suite",
            metavar="NAME",
            help="Mix of generators: davis-like, boundary, weak, train-mix, stress or embedded-mix.",
            rich_help_panel=WHAT,
        ),
    ] = CORRUPT.suite,
    generator: Annotated[
        GeneratorName | None,
        typer.Option(
            "--generator",
            metavar="NAME",
            help="A single generator instead of a suite: superpixel, boundary, noise-band, cam-like, clip-like, "
            "polygon, shift-scale, low-res, partial, merge-neighbour, boundary-noise, grow-shrink, heat-map, "
            "holes-islands, biased-activation, mix, blobs or compose.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    band: Annotated[
        BandName | None,
        typer.Option("--band", help="Difficulty: a named band of IoU in place of the suite's.", rich_help_panel=WHAT),
    ] = None,
    iou_low: Annotated[
        float | None,
        typer.Option(
            "--iou-low", min=0, max=1, metavar="X", help="Lowest IoU of the band, as a number.", rich_help_panel=WHAT
        ),
    ] = None,
    iou_high: Annotated[
        float | None,
        typer.Option(
            "--iou-high", min=0, max=1, metavar="X", help="Highest IoU of the band, as a number.", rich_help_panel=WHAT
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option("--seed", min=0, max=MAX_SEED, metavar="N", help="Random seed.", rich_help_panel=RUN)
    ] = CORRUPT.seed,
    limit: Annotated[
        int | None,
        typer.Option("--limit", min=1, metavar="N", help="Corrupt only the first N images.", rich_help_panel=RUN),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            min=1,
            metavar="N",
            help="Number of worker threads. [dim]\\[default: CPU cores, at most 8][/dim]",
            rich_help_panel=RUN,
            show_default=False,
        ),
    ] = None,
    quiet: options.Quiet = False,
    as_json: options.AsJson = False,
) -> None:
    from refinetool.corrupt.dataset import corrupt_dataset

    chosen = choose(suite, generator, band=band, low=iou_low, high=iou_high)
    with console.listening(waiting="reading", quiet=quiet) as listener:
        summary = corrupt_dataset(
            truth,
            output=output or default_output(truth),
            suite=chosen,
            images=images,
            format=None if file_format == "auto" else file_format,
            sizes=sizes,
            follow_links=follow_links,
            mask_suffix=mask_suffix,
            limit=limit,
            overwrite=overwrite,
            record=record,
            picture=picture,
            workers=workers or CORRUPT.workers,
            settings=replace(CORRUPT, seed=seed, max_pixels=max_pixels),
            on_progress=listener,
        )
    if as_json:
        console.dump(console.as_json(summary))
    elif not quiet:
        summarise(summary)
    if summary.failed:
        for sentence in summary.errors:
            console.complain(sentence)
        if summary.failed > len(summary.errors):
            console.complain(f"... and {summary.failed - len(summary.errors)} more images")
        raise typer.Exit(DataError.exit_code)


def choose(
    suite: SuiteName,
    generator: GeneratorName | None,
    *,
    band: BandName | None,
    low: float | None,
    high: float | None,
) -> "Suite":
    """Return the requested suite, with another band if one is given.

    Raises:
        UsageError: Half a band, two bands, or a band whose ends are swapped.
    """
    from refinetool.corrupt.suites import BANDS, SUITES, single

    chosen = SUITES[suite] if generator is None else single(generator)
    if band is not None and (low is not None or high is not None):
        raise UsageError("--band and --iou-low with --iou-high both set the band; choose one")
    if band is not None:
        return chosen.with_band(*BANDS[band])
    if low is None and high is None:
        return chosen
    if low is None or high is None:
        raise UsageError("--iou-low and --iou-high go together; give both")
    if low > high:
        raise UsageError(f"--iou-low {low} is above --iou-high {high}; swap them")
    return chosen.with_band(low, high)


def default_output(truth: Path) -> Path:
    """`masks.json` -> `masks.coarse.json`; folder `masks` -> `masks-coarse`."""
    absolute = truth.absolute()
    if truth.is_dir():
        return absolute.with_name(f"{absolute.name}-coarse")
    return truth.with_name(f"{truth.stem}.coarse{truth.suffix}")


def summarise(summary: "CorruptSummary") -> None:
    """Print what was made, band by band."""
    headings = ("", "requested IoU", "n", "reached", "mean IoU", "median", "boundary IoU", "parts", "holes")
    console.table("", headings, [_row(band) for band in summary.bands], numbers=range(2, len(headings)))
    masks, images = console.counted(summary.masks, "mask"), console.counted(summary.images, "image")
    console.say(f"[bold]{summary.corrupted} of {masks} made coarse[/bold], in {images}")
    if missed := summary.corrupted - summary.reached:
        console.say(f"  {missed} missed their band and are the closest attempts; --record lists them")
    for reason, count in sorted(summary.kept.items(), key=_most_first):
        console.say(f"  {count} not changed: {REASONS[reason]}", markup=False)
    console.say_faults(summary)
    console.say_notes(summary.notes)
    console.say(f"written to {summary.output}", markup=False)


def _row(band: "BandFigures") -> Sequence[str]:
    return (
        band.generator,
        f"{band.low:.2f} to {band.high:.2f}",
        str(band.count),
        f"{band.reached:.1%}",
        f"{band.mean_iou:.3f}",
        f"{band.median_iou:.3f}",
        f"{band.mean_boundary_iou:.3f}",
        f"{band.mean_components:.1f}",
        f"{band.mean_holes:.1f}",
    )


def _most_first(item: tuple[str, int]) -> tuple[int, str]:
    return -item[1], item[0]
