"""Reads and writes COCO panoptic: a JSON file with the segments of each image, and a folder of PNGs whose colours are
their ids, R + 256 G + 65536 B; 0 is void.

Things are refined. Stuff (categories with `isthing` 0) and crowds are kept, but things may take pixels of stuff and
void, and what they give up goes to the nearest stuff or void (`settling`). Ids and categories stay; `area` and `bbox`
of segments whose pixels have changed are replaced, all other text stays.
"""

import io
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image

from refinetool import masks
from refinetool.errors import DataError, StorageError
from refinetool.formats import PANOPTIC, Request, Written
from refinetool.formats.categories import read_names
from refinetool.formats.coco_index import image_name
from refinetool.formats.image_files import existing_folder, fault_of_name, fence, refuse_link_out
from refinetool.formats.image_search import ImageSearch, fault_of_record
from refinetool.formats.json_spans import WINDOW_BYTES, Cursor, Json, Span, member_spans
from refinetool.formats.settling import settle
from refinetool.formats.storage import new_file, new_folder, refuse_clashes
from refinetool.images import open_lazily
from refinetool.records import IntArray, Outcome, Region, Sample, Size
from refinetool.statuses import Reason

VOID = 0


@dataclass(frozen=True, slots=True)
class Panel:
    """An image with its segments: key, image name, size, the name of its PNG, and where its `segments_info` is."""

    key: str
    image: str
    size: Size
    png: str
    segments: Span


def open_panoptic(path: Path, request: Request) -> "Panoptic":
    """Open a panoptic JSON file; its PNGs are in the folder of the same name beside it.

    Raises:
        DataError: The file is broken, its PNGs are missing, or its images are needed and not found.
    """
    panels, stuff = _read(path)
    pngs = path.with_suffix("")
    if not pngs.is_dir():
        raise DataError(f"{path}: its PNGs should be in {pngs}, and there is no such folder; put them there.")
    base = path.absolute().parent
    places = [request.images] if request.images else [base / "images", base.parent / "images", base]
    split = path.stem.rpartition("_")[2]
    if not request.images:
        places += [base.parent / split, base / split]
    for place in places:
        search = ImageSearch(existing_folder(place) if request.images else place, deep=place != base)
        found = next((image for panel in panels if (image := search.locate(panel.image)).is_file()), None)
        if found is not None:
            within = fence(place, request)
            if request.need_images:
                refuse_link_out(found, within)
            return Panoptic(path, pngs, tuple(panels), stuff, search, within)
    if request.need_images and panels:
        raise DataError(
            f"{path}: none of its {len(panels)} images is in {places[0]}; name the folder of the images with --images."
        )
    return Panoptic(path, pngs, tuple(panels), stuff, ImageSearch(places[0]), None)


@dataclass(frozen=True, slots=True)
class Panoptic:
    """See the module, and `formats.Dataset`.

    stuff: The ids of categories that are no things.
    """

    path: Path
    pngs: Path
    panels: tuple[Panel, ...]
    stuff: frozenset[int]
    search: ImageSearch
    within: Path | None

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

    def samples(self) -> Iterator[Sample]:
        with self.path.open("rb") as file:
            for panel in self.panels:
                image = self.search.locate(panel.image)
                segments = [segment for segment, _ in _segments(file, self.path, panel.segments)]
                try:
                    ids = self._ids(panel)
                    regions = tuple(self._region(segment, ids) for segment in segments)
                except DataError:
                    unreadable = Reason.UNREADABLE_MASK
                    regions = tuple(Region(_id(segment), None, None, unreadable) for segment in segments)
                yield Sample(panel.key, image, panel.size, regions, within=self.within)

    def _ids(self, panel: Panel) -> IntArray:
        ids = read_ids(self.pngs / panel.png)
        if ids.shape != panel.size:
            raise DataError(f"{self.pngs / panel.png}: is {ids.shape}; expected {panel.size}.")
        return ids

    def _region(self, segment: Mapping[str, Json], ids: IntArray) -> Region:
        number = _id(segment)
        mask = ids == number
        if not mask.any():
            return Region(number, None, None, Reason.EMPTY)
        category = segment.get("category_id")
        known = category if isinstance(category, int) else None
        crowd = Reason.CROWD if segment.get("iscrowd") else None
        return Region(number, known, masks.encode(mask), crowd or (Reason.STUFF if known in self.stuff else None))

    def write(self, find: Callable[[str], Outcome | None], destination: Path, notes: Mapping[str, object]) -> Written:
        """See `formats.Dataset`. The PNGs are written to the folder of the same name beside the file."""
        del notes
        folder = destination.with_suffix("")
        refuse_clashes({"output": destination, "folder of PNGs": folder}, {"input": self.path, "PNGs": self.pngs})
        if folder == destination:
            raise StorageError(f"{destination}: needs a name that ends in .json, since its PNGs get a folder without.")
        if folder.is_dir() and {item.name for item in folder.iterdir()} <= {panel.png for panel in self.panels}:
            shutil.rmtree(folder)  # of an earlier output
        changed, pieces, at = 0, [], 0
        data = self.path.read_bytes()
        with self.path.open("rb") as file, new_folder(folder) as partial:
            for panel in sorted(self.panels, key=lambda panel: panel.segments.start):
                outcome = find(panel.key)
                refined = sum(annotation.refined for annotation in outcome.annotations) if outcome else 0
                target = partial / panel.png
                target.parent.mkdir(parents=True, exist_ok=True)
                if outcome is None or not refined:
                    shutil.copyfile(self.pngs / panel.png, target)
                    continue
                changed += refined
                segments = _segments(file, self.path, panel.segments)
                old = self._ids(panel)
                new = self._settled(old, [segment for segment, _ in segments], outcome)
                target.write_bytes(with_ids(new))
                for segment, span in segments:
                    mask = new == _id(segment)
                    if (mask == (old == _id(segment))).all():
                        continue
                    pieces += [data[at : span.start], _with_values(data[span.start : span.end].decode(), mask).encode()]
                    at = span.end
            with new_file(destination) as out:
                out.write(b"".join([*pieces, data[at:]]))
        return Written(destination, changed, ())

    def _settled(self, old: IntArray, segments: list[Mapping[str, Json]], outcome: Outcome) -> IntArray:
        ground = [_id(segment) for segment in segments if segment.get("category_id") in self.stuff]
        refined = {
            _id(segment): (annotation.mask, annotation.predicted_iou)
            for segment, annotation in zip(segments, outcome.annotations, strict=True)
            if annotation.refined and annotation.mask is not None
        }
        return settle(old, refined, ground=np.isin(old, [VOID, *ground]))


