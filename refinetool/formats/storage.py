"""Writes outputs atomically: under a temporary name beside the destination, then renamed."""

import errno
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Set
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from refinetool.errors import StorageError, UsageError
from refinetool.locations import is_remote, resolved


@contextmanager
def new_file(destination: Path) -> Iterator[BinaryIO]:
    """Open a file to write; it is renamed to its destination at the end of the block, and removed if the block fails.

    Raises:
        StorageError: The disk is full, permissions are missing, or a folder has the same name.
    """
    partial = _partial(destination)
    with _storage_errors(destination):
        destination.parent.mkdir(parents=True, exist_ok=True)
        try:
            with partial.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            partial.replace(destination)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def new_folder(destination: Path) -> Iterator[Path]:
    """Make a folder to fill; it is renamed to its destination at the end of the block, and removed if the block fails.

    Raises:
        StorageError: The disk is full, permissions are missing, or the destination is not an empty folder.
    """
    partial = _partial(destination)
    with _storage_errors(destination):
        if destination.exists() and not (destination.is_dir() and not any(destination.iterdir())):
            raise StorageError(f"{destination}: exists already; name a new folder, or remove this one.")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            yield partial
            if hasattr(os, "sync"):  # not on Windows; once for all files, which is faster than an fsync for each
                os.sync()
            partial.replace(destination)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def replacing_folder(destination: Path) -> Iterator[Path]:
    """Yield the path to write a folder to: the destination or, if it is a folder, one that replaces it at the end."""
    if not destination.is_dir():
        yield destination
        return
    fresh = _beside(destination, "new")
    shutil.rmtree(fresh, ignore_errors=True)
    yield fresh
    _replace_folder(destination, fresh)


@contextmanager
def new_pair(file: Path, folder: Path) -> Iterator[tuple[BinaryIO, Path]]:
    """Open a file to write and make a folder to fill that belong together; at the end they replace earlier ones.

    Everything that can take long or fail is done before the first rename. Then the earlier file goes first and the new
    one comes last. So a kill in between leaves a folder without its file, which nothing reads, but never a file whose
    folder is missing or of another run.

    Raises:
        StorageError: As `new_file` and `new_folder`, or a file has the name of the folder. Unless a rename fails, the
            earlier file and folder are as they were.
    """
    if folder.exists() and not folder.is_dir():
        raise StorageError(f"{folder}: is a file, and a folder of that name has to be written; name another output.")
    fresh = _beside(folder, "new")
    shutil.rmtree(fresh, ignore_errors=True)  # of a run that was killed
    try:
        with new_file(file) as out:
            with new_folder(fresh) as partial:
                yield out, partial
            out.flush()
            os.fsync(out.fileno())
            file.unlink(missing_ok=True)
            _replace_folder(folder, fresh)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _replace_folder(destination: Path, fresh: Path) -> None:
    """Rename a folder to its destination, and remove what was there: a folder, a link to one, or nothing."""
    old = _beside(destination, "old")
    shutil.rmtree(old, ignore_errors=True)
    if destination.is_symlink():
        destination.unlink()
    elif destination.exists():
        destination.rename(old)
    fresh.rename(destination)
    shutil.rmtree(old, ignore_errors=True)


IMAGE_FOLDER = "image folder"
"""The name of the only input that outputs may lie in, because masks and images are often kept together."""


def refuse_clashes(
    outputs: Mapping[str, Path | None], inputs: Mapping[str, Path | None], *, images: Iterable[Path] = ()
) -> None:
    """Raise UsageError if writing the outputs would replace an input, an image or each other, or add to an input.

    Files are compared, not paths, so links, `..` and the case of letters don't matter.

    Args:
        outputs: All files and folders that a command writes, by their name in messages; None if one is not asked for.
        inputs: All files and folders that it reads, by name.
        images: The images that it reads. They are looked at only if an output exists.
    """
    written = {what: path for what, path in outputs.items() if path is not None}
    for what, path in written.items():
        if is_remote(path):
            raise UsageError(f"{path}: the {what} can't be written to a store; name a local path, and copy it there")
        if path.name in ("", ".."):
            raise UsageError(f"the {what} {str(path)!r} has no name; name a file or folder")
        for name, source in inputs.items():
            if source is not None and not is_remote(source):
                _refuse_clash(what, path, name, source)
    _refuse_same_outputs(list(written.items()))
    _refuse_images(written, images)


