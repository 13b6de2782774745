"""What the commands of `refinetool train` share: options, how they change settings, and how a run is continued."""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, TypeVar

import typer

from refinetool.errors import Interrupted, UsageError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

S = TypeVar("S", bound="DataclassInstance")


def setting(name: str, text: str, *, default: object, **more: Any) -> Any:
    """Make an option that is None unless given; `default` is only shown in the help."""
    shown = "" if default is None else f" [dim]\\[default: {default}][/dim]"
    return typer.Option(name, help=text + shown, show_default=False, **more)


Images: TypeAlias = Annotated[
    Path | None, typer.Option("--images", help="Image folder of COCO files. Without it, images are looked for.")
]
Minutes: TypeAlias = Annotated[
    float | None, setting("--minutes", "Training time in minutes, instead of --steps.", default=None, min=0.01)
]
Resume: TypeAlias = Annotated[bool, typer.Option("--resume", help="Continue from the checkpoint in the output.")]


def no_data() -> UsageError:
    """Return the error of a run that has neither data nor a checkpoint."""
    return UsageError("there are no data to train on; name a folder with --data, or continue with --resume.")


def with_given(settings: S, **given: Any) -> S:
    """Replace the settings that were given on the command line; None stands for the others."""
    return replace(settings, **{name: value for name, value in given.items() if value is not None})


@contextmanager
def told_how_to_continue(command: str, output: Path) -> Iterator[None]:
    """Add to the message of an interrupted `train COMMAND` how to continue it."""
    try:
        yield
    except Interrupted as interrupted:
        again = shlex.join(["refinetool", "train", command, "-o", str(output), "--resume"])
        raise Interrupted(f"{interrupted}\nContinue with: {again}") from None
