"""Reads masks from raster files as one number per pixel, and writes them back as files of the same kind.

PNGs keep every byte but the pixels (`png`); TIFFs and BMPs are written by Pillow with the same mode, palette and
compression. Pixels may be stored as colours: grey as R = G = B, or one colour per value (`ColourTable`).
"""

import io
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from refinetool.errors import DataError, ImageError, MaskError
from refinetool.formats import png
from refinetool.images import open_lazily
from refinetool.records import VOID, IntArray, Size
from refinetool.settings import MAX_PIXELS
from refinetool.statuses import Reason

Values: TypeAlias = NDArray[np.uint8]
"""uint8 (H, W): palette indices, grey values, or the values of colours."""
Samples: TypeAlias = NDArray[np.uint8]
"""uint8 (H, W) or (H, W, C): pixels as stored."""

SUFFIXES = (".png", ".tif", ".tiff", ".bmp")
"""Suffixes of masks. JPEG is not among them, because it changes values."""

_MODES = ("1", "L", "P", "LA", "RGB", "RGBA")
_LOSSY = ("jpeg", "tiff_jpeg", "webp")
_GEO_TAGS = (33550, 33922, 34264, 34735, 34736, 34737, 42112, 42113)
"""Tags of a TIFF that place it on the earth."""


@dataclass(frozen=True)
class ColourTable:
    """The colours that stand for values.

    colours: uint8 (V, 3), RGB, all different.
    values: uint8 (V,).
    """

    colours: NDArray[np.uint8]
    values: Values

    def find(self, samples: Samples) -> Values | None:
        """Return the values of colours, uint8 (H, W, 3 or more); None if one of them is not in the table."""
        numbers = _number(samples)
        at = np.minimum(np.searchsorted(self._sorted, numbers), len(self._sorted) - 1)
        if (self._sorted[at] != numbers).any():
            return None
        return self.values[self._order[at]]

    def paint(self, values: Values) -> Samples:
        """Return the colours of values that are all in the table, uint8 (H, W, 3)."""
        table = np.zeros((256, 3), dtype=np.uint8)
        table[self.values] = self.colours
        return table[values]

    @cached_property
    def _order(self) -> IntArray:
        return np.argsort(_number(self.colours), kind="stable").astype(np.int64)

    @cached_property
    def _sorted(self) -> IntArray:
        return _number(self.colours)[self._order]


def _number(colours: Samples) -> IntArray:
    """Return R * 65536 + G * 256 + B of each colour."""
    r, g, b = (colours[..., channel].astype(np.int64) for channel in range(3))
    return (r << 16) | (g << 8) | b


def voc_colours() -> ColourTable:
    """Return PASCAL VOC's colours of 0 to 255: a value's bits, three at a time, are the highest bits of R, G and B."""
    values = np.arange(256)
    colours = np.zeros((256, 3), dtype=np.int64)
    for place in range(8):
        for channel in range(3):
            colours[:, channel] |= ((values >> (3 * place + channel)) & 1) << (7 - place)
    return ColourTable(colours.astype(np.uint8), values.astype(np.uint8))


