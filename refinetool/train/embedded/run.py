"""Trains the embedded model: `train_embedded` sets up a run and takes all its steps.

The learning rate rises, stays on a plateau and falls over the last part of the run, so a run can be lengthened by
resuming it with more steps before the fall begins. The moving average of the weights is measured and exported.
"""

import copy
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import torch
from PIL import Image

from refinetool.backends.models import misfit, read_state
from refinetool.errors import DataError, Interrupted, UsageError, WeightsError
from refinetool.formats.storage import new_file, refuse_clashes
from refinetool.modules.embedded import DETAIL_PREFIX
from refinetool.running.interrupts import stop_on_interrupt
from refinetool.settings import PackSettings, TrainSettings
from refinetool.train.data.examples import Example
from refinetool.train.data.pack import Pack, packed
from refinetool.train.data.sampler import Sampler
from refinetool.train.data.store import load_store
from refinetool.train.embedded.checkpoint import (
    CHECKPOINT_FILE,
    METRICS_FILE,
    RUN_FILE,
    WEIGHTS_FILE,
    MetricsLog,
    Position,
    RunRecord,
    export,
    load_checkpoint,
    read_metrics,
    save_checkpoint,
    write_run,
)
from refinetool.train.embedded.curves import draw_curves
from refinetool.train.embedded.schedule import learning_rate_at, seconds_left, share_done, side_at
from refinetool.train.embedded.step import Trainee, build_optimizer, train_step
from refinetool.train.embedded.validation import VALIDATION_SEED, fixed_examples, sample_picture, validate

PACKED_FOLDER, CURVES_FILE = "packed", "curves.png"
LOG_EVERY = 50
GPU_REPORTS_EVERY = 10
"""Reading the loss makes a GPU wait, so on a GPU it is not read after every step."""


