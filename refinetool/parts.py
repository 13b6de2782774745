"""Parts: what is refined at a time. A region, or a piece of a class mask."""

from dataclasses import dataclass

import numpy as np

from refinetool import masks, regions
from refinetool.prompts import tight_box
from refinetool.records import BoolArray, Box, Sample
from refinetool.regions import Claim
from refinetool.settings import SplitSettings
from refinetool.views import View


@dataclass(frozen=True, slots=True)
class Part:
    """What is refined at a time: a region, or a part of a class mask. `mask` is bool, cut to the half-open `box`."""

    region: int
    box: Box
    mask: BoolArray


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


def whole_claim(owner: int, mask: BoolArray) -> Claim:
    """A coarse mask, bool (H, W) and not empty, as a claim cut to its box."""
    x0, y0, x1, y1 = box = tight_box(mask)
    return Claim(owner, box, mask[y0:y1, x0:x1].copy(), None)
