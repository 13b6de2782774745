"""Writes outputs atomically: under a temporary name beside the destination, then renamed."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from refinetool.errors import StorageError, UsageError


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


def refuse_overlap(source: Path, destination: Path) -> None:
    """Raise UsageError if writing `destination` would change `source` or add to it."""
    here, there = source.resolve(), destination.resolve()
    if here == there or (there.exists() and here.samefile(there)):
        raise UsageError(f"{destination}: is the input itself; name another output.")
    if there.is_relative_to(here):
        raise UsageError(f"{destination}: lies within the input {source}; name an output outside of it.")


def _partial(destination: Path) -> Path:
    return destination.with_name(f".{destination.name}.refinetool-partial")


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
