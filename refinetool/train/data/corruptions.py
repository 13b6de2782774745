"""Makes coarse masks from good ones, in batches, on the training device.

The defects are those of the table `refinetool.corrupt.defects`, implemented for batches; `refinetool.corrupt` has them
for single masks of any size. Each defect takes good masks, bool (n, h, h), with their surroundings (`Scene`),
severities around 1, float32 (n,), and draws.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from refinetool.corrupt import defects
from refinetool.train.data.distance import signed_distance
from refinetool.train.data.draws import Draws

REACH = defects.REACH_PX
MIN_AREA_PX = defects.MIN_AREA_PX
CELLS = defects.MOST_CELLS
KNOTS = defects.MOST_BUMPS + 2
"""Knots of the splines of smooth noise: one per bump, and one more at each end."""
LATTICE = 16
SUPERPIXELS = LATTICE * LATTICE


@dataclass(frozen=True, slots=True)
class Scene:
    """n good masks and their surroundings.

    masks: bool (n, h, h).
    depth: float32 (n, h, h), the signed distance of the masks, clamped at REACH.
    neighbours: bool (n, h, h), another region.
    superpixels: int64 (n, h, h), labels below SUPERPIXELS.
    """

    masks: Tensor
    depth: Tensor
    neighbours: Tensor
    superpixels: Tensor

    def take(self, rows: Tensor) -> "Scene":
        """Return some of the rows."""
        return Scene(self.masks[rows], self.depth[rows], self.neighbours[rows], self.superpixels[rows])

    def spoilt(self, masks: Tensor) -> "Scene":
        """Return the scene with masks that have a first defect, as input of the second defect."""
        return Scene(masks, signed_distance(masks, reach=REACH), self.neighbours, self.superpixels)


Defect = Callable[[Scene, Tensor, Draws], Tensor]


def corrupt(scene: Scene, draws: Draws, *, blobs: Tensor, low: Tensor, high: Tensor, tries: int) -> Tensor:
    """Make coarse masks by one or two defects each, with an IoU with the good mask in [low, high] where possible.

    Args:
        draws: On the CPU, one row per mask.
        blobs: bool (n,), on the CPU: masks that become blobs of low resolution instead of getting any of the defects.
        low, high: float32 (n,), on the CPU.
        tries: Attempts before the closest one is used.

    Returns:
        bool (n, h, h), none of them empty if none of the good ones is.
    """
    device = scene.masks.device
    best = scene.masks.clone()
    ordinary, blob = (torch.tensor(defects.fractions(blobs=which)) for which in (False, True))
    fractions = torch.where(blobs[:, None], blob, ordinary)
    factor = torch.where(blobs, defects.BLOB_SEVERITY, 1.0)
    factor = torch.where(low >= defects.NEARLY_RIGHT, defects.NEARLY_RIGHT_SEVERITY, factor)
    missed = torch.full((len(best),), math.inf)
    for attempt in range(tries):
        open_rows = (missed > 0).nonzero()[:, 0]
        if not len(open_rows):
            break
        rows = open_rows.to(device)
        part, drawn = scene.take(rows), draws.take(open_rows).fork(f"try {attempt}")
        severity = drawn.between("severity", *defects.SEVERITY) * factor[open_rows]
        coarse = _one_defect(part, severity, drawn.fork("first"), fractions=fractions[open_rows])
        again = (drawn.uniform("again") < defects.SECOND_CHANCE) & (coarse.flatten(1).sum(1) >= MIN_AREA_PX).cpu()
        if again.any():
            twice = again.nonzero()[:, 0]
            more = part.take(twice.to(device)).spoilt(coarse[twice.to(device)])
            weaker = defects.SECOND_SEVERITY * severity[twice]
            coarse[twice.to(device)] = _one_defect(
                more, weaker, drawn.take(twice).fork("second"), fractions=fractions[open_rows][twice]
            )
        reached = overlap(coarse, part.masks).cpu()
        miss = torch.maximum(low[open_rows] - reached, reached - high[open_rows]).clamp(min=0)
        miss = torch.where((coarse.flatten(1).sum(1) < MIN_AREA_PX).cpu(), math.inf, miss)
        closer = miss < missed[open_rows]
        best[rows[closer.to(device)]] = coarse[closer.to(device)]
        missed[open_rows] = torch.minimum(missed[open_rows], miss)
    return best


def overlap(a: Tensor, b: Tensor) -> Tensor:
    """Compute the IoU of masks, bool (n, h, h) each: float32 (n,), 1 for two empty masks."""
    both, either = (a & b).flatten(1).sum(1), (a | b).flatten(1).sum(1)
    return torch.where(either > 0, both / either.clamp(min=1), 1.0)


def radius(masks: Tensor) -> Tensor:
    """Return the radius in pixels of a disc of each mask's area, plus one so that derived lengths are never 0: (n,)."""
    return (masks.flatten(1).sum(1) / math.pi).sqrt() + 1


