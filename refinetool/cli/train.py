"""`refinetool train`."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from refinetool import console, options
from refinetool.cli.app import app
from refinetool.options import JOB
from refinetool.settings import TrainSettings

TRAIN = TrainSettings()

train = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")
app.add_typer(train, name="train", help="Train a model on your own images.")


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
