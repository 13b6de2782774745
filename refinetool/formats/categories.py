"""Chooses categories of a data set by name or number."""

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from itertools import chain
from pathlib import Path
from typing import Protocol, runtime_checkable

from refinetool.errors import UsageError
from refinetool.formats import Dataset
from refinetool.formats.json_spans import WINDOW_BYTES, Cursor
from refinetool.records import Sample
from refinetool.statuses import Reason


@runtime_checkable
class Named(Protocol):
    """A data set that knows the names of its categories."""

    def category_names(self) -> Mapping[str, int]:
        """Return the number of each name."""


def read_names(path: Path) -> dict[str, int]:
    """Return the numbers of the categories in a COCO file by name; empty if it has none."""
    names: dict[str, int] = {}
    with path.open("rb") as file:
        cursor = Cursor(file, path, WINDOW_BYTES)
        if cursor.peek() != "{":
            return {}
        for section in cursor.members():
            if section != "categories":
                cursor.skip()
                continue
            for record, _, _ in cursor.items():
                match record:
                    case {"id": int(number), "name": str(name)}:
                        names.setdefault(name, number)
    return names


def chosen_categories(dataset: Dataset, wanted: Sequence[str]) -> frozenset[int]:
    """Return the numbers of categories that are given as names or numbers, several of them separated by commas.

    Raises:
        UsageError: A name does not exist, or the format has no names.
    """
    names = dataset.category_names() if isinstance(dataset, Named) else {}
    found = set()
    for text in chain.from_iterable(_separated(part, names) for part in wanted):
        if text in names:
            found.add(names[text])
        elif text.isdecimal():
            found.add(int(text))
        elif names:
            close = get_close_matches(text, names, n=1)
            meant = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(map(repr, sorted(names)[:20]))}."
            raise UsageError(f"there is no category {text!r}; {meant}")
        else:
            raise UsageError(
                f"categories of the format {dataset.format} have no names here, such as {text!r}; use numbers"
            )
    return frozenset(found)


def _separated(text: str, names: Container[str]) -> list[str]:
    """Split a list at its commas, unless it is a single name that has some."""
    return [text] if text in names else [part.strip() for part in text.split(",") if part.strip()]


def only(samples: Iterable[Sample], categories: frozenset[int]) -> Iterator[Sample]:
    """Yield samples in which the regions of other categories are kept as they are."""
    for sample in samples:
        regions = (
            region if region.keep or region.category in categories else replace(region, keep=Reason.CATEGORY)
            for region in sample.regions
        )
        yield replace(sample, regions=tuple(regions))
