"""The training loop: `train` sets up a run and takes all its steps, whatever is trained.

The learning rate rises, stays on a plateau and falls over the last part of the run, so a run can be lengthened by
resuming it with more steps before the fall begins. The moving average of the weights is measured and exported.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from torch import nn

from refinetool.errors import DataError, UsageError
from refinetool.formats.storage import new_file, refuse_clashes
from refinetool.modules.heads import Head
from refinetool.settings import PackSettings, TrainSettings
from refinetool.train.curves import draw_curves
from refinetool.train.data.examples import Example
from refinetool.train.data.pack import Pack, packed
from refinetool.train.data.sampler import Sampler
from refinetool.train.data.store import load_store
from refinetool.train.files import (
    CHECKPOINT_FILE,
    METRICS_FILE,
    RUN_FILE,
    Position,
    RunRecord,
    load_checkpoint,
    read_metrics,
    save_checkpoint,
    settings_entry,
    write_arguments,
)
from refinetool.train.ranks import Ranks
from refinetool.train.schedule import learning_rate_at, seconds_left, share_done, side_at
from refinetool.train.step import Learner, Loss, Trained
from refinetool.train.steps import Pace, TrainProgress, take_steps
from refinetool.train.validation import VALIDATION_SEED, fixed_examples, sample_picture, validate

PACKED_FOLDER, CURVES_FILE = "packed", "curves.png"


class Job(Trained, Protocol):
    """What a run needs of what it trains, besides its loss."""

    @property
    def weights_file(self) -> str:
        """Name of the file of weights that the run leaves."""

    @property
    def about(self) -> dict[str, Any]:
        """What the record of the run says of it, besides data and settings."""

    def measured(self, average: nn.Module, side: int) -> tuple[Any, Head | None]:
        """Return the model and the head to measure, given the average of the product, for inputs of a side."""

    def save(self, average: nn.Module, path: Path, *, recipe: dict[str, str]) -> None:
        """Write the weights; the recipe becomes part of the file."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where the examples of a run come from, and which weights it started from, for its record."""

    data: tuple[Path, ...]
    images: Path | None
    start: Path | None
    packing: PackSettings


def check_run(output: Path, *, weights_file: str, source: Source, settings: TrainSettings, resume: bool) -> None:
    """Refuse what a run can't do before anything is computed.

    Raises:
        UsageError: An output would replace an input, or a side is not a multiple of 32.
        DataError: `resume` finds no checkpoint.
    """
    if settings.side % 32 or settings.small_side % 32:
        raise UsageError(f"the side is {settings.side} px; expected a multiple of 32.")
    if resume and not (output / CHECKPOINT_FILE).is_file():
        raise DataError(f"{output / CHECKPOINT_FILE} does not exist, so there is nothing to resume; leave --resume out")
    refuse_clashes(
        {name: output / name for name in (RUN_FILE, CHECKPOINT_FILE, METRICS_FILE, weights_file, CURVES_FILE)},
        {"weights to start from": source.start, **{f"data {path}": path for path in source.data}},
    )


def train(
    make: Callable[[], Job],
    output: Path,
    *,
    source: Source,
    settings: TrainSettings,
    device: str,
    ranks: Ranks,
    resume: bool,
    on_packing: Callable[[int, int], None],
    on_progress: Callable[[TrainProgress], None],
) -> Path:
    """Train and export; returns the exported weights.

    Args:
        make: Makes what is trained, on the device; called once, after the data are packed.
        output: Folder for `run.json`, `checkpoint.pt`, `metrics.jsonl`, `samples-STEP.png` at each validation,
            `curves.png` at the end, and the weights.
        ranks: The processes that train together; the first one writes.
        resume: Continue from `output/checkpoint.pt`; on the same device, a run by steps then ends like an uninterrupted
            one.
        on_packing: Called with (images done, images in total).

    Raises:
        DataError: Data are not as described, or the checkpoint was made with other data.
        StorageError: The output can't be written.
        Interrupted: Stopped by the user, after a checkpoint.
    """
    if not ranks.first:
        ranks.wait()  # for the first one to pack the data
    pack = packed(
        source.data, output / PACKED_FOLDER, images=source.images, settings=source.packing, on_progress=on_packing
    )
    if ranks.first:
        ranks.wait()
    torch.manual_seed(settings.seed)
    job = make()
    run = _Run(job, pack, output, settings=settings, device=device, ranks=ranks)
    if resume:
        run.restore()
    if ranks.first:
        record = RunRecord(source.data, source.images, source.start, settings, job.about)
        write_arguments(record, output / RUN_FILE)
    run.go(on_progress)
    return output / job.weights_file


