"""What the model offered for every mask: all candidates with their scores, for measuring how well one is chosen."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path

from refinetool.formats.storage import new_file
from refinetool.records import Outcome, Sample
from refinetool.running.journal import packed_candidates

SINGLE = 0
"""Which candidate is the single-mask output."""


def write_candidates(samples: Iterable[Sample], find: Callable[[str], Outcome | None], path: Path) -> None:
    """Write one line of JSON per image: `{"image": key, "annotations": [...]}`.

    Each annotation has its `id`, the `candidates` as COCO's run lengths of the whole image, their `scores` as the model
    predicted them, `selected`, the index of the one that was taken, and `single`, that of the single-mask output; the
    others are the alternatives of the multimask output. Masks the model was not asked about are left out.

    Raises:
        StorageError: the file can't be written.
    """
    with new_file(path) as lines:
        for sample in samples:
            outcome = find(sample.key)
            if outcome is None:
                continue
            pairs = zip(sample.regions, outcome.annotations, strict=True)
            offered = [
                {"id": region.id, "single": SINGLE, **packed_candidates(annotation.candidates)}
                for region, annotation in pairs
                if annotation.candidates is not None
            ]
            lines.write(json.dumps({"image": sample.key, "annotations": offered}).encode("ascii") + b"\n")
