"""The commands, one file each: parse, build settings, make one library call, print, exit.

Nothing heavy is imported before a command runs, so that `--help` is instant. Importing a command's file registers the
command; `--help` lists the commands in the order of the imports here.
"""

from refinetool.cli.app import app, main  # isort: skip
from refinetool.cli import refine  # isort: skip
from refinetool.cli import adapt_iou  # isort: skip
from refinetool.cli import label  # isort: skip
from refinetool.cli import demo  # isort: skip
from refinetool.cli import evaluate  # isort: skip
from refinetool.cli import corrupt  # isort: skip
from refinetool.cli import ablate  # isort: skip
from refinetool.cli import models  # isort: skip
from refinetool.cli import train  # isort: skip
from refinetool.cli import train_reference  # isort: skip
from refinetool.cli import train_head  # isort: skip
from refinetool.cli import train_arbiter  # isort: skip

__all__ = [
    "ablate",
    "adapt_iou",
    "app",
    "corrupt",
    "demo",
    "evaluate",
    "label",
    "main",
    "models",
    "refine",
    "train",
    "train_arbiter",
    "train_head",
    "train_reference",
]
