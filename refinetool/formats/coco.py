"""Reads and writes COCO instances and COCO results. The text is kept, with new values where a mask was refined."""

import heapq
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np

from refinetool.errors import DataError
from refinetool.formats import COCO, COCO_RESULTS, Request, Written
from refinetool.formats.categories import read_names
from refinetool.formats.coco_images import CocoImages, ImageEntry, listed_images, numbered_images
from refinetool.formats.coco_index import (
    LONGEST_SIDE,
    AnnotationRecords,
    read_images,
    read_instances,
    read_results,
    rows_of,
)
from refinetool.formats.coco_masks import PolygonCount, decode_segmentation, redraw
from refinetool.formats.image_files import header_size
from refinetool.formats.json_spans import Json, Span, member_spans
from refinetool.formats.storage import new_file, refuse_clashes
from refinetool.records import IntArray, Outcome, Region, Sample, Size
from refinetool.statuses import Reason

_COPY_BYTES = 1 << 20


def open_coco(path: Path, request: Request) -> "CocoDataset":
    """Open COCO instances. Raises DataError if the file is broken, or if its images are needed and not found."""
    stamp = _stamp(path)
    records, annotations = read_instances(path)
    rows = rows_of(annotations, records.rows)
    found = listed_images(records, path, request)
    return CocoDataset(COCO, annotations, rows, found, {"input": path}, stamp, request)


def open_coco_results(path: Path, request: Request) -> "CocoDataset":
    """Open COCO results. Raises DataError if the file is broken, or if its images are needed and not found."""
    sizes = request.sizes
    stamp = _stamp(path)
    results = read_results(path)
    found: CocoImages
    if sizes is None:
        found = numbered_images(results.named, path, request)
    else:
        found = listed_images(read_images(sizes), sizes, request)
    rows = rows_of(results, found.rows)
    return CocoDataset(COCO_RESULTS, results, rows, found, {"input": path, "list of images": sizes}, stamp, request)


@dataclass(frozen=True, slots=True)
class CocoDataset:
    """Annotations and their images; see `formats.Dataset`. Holds the positions of records, not their content.

    rows: int64 (A,), the index of each annotation's image among the images.
    sources: The input files by name, none of which may be overwritten.
    stamp: Size and modification time of the file when it was read.
    request: How the file was opened.
    known_sizes: (H, W) by key, for images whose records have no size; see `with_sizes`.
    """

    format: str
    annotations: AnnotationRecords
    rows: IntArray
    images: CocoImages
    sources: Mapping[str, Path | None]
    stamp: tuple[int, int]
    request: Request
    known_sizes: Mapping[str, Size] | None = None

    def __len__(self) -> int:
        return len(self.images.rows)

    def sizes(self) -> dict[str, Size]:
        """Return (H, W) of the images by key, as far as it is known from records or image headers."""
        found = ((entry.key, entry.size or self._header_size(entry)) for entry in self.images.entries())
        return {key: size for key, size in found if size}

    def with_sizes(self, sizes: Mapping[str, Size]) -> "CocoDataset":
        """Return the same data set, which no longer trusts the size of images that were found by number.

        Where records have no size, that of the RLE is used, then that in `sizes`, because an image that was found by
        number may be a thumbnail or an unrelated file.
        """
        return replace(self, known_sizes=sizes)

    def category_names(self) -> Mapping[str, int]:
        """Return the number of each category's name; results take them from the file that lists the images."""
        return read_names(self.sources.get("list of images") or self.annotations.path)

    def image_paths(self) -> Iterator[Path]:
        return (entry.path for entry in self.images.entries())

    def remarks(self) -> tuple[str, ...]:
        return ()

    def samples(self) -> Iterator[Sample]:
        with self.annotations.path.open("rb") as file:
            for entry, members in self._by_image():
                records = [json.loads(_text(file, self.annotations.spans[member])) for member in members]
                size = self._size(entry, records)
                too_large = self._reason_of_size(entry, size)
                regions = (
                    self._region(int(self.annotations.ids[member]), record, size, too_large)
                    for member, record in zip(members, records, strict=True)
                )
                yield Sample(entry.key, entry.path, size, tuple(regions), within=self.images.within)

    def write(self, find: Callable[[str], Outcome | None], destination: Path, notes: Mapping[str, object]) -> Written:
        refuse_clashes({"output": destination}, self.sources)
        path = self.annotations.path
        if _stamp(path) != self.stamp:
            raise DataError(f"{path}: has changed since it was read; run the command again.")
        with (
            new_file(destination) as out,
            path.open("rb") as file,
            tempfile.TemporaryFile(dir=destination.parent) as drafts,
        ):
            drafted, count = self._draft(find, file, drafts)
            changed = np.flatnonzero(drafted[:, 1])
            records = ((Span(*self.annotations.spans[row].tolist()), _bytes(drafts, drafted[row])) for row in changed)
            _splice(file, out, heapq.merge(records, self._info(file, notes), key=lambda edit: edit[0].start))
        return Written(destination, len(changed), count.remarks())

    def _by_image(self) -> Iterator[tuple[ImageEntry, IntArray]]:
        """Yield each image with the rows of its annotations, both in the order of the file."""
        order = np.argsort(self.rows, kind="stable")
        bounds = np.searchsorted(self.rows[order], np.arange(len(self) + 1))
        for entry, first, last in zip(self.images.entries(), bounds[:-1], bounds[1:], strict=True):
            yield entry, order[first:last]

    def _size(self, entry: ImageEntry, records: Sequence[Mapping[str, Json]]) -> Size:
        """Return (H, W) of an image, (0, 0) if it is unknown."""
        if self.known_sizes is None:
            return entry.size or self._header_size(entry) or _claimed_size(records) or (0, 0)
        known = entry.size or _claimed_size(records) or self.known_sizes.get(entry.key)
        return known or self._header_size(entry) or (0, 0)

    def _header_size(self, entry: ImageEntry) -> Size | None:
        return header_size(entry.path, within=self.images.within)

    def _reason_of_size(self, entry: ImageEntry, size: Size) -> Reason:
        """Return why masks of more than `max_pixels` are kept: the image is as large, or its record is wrong."""
        if math.prod(size) <= self.request.max_pixels:
            return Reason.IMAGE_TOO_LARGE
        real = self._header_size(entry)
        wrong = real is not None and math.prod(real) <= self.request.max_pixels
        return Reason.SIZE_MISMATCH if wrong else Reason.IMAGE_TOO_LARGE

    def _region(self, number: int, record: Mapping[str, Json], size: Size, too_large: Reason) -> Region:
        """Return the region of a record; `too_large` is the reason if the image has too many pixels."""
        found = decode_segmentation(record.get("segmentation"), size, max_pixels=self.request.max_pixels)
        keep = too_large if found.keep == Reason.IMAGE_TOO_LARGE else found.keep
        fault = found.fault_of(f"{self.annotations.path}: annotation {number}")
        if record.get("iscrowd") and not self.request.include_crowd:
            keep, fault = Reason.CROWD, None
        category = record.get("category_id")
        return Region(
            number,
            int(category) if isinstance(category, int | float) else None,
            found.mask,
            keep,
            score=_number(record.get("score")),
            area=_number(record.get("area")),
            fault=fault,
        )

    def _draft(
        self, find: Callable[[str], Outcome | None], file: BinaryIO, drafts: BinaryIO
    ) -> tuple[IntArray, PolygonCount]:
        """Write the refined records to `drafts`, image by image, because outcomes are found per image.

        Annotations of an image may be far apart in the file, and there are too many outcomes to hold in memory.

        Returns:
            int64 (A, 2): offsets in `drafts`, (0, 0) for an unchanged annotation; and how polygons were written.
        """
        drafted = np.zeros((len(self.annotations), 2), dtype=np.int64)
        count = PolygonCount()
        end = 0
        for entry, members in self._by_image():
            outcome = find(entry.key)
            if outcome is None:
                continue
            for member, annotation in zip(members, outcome.annotations, strict=True):
                if not annotation.refined or annotation.mask is None:
                    continue
                text = _text(file, self.annotations.spans[member])
                segmentation = json.loads(text)["segmentation"]
                redrawn = redraw(segmentation, annotation.mask, polygons=self.request.polygons)
                if redrawn is None:
                    continue
                start, end = end, end + drafts.write(_with_values(text, redrawn.values).encode())
                drafted[member] = start, end
                count.add(redrawn)
        return drafted, count

    def _info(self, file: BinaryIO, notes: Mapping[str, object]) -> list[tuple[Span, bytes]]:
        """Return the edit that adds notes to `info`; no edit if there are no notes, or if `info` is no JSON object."""
        if self.format != COCO or not notes:
            return []
        member = f'"refinetool":{_dump(notes)}'
        info = self.annotations.info
        if info is None:
            behind_bracket = self.annotations.root + 1
            return [(Span(behind_bracket, behind_bracket), f'"info":{{{member}}},'.encode())]
        text = _text(file, (info.start, info.end))
        if text == "null":
            text = "{}"
        if not text.startswith("{"):
            return []
        spans = member_spans(text)
        if "refinetool" in spans:
            text = _replaced(text, spans["refinetool"], _dump(notes))
        elif spans:
            last = max(span.end for span in spans.values())
            text = _replaced(text, Span(last, last), f",{member}")
        else:
            text = f"{{{member}}}"
        return [(info, text.encode())]


