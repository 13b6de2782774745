"""Reads and writes LabelMe's JSON: a file per image, whose `shapes` are polygons and masks.

Only `points` of refined polygons, and `points` and `mask` of refined masks, are replaced; all other text stays. A
polygon holds one ring: holes are filled unless asked otherwise (`PolygonSettings.holes`), and several islands are
joined by cuts of no width. Masks keep holes. Rectangles, circles, lines and points stay as they are.
"""

import base64
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from refinetool import masks
from refinetool.errors import DataError, MaskError
from refinetool.formats import LABELME, Request
from refinetool.formats.coco_index import LONGEST_SIDE
from refinetool.formats.coco_masks import Decoded, PolygonCount, decode_segmentation, redraw_as_one
from refinetool.formats.image_files import existing_folder, fence, refuse_link_out
from refinetool.formats.image_search import ImageSearch
from refinetool.formats.json_spans import WINDOW_BYTES, Cursor, Json, Span, member_spans, place
from refinetool.formats.label_files import LabelFiles
from refinetool.images import open_lazily
from refinetool.records import Outcome, Region, Rle, Size
from refinetool.settings import PolygonSettings
from refinetool.statuses import Reason

_HEIGHT, _WIDTH = "imageHeight", "imageWidth"

_HELD = {"polygon": "points", "mask": "points or mask"}
"""What a shape of each kind consists of."""


def open_labelme(path: Path, request: Request) -> LabelFiles:
    """Open a LabelMe file, or all in a folder and its sub-folders.

    An image is looked for as `imagePath` in the folder of the request, or else in that of the file.

    Raises:
        DataError: There are no files, or no images although they are needed.
    """
    paths = [path] if path.is_file() else sorted(existing_folder(path).rglob("*.json"))
    folder = path.parent if path.is_file() else path
    files = {file.relative_to(folder).with_suffix("").as_posix(): file for file in paths}
    images: dict[str, Path] = {}
    searches: dict[Path, ImageSearch] = {}
    for key, file in files.items():
        place = request.images or file.parent
        search = searches.setdefault(place, ImageSearch(existing_folder(place), deep=request.images is not None))
        images[key] = search.locate(_image_name(file) or f"{file.stem}.jpg")
    if not files:
        raise DataError(f"{path}: holds no JSON files.")
    within = fence(request.images or folder, request)
    existing = next((image for image in images.values() if image.is_file()), None)
    if request.need_images and existing is None:
        first = next(iter(images.values()))
        raise DataError(
            f"{path}: none of its {len(files)} images is where it was looked for, the first as {first}; name the "
            "folder of the images with --images."
        )
    if request.need_images and existing is not None:
        refuse_link_out(existing, within)
    codec = LabelMe(request.polygons, request.max_pixels)
    return LabelFiles(LABELME, path, files, (), images.__getitem__, within, codec)


def _image_name(file: Path) -> str | None:
    try:
        with file.open("rb") as opened:
            cursor = Cursor(opened, file, WINDOW_BYTES)
            for name in cursor.members():
                if name == "imagePath":
                    value, _ = cursor.value()
                    return value if isinstance(value, str) and value else None
                cursor.skip()
    except (OSError, DataError):
        return None
    return None


@dataclass(frozen=True, slots=True)
class LabelMe:
    """See the module."""

    polygons: PolygonSettings
    max_pixels: int

    def read(self, file: Path, size: Size) -> tuple[Size, tuple[Region, ...]]:
        """Return the size that the file states, or else the given one, and one region per shape, numbered from 0.

        Labels are texts, so there are no numbers of categories.
        """
        contents = _read(file)
        stated = contents.size or size
        if stated != size and math.prod(stated) > self.max_pixels:
            regions = (Region(number, None, None, Reason.SIZE_MISMATCH) for number, _ in enumerate(contents.shapes))
        else:
            regions = (self._region(n, shape, stated, file) for n, (shape, _) in enumerate(contents.shapes))
        return stated, tuple(regions)

    def _region(self, number: int, shape: Json, size: Size, file: Path) -> Region:
        found = self._decoded(shape, size)
        return Region(number, None, found.mask, found.keep, fault=found.fault_of(f"{file}: shapes[{number}]"))

    def _decoded(self, shape: Json, size: Size) -> Decoded:
        if not isinstance(shape, dict):
            return Decoded(None, Reason.UNREADABLE_MASK, f"is {shape!r:.40}; expected an object")
        kind = shape.get("shape_type", "polygon")
        if kind not in ("polygon", "mask"):
            return Decoded(None, Reason.EMPTY)
        try:
            return self._mask(shape, size) if kind == "mask" else self._polygon(shape, size)
        except MaskError as error:
            return Decoded(None, Reason.UNREADABLE_MASK, str(error))
        except (ValueError, TypeError, OSError, SyntaxError):
            return Decoded(None, Reason.UNREADABLE_MASK, f"its {_HELD[kind]} can't be read")

    def _polygon(self, shape: Mapping[str, Json], size: Size) -> Decoded:
        ring = np.array(shape.get("points"), dtype=np.float64).reshape(-1, 2).ravel()
        return decode_segmentation([[*ring.tolist()]], size, max_pixels=self.max_pixels)

    def _mask(self, shape: Mapping[str, Json], size: Size) -> Decoded:
        if math.prod(size) > self.max_pixels:
            return Decoded(None, Reason.IMAGE_TOO_LARGE)
        rle = _stored_mask(shape, size)
        return Decoded(rle, None if masks.area(rle) else Reason.EMPTY)

    def rewritten(self, file: Path, size: Size, outcome: Outcome, count: PolygonCount) -> bytes:
        """Replace what refined shapes consist of."""
        del size  # coordinates are in pixels
        shapes = _read(file).shapes
        if len(shapes) != len(outcome.annotations):
            raise DataError(f"{file}: has changed since it was read; run the command again.")
        data = file.read_bytes()
        pieces, at = [], 0
        for (shape, span), annotation in zip(shapes, outcome.annotations, strict=True):
            if not annotation.refined or annotation.mask is None or not masks.area(annotation.mask):
                continue
            assert isinstance(shape, dict), "only objects are refined"
            if shape.get("shape_type", "polygon") == "mask":
                values = _mask_values(annotation.mask)
            else:
                ring, redrawn = redraw_as_one(annotation.mask, polygons=self.polygons)
                count.add(redrawn)
                values = {"points": ring.tolist()}
            text = data[span.start : span.end].decode()
            for name, where in sorted(member_spans(text).items(), key=lambda item: -item[1].start):
                if name in values:
                    text = text[: where.start] + json.dumps(values[name]) + text[where.end :]
            pieces += [data[at : span.start], text.encode()]
            at = span.end
        return b"".join([*pieces, data[at:]])


