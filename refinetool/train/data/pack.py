"""Packs training data into two files: `pictures.safetensors` (encoded images, id maps, object tables) and `pack.json`.

Training can start on a pack at once: nothing has to be parsed, and everything fits into GPU memory. Images are WebP,
which at the same size has about half of JPEG's artefacts around edges; id maps are PNG, which is lossless.
"""

import hashlib
import io
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from refinetool.errors import DataError, StorageError, UsageError
from refinetool.formats.storage import IMAGE_FOLDER, new_folder, refuse_clashes
from refinetool.records import Size
from refinetool.settings import PackSettings
from refinetool.train.data.pictures import SourcePicture
from refinetool.train.data.sources import IdMap, fingerprint, id_map, list_pictures

INDEX_FILE, PICTURE_FILE = "pack.json", "pictures.safetensors"
VERSION = 1
PROBES = 48
"""Images that are encoded to estimate the size of the whole pack."""
HEADROOM = 0.97
RUNGS = ((1.0, 90), (1.0, 80), (1.0, 70), (0.9, 70), (0.85, 65), (0.78, 65), (0.7, 65), (0.6, 60), (0.5, 60))
"""Relative sides and WebP qualities, tried in this order until the pack fits."""
AT_ONCE = 64
THREADS = 4
PIXEL_BYTES = 4
"""Memory per pixel once unpacked: three colours and an id."""

T = TypeVar("T")
Progress = Callable[[int, int], None]
"""Called with (images done, images in total)."""


@dataclass(frozen=True, slots=True)
class PackSource:
    """One source of a pack: its name and the numbers of its images for training and validation."""

    name: str
    train: int
    validation: int


@dataclass(frozen=True, slots=True)
class Pack:
    """A pack on disk, N images with M objects.

    digest: SHA-256 of the image file.
    fingerprint: Hash of its sources and settings; see `pack_fingerprint`.
    side, quality: Side and quality with which the images were encoded.
    tensors: `images`, `ids` uint8 (concatenated bytes), `image_ends`, `id_ends` int64 (N,), `sizes` int32 (N, 2) as
        (H, W), `validation` uint8 (N,), `source` int32 (N,), `object_ends` int64 (N,), `boxes` int32 (M, 4), `areas`
        int32 (M,), `members` uint8 (M, 32), 256 bits that say which ids an object consists of.
    """

    folder: Path
    digest: str
    fingerprint: str
    side: int
    quality: int
    sources: tuple[PackSource, ...]
    tensors: dict[str, NDArray[Any]]

    def __len__(self) -> int:
        return len(self.tensors["sizes"])

    @property
    def megabytes(self) -> float:
        """Size of the image file in MB (10^6 bytes)."""
        return (self.folder / PICTURE_FILE).stat().st_size / 1e6


@dataclass(frozen=True, slots=True)
class _Coded:
    """One encoded image."""

    source: int
    validation: bool
    size: Size
    image: bytes
    ids: bytes
    objects: IdMap

    @property
    def bytes(self) -> int:
        return len(self.image) + len(self.ids) + 52 * len(self.objects.areas) + 48


def pack(
    data: Sequence[Path], output: Path, *, images: Path | None, settings: PackSettings, on_progress: Progress
) -> Pack:
    """Pack sources of annotated images into a folder.

    Args:
        data: Folders with `split.json`, COCO files, VOC roots, folders of mask PNGs.
        output: A new folder, or one with an older pack, which is replaced.
        images: Folder of the images of COCO files and mask folders; None looks beside them.
        on_progress: Called with (images done, images in total).

    Raises:
        DataError: A source is not as described, an image is broken, there are no objects, or the pack doesn't fit into
            `settings.max_megabytes` at the smallest side.
        StorageError: The output can't be written, or holds something else.
        UsageError: The output would replace the data, or lie within them.
    """
    refuse_clashes({"pack": output}, {f"data {path}": path for path in data} | {IMAGE_FOLDER: images})
    _refuse_other_folder(output)
    pictures = [
        (number, picture)
        for number, path in enumerate(data)
        for picture in list_pictures(
            path,
            images=images,
            validation_share=settings.validation_share,
            max_pixels=settings.max_pixels,
            min_object_px=settings.min_object_px,
        )
    ]
    coded, side, quality = _fitted(pictures, settings=settings, on_progress=on_progress)
    _require_both_splits(coded, data)
    content = save(_tensors(coded))
    index = {
        "version": VERSION,
        "digest": hashlib.sha256(content).hexdigest(),
        "fingerprint": pack_fingerprint(data, images=images, settings=settings),
        "side": side,
        "quality": quality,
        "sources": [
            asdict(
                PackSource(
                    path.name,
                    sum(not one.validation for one in coded if one.source == number),
                    sum(one.validation for one in coded if one.source == number),
                )
            )
            for number, path in enumerate(data)
        ],
    }
    if output.exists():
        shutil.rmtree(output)
    with new_folder(output) as folder:
        (folder / PICTURE_FILE).write_bytes(content)
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=1))
    return read_pack(output)


