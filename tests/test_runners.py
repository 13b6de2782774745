"""Running many samples: same outcomes for any threads and batches, bounded memory, nothing lost when it ends early."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from fake_refiner import Read, Shift, expected, sample_of, samples_of

from refinetool.errors import DataError, Interrupted, StorageError
from refinetool.records import Outcome, Region, Sample
from refinetool.running.interrupts import stop_on_interrupt
from refinetool.running.journal import Journal
from refinetool.running.run import run
from refinetool.running.summary import FAULTS_TOLD, Progress, Summary, Tally
from refinetool.running.threads import IN_FLIGHT_BYTES, Result, in_process
from refinetool.statuses import Reason


@dataclass
class Job:
    """A call of `run`, with its journal and all that it reported."""

    path: Path
    refiner: Shift = field(default_factory=Shift)
    threads: int = 2
    batch: int = 4
    batches: int = 1
    stop: threading.Event = field(default_factory=threading.Event)
    reports: list[Progress] = field(default_factory=list)
    found: dict[str, Outcome | None] = field(default_factory=dict)

    identity: dict[str, object] = field(default_factory=dict)
    workers: int = 1
    crashes: tuple[str, ...] = ()

    def results(self, samples: Iterable[Sample], *, stopped: Callable[[], bool]) -> Generator[Result, None, None]:
        return in_process(samples, self.refiner, threads=self.threads, batches=self.batches, stopped=stopped)

    def run(self, samples: Sequence[Sample] | Iterator[Sample], total: int | None = None) -> Summary:
        with Journal(self.path, job={}, fresh=False) as journal:
            try:
                self.refiner.jobs_at_once = self.batch
                return run(
                    samples,
                    self,
                    journal=journal,
                    total=len(samples) if total is None else total,  # type: ignore[arg-type]
                    on_progress=self.reports.append,
                    stop=self.stop,
                )
            finally:
                self.found = {f"image {number}": journal.find(f"image {number}") for number in range(400)}


def journalled(path: Path) -> list[dict[str, object]]:
    """The lines of a journal without the header, the seconds and the checks, which cover the seconds."""
    records = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    return [{name: value for name, value in record.items() if name not in ("seconds", "check")} for record in records]


# --- what comes out ------------------------------------------------------------------------------------------------


def test_every_sample_gets_its_outcome(tmp_path: Path) -> None:
    samples = samples_of(23, tmp_path / "images")
    job = Job(tmp_path / "j")
    job.run(samples)
    for sample in samples:
        assert job.found[sample.key] == (expected(sample) if sample.regions else None)


def test_threads_and_batches_change_nothing(tmp_path: Path) -> None:
    samples = samples_of(23, tmp_path / "images")
    journals = []
    for threads in (1, 4):
        for batch in (1, 7):
            job = Job(tmp_path / f"{threads}-{batch}", refiner=Shift(slowest=0.01), threads=threads, batch=batch)
            job.run(samples)
            journals.append(journalled(job.path))
    assert len(journals[0]) == 17
    assert journals[1:] == journals[:1] * 3


def test_several_batches_at_a_time_change_nothing_but_the_time(tmp_path: Path) -> None:
    class Slow(Shift):
        def segment(self, jobs: Sequence[tuple[str, np.ndarray]]) -> list[np.ndarray]:
            with self.lock:
                at_once.append(at_once[-1] + 1)
            time.sleep(0.02 * (1 + len(at_once) % 3))  # later batches may be done before earlier ones
            with self.lock:
                at_once.append(at_once[-1] - 1)
            return super().segment(jobs)

    samples = samples_of(40, tmp_path / "images")
    found = []
    for batches in (1, 3):
        at_once = [0]
        job = Job(tmp_path / str(batches), refiner=Slow(), batches=batches)
        job.run(samples)
        assert max(at_once) == batches
        found.append((journalled(job.path), sorted(job.refiner.batches)))
    assert found[0] == found[1]


def test_a_stop_finishes_the_batches_that_are_running(tmp_path: Path) -> None:
    class Stopping(Shift):
        def segment(self, jobs: Sequence[tuple[str, np.ndarray]]) -> list[np.ndarray]:
            if len(self.batches) == 4:
                job.stop.set()
            return super().segment(jobs)

    job = Job(tmp_path / "j", refiner=Stopping(), batches=3)
    with pytest.raises(Interrupted):
        job.run(samples_of(100, tmp_path / "images"))
    assert {record["key"] for record in journalled(job.path)} == set(job.refiner.asked)


def test_batches_follow_from_the_input_and_not_from_timing(tmp_path: Path) -> None:
    samples = samples_of(23, tmp_path / "images")
    jobs = [Job(tmp_path / str(threads), refiner=Shift(slowest=0.01), threads=threads) for threads in (1, 4)]
    for job in jobs:
        job.run(samples)
    assert jobs[0].refiner.batches == jobs[1].refiner.batches
    # 1, 2, 3 regions in turn, and four jobs make a batch: samples are torn apart and put together again.
    assert jobs[0].refiner.batches[:3] == [
        ("image 1", "image 2", "image 2", "image 3"),
        ("image 3", "image 3", "image 5", "image 6"),
        ("image 6", "image 7", "image 7", "image 7"),
    ]
    assert {len(batch) for batch in jobs[0].refiner.batches[:-1]} == {4}, "all batches are full but the last"


def test_samples_that_need_no_model_wait_for_nothing(tmp_path: Path) -> None:
    samples = samples_of(40, tmp_path / "images")
    crowds = [replace(s, regions=tuple(replace(r, keep=Reason.CROWD) for r in s.regions)) for s in samples]
    job = Job(tmp_path / "j")
    assert job.run(crowds).kept == {"crowd": 60}
    assert job.refiner.batches == []


def test_the_summary_counts_what_happened(tmp_path: Path) -> None:
    samples = samples_of(12, tmp_path / "images")
    samples[3] = replace(samples[3], regions=(*samples[3].regions, Region(99, None, None, keep=Reason.EMPTY)))
    samples[7].image.unlink()
    summary = Job(tmp_path / "j").run(samples)
    changes = [1 - a.coarse_iou for s in samples if s.image.exists() for a in expected(s).annotations if a.refined]
    assert (summary.images, summary.masks, summary.refined) == (12, 19, 15)
    assert summary.kept == {"empty": 1, "image-unreadable": 3}
    assert (summary.failed, summary.errors) == (1, (f"{samples[7].image}: no such image",))
    assert summary.mean_change == pytest.approx(np.mean(changes))
    assert 0.2 < summary.mean_change < 0.5, "4x5 rectangles moved by a pixel: 1 - 4/6, unless cut by the border"
    assert (summary.reused, summary.redone) == (0, 0)
    assert summary.images_per_second == pytest.approx(9 / summary.seconds), "three images hold nothing to refine"


@pytest.mark.parametrize("failing", [False, True])
def test_faults_of_masks_reach_the_summary(failing: bool, tmp_path: Path) -> None:
    samples = samples_of(8, tmp_path / "images")
    for number, sample in enumerate(samples):
        odd = Region(99, None, None, keep=Reason.UNREADABLE_MASK, fault=f"mask {number} is odd")
        samples[number] = replace(sample, regions=(*sample.regions, odd))
        if failing:
            sample.image.unlink()
    summary = Job(tmp_path / "j").run(samples)
    assert summary.faulty == 8
    assert summary.faults == tuple(f"mask {number} is odd" for number in range(FAULTS_TOLD))
    assert summary.failed == (8 if failing else 0)
    again = Job(tmp_path / "j").run(samples)
    assert again.reused == (0 if failing else 8)
    assert (again.faulty, again.faults) == (summary.faulty, summary.faults)


def test_nothing_at_all(tmp_path: Path) -> None:
    summary = Job(tmp_path / "j").run([])
    assert (summary.images, summary.masks, summary.mean_change, summary.kept) == (0, 0, None, {})


def test_progress_climbs_to_the_total(tmp_path: Path) -> None:
    job = Job(tmp_path / "j")
    summary = job.run(samples_of(12, tmp_path / "images"))
    assert [report.done for report in job.reports] == list(range(1, 13))
    last = job.reports[-1]
    assert (last.total, last.masks, last.refined, last.kept, last.failed) == (12, summary.masks, summary.refined, 0, 0)
    assert last.seconds_left == 0
    assert job.reports[0].seconds_left is None, "the first image holds nothing, so there is no rate yet"


def test_rate_and_time_left_follow_from_the_samples_that_were_run() -> None:
    tally = Tally(20, started=time.perf_counter() - 10)
    for key in "abcdefgh":
        tally.count(Outcome(key, ()))
    tally.ran[0] = 5  # the other three were taken over
    progress, summary = tally.progress(), tally.summary()
    assert progress.images_per_second == pytest.approx(0.5, rel=0.1)
    assert progress.seconds_left == pytest.approx(24, rel=0.1), "twelve images, half a one per second"
    assert summary.seconds == pytest.approx(10, rel=0.1)
    assert summary.images_per_second == pytest.approx(0.5, rel=0.1)


def test_the_seconds_of_a_sample_are_those_of_all_its_stages(tmp_path: Path) -> None:
    class Slow(Shift):
        def prepare(self, sample: Sample) -> Read:
            time.sleep(0.02)
            return super().prepare(sample)

        def segment(self, jobs: Sequence[tuple[str, np.ndarray]]) -> list[np.ndarray]:
            time.sleep(0.04 * len(jobs))
            return super().segment(jobs)

        def finish(self, read: Read, refined: list[np.ndarray]) -> Outcome:
            time.sleep(0.03)
            return super().finish(read, refined)

    job = Job(tmp_path / "j", refiner=Slow())
    job.run(samples_of(4, tmp_path / "images"))
    seconds = [json.loads(line)["seconds"] for line in job.path.read_text().splitlines()[1:]]
    for masks, spent in zip([1, 2, 3], seconds, strict=True):
        assert spent >= 0.02 + 0.04 * masks + 0.03 - 0.001


# --- memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("threads", "batch"), [(1, 1), (3, 4)])
def test_few_samples_are_prepared_ahead(tmp_path: Path, threads: int, batch: int) -> None:
    job = Job(tmp_path / "j", threads=threads, batch=batch)
    handed_out = []

    def source() -> Iterator[Sample]:
        for sample in samples_of(300, tmp_path / "images"):
            handed_out.append(sample.key)
            done = job.reports[-1].done if job.reports else 0
            assert len(handed_out) - done <= 2 * (2 * batch + threads) + batch + 1
            yield sample

    job.run(source(), total=300)
    assert job.refiner.most_waiting <= 3 * (2 * batch + threads + batch), "jobs, at most three a sample"
    assert len(handed_out) == 300


def test_large_samples_are_prepared_one_at_a_time(tmp_path: Path) -> None:
    class Careless(Shift):
        def prepare(self, sample: Sample) -> Read:
            super().prepare(replace(sample, regions=()))
            with self.lock:
                self.waiting += 1
                self.most_waiting = max(self.most_waiting, self.waiting)
            return Read(sample, [np.ones((2, 2), np.bool_)])

        def finish(self, read: Read, _: list[np.ndarray]) -> Outcome:
            return Outcome(read.sample.key, ())

    huge = [
        replace(s, size=(20_000, 20_000), regions=(Region(1, None, None, keep=Reason.CROWD),))
        for s in samples_of(40, tmp_path / "images")
    ]
    assert IN_FLIGHT_BYTES < 3 * 20_000**2
    job = Job(tmp_path / "j", refiner=Careless(), threads=4, batch=8)
    job.run(huge)
    assert job.refiner.most_waiting <= 2
    assert [len(batch) for batch in job.refiner.batches] == [1] * 40, "they don't wait for a full batch"


def test_the_next_batch_is_prepared_while_the_model_works(tmp_path: Path) -> None:
    class Patient(Shift):
        def segment(self, jobs: Sequence[tuple[str, np.ndarray]]) -> list[np.ndarray]:
            if not self.batches:
                deadline = time.monotonic() + 10
                while self.waiting < len(jobs) + 4 and time.monotonic() < deadline:
                    time.sleep(0.001)
                assert self.waiting >= len(jobs) + 4
            return super().segment(jobs)

    Job(tmp_path / "j", refiner=Patient(), batch=4, threads=2).run(samples_of(40, tmp_path / "images"))


# --- what goes wrong -----------------------------------------------------------------------------------------------


def test_an_unreadable_sample_keeps_its_masks_and_its_neighbours_go_on(tmp_path: Path) -> None:
    class Picky(Shift):
        def prepare(self, sample: Sample) -> Read:
            if sample.key == "image 6":
                raise DataError("masks.json, image 6: nonsense")
            return super().prepare(sample)

    samples = samples_of(12, tmp_path / "images")
    samples[3] = replace(samples[3], regions=(*samples[3].regions, Region(99, None, None, keep=Reason.EMPTY)))
    samples[3].image.unlink()
    job = Job(tmp_path / "j", refiner=Picky())
    assert job.run(samples).failed == 2
    unreadable = job.found["image 3"]
    assert [a.status for a in unreadable.annotations] == ["kept:image-unreadable"] * 3 + ["kept:empty"]
    assert [a.mask for a in unreadable.annotations] == [region.mask for region in samples[3].regions]
    assert unreadable.error == f"{samples[3].image}: no such image"
    assert {a.status for a in job.found["image 6"].annotations} == {"kept:unreadable"}
    assert job.found["image 7"] == expected(samples[7])


@pytest.mark.parametrize("stage", ["prepare", "segment", "finish"])
def test_a_bug_is_raised_after_what_the_model_has_answered_is_kept(
    tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    healthy = getattr(Shift, stage)

    def broken(self: Shift, first: Any, *rest: object) -> object:
        keys = {"prepare": lambda: [first.key], "segment": lambda: [key for key, _ in first]}
        if "image 9" in keys.get(stage, lambda: [first.sample.key])():
            raise ZeroDivisionError("a bug")
        return healthy(self, first, *rest)

    monkeypatch.setattr(Shift, stage, broken)
    job = Job(tmp_path / "j")
    with pytest.raises(ZeroDivisionError) as caught:
        job.run(samples_of(200, tmp_path / "images"))
    assert "while refining image 9" in caught.value.__notes__[0]
    done = {record["key"] for record in journalled(job.path)}
    assert done == set(job.refiner.asked) - ({"image 9"} if stage == "finish" else set())
    assert {"image 1", "image 6", "image 7"} <= done
    assert len(job.refiner.prepared) < 60, "no more samples are handed out"


def test_an_error_in_the_data_set_itself_comes_after_what_the_model_has_answered(tmp_path: Path) -> None:
    def source() -> Iterator[Sample]:
        yield from samples_of(60, tmp_path / "images")
        raise DataError("masks.json, line 61: not JSON")

    job = Job(tmp_path / "j")
    with pytest.raises(DataError, match="line 61"):
        job.run(source(), total=80)
    done = [record["key"] for record in journalled(job.path)]
    assert done == job.refiner.asked
    assert len(done) > 20


def out_of_memory(name: str) -> Exception:
    """As Python, NumPy, OpenCV, torch on a device and torch on the CPU say it."""
    torch_like = type("OutOfMemoryError", (RuntimeError,), {})
    return {
        "python": MemoryError(),
        "numpy": np._core._exceptions._ArrayMemoryError((1,), np.dtype(bool)),
        "device": torch_like("CUDA out of memory"),
        "opencv": cv2.error("alloc.cpp:73: error: (-4:Insufficient memory) Failed to allocate 3200000000 bytes"),
        "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    }[name]


@pytest.mark.parametrize("name", ["python", "numpy", "opencv", "device", "cpu"])
def test_a_batch_that_does_not_fit_is_halved(tmp_path: Path, name: str) -> None:
    class Small(Shift):
        def segment(self, jobs: Sequence[tuple[str, np.ndarray]]) -> list[np.ndarray]:
            answers = super().segment(jobs)
            if len(jobs) > 1 or jobs[0][0] == "image 5":
                raise out_of_memory(name)
            return answers

    samples = samples_of(12, tmp_path / "images")
    job = Job(tmp_path / "j", refiner=Small())
    summary = job.run(samples)
    assert summary.kept == {"out-of-memory": 1}
    assert "5.jpg: out of memory" in summary.errors[0]
    assert [key for key, outcome in job.found.items() if outcome and outcome.error] == ["image 5"]
    assert all(job.found[s.key] == expected(s) for s in samples if s.regions and s.key != "image 5")
    assert job.refiner.batches[:5] == [
        ("image 1", "image 2", "image 2", "image 3"),
        ("image 1", "image 2"),
        ("image 1",),
        ("image 2",),
        ("image 2", "image 3"),
    ]


@pytest.mark.parametrize("stage", ["prepare", "finish"])
def test_memory_that_runs_out_around_the_model_costs_one_image(
    tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    healthy = getattr(Shift, stage)

    def greedy(self: Shift, first: Sample | Read, *rest: object) -> object:
        if (first if isinstance(first, Sample) else first.sample).key == "image 2":
            raise MemoryError
        return healthy(self, first, *rest)

    monkeypatch.setattr(Shift, stage, greedy)
    assert Job(tmp_path / "j").run(samples_of(8, tmp_path / "images")).kept == {"out-of-memory": 2}


def test_a_full_disk_ends_the_run_with_what_was_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    healthy = Journal.append

    def full(self: Journal, outcome: Outcome, *, seconds: float) -> None:
        if outcome.key == "image 9":
            raise StorageError("the disk is full")
        healthy(self, outcome, seconds=seconds)

    samples = samples_of(60, tmp_path / "images")
    job = Job(tmp_path / "j")
    with monkeypatch.context() as patched:
        patched.setattr(Journal, "append", full)
        with pytest.raises(StorageError, match="disk is full"):
            job.run(samples)
    assert [record["key"] for record in journalled(job.path)] == [f"image {n}" for n in (1, 2, 3, 5, 6, 7)]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("refine")]
    again = Job(tmp_path / "j")
    assert again.run(samples).reused == 6
    assert "image 7" not in again.refiner.prepared


# --- stopped and resumed -------------------------------------------------------------------------------------------


def test_a_stop_keeps_what_the_model_has_answered_and_a_resume_does_the_rest(tmp_path: Path) -> None:
    samples = samples_of(100, tmp_path / "images")
    Job(tmp_path / "whole").run(samples)
    job = Job(tmp_path / "j")

    def source() -> Iterator[Sample]:
        for sample in samples:
            if sample.key == "image 41":
                job.stop.set()
            yield sample

    with pytest.raises(Interrupted, match=r"stopped after \d+ of 100 images; they are kept in .*j$"):
        job.run(source(), total=100)
    assert [record["key"] for record in journalled(job.path)] == job.refiner.asked
    assert len(job.refiner.asked) < len(job.refiner.prepared) <= 30, "what is only prepared is not waited for"
    again = Job(tmp_path / "j")
    summary = again.run(samples)
    assert (summary.reused, summary.redone) == (len(job.refiner.asked), 0)
    assert not set(again.refiner.prepared) & set(job.refiner.asked)
    assert journalled(tmp_path / "j") == journalled(tmp_path / "whole")
    assert again.reports[-1].reused == summary.reused


def test_a_stop_after_the_last_batch_stops_nothing(tmp_path: Path) -> None:
    class Last(Shift):
        def segment(self, jobs: Sequence[tuple[str, np.ndarray]]) -> list[np.ndarray]:
            if len(jobs) == 2:  # the last of 18 jobs, four at a time
                job.stop.set()
            return super().segment(jobs)

    job = Job(tmp_path / "j", refiner=Last())
    assert job.run(samples_of(12, tmp_path / "images")).images == 12


def test_changed_and_failed_samples_are_done_again_and_counted(tmp_path: Path) -> None:
    samples = samples_of(12, tmp_path / "images")
    samples[3].image.unlink()
    first = Job(tmp_path / "j").run(samples)
    samples[3].image.write_bytes(b"here again")
    samples[5] = replace(samples[5], regions=sample_of(6, tmp_path).regions)
    again = Job(tmp_path / "j")
    summary = again.run(samples)
    assert again.refiner.prepared == ["image 3", "image 5"]
    assert (first.failed, summary.failed, summary.reused, summary.redone) == (1, 0, 7, 2)
    assert summary.refined == summary.masks == 19
    assert again.found["image 5"] == expected(samples[5])


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Python's own handler of Ctrl-C, even where the tests were started in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_the_second_interrupt_would_kill_and_the_handler_is_put_back() -> None:
    before = signal.getsignal(signal.SIGINT)
    with stop_on_interrupt(after="the model has answered") as stop:
        assert not stop.is_set()
        signal.raise_signal(signal.SIGINT)
        assert stop.is_set()
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) is before


def test_signals_are_left_alone_in_other_threads_and_where_they_are_ignored() -> None:
    seen = []

    def elsewhere() -> None:
        with stop_on_interrupt(after="the model has answered") as stop:
            seen.append((stop.is_set(), signal.getsignal(signal.SIGINT)))

    before = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert seen == [(False, before)]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_on_interrupt(after="the model has answered"):
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


# --- killed from outside -------------------------------------------------------------------------------------------


class Slow(Shift):
    """Takes its time and writes down, for another process to read, which samples it was asked."""

    def __init__(self, log: Path, seconds: float) -> None:
        super().__init__()
        self.log, self.seconds = log, seconds

    def segment(self, jobs: Sequence[tuple[str, np.ndarray]]) -> list[np.ndarray]:
        with self.log.open("a") as lines:
            lines.writelines(f"{key}\n" for key, _ in jobs)
        time.sleep(self.seconds)
        return super().segment(jobs)


def child(folder: str) -> None:
    """What the other process runs."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    root = Path(folder)
    with stop_on_interrupt(after="the model has answered") as stop:
        job = Job(root / "j", refiner=Slow(root / "asked", 0.05), stop=stop)
        try:
            job.run(samples_of(400, root / "images"))
        except Interrupted as interrupted:
            print(interrupted, flush=True)
            sys.exit(interrupted.exit_code)


