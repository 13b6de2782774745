"""What is shown while a command runs, and after it."""

import io
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from commands import Command, a_summary
from rich.console import Console

import refinetool
from refinetool.cli import console
from refinetool.errors import DataError
from refinetool.running import run as running
from refinetool.running.summary import Progress
from refinetool.statuses import Reason


def progress(done: int, **changes: Any) -> Progress:
    values: Mapping[str, Any] = {
        "total": 20,
        "reused": 0,
        "masks": 3 * done,
        "refined": 2 * done,
        "kept": done,
        "failed": 0,
        "images_per_second": 2.0,
        "seconds_left": (20 - done) / 2,
    }
    return Progress(done=done, **{**values, **changes})


def test_lines_of_progress_are_few() -> None:
    now: list[float] = [0.0]
    lines: list[str] = []
    listener = console.Lines(write=lines.append, clock=lambda: now[0])
    for done in range(1, 21):
        now[0] += 0.7
        listener(progress(done))
    told = [int(line.split("/")[0]) for line in lines]
    assert told[-1] == 20
    assert all(later - earlier >= 2 for earlier, later in pairwise(told[:-1]))
    assert 5 <= len(told) <= 11


def test_a_slow_run_tells_every_ten_seconds() -> None:
    now: list[float] = [0.0]
    lines: list[str] = []
    listener = console.Lines(write=lines.append, clock=lambda: now[0])
    for done in range(1, 6):
        now[0] += 11
        listener(progress(done, total=1000))
    assert len(lines) == 5


def test_progress_in_words() -> None:
    assert console.describe(progress(4)) == "4/20 images, 12 masks, 4 kept, 2 images/s, 8.0 s left"
    assert "2 failed" in console.describe(progress(4, failed=2))
    assert "left" not in console.describe(progress(20))
    assert "left" not in console.describe(progress(4, seconds_left=None))


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.72, "0.7 s"), (42, "42 s"), (59.6, "1:00"), (185, "3:05"), (7807, "2:10:07")]
)
def test_durations(seconds: float, words: str) -> None:
    assert console.duration(seconds) == words


def test_a_summary_in_words(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = a_summary(notes=("2 polygons became RLE",), journal=Path("out.json.journal.jsonl"))
    monkeypatch.setattr(running, "refine_dataset", lambda *_, **__: summary)
    lines = command("refine", "x.json").out.splitlines()
    assert lines == [
        "7 of 10 masks refined (70%), mean change 12.3 % (1 - IoU)",
        "  2 kept coarse: the refined mask drifted too far from it",
        "  1 kept coarse: the new mask is the same",
        "4 images, 1 of them from an earlier run, 1:40 (0.03 images/s)",
        "2 polygons became RLE",
        "not all images are done: --resume continues from out.json.journal.jsonl",
        "written to out.json",
    ]


def test_every_reason_has_words() -> None:
    assert set(console.REASONS) == set(Reason)


def test_the_rates_of_workers_are_told_one_by_one_or_as_a_range() -> None:
    assert "4.2 images/s (2 + 2.2)," in console.describe(progress(3, images_per_second=4.2, worker_rates=(2.0, 2.2)))
    many = console.describe(progress(3, images_per_second=20.0, worker_rates=(3.9, 4.0, 4.0, 4.0, 4.1)))
    assert "20 images/s (5 workers, 3.9 to 4.1 each)," in many
    assert "(" not in console.describe(progress(3, worker_rates=(4.0,)))


def test_crashes_of_workers_are_told(command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = a_summary(crashes=("worker 1: the process was killed",))
    monkeypatch.setattr(running, "refine_dataset", lambda *_, **__: summary)
    said = command("refine", folder / "coarse.json")
    assert "died and was replaced: worker 1: the process was killed\n" in said.out


def test_markup_in_names_is_not_obeyed(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = a_summary(notes=("[bold]odd[/bold]",), output=Path("[red]x[/red].json"))
    monkeypatch.setattr(running, "refine_dataset", lambda *_, **__: summary)
    said = command("refine", "x.json")
    assert "[bold]odd[/bold]" in said.out
    assert "[red]x[/red].json" in said.out


def test_failed_images_beyond_the_first_are_counted(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = a_summary(failed=12, errors=tuple(f"image {n} [is] gone" for n in range(10)))
    monkeypatch.setattr(running, "refine_dataset", lambda *_, **__: summary)
    said = command("refine", "x.json", "--quiet")
    assert said.code == 1
    assert said.err.splitlines()[0] == "image 0 [is] gone"
    assert said.err.splitlines()[-1] == "... and 2 more images"


def test_a_bar_is_drawn_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = io.StringIO()
    terminal = Console(file=drawn, force_terminal=True, width=120)
    monkeypatch.setattr(console, "Console", lambda **_: terminal)
    with console.listening(waiting="loading the model", quiet=False) as listener:
        assert "loading the model" in drawn.getvalue(), "from the first moment"
        listener(progress(0))
        listener(progress(7))
    assert "loading the model, then 20 images" in drawn.getvalue()
    assert "7/20 images, 21 masks" in drawn.getvalue()
    assert "0:00:00" in drawn.getvalue(), "the time that has passed"


def test_a_notebook_without_widgets_gets_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(console, "Console", lambda **_: Console(force_jupyter=True))
    with refinetool.progress_bar() as bar:
        bar(progress(20))
    assert capsys.readouterr().err == console.describe(progress(20)) + "\n"


def test_the_total_is_told_before_the_model_is_loaded(
    command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[int, int]] = []

    def opened(*_: object, **__: object) -> None:
        assert told == [(0, 3)]
        raise DataError("stop here")

    del command  # its fake model is not needed
    monkeypatch.setattr(running, "open_runner", opened)
    with pytest.raises(DataError, match="stop here"):
        running.refine_dataset(
            folder / "coarse.json",
            output=folder / "out.json",
            on_progress=lambda progress: told.append((progress.done, progress.total)),
        )
