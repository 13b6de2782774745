"""Trains a head on a frozen SAM 2 model: `train_head`, the story of SAM2Refiner's training.

Images are packed, the model is loaded and frozen, a head is put on it; then the loop draws examples, asks the head
mixed prompts, and compares its masks with the truth at uncertain points. Only the head is saved.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from refinetool.backends.models import find_model, load_network
from refinetool.backends.sam2 import Sam2Backend
from refinetool.backends.weights import user_path
from refinetool.errors import UsageError
from refinetool.formats.storage import new_file
from refinetool.modules.head_files import HeadRecord, base_digest, build_head, load_head, serialise_head
from refinetool.modules.sam2_passes import set_image_size
from refinetool.settings import HeadKind, PackSettings, RefinerOptions, TrainSettings
from refinetool.train.head.on_frozen import OnFrozen
from refinetool.train.loop import Source, check_run, train
from refinetool.train.ranks import Ranks
from refinetool.train.steps import TrainProgress

WEIGHTS_FILE = "head.safetensors"


def train_head(
    data: Sequence[Path],
    output: Path,
    *,
    model: str,
    checkpoint: str | None,
    kind: HeadKind,
    options: Mapping[str, Any],
    images: Path | None,
    start: Path | None,
    settings: TrainSettings,
    packing: PackSettings,
    device: str,
    ranks: Ranks,
    resume: bool,
    on_packing: Callable[[int, int], None],
    on_progress: Callable[[TrainProgress], None],
) -> Path:
    """Train and export a head.

    Args:
        data: One pack, or sources that `train.data.pack` takes, which are packed into `output/packed` first.
        output: Folder of the run, see `train.loop.train`; the head is `head.safetensors`.
        model, checkpoint: A SAM 2 model, see `load_backend`.
        kind, options: The head: `sam2refiner` with the options of `settings.RefinerOptions`, or `detail` without any.
        images: Folder of the images of COCO files; None looks beside them.
        start: A head for this model to start from; None means random weights.
        settings: `settings.part` is not used.
        packing: How sources are packed.
        ranks: The processes that train together.
        resume: Continue from the checkpoint in the output.
        on_packing: Called with (images done, images in total).

    Returns:
        The exported head: fp16 safetensors, which `refine --head` takes.

    Raises:
        DataError: Data are not as described, or `resume` finds no checkpoint, or one made with other data.
        UsageError: The model is not of SAM 2's kind, an output would replace the head to start from, or a side does not
            fit.
        WeightsError: Weights can't be used.
        StorageError: The output can't be written.
        Interrupted: Stopped by the user, after a checkpoint.
    """
    found = find_model(model)
    if not issubclass(found.backend_class(), Sam2Backend):
        raise UsageError(f"{model} can't have a head: heads are for SAM 2 models and the embedded one")
    if settings.side % 64 or settings.small_side % 64:
        raise UsageError(f"the side is {settings.side} px; expected a multiple of 64.")
    if kind == "sam2refiner" and start is None:
        shape = RefinerOptions(**options)
        if not (shape.la or shape.pr or shape.mr):
            raise UsageError("no module is left to train; keep at least one of LA, PR and MR.")
        if shape.cues and not shape.mr:
            raise UsageError("the cues are for MR, which is left out; drop one of --cues and --no-mr.")
    source = Source(tuple(data), images, start, packing)
    check_run(output, weights_file=WEIGHTS_FILE, source=source, settings=settings, resume=resume)

    def make() -> "_HeadJob":
        sam, _ = load_network(found, checkpoint)
        base = base_digest(sam)
        if start is not None:
            head, given = load_head(user_path(start), sam, model=found.name)
            record = HeadRecord(given.record.kind, given.record.options, found.name, base, {})
        else:
            record = HeadRecord(kind, dict(options), found.name, base, {})
            head = build_head(kind, options, sam)
        return _HeadJob(sam.to(device), head.to(device), record, checkpoint, settings=settings)

    return train(
        make,
        output,
        source=source,
        settings=settings,
        device=device,
        ranks=ranks,
        resume=resume,
        on_packing=on_packing,
        on_progress=on_progress,
    )


class _HeadJob(OnFrozen):
    """A head on a frozen model, as the job of a run."""

    weights_file = WEIGHTS_FILE

    def __init__(
        self, sam: nn.Module, head: nn.Module, record: HeadRecord, checkpoint: str | None, *, settings: TrainSettings
    ) -> None:
        super().__init__(sam, head, settings=settings, set_side=lambda side: set_image_size(sam, side))
        self.record, self.checkpoint = record, checkpoint

    @property
    def about(self) -> dict[str, Any]:
        record = self.record
        return {
            "model": record.model,
            "checkpoint": self.checkpoint,
            "kind": record.kind,
            "options": dict(record.options),
        }

    def measured(self, average: nn.Module, side: int) -> tuple[Any, Any]:
        self.set_side(side)
        return self.sam, average

    def save(self, average: nn.Module, path: Path, *, recipe: dict[str, str]) -> None:
        record = HeadRecord(self.record.kind, self.record.options, self.record.model, self.record.base, recipe)
        with new_file(path) as file:
            file.write(serialise_head(average, record))