@dataclass(frozen=True, slots=True)
class _Contents:
    """What is read of a file: the shapes with their positions, and the size (H, W) of the image, if it is stated."""

    shapes: list[tuple[Json, Span]]
    size: Size | None


def _read(file: Path) -> _Contents:
    """Read a file to its end; raises DataError if it is not LabelMe's."""
    shapes: list[tuple[Json, Span]] | None = None
    values: dict[str, Json] = {}
    try:
        with file.open("rb") as opened:
            cursor = Cursor(opened, file, WINDOW_BYTES)
            cursor.expect("{", "an object with shapes")
            for name in cursor.members():
                if name in values or (name == "shapes" and shapes is not None):
                    raise DataError(f"{file}, {place(file, cursor.offset)}: a second {name!r}; expected one.")
                if name == "shapes":
                    cursor.expect("[", "the list of shapes")
                    shapes = [(shape, Span(start, end)) for shape, start, end in cursor.items()]
                elif name in (_HEIGHT, _WIDTH):
                    values[name], _ = cursor.value()
                else:
                    cursor.skip()
            cursor.finish()
    except OSError as error:
        raise DataError(f"{file}: can't be read ({error.strerror}).") from error
    if shapes is None:
        raise DataError(f"{file}: has no 'shapes'; expected a file of LabelMe.")
    return _Contents(shapes, _stated_size(file, values))


def _stated_size(file: Path, values: Mapping[str, Json]) -> Size | None:
    height, width = values.get(_HEIGHT), values.get(_WIDTH)
    if type(height) is not int or type(width) is not int:
        return None
    for name, side in ((_HEIGHT, height), (_WIDTH, width)):
        if not 0 < side <= LONGEST_SIDE:
            raise DataError(f"{file}: has the {name} {side}; expected pixels.")
    return height, width


def _stored_mask(shape: Mapping[str, Json], size: Size) -> Rle:
    """Decode a mask: a PNG in base64 of the box between two points, both of which belong to it.

    Raises:
        MaskError: The PNG does not fit the box, or the box does not fit the image; it is then not decoded.
        ValueError, TypeError, OSError, SyntaxError: The points or the PNG can't be read.
    """
    (x0, y0), (x1, y1) = np.rint(np.array(shape.get("points"), dtype=np.float64)).astype(int).tolist()
    png = open_lazily(io.BytesIO(base64.b64decode(str(shape.get("mask")), validate=True)))
    height, width = size
    if png.size != (x1 - x0 + 1, y1 - y0 + 1):
        box = f"{x1 - x0 + 1} x {y1 - y0 + 1}"
        raise MaskError(f"its mask claims {png.width} x {png.height} pixels (width x height), its points {box}")
    if x0 < 0 or y0 < 0 or x1 >= width or y1 >= height:
        raise MaskError(f"its points lie outside the image of {width} x {height} pixels (width x height)")
    return masks.encode(masks.paste(np.asarray(png) != 0, (x0, y0, x1 + 1, y1 + 1), size=size))


def _mask_values(rle: Rle) -> dict[str, Json]:
    found = masks.decode_crop(rle)
    assert found is not None, "an empty mask has no box"
    crop, (x0, y0, x1, y1) = found
    data = io.BytesIO()
    Image.fromarray(crop).save(data, format="PNG")
    return {
        "points": [[float(x0), float(y0)], [float(x1 - 1), float(y1 - 1)]],
        "mask": base64.b64encode(data.getvalue()).decode("ascii"),
    }
