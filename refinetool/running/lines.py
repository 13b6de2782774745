"""Stores finished work as lines of a file, so that a later run can continue a killed one.

The file is append-only JSON Lines. A header line identifies the job (everything that affects a result apart from its
input), and the lines after it belong to that job. Each line has the key of a finished item and the digest of its input.
Nothing is ever changed in place:

- if a key has several lines, the last one counts, so an item may be done twice;
- a line that was cut off by a kill is dropped, and its item is done again;
- so is a line that was damaged or edited: each ends with a checksum of its job and its text;
- a line whose job or input no longer matches stays in the file and is not used.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from refinetool.errors import DataError, StorageError, UsageError

if sys.platform != "win32":
    import fcntl


@dataclass(frozen=True, slots=True)
class Kind:
    """The kind of a file of lines.

    mark: First key of the header, which identifies the kind.
    name: Name in messages, for example `journal`.
    """

    mark: str
    name: str

    @property
    def magic(self) -> bytes:
        """The beginning of every file of this kind."""
        return f'{{"{self.mark}": 1, '.encode()

    def begins(self, start: bytes) -> bool:
        """Whether the start of a file, which may be cut off, is that of this kind."""
        return start.startswith(self.magic) or self.magic.startswith(start)

    def refusal(self, path: Path) -> UsageError:
        """Return the error for a file that is something else."""
        return UsageError(f"{path}: the {self.name} would be here, but this file is something else; move it away")


@dataclass(frozen=True, slots=True)
class Place:
    """The position of a line in the file, in bytes."""

    offset: int
    length: int


OnLine = Callable[[Mapping[str, Any], Place, bool], None]
"""Called for each line of an earlier run with its record, its place, and whether it belongs to the current job."""


class JobLines:
    """The lines of one job. One thread appends, any thread may read; another process on the same file is refused."""

    def __init__(self, path: Path, kind: Kind, *, job: Mapping[str, object], fresh: bool, on_line: OnLine) -> None:
        """Open or create the file, and read the lines it holds.

        Args:
            job: Identity of the job, in JSON types.
            fresh: Whether to discard the content of the file.

        Raises:
            UsageError: The file is of another kind, or another run is writing it.
            StorageError: The file can't be written.
        """
        self.path, self.kind = path, kind
        self._job = hashlib.blake2b(json.dumps(job, sort_keys=True).encode(), digest_size=16).hexdigest()
        try:
            self._file: BinaryIO = path.open("a+b", buffering=0)
        except OSError as error:
            raise StorageError(f"{path}: the {kind.name} can't be opened: {error.strerror}") from error
        try:
            _lock(self._file, path, kind)
            self._file.seek(0)
            if not kind.begins(self._file.read(len(kind.magic))):
                raise kind.refusal(path)
            self._end, continued = (0, False) if fresh else self._read(on_line)
            self._file.truncate(self._end)
            if not continued:
                self.append({kind.mark: 1, "job": self._job, "about": job}, saved="")
        except BaseException:
            self._file.close()
            raise

    def append(self, record: Mapping[str, object], *, saved: str) -> Place:
        """Add a line.

        Args:
            saved: Message about earlier lines if this one can't be written: "the 3 images finished so far are kept".

        Raises:
            StorageError: The line can't be written, for example because the disk is full. Earlier lines are kept.
        """
        line = _sealed(json.dumps(record).encode("ascii"), job="" if self.kind.mark in record else self._job)
        try:
            written = 0
            while written < len(line):
                written += self._file.write(line[written:])
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(self._end)
            raise StorageError(
                f"{self.path}: the {self.kind.name} can't be written: {error.strerror}; make room and continue with "
                f"--resume{saved and f', {saved}'}"
            ) from error
        place = Place(self._end, len(line))
        self._end += len(line)
        return place

    def load(self, place: Place) -> dict[str, Any]:
        """Read the record of a line; raises DataError if the line has changed since it was found."""
        with self.path.open("rb") as file:
            file.seek(place.offset)
            record = _parsed(file.read(place.length), job=self._job)
        if not record:
            raise DataError(f"{self.path}: this {self.kind.name} was changed while it was in use; run again")
        return record

    def remove(self) -> None:
        """Delete the file when it is no longer needed."""
        self._file.close()
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Force the lines to the disk, and close the file."""
        if not self._file.closed:
            # Once, at the end: each line is already with the operating system and survives a kill, and on a network
            # disk a sync per line would keep the model waiting. After a power cut, the last lines may be lost and are
            # done again.
            with suppress(OSError):
                os.fsync(self._file.fileno())
            self._file.close()

    def _read(self, on_line: OnLine) -> tuple[int, bool]:
        """Read the complete lines; returns the offset of their end and whether the last header is that of this job."""
        self._file.seek(0)
        offset, current = 0, False
        with open(self._file.fileno(), "rb", closefd=False) as lines:  # the same file, read in blocks
            for place, job, record in _records(lines):
                current = job == self._job
                if "key" in record and "input" in record:
                    on_line(record, place, current)
                offset = place.offset + place.length
        return offset, current


def holds_lines(path: Path, kind: Kind) -> bool:
    """Whether the file is of this kind and has at least one finished item, of any job.

    Raises:
        UsageError: The file is something else.
        StorageError: The file can't be read.
    """
    try:
        with path.open("rb") as lines:
            if not kind.begins(lines.read(len(kind.magic))):
                raise kind.refusal(path)
            lines.seek(0)
            return any("key" in record for _, _, record in _records(lines))
    except FileNotFoundError:
        return False
    except OSError as error:
        raise StorageError(f"{path}: the {kind.name} can't be read: {error.strerror}") from error


def _records(lines: Iterable[bytes]) -> Iterator[tuple[Place, str, dict[str, Any]]]:
    """Yield the complete lines: place, job, and record, which is empty for a damaged line.

    A line below a damaged header fails its check, so it is never taken for one of the job before.
    """
    offset, job = 0, ""
    for line in lines:
        if not line.endswith(b"\n"):
            return
        record = _parsed(line, job=job) or _parsed(line, job="")
        job = str(record.get("job", job))
        yield Place(offset, len(line)), job, record
        offset += len(line)


_CHECK = b', "check": "'


def _sealed(record: bytes, *, job: str) -> bytes:
    """Return the line of a record, the text of a JSON object: it gets a checksum as its last member."""
    text = record.removesuffix(b"}")
    return text + _CHECK + _checksum(text, job) + b'"}\n'


def _parsed(line: bytes, *, job: str) -> dict[str, Any]:
    """Parse a line of a job; empty if it was damaged by a crash of the machine or by hand, or is of another job."""
    text, _, check = line.rpartition(_CHECK)
    if check != _checksum(text, job) + b'"}\n':
        return {}
    record: dict[str, Any] = json.loads(line)
    return record


def _checksum(text: bytes, job: str) -> bytes:
    return hashlib.blake2b(text, digest_size=8, key=job.encode()).hexdigest().encode("ascii")


def _lock(file: BinaryIO, path: Path, kind: Kind) -> None:
    """Refuse a second run on the same file. Does nothing if the file system has no locks."""
    if sys.platform == "win32":
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UsageError(
            f"{path}: another run is writing this {kind.name}; wait for it, or choose another output"
        ) from error
    except OSError:
        return