def _one_defect(scene: Scene, severity: Tensor, draws: Draws, *, fractions: Tensor) -> Tensor:
    """Draw a defect for every row with probabilities (n, defects), and apply the defects one after the other."""
    device = scene.masks.device
    coarse = scene.masks.clone()
    kinds = draws.choice("kind", fractions)
    for kind, defect in enumerate(IN_ORDER):
        on_host = (kinds == kind).nonzero()[:, 0]
        if len(on_host):
            rows = on_host.to(device)
            coarse[rows] = defect(scene.take(rows), severity[on_host].to(device), draws.take(on_host).to(device))
    return coarse


# --- the boundary moved


def boundary_noise(scene: Scene, severity: Tensor, draws: Draws) -> Tensor:
    """Move the boundary in and out by smooth noise, with a bias to one side."""
    size = radius(scene.masks) * severity
    noise = smooth_noise(draws, scene.masks.shape[1], bumps=defects.BOUNDARY_BUMPS)
    bias = defects.BOUNDARY_BIAS * size * draws.normal("bias")
    return _shifted(scene, _wide(defects.BOUNDARY_NOISE * size) * noise + _wide(bias))


def grow_or_shrink(scene: Scene, severity: Tensor, draws: Draws) -> Tensor:
    """Move the whole boundary out or in by about the same distance."""
    size = radius(scene.masks)
    sign = (draws.uniform("sign") < 0.5).float() * 2 - 1
    noise = smooth_noise(draws, scene.masks.shape[1], bumps=defects.GROWTH_BUMPS)
    growth = sign * draws.between("by", *defects.GROWTH) * size * severity
    return _shifted(scene, _wide(growth) + _wide(defects.GROWTH_NOISE * size) * noise)


def _shifted(scene: Scene, offset: Tensor) -> Tensor:
    return scene.depth + offset.clamp(1 - REACH, REACH - 1) > 0


def smooth_noise(draws: Draws, side: int, *, bumps: tuple[int, int]) -> Tensor:
    """Make zero-mean noise of unit variance, float32 (n, side, side), with a number of bumps per side in the range."""
    low, high = bumps
    cells = (low + draws.below("cells", torch.full((), high - low, device=draws.keys.device))).float()
    lattice = draws.normal("noise", KNOTS, KNOTS)
    weights = _spline_weights(cells, side=side)
    noise = weights @ lattice @ weights.transpose(1, 2)
    noise = noise - noise.mean((1, 2), keepdim=True)
    return noise / (noise.std((1, 2), keepdim=True) + 1e-6)


def _spline_weights(cells: Tensor, *, side: int) -> Tensor:
    """Return weights, float32 (n, side, KNOTS), of cubic B-splines with `cells` knots along the side.

    B-splines smooth the values at their knots, which does not matter for white noise.
    """
    place = (torch.arange(side, device=cells.device) + 0.5) / side * cells[:, None]
    distance = (place[:, :, None] - torch.arange(KNOTS, device=cells.device)).abs()
    near = 2 / 3 - distance**2 + distance**3 / 2
    return torch.where(distance < 1, near, (2 - distance).clamp(min=0) ** 3 / 6)


# --- redrawn coarsely


def low_resolution(scene: Scene, severity: Tensor, draws: Draws) -> Tensor:
    """Downscale the mask to a grid of a few cells, add noise, upscale, threshold: masks like those of mask heads."""
    small, enlarge = _shrunk(scene, draws.between("cells", *defects.MASK_CELLS) / severity, draws)
    small = small + defects.CELL_NOISE * _wide(severity) * draws.normal("noise", CELLS, CELLS)
    return enlarge @ small @ enlarge.transpose(1, 2) > _wide(draws.between("level", *defects.MASK_LEVEL))


