"""The two implementations of the defects, NumPy for users and torch for training, give masks of the same kind.

They draw from different random numbers, so what is compared are distributions: of the IoU with the good mask, of the
area, and of the distance of the coarse outline from the good one.
"""

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt
from scipy.stats import ks_2samp

from refinetool.corrupt import Goal, radius, reach
from refinetool.corrupt import defects as table
from refinetool.corrupt.defects import DEFECTS, MIN_AREA_PX, NEARLY_RIGHT, DefectName, fractions, in_order
from refinetool.corrupt.mixtures import defects_beside, mixed
from refinetool.corrupt.suites import SUITES
from refinetool.records import BoolArray, IntArray
from refinetool.settings import TrainSettings
from refinetool.train.data import corruptions
from refinetool.train.data.corruptions import REACH, Scene
from refinetool.train.data.distance import signed_distance
from refinetool.train.data.draws import draws_for
from refinetool.train.data.sampler import draw_goals

SIDE = 128
"""The grid of training has this side, on which both know distances equally far."""
PER_SHAPE = 30
SEVERITIES = (0.6, 0.9, 1.35)
"""Each is half as much again as the one before."""
ROUNDS = 2
RANKS, DISTRIBUTIONS = 0.06, 0.12
"""How far the two may lie apart, see `ranks_apart` and `distributions_apart`. Samples of one distribution lie 0.03 and
0.06 apart; a severity half as much again takes ranks 0.14 to 0.4 apart."""
TRAIN = TrainSettings()


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


# --- what is corrupted


def shapes() -> dict[str, BoolArray]:
    down, across = np.mgrid[:SIDE, :SIDE] - SIDE / 2

    def disc(x: float, y: float, r: float) -> BoolArray:
        inside: BoolArray = np.hypot(across - x, down - y) < r
        return inside

    return {
        "blob": np.hypot(across, down) < 34 * (1 + 0.25 * np.sin(3 * np.arctan2(down, across))),
        "thin": (np.abs(down - 12 * np.sin(across / 16)) < 5) & (np.abs(across) < 46),
        "ring": disc(0, 0, 40) & ~disc(4, 0, 22),
        "two parts": disc(-22, -20, 20) | disc(26, 24, 16),
        "at the border": disc(-58, 8, 44),
    }


def neighbour_of(mask: BoolArray) -> BoolArray:
    """What lies right of and below the middle of the window."""
    other = np.zeros_like(mask)
    other[60:, 50:] = True
    return other & ~mask


def superpixels() -> IntArray:
    """The cells of 90 random points."""
    points = np.random.default_rng(0).uniform(0, SIDE, (90, 2))
    pixels = np.stack(np.mgrid[:SIDE, :SIDE], 2)
    labels: IntArray = ((pixels[:, :, None] - points) ** 2).sum(3).argmin(2)
    return labels


LABELS = superpixels()
GOOD = np.stack(list(shapes().values())).repeat(PER_SHAPE, 0)


@cache
def scene() -> Scene:
    masks = torch.from_numpy(GOOD)
    depth = signed_distance(masks[::PER_SHAPE], reach=REACH).repeat_interleave(PER_SHAPE, 0)
    neighbours = torch.from_numpy(np.stack([neighbour_of(mask) for mask in GOOD]))
    return Scene(masks, depth, neighbours, torch.from_numpy(LABELS).expand(len(masks), -1, -1))


# --- how coarse masks are told apart

Figures = NDArray[np.float64]
"""(3, shapes, PER_SHAPE): IoU, area over good area, and mean distance of the outline from the good one in radii."""


