"""`refinetool train arbiter`."""

from pathlib import Path
from typing import Annotated

import typer

from refinetool.cli import console, options
from refinetool.cli.options import JOB
from refinetool.cli.train import SOURCES, train
from refinetool.cli.train_options import Images, Resume, no_data, setting, told_how_to_continue, with_given
from refinetool.settings import MAX_SEED, ArbiterTrainSettings

TRAIN = ArbiterTrainSettings()


@train.command("arbiter")
def train_an_arbiter(
    *,
    data: Annotated[
        list[Path] | None, typer.Option("--data", help=f"{SOURCES} Not needed with --resume.", show_default=False)
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for checkpoint, metrics and weights.")],
    images: Images = None,
    model: options.ModelName = JOB.model,
    checkpoint: options.Checkpoint = None,
    contests: Annotated[
        int | None, setting("--contests", "Objects to gather and train on.", default=TRAIN.contests, min=1)
    ] = None,
    steps: Annotated[int | None, setting("--steps", "Optimiser steps.", default=TRAIN.steps, min=1)] = None,
    batch: Annotated[
        int | None, setting("--batch", "Contests per step.", default=TRAIN.contests_per_step, min=1)
    ] = None,
    learning_rate: Annotated[
        float | None,
        setting("--learning-rate", "Learning rate before it decays.", default=f"{TRAIN.learning_rate:g}", min=1e-9),
    ] = None,
    min_object_px: Annotated[
        int | None,
        setting(
            "--min-object-px",
            "Objects with fewer pixels are left out, and refine does not ask the arbiter for coarse masks with fewer.",
            default=TRAIN.min_object_px,
            min=1,
        ),
    ] = None,
    flat_share: Annotated[
        float | None,
        setting(
            "--flat-share",
            "Fraction of the images without overlaps in which none are made; 1 if your objects never overlap.",
            default=TRAIN.flat_share,
            min=0,
            max=1,
        ),
    ] = None,
    seed: Annotated[
        int | None, setting("--seed", "Random seed of weights and contests.", default=TRAIN.seed, min=0, max=MAX_SEED)
    ] = None,
    device: options.Device = JOB.device,
    resume: Resume = False,
    quiet: options.Quiet = False,
) -> None:
    """Train the small network that corrects each mask once all masks of its image are predicted."""
    from refinetool.backends.models import find_model, pick_device
    from refinetool.train.arbiter.run import ArbiterRun, read_record, train_arbiter

    place = pick_device(device)
    find_model(model)
    if resume:
        run = read_record(output)
    elif data:
        run = ArbiterRun(tuple(data), images, model, checkpoint, TRAIN)
    else:
        raise no_data()
    settings = with_given(
        run.settings,
        contests=contests,
        steps=steps,
        contests_per_step=batch,
        learning_rate=learning_rate,
        min_object_px=min_object_px,
        flat_share=flat_share,
        seed=seed,
    )
    run = ArbiterRun(run.data, run.images, run.model, run.checkpoint, settings)
    with (
        told_how_to_continue("arbiter", output),
        console.training(quiet=quiet, first="gathering", unit="contests") as (gathering, listener),
    ):
        weights = train_arbiter(run, output, device=place, resume=resume, on_gathering=gathering, on_progress=listener)
    if not quiet:
        console.say(f"written to {weights}; use it with refinetool refine --arbiter", markup=False)
