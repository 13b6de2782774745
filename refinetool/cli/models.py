"""`refinetool models`."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

from refinetool.cli import console, options
from refinetool.cli.app import app
from refinetool.cli.options import JOB

if TYPE_CHECKING:
    from refinetool.backends.weights import Status

models = typer.Typer(no_args_is_help=True, rich_markup_mode="rich")
app.add_typer(models, name="models", help="List and describe models, and fetch and verify their weights.")


@models.command("list")
def models_list(as_json: options.AsJson = False) -> None:
    """List the models, their weights, and which weights have been fetched."""
    from refinetool.backends.models import MODELS
    from refinetool.backends.weights import cache_folder, listing

    states = {status.weights.model: status for status in listing()}
    if as_json:
        console.dump({"cache": str(cache_folder()), "models": [_model_record(name, states) for name in MODELS]})
        return
    rows = []
    for name, model in MODELS.items():
        status = states.get(name)
        size = f"{status.weights.size / 1e6:.0f} MB" if status else ""
        rows.append((name, model.about, size, status.state if status else "built in"))
    console.table("", ("name", "what", "weights", "state"), rows, numbers=(2,))
    console.say(f"\nWeights are kept in {cache_folder()}", markup=False)
    console.say("refinetool models fetch NAME downloads weights to this folder; --checkpoint reads any other file.")


def _model_record(name: str, states: "Mapping[str, Status]") -> dict[str, object]:
    from refinetool.backends.models import MODELS

    record: dict[str, object] = {"name": name, "about": MODELS[name].about, "state": "built in"}
    if status := states.get(name):
        weights = status.weights
        origin = {"url": weights.url, "bytes": weights.size, "sha256": weights.sha256, "sha256_from": weights.origin}
        record |= {"state": status.state, "path": str(status.path), **origin}
    return record


@models.command("info")
def models_info(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of a model from `models list`.")],
    head: options.Head = JOB.head,
    checkpoint: options.Checkpoint = None,
    as_json: options.AsJson = False,
) -> None:
    """Show the parameters of a model and its head, and what an image and a mask cost in operations and memory."""
    from refinetool.backends.costs import costs_of

    costs = costs_of(name, head=head, checkpoint=checkpoint)
    if as_json:
        console.dump(console.as_json(costs))
        return
    million, giga, mega = 1e6, 1e9, 1e6
    rows = [
        ("parameters of the model (frozen)", f"{costs.parameters / million:.2f} M"),
        (
            "parameters of the head (trainable)",
            f"{costs.head_parameters / million:.2f} M" if costs.head_parameters else "no head",
        ),
        ("input", f"{costs.side} x {costs.side} px"),
        ("grid of masks", f"{costs.mask_side} x {costs.mask_side}"),
        ("operations per image", f"{costs.image_flops / giga:,.1f} GFLOP"),
        ("operations per mask", f"{costs.mask_flops / giga:,.1f} GFLOP"),
        ("weights", f"{costs.weight_bytes / mega:,.0f} MB"),
        ("memory per image, most", f"{costs.image_bytes / mega:,.0f} MB"),
        ("memory per image, kept", f"{costs.kept_bytes / mega:,.0f} MB"),
        ("memory per mask, most", f"{costs.mask_bytes / mega:,.0f} MB"),
    ]
    console.table(f"{costs.name}, head: {costs.head}", ("", "in float32"), rows, numbers=(1,))
    console.say("Images are encoded and masks decoded in batches, which multiplies memory.")


@models.command("fetch")
def models_fetch(
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Names of models from `models list`.")],
    quiet: options.Quiet = False,
) -> None:
    """Download published weights and check their SHA-256. Interrupted downloads are continued."""
    from refinetool.backends import weights

    for weight in [weights.find(name) for name in names]:
        with console.downloading(weight.filename, quiet=quiet) as on_progress:
            path = weights.fetch(weight.model, on_progress=on_progress)
        if not quiet:
            console.say(f"{weight.model}: {path}", markup=False)


@models.command("verify")
def models_verify(
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME...]", help="Names of models; without any, all that have been fetched."),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Check fetched weights against the published SHA-256."""
    from refinetool.backends import weights

    here = [status.weights.model for status in weights.listing() if status.state != "missing"]
    found = [weights.verify(name) for name in names or here]
    if as_json:
        console.dump({status.weights.model: {"state": status.state, "detail": status.detail} for status in found})
    else:
        for status in found:
            console.say(f"{status.weights.model}: {status.state}: {status.path}: {status.detail}", markup=False)
        if not found:
            console.say(f"there are no weights in {weights.cache_folder()}", markup=False)
    if any(status.state != "verified" for status in found):
        raise typer.Exit(1)
