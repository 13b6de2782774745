"""Reads and writes COCO panoptic: a JSON file with the segments of each image, and a folder of PNGs whose colours are
their ids, R + 256 G + 65536 B; 0 is void.

Things are refined. Stuff (categories with `isthing` 0) and crowds are kept, but things may take pixels of stuff and
void, and what they give up goes to the nearest stuff or void (`settling`). Ids and categories stay; `area` and `bbox`
of segments whose pixels have changed are replaced, all other text stays.
"""

import io
import json
from collections.abc import Callable, Collection, Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from refinetool import masks
from refinetool.errors import DataError, ImageError, UsageError
from refinetool.formats import PANOPTIC, Request, Written
from refinetool.formats.categories import read_names
from refinetool.formats.coco_index import LONGEST_SIDE, image_name
from refinetool.formats.image_files import existing_folder, fault_of_name, fence, refuse_link_out, refuse_links_out
from refinetool.formats.image_search import ImageSearch, fault_of_record
from refinetool.formats.json_spans import WINDOW_BYTES, Cursor, Json, Span, member_spans, place
from refinetool.formats.rasters import read_map
from refinetool.formats.settling import settle
from refinetool.formats.storage import new_pair, refuse_clashes, refuse_foreign
from refinetool.records import IntArray, Outcome, Region, Sample, Size
from refinetool.statuses import Reason

VOID = 0


@dataclass(frozen=True, slots=True)
class Panel:
    """An image with its segments: key, image name, size, the name of its PNG, and where its annotation is.

    `png` is None if the annotation names none.
    """

    key: str
    image: str
    size: Size
    png: str | None
    annotation: Span


def open_panoptic(path: Path, request: Request) -> "Panoptic":
    """Open a panoptic JSON file; its PNGs are in the folder of the same name beside it.

    Raises:
        DataError: The file is broken, its PNGs are missing or a link out of their folder, or its images are needed and
            not found.
    """
    panels, stuff = _read(path)
    pngs = path.with_suffix("")
    if not pngs.is_dir():
        raise DataError(f"{path}: its PNGs should be in {pngs}, and there is no such folder; put them there.")
    refuse_links_out((pngs / panel.png for panel in panels if panel.png is not None), fence(pngs, request))
    base = path.absolute().parent
    places = [request.images] if request.images else [base / "images", base.parent / "images", base]
    split = path.stem.rpartition("_")[2]
    if not request.images:
        places += [base.parent / split, base / split]
    for folder in places:
        search = ImageSearch(existing_folder(folder) if request.images else folder, deep=folder != base)
        found = next((image for panel in panels if (image := search.locate(panel.image)).is_file()), None)
        if found is not None:
            within = fence(folder, request)
            if request.need_images:
                refuse_link_out(found, within)
            return Panoptic(path, pngs, tuple(panels), stuff, search, within, request.max_pixels)
    if request.need_images and panels:
        raise DataError(
            f"{path}: none of its {len(panels)} images is in {places[0]}; name the folder of the images with --images."
        )
    return Panoptic(path, pngs, tuple(panels), stuff, ImageSearch(places[0]), None, request.max_pixels)


