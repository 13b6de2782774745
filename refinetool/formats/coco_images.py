"""Finds the images of COCO records: images listed in a file, or images known only by number."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from refinetool.errors import DataError
from refinetool.formats import Request
from refinetool.formats.coco_index import ImageId, ImageRecords, image_name
from refinetool.formats.image_files import by_stem, existing_folder, fault_of_name, fence, refuse_link_out
from refinetool.formats.json_spans import Json
from refinetool.records import Size


@dataclass(frozen=True, slots=True)
class ImageEntry:
    """One image: its id as text, its expected path, and (H, W) if the records have it."""

    key: str
    path: Path
    size: Size | None


class CocoImages(Protocol):
    """The images of a COCO file, in order."""

    @property
    def within(self) -> Path | None:
        """The folder that links in the image folder must not lead out of; None if they may."""

    @property
    def rows(self) -> Mapping[ImageId, int]:
        """The index of each image id."""

    def entries(self) -> Iterator[ImageEntry]:
        """Yield the images in order; listed images are read from the file one by one."""


@dataclass(frozen=True, slots=True)
class ListedImages:
    """Images listed in the records of a file."""

    records: ImageRecords
    folder: Path
    within: Path | None

    @property
    def rows(self) -> Mapping[ImageId, int]:
        return self.records.rows

    def entries(self) -> Iterator[ImageEntry]:
        with self.records.path.open("rb") as file:
            for image_id, (start, end) in zip(self.rows, self.records.spans.tolist(), strict=True):
                file.seek(start)
                record = json.loads(file.read(end - start))
                yield ImageEntry(str(image_id), self._locate(record), _stated_size(record))

    def _locate(self, record: Mapping[str, Json]) -> Path:
        path = self.folder / (image_name(record) or "")
        # The name derived from an LVIS URL begins with a folder, which may not exist.
        return path if "file_name" in record or path.is_file() else self.folder / path.name


@dataclass(frozen=True, slots=True)
class NumberedImages:
    """Images known only by id, found as `42.jpg`, `000000000042.jpg` or `COCO_val2014_000000000042.jpg`."""

    ids: Sequence[ImageId]
    folder: Path
    within: Path | None

    @property
    def rows(self) -> Mapping[ImageId, int]:
        return {image_id: row for row, image_id in enumerate(self.ids)}

    def entries(self) -> Iterator[ImageEntry]:
        names = by_stem(self.folder)
        ends = {re.split("[/_]", name)[-1]: path for name, path in names.items()}
        numbers = {int(digits): path for digits, path in ends.items() if digits.isdecimal()}
        for image_id in self.ids:
            key = str(image_id)
            found = names.get(key) or (numbers.get(int(key)) if key.isdecimal() else None)
            yield ImageEntry(key, found or self.folder / f"{key}.jpg", None)


def listed_images(records: ImageRecords, annotations: Path, request: Request) -> ListedImages:
    """Find images in the folder of the request or, without one, in the first of the usual places that has one of them.

    Raises:
        DataError: No image of the list exists, and one is needed.
    """
    folder = request.images
    if folder is not None:
        places = [existing_folder(folder)]
    else:
        base, split = annotations.absolute().parent, annotations.stem.rpartition("_")[2]
        places = [base / "images", base, base.parent / "images", base.parent / split, base.parent]
    wanted = None
    for place in places:
        images = ListedImages(records, place, fence(place, request))
        for entry in images.entries():
            wanted = wanted or entry.path
            if entry.path.is_file():
                if request.need_images:  # where all images are links, the user learns it at once
                    refuse_link_out(entry.path, images.within)
                return images
            if folder is None:
                break  # in a place that the user did not name, only the first image is tried
    if wanted is None or not request.need_images:
        return ListedImages(records, places[0], fence(places[0], request))
    raise DataError(
        f"{annotations}: none of its {len(records.rows)} images is where it was looked for, the first as {wanted}; "
        "name the folder of the images with --images."
    )


def numbered_images(ids: Sequence[ImageId], annotations: Path, request: Request) -> NumberedImages:
    """Find images by number, in the folder of the request or beside the annotations.

    Raises:
        DataError: Needed images are missing, or an id, which becomes a file name, leads out of the folder.
    """
    for image_id in ids:
        if fault := fault_of_name(f"{image_id}.jpg"):
            raise DataError(f"{annotations}: the image id {image_id!r} is also a file name, which {fault}.")
    folder, beside = request.images, annotations.absolute().parent
    if folder is None:
        folder = beside / "images" if (beside / "images").is_dir() else beside
    images = NumberedImages(ids, existing_folder(folder), fence(folder, request))
    if request.need_images and ids and not any(entry.path.is_file() for entry in images.entries()):
        raise DataError(
            f"{annotations}: results name images by number ({ids[0]!r} ...), and {folder} has none of them; name a "
            "COCO file that lists the images with --sizes, or the folder of the images with --images."
        )
    return images


def _stated_size(record: Mapping[str, Json]) -> Size | None:
    height, width = record.get("height"), record.get("width")
    return (int(height), int(width)) if isinstance(height, int | float) and isinstance(width, int | float) else None
