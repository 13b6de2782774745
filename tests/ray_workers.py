"""Workers for tests of Ray: fakes that kill their process over some samples, and runs with them."""

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from fake_refiner import Shift
from test_runners import Job, journalled

from refinetool.records import Sample
from refinetool.running.interrupts import stop_on_interrupt
from refinetool.running.journal import Journal
from refinetool.running.run import run
from refinetool.running.runners import CrewRunner, RefineUnits, Team
from refinetool.running.summary import Summary

MARKS = [
    pytest.mark.ray,
    # Ray leaves its pipes and subprocesses to the garbage collector.
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray"),
]
HERE = str(Path(__file__).parent)
WORKERS = 2


class Dangerous(Shift):
    """Kills its process over some samples, once or always; takes a while for each."""

    def __init__(self, root: Path, seconds: float, once: frozenset[str], always: frozenset[str]) -> None:
        super().__init__()
        self.root, self.seconds, self.once, self.always = root, seconds, once, always

    def segment(self, jobs: Sequence[tuple[str, np.ndarray]]) -> list[np.ndarray]:
        for key in dict.fromkeys(key for key, _ in jobs):
            mark = self.root / f"killed {key}"
            if key in self.always or (key in self.once and not mark.exists()):
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(self.seconds)
        return super().segment(jobs)


@dataclass(frozen=True)
class Load:
    """What is loaded in a worker."""

    root: Path
    seconds: float = 0.0
    once: frozenset[str] = frozenset()
    always: frozenset[str] = frozenset()

    def __call__(self) -> object:
        from refinetool.running.ray import Loaded

        refiner = Dangerous(self.root, self.seconds, self.once, self.always)
        (self.root / f"worker {os.getpid()}").touch()
        return Loaded(RefineUnits(refiner, 2, 1), {"model": "shift"})  # type: ignore[arg-type]


def crew_of(load: object, workers: int = WORKERS, cpus: int = 1, gpus: int = 0) -> object:
    from refinetool.running.ray import Place, RayCrew

    return RayCrew(load, workers=workers, place=Place(cpus=cpus, gpus=gpus), folder=Path.cwd())  # type: ignore[arg-type]


def crewed(samples: Sequence[Sample], load: object, path: Path, *, unit: int = 4) -> Summary:
    """Run samples on a crew, with a journal."""
    with crew_of(load) as crew, Journal(path, job={}, fresh=False) as journal:  # type: ignore[attr-defined]
        runner = CrewRunner(Team(crew, WORKERS, unit))
        with stop_on_interrupt(after="the model has answered") as stop:
            return run(samples, runner, journal=journal, total=len(samples), on_progress=lambda _: None, stop=stop)


def in_one_process(samples: Sequence[Sample], path: Path) -> list[dict[str, object]]:
    Job(path).run(samples)
    return journalled(path)
