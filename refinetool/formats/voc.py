"""Reads and writes index maps: one map per image, whose values are classes (VOC's SegmentationClass) or objects
(SegmentationObject, DAVIS).

0 is background and 255 is void. In the output, a pixel is

- 255 if it was 255;
- else the value of the region that covers it in the outcome. A refined region has its new mask. Any other region has
  the pixels that had its value, and keeps them even where a refined region covers them;
- else 0.

Size, palette, bit depth and metadata stay; a map in which nothing was refined is copied. Only masks are written;
images, XML files and lists are not copied.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from refinetool import masks
from refinetool.errors import DataError, MaskError, UsageError
from refinetool.formats import DAVIS, VOC_CLASS, VOC_OBJECT, Request, Written
from refinetool.formats.folders import MaskFolder, find_images, folder_of
from refinetool.formats.rasters import ColourTable, Values, read_label_map, read_values, with_values
from refinetool.records import VOID, Layout, Outcome, Region, Sample
from refinetool.statuses import Reason

BACKGROUND = 0


_FOLDERS = {VOC_CLASS: "SegmentationClass", VOC_OBJECT: "SegmentationObject"}


def open_voc_class(path: Path, request: Request) -> "IndexMaps":
    """Open class maps of a VOC data set or any folder. Raises DataError without masks, or without images if needed."""
    return _open(
        path,
        request,
        format=VOC_CLASS,
        layout="semantic",
        folder=(folder := _voc_folder(path, VOC_CLASS)),
        colours=_label_map(path, folder),
    )


def open_voc_object(path: Path, request: Request) -> "IndexMaps":
    """Open object maps of a VOC data set or any folder, with the same errors."""
    return _open(path, request, format=VOC_OBJECT, layout="indexed", folder=_voc_folder(path, VOC_OBJECT))


def open_davis(path: Path, request: Request) -> "IndexMaps":
    """Open index PNGs in folders, one per clip, with the same errors."""
    return _open(path, request, format=DAVIS, layout="indexed", folder=clips_folder(folder_of(path)))


def _voc_folder(path: Path, format: str) -> Path:
    """Return the folder of the maps in a VOC data set, or the path itself if it is no VOC data set."""
    inner = folder_of(path) / _FOLDERS[format]
    if inner.is_dir():
        return inner
    for other, name in _FOLDERS.items():
        if (path / name).is_dir():
            raise DataError(f"{path}: has no folder {inner.name}, only {name}; name the format {other}.")
    return folder_of(path)


def _label_map(path: Path, folder: Path) -> ColourTable | None:
    """Return the colours of classes, from the `labelmap.txt` of CVAT and Datumaro; None if there is none."""
    for place in (path, folder, folder.parent):
        if (place / "labelmap.txt").is_file():
            return read_label_map(place / "labelmap.txt")
    return None


def clips_folder(path: Path) -> Path:
    """Return the folder of the clips in a data set like DAVIS, or the path itself if it is no such data set.

    Clips are in `Annotations`, or in folders for resolutions within it.

    Raises:
        UsageError: There are several resolutions.
    """
    annotations = path / "Annotations"
    if not annotations.is_dir():
        return path
    if any(annotations.glob("*/*.png")):
        return annotations
    found = [folder for folder in sorted(annotations.iterdir()) if any(folder.glob("*/*.png"))]
    if len(found) > 1:
        names = ", ".join(folder.name for folder in found)
        raise UsageError(f"{path}: has masks of several resolutions ({names}); name one of the folders, as {found[0]}.")
    return found[0] if found else path


def _open(
    path: Path, request: Request, *, format: str, layout: Layout, folder: Path, colours: ColourTable | None = None
) -> "IndexMaps":
    """Open index maps in a folder, which is the path or within it, or a single one in it."""
    return IndexMaps(format, layout, find_images(path, folder, request), colours)


@dataclass(frozen=True, slots=True)
class IndexMaps:
    """One map per image; see `formats.Dataset`. The regions of a sample are its values in ascending order.

    colours: The colours of values where pixels are colours; None for those of VOC.
    """

    format: str
    layout: Layout
    source: MaskFolder
    colours: ColourTable | None = None

    def __len__(self) -> int:
        return len(self.source.files)

    def image_paths(self) -> Iterator[Path]:
        return (self.source.image(self.source.stem(file)) for file in self.source.files)

    def remarks(self) -> tuple[str, ...]:
        return self.source.remarks()

    def samples(self) -> Iterator[Sample]:
        for file in self.source.files:
            key = self.source.stem(file)
            yield self._sample(key, file)

    def _sample(self, key: str, file: Path) -> Sample:
        image, within = self.source.image(key), self.source.within
        try:
            values = read_values(file, colours=self.colours)
        except MaskError as error:
            unreadable = Region(BACKGROUND, None, None, Reason.UNREADABLE_MASK, fault=str(error))
            return Sample(key, image, self.source.image_size(key), (unreadable,), self.layout, within=within)
        regions = (
            Region(value, value if self.layout == "semantic" else None, masks.encode(values == value))
            for value in _region_values(values)
        )
        void = values == VOID
        height, width = values.shape
        ignored = masks.encode(void) if void.any() else None
        return Sample(key, image, (height, width), tuple(regions), self.layout, ignored, within)

    def write(self, find: Callable[[str], Outcome | None], destination: Path, notes: Mapping[str, object]) -> Written:
        """See `formats.Dataset`; a PNG has no place for notes."""
        del notes
        changed = 0

        def rewrite(file: Path) -> bytes | None:
            nonlocal changed
            outcome = find(self.source.stem(file))
            refined = sum(annotation.refined for annotation in outcome.annotations) if outcome else 0
            changed += refined
            return self._rewritten(file, outcome) if outcome and refined else None

        self.source.write(rewrite, destination)
        return Written(destination, changed, ())

    def _rewritten(self, file: Path, outcome: Outcome) -> bytes:
        new = painted(read_values(file, colours=self.colours), outcome, file=file)
        return with_values(file, new, colours=self.colours)


def painted(old: Values, outcome: Outcome, *, file: Path) -> Values:
    """Return a map with its refined regions, uint8 (H, W), by the rules at the top of this module."""
    regions = _region_values(old)
    if len(regions) != len(outcome.annotations):
        raise DataError(f"{file}: has changed since it was read; run the command again.")
    new = np.zeros_like(old)
    kept = [VOID]
    for value, annotation in zip(regions, outcome.annotations, strict=True):
        if annotation.refined and annotation.mask is not None:
            new[masks.decode(annotation.mask)] = value
        else:
            kept.append(value)
    return np.where(np.isin(old, kept), old, new)


def _region_values(values: Values) -> list[int]:
    counts = np.bincount(values.ravel(), minlength=256)
    counts[[BACKGROUND, VOID]] = 0
    return np.flatnonzero(counts).tolist()
