"""Checks where a run will write before it starts, and writes what belongs together."""

from collections.abc import Callable, Mapping, Set
from dataclasses import replace
from pathlib import Path
from typing import Protocol, runtime_checkable

from refinetool.errors import UsageError
from refinetool.formats import Dataset, Written
from refinetool.formats.storage import files_in, refuse_foreign, replacing_folder
from refinetool.records import Outcome
from refinetool.running.journal import holds_work


def check_journal(path: Path, *, resume: bool, fresh: bool) -> None:
    """Raise UsageError if an earlier run left finished images and neither `resume` nor `fresh` is given."""
    if resume and fresh:
        raise UsageError("--resume continues an earlier run and --fresh discards it; choose one")
    if not resume and not fresh and holds_work(path):
        raise UsageError(
            f"{path}: an earlier run left finished images here; --resume continues from them, --fresh starts over"
        )


def check_output(source: Path, destination: Path, *, replaced: bool, resume: bool) -> None:
    """Raise UsageError if the output can't be written, or would replace something that must not be replaced.

    With `resume`, an output without a journal is taken to be that of a finished run. A folder is replaced only if the
    input has all of its files, because then it can only be an earlier output.
    """
    if not destination.parent.is_dir():
        raise UsageError(f"{destination}: there is no folder {destination.parent}; make it, or name another output")
    if not destination.exists() or (source.is_dir() and destination.is_dir() and not any(destination.iterdir())):
        return
    if source.is_dir() != destination.is_dir():
        kinds = ("folder", "file") if source.is_dir() else ("file", "folder")
        raise UsageError(
            f"{destination}: the output will be a {kinds[0]}, but this is a {kinds[1]}; name another output"
        )
    _check_replaced(destination, replaced=replaced, resume=resume)
    if source.is_dir():
        refuse_foreign(destination, files_in(source), source=source)


def _check_replaced(destination: Path, *, replaced: bool, resume: bool) -> None:
    if not replaced and resume:
        raise UsageError(
            f"{destination}: exists already, and no unfinished run has left a journal beside it, so nothing is left to "
            "do; --overwrite refines again"
        )
    if not replaced:
        raise UsageError(f"{destination}: exists already; --overwrite replaces it, --output names another")


@runtime_checkable
class WithFolder(Protocol):
    """A data set that is a file and a folder of PNGs, and is written as both."""

    @property
    def pngs(self) -> Path:
        """The folder."""

    def folder_for(self, destination: Path) -> Path:
        """Return the folder that is written with a file; raises UsageError if the file's name leaves none for it."""

    def png_names(self) -> Set[str]:
        """Return the paths within the folder that are written, with forward slashes."""


def folder_beside(dataset: Dataset, destination: Path) -> dict[str, Path]:
    """Return the folder that is written beside the output, by its name in messages; nothing for most formats."""
    return {"folder of PNGs": dataset.folder_for(destination)} if isinstance(dataset, WithFolder) else {}


def folder_of(dataset: Dataset, what: str) -> dict[str, Path]:
    """Return the folder that belongs to the file of a data set, by its name in messages; nothing for most formats."""
    return {f"folder of the {what}": dataset.pngs} if isinstance(dataset, WithFolder) else {}


def check_beside(dataset: Dataset, source: Path, destination: Path, *, replaced: bool, resume: bool) -> None:
    """Check the folder that is written beside the output, if there is one, as `check_output` checks the output.

    That it holds other files is said first, because no option replaces it then.
    """
    if not isinstance(dataset, WithFolder):
        return
    folder = dataset.folder_for(destination)
    if not folder.is_dir() and (folder.exists() or folder.is_symlink()):
        raise UsageError(
            f"{folder}: the PNGs of the output will be in this folder, but it is a file; name another output"
        )
    if folder.is_dir() and any(folder.iterdir()):
        refuse_foreign(folder, dataset.png_names(), source=source)
        _check_replaced(folder, replaced=replaced, resume=resume)


def write(
    dataset: Dataset, find: Callable[[str], Outcome | None], destination: Path, notes: Mapping[str, object]
) -> Written:
    """Write the output; an existing folder is replaced when the new one is complete."""
    with replacing_folder(destination) as fresh:
        written = dataset.write(find, fresh, notes)
    return written if fresh == destination else replace(written, path=destination)
