"""Counter-based random numbers: each is a hash of a seed, a row, the name of the draw and an index.

There is no state, so a row gets the same numbers in any batch, after any other draws, and on any device. Therefore
example `n` of a run is a function of the data, the seed and `n`.
"""

import math
import zlib
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

_BITS: Final = 24
"""Random bits per number: as many as a float32 in [0, 1) can hold."""
_FIRST, _SECOND = 0xFF51AFD7ED558CCD - (1 << 64), 0xC4CEB9FE1A85EC53 - (1 << 64)
"""Multipliers of the 64-bit finaliser of MurmurHash3, as signed numbers: torch has no shifts for unsigned ones."""


@dataclass(frozen=True, slots=True)
class Draws:
    """Draws for N rows; `keys` are int64 (N,)."""

    keys: Tensor

    def __len__(self) -> int:
        return len(self.keys)

    def uniform(self, name: str, *shape: int) -> Tensor:
        """Draw numbers in [0, 1), float32 (N, *shape)."""
        return _fraction(self._bits(name, shape), 64 - _BITS)

    def between(self, name: str, low: float, high: float, *shape: int) -> Tensor:
        """Draw numbers in [low, high), float32 (N, *shape)."""
        return low + (high - low) * self.uniform(name, *shape)

    def normal(self, name: str, *shape: int) -> Tensor:
        """Draw standard normal numbers, float32 (N, *shape), with the Box-Muller method."""
        bits = self._bits(name, shape)
        radius = (-2 * (_fraction(bits, 64 - _BITS) + 2.0 ** -(_BITS + 1)).log()).sqrt()
        return radius * (2 * math.pi * _fraction(bits, 8)).cos()

    def below(self, name: str, counts: Tensor) -> Tensor:
        """Draw whole numbers, int64 (N,), each from 0 to its count - 1."""
        return (self.uniform(name).double() * counts).long()

    def choice(self, name: str, weights: Tensor) -> Tensor:
        """Draw indices, int64 (N,), with probabilities proportional to weights (N, C) or (C,)."""
        steps = weights.double().cumsum(-1).expand(len(self), -1).contiguous()
        at = self.uniform(name).double()[:, None] * steps[:, -1:]
        return torch.searchsorted(steps, at, right=True)[:, 0].clamp(max=steps.shape[1] - 1)

    def take(self, rows: Tensor) -> "Draws":
        """Return the draws of some rows."""
        return Draws(self.keys[rows])

    def fork(self, name: str) -> "Draws":
        """Return independent draws for the same rows."""
        return Draws(_mixed(self.keys ^ _name_key(name)))

    def split(self, name: str, count: int) -> "Draws":
        """Return draws for N x count rows; those of one row are consecutive."""
        inner = torch.arange(count, device=self.keys.device)
        return Draws(_mixed((self.fork(name).keys[:, None] + _mixed(inner + 1)).flatten()))

    def to(self, device: str | torch.device) -> "Draws":
        """Return the same draws on another device."""
        return Draws(self.keys.to(device))

    def _bits(self, name: str, shape: tuple[int, ...]) -> Tensor:
        count = math.prod(shape)
        start = _mixed(self.keys ^ _name_key(name))
        index = _mixed(torch.arange(1, count + 1, device=start.device))
        return _mixed(start[:, None] ^ index).reshape(len(start), *shape)


def draws_for(seed: int, numbers: Tensor) -> Draws:
    """Return draws for the examples with these numbers, int64 (N,), of the run with this seed."""
    return Draws(_mixed(_mixed(numbers + 1) + seed * 0x9E3779B9))


def _name_key(name: str) -> int:
    return zlib.crc32(name.encode()) << 20


def _mixed(values: Tensor) -> Tensor:
    """Apply the finaliser of MurmurHash3, in which every bit affects all bits; products wrap around."""
    values = (values ^ _shifted(values, 33)) * _FIRST
    values = (values ^ _shifted(values, 33)) * _SECOND
    return values ^ _shifted(values, 33)


def _shifted(values: Tensor, bits: int) -> Tensor:
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def _fraction(bits: Tensor, shift: int) -> Tensor:
    return ((bits >> shift) & ((1 << _BITS) - 1)).float() * 2.0**-_BITS
