"""Output of the commands: progress while they run, a summary at the end, one message per error.

Progress and errors go to stderr, results to stdout, so that `--json` can be piped.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from refinetool.errors import printable
from refinetool.statuses import Reason

if TYPE_CHECKING:
    from refinetool.corrupt.dataset import CorruptSummary
    from refinetool.running.summary import Progress, Summary
    from refinetool.train.steps import TrainProgress

LINE_EVERY_S = 10.0
LINE_EVERY_FRACTION = 0.1
LINE_NOT_BEFORE_S = 1.0
"""Without a terminal, progress is printed after LINE_EVERY_S, or after LINE_EVERY_FRACTION of the images but not more
often than once in LINE_NOT_BEFORE_S."""

RATES_SHOWN = 4
"""Largest number of workers whose rates are shown one by one."""

REASONS: dict[Reason, str] = {
    Reason.CATEGORY: "category not named in --categories",
    Reason.CROWD: "crowds; --include-crowd refines them too",
    Reason.CROWDED_OUT: "other refined masks took their pixels",
    Reason.DRIFT: "the refined mask drifted too far from it",
    Reason.DRY_RUN: "dry run",
    Reason.EMPTY: "no mask, or an empty one",
    Reason.EMPTY_RESULT: "the model found nothing",
    Reason.IMAGE_MISSING: "the image is missing",
    Reason.IMAGE_OUTSIDE: "the image is a link out of its folder; --follow-links allows that",
    Reason.IMAGE_TOO_LARGE: "the image is too large; --max-pixels allows more",
    Reason.IMAGE_UNREADABLE: "the image can't be read",
    Reason.LOW_SCORE: "the model predicts too low an IoU for the refined mask",
    Reason.NO_GAIN: "the refined mask is hardly better, by the model's own estimate",
    Reason.NO_TRUTH: "no ground truth to choose by",
    Reason.OUT_OF_MEMORY: "the image needs more memory than there is",
    Reason.SIZE_MISMATCH: "image and mask differ in size",
    Reason.STUFF: "stuff, not things; refined things may take some of its pixels",
    Reason.TOO_SMALL: "every component of the class is too small to refine",
    Reason.UNCHANGED: "the new mask is the same",
    Reason.UNREADABLE: "the file can't be read",
    Reason.UNREADABLE_MASK: "the mask can't be read",
    Reason.WORKER_DIED: "the worker process died twice over the image",
}
"""How a summary explains why masks were kept."""

Listener: TypeAlias = "Callable[[Progress], None]"


def say(text: str, *, markup: bool = True) -> None:
    """Print a line on stdout, wrapped only by the terminal."""
    Console(soft_wrap=True, highlight=False).print(_safe(text), markup=markup)


def complain(sentence: str) -> None:
    """Print a message in red on stderr."""
    Console(stderr=True, soft_wrap=True, highlight=False).print(f"[red]{escape(_safe(sentence))}[/red]")


def _safe(text: str) -> str:
    """Escape control characters, which a path may hold, but not the ends of lines."""
    return "\n".join(map(printable, text.split("\n")))


def dump(value: Mapping[str, object]) -> None:
    """Print a JSON object on stdout."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


def counted(number: int, thing: str) -> str:
    """Format a number of things: `1 image`, `2 images`."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def duration(seconds: float) -> str:
    """Format seconds as 0.7 s, 42 s, 3:05 or 2:10:07."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{rest:02}"
    return f"{minutes}:{rest:02}" if minutes else f"{rest} s"


# --- progress


@contextmanager
def listening(*, waiting: str, quiet: bool) -> Iterator[Listener]:
    """Yield a callback that shows the progress of a run: a bar on a terminal, and in a notebook with ipywidgets; lines
    elsewhere; nothing if `quiet`.

    Args:
        waiting: Text of the bar before the first image is done.
    """
    console = Console(stderr=True)
    if quiet:
        yield lambda _: None
    elif console.is_terminal or (console.is_jupyter and find_spec("ipywidgets") is not None):
        with _bar(console, waiting) as listener:
            yield listener
    else:
        yield Lines(write=lambda line: print(line, file=sys.stderr, flush=True), clock=time.monotonic)


class Lines:
    """A callback that writes progress as lines of text, few enough for a log file."""

    def __init__(self, *, write: Callable[[str], None], clock: Callable[[], float]) -> None:
        self._write, self._clock = write, clock
        self._told_at, self._told_images = clock(), 0

    def __call__(self, progress: "Progress") -> None:
        now = self._clock()
        waited, advanced = now - self._told_at, progress.done - self._told_images
        due = waited >= LINE_EVERY_S or (
            advanced >= LINE_EVERY_FRACTION * progress.total and waited >= LINE_NOT_BEFORE_S
        )
        if advanced and (due or progress.done == progress.total):
            self._told_at, self._told_images = now, progress.done
            self._write(describe(progress))


