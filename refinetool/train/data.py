"""Training examples: a crop around an object, the truth about K objects in it, and coarse prompts for them.

Example `n` of a run is a function of the folders, the seed and `n` alone, so a resumed run sees what an uninterrupted
one would have seen, whatever the number of worker processes.

A data folder holds `images/`, `masks/` (PNG of the same stem, the value is an id, 0 nothing, 255 ignored) and
`split.json` ({"train": [stems], "val": [stems]}). With a `classes.json` beside them the ids are classes and each
connected part counts as an object; without, they are instances.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from refinetool.backends.sam2 import BOX_CORNERS
from refinetool.corrupt import corrupt, signed_depth, superpixel_labels
from refinetool.errors import DataError
from refinetool.masks import bounding_box
from refinetool.prompts import background_point, foreground_point, mask_prompt
from refinetool.records import ABSENT, BACKGROUND, FOREGROUND, BoolArray, FloatArray, ImageArray, Size
from refinetool.settings import PromptSettings, TrainSettings

IGNORE = 255
PASTED = 254
"""The id of an object pasted from another picture."""
MIN_OBJECT_PX = 150
GOOD_IOU = 0.9
MAX_SUPERPIXEL_COUNT = 250


@dataclass(frozen=True, slots=True)
class TrainObject:
    """One thing to segment: all pixels of an id, or with `seed` (x, y) the part of them connected to that pixel."""

    value: int
    box: tuple[int, int, int, int]
    seed: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class Picture:
    """One annotated image, by path."""

    image: Path
    mask: Path
    objects: tuple[TrainObject, ...]


class Example(NamedTuple):
    """One crop of side S with K prompts (tensors without the batch axis), or a batch of them (B in front).

    image: uint8 (3, S, S) RGB.
    points: float32 (K, 4, 2) in model pixels: two box corners, a positive and a negative point.
    labels: int32 (K, 4), 2 3 1 0, or -1 where the box holds no background.
    masks: float32 (K, S/4, S/4), the Gaussian mask prompt.
    targets: uint8 (K, S/2, S/2), 255 times the share of each cell that the object covers.
    weights: uint8 (K, S/2, S/2), 40 times the loss weight: 1 far from the true edge, 4 on it, 0 where ignored.
    edges: uint8 (S/4, S/4), 1 where two annotated regions meet.
    coarse_iou: float32 (K,), IoU of the coarse mask with the truth.
    """

    image: Tensor
    points: Tensor
    labels: Tensor
    masks: Tensor
    targets: Tensor
    weights: Tensor
    edges: Tensor
    coarse_iou: Tensor


def index_folder(folder: Path, split: Literal["train", "val"]) -> list[Picture]:
    """List the annotated pictures of one data folder, with their objects of at least 150 pixels.

    Raises:
        DataError: the folder lacks `split.json`, or a picture named there.
    """
    listing = folder / "split.json"
    if not listing.is_file():
        raise DataError(f"{folder} has no split.json; expected images/, masks/ and split.json with train and val stems")
    by_class = (folder / "classes.json").is_file()
    images = {path.stem: path for path in (folder / "images").iterdir()}
    pictures = []
    for stem in json.loads(listing.read_text())[split]:
        mask = folder / "masks" / f"{stem}.png"
        if stem not in images or not mask.is_file():
            raise DataError(f"{listing} names {stem}, but {folder} lacks its image or its mask {mask.name}")
        objects = find_objects(read_ids(mask), by_class=by_class)
        if objects:
            pictures.append(Picture(images[stem], mask, tuple(objects)))
    return pictures


def find_objects(ids: NDArray[np.uint8], *, by_class: bool) -> list[TrainObject]:
    """The objects of an id map, uint8 (H, W); ids that are classes are also split into their connected parts."""
    objects = []
    for value in np.unique(ids):
        if value in (0, IGNORE):
            continue
        whole = ids == value
        box = bounding_box(whole)
        count, labels, stats, _ = cv2.connectedComponentsWithStats(whole.view(np.uint8), connectivity=8)
        if box is not None and (not by_class or count <= 4) and stats[1:, cv2.CC_STAT_AREA].sum() >= MIN_OBJECT_PX:
            objects.append(TrainObject(int(value), box, None))
        if by_class and count > 2:
            for part in range(1, count):
                x, y, w, h, area = (int(number) for number in stats[part])
                if area >= MIN_OBJECT_PX:
                    column = int(np.flatnonzero(labels[y, x : x + w] == part)[0]) + x
                    objects.append(TrainObject(int(value), (x, y, x + w, y + h), (column, y)))
    return objects


def object_mask(ids: NDArray[np.uint8], thing: TrainObject) -> BoolArray:
    """The mask of one object of an id map, bool (H, W)."""
    mask: BoolArray = ids == thing.value
    if thing.seed is None:
        return mask
    _, labels = cv2.connectedComponents(mask.view(np.uint8), connectivity=8)
    part: BoolArray = labels == labels[thing.seed[1], thing.seed[0]]
    return part


def read_ids(path: Path) -> NDArray[np.uint8]:
    """The id map of a palette or grey PNG, uint8 (H, W)."""
    with Image.open(path) as picture:
        return np.array(picture)


class ExampleSource(torch.utils.data.Dataset[Example]):
    """Draws example `n`: `source[n]`. Folders are drawn by the square root of their size, so small ones count."""

    def __init__(
        self,
        folders: Sequence[Sequence[Picture]],
        *,
        settings: TrainSettings,
        side_of: Callable[[int], int],
        seed: int,
    ) -> None:
        self.folders = [list(pictures) for pictures in folders]
        shares = np.sqrt([len(pictures) for pictures in self.folders])
        self.shares = shares / shares.sum()
        self.settings = settings
        self.side_of = side_of
        self.seed = seed

    def __getitem__(self, number: int) -> Example:
        cv2.setNumThreads(1)
        rng = np.random.default_rng((self.seed, number))
        while True:
            crop = self._crop(rng, self.side_of(number))
            if rng.random() < self.settings.composite_share:
                crop = paste(crop, self._crop(rng, self.side_of(number)), rng)
            if crop.target.mean() > 0.004 and crop.target.mean() < 0.85:
                return make_example(crop, rng, settings=self.settings)

    def _crop(self, rng: np.random.Generator, side: int) -> "Crop":
        pictures = self.folders[rng.choice(len(self.folders), p=self.shares)]
        picture = pictures[rng.integers(len(pictures))]
        thing = picture.objects[rng.integers(len(picture.objects))]
        pixels = cv2.imread(str(picture.image), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
        if pixels is None:
            raise DataError(f"{picture.image} can't be read as an image; replace it or take it out of split.json")
        ids = read_ids(picture.mask)
        if rng.random() < self.settings.frame_share:
            window = large_window(thing.box, (ids.shape[0], ids.shape[1]), rng)
        else:
            window = object_window(thing.box, (ids.shape[0], ids.shape[1]), rng)
        crop = cut(np.ascontiguousarray(pixels[..., ::-1]), ids, thing, window, side=side)
        return crop.mirrored() if rng.random() < 0.5 else crop


@dataclass(frozen=True, slots=True)
class Crop:
    """A square crop: image uint8 (S, S, 3), ids uint8 (S, S), and the target object, bool (S, S)."""

    image: ImageArray
    ids: NDArray[np.uint8]
    target: BoolArray

    def mirrored(self) -> "Crop":
        """The crop with left and right exchanged."""
        return Crop(
            np.ascontiguousarray(self.image[:, ::-1]),
            np.ascontiguousarray(self.ids[:, ::-1]),
            np.ascontiguousarray(self.target[:, ::-1]),
        )


def object_window(box: tuple[int, int, int, int], size: Size, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """A window around a box (xyxy) as `views` would cut it, with margins and least side drawn around its settings."""
    x0, y0, x1, y1 = box
    least = rng.uniform(48, 128)
    sides = np.array((x1 - x0, y1 - y0)) * (1 + rng.uniform(0.15, 0.6, 2) + rng.uniform(0.15, 0.6, 2))
    sides = np.maximum(np.maximum(sides, least), sides.max() / rng.uniform(1.3, 2.2))
    centre = np.array((x0 + x1, y0 + y1)) / 2 + rng.uniform(-0.08, 0.08, 2) * (x1 - x0, y1 - y0)
    return _inside(centre, sides, size)


def large_window(box: tuple[int, int, int, int], size: Size, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """A window of 60 to 100 % of each image side that holds the centre of the box."""
    sides = np.array((size[1], size[0])) * rng.uniform(0.6, 1.0, 2)
    centre = np.array((box[0] + box[2], box[1] + box[3])) / 2 + rng.uniform(-0.3, 0.3, 2) * sides
    return _inside(centre, sides, size)


def _inside(centre: NDArray[np.float64], sides: NDArray[np.float64], size: Size) -> tuple[int, int, int, int]:
    height, width = size
    w, h = min(int(sides[0]), width), min(int(sides[1]), height)
    x0 = int(np.clip(centre[0] - w / 2, 0, width - w))
    y0 = int(np.clip(centre[1] - h / 2, 0, height - h))
    return x0, y0, x0 + w, y0 + h


def cut(
    image: ImageArray,
    ids: NDArray[np.uint8],
    thing: TrainObject,
    window: tuple[int, int, int, int],
    *,
    side: int,
) -> Crop:
    """Cut a window (xyxy) from an annotated image and resize it to a square, as the model's backend does."""
    target = object_mask(ids, thing)
    x0, y0, x1, y1 = window
    return Crop(
        resize_antialiased(image[y0:y1, x0:x1], side),
        _resize_nearest(ids[y0:y1, x0:x1], side),
        _resize_nearest(target[y0:y1, x0:x1].astype(np.uint8), side).astype(bool),
    )