def refuse_existing(files: Mapping[str, Path | None], *, replaced: bool) -> None:
    """Raise UsageError for files to write, by their name in messages, that exist, or that are folders.

    Args:
        replaced: Whether the user wants existing files to be replaced.
    """
    for what, path in files.items():
        if path is None:
            continue
        if path.is_dir():
            raise UsageError(f"{path}: the {what} will be a file, but this is a folder; name a file")
        if path.exists() and not replaced:
            raise UsageError(f"{path}: exists already; --overwrite replaces it, or name another file for the {what}")


def refuse_foreign(folder: Path, names: Set[str], *, source: Path) -> None:
    """Raise UsageError if a folder to replace holds a file or a link that is not in the output.

    Args:
        names: The paths within the folder that the output has, with forward slashes.
        source: The input, for the message.
    """
    foreign = sorted(files_in(folder) - names)
    if foreign:
        raise UsageError(f"{folder}: holds {foreign[0]}, which is not an output of {source}; name another output")


def files_in(folder: Path) -> set[str]:
    """Return the paths of all files and links within a folder, with forward slashes; none if there is no folder."""
    found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return {path.relative_to(folder).as_posix() for path in found}


def _refuse_clash(what: str, path: Path, name: str, source: Path) -> None:
    here, there = resolved(source), resolved(path)
    if _same(here, there):
        raise UsageError(f"{path}: the {what} would replace the {name}; name another path for it")
    if there.is_relative_to(here) and name != IMAGE_FOLDER:
        raise UsageError(f"{path}: the {what} would lie within the {name} {source}; name a path outside of it")
    if here.is_relative_to(there):
        raise UsageError(f"{path}: the {what} would replace the folder with the {name} {source}; name another path")


def _refuse_same_outputs(outputs: list[tuple[str, Path]]) -> None:
    for n, (what, path) in enumerate(outputs):
        for other, earlier in outputs[:n]:
            here, there = resolved(path), resolved(earlier)
            if _same(here, there) or here.is_relative_to(there) or there.is_relative_to(here):
                raise UsageError(f"{path}: the {what} and the {other} would be the same file; name another path")


def _refuse_images(outputs: Mapping[str, Path], images: Iterable[Path]) -> None:
    files = {_identity(path): (what, path) for what, path in outputs.items() if path.is_file()}
    folders = {_identity(path): (what, path) for what, path in outputs.items() if path.is_dir()}
    if not files and not folders:
        return
    above: dict[Path, Path] = {}  # an image in each folder that holds images
    for image in images:
        if is_remote(image) or not image.is_file():
            continue
        if found := files.get(_identity(image)):
            raise UsageError(f"{found[1]}: the {found[0]} would replace an image; name another path for it")
        if folders:
            above.setdefault(resolved(image).parent, image)
    for holder, image in above.items():
        for parent in (holder, *holder.parents):
            if found := folders.get(_identity(parent)):
                raise UsageError(
                    f"{found[1]}: the {found[0]} would replace the folder with the image {image}; name another path"
                )


def _same(a: Path, b: Path) -> bool:
    """Whether two resolved paths are, or would be, the same file. Not every file system tells upper from lower case."""
    if a.exists() and b.exists():
        return a.samefile(b)
    return not (a.exists() or b.exists()) and str(a).casefold() == str(b).casefold()


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _partial(destination: Path) -> Path:
    return _beside(destination, "partial")


def _beside(destination: Path, what: str) -> Path:
    return destination.with_name(f".{destination.name}.refinetool-{what}")


@contextmanager
def _storage_errors(destination: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            message = f"{destination}: the disk is full; make room and run the command again."
        else:
            message = f"{destination}: can't be written ({error.strerror or error})."
        raise StorageError(message) from error
