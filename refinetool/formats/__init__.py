"""Reads files of coarse masks as samples, and writes the same file with refined masks.

A data set is one file or folder of masks with its images. It is read as a stream and holds only an index in memory, no
masks. It is written by looking up one outcome at a time. Everything that is not refined is written byte for byte.
"""

import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from refinetool.errors import UsageError
from refinetool.locations import check_reachable
from refinetool.settings import MAX_PIXELS, PolygonSettings

if TYPE_CHECKING:
    from refinetool.records import Outcome, Sample

COCO, COCO_RESULTS, VOC_CLASS, VOC_OBJECT, DAVIS, MASKS, YOLO, LABELME, PANOPTIC, CITYSCAPES = (
    "coco",
    "coco-results",
    "voc-class",
    "voc-object",
    "davis",
    "masks",
    "yolo",
    "labelme",
    "coco-panoptic",
    "cityscapes",
)

FORMATS: Mapping[str, str] = {
    COCO: "refinetool.formats.coco:open_coco",
    COCO_RESULTS: "refinetool.formats.coco:open_coco_results",
    VOC_CLASS: "refinetool.formats.voc:open_voc_class",
    VOC_OBJECT: "refinetool.formats.voc:open_voc_object",
    DAVIS: "refinetool.formats.voc:open_davis",
    MASKS: "refinetool.formats.masks_dir:open_masks",
    YOLO: "refinetool.formats.yolo:open_yolo",
    LABELME: "refinetool.formats.labelme:open_labelme",
    PANOPTIC: "refinetool.formats.coco_panoptic:open_panoptic",
    CITYSCAPES: "refinetool.formats.cityscapes:open_cityscapes",
}
"""The function that opens each format, as `module:function(path, request) -> Dataset`: COCO instances, COCO results,
VOC's SegmentationClass and SegmentationObject, index maps in folders as in DAVIS, two-valued masks, YOLO's text files,
LabelMe's JSON files, COCO panoptic, and Cityscapes. To add a format, add a file and a line here; `detection` detects
the format if it is not named."""


@dataclass(frozen=True, slots=True)
class Request:
    """Options for opening a data set.

    images: Folder of the images; None looks in the usual places beside the masks.
    sizes: For COCO results, any COCO file that lists the images; None finds images by their number.
    include_crowd: Whether COCO's crowds are refined like single objects.
    need_images: Whether it is an error if no image is found; masks can be measured without images.
    follow_links: Whether links in the folders of images and masks may lead out of these folders.
    max_pixels: The masks of COCO images that claim more pixels are not decoded.
    polygons: How refined masks are written in place of polygons.
    mask_suffix: What the names of mask files end in, before the suffix, and those of their images do not: `_mask`.
    """

    images: Path | None = None
    sizes: Path | None = None
    include_crowd: bool = False
    need_images: bool = True
    follow_links: bool = False
    max_pixels: int = MAX_PIXELS
    polygons: PolygonSettings = field(default_factory=PolygonSettings)
    mask_suffix: str = ""


@dataclass(frozen=True, slots=True)
class Written:
    """Result of `Dataset.write`: the path, the number of replaced masks, and remarks on how they were written."""

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
        """Yield the images in the order of the file, including those without masks; each call starts from the first."""

    def image_paths(self) -> Iterator[Path]:
        """Yield where the images are expected, without reading masks."""

    def remarks(self) -> tuple[str, ...]:
        """Sentences about what a user may have expected to be read and was not."""

    def write(self, find: "Callable[[str], Outcome | None]", destination: Path, notes: Mapping[str, object]) -> Written:
        """Write the same file with refined masks; it appears at `destination` only when it is complete.

        Args:
            find: Returns the outcome for the key of a sample, None if the sample is unchanged. Called once per sample.
            destination: A new file or folder, like the input; parent folders are created.
            notes: Written to `info` of a COCO file under `refinetool`, unless empty.

        Raises:
            UsageError: The output would overwrite the input.
            StorageError: The disk is full, permissions are missing, or a folder exists.
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
    follow_links: bool = False,
    max_pixels: int = MAX_PIXELS,
    polygons: PolygonSettings | None = None,
    mask_suffix: str = "",
) -> Dataset:
    """Open coarse masks.

    Args:
        path: A COCO JSON file, a VOC root, a folder of masks, or a single mask.
        format: One of FORMATS; None detects it.
        images, sizes, include_crowd, need_images, follow_links, max_pixels, polygons, mask_suffix: See
            `Request`.

    Raises:
        UsageError: The format does not exist, or can't be detected from the files, or a store can't be used.
        DataError: Files are broken, or have no images.
    """
    for given in (path, images, sizes):
        check_reachable(given)
    if format is None:
        from refinetool.formats.detection import detect

        format = detect(path, follow_links=follow_links, ending=mask_suffix)
    if format not in FORMATS:
        raise UsageError(f"there is no format {format!r}; choose one of {', '.join(FORMATS)}.")
    opener: Callable[[Path, Request], Dataset] = pkgutil.resolve_name(FORMATS[format])
    drawn = PolygonSettings() if polygons is None else polygons
    return opener(
        path, Request(images, sizes, include_crowd, need_images, follow_links, max_pixels, drawn, mask_suffix)
    )
