"""Outputs that can't be written, and clocks that can't be trusted."""

import ast
import errno
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import Command

import refinetool
from refinetool.running.summary import Tally

PARTIAL = "refinetool-partial"


@pytest.fixture
def locked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that can't be written to. Tests may run as root, whom permissions don't stop, so `open` does."""
    out = folder / "locked"
    out.mkdir()
    real = Path.open

    def refuse(path: Path, mode: str = "r", *rest: Any, **more: Any) -> Any:
        if out in path.parents and not mode.startswith("r"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, mode, *rest, **more)

    def refuse_folder(path: Path, *rest: Any, **more: Any) -> None:
        if out in path.parents:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        real_folder(path, *rest, **more)

    real_folder = Path.mkdir
    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(Path, "mkdir", refuse_folder)
    return out


@pytest.mark.parametrize(
    "arguments",
    [
        ["refine", "-o", "locked/out.json"],
        ["refine", "--record", "locked/record.csv"],
        ["refine", "--candidates", "locked/candidates.jsonl"],
        ["corrupt", "-o", "locked/out.json"],
        ["corrupt", "--record", "locked/record.csv"],
        ["corrupt", "--picture", "locked/picture.png"],
    ],
)
def test_a_folder_that_cannot_be_written_to(command: Command, folder: Path, locked: Path, arguments: list[str]) -> None:
    name, option, path = arguments
    said = command(name, folder / "coarse.json", "--images", folder / "images", option, folder / path)
    assert said.code == 1
    assert "Permission denied" in said.err
    assert str(locked) in said.err
    assert not list(folder.rglob(f"*{PARTIAL}*"))


class Full:
    """A disk on which some writes find no room: those to files whose name holds `word`."""

    def __init__(self, word: str) -> None:
        self.word, self.files = word, set[int]()

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real_open, real_sync = Path.open, os.fsync

        def opened(path: Path, *rest: Any, **more: Any) -> Any:
            file = real_open(path, *rest, **more)
            if self.word in path.name:
                self.files.add(file.fileno())
            return file

        def sync(number: int) -> None:
            if number in self.files:
                raise OSError(errno.ENOSPC, "No space left on device")
            real_sync(number)

        monkeypatch.setattr(Path, "open", opened)
        monkeypatch.setattr(os, "fsync", sync)


@pytest.mark.parametrize("word", ["out.json", "record.csv", "candidates.jsonl"])
def test_a_disk_that_is_full_at_the_end_loses_nothing(
    command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    refine = ["refine", folder / "coarse.json", "--images", folder / "images", "-o", folder / "out.json", "--json"]
    refine += ["--record", folder / "record.csv", "--candidates", folder / "candidates.jsonl"]
    with monkeypatch.context() as patched:
        Full(f".{word}.{PARTIAL}").install(patched)
        said = command(*refine)
    assert said.code == 1
    assert "the disk is full" in said.err
    assert word in said.err
    assert not list(folder.rglob(f"*{PARTIAL}*"))
    assert (folder / "out.json.journal.jsonl").is_file()
    again = command(*refine, "--resume")
    assert (again.code, json.loads(again.out)["reused"]) == (0, 3), again.err


def test_a_full_disk_leaves_an_earlier_output_as_it_was(
    command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "out.json").write_text("the earlier one")
    with monkeypatch.context() as patched:
        Full(PARTIAL).install(patched)
        said = command(
            "refine", folder / "coarse.json", "--images", folder / "images", "-o", folder / "out.json", "--overwrite"
        )
    assert said.code == 1
    assert (folder / "out.json").read_text() == "the earlier one"


def clock(readings: Callable[[int], float]) -> Callable[[], float]:
    """A clock that shows `readings(n)` when it is read for the n-th time."""

    def numbers() -> Iterator[int]:
        n = 0
        while True:
            yield n
            n += 1

    source = numbers()
    return lambda: readings(next(source))


@pytest.mark.parametrize(
    "readings", [lambda _: 7.0, lambda n: -1000.0 * n, lambda n: 1e9 * (-1) ** n], ids=["stands", "runs back", "jumps"]
)
def test_no_clock_changes_what_is_written(
    command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch, readings: Callable[[int], float]
) -> None:
    refine = ["refine", folder / "coarse.json", "--images", folder / "images"]
    assert command(*refine).code == 0
    expected = (folder / "coarse.refined.json").read_bytes()
    for name in ("time", "perf_counter", "monotonic"):
        monkeypatch.setattr(time, name, clock(readings))
    said = command(*refine, "--overwrite")
    assert said.code == 0
    assert (folder / "coarse.refined.json").read_bytes() == expected


def test_a_run_that_takes_no_time_has_a_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "perf_counter", lambda: 7.0)
    tally = Tally(total=3, started=7.0)
    assert tally.progress().images_per_second == tally.summary().images_per_second == 0


def test_nothing_reads_the_time_of_day() -> None:
    assert refinetool.__file__ is not None
    found = [
        f"{path.name}: {node.attr}"
        for path in Path(refinetool.__file__).parent.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("time", "now", "today", "utcnow", "localtime")
    ]
    assert found == []
