"""COCO panoptic and Cityscapes: maps in which every pixel has an owner, and none of the owners may vanish."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import Command
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from refinetool import masks
from refinetool.errors import DataError
from refinetool.formats import Dataset, Written, open_dataset
from refinetool.formats.coco_panoptic import read_ids, with_ids
from refinetool.formats.settling import settle
from refinetool.records import Annotation, BoolArray, IntArray, Outcome
from refinetool.statuses import Reason

SIZE = (60, 80)
SKY, ROAD, BOX, OTHER, GROUP = 70000, 301, 5, 16777215, 9
"""Ids of segments: two of stuff, two things, a crowd."""


def rectangle(x0: int, y0: int, x1: int, y1: int) -> BoolArray:
    mask = np.zeros(SIZE, dtype=np.bool_)
    mask[y0:y1, x0:x1] = True
    return mask


def panoptic_map() -> IntArray:
    ids = np.full(SIZE, SKY, dtype=np.int64)
    ids[45:] = ROAD
    ids[12:35, 10:43] = BOX  # loosely around the bright 13:33, 11:41
    ids[20:30, 60:70] = OTHER
    ids[50:55, 5:15] = GROUP
    ids[0:3, 0:5] = 0
    return ids


def photo(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((*SIZE, 3), 40, dtype=np.uint8)
    pixels[13:33, 11:41] = 220
    Image.fromarray(pixels).save(path)


@pytest.fixture
def panoptic(tmp_path: Path) -> Path:
    photo(tmp_path / "images" / "1.jpg")
    photo(tmp_path / "images" / "2.jpg")
    (tmp_path / "panoptic_val").mkdir()
    annotations = []
    for number in (1, 2):
        (tmp_path / "panoptic_val" / f"{number}.png").write_bytes(with_ids(panoptic_map()))
        segments: list[dict[str, Any]] = []
        for segment, category, crowd in ((SKY, 1, 0), (ROAD, 2, 0), (BOX, 3, 0), (OTHER, 3, 0), (GROUP, 3, 1)):
            mask = panoptic_map() == segment
            x0, y0, x1, y1 = masks.tight_box(mask)
            box = [x0, y0, x1 - x0, y1 - y0]
            segments.append(
                {"id": segment, "category_id": category, "iscrowd": crowd, "bbox": box, "area": int(mask.sum())}
            )
        annotations.append({"image_id": number, "file_name": f"{number}.png", "segments_info": segments, "mine": "é"})
    record = {
        "images": [{"id": n, "file_name": f"{n}.jpg", "height": 60, "width": 80} for n in (1, 2)],
        "annotations": annotations,
        "categories": [{"id": n, "name": str(n), "isthing": int(n == 3)} for n in (1, 2, 3)],
    }
    path = tmp_path / "panoptic_val.json"
    path.write_text(json.dumps(record, ensure_ascii=False, indent=1), encoding="utf-8")
    return path


def refine(dataset: Dataset, destination: Path, new: dict[int, BoolArray]) -> Written:
    """Write the first image with new masks of some of its regions."""
    sample = next(iter(dataset.samples()))
    made = [
        Annotation(masks.encode(new[region.id]), None, 0.9)
        if region.id in new
        else Annotation(region.mask, region.keep or Reason.DRIFT)
        for region in sample.regions
    ]
    return dataset.write({sample.key: Outcome(sample.key, tuple(made))}.get, destination, {})


def test_panoptic_segments_are_read(panoptic: Path) -> None:
    dataset = open_dataset(panoptic)
    assert (dataset.format, len(dataset)) == ("coco-panoptic", 2)
    sample = next(iter(dataset.samples()))
    assert sample.image == panoptic.parent / "images" / "1.jpg"
    expected = [(SKY, 1, "stuff"), (ROAD, 2, "stuff"), (BOX, 3, None), (OTHER, 3, None), (GROUP, 3, "crowd")]
    assert [(region.id, region.category, region.keep) for region in sample.regions] == expected
    assert sample.regions[2].mask == masks.encode(panoptic_map() == BOX)


def test_things_trade_pixels_with_stuff_only(panoptic: Path, tmp_path: Path) -> None:
    new = rectangle(14, 12, 66, 52)  # over sky, road, the other thing; less on the left
    written = refine(open_dataset(panoptic), tmp_path / "out.json", {BOX: new})
    assert written.changed == 1
    ids, old = read_ids(tmp_path / "out" / "1.png"), panoptic_map()
    assert (ids[old == OTHER] == OTHER).all()
    assert (ids[old == GROUP] == GROUP).all()
    free = np.isin(old, [SKY, ROAD, 0, BOX])
    assert (ids[new & free] == BOX).all()
    assert (ids[(old == BOX) & ~new] == SKY).all(), "the nearest stuff"
    assert (tmp_path / "out" / "2.png").read_bytes() == (panoptic.parent / "panoptic_val" / "2.png").read_bytes()


def test_the_record_agrees_with_the_png_and_the_rest_is_the_same_text(panoptic: Path, tmp_path: Path) -> None:
    refine(open_dataset(panoptic), tmp_path / "out.json", {BOX: rectangle(14, 12, 66, 52)})
    before, after = (json.loads(path.read_text("utf-8")) for path in (panoptic, tmp_path / "out.json"))
    ids = read_ids(tmp_path / "out" / "1.png")
    for segment in after["annotations"][0]["segments_info"]:
        x0, y0, x1, y1 = masks.tight_box(ids == segment["id"])
        assert segment["area"] == (ids == segment["id"]).sum()
        assert segment["bbox"] == [x0, y0, x1 - x0, y1 - y0]
    assert after["annotations"][1] == before["annotations"][1]
    for record in (before, after):
        for segment in record["annotations"][0]["segments_info"]:
            del segment["area"], segment["bbox"]
    assert after == before
    text, old = ((path.read_text("utf-8")).partition('"segments_info"') for path in (tmp_path / "out.json", panoptic))
    assert text[0] == old[0]
    assert '"mine": "é"' in text[2]


def test_the_command_refines_panoptic_twice(command: Command, panoptic: Path) -> None:
    for options in ([], ["--overwrite"]):
        said = command("refine", panoptic, *options)
        assert said.code == 0, said.err
        assert "2 of 10 masks refined" in said.out
        assert "4 kept coarse: stuff" in said.out
        ids = read_ids(panoptic.with_name("panoptic_val.refined") / "2.png")
        assert ((ids == BOX) == rectangle(11, 13, 41, 33)).all()


def test_panoptic_without_pngs_or_images_gets_a_sentence(panoptic: Path) -> None:
    (panoptic.parent / "images").rename(panoptic.parent / "elsewhere")
    with pytest.raises(DataError, match=r"none of its 2 images is in .*images; name the folder"):
        open_dataset(panoptic)
    (panoptic.parent / "panoptic_val").rename(panoptic.parent / "pngs")
    with pytest.raises(DataError, match=r"its PNGs should be in .*panoptic_val, and there is no such folder"):
        open_dataset(panoptic, format="coco-panoptic")


@given(
    old=arrays(np.int64, (5, 6), elements=st.integers(0, 4)),
    new=arrays(np.bool_, (2, 5, 6)),
    scores=st.tuples(st.floats(0, 1), st.none() | st.floats(0, 1)),
)
def test_nobody_vanishes_and_kept_objects_keep_their_pixels(old: IntArray, new: BoolArray, scores: Any) -> None:
    refined = {n + 1: (masks.encode(mask), score) for n, (mask, score) in enumerate(zip(new, scores, strict=True))}
    settled = settle(old, refined, ground=np.isin(old, [0, 3]))
    assert set(np.unique(settled)) - {1, 2} == set(np.unique(old)) - {1, 2}
    assert set(np.unique(old)) <= set(np.unique(settled))
    assert (settled[old == 4] == 4).all()


# --- Cityscapes


def city_map() -> IntArray:
    ids = np.full(SIZE, 23, dtype=np.int64)  # sky
    ids[45:] = 7  # road
    ids[12:35, 10:43] = 26001  # a car
    ids[20:30, 60:70] = 26  # a group of cars
    return ids


@pytest.fixture
def city(tmp_path: Path) -> Path:
    folder = tmp_path / "gtFine" / "val" / "ulm"
    folder.mkdir(parents=True)
    photo(tmp_path / "leftImg8bit" / "val" / "ulm" / "ulm_0_1_leftImg8bit.png")
    ids = city_map()
    Image.fromarray(ids.astype(np.uint16)).save(folder / "ulm_0_1_gtFine_instanceIds.png")
    Image.fromarray(np.where(ids >= 1000, ids // 1000, ids).astype(np.uint8)).save(
        folder / "ulm_0_1_gtFine_labelIds.png"
    )
    Image.fromarray(np.zeros((*SIZE, 4), dtype=np.uint8)).save(folder / "ulm_0_1_gtFine_color.png")
    (folder / "ulm_0_1_gtFine_polygons.json").write_text("{}")
    return tmp_path / "gtFine"


@pytest.mark.parametrize("place", [".", "val", "val/ulm"])
def test_cityscapes_is_read_without_its_siblings(place: str, city: Path) -> None:
    dataset = open_dataset(city / place)
    assert dataset.format == "cityscapes"
    (sample,) = dataset.samples()
    assert sample.image.name == "ulm_0_1_leftImg8bit.png"
    assert [(region.id, region.category) for region in sample.regions] == [(26001, 26)]
    assert sample.regions[0].mask == masks.encode(city_map() == 26001)


def test_cityscapes_stays_16_bits_and_its_labels_follow(city: Path, tmp_path: Path) -> None:
    refine(open_dataset(city), tmp_path / "out", {26001: rectangle(14, 12, 66, 52)})
    folder = tmp_path / "out" / "val" / "ulm"
    assert sorted(path.name.rpartition("_")[2] for path in folder.iterdir()) == ["instanceIds.png", "labelIds.png"]
    with (
        Image.open(folder / "ulm_0_1_gtFine_instanceIds.png") as image,
        Image.open(folder / "ulm_0_1_gtFine_labelIds.png") as labels,
    ):
        ids, classes = np.asarray(image).astype(int), np.asarray(labels)
        assert image.mode == "I;16"
        assert labels.mode == "L"
    assert (ids[city_map() == 26] == 26).all()
    assert ids[50, 30] == 26001
    assert ids[20, 11] == 23
    assert (classes == np.where(ids >= 1000, ids // 1000, ids)).all()


def test_the_command_refines_cityscapes(command: Command, city: Path) -> None:
    said = command("refine", city, "--images", city.parent / "leftImg8bit")
    assert said.code == 0, said.err
    with Image.open(city.with_name("gtFine-refined") / "val" / "ulm" / "ulm_0_1_gtFine_instanceIds.png") as image:
        assert ((np.asarray(image) == 26001) == rectangle(11, 13, 41, 33)).all()


def test_cityscapes_without_images_gets_a_sentence(city: Path) -> None:
    (city.parent / "leftImg8bit").rename(city.parent / "x")
    with pytest.raises(DataError, match=r"none of its 1 files has an image; .* leftImg8bit, with --images"):
        open_dataset(city)
