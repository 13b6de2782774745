"""Draws before/after pictures: an image with its coarse and its refined outlines, and a close-up.

Outlines follow pixel edges, so a picture shows exactly the mask in the file. Pictures are uint8 (H, W, 3) RGB; a region
has the same colour in all tiles.
"""

from collections.abc import Sequence
from itertools import cycle
from typing import TypeAlias

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from refinetool import masks as mask_algebra
from refinetool.records import Box, ImageArray, Mask, Masks, Size

Colour: TypeAlias = tuple[int, int, int]

COLOURS: tuple[Colour, ...] = (
    (0, 229, 255),  # cyan
    (255, 64, 200),  # magenta
    (255, 225, 0),  # yellow
    (118, 255, 3),  # green
    (255, 138, 0),  # orange
    (150, 130, 255),  # violet
    (255, 82, 82),  # red
    (0, 255, 170),  # mint
)
"""Bright and saturated colours, which are rare in photographs; adjacent ones also differ for colour-blind people."""

HALO: Colour = (0, 0, 0)
PAPER: Colour = (24, 24, 28)
WHITE: Colour = (255, 255, 255)

TILE_AREA_PX = 540 * 540
"""Area of a tile, so that wide and tall images take the same space."""
TILE_MAX_SIDE_PX = 1000
TILE_MAX_SCALE = 4.0
"""Small images are not enlarged more than this."""
GAP_PX = 6
LINE_PX = 2
HALO_PX = 1
"""Width of the halo on either side of a line."""
DIM_WHOLE, DIM_CLOSE = 0.45, 0.7
"""Brightness of pixels outside all regions, in the whole image and in a close-up, where both sides of an edge must stay
visible."""
_SUBPIXEL_BITS = 4


def panel(image: ImageArray, coarse: Masks, refined: Masks, *, zoom: float | None) -> ImageArray:
    """Draw the refinement of an image: coarse on the left, refined on the right.

    Args:
        image: uint8 (H, W, 3) RGB.
        coarse, refined: bool (N, H, W), the same regions in the same order.
        zoom: Magnification of a second row, which shows the place that changed most; None leaves out that row.

    Returns:
        uint8 RGB. A frame in the first row marks the place shown in the second row.

    Raises:
        ValueError: The shapes do not match.
    """
    height, width = image.shape[:2]
    expected = (len(coarse), height, width)
    if coarse.shape != expected or refined.shape != expected:
        raise ValueError(f"masks are {coarse.shape} and {refined.shape}, expected {expected} for both")
    whole: Box = (0, 0, width, height)
    scale = min(TILE_MAX_SCALE, (TILE_AREA_PX / (height * width)) ** 0.5, TILE_MAX_SIDE_PX / max(height, width))
    sides = {"coarse": coarse, "refined": refined}
    tiles = {name: draw(image, masks, whole, scale=scale, dim=DIM_WHOLE) for name, masks in sides.items()}
    if zoom is None:
        return beside([label(tile, name) for name, tile in tiles.items()])

    window = most_changed(coarse, refined, size=(max(1, round(height / zoom)), max(1, round(width / zoom))))
    close_ups = [draw(image, masks, window, scale=scale * zoom, dim=DIM_CLOSE) for masks in sides.values()]
    for tile in tiles.values():
        _draw_frame(tile, window, scale=scale)
    upper = beside([label(tile, name) for name, tile in tiles.items()])
    lower = beside([label(tile, f"{name}, {zoom:g}x") for name, tile in zip(sides, close_ups, strict=True)])
    return stack([upper, lower])


def draw(image: ImageArray, masks: Masks, window: Box, *, scale: float, dim: float) -> ImageArray:
    """Draw a part of an image, resized, with the outline of every region in its colour and the background dimmed.

    Args:
        image: uint8 (H, W, 3) RGB.
        masks: bool (N, H, W).
        window: The part to show, half-open xyxy.
        scale: Pixels of the picture per pixel of the image.
        dim: 0..1, brightness of pixels outside all regions.

    Returns:
        uint8 RGB of about `scale` times the window.
    """
    x0, y0, x1, y1 = window
    size = (max(1, round((x1 - x0) * scale)), max(1, round((y1 - y0) * scale)))
    part = np.ascontiguousarray(image[y0:y1, x0:x1])
    picture = cv2.resize(part, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC)
    covered = np.asarray(masks[:, y0:y1, x0:x1].any(axis=0), dtype=np.float32)
    light = cv2.resize(covered, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST)
    light = dim + (1 - dim) * light
    dimmed: ImageArray = (picture * light[..., None]).round().astype(np.uint8)
    for mask, colour in zip(masks, cycle(COLOURS), strict=False):
        rings = _on_canvas(mask, window, scale=scale)
        for shade, thickness in ((HALO, LINE_PX + 2 * HALO_PX), (colour, LINE_PX)):
            cv2.polylines(dimmed, rings, True, shade, thickness, cv2.LINE_AA, _SUBPIXEL_BITS)
    return dimmed


