"""A plot of where refinement gained and where it lost."""

import math
import os
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from refinetool.errors import StorageError, UsageError
from refinetool.evaluate.gains import NOTABLE_CHANGE, GainBin
from refinetool.evaluate.pairing import share_ids
from refinetool.evaluate.report import Report
from refinetool.formats import VOC_CLASS
from refinetool.formats.storage import new_file

WIDTH_INCHES, HEIGHT_INCHES, DOTS_PER_INCH = 11.0, 4.8, 150
GAIN, LOSS, WHISKER = "#2f7d5b", "#b5482f", "#333333"


def check_plot(formats: set[str], path: Path) -> None:
    """Find out before the evaluation what would keep its plot from being drawn or written.

    Args:
        formats: The formats of the files compared.

    Raises:
        UsageError: Files of these formats have no objects that are matched by id.
        StorageError: The path is a folder, or the folder it lies in can't be made or written to.
    """
    if VOC_CLASS in formats or not share_ids(formats):
        raise UsageError(
            "--plot shows gains of objects that are matched by id; class maps have no objects, and COCO results no "
            "ids. Leave --plot out, or compare files of objects with ids."
        )
    if path.is_dir():
        raise StorageError(f"{path}: is a folder; name the PNG to write.")
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir():
        raise StorageError(f"{path}: can't be written, since {above} is no folder; name another place.")
    if not os.access(above, os.W_OK):
        raise StorageError(f"{path}: can't be written, since {above} can't be written to; name another place.")


def write_plot(report: Report, path: Path) -> None:
    """Write the gain of IoU by size of the objects and by IoU of their coarse masks as a PNG.

    Raises:
        UsageError: The report has no gains, because there was no coarse file, no object was scored, or it is of label
            maps.
        StorageError: The file can't be written.
    """
    if not any(bin.objects for bin in report.gain_by_size):
        raise UsageError("There are no gains to plot: that takes coarse masks, of objects that are matched by id.")
    with new_file(path) as file:
        draw_gains(report).savefig(file, format="png")


def draw_gains(report: Report) -> Figure:
    """Draw two panels of bars: mean gain of IoU x 100 with its standard error, counts and fractions below the bars."""
    figure = Figure(figsize=(WIDTH_INCHES, HEIGHT_INCHES), dpi=DOTS_PER_INCH, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    _draw_panel(left, report.gain_by_size, [_format_side(bin) for bin in report.gain_by_size])
    _draw_panel(right, report.gain_by_coarse_iou, [f"{bin.low:g} to {bin.high:g}" for bin in report.gain_by_coarse_iou])
    left.set_title("by size: side of a square of the same area, px", fontsize=10)
    right.set_title("by IoU of the coarse mask", fontsize=10)
    left.set_ylabel("gain of IoU x 100, mean and standard error")
    figure.supxlabel(f"n: objects;  +: better, -: worse by more than {NOTABLE_CHANGE} IoU", fontsize=8, color=WHISKER)
    return figure


def _draw_panel(axes: Axes, bins: Sequence[GainBin], names: Sequence[str]) -> None:
    places = range(len(bins))
    gains = [100 * (bin.gain or 0.0) for bin in bins]
    errors = [100 * (bin.gain_error or 0.0) for bin in bins]
    axes.bar(
        places,
        gains,
        yerr=errors,
        color=[GAIN if gain >= 0 else LOSS for gain in gains],
        error_kw={"ecolor": WHISKER, "elinewidth": 1, "capsize": 3},
    )
    axes.axhline(0, color=WHISKER, linewidth=0.8)
    labels = [f"{name}\n{_format_counts(bin)}" for name, bin in zip(names, bins, strict=True)]
    axes.set_xticks(list(places), labels, fontsize=7)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _format_side(bin: GainBin) -> str:
    return f"{bin.low:g} to {bin.high:g}" if math.isfinite(bin.high) else f"from {bin.low:g}"


def _format_counts(bin: GainBin) -> str:
    if bin.better is None or bin.worse is None:
        return "n 0"
    return f"n {bin.objects}\n+{bin.better:.0%}\n-{bin.worse:.0%}"
