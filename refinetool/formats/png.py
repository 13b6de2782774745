"""Reads PNGs whose pixels are numbers, not colours, and writes them with nothing changed but the pixels."""

import io
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from refinetool.errors import DataError, MaskError
from refinetool.images import open_lazily
from refinetool.records import IntArray, Size
from refinetool.settings import MAX_PIXELS

Values: TypeAlias = NDArray[np.uint8]
"""uint8 (H, W): palette indices, or grey values; (H, W, C) where a pixel has several samples."""

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PALETTE = 3
_CHANNELS = {0: 1, 2: 3, _PALETTE: 1, 4: 2, 6: 4}
"""Samples per pixel by kind: grey, colours, palette, grey with transparency, colours with transparency."""
_HEADER = struct.Struct(">IIBBBBB")


@dataclass(frozen=True, slots=True)
class Header:
    """The content of the first chunk: `depth` is bits per sample, 1, 2, 4 or 8; `channels` is samples per pixel."""

    size: Size
    depth: int
    palette: bool
    channels: int


def read_header(path: Path) -> Header:
    """Check that a file can hold a mask.

    Raises:
        DataError: A PNG with 16 bits, which is not supported.
        MaskError: Not a PNG, a broken PNG, or one of absurd size.
    """
    try:
        with path.open("rb") as file:
            start = file.read(len(_SIGNATURE) + 8 + _HEADER.size)
    except OSError as error:
        raise MaskError(f"{path}: can't be read ({error.strerror}).") from error
    if not start.startswith(_SIGNATURE) or start[12:16] != b"IHDR" or len(start) < 16 + _HEADER.size:
        raise MaskError(f"{path}: is not a PNG; masks have to be PNGs, since other formats change values.")
    width, height, depth, colour, *_ = _HEADER.unpack(start[16:])
    if colour not in _CHANNELS:
        raise MaskError(f"{path}: holds an unknown kind of pixels; expected grey, a palette or colours.")
    if depth > 8:
        raise DataError(f"{path}: has {depth} bits per pixel; only masks of up to 8 bits can be refined.")
    if not 0 < width * height <= MAX_PIXELS:
        raise MaskError(f"{path}: claims {width} x {height} pixels; expected 1 to {MAX_PIXELS:,}.")
    return Header((height, width), depth, colour == _PALETTE, _CHANNELS[colour])


def read_samples(path: Path) -> Values:
    """Read the pixels, uint8 (H, W) or, with several samples per pixel, (H, W, C), as they are stored.

    Raises the errors of `read_header`, and MaskError for a broken file.
    """
    header = read_header(path)
    try:
        data = path.read_bytes()
        _check_chunks(data)
        values = np.array(open_lazily(io.BytesIO(data)), dtype=np.uint8)
        if values.shape[2:] != ((header.channels,) if header.channels > 1 else ()):
            raise ValueError("its pixels are not what its header says")
    except Exception as error:  # Pillow's decoder raises all kinds of exceptions; all of them mean a broken file
        raise MaskError(f"{path}: is broken ({error}).") from error
    if header.palette or header.depth == 8:
        return values
    # Pillow scales grey values of 2 or 4 bits to 0..255, but not those of one bit.
    return values if header.depth == 1 else values // np.uint8(255 // (2**header.depth - 1))


def with_samples(path: Path, samples: Values) -> bytes:
    """Return the file with other pixels: kind, bit depth, palette and all other chunks are unchanged.

    Args:
        path: A PNG that `read_samples` can read.
        samples: uint8 (H, W) or (H, W, C), like those of the file, within the bit depth.
    """
    header = read_header(path)
    rows = np.pad(
        _packed(samples.reshape(samples.shape[0], -1), header.depth), ((0, 0), (1, 0))
    )  # each row starts with its filter: 0, none
    pixels: bytes | None = _chunk(b"IDAT", zlib.compress(rows.tobytes()))
    pieces = [_SIGNATURE]
    for name, chunk in _chunks(path.read_bytes()):
        if name == b"IHDR":
            plain = (*_HEADER.unpack(chunk[8 : 8 + _HEADER.size])[:-1], 0)  # not interlaced
            pieces.append(_chunk(name, _HEADER.pack(*plain)))
        elif name != b"IDAT":
            pieces.append(chunk)
        elif pixels:  # all pixels replace the first chunk
            pieces.append(pixels)
            pixels = None
    return b"".join(pieces)


def mostly_black_and_white(histogram: IntArray) -> bool:
    """Whether a histogram of values 0 to 255 can be that of a mask with soft edges: fewer grey pixels than white ones.

    In a map of classes or objects, the values in between are the objects, and 255 is a thin ring of void.
    """
    return bool(histogram[1:255].sum() < histogram[255])


def _packed(values: Values, depth: int) -> Values:
    """Pack rows of pixels into rows of bytes, the first pixel in the highest bits."""
    per_byte = 8 // depth
    height, width = values.shape
    padded = np.pad(values, ((0, 0), (0, -width % per_byte))).reshape(height, -1, per_byte)
    shifts = np.arange(per_byte - 1, -1, -1, dtype=np.uint8) * np.uint8(depth)
    packed: Values = np.bitwise_or.reduce(padded << shifts, axis=2)
    return packed


def _chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the names and the bytes of all chunks, and what follows the last one, without a name."""
    at, name = len(_SIGNATURE), b""
    while name != b"IEND":
        if len(data) < at + _AROUND_CHUNK:
            raise ValueError("its last chunk is missing")
        (length,) = struct.unpack_from(">I", data, at)
        name, end = data[at + 4 : at + 8], at + length + _AROUND_CHUNK
        if end > len(data):
            raise ValueError("its last chunk is cut off")
        yield name, data[at:end]
        at = end
    yield b"", data[at:]


_AROUND_CHUNK = 12
"""Bytes of a chunk beside its content: length, name and checksum."""


def _check_chunks(data: bytes) -> None:
    """Raise ValueError unless `with_values` can replace the pixels; Pillow accepts more than that."""
    names = [name for name, _ in _chunks(data)]
    if names.count(b"IHDR") != 1 or b"IDAT" not in names:
        raise ValueError("it does not have one header, followed by pixels")


def _chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