@dataclass(frozen=True, slots=True)
class Panoptic:
    """See the module, and `formats.Dataset`.

    stuff: The ids of categories that are no things.
    max_pixels: PNGs that claim more pixels are not decoded.
    """

    path: Path
    pngs: Path
    panels: tuple[Panel, ...]
    stuff: frozenset[int]
    search: ImageSearch
    within: Path | None
    max_pixels: int

    @property
    def format(self) -> str:
        return PANOPTIC

    def __len__(self) -> int:
        return len(self.panels)

    def category_names(self) -> Mapping[str, int]:
        """Return the number of each category's name."""
        return read_names(self.path)

    def image_paths(self) -> Iterator[Path]:
        return (self.search.locate(panel.image) for panel in self.panels)

    def remarks(self) -> tuple[str, ...]:
        return ()

    def folder_for(self, destination: Path) -> Path:
        """Return the folder of the PNGs that are written with a file; raises UsageError unless it ends in .json."""
        if destination.suffix.lower() != ".json":
            raise UsageError(
                f"{destination}: the name has to end in .json; the folder of the PNGs has the same name without it"
            )
        return destination.with_suffix("")

    def png_names(self) -> Set[str]:
        """Return the names of the PNGs that are written."""
        return {panel.png for panel in self.panels if panel.png is not None}

    def samples(self) -> Iterator[Sample]:
        with self.path.open("rb") as file:
            for panel in self.panels:
                image = self.search.locate(panel.image)
                segments = [segment for segment, _ in _segments(file, self.path, panel.annotation)]
                try:
                    ids = self._ids(panel)
                    regions = tuple(self._region(segment, ids) for segment in segments)
                except ImageError as error:
                    regions = tuple(
                        Region(_id(segment), None, None, error.reason, fault=None if n else str(error))  # said once
                        for n, segment in enumerate(segments)
                    )
                yield Sample(panel.key, image, panel.size, regions, within=self.within)

    def _ids(self, panel: Panel) -> IntArray:
        if panel.png is None:
            raise ImageError(f"{self.path}: image {panel.key} names no PNG.", reason=Reason.UNREADABLE_MASK)
        return read_ids(self.pngs / panel.png, sizes=(panel.size,), max_pixels=self.max_pixels)

    def _region(self, segment: Mapping[str, Json], ids: IntArray) -> Region:
        number = _id(segment)
        mask = ids == number
        if not mask.any():
            return Region(number, None, None, Reason.EMPTY)
        category = _category(segment)
        crowd = Reason.CROWD if segment.get("iscrowd") else None
        return Region(number, category, masks.encode(mask), crowd or (Reason.STUFF if category in self.stuff else None))

    def write(self, find: Callable[[str], Outcome | None], destination: Path, notes: Mapping[str, object]) -> Written:
        """See `formats.Dataset`. The PNGs are written to the folder of the same name beside the file."""
        del notes
        folder = self.folder_for(destination)
        refuse_clashes({"output": destination, "folder of PNGs": folder}, {"input": self.path, "PNGs": self.pngs})
        refuse_foreign(folder, self.png_names(), source=self.path)
        changed, pieces, at = 0, [], 0
        data = self.path.read_bytes()
        with self.path.open("rb") as file, new_pair(destination, folder) as (out, partial):
            for panel in sorted(self.panels, key=lambda panel: panel.annotation.start):
                outcome = find(panel.key)
                refined = sum(annotation.refined for annotation in outcome.annotations) if outcome else 0
                if outcome is None or not refined:
                    self._copy(panel, partial)
                    continue
                changed += refined
                segments = _segments(file, self.path, panel.annotation)
                old = self._ids(panel)
                new = self._settled(old, [segment for segment, _ in segments], outcome)
                _write_png(partial, panel, with_ids(new))
                for segment, span in segments:
                    mask = new == _id(segment)
                    if (mask == (old == _id(segment))).all():
                        continue
                    pieces += [data[at : span.start], _with_values(data[span.start : span.end].decode(), mask).encode()]
                    at = span.end
            out.write(b"".join([*pieces, data[at:]]))
        return Written(destination, changed, ())

    def _copy(self, panel: Panel, folder: Path) -> None:
        """Copy the PNG of an image as it is; one that is missing or can't be opened is left out."""
        if panel.png is None:
            return
        try:
            content = (self.pngs / panel.png).read_bytes()
        except OSError:
            return
        _write_png(folder, panel, content)

    def _settled(self, old: IntArray, segments: list[Mapping[str, Json]], outcome: Outcome) -> IntArray:
        ground = [_id(segment) for segment in segments if _category(segment) in self.stuff]
        refined = {
            _id(segment): (annotation.mask, annotation.predicted_iou)
            for segment, annotation in zip(segments, outcome.annotations, strict=True)
            if annotation.refined and annotation.mask is not None
        }
        return settle(old, refined, ground=np.isin(old, [VOID, *ground]))


