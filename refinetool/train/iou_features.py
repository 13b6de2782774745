"""What IoU adaption learns from, gathered once and kept in a file.

For every coarse mask the frozen model is asked three questions: the points alone, the box alone, and everything. Kept
are the input of the last layer of the IoU head and the IoU of each alternative with the coarse mask, a few kilobytes
a mask, so training needs neither model nor images, and can be repeated with other settings in seconds.

The file is append-only, like the journal of `refine`: JSON lines, one per image, after a header that names the job.
The last line of a key wins, a line cut off by a kill is dropped, and lines of another job or input are not used.
"""

import base64
import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self, TypeVar

import numpy as np

from refinetool.backends.square import SquareBackend
from refinetool.errors import DataError, StorageError, UsageError
from refinetool.journal import digest_of, parse_line
from refinetool.parts import Job
from refinetool.prompts import expand_boxes
from refinetool.records import ABSENT, FloatArray, Prompts, Sample
from refinetool.refine import Prepared, Refiner
from refinetool.settings import RefineSettings

POINT, BOX, ALL = QUESTIONS = ("point", "box", "all")
SINGLE = (0, 1)
"""Rows of QUESTIONS that are single prompts."""
MAGIC = b'{"refinetool_iou_features": 1, '
"""How every file of features begins."""
ERRORS_TOLD = 10

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True, slots=True, eq=False)
class Features:
    """The n masks of one image, each asked about in the Q = 3 ways of QUESTIONS.

    inputs: float32 (n, Q, H), the input of the last layer of the IoU head.
    overlaps: float32 (n, Q, C), IoU of the C alternatives (mask tokens 1 to C) with the coarse mask.
    """

    inputs: FloatArray
    overlaps: FloatArray

    def __len__(self) -> int:
        return len(self.inputs)


@dataclass(frozen=True, slots=True)
class Gathered:
    """What was gathered: keys of the images that have masks, in the order of the file."""

    keys: tuple[str, ...]
    masks: int
    reused: int
    failed: int
    errors: tuple[str, ...]
    """Sentences about the first images that could not be read."""


def gather(
    samples: Iterable[Sample],
    backend: SquareBackend,
    *,
    settings: RefineSettings,
    cache: "FeatureFile",
    threads: int,
    total: int,
    on_progress: Callable[[int, int], None],
) -> Gathered:
    """Ask the model about every mask that the file does not hold yet.

    Args:
        samples: Streamed: only a few are in memory at a time. Those without a mask to refine are passed over.
        settings: How views are chosen and prompts mined, as in `refine`.
        threads: How many read images and mine prompts ahead of the model.
        total: Number of samples.
        on_progress: Called after each sample, with how many are done and their total.
    """
    refiner = Refiner(backend, settings)
    masks = reused = failed = 0
    keys: list[str] = []
    errors: list[str] = []

    def prepare(sample: Sample) -> tuple[str, Prepared | DataError | Features | None]:
        if all(region.keep is not None for region in sample.regions):
            return "", None
        digest = digest_of(sample)  # before the image is read: what is kept was made from this, or from something newer
        try:
            held = cache.find(sample.key, digest=digest)
            return digest, refiner.prepare(sample) if held is None else held
        except DataError as error:
            return digest, error

    for done, (sample, (digest, found)) in enumerate(ahead(samples, prepare, threads=threads), 1):
        if isinstance(found, DataError):
            failed += 1
            errors += [str(found)][: ERRORS_TOLD - len(errors)]
        elif found is not None:
            if isinstance(found, Features):
                features = found
                reused += 1
            else:
                features = answers(backend, found.jobs, settings=settings)
                cache.append(sample.key, features, digest=digest)
            if len(features):
                keys.append(sample.key)
                masks += len(features)
        on_progress(done, total)
    return Gathered(tuple(keys), masks, reused, failed, tuple(errors))


def answers(backend: SquareBackend, jobs: Sequence[Job], *, settings: RefineSettings) -> Features:
    """Ask the three questions about every mask of an image."""
    layer = backend.score_layer
    inputs = [np.zeros((0, len(QUESTIONS), layer.in_features), np.float32)]
    overlaps = [np.zeros((0, len(QUESTIONS), layer.out_features - 1), np.float32)]
    for first in range(0, len(jobs), settings.image_batch):
        group = jobs[first : first + settings.image_batch]
        for job, embedding in zip(group, backend.embed([job.pixels for job in group]), strict=True):
            for start in range(0, len(job.parts), settings.prompt_batch):
                rows = slice(start, start + settings.prompt_batch)
                coarse, prompts = job.coarse[rows], job.prompts.take(rows)
                if settings.prompts.box == "elastic":
                    similarity = embedding.similarity(coarse)
                    prompts = expand_boxes(prompts, coarse, similarity, settings=settings.prompts)
                asked = [backend.predict_tokens(embedding, question) for question in questions(prompts)]
                inputs.append(np.stack([answer.features.cpu().numpy() for answer in asked], axis=1))
                overlaps.append(np.stack([answer.tokens.overlap(coarse)[:, 1:] for answer in asked], axis=1))
    return Features(np.concatenate(inputs), np.concatenate(overlaps))


