"""Reads images with class names: the classes of an image, its pixels, and the mask of each class.

Sources are folders with `images/`, `masks/` and `split.json`, where `classes.json` names the values of the masks or
`objects.json` those of each image; COCO files; and VOC roots. Classes are known by their names, so that sources can
be combined and a class can be held out of all of them.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from refinetool import masks
from refinetool.backends.names import suggest
from refinetool.errors import DataError, UsageError
from refinetool.formats import COCO, VOC_CLASS, open_dataset
from refinetool.formats.class_names import COCO_CLASSES, VOC_CLASSES, coco_category_names
from refinetool.images import read_image, read_sample
from refinetool.records import VOID, ImageArray, Mask, Sample
from refinetool.train.data.objects import read_ids
from refinetool.train.data.sources import SPLIT_FILE, drawn_for_validation, voc_split

SAME_CLASS = {
    "aeroplane": "airplane",
    "diningtable": "dining table",
    "motorbike": "motorcycle",
    "pottedplant": "potted plant",
    "sofa": "couch",
    "tvmonitor": "tv",
}
"""Names of VOC for classes that COCO names in another way."""
SCHEMES = ("pascal-5i", "coco-20i")
"""Published ways to hold out classes, in four folds each."""
BACKGROUND_NAMES = {"background", "_background_", "null", "void", "__background__"}


@dataclass(frozen=True, slots=True)
class Classes:
    """The pixels of an image, uint8 (H, W, 3), the mask of each of its classes, bool (H, W), and its void pixels."""

    image: ImageArray
    masks: Mapping[str, Mask]
    void: Mask


@dataclass(frozen=True, slots=True)
class ClassPicture:
    """One image: its name, whether it is for validation, the areas of its classes in pixels, and how to read it."""

    key: str
    validation: bool
    areas: Mapping[str, int]
    size: tuple[int, int]
    read: Callable[[], Classes]


def class_name(name: str) -> str:
    """Return the one name of a class that sources name differently."""
    plain = " ".join(name.lower().replace("_", " ").split())
    return SAME_CLASS.get(plain, plain)


def list_class_pictures(
    path: Path, *, images: Path | None, validation_share: float, max_pixels: int
) -> list[ClassPicture]:
    """List the images of a source with at least one class.

    Args:
        images: Folder of the images of a COCO file; None looks in the usual places.
        validation_share: If the source has no split, the fraction of its images for validation.
        max_pixels: Larger images are refused.

    Raises:
        DataError: The path does not exist, or is not such a source.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; expected a data folder, a COCO file or a VOC root.")
    if (path / SPLIT_FILE).is_file():
        return _of_folder(path, max_pixels=max_pixels)
    return _of_dataset(path, images=images, validation_share=validation_share, max_pixels=max_pixels)


# --- data folders


def _of_folder(folder: Path, *, max_pixels: int) -> list[ClassPicture]:
    split = _json(folder / SPLIT_FILE)
    by_stem = _value_names(folder)
    images = {path.stem: path for path in (folder / "images").iterdir()} if (folder / "images").is_dir() else {}
    pictures = []
    try:
        stems = [(stem, part == "val") for part in ("train", "val") for stem in split[part]]
    except (KeyError, TypeError) as error:
        raise DataError(f"{folder / SPLIT_FILE}: expected {{'train': [names], 'val': [names]}}.") from error
    for stem, validation in stems:
        mask = folder / "masks" / f"{stem}.png"
        if stem not in images or not mask.is_file():
            raise DataError(f"{folder / SPLIT_FILE} names {stem}, but {folder} lacks its image or its mask {mask.name}")
        names = by_stem(stem)
        ids = read_ids(mask)
        counts = np.bincount(ids.ravel(), minlength=256)
        areas: dict[str, int] = {}
        for value, name in names.items():
            if counts[value]:
                areas[name] = areas.get(name, 0) + int(counts[value])
        read = partial(_read_folder_picture, images[stem], mask, names, max_pixels=max_pixels)
        if areas:
            size = (ids.shape[0], ids.shape[1])
            pictures.append(ClassPicture(f"{folder.name}/{stem}", validation, areas, size, read))
    return pictures


def _value_names(folder: Path) -> Callable[[str], dict[int, str]]:
    """Return the function from an image's stem to the class name of each value of its mask, without background."""
    if (folder / "classes.json").is_file():
        table = _names_of(_json(folder / "classes.json"), folder / "classes.json")
        return lambda _: table
    if (folder / "objects.json").is_file():
        listed = _json(folder / "objects.json")
        try:
            named = {
                stem: {int(one["id"]): class_name(one["category"]) for one in found} for stem, found in listed.items()
            }
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"{folder / 'objects.json'}: expected {{image: [{{'id': value, 'category': name}}]}}."
            ) from error
        return lambda stem: named.get(stem, {})
    raise DataError(f"{folder}: has neither classes.json nor objects.json, so its classes have no names; add one.")


