"""Writes new class maps: one PNG per image, whose values are classes, in VOC's palette."""

import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from refinetool import masks
from refinetool.errors import DataError
from refinetool.formats.storage import new_folder
from refinetool.records import VOID, Sample

NAMES_FILE = "classes.json"


def write_class_maps(samples: Iterable[Sample], destination: Path, *, names: Mapping[int, str]) -> None:
    """Write a folder with one map per sample, `KEY.png`, and the names of the values in `classes.json`.

    Args:
        samples: Regions must not overlap; those without a mask are left out.
        names: Names by value, 1 to 254.

    Raises:
        DataError: A category is not a value of a map.
        StorageError: The folder can't be written.
    """
    for number in names:
        if not 0 < number < VOID:
            raise DataError(f"category {number} can't be a value of a PNG; expected 1 to 254: write COCO, or renumber.")
    with new_folder(destination) as partial:
        (partial / NAMES_FILE).write_text(json.dumps({str(value): name for value, name in names.items()}, indent=1))
        for sample in samples:
            values = np.zeros(sample.size, np.uint8)
            for region in sample.regions:
                if region.mask is not None and region.category is not None:
                    values[masks.decode(region.mask)] = region.category
            path = partial / f"{sample.key}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(_png(values))


def _png(values: NDArray[np.uint8]) -> bytes:
    picture = Image.fromarray(values)
    picture.putpalette(voc_palette().ravel().tolist())
    content = io.BytesIO()
    picture.save(content, format="PNG")
    return content.getvalue()


def voc_palette() -> NDArray[np.uint8]:
    """Return VOC's colours, uint8 (256, 3): the bits of the value, three by three, from the highest bit down."""
    values = np.arange(256)
    colours = np.zeros((256, 3), np.uint8)
    for place in range(8):
        for channel in range(3):
            bit = values >> (3 * place + channel) & 1 if 3 * place + channel < 8 else np.zeros_like(values)
            colours[:, channel] |= (bit << (7 - place)).astype(np.uint8)
    return colours
