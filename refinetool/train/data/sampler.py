"""Makes training examples in torch, in batches, on the training device.

The steps are crop → paste → choose objects → corrupt → mine prompts → change colours. Example `n` of a run is a
function of the data, the seed, the side and `n`, and does not depend on its batch, so a resumed run uses the same
examples as an uninterrupted one.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from refinetool.corrupt.defects import NEARLY_RIGHT, SUPERPIXEL_COUNTS
from refinetool.records import VOID
from refinetool.settings import TrainSettings
from refinetool.train.data.corruptions import REACH, Scene, corrupt, overlap, superpixels
from refinetool.train.data.crops import Crops, cut, draw_windows, lookup, paste
from refinetool.train.data.distance import signed_distance
from refinetool.train.data.draws import Draws, draws_for
from refinetool.train.data.examples import Example
from refinetool.train.data.photometric import noise_bank, photometric
from refinetool.train.data.prompts import mine
from refinetool.train.data.resolution import in_pixels, shrunk
from refinetool.train.data.store import PictureStore

COMPANIONS = 6
"""Number of objects of an image that are considered as companion of the target in the crop."""
LEAST_COVER, LARGEST_COVER = 0.004, 0.65
"""Minimum and maximum fraction of the crop that a companion covers."""
COMPACTNESS = 45.0
"""Chosen so that superpixels' outlines are as long, and lie on edges as strong, as those of scikit-image at 10."""
EDGE_WEIGHT = 3.0
"""What the loss weight of 1 gains at an edge that can be trusted. Outlines that are a few pixels off are not repeated
to the pixel, but still teach shapes."""
EDGE_SIGMA = 5.0
"""Width of the zone around the true edge where the loss weights are higher, in pixels of half the side."""
CELL = 4


class Sampler:
    """Draws examples by number from the images of a store, on its device."""

    def __init__(self, store: PictureStore, *, settings: TrainSettings, seed: int) -> None:
        self.store, self.settings, self.seed = store, settings, seed
        self.bank = noise_bank(store.device)

    @torch.no_grad()
    def batch(self, numbers: Tensor, *, side: int) -> Example:
        """Make the examples with these numbers, int64 (B,) on the CPU, as crops of a side that is a multiple of 32."""
        draws = draws_for(self.seed, numbers)
        crops = self._crops(draws, side=side)
        image = photometric(crops.image, draws.fork("colours"), bank=self.bank)
        return make_examples(crops, image, draws, settings=self.settings)

    def _crops(self, draws: Draws, *, side: int) -> Crops:
        settings = self.settings
        windows = draw_windows(
            self.store, draws.fork("window"), frame_share=settings.frame_share, smaller_share=settings.smaller_share
        )
        crops = cut(self.store, windows, draws.fork("companions"), side=side, companions=COMPANIONS)
        return shrunk(self._with_pasted(crops, draws, side=side), windows.pixels, rows=windows.reduced)

    def _with_pasted(self, crops: Crops, draws: Draws, *, side: int) -> Crops:
        """Paste objects of other images into some of the crops."""
        on_host = (draws.uniform("composite") < self.settings.composite_share).nonzero()[:, 0]
        if not len(on_host):
            return crops
        rows, drawn = on_host.to(self.store.device), draws.take(on_host)
        shown = draw_windows(self.store, drawn.fork("pasted window"), frame_share=0.0, smaller_share=0.0)
        other = cut(self.store, shown, drawn.fork("pasted"), side=side, companions=1)
        return crops.put(rows, paste(crops.take(rows), other, drawn.fork("paste")))


