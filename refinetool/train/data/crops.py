"""Makes square crops around objects, for B examples at once: windows are chosen on the CPU, cropping is on the device.

A crop is resized like a view in the model's backend: with the antialiased bilinear filter of SAM2's transforms. The
filter is separable, so a crop is two matrix products; ids are taken from the nearest pixel.
"""

import math
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from refinetool.corrupt.defects import WINDOW_MARGIN
from refinetool.train.data.draws import Draws
from refinetool.train.data.store import PictureStore

PASTED = 254
"""The id of an object pasted from another image."""
WHOLE = 256
"""Sum of the weights of one pass of a resampling."""
LEAST_FRACTION = 0.006
"""An object that covers a smaller fraction of its window is shown in a closer window."""
SMALL_PX = (12, 64)
"""Longer side of the box of objects that are shown smaller than they are ..."""
LEAST_AREA_PX = 100
"""... which keep about this area."""


@dataclass(frozen=True, slots=True)
class Windows:
    """The windows of B examples, on the CPU.

    picture, object: int64 (B,), rows of the store.
    boxes: int64 (B, 4), half-open xyxy inside the image.
    pixels: int64 (B, 2), how many pixels of width and height the crop is reduced to, at most those of the box.
    mirrored: bool (B,).
    """

    picture: Tensor
    object: Tensor
    boxes: Tensor
    pixels: Tensor
    mirrored: Tensor

    def __len__(self) -> int:
        return len(self.picture)

    @property
    def reduced(self) -> Tensor:
        """Which crops have fewer pixels than their boxes: bool (B,)."""
        return (self.pixels < self.boxes[:, 2:] - self.boxes[:, :2]).any(1)


@dataclass(frozen=True, slots=True)
class Crops:
    """B square crops of side S on the device.

    image: float32 (B, 3, S, S), whole numbers 0..255.
    ids: int64 (B, S, S).
    target: bool (B, S, S), the object of the example.
    members: bool (B, J, 256), which ids make up each of J objects of the image, drawn with replacement.
    trust: float32 (B,), how far outlines can be trusted to the pixel, 0..1.
    pixels: int64 (B, 2), how many pixels of the image lie along the width and the height of the crop.
    """

    image: Tensor
    ids: Tensor
    target: Tensor
    members: Tensor
    trust: Tensor
    pixels: Tensor

    def take(self, rows: Tensor) -> "Crops":
        """Return some of the rows."""
        return Crops(*(getattr(self, field.name)[rows] for field in fields(self)))

    def put(self, rows: Tensor, others: "Crops") -> "Crops":
        """Return the crops with others in place of some of the rows."""
        names = [field.name for field in fields(self)]
        return Crops(*(getattr(self, name).index_put((rows,), getattr(others, name)) for name in names))


# --- choosing windows


def draw_windows(store: PictureStore, draws: Draws, *, frame_share: float, smaller_share: float) -> Windows:
    """Choose a source, an image, an object and a window around it for every row.

    Args:
        frame_share: Fraction of windows that show much of the image instead of the object with a margin.
        smaller_share: Fraction of windows that show the object as if it were smaller, see `smaller_by`.
    """
    source = draws.choice("source", store.shares)
    group_sizes = torch.tensor([len(group) for group in store.groups])
    place = draws.below("picture", group_sizes[source])
    picture = torch.cat(store.groups)[group_sizes.cumsum(0)[source] - group_sizes[source] + place]
    first, last = store.first_object[picture], store.first_object[picture + 1]
    thing = first + draws.below("object", last - first)
    size, box = store.sizes[picture].flip(1).double(), store.boxes[thing]
    smaller = draws.uniform("smaller") < smaller_share
    scale = torch.where(smaller, smaller_by(box, store.areas[thing], draws), 1.0)[:, None]
    near = (object_window(box * scale, size * scale, draws) / scale).floor()
    wide = large_window(box, size, draws)
    room = (wide[:, 2:] - wide[:, :2]).prod(1)
    far = (draws.uniform("frame") < frame_share) & (store.areas[thing] > LEAST_FRACTION * room) & ~smaller
    boxes = torch.where(far[:, None], wide, near).long()
    pixels = ((boxes[:, 2:] - boxes[:, :2]) * scale).round().clamp(min=1).long()
    return Windows(picture, thing, boxes, pixels, draws.uniform("mirror") < 0.5)


def smaller_by(boxes: Tensor, areas: Tensor, draws: Draws) -> Tensor:
    """Choose factors, float64 (B,), that make objects as small as they are in large images.

    The longer side of the box becomes SMALL_PX pixels long, drawn evenly on a logarithmic scale, if it is longer. The
    object keeps about LEAST_AREA_PX pixels.

    Args:
        boxes: float64 (B, 4), xyxy.
        areas: (B,), in pixels.
    """
    low, high = (math.log(side) for side in SMALL_PX)
    wanted = draws.between("small side", low, high).exp()
    longer = (boxes[:, 2:] - boxes[:, :2]).amax(1)
    return torch.maximum(wanted / longer, (LEAST_AREA_PX / areas.double()).sqrt()).clamp(max=1)


