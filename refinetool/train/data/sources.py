"""Reads training images from data folders, COCO files, VOC roots and folders of masks into one kind of record.

Listing the images of a source is quick; the pixels of each are read on demand.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from refinetool import masks
from refinetool.errors import DataError
from refinetool.formats import VOC_OBJECT, open_dataset
from refinetool.images import read_image, read_sample
from refinetool.records import VOID, Mask, Sample
from refinetool.train.data.hqseg import is_hqseg, list_hqseg
from refinetool.train.data.objects import find_objects, large_ones, object_mask, read_ids
from refinetool.train.data.pictures import AnnotatedPicture, SourcePicture

SPLIT_FILE = "split.json"
LARGEST_WHOLE_CLASS = 3
"""A class with more components than this is not used as a whole object, only in parts."""


def list_pictures(
    path: Path, *, images: Path | None, validation_share: float, max_pixels: int, min_object_px: int
) -> list[SourcePicture]:
    """List the images of a folder with `split.json`, HQSeg-44K, a COCO file, a VOC root, or a folder of mask PNGs.

    Args:
        images: Folder of the images; None looks in the usual places beside the annotations.
        validation_share: If the data have no split, the fraction of images for validation, chosen by their keys.
        max_pixels: Larger images are refused.
        min_object_px: Objects with fewer pixels are left out.

    Raises:
        DataError: The path does not exist, or does not hold what was expected.
        UsageError: The format of the masks can't be detected.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; expected a data folder, a COCO file or a VOC root.")
    if (path / SPLIT_FILE).is_file():
        return _of_folder(path, max_pixels=max_pixels, min_object_px=min_object_px)
    if path.is_dir() and is_hqseg(path):
        return list_hqseg(path, max_pixels=max_pixels, min_object_px=min_object_px)
    if path.is_dir() and (path / "images").is_dir() and (path / "masks").is_dir():
        raise DataError(f"{path}: has no {SPLIT_FILE}; expected {{'train': [names], 'val': [names]}} in it.")
    return _of_dataset(
        path, images=images, validation_share=validation_share, max_pixels=max_pixels, min_object_px=min_object_px
    )


def fingerprint(path: Path) -> str:
    """Hash the names, sizes and modification times of the files of a source; any change to the data changes it."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    digest = hashlib.sha256(path.name.encode())
    for file in files:
        stat = file.stat()
        name = os.path.relpath(file, path)
        digest.update(f"{name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


# --- data folders


def _of_folder(folder: Path, *, max_pixels: int, min_object_px: int) -> list[SourcePicture]:
    listing = folder / SPLIT_FILE
    try:
        split = json.loads(listing.read_text())
        stems = [(stem, name == "val") for name in ("train", "val") for stem in split[name]]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{listing}: expected {{'train': [names], 'val': [names]}}, found something else.") from error
    images = {path.stem: path for path in (folder / "images").iterdir()} if (folder / "images").is_dir() else {}
    by_class = (folder / "classes.json").is_file()
    pictures = []
    for stem, validation in stems:
        mask = folder / "masks" / f"{stem}.png"
        if stem not in images or not mask.is_file():
            raise DataError(f"{listing} names {stem}, but {folder} lacks its image or its mask {mask.name}")
        read = partial(
            _read_folder_picture,
            images[stem],
            mask,
            by_class=by_class,
            max_pixels=max_pixels,
            min_object_px=min_object_px,
        )
        pictures.append(SourcePicture(stem, validation, read))
    return pictures


def _read_folder_picture(
    image: Path, mask: Path, *, by_class: bool, max_pixels: int, min_object_px: int
) -> AnnotatedPicture:
    ids = read_ids(mask)
    pixels = read_image(image, size=(ids.shape[0], ids.shape[1]), max_pixels=max_pixels)
    things = find_objects(ids, by_class=by_class, min_px=min_object_px)
    return AnnotatedPicture(pixels, tuple(object_mask(ids, thing) for thing in things), ids == VOID)


# --- COCO, VOC, mask folders


def _of_dataset(
    path: Path, *, images: Path | None, validation_share: float, max_pixels: int, min_object_px: int
) -> list[SourcePicture]:
    listed = voc_split(path)
    objects = VOC_OBJECT if (path / "SegmentationObject").is_dir() else None
    samples = [s for s in open_dataset(path, images=images, format=objects).samples() if s.regions]
    if listed is not None:
        samples = [sample for sample in samples if sample.key in listed]
        validating = {key for key, validation in listed.items() if validation}
    else:
        validating = drawn_for_validation([sample.key for sample in samples], share=validation_share)
    read = partial(_read_sample, max_pixels=max_pixels, min_object_px=min_object_px)
    return [SourcePicture(sample.key, sample.key in validating, partial(read, sample)) for sample in samples]


def drawn_for_validation(keys: Sequence[str], *, share: float) -> set[str]:
    """Return the keys whose hash is below `share`; adding data does not change them. At least one of two or more."""

    def place(key: str) -> float:
        return int.from_bytes(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()[:8]) / 2**64

    chosen = {key for key in keys if place(key) < share}
    return chosen or ({min(keys, key=place)} if len(keys) > 1 and share > 0 else set())


def voc_split(root: Path) -> dict[str, bool] | None:
    """Return the images of VOC's segmentation lists, True for those of the val list; None without lists."""
    lists = {name: root / "ImageSets" / "Segmentation" / f"{name}.txt" for name in ("train", "val")}
    if not all(path.is_file() for path in lists.values()):
        return None
    return {key: name == "val" for name, path in lists.items() for key in path.read_text().split()}