def describe(progress: "Progress") -> str:
    """Format progress as a line: `40/200 images, 212 masks, 9 kept, 12.1 images/s, 0:13 left`."""
    failed = f", {progress.failed} failed" if progress.failed else ""
    left = f", {duration(progress.seconds_left)} left" if progress.seconds_left else ""
    return (
        f"{progress.done}/{counted(progress.total, 'image')}, {counted(progress.masks, 'mask')}, "
        f"{progress.kept} kept{failed}, "
        f"{progress.images_per_second:.3g} images/s{_rates(progress.worker_rates)}{left}"
    )


def _rates(each: Sequence[float]) -> str:
    """Format the images per second of several workers: ` (2.9 + 3.1)`, or the range of many."""
    if len(each) < 2 or not any(each):
        return ""
    if len(each) > RATES_SHOWN:
        return f" ({len(each)} workers, {min(each):.2g} to {max(each):.2g} each)"
    return f" ({' + '.join(f'{rate:.2g}' for rate in each)})"


@contextmanager
def _bar(console: Console, waiting: str) -> Iterator[Listener]:
    from rich import progress as rich_progress

    columns = (
        rich_progress.SpinnerColumn(),
        rich_progress.BarColumn(),
        rich_progress.TextColumn("{task.description}"),
        rich_progress.TimeElapsedColumn(),
    )
    with rich_progress.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(waiting, total=None)

        def tell(progress: "Progress") -> None:
            if progress.done:
                bar.update(task, completed=progress.done, total=progress.total, description=describe(progress))
            else:
                bar.update(task, description=f"{waiting}, then {counted(progress.total, 'image')}", refresh=True)

        yield tell


