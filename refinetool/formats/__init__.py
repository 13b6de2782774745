"""Files of coarse masks: read as samples, written back as the same file with better masks.

A data set knows one file or folder of masks and where its images are. It is read as a stream and holds an index, no
masks; it is written by looking up one outcome at a time. What is not refined comes back byte for byte.
"""

import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from refinetool.errors import UsageError

if TYPE_CHECKING:
    from refinetool.records import Outcome, Sample

COCO, COCO_RESULTS, VOC_CLASS, VOC_OBJECT, DAVIS, MASKS = (
    "coco",
    "coco-results",
    "voc-class",
    "voc-object",
    "davis",
    "masks",
)

FORMATS: Mapping[str, str] = {
    COCO: "refinetool.formats.coco:open_coco",
    COCO_RESULTS: "refinetool.formats.coco:open_coco_results",
    VOC_CLASS: "refinetool.formats.voc:open_voc_class",
    VOC_OBJECT: "refinetool.formats.voc:open_voc_object",
    DAVIS: "refinetool.formats.voc:open_davis",
    MASKS: "refinetool.formats.masks_dir:open_masks",
}
"""What opens a file or folder of each format, as `module:function(path, request) -> Dataset`: COCO instances, COCO
results, VOC's SegmentationClass and SegmentationObject, index PNGs in folders as DAVIS has them, and folders of
two-valued PNGs. A new format is a file and a line here; `detection` tells those apart that nobody names."""


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked of a data set beside its path.

    images: Folder of the images; None looks in the usual places beside the masks.
    sizes: For COCO results, any COCO file that lists the images; None finds images by their number.
    include_crowd: Whether COCO's crowds are refined like single objects.
    need_images: Whether it is an error if no image can be found; masks can be measured without any.
    """

    images: Path | None = None
    sizes: Path | None = None
    include_crowd: bool = False
    need_images: bool = True


@dataclass(frozen=True, slots=True)
class Written:
    """What `Dataset.write` did: where, how many masks it replaced, and what the user should know."""

    path: Path
    changed: int
    notes: tuple[str, ...]


class Dataset(Protocol):
    """Coarse masks in one file or folder, and the images they belong to."""

    @property
    def format(self) -> str:
        """One of FORMATS."""

    def __len__(self) -> int:
        """Number of images."""

    def samples(self) -> "Iterator[Sample]":
        """The images in the order of the file, those without masks included; from the start at every call."""

    def write(self, find: "Callable[[str], Outcome | None]", destination: Path, notes: Mapping[str, object]) -> Written:
        """Write the same file with refined masks; it appears at `destination` when it is complete.

        Args:
            find: The outcome for the key of a sample, None where it is to stay as it was. Asked once per sample.
            destination: A new file or folder, like the input; parents are made.
            notes: Goes into `info` of a COCO file under `refinetool`, where there is something to note.

        Raises:
            UsageError: The output would overwrite the input.
            StorageError: A full disk, missing permission, an existing folder.
            DataError: The input has changed since it was opened.
        """


def open_dataset(
    path: Path,
    *,
    images: Path | None = None,
    format: str | None = None,
    sizes: Path | None = None,
    include_crowd: bool = False,
    need_images: bool = True,
) -> Dataset:
    """Open coarse masks.

    Args:
        path: A COCO JSON file, a VOC root, or a folder of PNGs.
        format: One of FORMATS; None finds out.
        images, sizes, include_crowd, need_images: See `Request`.

    Raises:
        UsageError: A format that doesn't exist, or one that can't be told from the files.
        DataError: Files that are broken, or that have no images.
    """
    if format is None:
        from refinetool.formats.detection import detect

        format = detect(path)
    if format not in FORMATS:
        raise UsageError(f"there is no format {format!r}; choose one of {', '.join(FORMATS)}.")
    opener: Callable[[Path, Request], Dataset] = pkgutil.resolve_name(FORMATS[format])
    return opener(path, Request(images, sizes, include_crowd, need_images))
