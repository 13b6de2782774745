"""How often the best of several candidate masks was selected."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from refinetool import masks
from refinetool.errors import DataError, MaskError
from refinetool.evaluate.pairing import Match
from refinetool.evaluate.report import SELECTION, Measure, Report, divide
from refinetool.records import Region, Rle, Sample
from refinetool.statuses import Reason

TIE = 1e-6
"""Candidates whose IoU is this close to that of the best one are as good."""


@dataclass(frozen=True, slots=True)
class CandidateSet:
    """The K candidates of one object, the IoU that the model predicts for each, and which one was selected.

    Candidate `single` is the single-mask output, which does not compete with the others. It is the first one unless the
    file says otherwise.
    """

    id: int
    candidates: tuple[Rle, ...]
    scores: tuple[float, ...]
    selected: int
    single: int


class CandidateLines:
    """The lines of a file of candidates, looked up by the key of their image."""

    def __init__(self, file: BinaryIO, starts: Mapping[str, int]) -> None:
        self._file, self._starts = file, starts
        self._found: set[str] = set()

    def find(self, key: str) -> str | None:
        """The line of an image, None if there is none."""
        start = self._starts.get(key)
        if start is None:
            return None
        self._found.add(key)
        self._file.seek(start)
        return _text(self._file.readline())

    @property
    def never_found(self) -> int:
        """The number of images that were never looked up."""
        return len(self._starts) - len(self._found)


@contextmanager
def open_candidates(path: Path) -> Iterator[CandidateLines]:
    """Open a file of candidates.

    Raises:
        DataError: The file can't be read, a line is no record of candidates, or an image has two lines.
    """
    try:
        with path.open("rb") as file:
            starts: dict[str, int] = {}
            at = 0
            for number, line in enumerate(file, start=1):
                key = _record(_text(line), f"{path}, line {number}")["image"]
                if key in starts:
                    raise DataError(f"{path}, line {number}: a second record of image {key!r}; expected one.")
                starts[key] = at
                at += len(line)
            yield CandidateLines(file, starts)
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror}).") from error


def _text(line: bytes) -> str:
    return line.decode("utf-8", errors="replace")


def _record(line: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: is no JSON ({error}); expected what refine --candidates writes.") from error
    match record:
        case {"image": str(), "annotations": list()}:
            return dict(record)
    raise DataError(f"{where}: expected an object with image and annotations, as refine --candidates writes it.")


def read_candidates(line: str) -> list[CandidateSet]:
    """Read a line of a file of candidates. Raises DataError for a record that holds no candidates."""
    record = _record(line, "Candidates")
    return [
        _parse_candidates(annotation, f"Candidates of image {record['image']}") for annotation in record["annotations"]
    ]


def _parse_candidates(annotation: object, where: str) -> CandidateSet:
    match annotation:
        case {"id": int(id), "selected": int(selected), "scores": list(scores), "candidates": list(found), **more}:
            single = more.get("single", 0)
            places = [place for place in (selected, single) if isinstance(place, int) and 0 <= place < len(found)]
            if len(scores) != len(found) or len(places) < 2:
                raise DataError(
                    f"{where}: object {id} has {len(found)} candidates, {len(scores)} scores, and takes number "
                    f"{selected}; expected a score for each, and one of them taken."
                )
            try:
                runs = tuple(Rle((int(rle["size"][0]), int(rle["size"][1])), rle["counts"].encode()) for rle in found)
                for rle in runs:
                    masks.run_lengths(rle)
                return CandidateSet(id, runs, tuple(map(float, scores)), *places)
            except (TypeError, KeyError, IndexError, AttributeError, ValueError, ArithmeticError, MaskError) as error:
                raise DataError(f"{where}: object {id} has candidates that can't be read ({error}).") from error
    raise DataError(f"{where}: found {json.dumps(annotation)[:60]}; expected id, selected, scores and candidates.")


@dataclass(slots=True)
class SelectionEvaluator:
    """Top-1 accuracy of selection criteria, and the IoU of the candidates they select.

    If the competing candidates of an object have the IoUs g_k with the ground truth, a criterion that selects number s
    is right if g_s >= max g - 1e-6. Objects whose candidates all miss the ground truth are left out and counted.

    right: The number of right selections by criterion.
    iou: The sum of the IoUs of the selected candidates by criterion.
    chance: The sum of the probabilities that a random selection is right.
    """

    with_coarse: bool
    right: Counter[str] = field(default_factory=Counter)
    iou: dict[str, float] = field(default_factory=dict)
    chance: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, match: Match) -> None:
        if match.candidates is None:
            return
        truth, coarse = _index_masks(match.truth), _index_masks(match.coarse)
        void = None if match.truth is None else match.truth.void
        valid = None if void is None else masks.encode(~masks.decode(void))
        for found in read_candidates(match.candidates):
            reference = truth.get(found.id)
            if reference is None:
                self.counts["selections_unknown"] += 1
                continue
            other = next((rle.size for rle in found.candidates if rle.size != reference.size), None)
            if other is not None:
                raise DataError(
                    f"Image {match.key}: a candidate of object {found.id} is {other[1]} x {other[0]}, its ground truth "
                    f"{reference.size[1]} x {reference.size[0]}; name the candidates written with these masks."
                )
            given = coarse.get(found.id)
            likeness = None if given is None else _compute_ious(found.candidates, given, valid)
            self._add(found, _compute_ious(found.candidates, reference, valid), likeness)

    def _add(self, found: CandidateSet, ious: NDArray[np.float64], likeness: NDArray[np.float64] | None) -> None:
        """Add an object, given the IoUs of its candidates with ground truth and coarse mask, float64 (K,)."""
        rivals = np.array([number for number in range(len(ious)) if number != found.single], dtype=np.intp)
        if not rivals.size or not ious[rivals].any():
            self.counts["selections_hopeless"] += 1
            return
        best = float(ious[rivals].max())
        chosen = {PREDICTED: int(rivals[np.argmax(np.array(found.scores)[rivals])])}
        if likeness is not None:
            chosen[COARSE] = int(rivals[np.argmax(likeness[rivals])])
        self.counts["selections"] += 1
        self.chance += float(np.mean(ious[rivals] >= best - TIE))
        for criterion, number in chosen.items():
            self.right[criterion] += bool(ious[number] >= best - TIE)
        values = {criterion: float(ious[number]) for criterion, number in chosen.items()}
        values |= {TAKEN: float(ious[found.selected]), SINGLE: float(ious[found.single]), BEST: best}
        for name, iou in values.items():
            self.iou[name] = self.iou.get(name, 0.0) + iou
            self.counts[f"of {name}"] += 1

    def merge(self, other: Self) -> None:
        self.right.update(other.right)
        for name, iou in other.iou.items():
            self.iou[name] = self.iou.get(name, 0.0) + iou
        self.chance += other.chance
        self.counts.update(other.counts)

    def result(self) -> Report:
        accuracies = [
            (f"top-1 accuracy, {criterion}", divide(self.right[criterion], self.counts[f"of {criterion}"]))
            for criterion in ((PREDICTED, COARSE) if self.with_coarse else (PREDICTED,))
        ]
        accuracies.append(("top-1 accuracy, by chance", divide(self.chance, self.counts["selections"])))
        ious = [
            (f"IoU of the candidate, {name}", divide(self.iou[name], self.counts[f"of {name}"]))
            for name in (PREDICTED, COARSE, TAKEN, SINGLE, BEST)
            if name in self.iou
        ]
        return Report(
            measures=tuple(Measure(name, "mean over objects", value, None) for name, value in (*accuracies, *ious)),
            counts={name: self.counts[name] for name in SELECTION},
        )


PREDICTED = "highest predicted IoU"
COARSE = "most like the coarse mask"
TAKEN = "taken by refine"
SINGLE = "single-mask output"
BEST = "best there is"


def _index_masks(sample: Sample | None) -> Mapping[int, Rle]:
    regions: tuple[Region, ...] = () if sample is None else sample.regions
    return {region.id: region.mask for region in regions if region.mask is not None and region.keep is not Reason.CROWD}


def _compute_ious(candidates: tuple[Rle, ...], reference: Rle, valid: Rle | None) -> NDArray[np.float64]:
    """The IoU of each candidate with the reference within the valid pixels, float64 (K,)."""
    runs = [{"size": list(rle.size), "counts": rle.counts} for rle in (*candidates, reference)]
    if valid is not None:
        within = {"size": list(valid.size), "counts": valid.counts}
        runs = [coco_mask.merge([run, within], intersect=True) for run in runs]
    return np.asarray(coco_mask.iou(runs[:-1], runs[-1:], [0]), dtype=np.float64)[:, 0]
