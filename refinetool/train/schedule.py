"""Computes the completed fraction of a run, by steps or by the clock, and from it learning rate and input side."""

import math
from typing import Protocol

from refinetool.settings import TrainSettings


def share_done(step: int, seconds: float, *, settings: TrainSettings) -> float:
    """Return the completed fraction of a run at the end of a step: of its minutes if it has any, else of its steps."""
    if settings.minutes is None:
        return step / settings.steps
    return min(1.0, seconds / (60 * settings.minutes))


def seconds_left(step: int, seconds: float, *, rate: float, settings: TrainSettings) -> float:
    """Return the seconds to the end of the run at `rate` steps per second."""
    if settings.minutes is None:
        return (settings.steps - step) / rate if rate > 0 else math.inf
    return max(0.0, 60 * settings.minutes - seconds)


class Falling(Protocol):
    """How a learning rate rises and falls, see `TrainSettings`."""

    @property
    def warmup_steps(self) -> int: ...

    @property
    def decay_share(self) -> float: ...

    @property
    def final_rate(self) -> float: ...


def learning_rate_at(step: int, share: float, *, settings: Falling) -> float:
    """Return the learning rate relative to its plateau: linear rise, plateau, cosine fall to `final_rate`."""
    progress = max(0.0, (share - (1 - settings.decay_share)) / settings.decay_share)
    cosine = settings.final_rate + (1 - settings.final_rate) * 0.5 * (1 + math.cos(math.pi * progress))
    return min(1.0, step / settings.warmup_steps) * cosine


def side_at(share: float, *, settings: TrainSettings) -> int:
    """Return the side of the model's input: small at first, then the full side."""
    return min(settings.small_side, settings.side) if share <= settings.small_share else settings.side
