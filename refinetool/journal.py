"""What is finished, kept beside the output: a killed run is continued from here.

An append-only file of JSON lines. A header line names the job (settings, model, versions) and the lines after it belong
to that job; each holds one finished sample with a digest of its input. Nothing is ever changed in place:

- the last line of a key wins, so that a sample may be done twice;
- a line cut off by a kill is dropped, its sample is done again;
- a line whose job or input is no longer the same stays in the file and is not used.

Memory holds one small entry per sample; the outcomes stay on disk and are read back by offset.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from refinetool.errors import StorageError, UsageError
from refinetool.records import Annotation, Candidates, Outcome, Rle, Sample

if sys.platform != "win32":
    import fcntl

MAGIC = b'{"refinetool_journal": 1, '
"""How every journal begins."""


@dataclass(frozen=True, slots=True)
class _Entry:
    """Where a line lies in the file, in bytes."""

    offset: int
    length: int


class Journal:
    """The finished samples of one job. Used by one thread; another process on the same file is refused.

    A sample is handed to `reuse` before it is refined and to `append` after; `find` then knows it. What an earlier run
    left behind and this run did not ask for with `reuse` is not found: its input may have changed since.
    """

    def __init__(self, path: Path, *, job: Mapping[str, object], fresh: bool) -> None:
        """Open or create the journal.

        Args:
            path: the file.
            job: all that decides an outcome apart from the sample itself, as JSON can hold it.
            fresh: whether to drop what the file holds.

        Raises:
            UsageError: the file is not a journal, or another run is writing it.
            StorageError: it can't be written.
        """
        self.path = path
        self._job = _hash(json.dumps(job, sort_keys=True).encode())
        self._earlier: dict[str, tuple[_Entry, str] | None] = {}  # with the digest; None: of no use to this job
        self._handed_out: dict[str, str] = {}  # digests of the samples now on their way
        self._done: dict[str, _Entry] = {}
        try:
            self._file: BinaryIO = path.open("a+b", buffering=0)
        except OSError as error:
            raise StorageError(f"{path}: the journal can't be opened: {error.strerror}") from error
        try:
            _lock(self._file, path)
            self._check()
            self._end, continued = (0, False) if fresh else self._read()
            self._file.truncate(self._end)
            if not continued:
                self._write(_json_line({"refinetool_journal": 1, "job": self._job, "about": job}))
        except BaseException:
            self._file.close()
            raise

    def knows(self, key: str) -> bool:
        """Whether an earlier run finished the sample, be it with other settings or another input."""
        return key in self._earlier

    def reuse(self, sample: Sample) -> Outcome | None:
        """The outcome of an earlier run, if this sample went through it unchanged and without an error.

        Where there is none, the sample's input is noted as it is now: what is appended later was made from it.
        """
        digest = digest_of(sample)
        earlier = self._earlier.get(sample.key)
        if earlier is None or earlier[1] != digest:
            self._handed_out[sample.key] = digest
            return None
        self._done[sample.key] = earlier[0]
        return self._load(earlier[0])

    def append(self, outcome: Outcome, *, seconds: float) -> None:
        """Add a finished sample that `reuse` was asked for.

        Raises:
            StorageError: the disk is full, or the like. Nothing that was appended before is lost.
        """
        line = _line(outcome, digest=self._handed_out.pop(outcome.key), seconds=seconds)
        entry = _Entry(self._end, len(line))
        self._write(line)
        self._done[outcome.key] = entry

    def find(self, key: str) -> Outcome | None:
        """The outcome of a sample that this run finished or took over, None for any other."""
        entry = self._done.get(key)
        return None if entry is None else self._load(entry)

    def __len__(self) -> int:
        """Samples that `find` knows."""
        return len(self._done)

    def remove(self) -> None:
        """Delete the file: the output holds everything now."""
        self._file.close()
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Make sure that the lines outlive a power cut, and close the file."""
        if not self._file.closed:
            # Once, at the end: each line is already with the operating system and survives a kill, and on a network
            # disk a sync per line would keep the model waiting. A power cut costs a tail, which is done again.
            with suppress(OSError):
                os.fsync(self._file.fileno())
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check(self) -> None:
        self._file.seek(0)
        if not _begins(self._file.read(len(MAGIC))):
            raise _not_a_journal(self.path)

    def _read(self) -> tuple[int, bool]:
        """Index the complete lines; returns where they end and whether the last header names this job."""
        self._file.seek(0)
        offset, current = 0, False
        with open(self._file.fileno(), "rb", closefd=False) as lines:  # the same file, read in blocks
            for line in lines:
                if not line.endswith(b"\n"):
                    break
                record = parse_line(line)
                if "job" in record:
                    current = record["job"] == self._job
                elif "key" in record and "input" in record:
                    self._index(record, _Entry(offset, len(line)), current=current)
                offset += len(line)
        return offset, current

    def _index(self, record: Mapping[str, Any], entry: _Entry, *, current: bool) -> None:
        if current:
            self._earlier[record["key"]] = (entry, record["input"]) if record.get("error") is None else None
        else:
            self._earlier.setdefault(record["key"], None)

    def _write(self, line: bytes) -> None:
        try:
            written = 0
            while written < len(line):
                written += self._file.write(line[written:])
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(self._end)
            raise StorageError(
                f"{self.path}: the journal can't be written: {error.strerror}; make room and continue with --resume, "
                f"the {len(self._done)} images finished so far are kept"
            ) from error
        self._end += len(line)

    def _load(self, entry: _Entry) -> Outcome:
        self._file.seek(entry.offset)
        return _outcome(json.loads(self._file.read(entry.length)))


