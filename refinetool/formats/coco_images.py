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
from refinetool.formats.image_search import ImageSearch
from refinetool.formats.json_spans import Json
from refinetool.locations import is_remote
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
    """Images listed in the records of a file.

    as_named: Whether images are taken to be where they are named, without looking: it takes long to ask a store for
        every single file.
    """

    records: ImageRecords
    search: ImageSearch
    within: Path | None
    as_named: bool = False

    @property
    def rows(self) -> Mapping[ImageId, int]:
        return self.records.rows

    def entries(self) -> Iterator[ImageEntry]:
        with self.records.path.open("rb") as file:
            for image_id, (start, end) in zip(self.rows, self.records.spans.tolist(), strict=True):
                file.seek(start)
                record = json.loads(file.read(end - start))
                name = image_name(record) or ""
                path = self.search.expected(name) if self.as_named else self.search.locate(name)
                yield ImageEntry(str(image_id), path, _stated_size(record))

    def names(self) -> Iterator[str]:
        """Yield the names of the images in order."""
        with self.records.path.open("rb") as file:
            for start, end in self.records.spans.tolist():
                file.seek(start)
                yield image_name(json.loads(file.read(end - start))) or ""


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
    """Find images in the folder of the request or, without one, in the first of the usual places that has the first
    image by its path, or else any image by the last part of its name.

    Raises:
        DataError: No image of the list exists, and one is needed.
    """
    searches = _searches(annotations, request)
    for search in searches:
        images = ListedImages(records, search, fence(search.folder, request), as_named=is_remote(search.folder))
        first = next(images.names(), None)
        if first is not None and (found := search.direct(first)):
            return _checked(images, found, request)
    for search in searches:
        images = ListedImages(records, search, fence(search.folder, request))
        for name in images.names():
            if found := search.direct(name) or search.by_last_part(name):
                return _checked(images, found, request)
    images = ListedImages(records, searches[0], fence(searches[0].folder, request))
    wanted = next(images.names(), None)
    if wanted is None or not request.need_images:
        return images
    raise DataError(
        f"{annotations}: none of its {len(records.rows)} images is where it was looked for, the first as "
        f"{searches[0].expected(wanted)}; name the folder of the images with --images."
    )


def _searches(annotations: Path, request: Request) -> list[ImageSearch]:
    if request.images is not None:
        return [ImageSearch(existing_folder(request.images))]
    base, split = annotations.absolute().parent, annotations.stem.rpartition("_")[2]
    places = [base / "images", base, base.parent / "images", base.parent / split, base.parent]
    # The folder of the file and the one above may be anything, such as a home, so their sub-folders are not searched.
    return [ImageSearch(place, deep=place not in (base, base.parent)) for place in places]


def _checked(images: ListedImages, found: Path, request: Request) -> ListedImages:
    if request.need_images:  # where all images are links, the user learns it at once
        refuse_link_out(found, images.within)
    return images


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
