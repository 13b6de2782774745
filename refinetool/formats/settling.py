"""Paints refined objects into a map in which every pixel has one owner and nothing may vanish."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from refinetool import masks
from refinetool.records import BoolArray, IntArray, Rle


def settle(old: IntArray, refined: Mapping[int, tuple[Rle, float | None]], *, ground: BoolArray) -> IntArray:
    """Return a map of owners with refined objects.

    An object takes pixels only of the ground and of other refined objects; of several that claim a pixel, the one with
    the highest predicted IoU has it. What an object gives up goes to the nearest owner in the ground. An owner that
    would vanish keeps the pixels that it had.

    Args:
        old: int64 (H, W), the owner of each pixel.
        refined: New masks and predicted IoUs by owner.
        ground: bool (H, W), the pixels that objects may take: void, and regions such as road and sky.
    """
    moving = np.isin(old, list(refined))
    new = _filled(old, moving, ground=ground)
    by_score = sorted(refined.items(), key=lambda item: -np.inf if item[1][1] is None else item[1][1])
    for owner, (mask, _) in by_score:
        new[masks.decode(mask) & (ground | moving)] = owner
    before = np.unique(old)
    while (lost := np.setdiff1d(before, np.unique(new), assume_unique=True)).size:
        restored = np.isin(old, lost)
        new[restored] = old[restored]
    return new


def _filled(old: IntArray, moving: BoolArray, *, ground: BoolArray) -> IntArray:
    """Return a map in which the pixels of moving owners have the nearest owner in the ground, if there is any."""
    new = old.copy()
    if moving.any() and ground.any():
        nearest: NDArray[np.int32] = ndimage.distance_transform_edt(
            ~ground, return_distances=False, return_indices=True
        )
        rows, columns = nearest
        new[moving] = old[rows[moving], columns[moving]]
    return new
