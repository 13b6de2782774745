"""Turn coarse segmentation masks into precise ones.

    import refinetool

    refiner = refinetool.load("embedded")
    masks = refiner.refine_image("image.jpg", coarse)  # or an array, bool (N, H, W) -> N RefinedMask

    refinetool.refine_dataset("coarse.json", images="images", output="refined.json")

Importing this module is quick; torch is imported when a model is loaded.
"""

from typing import TYPE_CHECKING

from refinetool.settings import JobSettings, RefineSettings

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from pathlib import Path

    from refinetool.label import label_dataset
    from refinetool.refine import Refiner
    from refinetool.running.run import refine_dataset
    from refinetool.running.summary import Progress

__version__ = "0.1.0"
__all__ = ["RefineSettings", "__version__", "label_dataset", "load", "progress_bar", "refine_dataset"]

_JOB, _REFINE = JobSettings(), RefineSettings()


def load(
    model: str = _JOB.model,
    *,
    checkpoint: str | None = None,
    device: str = _JOB.device,
    precision: str = _JOB.precision,
    head: str = _JOB.head,
    settings: RefineSettings = _REFINE,
    iou_adapter: "Path | str | None" = None,
    arbiter: "Path | str | None" = None,
) -> "Refiner":
    """Load a refiner for images in memory: see `Refiner.refine_image`.

    Args:
        model: A name that `refinetool models list` shows.
        checkpoint: A weights file, `random:SEED`, or None for the published weights of the model.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        precision: `auto`, `fp32` or `bf16`.
        head: For SAM 2 models: `auto`, `none`, `detail`, `sam2refiner`, or a file that `refinetool train head` wrote.
        settings: How to refine.
        iou_adapter: A file that `refinetool adapt-iou` wrote for this model, or None.
        arbiter: A file that `refinetool train arbiter` wrote, or None for the model's own, if it has one.

    Raises:
        UsageError: There is no such model, device or precision.
        WeightsError: The weights are missing or not the published ones, or the adapter is for another model.
    """
    from pathlib import Path

    from refinetool.refine import load_refiner

    return load_refiner(
        model,
        checkpoint=checkpoint,
        device=device,
        precision=precision,
        head=head,
        settings=settings,
        iou_adapter=None if iou_adapter is None else Path(iou_adapter),
        arbiter=None if arbiter is None else Path(arbiter),
    )


def progress_bar() -> "AbstractContextManager[Callable[[Progress], None]]":
    """Show the progress of `refine_dataset`: a bar on a terminal, and in notebooks where ipywidgets is installed; else
    a line from time to time.

        with refinetool.progress_bar() as bar:
            refinetool.refine_dataset("coarse.json", output="refined.json", on_progress=bar)
    """
    from refinetool.cli.console import listening

    return listening(waiting="loading the model", quiet=False)


def __dir__() -> list[str]:
    """Return the public names, with those that are imported on first access."""
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> object:
    """Import what maps data sets on first access: its imports would make `import refinetool` slow."""
    if name == "refine_dataset":
        from refinetool.running.run import refine_dataset

        return refine_dataset
    if name == "label_dataset":
        from refinetool.label import label_dataset

        return label_dataset
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