def journal_path(output: Path) -> Path:
    """Where the journal of an output lies: `OUT.journal.jsonl`, beside the file or folder OUT."""
    return output.with_name(output.name + ".journal.jsonl")


def holds_work(path: Path) -> bool:
    """Whether a journal lies there with at least one finished sample, of whatever job.

    Raises:
        UsageError: something else lies there.
    """
    try:
        with path.open("rb") as lines:
            for number, line in enumerate(lines):
                if number == 0 and not _begins(line):
                    raise _not_a_journal(path)
                if line.endswith(b"\n") and "key" in parse_line(line):
                    return True
    except FileNotFoundError:
        return False
    except OSError as error:
        raise StorageError(f"{path}: the journal can't be read: {error.strerror}") from error
    return False


def digest_of(sample: Sample) -> str:
    """Hash of what a sample's outcome is made from: its masks, and its image as size and time of change.

    The pixels are not read: a changed image is recognised as `make` would. Paths do not count, so a data set may move.
    """
    digest = hashlib.blake2b(digest_size=16)
    for part in _parts(sample):
        digest.update(repr(part).encode())
    return digest.hexdigest()


def _parts(sample: Sample) -> Iterable[object]:
    try:
        status = sample.image.stat()
        yield (status.st_size, status.st_mtime_ns)
    except OSError:
        yield "no image"
    yield (sample.size, sample.layout)
    for region in sample.regions:
        yield (region.id, region.category, region.keep, None if region.mask is None else region.mask.counts)
        if region.truth is not None:
            yield region.truth.counts
    yield None if sample.void is None else sample.void.counts


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _line(outcome: Outcome, *, digest: str, seconds: float) -> bytes:
    record = {
        "key": outcome.key,
        "input": digest,
        "error": outcome.error,
        "seconds": round(seconds, 4),
        "annotations": [_packed(annotation) for annotation in outcome.annotations],
    }
    return _json_line(record)


def _json_line(record: Mapping[str, object]) -> bytes:
    return json.dumps(record).encode("ascii") + b"\n"


def _packed(annotation: Annotation) -> dict[str, object]:
    mask = annotation.mask
    record: dict[str, object] = {
        "status": annotation.status,
        "predicted_iou": _number(annotation.predicted_iou),
        "coarse_iou": _number(annotation.coarse_iou),
        "size": None if mask is None else [int(side) for side in mask.size],
        "counts": None if mask is None else mask.counts.decode("ascii"),
    }
    if annotation.candidates is not None:
        record["candidates"] = packed_candidates(annotation.candidates)
    return record


def packed_candidates(candidates: Candidates) -> dict[str, object]:
    """Candidates as JSON holds them: masks as COCO's run lengths, each with its predicted IoU."""
    return {
        "selected": candidates.selected,
        "scores": list(candidates.scores),
        "candidates": [
            {"size": list(map(int, rle.size)), "counts": rle.counts.decode("ascii")} for rle in candidates.masks
        ],
    }


def _candidates(packed: Mapping[str, Any]) -> Candidates:
    rles = (Rle((rle["size"][0], rle["size"][1]), rle["counts"].encode("ascii")) for rle in packed["candidates"])
    return Candidates(tuple(rles), tuple(packed["scores"]), packed["selected"])


def _number(value: float | None) -> float | None:
    """A plain float: NumPy's are not JSON."""
    return None if value is None else float(value)


def _outcome(record: Mapping[str, Any]) -> Outcome:
    return Outcome(record["key"], tuple(_annotation(packed) for packed in record["annotations"]), record["error"])


def _annotation(packed: Mapping[str, Any]) -> Annotation:
    size, counts = packed["size"], packed["counts"]
    mask = None if counts is None else Rle((size[0], size[1]), counts.encode("ascii"))
    candidates = _candidates(packed["candidates"]) if "candidates" in packed else None
    return Annotation(mask, packed["status"], packed["predicted_iou"], packed["coarse_iou"], candidates)


def parse_line(line: bytes) -> dict[str, Any]:
    """One line as a record; an empty one where a crash of the machine left something else."""
    try:
        record = json.loads(line)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _begins(line: bytes) -> bool:
    """Whether the start of a file, possibly cut off, is a journal's."""
    return line.startswith(MAGIC) or MAGIC.startswith(line)


def _not_a_journal(path: Path) -> UsageError:
    return UsageError(f"{path}: the journal would be here, but this file is something else; move it away")


def _lock(file: BinaryIO, path: Path) -> None:
    """Refuse a second run on the same output. Where the file system has no locks, go without."""
    if sys.platform == "win32":
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UsageError(
            f"{path}: another run is writing this journal; wait for it, or choose another output"
        ) from error
    except OSError:
        return