def questions(prompts: Prompts) -> tuple[Prompts, Prompts, Prompts]:
    """The prompts of N masks as three questions: points alone, box alone, everything.

    They are what `refine` asks with all other prompts switched off; the layout of the tokens is then the same.
    """
    absent = np.full_like(prompts.labels, ABSENT)
    return (
        Prompts(prompts.points, prompts.labels, None, None),
        Prompts(prompts.points, absent, prompts.boxes, None),
        prompts,
    )


def ahead(items: Iterable[T], work: Callable[[T], U], *, threads: int) -> Iterator[tuple[T, U]]:
    """Work on items in threads, a few ahead of what is asked for, and pass them on in order."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix="adapt")
    waiting: deque[tuple[T, Any]] = deque()
    try:
        for item in items:
            waiting.append((item, pool.submit(work, item)))
            if len(waiting) > threads:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


# --- the file


class FeatureFile:
    """The features of images, on disk; memory holds one offset per image. `append` is for one thread."""

    def __init__(self, path: Path, *, job: Mapping[str, object], fresh: bool) -> None:
        """Open or create the file.

        Args:
            job: All that decides features apart from the sample, as JSON can hold it.
            fresh: Whether to drop what the file holds.

        Raises:
            UsageError: something else lies there.
            StorageError: it can't be written.
        """
        self.path = path
        self._job = hashlib.blake2b(json.dumps(job, sort_keys=True).encode(), digest_size=16).hexdigest()
        self._lines: dict[str, tuple[int, int, str]] = {}
        try:
            self._file: BinaryIO = path.open("a+b", buffering=0)
        except OSError as error:
            raise StorageError(f"{path}: the features can't be kept here: {error.strerror}") from error
        try:
            if not _begins(path):
                raise _not_features(path)
            self._end, continued = (0, False) if fresh else self._index()
            self._file.truncate(self._end)
            if not continued:
                self._write({"refinetool_iou_features": 1, "job": self._job, "about": job})
        except BaseException:
            self._file.close()
            raise

    def find(self, key: str, *, digest: str) -> Features | None:
        """The features of a sample if the file holds them, made from masks and an image of this digest."""
        line = self._lines.get(key)
        return None if line is None or line[2] != digest else self.load(key)

    def append(self, key: str, features: Features, *, digest: str) -> None:
        """Add the features of a sample whose masks and image have this digest.

        Raises:
            StorageError: the disk is full, or the like; what was appended before is kept.
        """
        offset = self._end
        self._write(
            {
                "key": key,
                "input": digest,
                "shape": [*features.inputs.shape, features.overlaps.shape[2]],
                "inputs": base64.b64encode(features.inputs.astype("<f4").tobytes()).decode("ascii"),
                "overlaps": base64.b64encode(features.overlaps.astype("<f4").tobytes()).decode("ascii"),
            }
        )
        self._lines[key] = (offset, self._end - offset, digest)

    def load(self, key: str) -> Features:
        """The features of a sample that the file holds. Called from any thread."""
        offset, length, _ = self._lines[key]
        with self.path.open("rb") as file:
            file.seek(offset)
            record = json.loads(file.read(length))
        n, asked, width, alternatives = record["shape"]
        return Features(
            _floats(record["inputs"]).reshape(n, asked, width),
            _floats(record["overlaps"]).reshape(n, asked, alternatives),
        )

    def remove(self) -> None:
        """Delete the file."""
        self._file.close()
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def _index(self) -> tuple[int, bool]:
        """Find the complete lines of this job; returns where they end and whether the last header names the job."""
        offset, current = 0, False
        with self.path.open("rb") as lines:
            for line in lines:
                if not line.endswith(b"\n"):
                    break
                record = parse_line(line)
                if "job" in record:
                    current = record["job"] == self._job
                elif current and "key" in record and "overlaps" in record:
                    self._lines[record["key"]] = (offset, len(line), record["input"])
                offset += len(line)
        return offset, current

    def _write(self, record: Mapping[str, object]) -> None:
        line = json.dumps(record).encode("ascii") + b"\n"
        try:
            written = 0
            while written < len(line):
                written += self._file.write(line[written:])
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(self._end)
            raise StorageError(
                f"{self.path}: the features can't be written: {error.strerror}; make room and continue with --resume"
            ) from error
        self._end += len(line)


def features_path(output: Path) -> Path:
    """Where the features of an adapter lie: `OUT.features.jsonl`, beside the file OUT."""
    return output.with_name(output.name + ".features.jsonl")


def holds_features(path: Path) -> bool:
    """Whether features of at least one image lie there, of whatever job.

    Raises:
        UsageError: something else lies there.
    """
    if not path.exists():
        return False
    if not _begins(path):
        raise _not_features(path)
    with path.open("rb") as lines:
        return any(line.endswith(b"\n") and "key" in parse_line(line) for line in lines)


def _begins(path: Path) -> bool:
    """Whether a file, possibly cut off, is one of features."""
    try:
        with path.open("rb") as file:
            start = file.read(len(MAGIC))
    except OSError as error:
        raise StorageError(f"{path}: the features can't be read: {error.strerror}") from error
    return start.startswith(MAGIC) or MAGIC.startswith(start)


def _not_features(path: Path) -> UsageError:
    return UsageError(f"{path}: the features would be here, but this file is something else; move it away")


def _floats(text: str) -> FloatArray:
    return np.frombuffer(base64.b64decode(text), dtype="<f4").astype(np.float32)