def object_window(boxes: Tensor, sizes: Tensor, draws: Draws) -> Tensor:
    """Choose windows around boxes like those of `views`, with margins and minimum side drawn around its settings.

    Args:
        boxes: float64 (B, 4), xyxy.
        sizes: float64 (B, 2), (W, H) of the images.
    """
    extent = boxes[:, 2:] - boxes[:, :2]
    margins = draws.between("margins", *WINDOW_MARGIN, 2, 2).sum(1)
    sides = extent * (1 + margins)
    sides = torch.maximum(sides, draws.between("least", 48, 128)[:, None])
    sides = torch.maximum(sides, sides.amax(1, keepdim=True) / draws.between("aspect", 1.3, 2.2)[:, None])
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2 + draws.between("centre", -0.08, 0.08, 2) * extent
    return _inside(centre, sides, sizes)


def large_window(boxes: Tensor, sizes: Tensor, draws: Draws) -> Tensor:
    """Choose windows of 60 to 100 % of each side of the image that contain the centre of the box."""
    sides = sizes * draws.between("large", 0.6, 1.0, 2)
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2 + draws.between("large centre", -0.3, 0.3, 2) * sides
    return _inside(centre, sides, sizes)


def _inside(centre: Tensor, sides: Tensor, sizes: Tensor) -> Tensor:
    sides = torch.minimum(sides.floor(), sizes).clamp(min=1)
    first = torch.minimum((centre - sides / 2).floor().clamp(min=0), sizes - sides)
    return torch.cat((first, first + sides), 1)


# --- cropping


def cut(store: PictureStore, windows: Windows, draws: Draws, *, side: int, companions: int) -> Crops:
    """Crop windows from the store and resize them to squares.

    Args:
        draws: On the CPU, one row per window.
        companions: J, the number of other objects of the image to draw.
    """
    device = store.device
    first, last = store.first_object[windows.picture], store.first_object[windows.picture + 1]
    picks = [first + draws.below(f"companion {n}", last - first) for n in range(companions)]
    boxes, mirrored = windows.boxes.to(device), windows.mirrored.to(device)
    start = store.offsets[windows.picture].to(device)
    stride = store.sizes[windows.picture, 1].to(device)
    lengths = windows.boxes[:, 2:] - windows.boxes[:, :2]
    width, height = (int(length) for length in lengths.amax(0))

    rows = torch.minimum(boxes[:, 1, None] + torch.arange(height, device=device), boxes[:, 3, None] - 1)
    columns = torch.minimum(boxes[:, 0, None] + torch.arange(width, device=device), boxes[:, 2, None] - 1)
    at = start[:, None, None] + rows[:, :, None] * stride[:, None, None] + columns[:, None]
    pixels = store.pixels[at].float()  # (B, height, width, 3)
    across = resampling(boxes[:, 2] - boxes[:, 0], source=width, target=side, mirrored=mirrored)
    down = resampling(boxes[:, 3] - boxes[:, 1], source=height, target=side, mirrored=torch.zeros_like(mirrored))
    squeezed = (down @ pixels.flatten(2)).view(len(windows), side, width, 3).transpose(1, 2)  # (B, width, side, 3)
    resized = (across @ squeezed.flatten(2)).view(len(windows), side, side, 3)  # (B, column, row, 3)
    image = (resized / WHOLE**2).permute(0, 3, 2, 1).round()

    row = boxes[:, 1, None] + nearest(boxes[:, 3] - boxes[:, 1], target=side, mirrored=torch.zeros_like(mirrored))
    column = boxes[:, 0, None] + nearest(boxes[:, 2] - boxes[:, 0], target=side, mirrored=mirrored)
    ids = store.ids[start[:, None, None] + row[:, :, None] * stride[:, None, None] + column[:, None]].long()
    target = lookup(store.members[windows.object.to(device)], ids)
    members = store.members[torch.stack(picks, 1).to(device)]
    trust = store.trust[windows.picture].to(device)
    return Crops(image.contiguous(), ids, target, members, trust, boxes[:, 2:] - boxes[:, :2])


