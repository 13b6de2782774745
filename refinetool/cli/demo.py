"""`refinetool demo`."""

import shlex
from pathlib import Path
from typing import Annotated

import typer

from refinetool.cli import console, options
from refinetool.cli.app import app
from refinetool.cli.options import JOB, REFINE


@app.command()
def demo(
    *,
    folder: Annotated[Path, typer.Argument(metavar="[FOLDER]", help="Folder to write.")] = Path("refinetool-demo"),
    model: options.ModelName = JOB.model,
    checkpoint: options.Checkpoint = None,
    device: options.Device = JOB.device,
    precision: options.Precision = JOB.precision,
    quiet: options.Quiet = False,
    as_json: options.AsJson = False,
) -> None:
    """Refine hand-drawn outlines of objects in built-in photographs. Needs no network and no data."""
    from refinetool.demo import run_demo

    with console.listening(waiting="loading the model", quiet=quiet) as listener:
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
        console.say("\nTo run the same refinement yourself:")
        command = ["refinetool", "refine", str(result.coarse), "--images", str(result.images), "-o", "refined.json"]
        console.say(f"  {shlex.join(command)}", markup=False)