def read_ids(path: Path, *, sizes: Collection[Size], max_pixels: int) -> IntArray:
    """Read the ids of a panoptic PNG, int64 (H, W). See `rasters.read_map` for the arguments and errors."""
    colours = read_map(path, sizes=sizes, max_pixels=max_pixels)
    if colours.ndim != 3 or colours.shape[2] < 3 or colours.dtype != np.uint8:
        fault = "has no colours; expected ids as R + 256 G + 65536 B"
        raise ImageError(f"{path}: {fault}.", reason=Reason.UNREADABLE_MASK)
    red, green, blue = (colours[..., channel].astype(np.int64) for channel in range(3))
    return np.asarray(red + (green << 8) + (blue << 16))


def with_ids(ids: IntArray) -> bytes:
    """Return a PNG of ids, int64 (H, W)."""
    colours = np.stack([ids & 255, (ids >> 8) & 255, ids >> 16], axis=2).astype(np.uint8)
    data = io.BytesIO()
    Image.fromarray(colours).save(data, format="PNG")
    return data.getvalue()


def _write_png(folder: Path, panel: Panel, content: bytes) -> None:
    assert panel.png is not None, "an image with ids has a PNG"
    target = folder / panel.png
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content)


def _read(path: Path) -> tuple[list[Panel], frozenset[int]]:
    """Return the images with segments, in the order of their annotations, and the categories that are no things."""
    images: dict[str, tuple[Mapping[str, Json], int]] = {}
    found: list[tuple[str, Json, Span]] = []
    stuff: set[int] = set()
    try:
        with path.open("rb") as file:
            cursor = Cursor(file, path, WINDOW_BYTES)
            cursor.expect("{", "an object with images and annotations")
            for name in cursor.members():
                if name not in ("images", "annotations", "categories"):
                    cursor.skip()
                    continue
                cursor.expect("[", f"the list of {name}")
                for record, start, end in cursor.items():
                    if not isinstance(record, dict):
                        raise _error(path, start, f"one of the {name} is {record!r:.40}; expected an object")
                    if name == "images":
                        images[str(record.get("id"))] = record, start
                    elif name == "annotations":
                        key = str(record.get("image_id"))
                        _check_segments(path, key, record, Span(start, end))
                        found.append((key, record.get("file_name"), Span(start, end)))
                    elif type(record.get("id")) is not int:
                        raise _error(path, start, f"a category has the id {record.get('id')!r:.40}; {_WHOLE}")
                    elif record.get("isthing") == 0:
                        stuff.add(_id(record))
            cursor.finish()
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror}).") from error
    panels: dict[str, Panel] = {}
    owners: dict[str, Panel] = {}
    for key, png, span in found:
        if key in panels:
            raise _error(path, span.start, f"image {key} has two annotations; expected one with all segments")
        panel = panels[key] = _panel(path, key, images.get(key), png, span)
        if panel.png is not None and owners.setdefault(panel.png, panel) is not panel:
            fault = f"image {key} has the PNG {png!r}, which is that of image {owners[panel.png].key}"
            raise _error(path, span.start, f"{fault} already; give each image a PNG of its own")
    return list(panels.values()), frozenset(stuff)


_WHOLE = "expected a whole number, without quotes or a decimal point"


def _panel(path: Path, key: str, listed: tuple[Mapping[str, Json], int] | None, png: Json, span: Span) -> Panel:
    image, start = listed or ({}, span.start)
    name = image_name(image)
    if name is None:
        raise _error(path, start, f"image {key} is not listed, or has no 'file_name'; add it to 'images'")
    named = Path(png).as_posix() if isinstance(png, str) and png else None  # `./1.png` is `1.png`
    if fault := fault_of_record(name) or (named and fault_of_name(named)):
        raise _error(path, start, f"a file of image {key} is called {name!r} or {png!r}, which {fault}")
    height, width = (_side(path, start, key, image, side) for side in ("height", "width"))
    return Panel(key, name, (height, width), named, span)