def _resize_nearest(ids: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    resized = cv2.resize(ids, (side, side), interpolation=cv2.INTER_NEAREST_EXACT)
    return np.asarray(resized, dtype=np.uint8)


def resize_antialiased(image: ImageArray, side: int) -> ImageArray:
    """Resize to (side, side) by the antialiased bilinear filter that SAM2's transforms use."""
    tensor = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None].float()
    resized = F.interpolate(tensor, (side, side), mode="bilinear", align_corners=False, antialias=True)
    return resized[0].round().clamp(0, 255).byte().permute(1, 2, 0).numpy()


def paste(crop: Crop, other: Crop, rng: np.random.Generator) -> Crop:
    """Paste the target of another crop, turned and scaled, and make it the target: its edge is known exactly."""
    side = len(crop.image)
    turn = cv2.getRotationMatrix2D((side / 2, side / 2), rng.uniform(-30, 30), rng.uniform(0.6, 1.3))
    matrix: NDArray[np.float64] = np.asarray(turn, np.float64)
    matrix[:, 2] += rng.uniform(-0.15, 0.15, 2) * side
    colours = cv2.warpAffine(other.image, matrix, (side, side), flags=cv2.INTER_LINEAR).astype(np.float32)
    alpha = cv2.warpAffine(other.target.astype(np.float32), matrix, (side, side), flags=cv2.INTER_LINEAR)
    colours = colours * rng.uniform(0.75, 1.25) + rng.uniform(-20, 20)
    target = alpha > 0.5
    if rng.random() < 0.7:
        alpha = cv2.GaussianBlur(alpha, (0, 0), rng.uniform(0.4, 1.2))
    blended = crop.image * (1 - alpha[..., None]) + colours * alpha[..., None]
    return Crop(blended.clip(0, 255).astype(np.uint8), np.where(target, PASTED, crop.ids).astype(np.uint8), target)


