"""Holds what the frozen networks see in images, so that training computes it once per image.

T is the side of the masks that are trained on.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from refinetool.backends.image_encoders import Features, ImageEncoder
from refinetool.backends.predictions import SquareEmbedding
from refinetool.backends.square import SquareBackend
from refinetool.records import Mask
from refinetool.train.reference.data import ClassPicture


@dataclass(frozen=True, slots=True, eq=False)
class Seen:
    """One image: features and embedding (half precision), its class masks and its void pixels at T x T."""

    features: Features
    embedding: SquareEmbedding
    masks: dict[str, NDArray[np.uint8]]
    void: NDArray[np.uint8]
    side: int

    def mask(self, name: str) -> Mask:
        """Return the mask of a class, bool (T, T)."""
        return _unpacked(self.masks[name], self.side)

    @property
    def ignored(self) -> Mask:
        """Return the void pixels, bool (T, T)."""
        return _unpacked(self.void, self.side)

    @property
    def bytes(self) -> int:
        maps = (self.features.mid, self.features.high, self.embedding.features, *self.embedding.extras)
        return sum(one.numel() * one.element_size() for one in maps)


class SeenPictures:
    """Computes what is seen in images when it is first asked for, and keeps the last ones within a bound.

    Args:
        side: T.
        limit: Bytes to keep.
    """

    def __init__(
        self,
        pictures: Sequence[ClassPicture],
        encoder: ImageEncoder,
        backend: SquareBackend,
        *,
        side: int,
        limit: float,
    ) -> None:
        self._pictures = {picture.key: picture for picture in pictures}
        self._encoder, self._backend, self._side, self._limit = encoder, backend, side, limit
        self._kept: OrderedDict[str, Seen] = OrderedDict()
        self._bytes = 0

    def __getitem__(self, key: str) -> Seen:
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        seen = self._look(self._pictures[key])
        self._kept[key] = seen
        self._bytes += seen.bytes
        while self._bytes > self._limit and len(self._kept) > 1:
            _, dropped = self._kept.popitem(last=False)
            self._bytes -= dropped.bytes
        return seen

    def _look(self, picture: ClassPicture) -> Seen:
        found = picture.read()
        with torch.no_grad():
            features = self._encoder(self._encoder.pixels(found.image)[None])
        embedding: Any = self._backend.embed([found.image])[0]
        return Seen(
            Features(features.mid.half(), features.high.half()),
            replace(
                embedding,
                features=embedding.features.half().clone(),
                extras=tuple(extra.half().clone() for extra in embedding.extras),
            ),
            {name: _packed(mask, self._side) for name, mask in found.masks.items()},
            _packed(found.void, self._side),
            self._side,
        )


def whole(embedding: SquareEmbedding) -> SquareEmbedding:
    """Return an embedding in single precision."""
    return replace(
        embedding,
        features=embedding.features.float(),
        extras=tuple(extra.float() for extra in embedding.extras),
    )


def features_of(seen: Sequence[Seen]) -> Features:
    """Return the features of several images as one batch in single precision."""
    return Features(
        torch.cat([one.features.mid for one in seen]).float(), torch.cat([one.features.high for one in seen]).float()
    )


def squashed(mask: Mask, side: int) -> Mask:
    """Squash a mask, bool (H, W), to a square, bool (side, side), keeping pixels that are covered by half."""
    shrunk = cv2.resize(mask.astype(np.float32), (side, side), interpolation=cv2.INTER_AREA)
    result: Mask = shrunk >= 0.5
    if mask.any() and not result.any():  # thinner than a cell
        result = shrunk >= shrunk.max()
    return result


def _packed(mask: Mask, side: int) -> NDArray[np.uint8]:
    return np.packbits(squashed(mask, side))


def _unpacked(bits: NDArray[np.uint8], side: int) -> Mask:
    mask: Mask = np.unpackbits(bits, count=side * side).reshape(side, side).astype(np.bool_)
    return mask


def as_tensor(masks: Sequence[Mask], device: torch.device) -> Tensor:
    """Return masks as float32 (B, T, T) of 0 and 1."""
    return torch.from_numpy(np.stack(masks)).to(device).float()
