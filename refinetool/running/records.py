"""Writes the records of a run: the status of every mask, and all candidates with their scores."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from refinetool.formats.csv_table import write_table
from refinetool.formats.storage import new_file
from refinetool.records import Outcome, Sample
from refinetool.running.journal import packed_candidates

COLUMNS = ("image", "id", "category", "status", "predicted_iou", "coarse_iou")
SINGLE = 0
"""Index of the single-mask output among the candidates."""


def write_mask_record(samples: Iterable[Sample], find: Callable[[str], Outcome | None], path: Path) -> None:
    """Write one CSV line per mask, in the order of the samples.

    `image` is the path of the image, `id` the annotation's id or the pixel value; `status`, `predicted_iou` and
    `coarse_iou` are those of `records.Annotation`, empty where they are None.

    Raises:
        StorageError: The file can't be written.
    """
    with new_file(path) as raw:
        write_table(raw, COLUMNS, _rows(samples, find))


def _rows(samples: Iterable[Sample], find: Callable[[str], Outcome | None]) -> Iterator[Sequence[object]]:
    for sample in samples:
        outcome = find(sample.key)
        if outcome is None:
            continue
        for region, annotation in zip(sample.regions, outcome.annotations, strict=True):
            scores = (annotation.predicted_iou, annotation.coarse_iou)
            yield sample.image, region.id, region.category, annotation.status, *scores


def write_candidates(samples: Iterable[Sample], find: Callable[[str], Outcome | None], path: Path) -> None:
    """Write one line of JSON per image: `{"image": key, "annotations": [...]}`.

    Each annotation has its `id`, the `candidates` as COCO RLE of the whole image, their `scores` as predicted by the
    model, `selected`, the index of the chosen one, and `single`, the index of the single-mask output; the others are
    the alternatives of the multimask output. Masks on which the model was not run are left out.

    Raises:
        StorageError: The file can't be written.
    """
    with new_file(path) as lines:
        for sample in samples:
            outcome = find(sample.key)
            if outcome is None:
                continue
            pairs = zip(sample.regions, outcome.annotations, strict=True)
            written = [
                {"id": region.id, "single": SINGLE, **packed_candidates(annotation.candidates)}
                for region, annotation in pairs
                if annotation.candidates is not None
            ]
            lines.write(json.dumps({"image": sample.key, "annotations": written}).encode("ascii") + b"\n")
