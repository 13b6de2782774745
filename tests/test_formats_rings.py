"""Rings of polygons: what pycocotools draws of them, how many corners they have, and that they never cross."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from commands import Command
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from scipy import ndimage

from refinetool import masks
from refinetool.formats.rings import Ring, draw, edges_meet, rasterised
from refinetool.records import BoolArray
from refinetool.settings import PolygonSettings


def blob(seed: int) -> BoolArray:
    """A smooth shape, often with holes and islands."""
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=(48, 64)), 4)
    return noise > np.quantile(noise, 0.6)


SIZE = (12, 14)
filled = arrays(np.bool_, SIZE).filter(lambda mask: bool(mask.any()))
blobs = st.integers(0, 10_000).map(blob)


def disc(radius: float) -> BoolArray:
    y, x = np.mgrid[:200, :200]
    return (x - 99.5) ** 2 + (y - 100.2) ** 2 <= radius**2


def corners(rings: tuple[Ring, ...]) -> int:
    return sum(map(len, rings))


@pytest.mark.parametrize("tolerance", [0, 0.5, 2])
@settings(max_examples=60, deadline=None)
@given(mask=filled | blobs)
def test_holes_can_be_kept_in_a_polygon(tolerance: float, mask: BoolArray) -> None:
    drawing = draw(mask, settings=PolygonSettings(holes="keep", tolerance_px=tolerance, min_iou=0.9))
    assert drawing is not None
    drawn = rasterised(drawing.rings, size=mask.shape)
    assert (drawn == drawing.drawn).all()
    assert masks.iou(drawn, mask) >= (1 if tolerance == 0 else 0.9)
    islands, _ = ndimage.label(mask)
    assert len(drawing.rings) == islands.max(), "one ring per island"


@pytest.mark.parametrize("tolerance", [0.25, 0.5, 1, 3])
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_simplified_rings_are_close_simple_and_as_many(tolerance: float, seed: int) -> None:
    mask = masks.fill_holes(blob(seed))
    exact = draw(mask, settings=PolygonSettings())
    drawing = draw(mask, settings=PolygonSettings(tolerance_px=tolerance, min_iou=0.97))
    assert exact is not None
    assert drawing is not None
    assert masks.iou(rasterised(drawing.rings, size=mask.shape), mask) >= 0.97
    assert corners(drawing.rings) <= corners(exact.rings)
    assert len(drawing.rings) == len(exact.rings)
    if corners(drawing.rings) < corners(exact.rings):
        assert not crosses_slowly(drawing.rings)


def crosses_slowly(rings: tuple[Ring, ...]) -> bool:
    """Whether two edges cross properly, pair by pair."""
    edges = [(tuple(a), tuple(b)) for ring in rings for a, b in pairwise([*ring.tolist(), ring[0].tolist()])]

    def turn(p: tuple[float, ...], q: tuple[float, ...], r: tuple[float, ...]) -> float:
        return (q[0] - p[0]) * (r[1] - p[1]) - (q[1] - p[1]) * (r[0] - p[0])

    return any(
        turn(a, b, c) * turn(a, b, d) < 0 and turn(c, d, a) * turn(c, d, b) < 0
        for n, (a, b) in enumerate(edges)
        for c, d in edges[:n]
    )


def test_a_disc_needs_far_fewer_corners_and_the_floor_is_kept() -> None:
    mask = disc(70)
    exact, half, coarse = (
        draw(mask, settings=PolygonSettings(tolerance_px=tolerance, min_iou=0.9)) for tolerance in (0, 0.5, 2)
    )
    floored = draw(mask, settings=PolygonSettings(tolerance_px=2, min_iou=0.995))
    assert exact and half and coarse and floored
    assert corners(exact.rings) > 3 * corners(half.rings) > 6 * corners(coarse.rings)
    assert masks.iou(coarse.drawn, mask) < 0.995 <= masks.iou(floored.drawn, mask)
    assert corners(coarse.rings) < corners(floored.rings) <= corners(exact.rings)


def test_a_hole_becomes_rle_or_is_filled() -> None:
    ring = disc(70) & ~disc(20)
    assert draw(ring, settings=PolygonSettings()) is None
    drawing = draw(ring, settings=PolygonSettings(holes="fill"))
    assert drawing is not None
    assert (drawing.drawn == disc(70)).all()
    assert (rasterised(drawing.rings, size=ring.shape) == disc(70)).all()


def test_an_island_in_a_hole_is_a_ring_of_its_own() -> None:
    mask = disc(70) & ~disc(50) | disc(30) & ~disc(10)
    drawing = draw(mask, settings=PolygonSettings(holes="keep", tolerance_px=0.5))
    assert drawing is not None
    assert len(drawing.rings) == 2
    assert masks.iou(rasterised(drawing.rings, size=mask.shape), mask) >= 0.995


@pytest.mark.parametrize(
    ("rings", "meet"),
    [
        ([[(0, 0), (4, 0), (4, 4), (0, 4)]], False),
        ([[(0, 0), (4, 4), (4, 0), (0, 4)]], True),
        ([[(0, 0), (4, 0), (4, 4), (0, 4)], [(5, 0), (6, 0), (6, 1)]], False),
        ([[(0, 0), (4, 0), (4, 4), (0, 4)], [(3, 1), (6, 1), (6, 2)]], True),
        ([[(0, 0), (4, 0), (4, 4), (0, 4)], [(4, 2), (6, 1), (6, 3)]], True),
        ([[(0, 0), (4, 0), (0, 4)]], False),
    ],
    ids=["square", "bow tie", "two apart", "two that cross", "two that touch", "triangle"],
)
def test_meeting_edges_are_found(rings: list[list[tuple[int, int]]], meet: bool) -> None:
    assert edges_meet([np.array(ring, dtype=np.float64) for ring in rings]) == meet


def test_more_edges_than_are_compared_at_a_time() -> None:
    angles = np.linspace(0, 2 * np.pi, 1000, endpoint=False)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1) * 100
    assert not edges_meet([circle, circle * 0.99])
    assert edges_meet([circle, circle + np.array([1, 0])])
    assert edges_meet([circle[np.r_[:900, 901, 900, 902:1000]]])


@pytest.mark.parametrize(
    ("option", "kind", "said"),
    [
        ([], dict, "became run lengths, because their new masks have holes: 1."),
        (["--holes", "fill"], list, "which are filled: 1."),
        (["--holes", "keep"], list, ""),
    ],
    ids=["rle", "fill", "keep"],
)
def test_the_command_writes_holes_as_asked(
    command: Command, folder: Path, option: list[str], kind: type, said: str
) -> None:
    image = folder / "images" / "1.png"
    pixels = np.array(Image.open(image))
    pixels[20:26, 20:26] = 40  # a hole of 36 pixels
    Image.fromarray(pixels).save(image)
    told = command("refine", folder / "coarse.json", "--no-guard", "--json", *option)
    assert told.code == 0, told.err
    notes = " ".join(json.loads(told.out)["notes"])
    assert said in notes
    assert bool(notes) == bool(said)
    (record, *_) = json.loads((folder / "coarse.refined.json").read_text())["annotations"]
    assert isinstance(record["segmentation"], kind)
    assert record["area"] == (600 if option == ["--holes", "fill"] else 564)
    if kind is list:
        drawn = rasterised([np.array(ring).reshape(-1, 2) for ring in record["segmentation"]], size=(60, 80))
        assert drawn.sum() == record["area"]


def test_fewer_corners_need_no_second_run(command: Command, folder: Path) -> None:
    assert command("refine", folder / "coarse.json", "--limit", 2).code == 0
    told = command("refine", folder / "coarse.json", "--resume", "--polygon-tolerance", 1, "--json")
    assert told.code == 0, told.err
    assert json.loads(told.out)["reused"] == 2
    notes = json.loads((folder / "coarse.refined.json").read_text())["info"]["refinetool"]
    assert notes["polygons"] == {"tolerance_px": 1.0, "min_iou": 0.995, "holes": "rle"}
