"""Indexes a COCO file in one pass: finds the position of every record, and checks that the records are consistent.

Only two offsets and two numbers are kept per record, so 600,000 annotations take 20 MB.
"""

from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, TypeGuard

import numpy as np

from refinetool.errors import DataError
from refinetool.formats.image_search import fault_of_record
from refinetool.formats.json_spans import WINDOW_BYTES, Cursor, Json, Span, place
from refinetool.records import IntArray

ImageId: TypeAlias = int | str

LONGEST_SIDE = (1 << 31) - 1
"""Pixels of an image's side; the mask libraries count in 32 bits."""

LARGEST_ID = (1 << 63) - 1
"""Largest number of an annotation or category; they are kept in 64 bits."""

_SMALLER = "a whole number below 2**63"


@dataclass(frozen=True, slots=True)
class ImageRecords:
    """The I image records of a file: int64 (I, 2) byte offsets in the order of the file, and the row of each id."""

    path: Path
    spans: IntArray
    rows: Mapping[ImageId, int]


@dataclass(frozen=True, slots=True)
class AnnotationRecords:
    """The A annotation records of a file, in the order of the file.

    spans: int64 (A, 2), byte offsets.
    ids: int64 (A,); results have no ids, so their position in the list is used.
    named: The distinct image ids, in the order in which the records refer to them.
    images: int64 (A,), index in `named` of each record's image.
    root: Offset of the bracket that opens the file.
    info: Position of the value of `info`, None if there is none.
    """

    path: Path
    spans: IntArray
    ids: IntArray
    named: list[ImageId]
    images: IntArray
    root: int
    info: Span | None

    def __len__(self) -> int:
        return len(self.ids)


def read_instances(path: Path) -> tuple[ImageRecords, AnnotationRecords]:
    """Index COCO instances.

    Raises:
        DataError: The file is not JSON (with line and column), is not COCO, or its records contradict each other.
    """
    found = _Records(path)
    with _opened(path) as cursor:
        cursor.expect("{", "an object with images and annotations")
        found.root = cursor.offset
        sections: set[str] = set()
        for name in cursor.members():
            if name in sections:
                raise DataError(f"{path}, {place(path, cursor.offset)}: a second {name!r}; expected one.")
            if name == "images":
                found.read_images(cursor)
            elif name == "annotations":
                found.read_annotations(cursor, numbered=True)
            elif name == "categories":
                found.read_categories(cursor)
            elif name == "info":
                found.info = cursor.skip()
            else:
                cursor.skip()
                continue
            sections.add(name)
    _require(path, {"images", "annotations"} - sections)
    images, annotations = found.images(), found.annotations()
    _refuse_duplicates(annotations)
    return images, annotations


def read_results(path: Path) -> AnnotationRecords:
    """Index a list of COCO results. Raises the errors of `read_instances`."""
    found = _Records(path)
    with _opened(path) as cursor:
        cursor.expect("[", "a list of results")
        found.root = cursor.offset
        found.read_annotations(cursor, numbered=False)
    return found.annotations()


def read_images(path: Path) -> ImageRecords:
    """Index the `images` of any COCO file. Raises the errors of `read_instances`."""
    found = _Records(path)
    missing = {"images"}
    with _opened(path) as cursor:
        cursor.expect("{", "an object with images")
        for name in cursor.members():
            if name in missing:
                found.read_images(cursor)
                missing.clear()
            else:
                cursor.skip()
    _require(path, missing)
    return found.images()


def rows_of(annotations: AnnotationRecords, rows: Mapping[ImageId, int]) -> IntArray:
    """Return the row of each annotation's image, int64 (A,). Raises DataError if an image is not listed."""
    of_named = np.array([rows.get(image, -1) for image in annotations.named], dtype=np.int64)
    row = of_named[annotations.images]
    orphans = np.flatnonzero(row < 0)
    if orphans.size:
        first = int(orphans[0])
        where = place(annotations.path, int(annotations.spans[first, 0]))
        others = f" (so do {orphans.size - 1} others)" if orphans.size > 1 else ""
        named = annotations.named[annotations.images[first]]
        fault = f"which is not listed{others}; add the image or remove the annotation"
        if (kinds := _other_kind(named, rows)) is not None:
            fault = f"{kinds}; write both as numbers or both as texts"
        raise DataError(
            f"{annotations.path}, {where}: annotation {annotations.ids[first]} names image {named!r}, {fault}."
        )
    return row


def _other_kind(named: ImageId, rows: Mapping[ImageId, int]) -> str | None:
    """Say that an image id is listed as a number where it is named by a text, or the reverse; None if it is not."""
    if isinstance(named, int):
        return "a number, but the image is listed with a text as its id" if str(named) in rows else None
    listed = any(isinstance(image_id, int) and str(image_id) == named for image_id in rows)
    return "a text, but the image is listed with a number as its id" if listed else None


def image_name(record: Mapping[str, Json]) -> str | None:
    """Return the image file name of a record; for LVIS, which has only a URL, its last two parts."""
    name, address = record.get("file_name"), record.get("coco_url")
    if isinstance(name, str) and name:
        return name
    return "/".join(address.split("/")[-2:]) if isinstance(address, str) and address else None


@contextmanager
def _opened(path: Path) -> Iterator[Cursor]:
    """Yield a cursor at the start of a JSON file; at the end of the block it must have reached the end of the file."""
    try:
        with path.open("rb") as file:
            cursor = Cursor(file, path, WINDOW_BYTES)
            if not cursor.peek():
                raise DataError(f"{path}: the file is empty.")
            yield cursor
            cursor.finish()
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror}).") from error