def make_examples(crops: Crops, image: Tensor, draws: Draws, *, settings: TrainSettings) -> Example:
    """Corrupt the target, or another object of the crop, K times, and mine prompts from each coarse mask.

    Args:
        image: The model's input: the crops' images with changed colours, float32 (B, 3, S, S).
        draws: On the CPU, one row per crop.
    """
    device, count, k = image.device, len(image), settings.prompts_per_image
    things = torch.stack((crops.target, companion(crops)), 1)
    covered = F.avg_pool2d(things.float(), 2)  # (B, 2, S/2, S/2)
    good = at_least_half(covered)
    depth = signed_distance(good.flatten(0, 1), reach=REACH).view(count, 2, *good.shape[2:])
    low, high = (math.log(bound) for bound in SUPERPIXEL_COUNTS)
    wanted = draws.between("superpixels", low, high).exp().long()
    labels = superpixels(
        F.avg_pool2d(crops.image, 2).round(),
        wanted.to(device),
        draws.fork("superpixels").to(device),
        compactness=COMPACTNESS,
        rounds=2,
    )

    # From here on a row is a prompt: K rows per crop.
    rows = draws.split("prompt", k)
    crop = torch.arange(count, device=device).repeat_interleave(k)
    which = (rows.uniform("other") < settings.other_object_share).long().to(device)
    scene = Scene(
        masks=good[crop, which],
        depth=depth[crop, which],
        neighbours=good[crop, 1 - which] & ~good[crop, which],
        superpixels=labels[crop],
    )
    goals = draw_goals(rows, settings=settings)
    coarse = corrupt(scene, rows.fork("corrupt"), **goals._asdict(), tries=settings.corruption_tries)
    coarse = in_pixels(coarse, crops.pixels[crop])
    prompts = mine(coarse, rows.fork("prompts").to(device))
    known = F.max_pool2d((crops.ids == VOID).float()[:, None], 2)[:, 0] == 0
    trust = crops.trust[crop][:, None, None]
    weights = (1 + EDGE_WEIGHT * trust * torch.exp(-((scene.depth / EDGE_SIGMA) ** 2))) * known[crop]
    return Example(
        image=image.byte(),
        points=per_crop(prompts.points, count),
        labels=per_crop(prompts.labels, count),
        masks=per_crop(prompts.masks, count),
        coarse=per_crop(coarse, count),
        targets=per_crop((covered[crop, which] * 255).round().byte(), count),
        weights=per_crop((weights * 40).round().byte(), count),
        edges=meeting_lines(crops.ids, cell=CELL),
        coarse_iou=per_crop(overlap(coarse, scene.masks), count),
        truth=per_crop(things[crop, which], count),
    )


class Goals(NamedTuple):
    """The goals of n coarse masks: `blobs`, bool (n,), or ordinary, and the band of IoU, float32 (n,)."""

    blobs: Tensor
    low: Tensor
    high: Tensor


def draw_goals(draws: Draws, *, settings: TrainSettings) -> Goals:
    """Draw which coarse masks should be nearly right, and which should be blobs."""
    place = draws.uniform("nearly right")
    nearly, blobs = place < settings.good_share, place >= 1 - settings.blob_share
    low = torch.where(nearly, NEARLY_RIGHT, torch.where(blobs, settings.blob_low, settings.coarse_low))
    high = torch.where(nearly, 1.0, torch.where(blobs, settings.blob_high, settings.coarse_high))
    return Goals(blobs, low, high)


def per_crop(rows: Tensor, count: int) -> Tensor:
    """Reshape one row per prompt to rows per crop: (B x K, ...) → (B, K, ...)."""
    return rows.view(count, -1, *rows.shape[1:])


def companion(crops: Crops) -> Tensor:
    """Return the first drawn object that is visible and not the target, or else the target: bool (B, S, S)."""
    count, side, _ = crops.ids.shape
    pixels = torch.zeros(count, 256, device=crops.ids.device)
    pixels.scatter_add_(1, crops.ids.flatten(1), torch.ones_like(crops.ids.flatten(1), dtype=pixels.dtype))
    areas = (crops.members.float() @ pixels[:, :, None])[:, :, 0] / side**2
    covered = torch.zeros_like(pixels)
    covered.scatter_add_(1, crops.ids.flatten(1), crops.target.flatten(1).float())
    overlapping = (crops.members.float() @ covered[:, :, None])[:, :, 0] / side**2
    fits = (areas > LEAST_COVER) & (areas < LARGEST_COVER) & (overlapping < 0.5 * areas)
    first = fits.int().argmax(1)
    chosen = lookup(crops.members[torch.arange(count, device=first.device), first], crops.ids)
    return torch.where(fits.any(1)[:, None, None], chosen, crops.target)


def at_least_half(covered: Tensor) -> Tensor:
    """Return the cells that are at least half covered or, if there are none, all touched cells, or the middle cell."""
    good = covered >= 0.5
    touched = covered > 0
    good = torch.where(good.flatten(2).any(2)[..., None, None], good, touched)
    middle = covered.shape[-1] // 2
    good[..., middle, middle] |= ~good.flatten(2).any(2)
    return good


def meeting_lines(ids: Tensor, *, cell: int) -> Tensor:
    """Mark cells of side `cell` in which neighbouring pixels have different ids; ignored pixels don't count.

    ids (B, S, S) → uint8 (B, S / cell, S / cell), 0 or 1.
    """
    known = ids != VOID
    edges = torch.zeros(ids.shape, device=ids.device)
    edges[:, 1:] = ((ids[:, 1:] != ids[:, :-1]) & known[:, 1:] & known[:, :-1]).float()
    across = ((ids[:, :, 1:] != ids[:, :, :-1]) & known[:, :, 1:] & known[:, :, :-1]).float()
    edges[:, :, 1:] = torch.maximum(edges[:, :, 1:], across)
    return F.max_pool2d(edges[:, None], cell)[:, 0].byte()