def read_pack(folder: Path) -> Pack:
    """Read a pack; its images stay encoded.

    Raises:
        DataError: The folder holds no pack, or one that is incomplete or of another version.
    """
    try:
        index = json.loads((folder / INDEX_FILE).read_text())
        tensors = load_file(folder / PICTURE_FILE)
        if index["version"] != VERSION:
            raise DataError(f"{folder}: is a pack of version {index['version']}, expected {VERSION}; pack again.")
        sources = tuple(PackSource(**source) for source in index["sources"])
        found = {name: index[name] for name in ("digest", "fingerprint", "side", "quality")}
        missing = _EXPECTED - tensors.keys()
        if missing:
            raise DataError(f"{folder}: lacks {', '.join(sorted(missing))}; pack again.")
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise DataError(f"{folder}: can't be read as a pack ({error}); make it again with train pack.") from error
    return Pack(folder, **found, sources=sources, tensors=tensors)


_EXPECTED = {"images", "ids", "image_ends", "id_ends", "sizes", "validation", "source", "object_ends"} | {
    "boxes",
    "areas",
    "members",
}


def is_pack(folder: Path) -> bool:
    """Whether a folder holds a pack, which may be incomplete."""
    return (folder / INDEX_FILE).is_file()


def pack_fingerprint(data: Sequence[Path], *, images: Path | None, settings: PackSettings) -> str:
    """Return the fingerprint of a pack of these sources with these settings."""
    described = json.dumps([*map(fingerprint, data), str(images), asdict(settings)])
    return hashlib.sha256(described.encode()).hexdigest()


def packed(
    data: Sequence[Path], output: Path, *, images: Path | None, settings: PackSettings, on_progress: Progress
) -> Pack:
    """Return the pack in `data`, or a pack of the sources in `data`, made in `output` unless it is current there.

    Raises:
        UsageError: There is a pack beside other data.
    """
    packs = [path for path in data if is_pack(path)]
    if packs and len(data) > 1:
        raise UsageError(f"{packs[0]} is a pack, which can't be combined. Pack all data together with train pack.")
    if packs:
        return read_pack(packs[0])
    for path in data:
        if not path.exists():
            raise DataError(f"{path}: no such file or folder; expected a data folder, a COCO file or a VOC root.")
    if is_pack(output):
        there = read_pack(output)
        if there.fingerprint == pack_fingerprint(data, images=images, settings=settings):
            return there
    return pack(data, output, images=images, settings=settings, on_progress=on_progress)


