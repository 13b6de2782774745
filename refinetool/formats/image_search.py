"""Finds the images that annotations name, although tools write paths of other machines.

`images\\x.jpg`, `/data/upload/1/x.jpg`, `s3://bucket/x.jpg` and `images/x.jpg` may be `x.jpg` in the image folder. A
name is taken as a path within the folder first. Only if there is no such file, its last part is looked for among all
images in the folder. Nothing outside the folder is ever looked at.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from urllib.parse import unquote

from refinetool.formats.image_files import SUFFIXES, fault_of_name, files_under, is_foreign

_UPLOAD = re.compile(r"[0-9a-f]{8}-(?=.)")
"""What Label Studio puts before the name of an uploaded file."""


@dataclass(frozen=True)
class ImageSearch:
    """The images in a folder. The folder is listed on the first name that is no path within it.

    deep: Whether images in sub-folders are found by the last part of their name.
    """

    folder: Path
    deep: bool = True
    _found: dict[str, Path | None] = field(default_factory=dict)

    def direct(self, name: str) -> Path | None:
        """Return the file at that path within the folder, with either kind of slash; None if there is none."""
        if is_foreign(name):
            return None
        for path in dict.fromkeys((self.folder / name, self.folder / name.replace("\\", "/"))):
            if path.is_file():
                return path
        return None

    def by_last_part(self, name: str) -> Path | None:
        """Return the only image with the same last part; None if there is none.

        If there are several, it is the one that shares most folders with the name, counted from the end.
        """
        if name not in self._found:
            self._found[name] = self._search(name)
        return self._found[name]

    def locate(self, name: str) -> Path:
        """Return the image of that name; if there is none, the path where it was expected."""
        return self.direct(name) or self.by_last_part(name) or self.expected(name)

    def expected(self, name: str) -> Path:
        """Return the path where an image of that name would be."""
        return self.folder / (parts_of(name)[-1] if is_foreign(name) else name)

    def _search(self, name: str) -> Path | None:
        wanted = parts_of(name)
        for last in dict.fromkeys((wanted[-1], unquote(wanted[-1]), _UPLOAD.sub("", wanted[-1]))):
            paths = self._by_name.get(last, ())
            if len(paths) <= 1:
                if paths:
                    return paths[0]
                continue
            shared = [_shared([*wanted[:-1], last], path.relative_to(self.folder).parts) for path in paths]
            if shared.count(max(shared)) == 1:
                return paths[shared.index(max(shared))]
            return None
        return None

    @cached_property
    def _by_name(self) -> Mapping[str, list[Path]]:
        names: dict[str, list[Path]] = {}
        if self.folder.is_dir():
            for path in sorted(files_under(self.folder, SUFFIXES, deep=self.deep)):
                names.setdefault(path.name, []).append(path)
        return names


def parts_of(name: str) -> list[str]:
    """Split a path or an address of any system into its parts; at least one, without `..`, which may be empty."""
    path = re.sub(r"^[A-Za-z][A-Za-z0-9+.-]*:", "", name)  # a drive or a protocol
    path, _, query = path.partition("?")
    if query.startswith("d="):  # Label Studio's local files: /data/local-files/?d=folder/x.jpg
        path = query.removeprefix("d=")
    parts = [part for part in re.split(r"[/\\]", path) if part not in ("", ".", "..")]
    return parts or [""]


def fault_of_record(name: str) -> str | None:
    """Say why an image can't be looked for by a name from annotations, None if it can."""
    if not is_foreign(name):
        return fault_of_name(name)
    last = parts_of(name)[-1]
    return fault_of_name(last) if last else "names no file"


def _shared(wanted: list[str], found: tuple[str, ...]) -> int:
    """Count the parts that two paths share, from the end."""
    count = 0
    for a, b in zip(reversed(wanted), reversed(found), strict=False):
        if a != b:
            break
        count += 1
    return count
