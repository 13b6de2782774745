"""How far a run has come, by steps or by the clock, and what follows from that: learning rate and side of the input."""

import math

from refinetool.settings import TrainSettings


def share_done(step: int, seconds: float, *, settings: TrainSettings) -> float:
    """Share of the run that is over at the end of a step: of its minutes if it has any, else of its steps."""
    if settings.minutes is None:
        return step / settings.steps
    return min(1.0, seconds / (60 * settings.minutes))


def seconds_left(step: int, seconds: float, *, rate: float, settings: TrainSettings) -> float:
    """Seconds to the end of the run at `rate` steps per second."""
    if settings.minutes is None:
        return (settings.steps - step) / rate if rate > 0 else math.inf
    return max(0.0, 60 * settings.minutes - seconds)


def learning_rate_at(step: int, share: float, *, settings: TrainSettings) -> float:
    """The learning rate as a share of its plateau: linear rise, plateau, cosine fall to `final_rate`."""
    progress = max(0.0, (share - (1 - settings.decay_share)) / settings.decay_share)
    cosine = settings.final_rate + (1 - settings.final_rate) * 0.5 * (1 + math.cos(math.pi * progress))
    return min(1.0, step / settings.warmup_steps) * cosine


def side_at(share: float, *, settings: TrainSettings) -> int:
    """Side of the model's input: small first, then the one it is used at."""
    return min(settings.small_side, settings.side) if share <= settings.small_share else settings.side
