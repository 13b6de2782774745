"""Reads HQSeg-44K, the training data of HQ-SAM and SAM2Refiner, in the folders in which HQ-SAM expects it.

Six sets for training and four for measuring, all of one object per image, with a grey mask of the same name. Sets
that are not there are left out.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from refinetool.errors import DataError
from refinetool.images import read_image
from refinetool.train.data.objects import large_ones
from refinetool.train.data.pictures import AnnotatedPicture, SourcePicture

OBJECT = 128
"""Grey value from which a pixel belongs to the object."""
TRAINING = (
    ("DIS5K/DIS-TR/im", "DIS5K/DIS-TR/gt"),
    ("thin_object_detection/ThinObject5K/images_train", "thin_object_detection/ThinObject5K/masks_train"),
    *(
        (f"cascade_psp/{name}", f"cascade_psp/{name}")
        for name in ("fss_all", "DUTS-TR", "DUTS-TE", "ecssd", "MSRA_10K")
    ),
)
MEASURING = (
    ("DIS5K/DIS-VD/im", "DIS5K/DIS-VD/gt"),
    ("thin_object_detection/COIFT/images", "thin_object_detection/COIFT/masks"),
    ("thin_object_detection/HRSOD/images", "thin_object_detection/HRSOD/masks_max255"),
    ("thin_object_detection/ThinObject5K/images_test", "thin_object_detection/ThinObject5K/masks_test"),
)
"""Folders of images (JPEG) and masks (PNG), relative to the root."""


def is_hqseg(root: Path) -> bool:
    """Whether a folder holds any of the sets."""
    return any((root / images).is_dir() for images, _ in (*TRAINING, *MEASURING))


def list_hqseg(root: Path, *, max_pixels: int, min_object_px: int) -> list[SourcePicture]:
    """List the images of the sets that are there.

    Raises:
        DataError: An image has no mask.
    """
    read = partial(_read, max_pixels=max_pixels, min_object_px=min_object_px)
    return [
        picture
        for folders, validation in ((TRAINING, False), (MEASURING, True))
        for images, masks in folders
        for picture in _of_set(root / images, root / masks, read, validation=validation)
    ]


def _of_set(
    images: Path, masks: Path, read: Callable[[Path, Path], AnnotatedPicture], *, validation: bool
) -> Iterator[SourcePicture]:
    found = sorted(path for path in images.iterdir() if path.suffix.lower() == ".jpg") if images.is_dir() else []
    for image in found:
        mask = masks / f"{image.stem}.png"
        if not mask.is_file():
            raise DataError(f"{image} has no mask; expected {mask}, or the image left out.")
        yield SourcePicture(f"{images.parent.name}/{images.name}/{image.stem}", validation, partial(read, image, mask))


def _read(image: Path, mask: Path, *, max_pixels: int, min_object_px: int) -> AnnotatedPicture:
    try:
        with Image.open(mask) as picture:
            grey = np.asarray(picture.convert("L"))
    except (OSError, UnidentifiedImageError) as error:
        raise DataError(f"{mask}: the mask can't be read ({error}); replace the file.") from error
    pixels = read_image(image, size=(grey.shape[0], grey.shape[1]), max_pixels=max_pixels)
    return AnnotatedPicture(pixels, large_ones((grey >= OBJECT,), min_px=min_object_px), np.zeros(grey.shape, np.bool_))
