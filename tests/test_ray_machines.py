"""Whole runs with Ray: a killed driver, a lost machine, a missing cluster, the command. Each starts its own cluster."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from fake_refiner import expected, samples_of
from ray_workers import HERE, MARKS, WORKERS, Load, crewed, in_one_process
from test_runners import Job, journalled

from refinetool.errors import Interrupted, UsageError

pytestmark = MARKS


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
    command = (
        "import sys; sys.path.insert(0, sys.argv[1]); import test_ray_machines; test_ray_machines.driver(sys.argv[2])"
    )
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


# --- the whole command


@pytest.mark.slow
def test_one_worker_two_workers_and_a_killed_run_write_the_same_bytes(tmp_path: Path) -> None:
    """With the embedded model, on photographs."""
    sys.path.insert(0, str(Path(HERE).parent / "benchmarks"))
    from scaling import make

    coarse = make(tmp_path, 12)

    def command(output: str, *options: str) -> list[str]:
        given = ["refine", str(coarse), "-o", str(tmp_path / output), "--device", "cpu", "--quiet", *options]
        return [sys.executable, "-m", "refinetool", *given]

    for output, options in (("one", []), ("two", ["--workers", "2"])):
        subprocess.run(command(output, *options), check=True)
    killed = subprocess.Popen(command("killed", "--workers", "2"))
    journal = tmp_path / "killed.journal.jsonl"
    while not journal.exists() or journal.read_bytes().count(b"\n") < 3:
        assert killed.poll() is None
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    kept = journal.read_bytes().count(b"\n") - 1
    subprocess.run(command("killed", "--workers", "2", "--resume"), check=True)
    assert 1 <= kept < 12
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes() == (tmp_path / "killed").read_bytes()
    assert not journal.exists()


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("nonsense", "--ray-address is 'nonsense'; expected HOST:PORT"),
        ("ray://host:1", "--ray-address is 'ray://host:1'; expected HOST:PORT"),
        ("127.0.0.1:9", r"there is no Ray cluster at 127\.0\.0\.1:9"),
    ],
)
def test_an_address_without_a_cluster_is_refused_at_once(address: str, sentence: str) -> None:
    from refinetool.running.ray import cluster

    with pytest.raises(UsageError, match=sentence), cluster(address, cpus=1):
        pass
