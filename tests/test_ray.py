"""Workers in Ray actors: the same outcomes as in one process, whoever is killed. Starts a cluster, so it is marked."""

import gc
import os
import resource
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from fake_refiner import samples_of
from ray_workers import HERE, MARKS, WORKERS, Dangerous, Load, crew_of, crewed, in_one_process
from test_runners import journalled

from refinetool.errors import RefinetoolError, UsageError, WeightsError
from refinetool.running.runners import RefineUnits

pytestmark = MARKS


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A cluster of this machine, for all tests that leave it as it is."""
    from refinetool.running.ray import cluster

    os.environ["PYTHONPATH"] = HERE
    with cluster(None, cpus=WORKERS):
        yield
    gc.collect()


@pytest.mark.usefixtures("cluster")
def test_two_workers_find_what_one_process_finds(tmp_path: Path) -> None:
    samples = samples_of(60, tmp_path / "images")
    samples[9].image.unlink()
    summary = crewed(samples, Load(tmp_path, seconds=0.02), tmp_path / "j")
    assert journalled(tmp_path / "j") == in_one_process(samples, tmp_path / "whole")
    assert (summary.images, summary.failed, summary.crashes) == (60, 1, ())
    assert len(list(tmp_path.glob("worker *"))) == WORKERS


@pytest.mark.usefixtures("cluster")
def test_killed_workers_cost_nothing_and_an_image_that_kills_twice_stays_coarse(tmp_path: Path) -> None:
    samples = samples_of(60, tmp_path / "images")
    load = Load(tmp_path, once=frozenset({"image 5", "image 38"}), always=frozenset({"image 21"}))
    summary = crewed(samples, load, tmp_path / "j")
    assert summary.kept == {"worker-died": 1}, "image 21 has one region to refine"
    assert summary.failed == 1
    assert (
        "21.jpg: the worker process died twice while it refined this image (the process was killed"
        in (summary.errors[0])
    )
    assert len(summary.crashes) == 4
    whole = in_one_process(samples, tmp_path / "whole")
    found = journalled(tmp_path / "j")
    assert [line for line in found if line["key"] != "image 21"] == [
        line for line in whole if line["key"] != "image 21"
    ]
    again = crewed(samples, Load(tmp_path), tmp_path / "j")
    assert (again.reused, again.redone, again.failed) == (44, 1, 0), "what failed is done again"


@pytest.mark.usefixtures("cluster")
def test_a_crash_leaves_its_log(tmp_path: Path) -> None:
    class Segfault(Dangerous):
        def segment(self, jobs: Sequence[tuple[str, np.ndarray]]) -> list[np.ndarray]:
            if jobs[0][0] == "image 1":
                import ctypes

                ctypes.string_at(0)
            return super().segment(jobs)

    def load() -> object:
        from refinetool.running.ray import Loaded

        return Loaded(RefineUnits(Segfault(tmp_path, 0, frozenset(), frozenset()), 1, 1), {"a": 1})  # type: ignore[arg-type]

    summary = crewed(samples_of(6, tmp_path / "images"), load, tmp_path / "j", unit=1)
    assert "crashed: Segmentation fault" in summary.errors[0]
    assert "in segment" in summary.crashes[0], "the stack of the process"


@pytest.mark.usefixtures("cluster")
def test_a_bug_in_a_worker_is_raised_here_with_its_traceback(tmp_path: Path) -> None:
    class Buggy(Dangerous):
        def finish(self, *_: object) -> object:  # type: ignore[override]
            raise ZeroDivisionError("a bug")

    def load() -> object:
        from refinetool.running.ray import Loaded

        return Loaded(RefineUnits(Buggy(tmp_path, 0, frozenset(), frozenset()), 1, 1), {"a": 1})  # type: ignore[arg-type]

    with pytest.raises(ZeroDivisionError, match="a bug") as caught:
        crewed(samples_of(6, tmp_path / "images"), load, tmp_path / "j")
    notes = "".join(caught.value.__notes__)
    assert "in finish" in notes
    assert "while refining image 1" in notes


@pytest.mark.usefixtures("cluster")
def test_what_a_worker_can_not_load_is_said_in_its_words() -> None:
    def load() -> object:
        raise WeightsError("w.pt holds a cat, expected weights")

    with pytest.raises(WeightsError, match=r"w\.pt holds a cat, expected weights"):
        crew_of(load)


@pytest.mark.usefixtures("cluster")
def test_workers_that_are_not_alike_are_refused(tmp_path: Path) -> None:
    def load() -> object:
        from refinetool.running.ray import Loaded

        first = not (tmp_path / "there").exists()
        (tmp_path / "there").touch()
        return Loaded(len, {"model": "shift", "torch": "2.7" if first else "2.8"})  # type: ignore[arg-type]

    with pytest.raises(UsageError, match=r"not alike: torch is 2\.\d for one and 2\.\d for another"):
        crewed(samples_of(60, tmp_path / "images"), load, tmp_path / "j")


@pytest.mark.usefixtures("cluster")
def test_workers_that_can_not_be_placed_are_refused_at_once() -> None:
    with pytest.raises(UsageError, match="3 workers need 3 CPUs, and the cluster has 2; name fewer --workers"):
        crew_of(len, workers=3)
    with pytest.raises(UsageError, match="1 workers need 1 GPUs, and the cluster has 0; use --device cpu"):
        crew_of(len, workers=1, cpus=0, gpus=1)


@pytest.mark.usefixtures("cluster")
def test_a_worker_that_can_not_stay_alive_ends_the_run() -> None:
    def load() -> object:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(RefinetoolError, match=r"no worker is left; worker \d: the process was killed"):
        crew_of(load)


@pytest.mark.usefixtures("cluster")
def test_an_image_that_needs_too_much_memory_stays_coarse_and_the_worker_lives(tmp_path: Path) -> None:
    class Greedy(Dangerous):
        def segment(self, jobs: Sequence[tuple[str, np.ndarray]]) -> list[np.ndarray]:
            if jobs[0][0] == "image 2":
                np.ones(1 << 37, dtype=np.uint8)
            return super().segment(jobs)

    def load() -> object:
        from refinetool.running.ray import Loaded

        resource.setrlimit(resource.RLIMIT_AS, (1 << 36, 1 << 36))
        return Loaded(RefineUnits(Greedy(tmp_path, 0, frozenset(), frozenset()), 1, 1), {"a": 1})  # type: ignore[arg-type]

    summary = crewed(samples_of(6, tmp_path / "images"), load, tmp_path / "j", unit=1)
    assert (summary.kept, summary.crashes) == ({"out-of-memory": 2}, ())
