"""`refinetool train`."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from refinetool.cli import console, options
from refinetool.cli.app import app
from refinetool.cli.options import JOB
from refinetool.cli.train_options import Images, Minutes, Resume, no_data, setting, told_how_to_continue, with_given
from refinetool.settings import AVERAGE_EXAMPLES, FINE_TUNE_RATE, MAX_SEED, TRAIN_ON_GPU, PackSettings, TrainSettings

TRAIN, PACK = TrainSettings(), PackSettings()

train = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")
app.add_typer(train, name="train", help="Train a model on your own images.")

SOURCES = "Folder with images/, masks/ and split.json, COCO JSON file, or VOC root. May be given several times."


def _both(name: str) -> str:
    """Format a default: the value on a CPU, and the value on a GPU if it differs."""
    here, there = getattr(TRAIN, name), getattr(TRAIN_ON_GPU, name)
    return f"{here:g}" if here == there else f"{here:g}, on a GPU {there:g}"


@train.command("pack")
def pack_data(
    *,
    data: Annotated[list[Path], typer.Option("--data", help=SOURCES)],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder to write the pack to; an existing pack is replaced.")
    ],
    images: Images = None,
    side: Annotated[
        int, typer.Option("--side", min=64, help="Maximum longer side of a packed image, in pixels.")
    ] = PACK.side,
    max_megabytes: Annotated[
        float | None,
        setting(
            "--max-megabytes",
            "Maximum size of the pack; image quality, then image size are lowered to reach it. 0 means no limit.",
            default=PACK.max_megabytes,
            min=0,
        ),
    ] = None,
    quiet: options.Quiet = False,
) -> None:
    """Pack training data into two small files that are easy to copy to another machine."""
    from refinetool.train.data.pack import pack

    bound = PACK.max_megabytes if max_megabytes is None else max_megabytes or None
    with console.counting("packing", unit="images", quiet=quiet) as listener:
        made = pack(
            data,
            output,
            images=images,
            settings=replace(PACK, side=side, max_megabytes=bound),
            on_progress=listener,
        )
    if not quiet:
        rows = [(source.name, str(source.train), str(source.validation)) for source in made.sources]
        console.table("", ("source", "train", "val"), rows, numbers=(1, 2))
        console.say(f"{len(made)} images, sides up to {made.side} px, {made.megabytes:.1f} MB")
        console.say(f"written to {output}; use it with refinetool train embedded --data", markup=False)


@train.command("embedded")
def train_embedded_model(
    *,
    data: Annotated[
        list[Path] | None,
        typer.Option("--data", help=f"{SOURCES} Or one pack. Not needed with --resume."),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for checkpoint, metrics and weights.")],
    images: Images = None,
    start: Annotated[
        Path | None, typer.Option("--from", help="Weights to start from instead of random weights (fine-tuning).")
    ] = None,
    part: Annotated[
        Literal["all", "sam2", "detail"] | None,
        setting(
            "--part",
            "What to train: all, only the SAM 2 part, or only the detail head on top of --from.",
            default=TRAIN.part,
        ),
    ] = None,
    steps: Annotated[int | None, setting("--steps", "Optimiser steps.", default=_both("steps"), min=1)] = None,
    minutes: Minutes = None,
    batch: Annotated[
        int | None, setting("--batch", "Images per step.", default=_both("images_per_step"), min=1)
    ] = None,
    learning_rate: Annotated[
        float | None,
        setting(
            "--learning-rate",
            "Learning rate before it decays.",
            default=f"{_both('learning_rate')}; with --from {FINE_TUNE_RATE:g} of that",
            min=1e-9,
        ),
    ] = None,
    side: Annotated[
        int | None,
        setting("--side", "Side of the model's input in pixels, a multiple of 32.", default=TRAIN.side, min=64),
    ] = None,
    seed: Annotated[
        int | None, setting("--seed", "Random seed of weights and examples.", default=TRAIN.seed, min=0, max=MAX_SEED)
    ] = None,
    device: options.Device = JOB.device,
    resume: Resume = False,
    quiet: options.Quiet = False,
) -> None:
    """Train the embedded model, from scratch or from weights. On several GPUs: torchrun -m refinetool train embedded"""
    from refinetool.backends.models import pick_device
    from refinetool.train.embedded.run import train_embedded
    from refinetool.train.files import read_run
    from refinetool.train.ranks import join_ranks

    ranks, place = join_ranks(pick_device(device))
    if resume:
        record = read_run(output)
        settings, data, images, start = record.settings, data or list(record.data), record.images, record.start
    elif data:
        settings = TRAIN_ON_GPU if place.startswith("cuda") else TRAIN
        if start is not None and part != "detail":  # the weights to start from may have no detail head yet
            settings = replace(settings, learning_rate=settings.learning_rate * FINE_TUNE_RATE)
    else:
        raise no_data()
    if steps is not None:
        settings = replace(settings, minutes=None)
    settings = with_given(
        settings,
        part=part,
        steps=steps,
        minutes=minutes,
        images_per_step=batch,
        learning_rate=learning_rate,
        side=side,
        seed=seed,
    )
    with (
        told_how_to_continue("embedded", output),
        console.training(quiet=quiet or not ranks.first) as (packing_listener, listener),
    ):
        weights = train_embedded(
            data,
            output,
            images=images,
            start=start,
            settings=settings,
            packing=replace(PACK, max_megabytes=None),
            device=place,
            ranks=ranks,
            resume=resume,
            on_packing=packing_listener,
            on_progress=listener,
        )
    if ranks.first and not quiet:
        console.say(f"written to {weights}; use it with refinetool refine --checkpoint", markup=False)


@train.command("average")
def average_weights(
    *,
    weights: Annotated[
        list[Path],
        typer.Argument(
            metavar="WEIGHTS", help="Weights that train embedded wrote, two or more files.", show_default=False
        ),
    ],
    data: Annotated[Path, typer.Option("--data", help="Pack of the training data, such as run/packed.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write the averaged weights to.")],
    device: options.Device = JOB.device,
    quiet: options.Quiet = False,
) -> None:
    """Average the weights of embedded models that were trained from the same start."""
    from refinetool.backends.models import pick_device
    from refinetool.train.embedded.average import average_embedded

    with console.counting("averaging", unit="examples", quiet=quiet) as listener:
        written = average_embedded(
            weights,
            output,
            data=data,
            examples=AVERAGE_EXAMPLES,
            device=pick_device(device),
            on_progress=listener,
        )
    if not quiet:
        console.say(f"written to {written}; use it with refinetool refine --checkpoint", markup=False)
