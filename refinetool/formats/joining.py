"""Which image of one file is which of another: samples of several files, joined by key."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import zip_longest

from refinetool.errors import DataError
from refinetool.records import Sample


def joined(*files: Iterable[Sample]) -> Iterator[tuple[str, Mapping[int, Sample]]]:
    """Each key with the samples that the files have for it, by the number of the file.

    The files are read at one pace, and an image is handed out as soon as each of them has delivered it: where they hold
    the same images in the same order, one image is in memory at a time. Those that some file lacks come last.

    Raises:
        DataError: an image occurs twice in a file.
    """
    waiting: dict[str, dict[int, Sample]] = {}
    for row in zip_longest(*files):
        for number, sample in enumerate(row):
            if sample is None:
                continue
            found = waiting.setdefault(sample.key, {})
            if number in found:
                raise DataError(f"Image {sample.key} occurs twice in one file; keep one of its entries.")
            found[number] = sample
            if len(found) == len(files):
                yield sample.key, waiting.pop(sample.key)
    yield from waiting.items()