def biased_activation(scene: Scene, severity: Tensor, draws: Draws) -> Tensor:
    """Threshold an activation of low resolution, stronger in one part of the object, with some noise everywhere."""
    side = scene.masks.shape[1]
    heat = _activation(scene, severity, draws)
    centre = draws.choice("centre", scene.masks.flatten(1))
    pixel = torch.arange(side, device=centre.device)
    squared = ((pixel - (centre // side)[:, None]) ** 2)[:, :, None] + ((pixel - (centre % side)[:, None]) ** 2)[
        :, None
    ]
    reach = defects.ACTIVATION_REACH * math.sqrt(math.pi) * radius(scene.masks)
    nearness = torch.exp(-squared / (2 * _wide(reach) ** 2))
    heat = heat * (1 + _wide(draws.between("bias", *defects.ACTIVATION_BIAS)) * nearness)
    noise = smooth_noise(draws, side, bumps=defects.ACTIVATION_BUMPS)
    heat = heat + _wide(draws.between("leak", *defects.ACTIVATION_LEAK)) * noise * _peak(heat)
    return heat > _wide(draws.between("level", *defects.ACTIVATION_LEVEL)) * _peak(heat)


def _activation(scene: Scene, severity: Tensor, draws: Draws) -> Tensor:
    """Blur the masks onto grids of a few cells along the object, which lie anywhere, and upscale: float32 (n, h, h).

    The unit is arbitrary.
    """
    side = scene.masks.shape[1]
    low, high = (math.log(count) for count in defects.ACTIVATION_CELLS)
    cells = draws.between("cells", low, high).exp() / severity
    width = (_extent(scene.masks) / cells).clamp(min=side / (CELLS - 3))[:, None, None]
    origin = -draws.uniform("phase", 2)[:, :, None] * width  # of the second cell; the first lies outside
    pixel, number = (torch.arange(count, device=cells.device) for count in (side, CELLS))
    at = (pixel + 0.5 - origin) / width + 0.5  # (n, 2, h)
    spread = draws.between("blur", *defects.ACTIVATION_BLUR)[:, None, None, None]
    shrink = torch.exp(-(((at[:, :, None] - number[:, None]) / spread) ** 2) / 2)
    at = torch.where(_wide(draws.uniform("blocks")) < defects.BLOCKS, at.round(), at)
    enlarge = (1 - (at[..., None] - number).abs()).clamp(min=0)
    (to_rows, to_columns), (rows, columns) = shrink.unbind(1), enlarge.unbind(1)
    small = to_rows @ scene.masks.float() @ to_columns.transpose(1, 2)
    return rows @ small @ columns.transpose(1, 2)


def _extent(masks: Tensor) -> Tensor:
    """Return the longer side of each mask's box in pixels, at least 1: (n,)."""
    return torch.maximum(masks.any(1).sum(1), masks.any(2).sum(1)).clamp(min=1)


def _peak(heat: Tensor) -> Tensor:
    """Return the maximum of each map: (n, 1, 1)."""
    return heat.amax((1, 2), keepdim=True)


def _shrunk(scene: Scene, cells: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
    """Downscale the masks to grids with about `cells` cells along the object.

    Returns:
        float32 (n, CELLS, CELLS), the masks on the grids, and float32 (n, h, CELLS), the matrices that upscale them.
    """
    side = scene.masks.shape[1]
    cells = (side * cells / _extent(scene.masks)).clamp(2, CELLS).round()
    width = (side / cells)[:, None, None]
    pixel = torch.arange(side, device=cells.device) + 0.5
    cell = (torch.arange(CELLS, device=cells.device)[:, None] + 0.5) * width
    shrink = (1 - (pixel - cell).abs() / width).clamp(min=0)  # a tent: averages and blurs at once
    shrink = shrink / shrink.sum(2, keepdim=True).clamp(min=1e-6)
    at = (pixel / width[:, 0] - 0.5).clamp(min=0)
    at = torch.minimum(at, cells[:, None] - 1)
    at = torch.where(draws.uniform("blocks")[:, None] < defects.BLOCKS, at.round(), at)
    enlarge = (1 - (at[:, :, None] - torch.arange(CELLS, device=cells.device)).abs()).clamp(min=0)
    return shrink @ scene.masks.float() @ shrink.transpose(1, 2), enlarge


def coarse_polygon(scene: Scene, severity: Tensor, draws: Draws) -> Tensor:
    """Redraw the outline with straight edges and misplaced corners, like a hurried annotator.

    The signed distance is sampled on a coarse lattice and interpolated linearly on triangles: its zero line is a
    polygon. Some masks become the convex polygon that touches them from ten sides instead.
    """
    n, side, _ = scene.masks.shape
    size = radius(scene.masks)
    step = (size * draws.between("step", *defects.POLYGON_STEP) * severity).clamp(min=defects.LEAST_STEP_PX)
    count = side // defects.LEAST_STEP_PX + 3
    origin = -draws.uniform("origin", 2) * step[:, None]
    knot = torch.arange(count, device=step.device)
    where = (origin[:, :, None] + knot * step[:, None, None]).round().clamp(0, side - 1).long()  # (n, 2, count)
    index = where[:, 1, :, None] * side + where[:, 0, None]
    lattice = scene.depth.flatten(1).gather(1, index.flatten(1)).view(n, count, count)
    lattice = lattice + defects.CORNER_NOISE * _wide(size * severity) * draws.normal("corner", count, count)

    pixel = torch.arange(side, device=step.device)
    at = (pixel - origin[:, :, None]) / step[:, None, None]  # (n, 2, side)
    cell, within = at.floor().long(), at - at.floor()
    first = (cell[:, 1, :, None] * count + cell[:, 0, None]).flatten(1)
    corners = [lattice.flatten(1).gather(1, first + offset).view(n, side, side) for offset in (0, 1, count, count + 1)]
    across, down = within[:, 0, None].expand(-1, side, -1), within[:, 1, :, None].expand(-1, -1, side)
    upper = corners[0] + across * (corners[1] - corners[0]) + down * (corners[2] - corners[0])
    lower = corners[3] + (1 - across) * (corners[2] - corners[3]) + (1 - down) * (corners[1] - corners[3])
    drawn = torch.where(across + down < 1, upper, lower) > 0
    convex = draws.uniform("convex") < defects.CONVEX
    return torch.where(convex[:, None, None], _convex(scene.masks, size * severity, draws), drawn)


def _convex(masks: Tensor, size: Tensor, draws: Draws) -> Tensor:
    """Intersect ten half-planes that touch each mask, each slightly misplaced."""
    side = masks.shape[1]
    pixel = torch.arange(side, device=masks.device, dtype=torch.float32)
    first = draws.uniform("angle")
    inside = torch.ones_like(masks)
    for number, misplaced in enumerate(draws.normal("sides", defects.CONVEX_SIDES).unbind(1)):
        angle = (first + number) * (2 * math.pi / defects.CONVEX_SIDES)
        height = _wide(angle.cos()) * pixel + _wide(angle.sin()) * pixel[:, None]
        farthest = torch.where(masks, height, -1e9).flatten(1).amax(1)
        inside &= height <= _wide(farthest + (defects.SIDE_NOISE * misplaced - defects.SIDE_INSET) * size)
    return inside


# --- moved, torn, leaking


def shift_and_scale(scene: Scene, severity: Tensor, draws: Draws) -> Tensor:
    """Shift, scale and shear the mask about its centre by a few percent."""
    n, side, _ = scene.masks.shape
    solid = scene.masks.float()
    pixel = (torch.arange(side, device=solid.device) + 0.5) * (2 / side) - 1
    area = solid.flatten(1).sum(1)
    centre = torch.stack(((solid.sum(1) * pixel).sum(1) / area, (solid.sum(2) * pixel).sum(1) / area), 1)
    linear = torch.eye(2, device=solid.device) + defects.LINEAR_NOISE * _wide(severity) * draws.normal("linear", 2, 2)
    shift = defects.SHIFT_NOISE * (radius(scene.masks) * severity)[:, None] * draws.normal("shift", 2) * (2 / side)
    offset = centre - (linear @ (centre + shift)[:, :, None])[:, :, 0]
    grid = F.affine_grid(torch.cat((linear, offset[:, :, None]), 2), [n, 1, side, side], align_corners=False)
    return F.grid_sample(solid[:, None], grid, mode="nearest", align_corners=False)[:, 0] > 0.5


def holes_and_islands(scene: Scene, severity: Tensor, draws: Draws) -> Tensor:
    """Punch rounded holes into the mask and drop rounded islands beside it."""
    noise = smooth_noise(draws, scene.masks.shape[1], bumps=defects.TEAR_BUMPS)
    level = _wide(defects.TEAR_LEVEL - defects.TEAR_SLOPE * severity)
    beside = scene.depth > -_wide((defects.ISLAND_REACH * radius(scene.masks)).clamp(max=REACH))
    return (scene.masks & (noise <= level)) | ((noise < -level) & beside)


def leak(scene: Scene, severity: Tensor, draws: Draws) -> Tensor:
    """Let the mask leak into the neighbour, where there is one."""
    reach = (radius(scene.masks) * draws.between("reach", *defects.LEAK_REACH) * severity).clamp(max=REACH - 1)
    return scene.masks | (scene.neighbours & (scene.depth > -_wide(reach)))


# --- superpixels


def superpixel_defects(scene: Scene, severity: Tensor, draws: Draws) -> Tensor:
    """Toggle whole superpixels at the boundary, inside and outside, as in the DAVIS-585 set.

    The number of toggled superpixels grows with severity. A superpixel is chosen by drawing a random pixel of the band,
    and gets the opposite value of that pixel in the good mask.
    """
    size = _wide(radius(scene.masks))
    width = (defects.BAND_WIDTH * size).clamp(min=defects.LEAST_BAND_PX)
    near = scene.depth.abs() <= width
    far = (scene.depth < -width) & (scene.depth > -(defects.OUTSIDE_REACH * size).clamp(max=REACH))
    bands = {
        "boundary inside": near & scene.masks,
        "boundary outside": near & ~scene.masks,
        "inside": scene.depth > width,
        "outside": far,
    }
    pixels = torch.stack([_per_superpixel(scene, band.float()) for band in bands.values()], 1)  # (n, 4, SUPERPIXELS)
    totals = pixels.sum(2)
    n = len(pixels)
    table = torch.full((n, SUPERPIXELS), -1.0, device=pixels.device)
    toggles = 1 + _poisson(defects.TOGGLES * severity, draws)
    rows = torch.arange(n, device=pixels.device)
    for number in range(defects.MOST_TOGGLES):
        band = draws.choice(f"band {number}", torch.tensor(defects.BAND_FRACTIONS, device=pixels.device))
        inner = draws.uniform(f"side {number}") * (totals[:, 0] + totals[:, 1]) < totals[:, 0]
        kind = torch.where(band == 0, torch.where(inner, 0, 1), band + 1)
        kind = torch.where(totals[rows, kind] > 0, kind, torch.where(totals[:, 2] > 0, 2, 0))
        chosen = draws.choice(f"superpixel {number}", pixels[rows, kind])
        before = table[rows, chosen]
        removes = (kind == 0) | (kind == 2)
        after = torch.where(removes, 0.0, 1.0)
        table[rows, chosen] = torch.where(toggles > number, after, before)
    value = table.gather(1, scene.superpixels.flatten(1)).view(scene.masks.shape)
    return torch.where(value < 0, scene.masks, value > 0)


def _poisson(mean: Tensor, draws: Draws) -> Tensor:
    """Draw Poisson numbers below MOST_TOGGLES, by inverting the cumulative distribution."""
    place, term = draws.uniform("poisson"), torch.exp(-mean)
    total, number = term, torch.zeros_like(mean)
    for k in range(1, defects.MOST_TOGGLES):
        number = number + (place >= total)
        term = term * mean / k
        total = total + term
    return number


def superpixel_vote(scene: Scene, severity: Tensor, draws: Draws) -> Tensor:
    """Snap the mask to superpixels: a superpixel is mask if at least about half of it is; the threshold is noisy."""
    inside = _per_superpixel(scene, scene.masks.float())
    total = _per_superpixel(scene, torch.ones_like(scene.depth)).clamp(min=1)
    noise = defects.VOTE_NOISE * severity[:, None] * draws.normal("vote", SUPERPIXELS) * (inside > 0)
    voted = inside / total + noise > 0.5
    return voted.gather(1, scene.superpixels.flatten(1)).view(scene.masks.shape)


def _per_superpixel(scene: Scene, values: Tensor) -> Tensor:
    """Sum whole numbers, float32 (n, h, h), over superpixels: (n, SUPERPIXELS); exact in any order."""
    sums = torch.zeros(len(values), SUPERPIXELS, device=values.device)
    return sums.scatter_add_(1, scene.superpixels.flatten(1), values.flatten(1))


def superpixels(images: Tensor, counts: Tensor, draws: Draws, *, compactness: float, rounds: int) -> Tensor:
    """Compute SLIC superpixels (Achanta et al. 2012), without the last step that joins stray pixels to neighbours.

    Centres start on a jittered lattice. A pixel belongs to the closest, in position and colour, of the nine centres
    that started around it.

    Args:
        images: float32 (B, 3, h, h), whole numbers 0..255.
        counts: int64 (B,), approximate number of superpixels per image: those of a square lattice, at most SUPERPIXELS.
        compactness: Weight of position relative to colour, as in SLIC for colours of 0..100.
        rounds: How often the centres are moved, on an image of half the side.

    Returns:
        int64 (B, h, h), labels below SUPERPIXELS.
    """
    half = F.avg_pool2d(images, 2).round()
    side = half.shape[-1]
    across = counts.double().sqrt().ceil().long()  # lattice cells along a side that are used
    index = torch.arange(SUPERPIXELS, device=images.device)
    lattice = torch.stack((index % LATTICE, index // LATTICE), 1).double()
    jitter = draws.between("jitter", 0.2, 0.8, SUPERPIXELS, 2).double()
    place = ((lattice + jitter) * (side / across)[:, None, None]).floor().clamp(0, side - 1).long()
    small, full = _features(half), _features(images)
    at = place[:, :, 1] * side + place[:, :, 0]
    centres = small.gather(1, at[:, :, None].expand(-1, -1, 5))
    weight = (compactness * COLOUR_RANGE / 100 * across / side) ** 2
    for _ in range(rounds):
        labels = _closest(small, centres, across, weight)
        ones = torch.ones_like(small[:, :, :1])
        sums = torch.zeros(len(images), SUPERPIXELS, 6, device=images.device).scatter_add_(
            1, labels[:, :, None].expand(-1, -1, 6), torch.cat((small, ones), 2)
        )
        centres = torch.where(sums[:, :, 5:] > 0, sums[:, :, :5] / sums[:, :, 5:].clamp(min=1), centres)
    # At the full side, positions are twice as large.
    centres = torch.cat((centres[:, :, :2] * 2 + 0.5, centres[:, :, 2:]), 2)
    return _closest(full, centres, across, weight / 4).view(len(images), *images.shape[2:])


COLOUR_RANGE = 300.0
"""Approximate distance of RGB colours of 0..255 whose CIELAB distance is 100."""


def _features(images: Tensor) -> Tensor:
    """Return x, y, R, G, B of each pixel: float32 (B, pixels, 5), whole numbers, so that sums over them are exact."""
    count, _, height, width = images.shape
    y, x = torch.meshgrid(
        *(torch.arange(n, device=images.device, dtype=torch.float32) for n in (height, width)), indexing="ij"
    )
    places = torch.stack((x, y), 2).flatten(0, 1).expand(count, -1, -1)
    return torch.cat((places, images.flatten(2).transpose(1, 2)), 2)


def _closest(features: Tensor, centres: Tensor, across: Tensor, weight: Tensor) -> Tensor:
    """Find the closest of the nine centres around each pixel: int64 (B, pixels).

    Args:
        features: float32 (B, pixels, 5). centres: float32 (B, SUPERPIXELS, 5).
        across: int64 (B,), how many of the LATTICE cells along a side an image uses.
        weight: float32 (B,), of a squared distance in pixels against one of colours.
    """
    count, pixels, _ = features.shape
    side = math.isqrt(pixels)
    first = torch.arange(count, device=features.device)[:, None] * SUPERPIXELS
    last = across[:, None] - 1
    home = (features[:, :, :2].long() * across[:, None, None]) // side
    best = torch.full((count, pixels), math.inf, device=features.device)
    labels = torch.zeros((count, pixels), dtype=torch.int64, device=features.device)
    flat = centres.flatten(0, 1)
    for down, right in product((-1, 0, 1), repeat=2):
        row, column = home[:, :, 1] + down, home[:, :, 0] + right
        candidate = torch.minimum(row.clamp(min=0), last) * LATTICE + torch.minimum(column.clamp(min=0), last)
        squared = (features - flat[first + candidate]) ** 2
        distance = weight[:, None] * squared[:, :, :2].sum(2) + squared[:, :, 2:].sum(2)
        closer = distance < best
        best = torch.where(closer, distance, best)
        labels = torch.where(closer, candidate, labels)
    return labels


def _wide(values: Tensor) -> Tensor:
    """(n,) as (n, 1, 1)."""
    return values[:, None, None]


DEFECTS: dict[defects.DefectName, Defect] = {
    "boundary-noise": boundary_noise,
    "grow-or-shrink": grow_or_shrink,
    "low-resolution": low_resolution,
    "biased-activation": biased_activation,
    "coarse-polygon": coarse_polygon,
    "shift-and-scale": shift_and_scale,
    "holes-and-islands": holes_and_islands,
    "leak": leak,
    "superpixel-defects": superpixel_defects,
    "superpixel-vote": superpixel_vote,
}
IN_ORDER = defects.in_order(DEFECTS)
