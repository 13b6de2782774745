"""Holds all images of a pack, decoded once into the memory of the training device, with tables to sample from."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from refinetool.train.data.pack import Pack, pictures_of
from refinetool.train.data.sharpness import sharpness


@dataclass(frozen=True, slots=True)
class PictureStore:
    """N images with M objects.

    pixels: uint8 (P, 3) RGB; ids: uint8 (P,); all images concatenated in row-major order, on the device.
    members: bool (M, 256), which ids make up an object, on the device.
    sizes: int64 (N, 2), (H, W); offsets: int64 (N,), the first pixel of an image. These and the following fields are
        on the CPU, where crops are chosen.
    first_object: int64 (N + 1,); boxes: float64 (M, 4), xyxy; areas: float64 (M,), pixels.
    groups: One int64 tensor of images per source.
    shares: float64, one sampling weight per source: the square root of its size, so that small sources count.
    trust: float32 (N,), how far the outlines of an image can be trusted to the pixel, 0..1; that of its source.
    """

    pixels: Tensor
    ids: Tensor
    members: Tensor
    sizes: Tensor
    offsets: Tensor
    first_object: Tensor
    boxes: Tensor
    areas: Tensor
    groups: tuple[Tensor, ...]
    shares: Tensor
    trust: Tensor

    @property
    def device(self) -> torch.device:
        return self.pixels.device


def load_store(pack: Pack, split: Literal["train", "val"], *, device: str) -> PictureStore:
    """Decode the images of one split onto a device: about four bytes per pixel."""
    tensors = pack.tensors
    chosen = np.flatnonzero(tensors["validation"] == (split == "val"))
    sizes = tensors["sizes"][chosen].astype(np.int64)
    ends = sizes.prod(axis=1).cumsum()
    sources = tensors["source"][chosen]
    groups = tuple(torch.from_numpy(np.flatnonzero(sources == source)) for source in np.unique(sources))
    sampled = {n: k for k, group in enumerate(groups) for n in group[:: -(-len(group) // SAMPLE)].tolist()}
    sharp: list[list[float | None]] = [[] for _ in groups]
    pixels, ids = torch.empty((int(ends[-1]), 3), dtype=torch.uint8), torch.empty(int(ends[-1]), dtype=torch.uint8)
    pictures = pictures_of(pack, chosen.tolist())
    for number, (end, (image, map_of_ids)) in enumerate(zip(ends.tolist(), pictures, strict=True)):
        start = end - map_of_ids.size
        pixels[start:end] = torch.tensor(image).reshape(-1, 3)
        ids[start:end] = torch.tensor(map_of_ids).reshape(-1)
        if number in sampled:
            sharp[sampled[number]].append(sharpness(image, map_of_ids))
    starts = np.concatenate(([0], tensors["object_ends"][:-1]))[chosen]
    counts = tensors["object_ends"][chosen] - starts
    rows = np.concatenate([np.arange(start, start + count) for start, count in zip(starts, counts, strict=True)])
    return PictureStore(
        pixels=pixels.to(device),
        ids=ids.to(device),
        members=torch.from_numpy(np.unpackbits(tensors["members"][rows], axis=1).astype(bool)).to(device),
        sizes=torch.from_numpy(sizes),
        offsets=torch.from_numpy(np.concatenate(([0], ends[:-1]))),
        first_object=torch.from_numpy(np.concatenate(([0], counts.cumsum()))),
        boxes=torch.from_numpy(tensors["boxes"][rows].astype(np.float64)),
        areas=torch.from_numpy(tensors["areas"][rows].astype(np.float64)),
        groups=groups,
        shares=_shares(groups),
        trust=_trust(groups, sharp),
    )


def _shares(groups: Sequence[Tensor]) -> Tensor:
    return torch.tensor([float(len(group)) for group in groups], dtype=torch.float64).sqrt()


SLOPPY, EXACT = 1.2, 3.2
"""Sharpness of outlines that are not trusted at all, and of those that are trusted fully."""
SAMPLE = 40
"""Images per source whose sharpness is measured, at most."""


def _trust(groups: Sequence[Tensor], sharp: Sequence[Sequence[float | None]]) -> Tensor:
    """Return the trust in each image: by the median sharpness of its source; 1 where most have no outlines.

    Such sources ignore their outlines, so that nothing is wrong with what is left.
    """
    trust = torch.ones(sum(len(group) for group in groups))
    for group, values in zip(groups, sharp, strict=True):
        found = [value for value in values if value is not None]
        if 2 * len(found) > len(values):
            trust[group] = min(1.0, max(0.0, (float(np.median(found)) - SLOPPY) / (EXACT - SLOPPY)))
    return trust