def _number(value: Json) -> float | None:
    try:
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
    except OverflowError:  # a whole number of hundreds of digits
        return None


def _with_values(text: str, values: Mapping[str, Json]) -> str:
    """Replace values in the text of an object, for the names it has; the rest of the text stays."""
    spans = member_spans(text)
    for name in sorted(values.keys() & spans.keys(), key=lambda name: spans[name].start, reverse=True):
        text = _replaced(text, spans[name], _dump(values[name]))
    return text


def _replaced(text: str, span: Span, new: str) -> str:
    return text[: span.start] + new + text[span.end :]


def _dump(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def _splice(source: BinaryIO, out: BinaryIO, edits: Iterable[tuple[Span, bytes]]) -> None:
    """Copy a file with some spans replaced by other bytes; the edits are in order."""
    source.seek(0)
    at = 0
    for span, new in edits:
        _copy(source, out, span.start - at)
        out.write(new)
        source.seek(span.end)
        at = span.end
    shutil.copyfileobj(source, out, _COPY_BYTES)


def _copy(source: BinaryIO, out: BinaryIO, length: int) -> None:
    while length:
        piece = source.read(min(length, _COPY_BYTES))
        out.write(piece)
        length -= len(piece)


def _bytes(file: BinaryIO, span: IntArray | tuple[int, int]) -> bytes:
    start, end = span
    file.seek(start)
    return file.read(end - start)


def _text(file: BinaryIO, span: IntArray | tuple[int, int]) -> str:
    return _bytes(file, span).decode()


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror}).") from error
    return status.st_size, status.st_mtime_ns


def _claimed_size(records: Sequence[Mapping[str, Json]]) -> Size | None:
    """Return the size in the first RLE, for an image whose own size is unknown."""
    for record in records:
        match record.get("segmentation"):
            case {"size": [int(height), int(width)]} if 0 < height <= LONGEST_SIDE and 0 < width <= LONGEST_SIDE:
                return height, width
    return None
