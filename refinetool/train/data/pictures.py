"""The images of a source of training data, whatever files they come from."""

from collections.abc import Callable
from dataclasses import dataclass

from refinetool.records import ImageArray, Mask


@dataclass(frozen=True, slots=True)
class AnnotatedPicture:
    """An image, uint8 (H, W, 3) RGB, its objects, bool (H, W) each, and its void pixels, bool (H, W)."""

    image: ImageArray
    objects: tuple[Mask, ...]
    void: Mask


@dataclass(frozen=True, slots=True)
class SourcePicture:
    """One image of a source: its name, whether it is for validation, and the function that reads it."""

    key: str
    validation: bool
    read: Callable[[], AnnotatedPicture]