def resampling(lengths: Tensor, *, source: int, target: int, mirrored: Tensor) -> Tensor:
    """Make matrices that resize lines with an antialiased bilinear filter, like `interpolate(..., antialias=True)`.

    Weights are whole numbers that add up to WHOLE. Two such passes over whole-number colours stay below 2^24, so they
    are exact in float32, and a crop does not depend on the order of summation, which varies with device and batch size.

    Args:
        lengths: int64 (B,), number of the first `source` entries of each line that are used.
        mirrored: bool (B,), whether to reverse the line.

    Returns:
        float32 (B, target, source).
    """
    scale = lengths.float()[:, None, None] / target
    place = torch.arange(target, device=lengths.device).float()
    place = torch.where(mirrored[:, None], target - 1 - place, place)
    centre = (place[:, :, None] + 0.5) * scale
    entry = torch.arange(source, device=lengths.device)
    weights = (1 - ((entry + 0.5 - centre) / scale.clamp(min=1)).abs()).clamp(min=0)
    weights = weights * (entry < lengths[:, None, None])
    weights = (weights * (WHOLE / weights.sum(2, keepdim=True))).round()
    largest = weights.argmax(2, keepdim=True)
    return weights.scatter_add(2, largest, WHOLE - weights.sum(2, keepdim=True))


def nearest(lengths: Tensor, *, target: int, mirrored: Tensor) -> Tensor:
    """Return the nearest of the first `lengths` entries for each of `target` positions, int64 (B, target)."""
    place = torch.arange(target, device=lengths.device)
    place = torch.where(mirrored[:, None], target - 1 - place, place)
    return under_centre(place, count=target, of=lengths[:, None])


def under_centre(place: Tensor, *, count: int | Tensor, of: int | Tensor) -> Tensor:
    """Return which of `of` equal parts of a line lies under the centre of each `place` among `count` equal parts."""
    return (2 * place + 1) * of // (2 * count)


def lookup(members: Tensor, ids: Tensor) -> Tensor:
    """Look up masks of objects: members bool (B, 256) or (B, J, 256), ids int64 (B, S, S) → bool (B, [J,] S, S)."""
    if members.ndim == 2:
        return members.gather(1, ids.flatten(1)).view(ids.shape)
    flat = ids.flatten(1)[:, None].expand(-1, members.shape[1], -1)
    return members.gather(2, flat).view(*members.shape[:2], *ids.shape[1:])


# --- pasting


def paste(crops: Crops, other: Crops, draws: Draws) -> Crops:
    """Paste the targets of other crops, rotated and scaled, as new targets, whose edges are known exactly.

    Args:
        draws: On the CPU, one row per crop.
    """
    side = crops.ids.shape[1]
    angle, scale = draws.between("turn", -math.pi / 6, math.pi / 6), draws.between("scale", 0.6, 1.3)
    shift = draws.between("shift", -0.3, 0.3, 2)  # in half sides, the unit of affine_grid
    linear = torch.stack((angle.cos(), angle.sin(), -angle.sin(), angle.cos()), 1).view(-1, 2, 2) / scale[:, None, None]
    matrix = torch.cat((linear, -linear @ shift[:, :, None]), 2).to(crops.image.device)
    grid = F.affine_grid(matrix, [len(crops.image), 3, side, side], align_corners=False)
    colours = F.grid_sample(other.image, grid, align_corners=False)
    alpha = F.grid_sample(other.target[:, None].float(), grid, align_corners=False)
    gain, offset, blur, sigma = (
        draw.to(crops.image.device).view(-1, 1, 1, 1)
        for draw in (
            draws.between("gain", 0.75, 1.25),
            draws.between("offset", -20, 20),
            draws.uniform("blur"),
            draws.between("sigma", 0.4, 1.2),
        )
    )
    target = alpha[:, 0] > 0.5
    target = torch.where(target.flatten(1).any(1)[:, None, None], target, crops.target)
    alpha = torch.where(blur < 0.7, blurred(alpha, sigma.flatten()), alpha)
    image = crops.image * (1 - alpha) + (colours * gain + offset) * alpha
    ids = torch.where(alpha[:, 0] > 0.5, PASTED, crops.ids)
    return replace(
        crops,
        image=image.round().clamp(0, 255),
        ids=ids,
        target=target,
        trust=torch.ones_like(crops.trust),
        pixels=torch.full_like(crops.pixels, side),  # turned pixels have no rows and columns
    )


def blurred(images: Tensor, sigmas: Tensor) -> Tensor:
    """Apply a Gaussian blur with one sigma in pixels per image, up to 1.6: float32 (B, C, H, W)."""
    channels = images.shape[1]
    reach = torch.arange(-4, 5, device=images.device)
    kernel = torch.exp(-(reach**2) / (2 * sigmas[:, None] ** 2))
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(channels, 0)
    flat = F.pad(images, (4, 4, 4, 4), mode="replicate").flatten(0, 1)[None]
    rows = F.conv2d(flat, kernel[:, None, None], groups=len(kernel))
    return F.conv2d(rows, kernel[:, None, :, None], groups=len(kernel))[0].view(images.shape)
