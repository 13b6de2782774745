"""Reads and writes folders of two-valued masks, one object each: 0 and 255 (or any other second value).

`bear/00001.png` belongs to the image `bear/00001.jpg`; if there is none, to `bear.jpg`, which then has one object per
PNG in the folder `bear`. Grey masks with soft edges are thresholded at 128 and written as 0 and 255. Size, bit depth,
palette and metadata stay; a mask that was not refined is copied. Only masks are written, no other files.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from refinetool import masks
from refinetool.errors import MaskError
from refinetool.formats import DAVIS, MASKS, VOC_CLASS, VOC_OBJECT, Request, Written
from refinetool.formats.folders import MaskFolder, find_images, folder_of
from refinetool.formats.png import mostly_black_and_white
from refinetool.formats.rasters import Values, has_colours, read_values, with_values
from refinetool.records import Mask, Outcome, Region, Rle, Sample, Size
from refinetool.statuses import Reason

SOFT_THRESHOLD = 128
"""Grey values above this are mask."""


def open_masks(path: Path, request: Request) -> "BinaryMasks":
    """Open a folder of two-valued masks, or a single one.

    Raises:
        DataError: There are no masks, or no images although they are needed.
    """
    source = find_images(path, folder_of(path), request)
    members: dict[str, list[Path]] = {}
    for file in source.files:
        own = source.stem(file)
        folder = own.rpartition("/")[0]
        shared = own not in source.images and folder in source.images
        members.setdefault(folder if shared else own, []).append(file)
    return BinaryMasks(source, {key: tuple(files) for key, files in members.items()})


@dataclass(frozen=True, slots=True)
class BinaryMasks:
    """One object per PNG; see `formats.Dataset`. The regions of a sample are its PNGs, numbered from 0 by name."""

    source: MaskFolder
    members: Mapping[str, tuple[Path, ...]]

    @property
    def format(self) -> str:
        return MASKS

    def __len__(self) -> int:
        return len(self.members)

    def image_paths(self) -> Iterator[Path]:
        return map(self.source.image, self.members)

    def remarks(self) -> tuple[str, ...]:
        return self.source.remarks()

    def samples(self) -> Iterator[Sample]:
        for key, files in self.members.items():
            found = [_read(file) for file in files]
            size = next((each.size for each in found if isinstance(each, Rle)), None)
            regions = tuple(
                _region(number, file, each, size) for number, (file, each) in enumerate(zip(files, found, strict=True))
            )
            image = self.source.image(key)
            yield Sample(key, image, size or self.source.image_size(key), regions, within=self.source.within)

    def write(self, find: Callable[[str], Outcome | None], destination: Path, notes: Mapping[str, object]) -> Written:
        """See `formats.Dataset`; a PNG has no place for notes."""
        del notes
        keys = {file: (key, number) for key, files in self.members.items() for number, file in enumerate(files)}
        changed = hardened = 0
        last: tuple[str, Outcome | None] = ("", None)

        def rewrite(file: Path) -> bytes | None:
            nonlocal changed, hardened, last
            key, number = keys[file]
            if last[0] != key:
                last = key, find(key)
            outcome = last[1]
            annotation = outcome.annotations[number] if outcome else None
            if annotation is None or not annotation.refined or annotation.mask is None:
                return None
            values = read_values(file)
            _, high, soft = two_valued(file, values)
            changed += 1
            hardened += soft
            return with_values(file, masks.decode(annotation.mask) * np.uint8(high))

        self.source.write(rewrite, destination)
        remark = f"Masks with soft edges, taken at more than {SOFT_THRESHOLD} and written as 0 and 255: {hardened}."
        return Written(destination, changed, (remark,) if hardened else ())


def two_valued(path: Path, values: Values) -> tuple[Mask, int, bool]:
    """Separate the object from the background.

    Returns:
        The mask, bool (H, W); its value; and whether it had to be thresholded.

    Raises:
        MaskError: There are several values, which are numbers of objects or classes and not a soft edge.
    """
    present = np.unique(values)
    others = present[present > 0]
    if others.size <= 1:
        return values > 0, int(others[0]) if others.size else 255, False
    if has_colours(path) or not mostly_black_and_white(np.bincount(values.ravel(), minlength=256)):
        raise MaskError(
            f"{path}: holds the values {', '.join(map(str, present[:8]))} ...; expected two. If they number classes or "
            f"objects, name the format {VOC_CLASS}, {VOC_OBJECT} or {DAVIS}."
        )
    return values > SOFT_THRESHOLD, 255, True


def _read(file: Path) -> Rle | MaskError:
    try:
        mask, _, _ = two_valued(file, read_values(file))
    except MaskError as error:
        return error
    return masks.encode(mask)


def _region(number: int, file: Path, found: Rle | MaskError, size: Size | None) -> Region:
    """Return the region of a mask that was read, or could not be; `size` is that of the first mask of its image."""
    if isinstance(found, MaskError):
        return Region(number, None, None, Reason.UNREADABLE_MASK, fault=str(found))
    if size is not None and found.size != size:
        measures, first = (f"{width} x {height}" for height, width in (found.size, size))
        fault = f"{file}: measures {measures} pixels (width x height), the first mask of its image {first}."
        return Region(number, None, None, Reason.SIZE_MISMATCH, fault=str(MaskError(fault)))
    return Region(number, None, found, None if masks.area(found) else Reason.EMPTY)
