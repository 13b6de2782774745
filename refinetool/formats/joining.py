"""Joins the samples of several files by key."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import zip_longest

from refinetool.errors import DataError
from refinetool.records import Sample


def joined(*files: Iterable[Sample]) -> Iterator[tuple[str, Mapping[int, Sample]]]:
    """Yield each key with the samples that the files have for it, by the number of the file.

    The files are read in step, and an image is yielded as soon as it was read from all of them. If they hold the same
    images in the same order, only one image is in memory at a time. Images that are missing in a file come last.

    Raises:
        DataError: An image occurs twice in a file.
    """
    waiting: dict[str, dict[int, Sample]] = {}
    complete: set[str] = set()
    for row in zip_longest(*files):
        for number, sample in enumerate(row):
            if sample is None:
                continue
            found = waiting.setdefault(sample.key, {})
            if number in found or sample.key in complete:
                raise DataError(f"Image {sample.key} occurs twice in one file; keep one of its entries.")
            found[number] = sample
            if len(found) == len(files):
                complete.add(sample.key)
                yield sample.key, waiting.pop(sample.key)
    yield from waiting.items()