@contextmanager
def counting(what: str, *, unit: str, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """Yield a callback (done, total) that shows progress: a bar on a terminal, plain lines elsewhere."""
    console = Console(stderr=True)
    if quiet:
        yield lambda *_: None
        return
    if not console.is_terminal:
        told_at = time.monotonic()

        def tell(done: int, total: int) -> None:
            nonlocal told_at
            if done == total or time.monotonic() - told_at >= LINE_EVERY_S:
                told_at = time.monotonic()
                print(f"{what}: {done}/{total} {unit}", file=sys.stderr, flush=True)

        yield tell
        return
    from rich import progress as rich_progress

    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TextColumn(unit),
        rich_progress.TimeRemainingColumn(),
    )
    with rich_progress.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def downloading(name: str, *, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """Yield a callback (bytes downloaded, bytes in total) that shows the progress of a download on a terminal."""
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield lambda *_: None
        return
    from rich import progress as rich_progress

    columns = (
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.DownloadColumn(),
        rich_progress.TransferSpeedColumn(),
        rich_progress.TimeRemainingColumn(),
    )
    with rich_progress.Progress(*columns, console=console) as bar:
        task = bar.add_task(name, total=None)
        yield lambda downloaded, size: bar.update(task, completed=downloaded, total=size)


TrainingListeners: TypeAlias = "tuple[Callable[[int, int], None], Callable[[TrainProgress], None]]"


@contextmanager
def training(*, quiet: bool, first: str = "packing", unit: str = "images") -> Iterator[TrainingListeners]:
    """Yield two callbacks: (done, total) for what is done first with the data, and one for the progress of training.

    They show a bar on a terminal, and a line from time to time elsewhere. Validations stay on the screen as lines in
    both cases.
    """
    console = Console(stderr=True)
    if quiet:
        yield lambda *_: None, lambda _: None
    elif console.is_terminal:
        with _training_bar(console, first=first, unit=unit) as listeners:
            yield listeners
    else:
        told_at = time.monotonic()

        def tell(line: str, *, at_once: bool) -> None:
            nonlocal told_at
            if at_once or time.monotonic() - told_at >= LINE_EVERY_S:
                told_at = time.monotonic()
                print(line, file=sys.stderr, flush=True)

        yield (
            lambda done, total: tell(f"{first}: {done}/{total} {unit}", at_once=done == total),
            lambda progress: tell(
                _describe_training(progress, progress.validation), at_once=progress.validation is not None
            ),
        )


@contextmanager
def _training_bar(console: Console, *, first: str, unit: str) -> Iterator[TrainingListeners]:
    from rich import progress as rich_progress

    columns = (rich_progress.BarColumn(), rich_progress.TextColumn("{task.description}"))
    with rich_progress.Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("preparing", total=1.0)
        last: dict[str, float] = {}

        def tell_first(done: int, total: int) -> None:
            bar.update(task, completed=done / total, description=f"{first}: {done}/{total} {unit}")

        def tell(progress: "TrainProgress") -> None:
            if progress.validation:
                last["dev IoU"] = progress.validation.get("full", progress.validation.get("mean_iou", 0.0))
                bar.console.print(_describe_training(progress, progress.validation), highlight=False)
            bar.update(task, completed=progress.share, description=_describe_training(progress, last))

        yield tell_first, tell


def _describe_training(progress: "TrainProgress", measured: Mapping[str, float] | None) -> str:
    """Format progress as a line: `step 40/200: loss 2.0312, iou 0.7001, full 0.8012, 12.1 images/s, 0:13 left`."""
    figures = {"loss": progress.loss, "iou": progress.iou, **(measured or {})}
    words = ", ".join(f"{name} {value:.4f}" for name, value in figures.items())
    steps = "" if progress.steps is None else f"/{progress.steps}"
    left = f", {duration(progress.seconds_left)} left" if progress.seconds_left else ""
    return f"step {progress.step}{steps}: {words}, {progress.images_per_second:.3g} images/s{left}"


# --- results


def summarise(summary: "Summary") -> None:
    """Print what a run did, in a few lines on stdout."""
    percent = f" ({summary.refined / summary.masks:.0%})" if summary.masks else ""
    change = "" if summary.mean_change is None else f", mean change {100 * summary.mean_change:.1f} % (1 - IoU)"
    say(f"[bold]{summary.refined} of {counted(summary.masks, 'mask')} refined[/bold]{percent}{change}")
    _say_kept(summary)
    say_run(summary)


def say_run(summary: "Summary") -> None:
    """Print the last lines of a summary: how long a run took, what it noticed and where its output is."""
    reused = f", {summary.reused} of them from an earlier run" if summary.reused else ""
    rate = f" ({summary.images_per_second:.3g} images/s)" if summary.images_per_second else ""
    say(f"{counted(summary.images, 'image')}{reused}, {duration(summary.seconds)}{rate}")
    if summary.redone:
        why = "it had failed, or settings, masks or images have changed"
        say(f"{counted(summary.redone, 'image')} of an earlier run refined again: {why}")
    say_crashes(summary.crashes)
    say_notes(summary.notes)
    if summary.journal is not None:
        say(f"not all images are done: --resume continues from {summary.journal}", markup=False)
    say(f"written to {summary.output}", markup=False)


def foretell(summary: "Summary", *, model: str, output: Path) -> None:
    """Print what a run would do, in a few lines on stdout."""
    planned = summary.kept.get(Reason.DRY_RUN, 0)
    masks, images = counted(summary.masks, "mask"), counted(summary.images, "image")
    say(f"[bold]{planned} of {masks} would be refined[/bold], in {images}")
    _say_kept(summary)
    say_notes(summary.notes)
    say(f"with the model {model}", markup=False)
    there = ", which exists already: the run will need --overwrite" if output.exists() else ""
    say(f"to {output}{there}", markup=False)
    say("nothing was written")


def complain_of_images(summary: "Summary") -> None:
    """Print the errors of the images that failed, on stderr."""
    for sentence in summary.errors:
        complain(sentence)
    if summary.failed > len(summary.errors):
        complain(f"... and {counted(summary.failed - len(summary.errors), 'more image')}")


def say_notes(notes: Sequence[str]) -> None:
    """Print remarks."""
    for note in notes:
        say(note, markup=False)


def say_crashes(crashes: Sequence[str]) -> None:
    """Print how worker processes died, with the ends of their logs."""
    for crash in crashes:
        say(f"died and was replaced: {crash}", markup=False)


def _say_kept(summary: "Summary") -> None:
    for reason, count in sorted(summary.kept.items(), key=lambda item: (-item[1], item[0])):
        if reason != Reason.DRY_RUN:
            say(f"  {count} kept coarse: {REASONS[reason]}", markup=False)
    say_faults(summary)


def say_faults(summary: "Summary | CorruptSummary") -> None:
    """Print what is wrong with masks in the input, on stdout."""
    for sentence in summary.faults:
        say(f"  {sentence}", markup=False)
    if summary.faulty > len(summary.faults):
        say(f"  ... and {counted(summary.faulty - len(summary.faults), 'more faulty mask')}", markup=False)


def as_json(record: object) -> dict[str, object]:
    """Convert a frozen record to what JSON can hold."""
    if not dataclasses.is_dataclass(record) or isinstance(record, type):
        raise TypeError(f"{record!r} is not a record")
    return dict(json.loads(json.dumps(dataclasses.asdict(record), default=_plain)))


def table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Sequence[int]) -> None:
    """Print a table on stdout; the columns with an index in `numbers` are right-aligned."""
    drawn = Table(title=title or None, title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for index, heading in enumerate(headings):
        drawn.add_column(heading, justify="right" if index in numbers else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*(escape(_safe(cell)) for cell in row))
    Console(highlight=False).print(drawn)


def markdown(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Sequence[int]) -> None:
    """Print the same table as Markdown on stdout."""
    if title:
        sys.stdout.write(f"**{title}**\n\n")
    rules = ["---:" if index in numbers else "---" for index in range(len(headings))]
    for row in (headings, rules, *rows):
        sys.stdout.write("| " + " | ".join(printable(cell).replace("|", "\\|") for cell in row) + " |\n")


def _plain(value: object) -> object:
    return dict(value) if isinstance(value, Mapping) else str(value)
