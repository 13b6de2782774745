"""Instances that must not overlap: settled like regions of a map, without gaps between neighbours that touched."""

import json
from pathlib import Path

import numpy as np
import pytest
from commands import Command
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from pycocotools import mask as coco_mask

from refinetool import masks
from refinetool.gaps import NOBODY, close_gaps
from refinetool.records import BoolArray, Region, Sample
from refinetool.regions import Claim, Verdict, outcome_of, whole_claim
from refinetool.settings import ExclusiveSettings
from refinetool.statuses import Reason

SIZE = (20, 30)


def rectangle(x0: int, y0: int, x1: int, y1: int) -> BoolArray:
    mask = np.zeros(SIZE, dtype=np.bool_)
    mask[y0:y1, x0:x1] = True
    return mask


LEFT, RIGHT = rectangle(2, 2, 12, 12), rectangle(12, 2, 24, 12)


def settled(
    coarse: list[BoolArray],
    new: list[tuple[BoolArray, float] | None],
    crowd: BoolArray | None = None,
    gap_px: float = 5,
    min_left: float = 0.0,
) -> list[tuple[str, BoolArray]]:
    regions = [Region(n, 1, masks.encode(mask)) for n, mask in enumerate(coarse)]
    if crowd is not None:
        regions.append(Region(len(regions), 1, masks.encode(crowd), Reason.CROWD))
    verdicts = []
    for n, (old, found) in enumerate(zip(coarse, new, strict=True)):
        if found is None:
            verdicts.append(Verdict(Claim(n, *_crop(old), None), Reason.LOW_SCORE, 0.1, 0.5))
        else:
            claim = whole_claim(n, found[0], predicted_iou=found[1])
            verdicts.append(Verdict(claim, None, found[1], masks.iou(found[0], old)))
    sample = Sample("a", Path("a.jpg"), SIZE, tuple(regions))
    exclusive = ExclusiveSettings(enabled=True, gap_px=gap_px)
    outcome = outcome_of(sample, verdicts, [], min_left=min_left, exclusive=exclusive)
    return [(made.status, masks.decode(made.mask)) for made in outcome.annotations if made.mask is not None]


def _crop(mask: BoolArray) -> tuple[tuple[int, int, int, int], BoolArray]:
    x0, y0, x1, y1 = masks.tight_box(mask)
    return (x0, y0, x1, y1), mask[y0:y1, x0:x1]


def test_the_surer_of_two_claims_has_the_pixels() -> None:
    (_, left), (_, right) = settled([LEFT, RIGHT], [(rectangle(2, 2, 15, 12), 0.8), (rectangle(10, 2, 24, 12), 0.9)])
    assert (left == rectangle(2, 2, 10, 12)).all()
    assert (right == rectangle(10, 2, 24, 12)).all()


@pytest.mark.parametrize(
    ("taken", "min_left", "status"),
    [(5, 0.4, "refined"), (7, 0.4, "kept:crowded-out"), (7, 0.2, "refined"), (9, 0.0, "refined")],
)
def test_a_mask_must_keep_enough_of_its_pixels(taken: int, min_left: float, status: str) -> None:
    claims = [(LEFT, 0.8), (rectangle(12 - taken, 2, 24, 12), 0.9)]
    (found, left), (other, right) = settled([LEFT, RIGHT], claims, min_left=min_left)
    assert found == status
    assert other == "refined"
    assert (left == (LEFT if status != "refined" else rectangle(2, 2, 12 - taken, 12))).all()
    assert (right == rectangle(12 if status != "refined" else 12 - taken, 2, 24, 12)).all()


def test_a_kept_neighbour_keeps_its_pixels_and_a_crowd_has_no_say() -> None:
    crowd = rectangle(0, 0, 30, 20)
    (_, left), (status, right), (crowded, same) = settled([LEFT, RIGHT], [(rectangle(2, 2, 15, 12), 0.8), None], crowd)
    assert (status, crowded) == ("kept:low-score", "kept:crowd")
    assert (left == LEFT).all()
    assert (right == RIGHT).all()
    assert (same == crowd).all()


