"""The root command, its entry point, and how errors are reported."""

import errno
import os
import sys
import warnings
from typing import Annotated

import typer

from refinetool import __version__
from refinetool.cli import console
from refinetool.cores import wait_passively
from refinetool.errors import RefinetoolError, printable

app = typer.Typer(
    name="refinetool",
    help="Turn coarse segmentation masks into precise ones. The output is the same file with better masks.",
    epilog="First steps: refinetool demo, then refinetool refine masks.json --images photos",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Entry point of the `refinetool` command."""
    # Pillow warns of damaged EXIF data and animations in images that it reads nevertheless.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    wait_passively()
    try:
        app(prog_name="refinetool")
    except RefinetoolError as error:
        console.complain(str(error))
        sys.exit(error.exit_code)
    except OSError as error:
        if error.filename is not None:  # a path that the user named: no permission, a name that is too long ...
            place = os.fsdecode(error.filename)
        elif error.errno == errno.ENOSPC:
            place = "the output of the command can't be written"
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left is lost without an error
        else:
            raise
        console.complain(printable(f"{place}: {error.strerror}"))
        sys.exit(RefinetoolError.exit_code)


@app.callback(invoke_without_command=True)
def version(
    show: Annotated[bool, typer.Option("--version", help="Show the version and exit.", is_eager=True)] = False,
) -> None:
    if show:
        console.say(f"refinetool {__version__}")
        raise typer.Exit
