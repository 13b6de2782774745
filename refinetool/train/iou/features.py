"""What IoU adaption learns from, gathered once and kept in a file.

For every coarse mask the frozen model is asked three questions: the points alone, the box alone, and everything. Kept
are the input of the last layer of the IoU head and the IoU of each alternative with the coarse mask, a few kilobytes
a mask, so training needs neither model nor images, and can be repeated with other settings in seconds.

The file is one of `job_lines`, like the journal of `refine`, with a line per image.
"""

import base64
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from refinetool.backends.square import SquareBackend
from refinetool.candidates import Job
from refinetool.errors import DataError
from refinetool.prompts import expand_boxes
from refinetool.records import FloatArray, Prompts, Sample
from refinetool.refine import Prepared, Refiner
from refinetool.running.ahead import map_ahead
from refinetool.running.journal import digest_of
from refinetool.running.lines import JobLines, Kind, Place, holds_lines
from refinetool.running.summary import ERRORS_TOLD
from refinetool.settings import RefineSettings

POINT, BOX, ALL = QUESTIONS = ("point", "box", "all")
SINGLE = (0, 1)
"""Rows of QUESTIONS that are single prompts."""
FEATURES = Kind("refinetool_iou_features", "file of features")


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

    def prepare(sample: Sample) -> tuple[Sample, str, Prepared | DataError | Features | None]:
        if all(region.keep is not None for region in sample.regions):
            return sample, "", None
        digest = digest_of(sample)  # before the image is read: what is kept was made from this, or from something newer
        try:
            held = cache.find(sample.key, digest=digest)
            return sample, digest, refiner.prepare(sample) if held is None else held
        except DataError as error:
            return sample, digest, error

    prepared = map_ahead(prepare, samples, threads=threads, name="adapt")
    for done, (sample, digest, found) in enumerate(prepared, 1):
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
    for job, embedding in zip(jobs, backend.embed([job.pixels for job in jobs]), strict=True):
        prompts = job.prompts
        if settings.prompts.box == "elastic":
            similarity = embedding.similarity(job.coarse)
            prompts = expand_boxes(prompts, job.coarse, similarity, settings=settings.prompts)
        asked = [backend.predict_tokens(embedding, question) for question in questions(prompts)]
        inputs.append(np.stack([answer.features.cpu().numpy() for answer in asked], axis=1))
        overlaps.append(np.stack([answer.tokens.overlap(job.coarse)[:, 1:] for answer in asked], axis=1))
    return Features(np.concatenate(inputs), np.concatenate(overlaps))


def questions(prompts: Prompts) -> tuple[Prompts, Prompts, Prompts]:
    """The prompts of N masks as three questions: points alone, box alone, everything.

    They are what `refine` asks with all other prompts switched off; the layout of the tokens is then the same.
    """
    return (
        Prompts(prompts.points, prompts.labels, None, None),
        Prompts(prompts.points[:, :0], prompts.labels[:, :0], prompts.boxes, None),
        prompts,
    )


# --- the file


class FeatureFile:
    """The features of images, on disk; memory holds one place per image. `append` is for one thread."""

    def __init__(self, path: Path, *, job: Mapping[str, object], fresh: bool) -> None:
        """Open or create the file.

        Args:
            job: All that decides features apart from the sample, as JSON can hold it.
            fresh: Whether to drop what the file holds.

        Raises:
            UsageError: something else lies there, or another run is writing it.
            StorageError: it can't be written.
        """
        self._places: dict[str, tuple[Place, str]] = {}  # with the digest of the sample
        self._lines = JobLines(path, FEATURES, job=job, fresh=fresh, on_line=self._index)

    def find(self, key: str, *, digest: str) -> Features | None:
        """The features of a sample if the file holds them, made from masks and an image of this digest."""
        held = self._places.get(key)
        return None if held is None or held[1] != digest else self.load(key)

    def append(self, key: str, features: Features, *, digest: str) -> None:
        """Add the features of a sample whose masks and image have this digest.

        Raises:
            StorageError: the disk is full, or the like; what was appended before is kept.
        """
        record = {
            "key": key,
            "input": digest,
            "shape": [*features.inputs.shape, features.overlaps.shape[2]],
            "inputs": base64.b64encode(features.inputs.astype("<f4").tobytes()).decode("ascii"),
            "overlaps": base64.b64encode(features.overlaps.astype("<f4").tobytes()).decode("ascii"),
        }
        saved = f"the {len(self._places)} images seen so far are kept"
        self._places[key] = (self._lines.append(record, saved=saved), digest)

    def load(self, key: str) -> Features:
        """The features of a sample that the file holds. Called from any thread."""
        record = self._lines.load(self._places[key][0])
        n, asked, width, alternatives = record["shape"]
        return Features(
            _floats(record["inputs"]).reshape(n, asked, width),
            _floats(record["overlaps"]).reshape(n, asked, alternatives),
        )

    def remove(self) -> None:
        """Delete the file."""
        self._lines.remove()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lines.close()

    def _index(self, record: Mapping[str, Any], place: Place, current: bool) -> None:
        if current and "overlaps" in record:
            self._places[record["key"]] = (place, record["input"])


def features_path(output: Path) -> Path:
    """Where the features of an adapter lie: `OUT.features.jsonl`, beside the file OUT."""
    return output.with_name(output.name + ".features.jsonl")


def holds_features(path: Path) -> bool:
    """Whether features of at least one image lie there, of whatever job.

    Raises:
        UsageError: something else lies there.
        StorageError: it can't be read.
    """
    return holds_lines(path, FEATURES)


def _floats(text: str) -> FloatArray:
    return np.frombuffer(base64.b64decode(text), dtype="<f4").astype(np.float32)