def read_ids(path: Path) -> IntArray:
    """Read the ids of a panoptic PNG, int64 (H, W); raises DataError if it is no RGB image."""
    try:
        with open_lazily(io.BytesIO(path.read_bytes())) as image:
            colours = np.asarray(image)
    except Exception as error:  # Pillow's decoders raise all kinds of exceptions; all of them mean a broken file
        raise DataError(f"{path}: can't be read ({error}).") from error
    if colours.ndim != 3 or colours.dtype != np.uint8:
        raise DataError(f"{path}: has no colours; expected ids as R + 256 G + 65536 B.")
    red, green, blue = (colours[..., channel].astype(np.int64) for channel in range(3))
    return np.asarray(red + (green << 8) + (blue << 16))


def with_ids(ids: IntArray) -> bytes:
    """Return a PNG of ids, int64 (H, W)."""
    colours = np.stack([ids & 255, (ids >> 8) & 255, ids >> 16], axis=2).astype(np.uint8)
    data = io.BytesIO()
    Image.fromarray(colours).save(data, format="PNG")
    return data.getvalue()


def _read(path: Path) -> tuple[list[Panel], frozenset[int]]:
    """Return the images with segments, in the order of their annotations, and the categories that are no things."""
    images: dict[str, Mapping[str, Json]] = {}
    found: list[tuple[str, str, Span]] = []
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
                        raise DataError(f"{path}: one of the {name} is {record!r:.40}; expected an object.")
                    if name == "images":
                        images[str(record.get("id"))] = record
                    elif name == "annotations":
                        found.append((str(record.get("image_id")), str(record.get("file_name")), Span(start, end)))
                    elif record.get("isthing") == 0 and isinstance(record.get("id"), int):
                        stuff.add(int(str(record["id"])))
    except OSError as error:
        raise DataError(f"{path}: can't be read ({error.strerror}).") from error
    panels: dict[str, Panel] = {}
    for key, png, span in found:
        if key in panels:
            raise DataError(f"{path}: image {key} has two annotations; expected one with all segments.")
        panels[key] = _panel(path, key, images.get(key), png, span)
    return list(panels.values()), frozenset(stuff)


def _panel(path: Path, key: str, image: Mapping[str, Json] | None, png: str, span: Span) -> Panel:
    name = None if image is None else image_name(image)
    if image is None or name is None:
        raise DataError(f"{path}: image {key} is not listed, or has no 'file_name'; add it to 'images'.")
    if fault := fault_of_record(name) or fault_of_name(png):
        raise DataError(f"{path}: a file of image {key} is called {name!r} or {png!r}, which {fault}.")
    height, width = image.get("height"), image.get("width")
    if not isinstance(height, int) or not isinstance(width, int):
        raise DataError(f"{path}: image {key} has no height and width.")
    return Panel(key, name, (height, width), png, span)


def _segments(file: BinaryIO, path: Path, span: Span) -> list[tuple[Mapping[str, Json], Span]]:
    """Return the segments of an annotation with their positions in the file."""
    file.seek(span.start)
    text = file.read(span.end - span.start)
    with io.BytesIO(text) as buffer:
        cursor = Cursor(buffer, path, WINDOW_BYTES)
        for name in cursor.members():
            if name == "segments_info":
                items = list(cursor.items())
                if not all(isinstance(item, dict) and isinstance(item.get("id"), int) for item, _, _ in items):
                    raise DataError(f"{path}: a segment has no 'id'; expected a whole number.")
                return [
                    (dict(item), Span(span.start + a, span.start + b)) for item, a, b in items if isinstance(item, dict)
                ]
            cursor.skip()
    raise DataError(f"{path}: an annotation has no 'segments_info'; expected COCO panoptic.")


def _id(segment: Mapping[str, Json]) -> int:
    return int(str(segment["id"]))


def _with_values(text: str, mask: np.ndarray[tuple[int, int], np.dtype[np.bool_]]) -> str:
    x0, y0, x1, y1 = masks.tight_box(mask)
    values: dict[str, Json] = {"area": int(mask.sum()), "bbox": [x0, y0, x1 - x0, y1 - y0]}
    for name, where in sorted(member_spans(text).items(), key=lambda item: -item[1].start):
        if name in values:
            text = text[: where.start] + json.dumps(values[name], separators=(",", ":")) + text[where.end :]
    return text
