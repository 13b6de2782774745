"""`refinetool train head`."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from refinetool.cli import console, options
from refinetool.cli.options import JOB
from refinetool.cli.train import PACK, SOURCES, train
from refinetool.cli.train_options import Images, Minutes, Resume, no_data, setting, told_how_to_continue, with_given
from refinetool.settings import MAX_SEED, TRAIN_EMBEDDED_HEAD, TRAIN_HEAD, HeadKind, RefinerOptions

REFINER = RefinerOptions()


def _both(name: str) -> str:
    """Format a default: the value for the embedded model, and the value for the others if it differs."""
    small, large = getattr(TRAIN_EMBEDDED_HEAD, name), getattr(TRAIN_HEAD, name)
    return f"{large:g}" if small == large else f"{large:g}, for {JOB.model} {small:g}"


@train.command("head")
def train_the_head(
    *,
    data: Annotated[
        list[Path] | None,
        typer.Option("--data", help=f"{SOURCES} Or HQSeg-44K, or one pack. Not needed with --resume."),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for checkpoint, metrics and the head.")],
    model: Annotated[
        str | None, setting("--model", "SAM 2 model that the head is for.", default=JOB.model, metavar="NAME")
    ] = None,
    checkpoint: options.Checkpoint = None,
    kind: Annotated[HeadKind, typer.Option("--kind", help="Kind of head.")] = "sam2refiner",
    no_la: Annotated[bool, typer.Option("--no-la", help="Leave out Localization Augment.")] = False,
    no_pr: Annotated[bool, typer.Option("--no-pr", help="Leave out Prompt Retargeting.")] = False,
    no_mr: Annotated[bool, typer.Option("--no-mr", help="Leave out Mask Refinement.")] = False,
    residual: Annotated[
        bool, typer.Option("--residual", help="Add the decoder's mask to the head's, so that training starts from it.")
    ] = False,
    cues: Annotated[
        bool, typer.Option("--cues", help="Show the head the coarse mask, and cues from its colours.")
    ] = False,
    images: Images = None,
    start: Annotated[
        Path | None, typer.Option("--from", help="Head to start from instead of random weights; decides its kind.")
    ] = None,
    steps: Annotated[int | None, setting("--steps", "Optimiser steps.", default=_both("steps"), min=1)] = None,
    minutes: Minutes = None,
    batch: Annotated[
        int | None,
        setting("--batch", "Images per step, over all processes.", default=_both("images_per_step"), min=1),
    ] = None,
    learning_rate: Annotated[
        float | None,
        setting(
            "--learning-rate", "Learning rate before it decays.", default=f"{TRAIN_HEAD.learning_rate:g}", min=1e-9
        ),
    ] = None,
    side: Annotated[
        int | None,
        setting("--side", "Side of the model's input in pixels, a multiple of 64.", default=_both("side"), min=64),
    ] = None,
    seed: Annotated[
        int | None,
        setting("--seed", "Random seed of weights and examples.", default=TRAIN_HEAD.seed, min=0, max=MAX_SEED),
    ] = None,
    device: options.Device = JOB.device,
    resume: Resume = False,
    quiet: options.Quiet = False,
) -> None:
    """Train a head for fine detail on a frozen SAM 2 model. On several GPUs: torchrun -m refinetool train head ..."""
    from refinetool.backends.models import pick_device
    from refinetool.train.files import read_run
    from refinetool.train.head.run import train_head
    from refinetool.train.ranks import join_ranks

    ranks, place = join_ranks(pick_device(device))
    if resume:
        record = read_run(output)
        settings, data, images, start = record.settings, data or list(record.data), record.images, record.start
        about = record.about
    elif data:
        name = model or JOB.model
        settings = TRAIN_EMBEDDED_HEAD if name == JOB.model else TRAIN_HEAD
        if kind == "detail":
            settings = replace(settings, mask_loss="weighted")
        shape = {"la": not no_la, "pr": not no_pr, "mr": not no_mr, "residual": residual, "cues": cues}
        chosen = {part: value for part, value in shape.items() if value != getattr(REFINER, part)}
        about = {"model": name, "checkpoint": checkpoint, "kind": kind, "options": chosen}
    else:
        raise no_data()
    if steps is not None:
        settings = replace(settings, minutes=None)
    settings = with_given(
        settings,
        steps=steps,
        minutes=minutes,
        images_per_step=batch,
        learning_rate=learning_rate,
        side=side,
        small_side=None if side is None else min(side, settings.small_side),
        seed=seed,
    )
    with (
        told_how_to_continue("head", output),
        console.training(quiet=quiet or not ranks.first) as (packing_listener, listener),
    ):
        weights = train_head(
            data,
            output,
            model=about["model"],
            checkpoint=about["checkpoint"],
            kind=about["kind"],
            options=about["options"],
            images=images,
            start=start,
            settings=settings,
            packing=replace(PACK, side=max(PACK.side, settings.side), max_megabytes=None),
            device=place,
            ranks=ranks,
            resume=resume,
            on_packing=packing_listener,
            on_progress=listener,
        )
    if ranks.first and not quiet:
        console.say(f"written to {weights}; use it with refinetool refine --head", markup=False)
