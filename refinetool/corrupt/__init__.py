"""Coarse masks made from good ones, for training and for measuring refiners where no real coarse masks exist.

Two kinds of functions:

- A *generator* `f(image, gt, rng, *, goal, ...)` takes an image, uint8 (H, W, 3) RGB or None, a good mask, bool (H, W),
  a NumPy generator and a `Goal`, and returns a `Corrupted`: a coarse mask whose IoU with the good one lies in the
  goal's band, and a `CorruptionInfo` that says how it came about and whether the band was reached.
- A *defect* `f(mask, rng, severity)` draws once, at a severity around 1. `geometry.aimed` makes a generator of it.
  `defects` is the table of those that training draws from.

Both give the same for the same state of `rng`, and never change their input. Lengths scale with the object: r is the
radius of a disc of its area. Defects are inconsistent with the image and biased (grown, shifted, missing or leaking
pieces): symmetric noise could be undone by smoothing alone, and would teach a model nothing about images.

`suites` names generators and mixes of them; `dataset.corrupt_dataset` is the command.
"""

from refinetool.corrupt.activations import activation_map, biased_activation, low_resolution, mask_head
from refinetool.corrupt.defects import MIN_AREA_PX
from refinetool.corrupt.edges import boundary, boundary_noise, grow_or_shrink, local_morphology, noise_band, simplified
from refinetool.corrupt.geometry import aimed, radius, signed_depth, smooth_noise
from refinetool.corrupt.goals import Attempt, Corrupted, CorruptionInfo, Goal, reach
from refinetool.corrupt.mixtures import compose, training_mix
from refinetool.corrupt.shapes import (
    coarse_polygon,
    drawn_polygon,
    holes_and_islands,
    leak,
    merge_neighbour,
    partial,
    shift_and_scale,
)
from refinetool.corrupt.superpixels import (
    label_maps,
    superpixel,
    superpixel_defects,
    superpixel_labels,
    superpixel_vote,
)

__all__ = [
    "MIN_AREA_PX",
    "Attempt",
    "Corrupted",
    "CorruptionInfo",
    "Goal",
    "activation_map",
    "aimed",
    "biased_activation",
    "boundary",
    "boundary_noise",
    "coarse_polygon",
    "compose",
    "drawn_polygon",
    "grow_or_shrink",
    "holes_and_islands",
    "label_maps",
    "leak",
    "local_morphology",
    "low_resolution",
    "mask_head",
    "merge_neighbour",
    "noise_band",
    "partial",
    "radius",
    "reach",
    "shift_and_scale",
    "signed_depth",
    "simplified",
    "smooth_noise",
    "superpixel",
    "superpixel_defects",
    "superpixel_labels",
    "superpixel_vote",
    "training_mix",
]
