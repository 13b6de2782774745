"""`refinetool train reference`."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import typer

from refinetool.cli import console, options
from refinetool.cli.options import JOB
from refinetool.cli.train import train
from refinetool.cli.train_options import Images, Resume, no_data, setting, told_how_to_continue, with_given
from refinetool.settings import MAX_SEED, ReferenceTrainSettings

TRAIN = ReferenceTrainSettings()


@train.command("reference")
def train_reference_encoder(
    *,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            "--data",
            help="Folder with images/, masks/, split.json and classes.json or objects.json; COCO JSON file; or VOC "
            "root. May be given several times. Not needed with --resume.",
        ),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for checkpoint, metrics and weights.")],
    images: Images = None,
    hold_out: Annotated[
        list[str] | None,
        typer.Option(
            "--hold-out",
            metavar="NAME",
            help="Class to keep out of training, or a fold such as coco-20i:0 or pascal-5i:3. May be given several "
            "times.",
        ),
    ] = None,
    kinds: Annotated[
        list[str] | None,
        typer.Option(
            "--kind",
            metavar="KIND",
            help="Kind of annotation to train on: point, scribble, box or mask. May be given several times. "
            "[dim]\\[default: all four][/dim]",
            show_default=False,
        ),
    ] = None,
    model: options.ModelName = JOB.model,
    checkpoint: options.Checkpoint = None,
    encoder: Annotated[
        Literal["embedded", "resnet50", "vgg16", "dinov2-b14"],
        typer.Option("--encoder", help="Image encoder."),
    ] = "embedded",
    encoder_checkpoint: Annotated[
        str | None,
        typer.Option(
            "--encoder-checkpoint",
            metavar="PATH",
            help="Weights of the image encoder, or random:SEED. Without it, those in the package or the cache.",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[int | None, setting("--steps", "Optimiser steps.", default=TRAIN.steps, min=1)] = None,
    batch: Annotated[
        int | None, setting("--batch", "Episodes per step.", default=TRAIN.episodes_per_step, min=1)
    ] = None,
    learning_rate: Annotated[
        float | None,
        setting("--learning-rate", "Learning rate at the start.", default=f"{TRAIN.learning_rate:g}", min=1e-9),
    ] = None,
    seed: Annotated[
        int | None, setting("--seed", "Random seed of weights and episodes.", default=TRAIN.seed, min=0, max=MAX_SEED)
    ] = None,
    device: options.Device = JOB.device,
    resume: Resume = False,
    quiet: options.Quiet = False,
) -> None:
    """Train the encoder that turns annotated references into prompts of a model, for refinetool label."""
    from refinetool.backends.image_encoders import find_image_encoder
    from refinetool.backends.models import find_model, pick_device
    from refinetool.train.reference.annotations import named_kinds
    from refinetool.train.reference.run import ReferenceRun, read_record, train_reference

    place = pick_device(device)
    find_model(model)
    find_image_encoder(encoder)
    if resume:
        run = read_record(output)
    elif data:
        settings = replace(TRAIN, kinds=named_kinds(kinds or ()))
        held_out = tuple(hold_out or ())
        run = ReferenceRun(tuple(data), images, held_out, model, checkpoint, encoder, encoder_checkpoint, settings)
    else:
        raise no_data()
    settings = with_given(run.settings, steps=steps, episodes_per_step=batch, learning_rate=learning_rate, seed=seed)
    run = replace(run, settings=settings)
    with told_how_to_continue("reference", output), console.training(quiet=quiet) as (_, listener):
        weights = train_reference(run, output, device=place, resume=resume, on_progress=listener)
    if not quiet:
        console.say(f"written to {weights}; use it with refinetool label --reference-encoder", markup=False)