def make_example(crop: Crop, rng: np.random.Generator, *, settings: TrainSettings) -> Example:
    """Corrupt the target (or another object of the crop) K times and mine prompts from each coarse mask."""
    half = len(crop.image) // 2
    small = np.asarray(cv2.resize(crop.image, (half, half), interpolation=cv2.INTER_AREA), np.uint8)
    count = int(np.exp(rng.uniform(np.log(20), np.log(MAX_SUPERPIXEL_COUNT))))
    superpixels = superpixel_labels(small, count=count, compactness=10.0)
    others = [
        crop.ids == value
        for value in np.unique(crop.ids)
        if value not in (0, IGNORE) and 0.004 < (crop.ids == value).mean() < 0.65
    ]
    ignored = cv2.resize((crop.ids == IGNORE).astype(np.uint8), (half, half), interpolation=cv2.INTER_AREA) > 0

    rows = []
    for _ in range(settings.prompts_per_image):
        truth = crop.target
        if others and rng.random() < settings.other_object_share:
            truth = others[rng.integers(len(others))]
        share = cv2.resize(truth.astype(np.float32), (half, half), interpolation=cv2.INTER_AREA)
        good = share >= 0.5
        if not good.any():
            good = share > 0
        neighbour = None
        if others:
            other = others[rng.integers(len(others))].astype(np.uint8)
            neighbour = cv2.resize(other, (half, half), interpolation=cv2.INTER_NEAREST).astype(bool) & ~good
        nearly_right = rng.random() < settings.good_share
        coarse = corrupt(
            good,
            rng,
            labels=superpixels,
            neighbour=neighbour,
            low=GOOD_IOU if nearly_right else settings.coarse_low,
            high=1.0 if nearly_right else settings.coarse_high,
            tries=6,
        )
        depth = signed_depth(good)
        weight = (1 + 3 * np.exp(-((depth / 5) ** 2))) * ~ignored
        overlap = (coarse & good).sum() / (coarse | good).sum()
        rows.append((*prompt_arrays(coarse, rng), share, weight, overlap))

    points, labels, masks, shares, weights, overlaps = (np.stack(column) for column in zip(*rows, strict=True))
    return Example(
        image=torch.from_numpy(photometric(crop.image, rng)).permute(2, 0, 1).contiguous(),
        points=torch.from_numpy(points).float(),
        labels=torch.from_numpy(labels).int(),
        masks=torch.from_numpy(masks).float(),
        targets=torch.from_numpy((shares * 255).round().astype(np.uint8)),
        weights=torch.from_numpy((weights * 40).round().astype(np.uint8)),
        edges=torch.from_numpy(meeting_lines(crop.ids, cell=4)),
        coarse_iou=torch.from_numpy(overlaps).float(),
    )