@dataclass(frozen=True, slots=True)
class TrainProgress:
    """One report of a run, with validation figures when there are new ones.

    steps: None for a run by the clock.
    share: Completed fraction of the run, 0..1.
    """

    step: int
    steps: int | None
    share: float
    loss: float
    iou: float
    images_per_second: float
    seconds_left: float
    validation: dict[str, float] | None


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
) -> Path:
    """Train and export the embedded model.

    Args:
        data: One pack, or sources that `train.data.pack` takes, which are packed into `output/packed` first. Their
            training splits are used for training, their validation splits for measuring.
        output: Folder for `run.json`, `checkpoint.pt`, `metrics.jsonl`, `samples-STEP.png` at each validation,
            `curves.png` at the end, and the exported `embedded.safetensors`.
        images: Folder of the images of COCO files; None looks beside them.
        start: Weights of an embedded model to start from; None means random weights.
        packing: How sources are packed.
        resume: Continue from `output/checkpoint.pt`; on the same device, a run by steps then ends like an uninterrupted
            one.
        on_packing: Called with (pictures done, pictures in total).

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
    if settings.side % 32 or settings.small_side % 32:
        raise UsageError(f"the side is {settings.side} px; expected a multiple of 32.")
    if settings.part == "detail" and start is None:
        raise UsageError(
            "--part detail trains the detail head on top of existing weights; name weights to start from with --from."
        )
    if resume and not (output / CHECKPOINT_FILE).is_file():
        raise DataError(f"{output / CHECKPOINT_FILE} does not exist, so there is nothing to resume; leave --resume out")
    refuse_clashes(
        {name: output / name for name in (RUN_FILE, CHECKPOINT_FILE, METRICS_FILE, WEIGHTS_FILE, CURVES_FILE)},
        {"weights to start from": start, **{f"data {path}": path for path in data}},
    )
    pack = packed(data, output / PACKED_FOLDER, images=images, settings=packing, on_progress=on_packing)
    torch.manual_seed(settings.seed)
    trainee = Trainee(settings.side, part=settings.part)
    if start is not None:
        load_start(trainee, start)
    run = _Run(trainee.to(device), pack, output, settings=settings, device=device)
    if resume:
        run.restore()
    write_run(output, RunRecord(tuple(data), images, start, settings))
    run.go(on_progress)
    return output / WEIGHTS_FILE


def load_start(trainee: Trainee, path: Path) -> None:
    """Load the weights of an embedded model into a trainee; raises WeightsError if they don't fit.

    Weights without a detail head are accepted; the head then starts from random weights.
    """
    state, fresh = read_state(path), trainee.model.state_dict()
    if not any(name.startswith(DETAIL_PREFIX) for name in state):
        state |= {name: tensor for name, tensor in fresh.items() if name.startswith(DETAIL_PREFIX)}
    problem = misfit(expected=fresh, found=state)
    if problem:
        raise WeightsError(f"{path} does not fit the embedded model: {problem}. Name a file that train embedded wrote")
    trainee.model.load_state_dict(state)


class _Run:
    """The state of a run between two steps."""

    def __init__(self, trainee: Trainee, pack: Pack, output: Path, *, settings: TrainSettings, device: str) -> None:
        self.trainee, self.pack, self.output = trainee, pack, output
        self.settings, self.device = settings, device
        self.average = copy.deepcopy(trainee.model).eval()
        self.optimizer = build_optimizer(trainee, settings=settings)
        self.sampler = Sampler(load_store(pack, "train", device=device), settings=settings, seed=settings.seed)
        self.position = Position(0, 0.0, pack.digest)

    @cached_property
    def fixed(self) -> list[Example]:
        """The validation examples, made when they are first needed."""
        store = load_store(self.pack, "val", device=self.device)
        sampler = Sampler(store, settings=self.settings, seed=VALIDATION_SEED)
        return fixed_examples(sampler, count=self.settings.validation_examples, side=self.settings.side)

    def restore(self) -> None:
        self.position = load_checkpoint(
            self.output / CHECKPOINT_FILE, self.trainee, self.average, self.optimizer, data=self.pack.digest
        )

    def go(self, on_progress: Callable[[TrainProgress], None]) -> None:
        """Take the remaining steps, and finish."""
        settings, first = self.settings, self.position
        log = MetricsLog(self.output / METRICS_FILE, step=first.step)
        began, measuring = time.monotonic(), 0.0
        reports_every = 1 if self.device == "cpu" else GPU_REPORTS_EVERY
        with stop_on_interrupt(after="the step is taken") as stop, drawing_thread(self.device) as thread:
            coming = thread.submit(self._draw, first.step + 1)
            while not self.over:
                step = self.position.step + 1
                batch = coming.result()
                if settings.minutes is not None or step < settings.steps:
                    coming = thread.submit(self._draw, step + 1)
                loss, iou = self._step(step, batch)
                seconds = time.monotonic() - began
                self.position = Position(step, first.seconds + seconds, self.pack.digest)
                last, stopping = self.over, stop.is_set()
                rate = (step - first.step) / (seconds - measuring)
                figures = None
                if last or step % settings.validate_every == 0:
                    figures = self._measured(step)
                    measuring += time.monotonic() - began - seconds
                if figures or stopping or step % reports_every == 0:
                    progress = TrainProgress(
                        step,
                        None if settings.minutes is not None else settings.steps,
                        share_done(step, self.position.seconds, settings=settings),
                        float(loss),
                        float(iou),
                        rate * settings.images_per_step,
                        seconds_left(step, self.position.seconds, rate=rate, settings=settings),
                        figures,
                    )
                    if figures or step % LOG_EVERY == 0:
                        log.write({**asdict(progress), "seconds": round(self.position.seconds, 1)})
                    on_progress(progress)
                if last or stopping or step % settings.save_every == 0:
                    self._save()
                if stopping and not last:
                    raise Interrupted(f"stopped after step {step}; the checkpoint is {self.output / CHECKPOINT_FILE}")
        self._finish()

    @property
    def over(self) -> bool:
        """Whether the run is complete."""
        if self.settings.minutes is None:
            return self.position.step >= self.settings.steps
        return self.position.seconds >= 60 * self.settings.minutes

    def _draw(self, step: int) -> Example:
        settings = self.settings
        side = side_at(share_done(step, self.position.seconds, settings=settings), settings=settings)
        numbers = (step - 1) * settings.images_per_step + torch.arange(settings.images_per_step)
        return self.sampler.batch(numbers, side=side)

    def _step(self, step: int, batch: Example) -> tuple[torch.Tensor, torch.Tensor]:
        settings = self.settings
        # A schedule by steps uses the current step, a schedule by the clock the time at which the step begins.
        share = share_done(step, self.position.seconds, settings=settings)
        return train_step(
            self.trainee,
            self.average,
            self.optimizer,
            batch,
            step=step,
            learning_rate=settings.learning_rate * learning_rate_at(step, share, settings=settings),
            settings=settings,
        )

    def _measured(self, step: int) -> dict[str, float]:
        figures = validate(self.average, self.fixed, settings=self.settings)
        picture = Image.fromarray(sample_picture(self.average, self.fixed[0], settings=self.settings))
        with new_file(self.output / f"samples-{step:06}.png") as file:
            picture.save(file, format="PNG")
        return figures

    def _save(self) -> None:
        step = self.position.step
        save_checkpoint(self.output / CHECKPOINT_FILE, self.trainee, self.average, self.optimizer, self.position)
        names = [source.name for source in self.pack.sources]
        export(self.average, self.output / WEIGHTS_FILE, step=step, settings=self.settings, data=names)

    def _finish(self) -> None:
        lines = read_metrics(self.output / METRICS_FILE)
        if lines:
            with new_file(self.output / CURVES_FILE) as file:
                file.write(draw_curves(lines))


def drawing_thread(device: str) -> ThreadPoolExecutor:
    """Return the thread that makes the next batch while the model is trained on the current one.

    On a CPU it uses one torch thread, because its operations are small and more threads would only wait for each other.
    """
    if device == "cpu":
        return ThreadPoolExecutor(1, "examples", initializer=torch.set_num_threads, initargs=(1,))
    return ThreadPoolExecutor(1, "examples")
