"""Reads and writes the files of a training run: its record, checkpoint, metrics and weights."""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors.torch import save
from torch import Tensor

from refinetool.errors import DataError, StorageError, WeightsError, first_line
from refinetool.formats.storage import new_file
from refinetool.modules.described_files import read_description
from refinetool.settings import TrainSettings
from refinetool.train.step import Learner

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

R = TypeVar("R")

RUN_FILE, CHECKPOINT_FILE, METRICS_FILE = "run.json", "checkpoint.pt", "metrics.jsonl"
SETTINGS = "settings"
"""The entry of the metadata of weights that holds the settings of their run, as JSON."""


@dataclass(frozen=True, slots=True)
class Position:
    """The progress of a run: steps and seconds of training, and the digest of its pack."""

    step: int
    seconds: float
    data: str


@dataclass(frozen=True, slots=True)
class RunRecord:
    """The arguments of a run.

    start: Weights to start from.
    about: Further arguments, which depend on what is trained.
    """

    data: tuple[Path, ...]
    images: Path | None
    start: Path | None
    settings: TrainSettings
    about: dict[str, Any] = field(default_factory=dict)


def write_arguments(run: "DataclassInstance", path: Path) -> None:
    """Record the arguments of a run, so that it can be resumed without giving them again; paths become absolute."""
    with new_file(path) as file:
        file.write(json.dumps(asdict(run), indent=1, default=lambda found: str(found.absolute())).encode())


def read_arguments(folder: Path, build: Callable[[dict[str, Any]], R]) -> R:
    """Read the arguments of the run in a folder.

    Args:
        build: Makes them of what `write_arguments` wrote, in JSON types, but with `data` and `images` as paths.

    Raises:
        DataError: There is no run, or its record is damaged.
    """
    path = folder / RUN_FILE
    if not path.is_file():
        raise DataError(f"{folder} holds no {RUN_FILE}, so there is nothing to resume; leave --resume out.")
    try:
        content = json.loads(path.read_text())
        content["data"] = tuple(map(Path, content["data"]))
        content["images"] = None if content["images"] is None else Path(content["images"])
        return build(content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: can't be read as the record of a run ({error}); start afresh.") from error


def read_run(output: Path) -> RunRecord:
    """Read the arguments of the run in a folder; raises DataError if there is none."""
    return read_arguments(
        output,
        lambda content: RunRecord(
            content["data"],
            content["images"],
            None if content["start"] is None else Path(content["start"]),
            TrainSettings(**content["settings"]),
            dict(content.get("about", {})),
        ),
    )


def save_checkpoint(path: Path, learner: Learner, position: Position) -> None:
    """Write everything a resumed run needs, atomically."""
    state = {
        "trainee": learner.trained.module.state_dict(),
        "average": learner.average.state_dict(),
        "optimizer": learner.optimizer.state_dict(),
        "position": asdict(position),
    }
    with new_file(path) as file:
        torch.save(state, file)


def load_checkpoint(path: Path, learner: Learner, *, data: str) -> Position:
    """Restore a run and return its progress.

    Args:
        data: Digest of the current pack, which must be the one the run began with.

    Raises:
        DataError: There is no checkpoint, it is damaged, or the data have changed.
    """
    if not path.is_file():
        raise DataError(f"{path} does not exist, so there is nothing to resume; leave --resume out to start afresh")
    device = next(learner.average.parameters()).device
    try:
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location=device)
        position = Position(**state["position"])
        learner.trained.module.load_state_dict(state["trainee"])
        learner.average.load_state_dict(state["average"])
        learner.optimizer.load_state_dict(state["optimizer"])
    except Exception as error:
        raise DataError(f"{path}: can't be read as a checkpoint ({first_line(error)}); start afresh.") from error
    if position.data != data:
        raise DataError(f"{path}: the run began with other data; put them back, or start afresh without --resume.")
    return position


def export(tensors: Mapping[str, Tensor], path: Path, *, metadata: Mapping[str, str]) -> None:
    """Write tensors as fp16 safetensors; those that are not floating-point keep their type."""
    halves = {
        name: (tensor.half() if tensor.is_floating_point() else tensor).detach().contiguous().cpu()
        for name, tensor in tensors.items()
    }
    with new_file(path) as file:
        file.write(save(halves, metadata=dict(metadata)))


def settings_entry(settings: TrainSettings) -> dict[str, str]:
    """Return the entry of the metadata of weights that says how they were trained."""
    return {SETTINGS: json.dumps(asdict(settings))}


def trained_with(weights: Path) -> TrainSettings:
    """Return the settings that weights were trained with; the defaults, where the file does not say.

    Raises:
        WeightsError: The record of the settings is damaged.
    """
    if weights.suffix != ".safetensors":
        return TrainSettings()
    found = read_description(
        weights, entry=SETTINGS, what="a model with a record of its training", writer="refinetool train embedded"
    )
    try:
        return replace(TrainSettings(), **{name: found[name] for name in asdict(TrainSettings()) if name in found})
    except (ValueError, TypeError) as error:
        raise WeightsError(
            f"{weights}: the settings of the run in its metadata can't be read ({error}); name weights that train "
            "embedded wrote."
        ) from error


class MetricsLog:
    """`metrics.jsonl`: one JSON object per line, in the order of steps."""

    def __init__(self, path: Path, *, step: int) -> None:
        """Open a log after a step. Lines of later steps are dropped, because a resumed run repeats these steps."""
        self.path = path
        kept = [line for line in read_metrics(path) if line["step"] <= step] if step else []
        with new_file(path) as file:
            file.write("".join(json.dumps(line) + "\n" for line in kept).encode())

    def write(self, line: dict[str, Any]) -> None:
        """Append a line."""
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise StorageError(f"{self.path}: can't be written ({error.strerror}).") from error


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a log; an incomplete line of a killed run is dropped, and so is a damaged one."""
    lines = []
    for text in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines
