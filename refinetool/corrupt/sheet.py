"""A contact sheet of coarse masks: the object in its image, outlined as it is, tinted as its coarse mask has it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from refinetool.formats.storage import new_file
from refinetool.masks import bounding_box
from refinetool.pictures import PAPER, beside, draw, label, stack
from refinetool.records import Box, ImageArray, Mask

TILE_PX = 300
COLUMNS = 4
MARGIN = 0.25
"""What a tile shows around both masks, as a fraction of the longer side of their box."""
MIN_WINDOW_PX = 24
TINT = (255, 40, 60)
TINT_SHARE = 0.5


def tile(image: ImageArray, gt: Mask, coarse: Mask, text: str) -> ImageArray:
    """One object: uint8 (TILE_PX, TILE_PX, 3) RGB.

    Args:
        image: uint8 (H, W, 3) RGB.
        gt: bool (H, W), the good mask, as an outline.
        coarse: bool (H, W), as a red tint.
        text: Goes into the corner.
    """
    tinted = image.copy()
    tinted[coarse] = (TINT_SHARE * np.array(TINT) + (1 - TINT_SHARE) * image[coarse]).round().astype(np.uint8)
    x0, y0, x1, y1 = window = _window(gt | coarse)
    scale = TILE_PX / max(x1 - x0, y1 - y0)
    drawn = draw(tinted, gt[None], window, scale=scale, dim=1.0)[:TILE_PX, :TILE_PX]
    canvas = np.full((TILE_PX, TILE_PX, 3), PAPER, dtype=np.uint8)
    top, left = (TILE_PX - drawn.shape[0]) // 2, (TILE_PX - drawn.shape[1]) // 2
    canvas[top : top + drawn.shape[0], left : left + drawn.shape[1]] = drawn
    return label(canvas, text)


def sheet(tiles: Sequence[ImageArray]) -> ImageArray:
    """Tiles in rows of four, uint8 RGB; the last row is filled up."""
    blank = np.full((TILE_PX, TILE_PX, 3), PAPER, dtype=np.uint8)
    filled = [*tiles, *[blank] * (-len(tiles) % COLUMNS)] or [blank]
    return stack([beside(filled[start : start + COLUMNS]) for start in range(0, len(filled), COLUMNS)])


def write_picture(picture: ImageArray, path: Path) -> None:
    """Write a PNG. Raises StorageError if it can't be written."""
    with new_file(path) as file:
        Image.fromarray(picture).save(file, format="PNG")


def _window(mask: Mask) -> Box:
    height, width = mask.shape
    x0, y0, x1, y1 = bounding_box(mask) or (0, 0, width, height)
    room = max(round(MARGIN * max(x1 - x0, y1 - y0)), (MIN_WINDOW_PX - max(x1 - x0, y1 - y0)) // 2, 2)
    return max(0, x0 - room), max(0, y0 - room), min(width, x1 + room), min(height, y1 + room)
