"""Trains the embedded model."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from refinetool.backends.models import misfit, read_state
from refinetool.errors import UsageError, WeightsError
from refinetool.modules.embedded import DETAIL_PREFIX, EmbeddedModel
from refinetool.modules.sam2_passes import set_image_size
from refinetool.settings import PackSettings, TrainSettings
from refinetool.train.embedded.whole import Whole
from refinetool.train.files import export
from refinetool.train.head.on_frozen import OnFrozen
from refinetool.train.loop import Source, check_run, train
from refinetool.train.ranks import ALONE, Ranks
from refinetool.train.steps import TrainProgress

WEIGHTS_FILE = "embedded.safetensors"


def train_embedded(
    data: Sequence[Path],
    output: Path,
    *,
    images: Path | None,
    start: Path | None,
    settings: TrainSettings,
    packing: PackSettings,
    device: str,
    resume: bool,
    on_packing: Callable[[int, int], None],
    on_progress: Callable[[TrainProgress], None],
    ranks: Ranks = ALONE,
) -> Path:
    """Train and export the embedded model, or its detail head alone.

    Args:
        data: One pack, or sources that `train.data.pack` takes, which are packed into `output/packed` first. Their
            training splits are used for training, their validation splits for measuring.
        output: Folder of the run, see `train.loop.train`; the weights are `embedded.safetensors`.
        images: Folder of the images of COCO files; None looks beside them.
        start: Weights of an embedded model to start from; None means random weights.
        packing: How sources are packed.
        resume: Continue from the checkpoint in the output.
        on_packing: Called with (images done, images in total).
        ranks: The processes that train together.

    Returns:
        The exported weights: fp16 safetensors with the recipe in the file's metadata.

    Raises:
        DataError: Data are not as described, or `resume` finds no checkpoint, or one made with other data.
        UsageError: An output would replace the weights to start from; a side is not a multiple of 32, or only the
            detail head is trained without weights to start from.
        WeightsError: `start` does not fit.
        StorageError: The output can't be written.
        Interrupted: Stopped by the user, after a checkpoint.
    """
    if settings.part == "detail" and start is None:
        raise UsageError(
            "--part detail trains the detail head on top of existing weights; name weights to start from with --from."
        )
    source = Source(tuple(data), images, start, packing)
    check_run(output, weights_file=WEIGHTS_FILE, source=source, settings=settings, resume=resume)

    def make() -> "_WholeModel | _DetailAlone":
        whole = _WholeModel(settings=settings)
        if start is not None:
            load_start(whole.model, start)
        whole.to(device)
        return _DetailAlone(whole.model, settings=settings) if settings.part == "detail" else whole

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


def load_start(model: EmbeddedModel, path: Path) -> None:
    """Load the weights of an embedded model; raises WeightsError if they don't fit.

    Weights without a detail head are accepted; the head then starts from random weights.
    """
    fresh = model.state_dict()
    head = {name: tensor for name, tensor in fresh.items() if name.startswith(DETAIL_PREFIX)}
    model.load_state_dict(read_fitting(path, fresh, without=head))


def read_fitting(
    path: Path, expected: Mapping[str, Tensor], *, without: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Read weights that fit the tensors of an embedded model; raises WeightsError if they don't.

    Args:
        without: Tensors that may be missing, all of them together, and are then added.
    """
    state = read_state(path)
    if without and state.keys().isdisjoint(without):
        state |= without
    problem = misfit(expected=expected, found=state)
    if problem:
        raise WeightsError(f"{path} does not fit the embedded model: {problem}. Name a file that train embedded wrote")
    return state


class _WholeModel(Whole):
    """All of the model, as the job of a run."""

    weights_file = WEIGHTS_FILE

    @property
    def about(self) -> dict[str, Any]:
        return {}

    def measured(self, average: nn.Module, side: int) -> tuple[Any, Any]:
        assert isinstance(average, EmbeddedModel)
        set_image_size(average, side)
        return average, average.detail if self.settings.part == "all" else None

    def save(self, average: nn.Module, path: Path, *, recipe: dict[str, str]) -> None:
        export(average.state_dict(), path, metadata=recipe)


class _DetailAlone(OnFrozen):
    """The detail head on the model's frozen SAM 2 part, as the job of a run; the weights are those of both."""

    weights_file = WEIGHTS_FILE

    def __init__(self, model: EmbeddedModel, *, settings: TrainSettings) -> None:
        super().__init__(model, model.detail, settings=settings, set_side=lambda side: set_image_size(model, side))

    @property
    def about(self) -> dict[str, Any]:
        return {}

    def measured(self, average: nn.Module, side: int) -> tuple[Any, Any]:
        self.set_side(side)
        return self.sam, average

    def save(self, average: nn.Module, path: Path, *, recipe: dict[str, str]) -> None:
        learnt: dict[str, Tensor] = {DETAIL_PREFIX + name: tensor for name, tensor in average.state_dict().items()}
        export(self.sam.state_dict() | learnt, path, metadata=recipe)