def started(folder: Path) -> "subprocess.Popen[str]":
    """A run in another process, with some samples already in its journal."""
    command = "import sys; sys.path.insert(0, sys.argv[1]); import test_runners; test_runners.child(sys.argv[2])"
    process = subprocess.Popen(
        [sys.executable, "-c", command, str(Path(__file__).parent), str(folder)], stdout=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        if (folder / "j").exists() and (folder / "j").read_bytes().count(b"\n") > 10:
            return process
        time.sleep(0.005)
    process.kill()
    raise AssertionError("the run did not get going")


def resumed(folder: Path) -> tuple[Summary, set[object], set[object]]:
    """Finish a run that was killed; what the journal held before, and what was asked after."""
    text = (folder / "j").read_text()
    before = {json.loads(line)["key"] for line in text[: text.rindex("\n")].splitlines()[1:]}
    job = Job(folder / "j")
    summary = job.run(samples_of(400, folder / "images"))
    return summary, before, set(job.refiner.prepared)


def test_a_killed_run_continues_where_it_was(tmp_path: Path) -> None:
    samples_of(400, tmp_path / "images")
    Job(tmp_path / "whole").run(samples_of(400, tmp_path / "images"))
    process = started(tmp_path)
    process.kill()
    process.communicate(timeout=10)
    assert process.returncode == -signal.SIGKILL
    summary, before, asked = resumed(tmp_path)
    assert 10 <= len(before) < 300
    assert not before & asked
    assert (summary.images, summary.reused, len(asked)) == (400, len(before), 300 - len(before))
    assert journalled(tmp_path / "j") == journalled(tmp_path / "whole")


def test_an_interrupt_ends_a_run_in_good_order(tmp_path: Path) -> None:
    samples_of(400, tmp_path / "images")
    process = started(tmp_path)
    os.kill(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=20)
    assert process.returncode == 130
    assert said.startswith("stopped after ")
    asked = (tmp_path / "asked").read_text().split("\n")[:-1]
    summary, before, rest = resumed(tmp_path)
    assert before <= set(asked)
    assert len(set(asked) - before) <= 1, "all but the sample in whose middle it stopped is in the journal"
    assert len(rest) == 300 - len(before)
    assert summary.images == 400


@pytest.mark.slow
def test_a_second_interrupt_kills_at_once(tmp_path: Path) -> None:
    samples_of(400, tmp_path / "images")
    process = started(tmp_path)
    os.kill(process.pid, signal.SIGINT)
    time.sleep(0.06)
    os.kill(process.pid, signal.SIGINT)
    process.communicate(timeout=10)
    assert process.returncode in (-signal.SIGINT, 130), "killed, unless it was already done"
    summary, before, asked = resumed(tmp_path)
    assert not before & asked
    assert summary.images == 400