def _require(path: Path, missing: set[str]) -> None:
    if missing:
        names = " and no ".join(repr(name) for name in sorted(missing))
        raise DataError(f"{path}: has no {names}, so it is not a COCO file; expected 'images' and 'annotations'.")


def _refuse_duplicates(annotations: AnnotationRecords) -> None:
    order = np.argsort(annotations.ids, kind="stable")
    again = np.flatnonzero(np.diff(annotations.ids[order]) == 0)
    if again.size:
        first, second = order[again[0]], order[again[0] + 1]
        path, starts = annotations.path, annotations.spans[:, 0]
        raise DataError(
            f"{path}, {place(path, int(starts[second]))}: annotation id {annotations.ids[second]} was already used at "
            f"{place(path, int(starts[first]))}; ids have to be unique."
        )


class _Records:
    """The records found so far. Annotations may come before the images they refer to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.root = 0
        self.info: Span | None = None
        self._rows: dict[ImageId, int] = {}
        self._image_spans = array("q")
        self._named: dict[ImageId, int] = {}
        self._annotation_images = array("q")
        self._annotation_spans = array("q")
        self._annotation_ids = array("q")

    def read_images(self, cursor: Cursor) -> None:
        for start, end, record in self._objects(cursor, "images"):
            image_id = _as_id(record.get("id"))
            if image_id is None:
                raise self._error(start, f"an image {_has('id', record, 'a number or a text')}")
            if image_id in self._rows:
                raise self._error(start, f"image id {image_id!r} occurs twice; ids have to be unique")
            name = image_name(record)
            if name is None:
                raise self._error(start, f"image {image_id!r} {_has('file_name', record, 'a text')}")
            if fault := fault_of_record(name):
                raise self._error(start, f"image {image_id!r} is called {name!r}, which {fault}")
            for side in ("width", "height"):
                length = record.get(side)
                if length is not None and not (_is_whole(length) and 0 < length <= LONGEST_SIDE):
                    raise self._error(start, f"image {image_id!r} has the {side} {length!r}; expected pixels")
            self._rows[image_id] = len(self._rows)
            self._image_spans.extend((start, end))

    def read_annotations(self, cursor: Cursor, *, numbered: bool) -> None:
        """Read annotations; `numbered` records have an id of their own."""
        named, images = self._named, self._annotation_images
        spans, ids = self._annotation_spans, self._annotation_ids
        for start, end, record in self._objects(cursor, "annotations"):
            if "segments_info" in record:
                problem = "this is a COCO panoptic file; its PNGs belong in a folder of the same name beside it"
                raise self._error(start, f"{problem} (--format coco-panoptic)")
            number = record.get("id") if numbered else len(ids)
            if not _is_whole(number) or abs(number) > LARGEST_ID:
                expected = _SMALLER if _is_whole(number) else "a unique whole number"
                raise self._error(start, f"an annotation {_has('id', record, expected)}")
            image_id = _as_id(record.get("image_id"))
            if image_id is None:
                raise self._error(start, f"annotation {number} {_has('image_id', record, 'a number or a text')}")
            category = record.get("category_id")
            if category is not None and not (_is_whole(category) and abs(category) <= LARGEST_ID):
                expected = _SMALLER if _is_whole(category) else "a number"
                raise self._error(start, f"annotation {number} {_has('category_id', record, expected)}")
            images.append(named.setdefault(image_id, len(named)))
            spans.append(start)
            spans.append(end)
            ids.append(int(number))

    def read_categories(self, cursor: Cursor) -> None:
        for start, _, record in self._objects(cursor, "categories"):
            if not _is_whole(record.get("id")):
                raise self._error(start, f"a category {_has('id', record, 'a whole number')}")

    def images(self) -> ImageRecords:
        if len({str(image_id) for image_id in self._rows}) < len(self._rows):
            raise DataError(f"{self.path}: some image ids differ only in being number and text; expected one kind.")
        return ImageRecords(self.path, _spans(self._image_spans), self._rows)

    def annotations(self) -> AnnotationRecords:
        return AnnotationRecords(
            path=self.path,
            spans=_spans(self._annotation_spans),
            ids=np.array(self._annotation_ids, dtype=np.int64),
            named=list(self._named),
            images=np.array(self._annotation_images, dtype=np.int64),
            root=self.root,
            info=self.info,
        )

    def _objects(self, cursor: Cursor, section: str) -> Iterator[tuple[int, int, dict[str, Json]]]:
        cursor.expect("[", f"the list of {section}")
        for record, start, end in cursor.items():
            if not isinstance(record, dict):
                raise self._error(start, f"one of the {section} is {record!r:.40}; expected an object")
            yield start, end, record

    def _error(self, offset: int, fault: str) -> DataError:
        return DataError(f"{self.path}, {place(self.path, offset)}: {fault}.")


def _spans(offsets: Sequence[int]) -> IntArray:
    return np.array(offsets, dtype=np.int64).reshape(-1, 2)


def _has(name: str, record: Mapping[str, Json], expected: str) -> str:
    """Say what a record has in a field that is missing or has the wrong type."""
    value = record.get(name)
    return f"has no {name!r}" if value is None or value == "" else f"has the {name} {value!r}; expected {expected}"


def _is_whole(value: object) -> TypeGuard[int | float]:
    """Whether a value is a whole number, written as 7 or, as pandas does, as 7.0."""
    return type(value) is int or (type(value) is float and value.is_integer())


def _as_id(value: object) -> ImageId | None:
    if isinstance(value, str):
        return value or None
    return int(value) if _is_whole(value) else None