def pictures_of(one: Pack, numbers: Sequence[int]) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    """Yield decoded images, uint8 (H, W, 3), and their id maps, uint8 (H, W), in the order of `numbers`."""

    def decoded(number: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        image, ids = (
            Image.open(io.BytesIO(_piece(one.tensors[kind], one.tensors[ends], number)))
            for kind, ends in (("images", "image_ends"), ("ids", "id_ends"))
        )
        return np.asarray(image.convert("RGB")), np.asarray(ids)

    with ThreadPoolExecutor(THREADS) as pool:
        for some in _groups(numbers):
            yield from pool.map(decoded, some)


# --- encoding


def _fitted(
    pictures: Sequence[tuple[int, SourcePicture]], *, settings: PackSettings, on_progress: Progress
) -> tuple[list[_Coded], int, int]:
    """Encode all images with the largest side and quality that fit."""
    limit = np.inf if settings.max_megabytes is None else settings.max_megabytes * 1e6
    if not pictures:
        raise DataError("the data hold no image with an annotation; name other --data.")
    probes = [pictures[n] for n in np.unique(np.linspace(0, len(pictures) - 1, PROBES).astype(int))]
    for rung in RUNGS:
        side, quality = round(settings.side * rung[0]), rung[1]
        if np.isfinite(limit):
            probed = list(_code(probes, side=side, quality=quality, settings=settings))
            estimate = sum(one.bytes for one in probed) * len(pictures) / len(probes)
            if estimate > HEADROOM * limit:
                continue
        coded: list[_Coded] = []
        for one in _code(pictures, side=side, quality=quality, settings=settings):
            coded.append(one)
            on_progress(len(coded), len(pictures))
        if sum(one.bytes for one in coded) <= limit:
            return [one for one in coded if len(one.objects.areas)], side, quality
    raise DataError(
        f"{len(pictures)} images don't fit into {settings.max_megabytes:g} MB even at a side of {side} px; "
        "allow more with --max-megabytes, or leave data out."
    )


def _code(
    pictures: Sequence[tuple[int, SourcePicture]], *, side: int, quality: int, settings: PackSettings
) -> Iterator[_Coded]:
    def coded(numbered: tuple[int, SourcePicture]) -> _Coded:
        source, picture = numbered
        annotated = picture.read()
        height, width = annotated.void.shape
        scale = min(1.0, side / max(height, width))
        size = max(1, round(height * scale)), max(1, round(width * scale))
        image = Image.fromarray(annotated.image)
        if scale < 1:
            image = image.resize(size[::-1], Image.Resampling.LANCZOS)
        objects = id_map(annotated, size=size, min_area_px=settings.min_object_px)
        return _Coded(
            source,
            picture.validation,
            size,
            _bytes(image, format="WEBP", quality=quality),
            _bytes(Image.fromarray(objects.ids), format="PNG", optimize=True),
            objects,
        )

    with ThreadPoolExecutor(THREADS) as pool:
        for some in _groups(pictures):
            yield from pool.map(coded, some)


def _bytes(image: Image.Image, **how: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, **how)
    return out.getvalue()


def _tensors(coded: Sequence[_Coded]) -> dict[str, NDArray[Any]]:
    return {
        "images": np.frombuffer(b"".join(one.image for one in coded), np.uint8),
        "ids": np.frombuffer(b"".join(one.ids for one in coded), np.uint8),
        "image_ends": np.cumsum([len(one.image) for one in coded]),
        "id_ends": np.cumsum([len(one.ids) for one in coded]),
        "sizes": np.array([one.size for one in coded], np.int32),
        "validation": np.array([one.validation for one in coded], np.uint8),
        "source": np.array([one.source for one in coded], np.int32),
        "object_ends": np.cumsum([len(one.objects.areas) for one in coded]),
        "boxes": np.concatenate([one.objects.boxes for one in coded]),
        "areas": np.concatenate([one.objects.areas for one in coded]),
        "members": np.packbits(np.concatenate([one.objects.members for one in coded]), axis=1),
    }


def _groups(items: Sequence[T]) -> Iterator[Sequence[T]]:
    """Yield items in groups, so that at most one group is decoded and waiting at a time."""
    for start in range(0, len(items), AT_ONCE):
        yield items[start : start + AT_ONCE]


def _piece(data: NDArray[np.uint8], ends: NDArray[np.int64], number: int) -> bytes:
    return data[ends[number - 1] if number else 0 : ends[number]].tobytes()


def _require_both_splits(coded: Sequence[_Coded], data: Sequence[Path]) -> None:
    for name, wanted in (("train", False), ("val", True)):
        if not any(one.validation == wanted for one in coded):
            raise DataError(
                f"no {name} image with an object in {', '.join(map(str, data))}; add images to the {name} list, "
                "or name other --data."
            )


def _refuse_other_folder(output: Path) -> None:
    if output.exists() and not is_pack(output) and not (output.is_dir() and not any(output.iterdir())):
        raise StorageError(f"{output}: exists and is not a pack; name a new folder.")