def most_changed(coarse: Masks, refined: Masks, *, size: Size) -> Box:
    """Find the window, half-open xyxy and inside the image, in which most pixels changed, weighted towards its centre.

    Args:
        coarse, refined: bool (N, H, W).
        size: (h, w) of the window, at most (H, W).

    Returns:
        The first such window in row-major order. If nothing changed, the window around the centre of the regions, or
        of the image if there are none.
    """
    height, width = coarse.shape[1:]
    h, w = size
    changed = np.zeros((height, width), dtype=np.float32)
    for before, after in zip(coarse, refined, strict=True):
        changed += before ^ after
    if changed.any():
        # Two box filters give weights that fall off from the centre of the window to its border.
        half = (max(1, w // 2), max(1, h // 2))
        weighted = cv2.blur(
            cv2.blur(changed, half, borderType=cv2.BORDER_CONSTANT), half, borderType=cv2.BORDER_CONSTANT
        )
        middle_y, middle_x = np.unravel_index(int(weighted.argmax()), weighted.shape)
    else:
        x0, y0, x1, y1 = mask_algebra.bounding_box(np.asarray(coarse.any(axis=0))) or (0, 0, width, height)
        middle_x, middle_y = np.intp((x0 + x1) // 2), np.intp((y0 + y1) // 2)
    left = min(max(0, int(middle_x) - w // 2), width - w)
    top = min(max(0, int(middle_y) - h // 2), height - h)
    return left, top, left + w, top + h


def label(picture: ImageArray, text: str) -> ImageArray:
    """Add a line of text on a dark background in the upper left corner of a picture."""
    canvas = Image.fromarray(picture)
    pen = ImageDraw.Draw(canvas, "RGBA")
    font = ImageFont.load_default(size=max(12, min(22, picture.shape[1] // 14)))
    margin = 8
    left, top, right, bottom = pen.textbbox((2 * margin, 2 * margin), text, font=font)
    ground = (left - margin, top - margin, right + margin, bottom + margin)
    pen.rounded_rectangle(ground, radius=6, fill=(*PAPER, 215))
    pen.text((2 * margin, 2 * margin), text, font=font, fill=WHITE)
    return np.asarray(canvas)


def beside(pictures: Sequence[ImageArray]) -> ImageArray:
    """Arrange pictures in a row, centred, with a gap between them."""
    height = max(len(picture) for picture in pictures)
    columns: list[ImageArray] = []
    for picture in pictures:
        room = height - len(picture)
        filled = np.full((height, picture.shape[1], 3), PAPER, dtype=np.uint8)
        filled[room // 2 : room // 2 + len(picture)] = picture
        columns += [filled, np.full((height, GAP_PX, 3), PAPER, dtype=np.uint8)]
    return np.concatenate(columns[:-1], axis=1)


def stack(pictures: Sequence[ImageArray]) -> ImageArray:
    """Arrange pictures in a column, centred, with a gap between them."""
    return np.ascontiguousarray(beside([picture.transpose(1, 0, 2) for picture in pictures]).transpose(1, 0, 2))


def _on_canvas(mask: Mask, window: Box, *, scale: float) -> list[np.ndarray[tuple[int, int], np.dtype[np.int32]]]:
    """Return the rings of a mask in OpenCV's format: fixed point, pixel centres at whole numbers."""
    origin = np.array(window[:2])
    rings = [((ring - origin) * scale - 0.5) * (1 << _SUBPIXEL_BITS) for ring in mask_algebra.outline(mask)]
    return [ring.round().astype(np.int32) for ring in rings]


def _draw_frame(picture: ImageArray, window: Box, *, scale: float) -> None:
    x0, y0, x1, y1 = (round(edge * scale) for edge in window)
    for shade, thickness in ((HALO, 4), (WHITE, 2)):
        cv2.rectangle(picture, (x0, y0), (x1 - 1, y1 - 1), shade, thickness, cv2.LINE_AA)
