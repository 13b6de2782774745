"""Averages the weights of embedded models.

The mean of weights that came from the same start is often better than each of them (Wortsman et al., "Model soups",
2022). The statistics of batch normalisation do not follow from those of the models, so they are computed anew.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from refinetool.errors import UsageError
from refinetool.formats.storage import refuse_clashes
from refinetool.modules.embedded import EmbeddedModel, build_embedded
from refinetool.modules.sam2_passes import set_image_size
from refinetool.settings import TrainSettings
from refinetool.train.data.pack import read_pack
from refinetool.train.data.sampler import Sampler
from refinetool.train.data.store import load_store
from refinetool.train.embedded.run import WEIGHTS_FILE, read_fitting
from refinetool.train.files import export, settings_entry, trained_with
from refinetool.train.questions import draw_groups, put


def average_embedded(
    weights: Sequence[Path],
    output: Path,
    *,
    data: Path,
    examples: int,
    device: str,
    on_progress: Callable[[int, int], None],
) -> Path:
    """Write the mean of the weights of several embedded models, normalised for the examples of training.

    The examples are drawn with the settings that the last file was trained with.

    Args:
        weights: Files that `train embedded` wrote, two or more. A file that is named twice counts twice.
        output: Folder for `embedded.safetensors`.
        data: A pack, such as the folder `packed` of a run.
        examples: Number of examples for the statistics of batch normalisation.
        on_progress: Called with (examples done, examples in total).

    Returns:
        The written weights: fp16 safetensors, with the averaged files and the settings in the metadata.

    Raises:
        UsageError: There are fewer than two files, or the output would replace one of them.
        WeightsError: A file does not hold an embedded model with a detail head.
        DataError: `data` is no pack.
        StorageError: The output can't be written.
    """
    if len(weights) < 2:
        raise UsageError(f"there is nothing to average in {len(weights)} file; name two or more files of weights.")
    written = output / WEIGHTS_FILE
    refuse_clashes({"averaged weights": written}, {f"weights {path}": path for path in weights} | {"pack": data})
    model = build_embedded(image_size=TrainSettings().side)
    fresh = model.state_dict()
    model.load_state_dict(mean_state([read_fitting(path, fresh) for path in weights]))
    # In batches of the default size, because those of a GPU may not fit.
    settings = replace(trained_with(weights[-1]), images_per_step=TrainSettings().images_per_step)
    store = load_store(read_pack(data), "train", device=device)
    normalise(
        model.to(device),
        Sampler(store, settings=settings, seed=settings.seed),
        examples=examples,
        settings=settings,
        on_progress=on_progress,
    )
    recipe = {"averaged": ", ".join(map(str, weights)), "data": str(data), **settings_entry(settings)}
    export(model.state_dict(), written, metadata=recipe)
    return written


def mean_state(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Average tensors of the same names and shapes, float32. Tensors of integers are those of the first state."""
    first = states[0]
    return {
        name: torch.stack([state[name].float() for state in states]).mean(0) if tensor.is_floating_point() else tensor
        for name, tensor in first.items()
    }


def normalise(
    model: EmbeddedModel,
    sampler: Sampler,
    *,
    examples: int,
    settings: TrainSettings,
    on_progress: Callable[[int, int], None],
) -> None:
    """Set mean and variance of the detail head's batch normalisation to those over some examples, in place."""
    for layer in model.detail.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()
            layer.momentum = None  # every batch counts as much
    model.eval()
    model.detail.train()
    set_image_size(model, settings.side)
    host = torch.Generator().manual_seed(settings.seed)
    with torch.no_grad():
        for numbers in torch.split(torch.arange(examples), settings.images_per_step):
            batch = sampler.batch(numbers, side=settings.side)
            put(model, model.detail, batch, draw_groups(settings, host), generator=None)
            on_progress(int(numbers[-1]) + 1, examples)
    model.eval()
