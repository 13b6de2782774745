"""What became of every mask, as a table to sort and filter: which were refined, which kept and why."""

import csv
import io
from collections.abc import Callable, Iterable
from pathlib import Path

from refinetool.formats.storage import new_file
from refinetool.records import Outcome, Sample

COLUMNS = ("image", "id", "category", "status", "predicted_iou", "coarse_iou")


def write_mask_record(samples: Iterable[Sample], find: Callable[[str], Outcome | None], path: Path) -> None:
    """Write one CSV line per mask, in the order of the samples.

    `image` is the path of the image, `id` the annotation's id or the pixel's value; `status`, `predicted_iou` and
    `coarse_iou` are those of `records.Annotation`, empty where there are none.

    Raises:
        StorageError: the file can't be written.
    """
    with new_file(path) as raw:
        text = io.TextIOWrapper(raw, encoding="utf-8", newline="", write_through=True)
        table = csv.writer(text)
        table.writerow(COLUMNS)
        for sample in samples:
            outcome = find(sample.key)
            if outcome is None:
                continue
            for region, annotation in zip(sample.regions, outcome.annotations, strict=True):
                scores = (annotation.predicted_iou, annotation.coarse_iou)
                shown = ["" if score is None else f"{score:.4f}" for score in scores]
                table.writerow([sample.image, region.id, region.category, annotation.status, *shown])
        text.detach()  # the file closes itself, after it has been flushed to disk