def test_a_gap_between_neighbours_that_touched_is_closed() -> None:
    new = [(rectangle(2, 2, 10, 12), 0.8), (rectangle(15, 2, 24, 12), 0.9)]
    (_, left), (_, right) = settled([LEFT, RIGHT], new)
    assert (left | right == LEFT | RIGHT).all()
    assert not (left & right).any()
    assert (left == rectangle(2, 2, 13, 12)).all(), "the middle column goes to the first"
    (_, left), (_, right) = settled([LEFT, RIGHT], new, gap_px=0)
    assert (left == new[0][0]).all()
    (_, left), (_, right) = settled([LEFT, RIGHT], new, gap_px=3)
    assert (left | right == new[0][0] | rectangle(12, 2, 13, 12) | new[1][0]).all(), "only pixels near both"


def test_only_pixels_of_the_coarse_masks_are_given_away() -> None:
    new = [(rectangle(2, 2, 10, 18), 0.8), (rectangle(14, 2, 24, 18), 0.9)]
    (_, left), (_, right) = settled([LEFT, RIGHT], new)
    assert not (left | right)[12:18, 10:14].any()


def test_neighbours_that_did_not_touch_keep_their_gap() -> None:
    apart = rectangle(14, 2, 24, 12)
    new = [(rectangle(2, 2, 11, 12), 0.8), (rectangle(15, 2, 24, 12), 0.9)]
    (_, left), (_, right) = settled([LEFT, apart], new)
    assert (left == new[0][0]).all()
    assert (right == new[1][0]).all()


maps = arrays(np.int32, (6, 7), elements=st.integers(NOBODY, 2))


@given(owners=maps, coarse=arrays(np.bool_, (3, 6, 7)), gap=st.floats(0.5, 4))
def test_gaps_are_those_of_a_slow_search(owners: np.ndarray, coarse: np.ndarray, gap: float) -> None:
    found = {n: mask for n, mask in enumerate(coarse) if mask.any()}
    closed = close_gaps(owners, found, moving={0, 1}, gap_px=gap)
    ys, xs = np.mgrid[:6, :7]
    for y, x in np.argwhere(closed != owners):
        assert owners[y, x] == NOBODY
        new = int(closed[y, x])
        assert new in (0, 1)
        near = {n for n in found if (np.hypot(ys - y, xs - x)[owners == n] <= gap).any()}
        assert new in near
        assert len(near) > 1
        assert any(found[n][y, x] for n in near)
        to = {n: np.stack([ys - y, xs - x])[:, owners == n].T for n in near}
        towards = [vectors[np.hypot(*vectors.T) <= np.hypot(*vectors.T).min() + 1e-9] for vectors in to.values()]
        assert any((one @ other.T < 0).any() for k, one in enumerate(towards) for other in towards[:k])


@pytest.mark.parametrize("exclusive", [False, True])
def test_the_command_leaves_no_pixel_to_two(command: Command, tmp_path: Path, exclusive: bool) -> None:
    """Two loose outlines around one bright shape: each would get all of it in its box."""
    (tmp_path / "images").mkdir()
    pixels = np.full((60, 80, 3), 40, dtype=np.uint8)
    pixels[10:40, 10:70] = 220
    Image.fromarray(pixels).save(tmp_path / "images" / "1.png")
    rings = [[9, 9, 45, 9, 45, 41, 9, 41], [35, 9, 71, 9, 71, 41, 35, 41]]
    annotations = [
        {"id": n, "image_id": 1, "category_id": 1, "iscrowd": 0, "segmentation": [ring]} for n, ring in enumerate(rings)
    ]
    record = {"images": [{"id": 1, "file_name": "1.png", "height": 60, "width": 80}], "annotations": annotations}
    (tmp_path / "coarse.json").write_text(json.dumps(record))
    said = command("refine", tmp_path / "coarse.json", *(["--exclusive"] if exclusive else []))
    assert said.code == 0, said.err
    made = json.loads((tmp_path / "coarse.refined.json").read_text())["annotations"]
    drawn = [coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(one["segmentation"], 60, 80))) for one in made]
    assert (drawn[0] & drawn[1]).any() != exclusive
    assert ((drawn[0] | drawn[1]) == (pixels[..., 0] > 100)).all()