def _names_of(table: Any, path: Path) -> dict[int, str]:
    try:
        return {
            int(value): class_name(name)
            for value, name in table.items()
            if int(value) not in (0, VOID) and name.lower() not in BACKGROUND_NAMES
        }
    except (AttributeError, ValueError, TypeError) as error:
        raise DataError(f"{path}: expected {{value: name}}, such as {{'1': 'cat'}}.") from error


def _read_folder_picture(image: Path, mask: Path, names: Mapping[int, str], *, max_pixels: int) -> Classes:
    ids = read_ids(mask)
    pixels = read_image(image, size=(ids.shape[0], ids.shape[1]), max_pixels=max_pixels)
    found: dict[str, Mask] = {}
    for value, name in names.items():
        here: Mask = ids == value
        if here.any():
            found[name] = here | found[name] if name in found else here
    return Classes(pixels, found, ids == VOID)


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: can't be read as JSON ({error}).") from error


# --- COCO and VOC


def _of_dataset(path: Path, *, images: Path | None, validation_share: float, max_pixels: int) -> list[ClassPicture]:
    voc = path.is_dir()
    dataset = open_dataset(path, images=images, format=VOC_CLASS if voc else COCO)
    names = dict(enumerate(VOC_CLASSES)) if voc else coco_category_names(path)
    listed = voc_split(path) if voc else None
    samples = [sample for sample in dataset.samples() if listed is None or sample.key in listed]
    if listed is not None:
        validating = {key for key, validation in listed.items() if validation}
    else:
        validating = drawn_for_validation([sample.key for sample in samples], share=validation_share)
    pictures = []
    for sample in samples:
        areas: dict[str, int] = {}
        for region in sample.regions:
            if region.mask is not None and region.keep is None and region.category is not None:
                if region.category not in names:
                    continue
                name = class_name(names[region.category])
                areas[name] = areas.get(name, 0) + masks.area(region.mask)
        if areas:
            read = partial(_read_sample, sample, names, max_pixels=max_pixels)
            key = f"{path.stem}/{sample.key}"
            pictures.append(ClassPicture(key, sample.key in validating, areas, sample.size, read))
    return pictures


def _read_sample(sample: Sample, names: Mapping[int, str], *, max_pixels: int) -> Classes:
    pixels = read_sample(sample, max_pixels=max_pixels)
    void = np.zeros(sample.size, np.bool_) if sample.void is None else masks.decode(sample.void)
    found: dict[str, Mask] = {}
    for region in sample.regions:
        if region.mask is None or region.category is None or region.category not in names:
            continue
        mask = masks.decode(region.mask)
        if region.keep is not None:  # a crowd
            void = void | mask
            continue
        name = class_name(names[region.category])
        found[name] = found[name] | mask if name in found else mask
    return Classes(pixels, found, void)


# --- classes


def fold_classes(scheme: str, fold: int) -> tuple[str, ...]:
    """Return the classes that a fold holds out: `pascal-5i` (5 classes in VOC's order) or `coco-20i` (every fourth)."""
    if scheme == "pascal-5i":
        return tuple(class_name(name) for name in VOC_CLASSES[1 + 5 * fold : 6 + 5 * fold])
    return tuple(class_name(name) for name in COCO_CLASSES[fold::4])


def classes_of(pictures: Sequence[ClassPicture]) -> list[str]:
    """Return the names of all classes, sorted."""
    return sorted({name for picture in pictures for name in picture.areas})


def named_classes(given: Sequence[str], *, known: Sequence[str]) -> list[str]:
    """Return the classes that are given by names, or as folds such as `coco-20i:0`.

    Raises:
        UsageError: A name is that of no class, or a fold does not exist.
    """
    wanted: set[str] = set()
    for text in given:
        scheme, colon, number = text.partition(":")
        if colon and scheme in SCHEMES:
            if number not in ("0", "1", "2", "3"):
                raise UsageError(f"there is no fold {text!r}; the folds are {scheme}:0 to {scheme}:3")
            wanted |= set(fold_classes(scheme, int(number)))
        elif class_name(text) in known:
            wanted.add(class_name(text))
        else:
            raise UsageError(f"there is no class {text!r} in the data; {suggest(class_name(text), known)}")
    return sorted(wanted)
