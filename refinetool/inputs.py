"""What users of the library hand over: images and masks as arrays, PIL images, paths or torch tensors; settings."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from refinetool import masks
from refinetool.errors import DataError, UsageError
from refinetool.images import as_rgb, read_image, turned_size
from refinetool.records import ImageArray, Masks, Size
from refinetool.settings import RefineSettings

ImageLike: TypeAlias = "NDArray[Any] | Image.Image | Path | str | Any"
"""uint8 (H, W, 3) RGB, a PIL image, a path, or a torch tensor, uint8 (3, H, W) or (H, W, 3)."""
MasksLike: TypeAlias = "NDArray[Any] | Image.Image | Sequence[Any] | Any"
"""(N, H, W) or (H, W), bool, 0/1 or 0/255: an array, a torch tensor, a PIL image, or a sequence of these."""

_EXPECTED = (
    "expected uint8 (H, W, 3) in RGB order, a PIL image, a path, or a torch tensor, uint8 (3, H, W) or (H, W, 3)"
)


def check_finite(settings: Mapping[str, Any], *, group: str = "") -> None:
    """Raise UsageError if a number among nested settings is infinite or NaN: no step expects it, and JSON has none."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            check_finite(value, group=f"{group}{name}.")
        elif isinstance(value, float) and not math.isfinite(value):
            raise UsageError(
                f"the setting {group}{name} is {value}; expected a finite number, such as 1e9 for no bound"
            )


def check_settings(settings: RefineSettings) -> None:
    """Raise UsageError for settings with which no mask can be refined."""
    check_finite(asdict(settings))
    if settings.passes < 1:
        raise UsageError(f"the number of passes is {settings.passes}; expected at least 1")
    prompts = settings.prompts
    if not (prompts.use_point or prompts.use_negative or prompts.use_box or prompts.use_mask):
        raise UsageError("no prompt is left for the model; keep at least one of point, negative point, box and mask")


def as_image(image: ImageLike, *, size: Size | None, max_pixels: int) -> ImageArray:
    """Convert an image to uint8 (H, W, 3) RGB.

    Args:
        size: (H, W) of the masks. A file is rotated by its EXIF orientation only if it has this size then, a PIL image
            never.
        max_pixels: Files that claim more pixels are refused.

    Raises:
        DataError: It is no such image.
        ImageError: The file can't be read.
    """
    if isinstance(image, str | Path):
        path = Path(image)
        return read_image(path, size=size or turned_size(path), max_pixels=max_pixels)
    if isinstance(image, Image.Image):
        try:
            return np.array(as_rgb(image.copy()))
        except Exception as error:
            raise DataError(f"the image can't be converted to RGB ({error}); {_EXPECTED}") from error
    array = _array(image)
    if array is None:
        raise DataError(f"the image is a {type(image).__name__}; {_EXPECTED}")
    from_torch = not isinstance(image, np.ndarray)
    if from_torch and array.ndim == 3 and array.shape[0] == 3 and array.shape[2] != 3:
        array = array.transpose(1, 2, 0)
    if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8:
        raise DataError(f"the image is {array.dtype} {image.shape if from_torch else array.shape}; {_EXPECTED}")
    return np.ascontiguousarray(array)


def as_masks(coarse: MasksLike, *, size: Size | None = None) -> Masks:
    """Convert masks to bool (N, H, W); a single mask, (H, W), is one of N = 1.

    Args:
        size: (H, W) that they must have; None takes that of the first mask.

    Raises:
        DataError: They are no masks, or differ in size.
    """
    found = [_as_mask(mask, number) for number, mask in enumerate(_listed(coarse))]
    wanted = size or (found[0].shape if found else (0, 0))
    for number, mask in enumerate(found):
        if mask.shape != wanted:
            raise DataError(f"coarse mask {number} is {mask.shape}; expected {tuple(wanted)}, the size of the image")
    return np.stack(found) if found else np.zeros((0, *wanted), dtype=np.bool_)


def _listed(coarse: MasksLike) -> Sequence[Any]:
    if isinstance(coarse, Image.Image):
        return [coarse]
    array = _array(coarse)
    if array is None:
        if isinstance(coarse, Sequence) and not isinstance(coarse, str | bytes):
            return coarse
        raise DataError(
            f"the coarse masks are a {type(coarse).__name__}; expected (N, H, W) or (H, W), bool, 0/1 or 0/255: an "
            "array, a torch tensor, a PIL image, or a list of these"
        )
    if array.ndim == 4 and array.shape[1] == 1:  # (N, 1, H, W), as models in torch return masks
        array = array[:, 0]
    if array.ndim == 2:
        return [array]
    if array.ndim != 3:
        raise DataError(f"the coarse masks are {array.shape}; expected (N, H, W) or (H, W)")
    return list(array)


def _as_mask(mask: Any, number: int) -> NDArray[np.bool_]:
    array = np.asarray(mask) if isinstance(mask, Image.Image) else _array(mask)
    if array is None:
        raise DataError(f"coarse mask {number} is a {type(mask).__name__}; expected (H, W), bool, 0/1 or 0/255")
    return masks.as_bool(array, source=f"coarse mask {number}")


def _array(value: Any) -> NDArray[Any] | None:
    """Return an array, or a torch tensor on any device, as an array; None for anything else."""
    if isinstance(value, np.ndarray):
        return value
    if all(hasattr(value, name) for name in ("detach", "cpu", "numpy")):  # torch need not be imported for this
        try:
            return np.asarray(value.detach().cpu().numpy())
        except TypeError as error:  # bfloat16, which NumPy lacks
            raise DataError(f"a tensor of {value.dtype} can't be used ({error}); convert it first") from error
    return None