def read_label_map(path: Path) -> ColourTable | None:
    """Read the colours of classes from a `labelmap.txt` of CVAT or Datumaro: lines `name:red,green,blue:parts:actions`.

    Black is background and 0. The colour of VOC's void, and a class called so, are 255. The other classes are numbered
    in their order from 1. Returns None if no label has a colour: Datumaro then paints them in VOC's.

    Raises:
        DataError: A line can't be read, or there are too many classes.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: can't be read ({error}).") from error
    found: dict[tuple[int, int, int], int] = {(0, 0, 0): 0}
    coloured = False
    for number, line in enumerate(lines, start=1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        name, _, rest = text.partition(":")
        if not rest.partition(":")[0].strip():
            continue
        coloured = True
        parts = rest.partition(":")[0].split(",")
        if len(parts) != 3 or not all(part.strip().isdecimal() and int(part) <= 255 for part in parts):
            raise DataError(
                f"{path}, line {number}: {text!r:.60} is no label; expected name:red,green,blue:parts:actions."
            )
        red, green, blue = map(int, parts)
        void = name.strip().lower() in ("void", "ignored") or (red, green, blue) == (224, 224, 192)
        following = sum(value != VOID for value in found.values())
        found.setdefault((red, green, blue), VOID if void else following)
    if not coloured:
        return None
    if len(found) > VOID:
        raise DataError(f"{path}: has {len(found)} labels; at most {VOID - 1} can be told apart.")
    return ColourTable(np.array(list(found), dtype=np.uint8), np.array(list(found.values()), dtype=np.uint8))


# --- files


def read_values(path: Path, *, colours: ColourTable | None = None) -> Values:
    """Read the values of a mask, uint8 (H, W).

    Args:
        colours: The colours of values, if they are known. Otherwise pixels with R = G = B are grey values, and other
            colours those of VOC.

    Raises:
        DataError: A file of an unsupported kind.
        MaskError: A broken file, or colours that stand for nothing.
    """
    return _interpret(path, _read(path), colours)[0]


def read_map(path: Path, *, sizes: Collection[Size], max_pixels: int) -> NDArray[Any]:
    """Read a map of many ids with Pillow, (H, W) or (H, W, C). It is decoded only if its header has an expected size.

    Args:
        sizes: The sizes (H, W) that it may have; empty for any.
        max_pixels: A map that claims more pixels is refused.

    Raises:
        ImageError: With the reason `unreadable-mask`, `size-mismatch` or `image-too-large`.
    """
    try:
        with path.open("rb") as file, open_lazily(file) as image:
            size = image.height, image.width
            if sizes and size not in sizes:
                expected = " or ".join(f"{width} x {height}" for height, width in sizes)
                fault = f"measures {image.width} x {image.height} pixels; expected {expected}"
                raise ImageError(f"{path}: {fault}.", reason=Reason.SIZE_MISMATCH)
            if image.width * image.height > max_pixels:
                fault = f"claims {image.width} x {image.height} pixels; expected at most {max_pixels:,}"
                raise ImageError(f"{path}: {fault}.", reason=Reason.IMAGE_TOO_LARGE)
            return np.array(image)
    except ImageError:
        raise
    except Exception as error:  # Pillow's decoders raise all kinds of exceptions; all of them mean a broken file
        raise ImageError(f"{path}: can't be read ({error}).", reason=Reason.UNREADABLE_MASK) from error


def with_values(path: Path, values: Values, *, colours: ColourTable | None = None) -> bytes:
    """Return the file with other values; everything else stays as far as the kind of file allows.

    Args:
        values: uint8 (H, W) of the same size; each occurs in the file, or can be represented in it.
        colours: As for `read_values`.
    """
    samples = _read(path)
    old, paint = _interpret(path, samples, colours)
    new = samples.copy()
    changed = values != old  # several colours may stand for void
    if samples.ndim == 2:
        new[changed] = values[changed]
    else:
        painted = paint(values)
        new[changed, : painted.shape[2]] = painted[changed]
    return png.with_samples(path, new) if _is_png(path) else _saved(path, new)


def has_colours(path: Path) -> bool:
    """Whether pixels have colours, of a palette or their own, so that values are numbers and no shades of grey."""
    if _is_png(path) and not (header := png.read_header(path)).channels >= 3:
        return header.palette
    if not _is_png(path) and _opened(path).mode == "P":
        return True
    samples = _read(path)
    return samples.ndim == 3 and not _is_grey(samples)


def check_headers(files: Sequence[Path]) -> None:
    """Refuse a folder with files of an unsupported kind, or with only broken files; see `read_values`."""
    broken: list[MaskError] = []
    for path in files:
        try:
            if _is_png(path):
                png.read_header(path)
            else:
                _opened(path)
        except MaskError as error:
            broken.append(error)
    if broken and len(broken) == len(files):
        raise broken[0]


def _interpret(path: Path, samples: Samples, colours: ColourTable | None) -> tuple[Values, Callable[[Values], Samples]]:
    """Return the values of pixels, and the function from values to colours (H, W, C) if the pixels have several."""

    def grey(values: Values) -> Samples:
        return np.repeat(values[..., None], 1 if samples.shape[2] == 2 else 3, axis=2)

    if samples.ndim == 2:
        return samples, grey
    if samples.shape[2] == 2:
        return samples[..., 0], grey
    table = colours or voc_colours()
    if colours is not None and (values := table.find(samples)) is not None:
        return values, table.paint
    if _is_grey(samples):
        return samples[..., 0], grey
    if colours is None and (values := table.find(samples)) is not None:
        return values, table.paint
    known = "in labelmap.txt" if colours is not None else "those of PASCAL VOC, and no labelmap.txt says what they mean"
    raise MaskError(f"{path}: has colours that are not {known}; expected one number or one known colour per pixel.")


def _is_grey(samples: Samples) -> bool:
    return bool((samples[..., 0] == samples[..., 1]).all() and (samples[..., 1] == samples[..., 2]).all())


def _is_png(path: Path) -> bool:
    return path.suffix.lower() == ".png"


def _read(path: Path) -> Samples:
    if _is_png(path):
        return png.read_samples(path)
    image = _opened(path)
    try:
        return np.array(image).astype(np.uint8)
    except Exception as error:  # Pillow's decoders raise all kinds of exceptions; all of them mean a broken file
        raise MaskError(f"{path}: is broken ({error}).") from error


def _opened(path: Path) -> Image.Image:
    """Parse the header of a TIFF or BMP."""
    try:
        image = open_lazily(io.BytesIO(path.read_bytes()))
        frames = getattr(image, "n_frames", 1)
    except OSError as error:
        raise MaskError(f"{path}: can't be read ({error.strerror or 'it is no image of a known format'}).") from error
    except Exception as error:
        raise MaskError(f"{path}: is broken ({error}).") from error
    if image.mode not in _MODES:
        raise DataError(f"{path}: has pixels of the kind {image.mode}; expected 8 bits, grey, a palette or colours.")
    if frames > 1:
        raise DataError(f"{path}: holds {frames} pictures; expected one.")
    if image.format not in ("TIFF", "BMP") or image.info.get("compression") in _LOSSY:
        raise DataError(f"{path}: is compressed as a photograph, which changes values; masks have to be lossless.")
    if not 0 < image.width * image.height <= MAX_PIXELS:
        raise MaskError(f"{path}: claims {image.width} x {image.height} pixels; expected 1 to {MAX_PIXELS:,}.")
    return image


def _saved(path: Path, samples: Samples) -> bytes:
    """Return a TIFF or BMP with other pixels, of the same mode, palette, compression, resolution and place on earth."""
    old = _opened(path)
    new = (
        Image.fromarray(samples * np.uint8(255)).convert("1") if old.mode == "1" else Image.fromarray(samples, old.mode)
    )
    if old.mode == "P":
        new.putpalette(old.getpalette() or [])
    options: dict[str, Any] = {name: old.info[name] for name in ("compression", "dpi") if name in old.info}
    if old.format == "TIFF":
        tags = getattr(old, "tag_v2", {})
        options["tiffinfo"] = {tag: tags[tag] for tag in _GEO_TAGS if tag in tags}
    else:
        options.pop("compression", None)
    data = io.BytesIO()
    new.save(data, format=old.format, **options)
    return data.getvalue()