def figures(coarse: BoolArray) -> Figures:
    good, flat = (masks.reshape(len(GOOD), -1) for masks in (GOOD, coarse))
    overlap = (good & flat).sum(1) / (good | flat).sum(1)
    distance = [mean_distance(mask, number // PER_SHAPE) for number, mask in enumerate(coarse)]
    return np.stack((overlap, flat.sum(1) / good.sum(1), distance)).reshape(3, -1, PER_SHAPE)


def mean_distance(mask: BoolArray, shape: int) -> float:
    outline = np.zeros_like(mask)
    outline[1:] |= mask[1:] != mask[:-1]
    outline[:, 1:] |= mask[:, 1:] != mask[:, :-1]
    return float(distance_map(shape)[outline].mean()) if outline.any() else 0.0


@cache
def distance_map(shape: int) -> NDArray[np.float64]:
    """Distance from the outline of a good mask, in radii, float64 (H, W)."""
    mask = GOOD[shape * PER_SHAPE]
    away: NDArray[np.float64] = (distance_transform_edt(mask) + distance_transform_edt(~mask)) / radius(mask)
    return away


def ranks_apart(some: Sequence[Figures], others: Sequence[Figures]) -> float:
    """How far from 1/2 the probability is that a figure of the one is greater than one of the other.

    It is taken shape by shape and severity by severity, averaged, and the greatest of the three figures counts.
    """
    difference = np.stack(some)[..., :, None] - np.stack(others)[..., None, :]
    return float(np.abs(np.sign(difference).mean((0, 2, 3, 4)) / 2).max())


def distributions_apart(some: Sequence[Figures], others: Sequence[Figures]) -> float:
    """The greatest difference of two cumulative distributions (Kolmogorov and Smirnov), so of all quantiles at once.

    Shapes and severities go together, and the greatest of the three figures counts.
    """
    pairs = zip(np.stack(some, 1).reshape(3, -1), np.stack(others, 1).reshape(3, -1), strict=True)
    return max(float(ks_2samp(one, other).statistic) for one, other in pairs)


# --- each defect


def by_numpy(name: DefectName, severity: float) -> Figures:
    coarse = []
    for number, mask in enumerate(GOOD):
        rng = np.random.default_rng((number, round(100 * severity)))
        coarse.append(defects_beside(lambda: LABELS, neighbour_of(mask))[name](mask, rng, severity))
    return figures(np.stack(coarse))


def by_torch(name: DefectName, severity: float) -> Figures:
    draws = draws_for(round(100 * severity), torch.arange(len(GOOD)))
    return figures(corruptions.DEFECTS[name](scene(), torch.full((len(GOOD),), severity), draws).numpy())


@pytest.mark.parametrize("name", DEFECTS)
def test_a_defect_has_the_same_distribution_in_both(name: DefectName) -> None:
    some, others = ([by(name, severity) for severity in SEVERITIES] for by in (by_numpy, by_torch))
    assert ranks_apart(some, others) < RANKS
    assert distributions_apart(some, others) < DISTRIBUTIONS
    assert ranks_apart(some[1:], others[:-1]) > RANKS, "severities half as much again should be told apart"


# --- the mix

FAMILIES = {
    "ordinary": (False, TRAIN.coarse_low, TRAIN.coarse_high),
    "nearly right": (False, NEARLY_RIGHT, 1.0),
    "blobs": (True, TRAIN.blob_low, TRAIN.blob_high),
}


def mix_by_numpy(family: str, seed: int) -> Figures:
    blobs, low, high = FAMILIES[family]
    goal = Goal(low, high, TRAIN.corruption_tries, MIN_AREA_PX, None)
    coarse = []
    for number, mask in enumerate(GOOD):
        rng = np.random.default_rng((number, seed))
        attempts = mixed(mask, rng, blobs=blobs, low=low, labels=lambda: LABELS, neighbour=neighbour_of(mask))
        coarse.append(reach("mix", attempts, mask, goal=goal).coarse)
    return figures(np.stack(coarse))


def mix_by_torch(family: str, seed: int) -> Figures:
    blobs, low, high = (torch.full((len(GOOD),), value) for value in FAMILIES[family])
    draws, tries = draws_for(seed, torch.arange(len(GOOD))), TRAIN.corruption_tries
    return figures(corruptions.corrupt(scene(), draws, blobs=blobs, low=low, high=high, tries=tries).numpy())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_mix_has_the_same_distribution_in_both(family: str) -> None:
    some, others = ([by(family, seed) for seed in range(ROUNDS)] for by in (mix_by_numpy, mix_by_torch))
    assert ranks_apart(some, others) < RANKS
    assert distributions_apart(some, others) < DISTRIBUTIONS


# --- one table for both


def test_both_have_every_defect_of_the_table() -> None:
    ours = defects_beside(lambda: LABELS, neighbour_of(GOOD[0]))
    assert ours.keys() == corruptions.DEFECTS.keys() == DEFECTS.keys() == set(get_args(DefectName))
    without = {name: defect for name, defect in ours.items() if name != "leak"}
    with pytest.raises(ValueError, match="leak"):
        in_order(without)
    with pytest.raises(ValueError, match="blur"):
        in_order({**ours, "blur": ours["leak"]})  # type: ignore[dict-item]


def test_the_fractions_of_each_kind_of_mask_add_up() -> None:
    for blobs in (False, True):
        assert sum(fractions(blobs=blobs)) == pytest.approx(1)


def test_both_read_every_number_of_the_table() -> None:
    """A number that one of them wrote down for itself would no longer follow the table.

    Some of them change masks too little to be seen above.
    """
    # Distances end at REACH_PX in torch and at REACH in NumPy; MOST_BUMPS is the size of a tensor.
    of_one = {"DEFECTS", "REACH", "REACH_PX", "MOST_BUMPS"}
    numbers = {name for name in vars(table) if name.isupper() and len(name) > 1} - of_one
    folders = (Path(table.__file__).parent, Path(corruptions.__file__).parent)
    for folder in folders:
        text = "".join(path.read_text() for path in folder.glob("*.py") if path.name != "defects.py")
        assert {name for name in numbers if not re.search(rf"\b{name}\b", text)} == set()


def test_the_suite_is_what_training_asks_for() -> None:
    """The same kinds of masks as often, in the same bands, by as many tries."""
    asked = draw_goals(draws_for(0, torch.arange(20_000)), settings=TRAIN)
    parts = SUITES["embedded-mix"].parts
    assert {part.tries for part in parts} == {TRAIN.corruption_tries}
    assert {part.generator for part in parts} == {"mix", "blobs"}
    for part in parts:
        alike = (asked.blobs == (part.generator == "blobs")) & (asked.low == part.low) & (asked.high == part.high)
        assert float(alike.float().mean()) == pytest.approx(part.fraction, abs=0.02)
    assert sum(part.fraction for part in parts) == pytest.approx(1)
