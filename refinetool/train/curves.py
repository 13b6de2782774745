"""Draws the curves of a training run."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

SMOOTHING = 0.9


def draw_curves(lines: Sequence[Mapping[str, Any]]) -> bytes:
    """Draw loss, validation IoU, harm and speed against steps, as a PNG.

    Args:
        lines: Lines of `metrics.jsonl`, at least one.
    """
    figure = Figure(figsize=(11, 7), layout="constrained")
    loss, iou, harm, speed = figure.subplots(2, 2).flat
    steps = [line["step"] for line in lines]
    losses = [line["loss"] for line in lines]
    loss.plot(steps, losses, color="0.8", linewidth=1)
    loss.plot(steps, _smooth(losses), color="C0")
    _finish(loss, "training loss")
    speed.plot(steps, [line["images_per_second"] for line in lines], color="C2")
    _finish(speed, "images per second")

    measured = [line for line in lines if line.get("validation")]
    at = [line["step"] for line in measured]
    for axes, names in ((iou, ("coarse", "full", "box")), (harm, ("harm", "iou_error", "better"))):
        for name in names:
            style = "--" if name == "coarse" else "-"
            axes.plot(at, [line["validation"][name] for line in measured], style, marker=".", label=name)
        axes.legend()
    _finish(iou, "validation IoU")
    _finish(harm, "harm to good masks, error of the predicted IoU, fraction improved")
    out = io.BytesIO()
    figure.savefig(out, format="png")
    return out.getvalue()


def _finish(axes: Axes, title: str) -> None:
    axes.set_title(title)
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)


def _smooth(values: Sequence[float]) -> list[float]:
    smooth: list[float] = []
    for value in values:
        smooth.append(value if not smooth else SMOOTHING * smooth[-1] + (1 - SMOOTHING) * value)
    return smooth
