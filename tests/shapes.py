"""Small masks and images that tests of coarse masks share."""

import numpy as np
from numpy.typing import NDArray

from refinetool.records import BoolArray

SIZE = (48, 64)


def disc(x: float, y: float, r: float) -> BoolArray:
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    inside: BoolArray = (columns - x) ** 2 + (rows - y) ** 2 <= r**2
    return inside


def blocks() -> NDArray[np.int64]:
    """Superpixels of 6 x 6 pixels."""
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    return (rows // 6) * 11 + columns // 6


def photograph() -> NDArray[np.uint8]:
    """Colours that change slowly, with some noise: uint8 (H, W, 3)."""
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    smooth = np.stack([rows * 5, columns * 3, rows + columns], axis=2)
    return (smooth + np.random.default_rng(0).integers(0, 12, smooth.shape)).clip(0, 255).astype(np.uint8)


AWKWARD = {
    "pixel": disc(20, 20, 0.5),
    "full": np.ones(SIZE, np.bool_),
    "at the border": disc(0, 20, 14),
    "two parts": disc(14, 14, 6) | disc(46, 30, 8),
    "a ring": disc(30, 24, 20) & ~disc(30, 24, 12),
    "a line": disc(30, 24, 20) & (np.mgrid[: SIZE[0], : SIZE[1]][0] == 24),
}
