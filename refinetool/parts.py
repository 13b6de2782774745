"""Parts: what is refined at a time, a region or a piece of a class mask; and jobs: the parts that share a view."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from refinetool import masks, regions
from refinetool.prompts import tight_box
from refinetool.records import BoolArray, Box, ImageArray, Prompts, Sample
from refinetool.regions import Claim
from refinetool.settings import SplitSettings
from refinetool.views import View


@dataclass(frozen=True, slots=True)
class Part:
    """What is refined at a time: a region, or a part of a class mask. `mask` is bool, cut to the half-open `box`."""

    region: int
    box: Box
    mask: BoolArray


@dataclass(frozen=True, slots=True)
class Job:
    """One view and the n parts that are refined in it.

    pixels: uint8 (H, W, 3), what the view shows.
    coarse: bool (n, H, W).
    truth: bool (n, H, W), the ground truth of the parts, None where it is not known.
    prompts: What the model is to be asked first.
    """

    view: View
    parts: tuple[Part, ...]
    pixels: ImageArray
    coarse: BoolArray
    truth: BoolArray | None
    prompts: Prompts


def split_sample(sample: Sample, *, settings: SplitSettings) -> tuple[list[Part], list[Claim]]:
    """The parts of a sample that are to be refined, and the pieces of class masks that are too small for it."""
    parts: list[Part] = []
    trivial: list[Claim] = []
    for number, region in enumerate(sample.regions):
        if region.mask is None or region.keep is not None or masks.area(region.mask) == 0:
            continue
        mask = masks.decode(region.mask)
        if sample.layout == "semantic":
            pieces = regions.split(mask, settings=settings)
            parts += [Part(number, pieces.box(n), pieces.crop(n)) for n in range(len(pieces))]
            rest = pieces.dropped()
            if rest.any():
                trivial.append(whole_claim(number, rest))
        else:
            claim = whole_claim(number, mask)
            parts.append(Part(number, claim.box, claim.mask))
    return parts, trivial


def in_view(part: Part, view: View) -> BoolArray:
    """The mask of a part in the frame of a view that holds all of it, bool (H, W)."""
    mask = np.zeros(view.size, dtype=np.bool_)
    left, top, _, _ = view.window
    x0, y0, x1, y1 = part.box
    mask[y0 - top : y1 - top, x0 - left : x1 - left] = part.mask
    return mask


def truth_in_view(parts: Sequence[Part], view: View, sample: Sample) -> BoolArray | None:
    """The ground truth of the regions of some parts, bool (n, H, W) in a view; None unless all of it is known."""
    rles = [sample.regions[part.region].truth for part in parts]
    known = [masks.decode(rle) for rle in rles if rle is not None]
    return view.crop_masks(np.stack(known)) if len(known) == len(rles) else None


def whole_claim(owner: int, mask: BoolArray) -> Claim:
    """A coarse mask, bool (H, W) and not empty, as a claim cut to its box."""
    x0, y0, x1, y1 = box = tight_box(mask)
    return Claim(owner, box, mask[y0:y1, x0:x1].copy(), None)
