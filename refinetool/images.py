"""Reads images as RGB with Pillow, in the orientation of the annotations.

Pillow also decodes JPEG here: the pixels equal OpenCV's, a 640 x 480 image takes 1.3 ms instead of 1.1 ms, and libjpeg
does not write to stderr when a file is damaged.
"""

import io
import os
from pathlib import Path
from threading import Lock
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from refinetool.errors import ImageError
from refinetool.records import ImageArray, Sample, Size
from refinetool.statuses import Reason

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "JPEG2000", "AVIF", "TGA")
"""Supported raster formats. Pillow's other formats are not for photographs, and some start external programs."""

EXIF_ORIENTATION = 0x0112
QUARTER_TURNS = {
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The EXIF orientations that swap width and height, and the transformations that put the image upright."""

_pillow_limit = Lock()


def read_sample(sample: Sample, *, max_pixels: int) -> ImageArray:
    """Read the image of a sample as `read_image` does, unless it is a link that leads out of its folder.

    Raises:
        ImageError: As `read_image`, or with the reason `image-outside`.
    """
    if leads_out(sample.image, sample.within):
        raise ImageError(
            f"{sample.image}: the image is a link that leads out of the folder {sample.within}; --follow-links allows "
            "that, if you trust the data.",
            reason=Reason.IMAGE_OUTSIDE,
        )
    return read_image(sample.image, size=sample.size, max_pixels=max_pixels)


def leads_out(path: Path, within: Path | None) -> bool:
    """Whether a path lies outside a resolved folder once its links are followed; False if the folder is None."""
    return within is not None and not Path(os.path.realpath(path)).is_relative_to(within)


def read_image(path: Path, *, size: Size, max_pixels: int) -> ImageArray:
    """Read the image of a set of annotations.

    Pixels are used as stored if their size is the annotated size, whatever the EXIF orientation is. If only the rotated
    image has that size, it is rotated. Alpha is dropped, of 16 bits the upper 8 are used, of several frames the first.

    Args:
        size: (H, W) according to the annotations.
        max_pixels: Images that claim more pixels are refused before they are decoded.

    Returns:
        uint8 (H, W, 3) RGB.

    Raises:
        ImageError: With the reason `image-missing`, `image-unreadable`, `image-too-large` or `size-mismatch`.
    """
    image = _opened(path)
    if image.width * image.height > max_pixels:
        raise ImageError(
            f"{path}: the image claims {_shown(image.size)} pixels, more than the {max_pixels:,} that are read; "
            "shrink it, or raise the limit.",
            reason=Reason.IMAGE_TOO_LARGE,
        )
    turn = _turn_to(image, path=path, size=size)
    try:
        pixels = as_rgb(image)
        return np.array(pixels if turn is None else pixels.transpose(turn))  # a copy: asarray's is read-only
    except Exception as error:
        raise _unreadable(path, error) from error


def turned_size(path: Path) -> Size:
    """Return (H, W) of an image file after rotation by its EXIF orientation; raises ImageError if it can't be read."""
    image = _opened(path)
    try:
        turned = image.getexif().get(EXIF_ORIENTATION, 1) in QUARTER_TURNS
    except Exception as error:
        raise _unreadable(path, error) from error
    return (image.width, image.height) if turned else (image.height, image.width)


def _opened(path: Path) -> Image.Image:
    """Parse the header of an image; its pixels are decoded later, on first access."""
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise ImageError(
            f"{path}: there is no such image; check the image folder and the file names.", reason=Reason.IMAGE_MISSING
        ) from error
    except Exception as error:  # on a disk an OSError; each store has exceptions of its own
        raise _unreadable(path, error) from error
    try:
        return open_lazily(io.BytesIO(data))
    except Exception as error:
        raise _unreadable(path, error) from error


def open_lazily(file: BinaryIO) -> Image.Image:
    """Parse the header of an image, of any size, in one of FORMATS; raises what Pillow raises."""
    # Pillow's own limit is global and warns from half of the limit on; our callers have their own.
    with _pillow_limit:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(file, formats=FORMATS)
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _turn_to(image: Image.Image, *, path: Path, size: Size) -> Image.Transpose | None:
    """Return the rotation that gives the image the annotated size; None if it already has that size."""
    height, width = size
    if image.size == (width, height):
        return None
    if image.size == (height, width):
        try:
            turn = QUARTER_TURNS.get(image.getexif().get(EXIF_ORIENTATION, 1))
        except Exception as error:
            raise _unreadable(path, error) from error
        if turn is not None:
            return turn
    raise ImageError(
        f"{path}: the image measures {_shown(image.size)} pixels (width x height), its annotations say "
        f"{_shown((width, height))}; correct the record, or put the annotated image in its place.",
        reason=Reason.SIZE_MISMATCH,
    )


def as_rgb(image: Image.Image) -> Image.Image:
    """Convert an image of any mode to RGB; raises what Pillow raises, and ValueError for numbers of 32 bits."""
    image.load()
    if image.mode.startswith("I"):  # 16 bits: `I;16` and its byte orders, or `I` where a reader widens the values
        values = np.asarray(image)
        if values.min() < 0 or values.max() > np.iinfo(np.uint16).max:
            raise ValueError("its pixels have 32 bits, expected 8 or 16")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, expected 8 or 16 bits")
    image.info.pop("transparency", None)  # or Pillow warns that it drops it
    return image.convert("RGB")


def _unreadable(path: Path, error: Exception) -> ImageError:
    # The decoders of a dozen formats raise all kinds of exceptions; all of them mean a broken file.
    detail = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
    if isinstance(error, UnidentifiedImageError):
        detail = "it is not an image of a known format"
    return ImageError(f"{path}: the image can't be read ({detail}); replace the file.", reason=Reason.IMAGE_UNREADABLE)


def _shown(size: tuple[int, int]) -> str:
    return f"{size[0]:,} x {size[1]:,}"
