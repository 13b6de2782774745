"""Files of coarse masks: read as samples, written back as the same file with better masks.

A data set knows one file or folder of masks and where its images are. It is read as a stream and holds an index, no
masks; it is written by looking up one outcome at a time. What is not refined comes back byte for byte.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from refinetool.errors import UsageError
from refinetool.records import Outcome, Sample

COCO, COCO_RESULTS, VOC_CLASS, VOC_OBJECT, DAVIS, MASKS = FORMATS = (
    "coco",
    "coco-results",
    "voc-class",
    "voc-object",
    "davis",
    "masks",
)
"""Names to force a format by: COCO instances, COCO results, VOC's SegmentationClass and SegmentationObject, index PNGs
in folders as DAVIS has them, and folders of two-valued PNGs."""


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

    def samples(self) -> Iterator[Sample]:
        """The images in the order of the file, those without masks included; from the start at every call."""

    def write(self, find: Callable[[str], Outcome | None], destination: Path, notes: Mapping[str, object]) -> Written:
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
        images: Folder of the images; None looks in the usual places beside the masks.
        format: One of FORMATS; None finds out.
        sizes: For COCO results, any COCO file that lists the images; None finds images by their number.
        include_crowd: Whether COCO's crowds are refined like single objects.
        need_images: Whether it is an error if no image can be found; masks can be measured without any.

    Raises:
        UsageError: A format that doesn't exist, or one that can't be told from the files.
        DataError: Files that are broken, or that have no images.
    """
    from refinetool.formats import coco, masks_dir, voc
    from refinetool.formats.detection import detect

    name = detect(path) if format is None else format
    if name == COCO:
        return coco.open_coco(path, images=images, include_crowd=include_crowd, need_images=need_images)
    if name == COCO_RESULTS:
        return coco.open_coco_results(
            path, images=images, sizes=sizes, include_crowd=include_crowd, need_images=need_images
        )
    if name == MASKS:
        return masks_dir.open_masks(path, images=images, need_images=need_images)
    if name in FORMATS:
        return voc.open_index_maps(path, format=name, images=images, need_images=need_images)
    raise UsageError(f"there is no format {name!r}; choose one of {', '.join(FORMATS)}.")
