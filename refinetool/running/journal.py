"""What is finished, kept beside the output: a killed run is continued from here.

The journal holds the outcome of each finished sample, as `job_lines` keeps lines: with a digest of the sample's masks
and image. Memory holds one small entry per sample; the outcomes stay on disk and are read back.
"""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from refinetool.records import Annotation, Candidates, Outcome, Rle, Sample
from refinetool.running.lines import JobLines, Kind, Place, holds_lines
from refinetool.statuses import Reason

JOURNAL = Kind("refinetool_journal", "journal")


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
        self._earlier: dict[str, tuple[Place, str] | None] = {}  # with the digest; None: of no use to this job
        self._handed_out: dict[str, str] = {}  # digests of the samples now on their way
        self._done: dict[str, Place] = {}
        self._lines = JobLines(path, JOURNAL, job=job, fresh=fresh, on_line=self._index)

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
        return _outcome(self._lines.load(earlier[0]))

    def append(self, outcome: Outcome, *, seconds: float) -> None:
        """Add a finished sample that `reuse` was asked for.

        Raises:
            StorageError: the disk is full, or the like. Nothing that was appended before is lost.
        """
        record = _record(outcome, digest=self._handed_out.pop(outcome.key), seconds=seconds)
        saved = f"the {len(self._done)} images finished so far are kept"
        self._done[outcome.key] = self._lines.append(record, saved=saved)

    def find(self, key: str) -> Outcome | None:
        """The outcome of a sample that this run finished or took over, None for any other."""
        place = self._done.get(key)
        return None if place is None else _outcome(self._lines.load(place))

    def __len__(self) -> int:
        """Samples that `find` knows."""
        return len(self._done)

    def remove(self) -> None:
        """Delete the file: the output holds everything now."""
        self._lines.remove()

    def close(self) -> None:
        """Make sure that the journal outlives a power cut, and close it."""
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
    """Where the journal of an output lies: `OUT.journal.jsonl`, beside the file or folder OUT."""
    return output.with_name(output.name + ".journal.jsonl")


def holds_work(path: Path) -> bool:
    """Whether a journal lies there with at least one finished sample, of whatever job.

    Raises:
        UsageError: something else lies there.
        StorageError: it can't be read.
    """
    return holds_lines(path, JOURNAL)


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
    reason = None if packed["kept"] is None else Reason(packed["kept"])
    candidates = _candidates(packed["candidates"]) if "candidates" in packed else None
    return Annotation(mask, reason, packed["predicted_iou"], packed["coarse_iou"], candidates)
