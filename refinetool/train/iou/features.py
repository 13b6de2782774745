"""The training data of IoU adaption: what the model is asked for them, and the file that stores them.

The frozen model is prompted three times for every coarse mask: with the points alone, the box alone, and all prompts.
The input of the last layer of the IoU head and the IoU of each alternative with the coarse mask are stored, a few
kilobytes per mask. Training then needs neither model nor images, and can be repeated with other settings in seconds.

The file is a `running.lines.JobLines`, like the journal of `refine`, with one line per image.
"""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from refinetool.backends.square import SquareBackend
from refinetool.candidates import Job
from refinetool.prompts import expand_boxes
from refinetool.records import FloatArray, Prompts
from refinetool.running.lines import JobLines, Kind, Place, holds_lines
from refinetool.settings import RefineSettings

POINT, BOX, ALL = QUESTIONS = ("point", "box", "all")
SINGLE = (0, 1)
"""Indices of the single prompts in QUESTIONS."""
FEATURES = Kind("refinetool_iou_features", "file of features")


@dataclass(frozen=True, slots=True, eq=False)
class Features:
    """The n masks of one image, each prompted in the Q = 3 ways of QUESTIONS.

    inputs: float32 (n, Q, H), the input of the last layer of the IoU head.
    overlaps: float32 (n, Q, C), IoU of the C alternatives (mask tokens 1 to C) with the coarse mask.
    """

    inputs: FloatArray
    overlaps: FloatArray

    def __len__(self) -> int:
        return len(self.inputs)


def answers(backend: SquareBackend, jobs: Sequence[Job], *, settings: RefineSettings) -> Features:
    """Prompt the model in the three ways of QUESTIONS for every mask of an image."""
    layer = backend.score_layer
    inputs = [np.zeros((0, len(QUESTIONS), layer.in_features), np.float32)]
    overlaps = [np.zeros((0, len(QUESTIONS), layer.out_features - 1), np.float32)]
    for job, embedding in zip(jobs, backend.embed([job.pixels for job in jobs]), strict=True):
        prompts = job.prompts
        if settings.prompts.box == "elastic":
            similarity = embedding.similarity(job.coarse)
            prompts = expand_boxes(prompts, job.coarse, similarity, settings=settings.prompts)
        found = [backend.predict_tokens(embedding, question) for question in questions(prompts)]
        inputs.append(np.stack([answer.features.cpu().numpy() for answer in found], axis=1))
        overlaps.append(np.stack([answer.tokens.overlap(job.coarse)[:, 1:] for answer in found], axis=1))
    return Features(np.concatenate(inputs), np.concatenate(overlaps))


def questions(prompts: Prompts) -> tuple[Prompts, Prompts, Prompts]:
    """Split the prompts of N masks into the three kinds: points alone, box alone, all prompts.

    They equal the prompts of `refine` with all other prompts switched off, so the layout of the tokens is the same.
    """
    return (
        Prompts(prompts.points, prompts.labels, None, None),
        Prompts(prompts.points[:, :0], prompts.labels[:, :0], prompts.boxes, None),
        prompts,
    )


# --- the file


class FeatureFile:
    """The features of images on disk; memory holds one position per image. Only one thread may `append`."""

    def __init__(self, path: Path, *, job: Mapping[str, object], fresh: bool) -> None:
        """Open or create the file.

        Args:
            job: Everything that affects features, apart from the sample, in JSON types.
            fresh: Whether to discard the content of the file.

        Raises:
            UsageError: The file is something else, or another run is writing it.
            StorageError: The file can't be written.
        """
        self.path = path
        self._places: dict[str, tuple[Place, str]] = {}  # with the digest of the sample
        self._lines = JobLines(path, FEATURES, job=job, fresh=fresh, on_line=self._index)

    def find(self, key: str, *, digest: str) -> Features | None:
        """Return the features of a sample if the file holds them for masks and an image with this digest."""
        held = self._places.get(key)
        return None if held is None or held[1] != digest else self.load(key)

    def append(self, key: str, features: Features, *, digest: str) -> None:
        """Add the features of a sample whose masks and image have this digest.

        Raises:
            StorageError: The file can't be written, for example because the disk is full; earlier lines are kept.
        """
        record = {
            "key": key,
            "input": digest,
            "shape": [*features.inputs.shape, features.overlaps.shape[2]],
            "inputs": base64.b64encode(features.inputs.astype("<f4").tobytes()).decode("ascii"),
            "overlaps": base64.b64encode(features.overlaps.astype("<f4").tobytes()).decode("ascii"),
        }
        saved = f"the {len(self._places)} images finished so far are kept"
        self._places[key] = (self._lines.append(record, saved=saved), digest)

    def load(self, key: str) -> Features:
        """Return the features of a sample that the file holds. May be called from any thread."""
        record = self._lines.load(self._places[key][0])
        n, kinds, width, alternatives = record["shape"]
        return Features(
            _floats(record["inputs"]).reshape(n, kinds, width),
            _floats(record["overlaps"]).reshape(n, kinds, alternatives),
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
    """Return the path of the features of an adapter: `OUT.features.jsonl`, beside the file OUT."""
    return output.parent / f"{output.name}.features.jsonl"


def holds_features(path: Path) -> bool:
    """Whether the file has features of at least one image, of any job.

    Raises:
        UsageError: The file is something else.
        StorageError: The file can't be read.
    """
    return holds_lines(path, FEATURES)


def _floats(text: str) -> FloatArray:
    return np.frombuffer(base64.b64decode(text), dtype="<f4").astype(np.float32)