def _side(path: Path, start: int, key: str, image: Mapping[str, Json], side: str) -> int:
    length = image.get(side)
    if type(length) is not int or not 0 < length <= LONGEST_SIDE:
        raise _error(path, start, f"image {key} has the {side} {length!r:.40}; expected pixels")
    return length


def _check_segments(path: Path, key: str, annotation: Mapping[str, Json], span: Span) -> None:
    """Raise DataError unless an annotation has a list of segments whose ids are different whole numbers."""
    segments = annotation.get("segments_info")
    if not isinstance(segments, list):
        raise _error(path, span.start, f"image {key} has the segments_info {segments!r:.40}; expected a list")
    known: set[int] = set()
    for n, segment in enumerate(segments):
        number = segment.get("id") if isinstance(segment, dict) else None
        if not isinstance(segment, dict):
            fault = f"one of the segments is {segment!r:.40}; expected an object"
        elif type(number) is not int:
            fault = f"a segment of image {key} has the id {number!r:.40}; {_WHOLE}"
        elif number in known:
            fault = f"image {key} has two segments with the id {number}; give each segment an id of its own"
        else:
            known.add(number)
            continue
        with path.open("rb") as file:
            _, where = _items(file, path, span)[n]
        raise _error(path, where.start, fault)


def _error(path: Path, offset: int, fault: str) -> DataError:
    return DataError(f"{path}, {place(path, offset)}: {fault}.")


def _segments(file: BinaryIO, path: Path, annotation: Span) -> list[tuple[Mapping[str, Json], Span]]:
    """Return the segments of an annotation with their positions in the file."""
    items = _items(file, path, annotation)
    segments: list[tuple[Mapping[str, Json], Span]] = [
        (item, span) for item, span in items if isinstance(item, dict) and type(item.get("id")) is int
    ]
    if len(segments) < len(items):  # `_check_segments` has accepted them all
        raise DataError(f"{path}: has changed since it was opened; run the command again.")
    return segments


def _items(file: BinaryIO, path: Path, annotation: Span) -> list[tuple[Json, Span]]:
    """Return what is in the `segments_info` of an annotation, with the positions in the file."""
    file.seek(annotation.start)
    found: list[tuple[Json, Span]] = []
    with io.BytesIO(file.read(annotation.end - annotation.start)) as buffer:
        cursor = Cursor(buffer, path, WINDOW_BYTES)
        for name in cursor.members():
            if name == "segments_info" and cursor.peek() == "[":
                moved = (
                    (item, annotation.start + start, annotation.start + end) for item, start, end in cursor.items()
                )
                found = [(item, Span(start, end)) for item, start, end in moved]  # of a repeated name, the last counts
            else:
                cursor.skip()
    return found


def _id(record: Mapping[str, Json]) -> int:
    number = record.get("id")
    assert type(number) is int, "ids are checked when the file is opened"
    return number


def _category(segment: Mapping[str, Json]) -> int | None:
    number = segment.get("category_id")
    return number if type(number) is int else None


def _with_values(text: str, mask: np.ndarray[tuple[int, int], np.dtype[np.bool_]]) -> str:
    x0, y0, x1, y1 = masks.tight_box(mask)
    values: dict[str, Json] = {"area": int(mask.sum()), "bbox": [x0, y0, x1 - x0, y1 - y0]}
    for name, where in sorted(member_spans(text).items(), key=lambda item: -item[1].start):
        if name in values:
            text = text[: where.start] + json.dumps(values[name], separators=(",", ":")) + text[where.end :]
    return text
