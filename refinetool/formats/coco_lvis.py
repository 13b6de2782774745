"""Reads LVIS's metadata: how frequent its categories are, and which are known to be absent from an image."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from refinetool.errors import DataError, UsageError
from refinetool.formats.json_spans import WINDOW_BYTES, Cursor, Json


@dataclass(frozen=True, slots=True)
class Federation:
    """The rules of a federated data set, where each image is annotated for some of the categories.

    frequencies: `r`, `c` or `f` by category: rare, common, frequent in training.
    negative: By image, the categories that were searched for and are absent; categories with annotations were searched
        for, too.
    not_exhaustive: By image, the categories of which not every object is annotated.
    """

    frequencies: Mapping[int, str]
    negative: Mapping[str, tuple[int, ...]]
    not_exhaustive: Mapping[str, tuple[int, ...]]


def read_federation(path: Path) -> Federation:
    """Read the rules from LVIS annotations.

    Raises:
        DataError: The file can't be read.
        UsageError: The file does not say which categories were searched for in its images.
    """
    frequencies: dict[int, str] = {}
    images: list[Mapping[str, Json]] = []
    try:
        with path.open("rb") as file:
            cursor = Cursor(file, path, WINDOW_BYTES)
            cursor.expect("{", "an object with images and categories")
            for name in cursor.members():
                if name == "images":
                    cursor.expect("[", "the list of images")
                    images += [_federated(record) for record, _, _ in cursor.items() if isinstance(record, dict)]
                elif name == "categories":
                    cursor.expect("[", "the list of categories")
                    for record, _, _ in cursor.items():
                        match record:
                            case {"id": int(number), "frequency": ("r" | "c" | "f") as frequency}:
                                frequencies[number] = frequency
                else:
                    cursor.skip()
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror}).") from error
    if not any("neg_category_ids" in image for image in images):
        raise UsageError(
            f"{path}: its images have no 'neg_category_ids', so it is not LVIS; leave --protocol lvis out, or name "
            "LVIS annotations."
        )
    return Federation(frequencies, _lists(images, "neg_category_ids"), _lists(images, "not_exhaustive_category_ids"))


def _federated(record: Mapping[str, Json]) -> Mapping[str, Json]:
    """Keep only the needed fields of an image record; the others are long."""
    wanted = ("id", "neg_category_ids", "not_exhaustive_category_ids")
    return {name: record[name] for name in wanted if name in record}


def _lists(images: list[Mapping[str, Json]], name: str) -> dict[str, tuple[int, ...]]:
    lists = {}
    for image in images:
        given = image.get(name, [])
        numbers = [number for number in given if isinstance(number, int)] if isinstance(given, list) else []
        if numbers != given:
            raise DataError(f"Image {image.get('id')} has {name} {given!r:.40}; expected a list of numbers.")
        lists[str(image.get("id"))] = tuple(numbers)
    return lists
