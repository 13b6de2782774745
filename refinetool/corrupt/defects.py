"""The defects of coarse masks: their names, how often each is drawn, and the numbers that define them.

There are two implementations. `refinetool.corrupt` works in NumPy, on one mask at a time and at the size of the image;
`refinetool.train.data.corruptions` works in torch, on batches of square crops. Both read this table, so that the suite
`embedded-mix` is what the embedded model is trained on.

Lengths are fractions of r, the radius of a disc of the mask's area, unless they say pixels or cells. Severity, a number
around 1, multiplies lengths and divides numbers of cells. Ranges are half-open.
"""

from collections.abc import Mapping
from typing import Literal, NamedTuple, TypeAlias, TypeVar

from refinetool.settings import CorruptSettings, TrainSettings

DefectName: TypeAlias = Literal[
    "boundary-noise",
    "grow-or-shrink",
    "low-resolution",
    "biased-activation",
    "coarse-polygon",
    "shift-and-scale",
    "holes-and-islands",
    "leak",
    "superpixel-defects",
    "superpixel-vote",
]
T = TypeVar("T")


class Fractions(NamedTuple):
    """How often a defect is drawn.

    ordinary: Fraction of the draws for an ordinary mask.
    blob: Fraction of the draws for a blob, which gets only defects of low resolution.
    """

    ordinary: float
    blob: float


DEFECTS: Mapping[DefectName, Fractions] = {
    "boundary-noise": Fractions(0.16, 0.0),
    "grow-or-shrink": Fractions(0.08, 0.0),
    "low-resolution": Fractions(0.16, 0.45),
    "biased-activation": Fractions(0.0, 0.55),
    "coarse-polygon": Fractions(0.09, 0.0),
    "shift-and-scale": Fractions(0.06, 0.0),
    "holes-and-islands": Fractions(0.05, 0.0),
    "leak": Fractions(0.05, 0.0),
    "superpixel-defects": Fractions(0.28, 0.0),
    "superpixel-vote": Fractions(0.07, 0.0),
}
"""Every defect, in the order in which training draws them: another order gives its examples other defects."""


def fractions(*, blobs: bool) -> tuple[float, ...]:
    """How often each defect is drawn for blobs, or for other masks, in the order of the table."""
    return tuple(each.blob if blobs else each.ordinary for each in DEFECTS.values())


def in_order(implementations: Mapping[DefectName, T]) -> tuple[T, ...]:
    """What implements the defects, in the order of the table.

    Raises:
        ValueError: A defect of the table is missing, or there is one that the table does not have.
    """
    if odd := implementations.keys() ^ DEFECTS.keys():
        raise ValueError(f"these defects are in the table or among the implementations, but not in both: {sorted(odd)}")
    return tuple(implementations[name] for name in DEFECTS)


# --- one or two defects on a mask

SEVERITY = (0.4, 1.7)
NEARLY_RIGHT = 0.9
"""A coarse mask whose IoU is to be at least this is nearly right, and gets mild defects."""
NEARLY_RIGHT_SEVERITY, BLOB_SEVERITY = 0.35, 1.5
"""Factors of the severity for masks that are to be nearly right, and for blobs."""
SECOND_CHANCE, SECOND_SEVERITY = 0.3, 0.6
"""Probability of a second defect, and the factor of its severity."""
MIN_AREA_PX = CorruptSettings().min_area_px
"""A smaller mask gets no second defect, and is no coarse mask."""

# --- what surrounds the object

WINDOW_MARGIN = (0.15, 0.6)
"""What a window adds to the object on each side, as a fraction of the object's side."""
SUPERPIXEL_COUNTS = (20, 250)
"""Superpixels in a window, drawn evenly on a logarithmic scale."""
REACH_PX = 28
"""Distances from the boundary end here, in pixels of training's grid."""
REACH = REACH_PX / (TrainSettings().side // 2)
"""The same as a fraction of the grid, which has half the side of the model's input."""

# --- the boundary moved

MOST_BUMPS = 20
"""Smooth noise has fewer bumps than this along each side of the window."""
BOUNDARY_BUMPS = (4, MOST_BUMPS)
BOUNDARY_NOISE, BOUNDARY_BIAS = 0.20, 0.08
"""Standard deviations: from place to place, and of the boundary as a whole."""
GROWTH = (0.08, 0.25)
GROWTH_BUMPS = (6, 7)  # always six
GROWTH_NOISE = 0.04
"""Standard deviation of what is added to the growth from place to place, whatever the severity."""

# --- low resolution

MOST_CELLS = 48
"""Cells along a side of the window, at most."""
BLOCKS = 0.3
"""Probability that cells are enlarged as blocks instead of bilinearly."""
MASK_CELLS = (3, 12)
"""Cells along the longer side of the object, over severity."""
CELL_NOISE = 0.06
"""Standard deviation of the noise on each cell, times severity."""
MASK_LEVEL = (0.3, 0.6)
"""Where the enlarged mask is thresholded."""
ACTIVATION_CELLS = (1.5, 14)
"""Cells along the longer side of the object, over severity, drawn evenly on a logarithmic scale: the grid is the
picture's, so a small object has one or two."""
ACTIVATION_BLUR = (0.4, 1.2)
"""Standard deviation in cells of the Gaussian that shrinks the mask to the grid."""
ACTIVATION_BIAS = (0, 1.5)
"""How much stronger the activation is at the pixel that it is biased to, as a fraction of what it is elsewhere."""
ACTIVATION_REACH = 0.35
"""How far the bias reaches: a standard deviation, as a fraction of the square root of the object's area."""
ACTIVATION_LEAK = (0, 0.06)
"""Standard deviation of the smooth noise all over the window, as a fraction of the peak."""
ACTIVATION_BUMPS = (4, MOST_BUMPS)
ACTIVATION_LEVEL = (0.2, 0.75)
"""Where the activation is thresholded, as a fraction of the peak."""

# --- polygons

POLYGON_STEP = (0.35, 1.0)
"""Side of the triangles that polygons are made of."""
LEAST_STEP_PX = 4
CORNER_NOISE = 0.06
"""Standard deviation of how far a corner is off."""
CONVEX = 0.25
"""Probability of a convex polygon."""
CONVEX_SIDES = 10
SIDE_NOISE, SIDE_INSET = 0.05, 0.03
"""How far a side of a convex polygon is off: standard deviation, and how far inwards on average."""

# --- moved, torn, leaking

LINEAR_NOISE, SHIFT_NOISE = 0.06, 0.12
"""Standard deviations of the entries of the linear map, and of the shift along each axis."""
TEAR_BUMPS = (6, 16)
TEAR_LEVEL, TEAR_SLOPE = 1.9, 0.5
"""Noise above the level, in standard deviations, is a hole or an island; severity times the slope lowers the level."""
ISLAND_REACH = 0.8
"""Islands lie no farther than this from the mask, whatever the severity."""
LEAK_REACH = (0.2, 1.0)

# --- superpixels

BAND_FRACTIONS = CorruptSettings().superpixel_shares
"""How often a toggled superpixel lies at the boundary, inside, and outside."""
BAND_WIDTH = 0.06
"""The band of the boundary is this wide on each side of it, whatever the severity ..."""
LEAST_BAND_PX = 1.5
"""... but no narrower than this."""
OUTSIDE_REACH = 4.0
TOGGLES, MOST_TOGGLES = 2.5, 10
"""Superpixels toggled: one, and a Poisson number of this mean times severity; and at most."""
VOTE_NOISE = 0.15
"""Standard deviation of the noise, times severity, on the fraction of a superpixel that is mask."""
