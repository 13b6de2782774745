"""Data sets with one text file of outlines per image, as of YOLO and LabelMe."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from refinetool.errors import DataError, ImageError
from refinetool.formats import Written
from refinetool.formats.coco_masks import PolygonCount
from refinetool.formats.storage import new_file, new_folder, refuse_clashes
from refinetool.images import leads_out, turned_size
from refinetool.records import Outcome, Region, Sample, Size
from refinetool.statuses import Reason


class Codec(Protocol):
    """Reads and changes the file of one image."""

    def read(self, file: Path, size: Size) -> tuple[Size, tuple[Region, ...]]:
        """Return the size (H, W) that a file states for its image, or else the given one of the image; and the regions
        in the file, in its order. Raises DataError for a broken one.
        """

    def rewritten(self, file: Path, size: Size, outcome: Outcome, count: PolygonCount) -> bytes:
        """Return the file with the refined regions of an outcome, and count how they were drawn."""


@dataclass(frozen=True, slots=True)
class LabelFiles:
    """Label files and their images; see `formats.Dataset`.

    root: The path that the user named, a file or a folder; outputs keep the paths within it.
    files: The label files by the key of their sample.
    copied: Other files that belong to the data set.
    image: Returns the path of an image by the key of its sample; it may not exist.
    within: The folder that links among the images must not lead out of; None if they may.
    """

    format: str
    root: Path
    files: Mapping[str, Path]
    copied: tuple[Path, ...]
    image: Callable[[str], Path]
    within: Path | None
    codec: Codec

    def __len__(self) -> int:
        return len(self.files)

    def image_paths(self) -> Iterator[Path]:
        return map(self.image, self.files)

    def remarks(self) -> tuple[str, ...]:
        return ()

    def samples(self) -> Iterator[Sample]:
        for key, file in self.files.items():
            image = self.image(key)
            size, missing = self._size(image)
            try:
                size, regions = self.codec.read(file, size)
            except DataError as error:
                regions = (Region(0, None, None, Reason.UNREADABLE_MASK, fault=str(error)),)
            if missing is not None:
                regions = tuple(Region(region.id, region.category, None, missing) for region in regions)
            yield Sample(key, image, size, regions, within=self.within)

    def write(self, find: Callable[[str], Outcome | None], destination: Path, notes: Mapping[str, object]) -> Written:
        """See `formats.Dataset`; these files have no place for notes."""
        del notes
        refuse_clashes({"output": destination}, {"input": self.root})
        count, changed = PolygonCount(), 0

        def content(key: str) -> bytes:
            nonlocal changed
            outcome = find(key)
            refined = sum(annotation.refined for annotation in outcome.annotations) if outcome else 0
            changed += refined
            file = self.files[key]
            if outcome is None or not refined:
                return file.read_bytes()
            return self.codec.rewritten(file, self._size(self.image(key))[0], outcome, count)

        if self.root.is_file() and not self.copied:
            with new_file(destination) as out:
                out.write(content(*self.files))
        else:
            with new_folder(destination) as partial:
                for file in self.copied:
                    self._place(partial, file)
                    shutil.copyfile(file, self._place(partial, file))
                for key, file in self.files.items():
                    self._place(partial, file).write_bytes(content(key))
        return Written(destination, changed, count.remarks())

    def _place(self, folder: Path, file: Path) -> Path:
        target = folder / file.relative_to(self.root)
        target.parent.mkdir(parents=True, exist_ok=True)
        return target

    def _size(self, image: Path) -> tuple[Size, Reason | None]:
        """Return (H, W) of an upright image, or (0, 0) and why it is not known."""
        if leads_out(image, self.within):
            return (0, 0), Reason.IMAGE_OUTSIDE
        try:
            return turned_size(image), None
        except ImageError as error:
            return (0, 0), error.reason
