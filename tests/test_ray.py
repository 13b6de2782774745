"""Workers in Ray actors: the same outcomes as in one process, whoever is killed. Starts clusters, so it is marked."""

import gc
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from fake_refiner import Shift, expected, samples_of
from test_runners import Job, journalled

from refinetool.errors import Interrupted, RefinetoolError, UsageError, WeightsError
from refinetool.records import Sample
from refinetool.running.interrupts import stop_on_interrupt
from refinetool.running.journal import Journal
from refinetool.running.run import run
from refinetool.running.runners import CrewRunner, RefineUnits
from refinetool.running.summary import Summary

pytestmark = [
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


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A cluster of this machine, for all tests that leave it as it is."""
    from refinetool.running.ray import cluster

    os.environ["PYTHONPATH"] = HERE
    with cluster(None, cpus=WORKERS):
        yield
    gc.collect()


def crew_of(load: object, workers: int = WORKERS, cpus: int = 1) -> object:
    from refinetool.running.ray import Place, RayCrew

    return RayCrew(load, workers=workers, place=Place(cpus=cpus, gpus=0), folder=Path.cwd())  # type: ignore[arg-type]


def crewed(samples: Sequence[Sample], load: object, path: Path, *, unit: int = 4) -> Summary:
    """Run samples on a crew, with a journal."""
    with crew_of(load) as crew, Journal(path, job={}, fresh=False) as journal:  # type: ignore[attr-defined]
        runner = CrewRunner(crew, WORKERS, unit)
        with stop_on_interrupt(after="the model has answered") as stop:
            return run(samples, runner, journal=journal, total=len(samples), on_progress=lambda _: None, stop=stop)


def in_one_process(samples: Sequence[Sample], path: Path) -> list[dict[str, object]]:
    Job(path).run(samples)
    return journalled(path)


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


# --- the driver, and whole nodes


def driver(folder: str) -> None:
    """What another process runs."""
    from refinetool.running.ray import cluster

    signal.signal(signal.SIGINT, signal.default_int_handler)
    root = Path(folder)
    with cluster(None, cpus=WORKERS):
        try:
            crewed(samples_of(400, root / "images"), Load(root, seconds=0.05), root / "j")
        except Interrupted as interrupted:
            print(interrupted, flush=True)
            sys.exit(interrupted.exit_code)


def started(folder: Path) -> "subprocess.Popen[str]":
    """A driver in another process, with some samples already in its journal."""
    command = "import sys; sys.path.insert(0, sys.argv[1]); import test_ray; test_ray.driver(sys.argv[2])"
    process = subprocess.Popen(
        [sys.executable, "-c", command, HERE, str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": HERE},
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if (folder / "j").exists() and (folder / "j").read_bytes().count(b"\n") > 10:
            return process
        time.sleep(0.01)
    process.kill()
    raise AssertionError("the run did not get going")


def workers_in(folder: Path) -> list[int]:
    return [int(path.name.split()[1]) for path in folder.glob("worker *")]


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_or_interrupted_driver_leaves_no_process_and_a_journal_to_go_on_from(
    tmp_path: Path, number: signal.Signals
) -> None:
    samples_of(400, tmp_path / "images")
    process = started(tmp_path)
    workers = workers_in(tmp_path)
    os.kill(process.pid, number)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 130)
    assert said.startswith("stopped after ") == (number == signal.SIGINT)
    deadline = time.monotonic() + 30
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert workers and not any(map(alive, workers))
    text = (tmp_path / "j").read_text()
    before = text[: text.rindex("\n")].count("\n")
    job = Job(tmp_path / "j")
    summary = job.run(samples_of(400, tmp_path / "images"))
    assert summary.reused == before
    assert len(job.refiner.prepared) == 300 - before, "a quarter of the images have nothing to refine"
    assert all(job.found[s.key] == (expected(s) if s.regions else None) for s in samples_of(400, tmp_path / "images"))


def test_a_node_that_is_lost_takes_its_worker_and_nothing_else(tmp_path: Path) -> None:
    import ray
    from ray.cluster_utils import Cluster

    from refinetool.running.ray import cluster

    os.environ["PYTHONPATH"] = HERE
    machines = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    second = machines.add_node(num_cpus=1)
    samples = samples_of(200, tmp_path / "images")
    try:
        with cluster(machines.address, cpus=1) as there:
            assert there.cpus == 2

            def lose() -> None:
                while not (tmp_path / "j").exists() or (tmp_path / "j").read_bytes().count(b"\n") < 20:
                    time.sleep(0.05)
                parents = {pid: parent_of(pid) for pid in workers_in(tmp_path)}
                machines.remove_node(second, allow_graceful=False)
                for pid, parent in parents.items():
                    if not alive(parent):  # with the machine, its workers are gone at once
                        os.kill(pid, signal.SIGKILL)

            killer = threading.Thread(target=lose)
            killer.start()
            summary = crewed(samples, Load(tmp_path, seconds=0.1), tmp_path / "j")
            killer.join()
    finally:
        ray.shutdown()
        machines.shutdown()
    assert len(summary.crashes) == 1
    assert (summary.images, summary.failed) == (200, 0)
    assert journalled(tmp_path / "j") == in_one_process(samples, tmp_path / "whole")