def _read_sample(sample: Sample, *, max_pixels: int, min_object_px: int) -> AnnotatedPicture:
    pixels = read_sample(sample, max_pixels=max_pixels)
    void = np.zeros(sample.size, np.bool_) if sample.void is None else masks.decode(sample.void)
    objects: list[Mask] = []
    for region in sample.regions:
        if region.mask is None:
            continue
        mask = masks.decode(region.mask)
        if region.keep is not None:
            void = void | mask
        elif sample.layout == "semantic":
            objects += _parts(mask)
        else:
            objects.append(mask)
    return AnnotatedPicture(pixels, large_ones(objects, min_px=min_object_px), void)


def _parts(mask: Mask) -> Iterator[Mask]:
    """Yield a class as objects: its connected components, and the whole if there are few."""
    count, labels = cv2.connectedComponents(mask.view(np.uint8), connectivity=8)
    if count - 1 <= LARGEST_WHOLE_CLASS:
        yield mask
    if count > 2:
        yield from (labels == part for part in range(1, count))


# --- objects that may overlap, as one map


@dataclass(frozen=True, slots=True)
class IdMap:
    """Objects as one map: ids uint8 (H, W) from 0 (background) to 253, 255 for void.

    members: bool (M, 256), which ids make up each object; objects that overlap share ids.
    boxes: int32 (M, 4), tight half-open xyxy.
    areas: int32 (M,), pixels.
    """

    ids: NDArray[np.uint8]
    members: NDArray[np.bool_]
    boxes: NDArray[np.int32]
    areas: NDArray[np.int32]


LAST_ID = 253
"""254 is for pasted objects, 255 for void."""


def id_map(picture: AnnotatedPicture, *, size: tuple[int, int], min_area_px: int) -> IdMap:
    """Combine objects into one map, resized to `size` (H, W): every combination that occurs at some pixel gets an id.

    Objects smaller than `min_area_px` after resizing are left out, and so are the smallest ones if ids run out.
    """
    shape = picture.void.shape
    ids = np.zeros(shape, np.int32)
    owners: list[tuple[int, ...]] = [()]
    order = sorted(range(len(picture.objects)), key=lambda n: -int(np.count_nonzero(picture.objects[n])))
    for n in order:
        covered = np.flatnonzero(picture.objects[n])
        old, where = np.unique(ids.flat[covered], return_inverse=True)
        ids.flat[covered] = (len(owners) + np.arange(len(old)))[where]
        owners += [(*owners[atom], n) for atom in old]
    ids[picture.void] = -1
    ids = ids[_nearest(shape[0], size[0])][:, _nearest(shape[1], size[1])]
    return _numbered(ids, owners, count=len(picture.objects), min_area_px=min_area_px)


def _nearest(source: int, target: int) -> NDArray[np.int64]:
    nearest: NDArray[np.int64] = ((np.arange(target) + 0.5) * source / target).astype(np.int64)
    return nearest


def _numbered(ids: NDArray[np.int32], owners: Sequence[tuple[int, ...]], *, count: int, min_area_px: int) -> IdMap:
    """Number the remaining combinations from 1, without the objects that are too small."""
    pixels = np.bincount(ids[ids >= 0], minlength=len(owners))
    areas = np.zeros(count, np.int64)
    for atom in np.flatnonzero(pixels):
        areas[list(owners[int(atom)])] += pixels[atom]
    kept = [int(n) for n in np.argsort(-areas, kind="stable") if areas[n] >= min_area_px]
    while len(numbers := _combinations(owners, pixels, frozenset(kept))) > LAST_ID:
        kept = kept[: max(1, len(kept) - max(1, (len(numbers) - LAST_ID) // 2))]
    table = np.zeros(len(owners) + 1, np.uint8)
    table[-1] = VOID
    members = np.zeros((len(kept), 256), np.bool_)
    place = {n: row for row, n in enumerate(kept)}
    for atom in np.flatnonzero(pixels):
        mine = tuple(n for n in owners[int(atom)] if n in place)
        table[atom] = numbers.get(mine, 0)
        members[[place[n] for n in mine], table[atom]] = True
    numbered: NDArray[np.uint8] = table[ids]
    boxes = [masks.bounding_box(np.asarray(row[numbered])) for row in members]
    return IdMap(numbered, members, np.array(boxes, np.int32).reshape(-1, 4), areas[kept].astype(np.int32))


def _combinations(
    owners: Sequence[tuple[int, ...]], pixels: NDArray[np.int64], kept: frozenset[int]
) -> dict[tuple[int, ...], int]:
    found = {tuple(n for n in owners[int(atom)] if n in kept) for atom in np.flatnonzero(pixels)} - {()}
    return {combination: number for number, combination in enumerate(sorted(found), start=1)}