class _Run:
    """The state of a run between two steps."""

    def __init__(
        self, job: Job, pack: Pack, output: Path, *, settings: TrainSettings, device: str, ranks: Ranks
    ) -> None:
        self.job, self.pack, self.output = job, pack, output
        self.settings, self.device, self.ranks = settings, device, ranks
        self.learner = Learner(job, settings=settings, ranks=ranks)
        self.sampler = Sampler(load_store(pack, "train", device=device), settings=settings, seed=settings.seed)
        self.position = Position(0, 0.0, pack.digest)

    @cached_property
    def fixed(self) -> list[Example]:
        """The validation examples, made when they are first needed."""
        store = load_store(self.pack, "val", device=self.device)
        sampler = Sampler(store, settings=self.settings, seed=VALIDATION_SEED)
        return fixed_examples(sampler, count=self.settings.validation_examples, side=self.settings.side)

    def restore(self) -> None:
        self.position = load_checkpoint(self.output / CHECKPOINT_FILE, self.learner, data=self.pack.digest)

    def go(self, on_progress: Callable[[TrainProgress], None]) -> None:
        """Take the remaining steps, and finish."""
        settings = self.settings
        steps = None if settings.minutes is not None else settings.steps
        pace = Pace(steps, settings.images_per_step, settings.validate_every, settings.save_every)
        take_steps(self, self.output, pace=pace, device=self.device, ranks=self.ranks, on_progress=on_progress)
        if self.ranks.first:
            self._finish()

    def share(self) -> float:
        """Return the completed fraction of the run."""
        return share_done(self.position.step, self.position.seconds, settings=self.settings)

    def seconds_left(self, rate: float) -> float:
        """Return the seconds to the end of the run at `rate` steps per second."""
        return seconds_left(self.position.step, self.position.seconds, rate=rate, settings=self.settings)

    @property
    def over(self) -> bool:
        """Whether the run is complete."""
        if self.settings.minutes is None:
            return self.position.step >= self.settings.steps
        return self.position.seconds >= 60 * self.settings.minutes

    def draw(self, step: int) -> Example:
        """Make the batch of a step."""
        settings = self.settings
        side = side_at(share_done(step, self.position.seconds, settings=settings), settings=settings)
        numbers = (step - 1) * settings.images_per_step + torch.arange(settings.images_per_step)
        return self.sampler.batch(self.ranks.share(numbers), side=side)

    def take(self, step: int, batch: Example) -> Loss:
        """Take a step."""
        settings = self.settings
        # A schedule by steps uses the current step, a schedule by the clock the time at which the step begins.
        share = share_done(step, self.position.seconds, settings=settings)
        rate = settings.learning_rate * learning_rate_at(step, share, settings=settings)
        return self.learner.step(batch, step=step, learning_rate=rate)

    def measured(self, step: int) -> dict[str, float]:
        """Measure the average on the validation examples, and draw some of them."""
        sam, head = self.job.measured(self.learner.average, self.settings.side)
        figures = validate(sam, head, self.fixed, settings=self.settings)
        picture = Image.fromarray(sample_picture(sam, head, self.fixed[0]))
        with new_file(self.output / f"samples-{step:06}.png") as file:
            picture.save(file, format="PNG")
        return figures

    def save(self) -> None:
        """Write a checkpoint and the weights."""
        save_checkpoint(self.output / CHECKPOINT_FILE, self.learner, self.position)
        recipe = {
            "step": str(self.position.step),
            **settings_entry(self.settings),
            "data": ", ".join(source.name for source in self.pack.sources),
        }
        self.job.save(self.learner.average, self.output / self.job.weights_file, recipe=recipe)

    def _finish(self) -> None:
        lines = read_metrics(self.output / METRICS_FILE)
        if lines:
            with new_file(self.output / CURVES_FILE) as file:
                file.write(draw_curves(lines))