def prompt_arrays(
    coarse: BoolArray, rng: np.random.Generator
) -> tuple[NDArray[np.float64], NDArray[np.int64], FloatArray]:
    """Prompts of a coarse mask given at half the model's side: points (4, 2) in model pixels, labels (4,), mask.

    The box is moved by -2 to 12 % of its side on each edge, as an elastic box may be, at most 4 % of the frame.
    """
    side = len(coarse)
    box = bounding_box(coarse)
    assert box is not None, "corrupt never returns an empty mask"
    positive = foreground_point(coarse, border_is_background=False)
    negative = background_point(coarse, box)
    extent = np.array((box[2] - box[0], box[3] - box[1]) * 2)
    moves = np.minimum(rng.uniform(-0.02, 0.12, 4) * extent, 0.04 * side) * (-1, -1, 1, 1)
    corners = np.clip(np.array(box) + moves, 0, side)

    quarter = cv2.resize(coarse.astype(np.float32), (side // 2, side // 2), interpolation=cv2.INTER_AREA)
    grid = quarter >= 0.5 if (quarter >= 0.5).any() else quarter > 0
    peak = foreground_point(grid, border_is_background=False)
    assert positive is not None and peak is not None
    mask = mask_prompt(grid, peak, settings=PromptSettings())
    absent = negative is None
    points = np.array((corners[:2], corners[2:], np.add(positive, 0.5), np.add(negative or (0, 0), 0.5))) * 2
    labels = np.array((*BOX_CORNERS, FOREGROUND, ABSENT if absent else BACKGROUND))
    return points, labels, mask


def photometric(image: ImageArray, rng: np.random.Generator) -> ImageArray:
    """Change brightness, contrast, channel gains, saturation, sharpness, noise and compression, within reason."""
    pixels: NDArray[np.floating] = image.astype(np.float32)
    pixels = (pixels - 128) * rng.uniform(0.65, 1.35) + 128 + rng.uniform(-25, 25)
    pixels = pixels * rng.uniform(0.88, 1.12, 3).astype(np.float32)
    grey = pixels.mean(axis=2, keepdims=True)
    pixels = grey + (pixels - grey) * rng.uniform(0.0 if rng.random() < 0.1 else 0.5, 1.5)
    if rng.random() < 0.2:
        pixels = np.asarray(cv2.GaussianBlur(pixels, (0, 0), rng.uniform(0.4, 1.5)), np.float32)
    if rng.random() < 0.3:
        pixels = pixels + rng.normal(0, rng.uniform(1, 8), pixels.shape)
    changed: ImageArray = pixels.clip(0, 255).astype(np.uint8)
    if rng.random() < 0.2:
        quality = int(rng.integers(30, 90))
        _, coded = cv2.imencode(".jpg", changed, (cv2.IMWRITE_JPEG_QUALITY, quality))
        changed = np.asarray(cv2.imdecode(coded, cv2.IMREAD_COLOR), np.uint8)
    return changed


def meeting_lines(ids: NDArray[np.uint8], *, cell: int) -> NDArray[np.uint8]:
    """Cells of side `cell` in which neighbouring pixels carry different ids (ignored pixels aside), uint8 0 or 1."""
    known = ids != IGNORE
    edges = np.zeros(ids.shape, np.uint8)
    edges[1:] |= (ids[1:] != ids[:-1]) & known[1:] & known[:-1]
    edges[:, 1:] |= (ids[:, 1:] != ids[:, :-1]) & known[:, 1:] & known[:, :-1]
    height, width = ids.shape
    cells: NDArray[np.uint8] = edges.reshape(height // cell, cell, width // cell, cell).max(axis=(1, 3))
    return cells
