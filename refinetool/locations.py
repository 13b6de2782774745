"""Paths of files on this machine, and of files in an object store (`s3://`, `gs://`, ...), which are read like them."""

import os
import re
from pathlib import Path
from typing import cast, overload

from refinetool.errors import UsageError

_REMOTE = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)


@overload
def location(text: Path | str) -> Path: ...
@overload
def location(text: Path | str | None) -> Path | None: ...
def location(text: Path | str | None) -> Path | None:
    """Return the path that a text names; None stays None, and paths stay as they are.

    `PROTOCOL://...` is a file in a store, through fsspec. Such a path has the methods of `pathlib.Path`.

    Raises:
        UsageError: There is no such kind of store, or the extra packages for stores are not installed.
    """
    if not isinstance(text, str):
        return text
    found = _REMOTE.match(text)
    if found is None:
        return Path(text)
    try:
        from upath import UPath

        return cast(Path, UPath(text))
    except ImportError as error:
        raise UsageError(
            f"{text}: files in stores need more packages; install refinetool[remote], and the package for this store, "
            "such as s3fs or gcsfs"
        ) from error
    except ValueError as error:
        raise UsageError(f"{text}: there is no such kind of store ({error})") from error


def check_reachable(path: Path | None) -> None:
    """Raise UsageError for a path in a store that can't be used, so that this is said once, not for every image."""
    if path is None or not is_remote(path):
        return
    try:
        path.exists()
    except ImportError as error:
        raise UsageError(f"{path}: the package for this store is missing ({error})") from error
    except Exception as error:  # each store has exceptions of its own
        raise UsageError(f"{path}: the store can't be used: {error}") from error


def is_remote(path: Path) -> bool:
    """Whether a path is in a store, where there are no links, and nothing is written."""
    return not isinstance(path, Path)


def resolved(path: Path) -> Path:
    """Return the absolute path with its links followed; a link that leads back to itself stays, without an error."""
    return path.resolve() if is_remote(path) else Path(os.path.realpath(path))
