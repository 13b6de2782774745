"""Takes the steps of a training run, whatever is trained: progress, log, validation, checkpoints and interruptions."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

import torch

from refinetool.errors import Interrupted
from refinetool.running.interrupts import stop_on_interrupt
from refinetool.train.files import CHECKPOINT_FILE, METRICS_FILE, MetricsLog, Position
from refinetool.train.ranks import Ranks
from refinetool.train.step import Loss

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


@dataclass(frozen=True, slots=True)
class Pace:
    """How long a run is, and how often it stops to measure and to save.

    steps: None for a run by the clock.
    rows: Images, or episodes, per step.
    """

    steps: int | None
    rows: int
    validate_every: int
    save_every: int


B = TypeVar("B")


class Stepping(Protocol[B]):
    """The state of a run between two steps."""

    position: Position

    @property
    def over(self) -> bool:
        """Whether the run is complete."""

    def draw(self, step: int) -> B:
        """Make the batch of a step. Called in a thread of its own, while the step before is taken."""

    def take(self, step: int, batch: B) -> Loss:
        """Take a step."""

    def measured(self, step: int) -> dict[str, float]:
        """Measure what was learnt so far."""

    def save(self) -> None:
        """Write a checkpoint and the weights."""

    def share(self) -> float:
        """Return the completed fraction of the run."""

    def seconds_left(self, rate: float) -> float:
        """Return the seconds to the end of the run at `rate` steps per second."""


class CountedRun:
    """A run of a number of steps: how much of it is done.

    steps: How many there are.
    position: How many were taken.
    """

    steps: int
    position: Position

    @property
    def over(self) -> bool:
        """Whether the run is complete."""
        return self.position.step >= self.steps

    def share(self) -> float:
        """Return the completed fraction of the run."""
        return self.position.step / self.steps

    def seconds_left(self, rate: float) -> float:
        """Return the seconds to the end of the run at `rate` steps per second."""
        return (self.steps - self.position.step) / rate


def take_steps(
    run: Stepping[B],
    output: Path,
    *,
    pace: Pace,
    device: str,
    ranks: Ranks,
    on_progress: Callable[[TrainProgress], None],
) -> None:
    """Take the remaining steps of a run.

    Args:
        output: The folder of `metrics.jsonl` and the checkpoint.
        ranks: The processes that train together; the first one writes and reports.

    Raises:
        StorageError: The output can't be written.
        Interrupted: Stopped by the user, after a checkpoint.
    """
    first = run.position
    log = MetricsLog(output / METRICS_FILE, step=first.step) if ranks.first else None
    began, measuring = time.monotonic(), 0.0
    reports_every = 1 if device == "cpu" else GPU_REPORTS_EVERY
    with stop_on_interrupt(after="the step is taken") as stop, drawing_thread(device) as thread:
        coming = thread.submit(run.draw, first.step + 1)
        while not run.over:
            step = run.position.step + 1
            batch = coming.result()
            if pace.steps is None or step < pace.steps:
                coming = thread.submit(run.draw, step + 1)
            loss = run.take(step, batch)
            seconds = ranks.agree(time.monotonic() - began, device=device)
            run.position = replace(run.position, step=step, seconds=first.seconds + seconds)
            last, stopping = run.over, bool(ranks.agree(float(stop.is_set()), device=device))
            rate = (step - first.step) / max(seconds - measuring, 1e-6)
            figures = None
            if ranks.first and (last or step % pace.validate_every == 0):
                figures = run.measured(step)
                measuring += time.monotonic() - began - seconds
            if ranks.first and (figures or stopping or step % reports_every == 0):
                progress = TrainProgress(
                    step,
                    pace.steps,
                    run.share(),
                    float(loss.total),
                    float(loss.iou),
                    rate * pace.rows,
                    run.seconds_left(rate),
                    figures,
                )
                if log and (figures or step % LOG_EVERY == 0):
                    log.write({**asdict(progress), "seconds": round(run.position.seconds, 1)})
                on_progress(progress)
            if ranks.first and (last or stopping or step % pace.save_every == 0):
                run.save()
            if stopping and not last:
                raise Interrupted(f"stopped after step {step}; the checkpoint is {output / CHECKPOINT_FILE}")


def drawing_thread(device: str) -> ThreadPoolExecutor:
    """Return the thread that makes the next batch while the model is trained on the current one.

    On a CPU it uses one torch thread, because its operations are small and more threads would only wait for each other.
    """
    if device == "cpu":
        return ThreadPoolExecutor(1, "examples", initializer=torch.set_num_threads, initargs=(1,))
    return ThreadPoolExecutor(1, "examples")
