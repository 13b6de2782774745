"""Keeps finished samples in a file beside the output, so that a killed run can be continued.

The journal holds the outcome of each finished sample as a line of `lines.JobLines`, with a digest of the sample's masks
and image. Memory holds one small entry per sample; the outcomes stay on disk and are read back.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from refinetool.records import Annotation, Candidates, Outcome, Rle, Sample
from refinetool.running.lines import JobLines, Kind, Place, holds_lines
from refinetool.statuses import Reason

JOURNAL = Kind("refinetool_journal", "journal")


class Journal:
    """The finished samples of one job. Used by one thread; another process on the same file is refused.

    Call `reuse` before a sample is refined and `append` after; then `find` returns it. Samples of an earlier run for
    which this run did not call `reuse` are not found, because their input may have changed since.
    """

    def __init__(self, path: Path, *, job: Mapping[str, object], fresh: bool) -> None:
        """Open or create the journal.

        Args:
            path: The file.
            job: Everything that affects an outcome, apart from the sample itself, in JSON types.
            fresh: Whether to discard the content of the file.

        Raises:
            UsageError: The file is not a journal, or another run is writing it.
            StorageError: The file can't be written.
        """
        self.path = path
        self._earlier: dict[str, tuple[Place, str] | None] = {}  # with the digest; None: can't be used for this job
        self._handed_out: dict[str, str] = {}  # digests of the samples being refined
        self._done: dict[str, Place] = {}
        self._lines = JobLines(path, JOURNAL, job=job, fresh=fresh, on_line=self._index)

    def knows(self, key: str) -> bool:
        """Whether an earlier run finished the sample, even with other settings or another input."""
        return key in self._earlier

    def reuse(self, sample: Sample) -> Outcome | None:
        """Return the outcome of an earlier run, if the sample is unchanged and was refined without an error.

        Otherwise the digest of the sample's input is stored, for the outcome that is appended later.
        """
        digest = digest_of(sample)
        earlier = self._earlier.get(sample.key)
        if earlier is None or earlier[1] != digest:
            self._handed_out[sample.key] = digest
            return None
        self._done[sample.key] = earlier[0]
        return replace(_outcome(self._lines.load(earlier[0])), faults=sample.faults)

    def append(self, outcome: Outcome, *, seconds: float) -> None:
        """Add a finished sample for which `reuse` was called.

        Raises:
            StorageError: The journal can't be written, for example because the disk is full. Earlier samples are kept.
        """
        record = _record(outcome, digest=self._handed_out.pop(outcome.key), seconds=seconds)
        saved = f"the {len(self._done)} images finished so far are kept"
        self._done[outcome.key] = self._lines.append(record, saved=saved)

    def find(self, key: str) -> Outcome | None:
        """Return the outcome of a sample that this run finished or reused, None for any other."""
        place = self._done.get(key)
        return None if place is None else _outcome(self._lines.load(place))

    def __len__(self) -> int:
        """Number of samples that `find` returns."""
        return len(self._done)

    def remove(self) -> None:
        """Delete the file, once the output is complete."""
        self._lines.remove()

    def close(self) -> None:
        """Force the journal to the disk, and close it."""
        self._lines.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _index(self, record: Mapping[str, Any], place: Place, current: bool) -> None:
        if current:
            self._earlier[record["key"]] = (place, record["input"]) if record.get("error") is None else None
        else:
            self._earlier.setdefault(record["key"], None)


def journal_path(output: Path) -> Path:
    """Return the path of the journal of an output: `OUT.journal.jsonl`, beside the file or folder OUT."""
    return output.parent / f"{output.name}.journal.jsonl"


def holds_work(path: Path) -> bool:
    """Whether the file is a journal with at least one finished sample, of any job.

    Raises:
        UsageError: The file is something else.
        StorageError: The file can't be read.
    """
    return holds_lines(path, JOURNAL)


def digest_of(sample: Sample) -> str:
    """Hash the input of a sample: its masks, and the size and modification time of its image.

    The pixels are not read; like `make`, this detects a changed image by its modification time. Paths do not count, so
    a data set may be moved.
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


def _record(outcome: Outcome, *, digest: str, seconds: float) -> dict[str, object]:
    return {
        "key": outcome.key,
        "input": digest,
        "error": outcome.error,
        "seconds": round(seconds, 4),
        "annotations": [_packed(annotation) for annotation in outcome.annotations],
    }


def _packed(annotation: Annotation) -> dict[str, object]:
    mask = annotation.mask
    record: dict[str, object] = {
        "kept": annotation.reason,
        "predicted_iou": _number(annotation.predicted_iou),
        "coarse_iou": _number(annotation.coarse_iou),
        "size": None if mask is None else [int(side) for side in mask.size],
        "counts": None if mask is None else mask.counts.decode("ascii"),
    }
    if annotation.candidates is not None:
        record["candidates"] = packed_candidates(annotation.candidates)
    return record


def packed_candidates(candidates: Candidates) -> dict[str, object]:
    """Convert candidates to JSON types: masks as COCO RLE, each with its predicted IoU."""
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
    """Convert to a plain float, because NumPy's floats can't be written as JSON."""
    return None if value is None else float(value)


def _outcome(record: Mapping[str, Any]) -> Outcome:
    return Outcome(record["key"], tuple(_annotation(packed) for packed in record["annotations"]), record["error"])


def _annotation(packed: Mapping[str, Any]) -> Annotation:
    size, counts = packed["size"], packed["counts"]
    mask = None if counts is None else Rle((size[0], size[1]), counts.encode("ascii"))
    reason = None if packed["kept"] is None else Reason(packed["kept"])
    candidates = _candidates(packed["candidates"]) if "candidates" in packed else None
    return Annotation(mask, reason, packed["predicted_iou"], packed["coarse_iou"], candidates)
