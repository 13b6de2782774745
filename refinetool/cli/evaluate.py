"""`refinetool eval`."""

from pathlib import Path
from typing import Annotated

import typer

from refinetool import console, options
from refinetool.cli.app import app
from refinetool.settings import EvaluateSettings

EVALUATE = EvaluateSettings()


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
