"""COCO panoptic and Cityscapes: maps in which every pixel has an owner, and none of the owners may vanish."""

import json
import shutil
import struct
import zlib
from collections.abc import Callable
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


def ids_in(path: Path) -> IntArray:
    return read_ids(path, sizes=[SIZE], max_pixels=SIZE[0] * SIZE[1])


def photo(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((*SIZE, 3), 40, dtype=np.uint8)
    pixels[13:33, 11:41] = 220
    Image.fromarray(pixels).save(path)


@pytest.fixture
def panoptic(tmp_path: Path) -> Path:
    return lay_out(tmp_path, suffix="jpg")


def lay_out(folder: Path, *, suffix: str) -> Path:
    """Write `panoptic_val.json` with two images, its PNGs and the images."""
    (folder / "panoptic_val").mkdir()
    annotations = []
    for number in (1, 2):
        photo(folder / "images" / f"{number}.{suffix}")
        (folder / "panoptic_val" / f"{number}.png").write_bytes(with_ids(panoptic_map()))
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
        "images": [{"id": n, "file_name": f"{n}.{suffix}", "height": 60, "width": 80} for n in (1, 2)],
        "annotations": annotations,
        "categories": [{"id": n, "name": str(n), "isthing": int(n == 3)} for n in (1, 2, 3)],
    }
    path = folder / "panoptic_val.json"
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
    ids, old = ids_in(tmp_path / "out" / "1.png"), panoptic_map()
    assert (ids[old == OTHER] == OTHER).all()
    assert (ids[old == GROUP] == GROUP).all()
    free = np.isin(old, [SKY, ROAD, 0, BOX])
    assert (ids[new & free] == BOX).all()
    assert (ids[(old == BOX) & ~new] == SKY).all(), "the nearest stuff"
    assert (tmp_path / "out" / "2.png").read_bytes() == (panoptic.parent / "panoptic_val" / "2.png").read_bytes()


def test_the_record_agrees_with_the_png_and_the_rest_is_the_same_text(panoptic: Path, tmp_path: Path) -> None:
    refine(open_dataset(panoptic), tmp_path / "out.json", {BOX: rectangle(14, 12, 66, 52)})
    before, after = (json.loads(path.read_text("utf-8")) for path in (panoptic, tmp_path / "out.json"))
    ids = ids_in(tmp_path / "out" / "1.png")
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
        ids = ids_in(panoptic.with_name("panoptic_val.refined") / "2.png")
        assert ((ids == BOX) == rectangle(11, 13, 41, 33)).all()


def test_panoptic_without_pngs_or_images_gets_a_sentence(panoptic: Path) -> None:
    (panoptic.parent / "images").rename(panoptic.parent / "elsewhere")
    with pytest.raises(DataError, match=r"none of its 2 images is in .*images; name the folder"):
        open_dataset(panoptic)
    (panoptic.parent / "panoptic_val").rename(panoptic.parent / "pngs")
    with pytest.raises(DataError, match=r"its PNGs should be in .*panoptic_val, and there is no such folder"):
        open_dataset(panoptic, format="coco-panoptic")


def change(path: Path, edit: Callable[[Any], object]) -> None:
    """Edit a JSON file as a program would."""
    record = json.loads(path.read_text("utf-8"))
    edit(record)
    path.write_text(json.dumps(record), encoding="utf-8")


def segment(record: Any) -> Any:
    """The third segment of the second image."""
    return record["annotations"][1]["segments_info"][2]


def claim(path: Path, width: int, height: int) -> None:
    """Write a PNG of those measures into the header of another one, whose pixels can't be decoded then."""
    data = path.read_bytes()
    header = b"IHDR" + struct.pack(">II", width, height) + data[24:29]
    path.write_bytes(data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:])


def kept(dataset: Dataset) -> list[set[Reason | None]]:
    return [{region.keep for region in sample.regions} for sample in dataset.samples()]


@pytest.mark.parametrize(
    "edit",
    [
        None,
        lambda record: record["annotations"][0].pop("file_name"),
        lambda record: record["annotations"][0].update(file_name=7),
        lambda record: record["annotations"][0].update(file_name=None),
        lambda record: record["annotations"][0].update(file_name=""),
        lambda record: record["annotations"][0].update(file_name="."),
    ],
    ids=["file missing", "absent", "number", "null", "empty", "folder"],
)
def test_an_image_without_a_png_is_kept_and_the_others_are_refined(
    command: Command, panoptic: Path, edit: Callable[[Any], object] | None
) -> None:
    if edit:
        change(panoptic, edit)
    else:
        (panoptic.parent / "panoptic_val" / "1.png").unlink()
    said = command("refine", panoptic, "--json")
    assert said.code == 0, said.err
    summary = json.loads(said.out)
    assert (summary["refined"], summary["kept"]["unreadable-mask"]) == (1, 5)
    before, after = (path.read_text("utf-8") for path in (panoptic, panoptic.with_name("panoptic_val.refined.json")))
    assert after != before
    first = json.dumps(json.loads(before)["annotations"][0])
    assert json.dumps(json.loads(after)["annotations"][0]) == first
    if edit:  # then the whole file was written by json.dumps
        assert first in after
    assert [path.name for path in panoptic.with_name("panoptic_val.refined").iterdir()] == ["2.png"]


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (lambda r: segment(r).update(id="300"), r"segment of image 2 has the id '300'; expected a whole number"),
        (lambda r: segment(r).update(id=300.0), r"segment of image 2 has the id 300\.0; expected a whole number"),
        (lambda r: segment(r).update(id=True), r"segment of image 2 has the id True; expected a whole number"),
        (lambda r: segment(r).pop("id"), r"segment of image 2 has the id None; expected a whole number"),
        (lambda r: segment(r).update(id=ROAD), r"image 2 has two segments with the id 301; give each"),
        (lambda r: r["annotations"][1]["segments_info"].append(4), r"one of the segments is 4; expected an object"),
        (
            lambda r: r["annotations"][1].update(segments_info=None),
            r"image 2 has the segments_info None; expected a li",
        ),
        (lambda r: r["annotations"][1].update(segments_info={}), r"image 2 has the segments_info {}; expected a list"),
        (lambda r: r["annotations"][1].update(file_name="./1.png"), r"the PNG './1.png', which is that of image 1"),
        (lambda r: r["annotations"][1].update(image_id=1), r"image 1 has two annotations"),
        (
            lambda r: r["annotations"][1].update(file_name="../1.png"),
            r"'../1.png', which leads out of the image folder",
        ),
        (lambda r: r["annotations"][1].update(image_id=7), r"image 7 is not listed"),
        (lambda r: r["categories"][1].update(id=True), r"a category has the id True; expected a whole number"),
        (lambda r: r["categories"][1].update(id=2.0), r"a category has the id 2\.0; expected a whole number"),
        (lambda r: r["images"][1].update(height=True), r"image 2 has the height True; expected pixels"),
        (lambda r: r["images"][1].update(width=0), r"image 2 has the width 0; expected pixels"),
        (lambda r: r["images"][1].update(width=-80), r"image 2 has the width -80; expected pixels"),
        (lambda r: r["images"][1].pop("width"), r"image 2 has the width None; expected pixels"),
        (lambda r: r["images"].append(3), r"one of the images is 3; expected an object"),
    ],
)
def test_a_panoptic_file_that_contradicts_itself_gets_a_sentence(
    panoptic: Path, edit: Callable[[Any], object], sentence: str
) -> None:
    change(panoptic, edit)
    with pytest.raises(DataError, match=rf"panoptic_val\.json, line 1, column \d+: .*{sentence}"):
        open_dataset(panoptic)


def test_a_fault_of_a_segment_has_its_true_position(panoptic: Path) -> None:
    text = panoptic.read_text("utf-8")
    at = text.rindex(f'"id": {BOX},')
    panoptic.write_text(text[:at] + text[at:].replace(f'"id": {BOX},', '"id": "x",', 1), encoding="utf-8")
    start = text.rindex("{", 0, at)
    line, column = text.count("\n", 0, start) + 1, start - text.rindex("\n", 0, start)
    with pytest.raises(DataError, match=rf"line {line}, column {column}: a segment of image 2 has the id 'x'"):
        open_dataset(panoptic)


def test_of_a_repeated_list_of_segments_the_last_one_counts(panoptic: Path) -> None:
    text = panoptic.read_text("utf-8")
    panoptic.write_text(text.replace('"image_id": 1,', '"image_id": 1, "segments_info": [{"id": 8}],'), "utf-8")
    sample = next(iter(open_dataset(panoptic).samples()))
    assert sample.regions[0].id == SKY


def test_what_follows_the_data_is_an_error(panoptic: Path) -> None:
    panoptic.write_text(panoptic.read_text("utf-8") + "]", encoding="utf-8")
    with pytest.raises(DataError, match="something follows the end of the data"):
        open_dataset(panoptic)


def test_a_category_that_is_no_number_is_no_category(panoptic: Path, tmp_path: Path) -> None:
    change(panoptic, lambda record: record["annotations"][0]["segments_info"][0].update(category_id=[1]))
    change(panoptic, lambda record: record["annotations"][0]["segments_info"][1].update(category_id=True))
    regions = next(iter(open_dataset(panoptic).samples())).regions
    assert [region.category for region in regions[:3]] == [None, None, 3]
    refine(open_dataset(panoptic), tmp_path / "out.json", {BOX: rectangle(14, 12, 40, 30)})
    assert (ids_in(tmp_path / "out" / "1.png")[panoptic_map() == ROAD] == ROAD).all()


def test_a_panoptic_png_of_another_size_is_not_decoded(panoptic: Path) -> None:
    claim(panoptic.parent / "panoptic_val" / "1.png", 3000, 2000)
    assert kept(open_dataset(panoptic))[0] == {"size-mismatch"}
    change(panoptic, lambda record: record["images"][0].update(width=3000, height=2000))
    assert kept(open_dataset(panoptic))[0] == {"unreadable-mask"}
    assert kept(open_dataset(panoptic, max_pixels=5_999_999))[0] == {"image-too-large"}


@pytest.mark.parametrize("mode", ["L", "LA", "P"])
def test_a_png_without_three_colours_holds_no_ids(panoptic: Path, mode: str) -> None:
    Image.new(mode, SIZE[::-1]).save(panoptic.parent / "panoptic_val" / "1.png")
    assert kept(open_dataset(panoptic)) == [{"unreadable-mask"}, {"stuff", "crowd", None}]


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


def second_city(city: Path) -> Path:
    """Add a second image, and return its map of objects."""
    for path in list(city.parent.rglob("ulm_0_1_*.png")):
        shutil.copy(path, path.with_name(path.name.replace("ulm_0_1", "ulm_0_2")))
    return city / "val" / "ulm" / "ulm_0_2_gtFine_instanceIds.png"


@pytest.mark.parametrize(
    ("reason", "spoil"),
    [
        ("size-mismatch", lambda labels: Image.new("L", (40, 30)).save(labels)),
        ("size-mismatch", lambda labels: claim(labels, 3000, 2000)),
        ("unreadable-mask", lambda labels: labels.write_bytes(b"xx")),
        ("unreadable-mask", lambda labels: labels.write_bytes(labels.read_bytes()[:60])),
        ("unreadable-mask", lambda labels: Image.new("I;16", SIZE[::-1]).save(labels)),
    ],
    ids=["smaller", "huge", "no image", "cut off", "16 bits"],
)
def test_labels_that_cannot_follow_keep_the_objects_of_their_image(
    command: Command, city: Path, reason: str, spoil: Callable[[Path], object]
) -> None:
    objects = second_city(city)
    labels = objects.with_name(objects.name.replace("instanceIds", "labelIds"))
    spoil(labels)
    said = command("refine", city, "--json")
    assert said.code == 0, said.err
    summary = json.loads(said.out)
    assert (summary["refined"], summary["kept"]) == (1, {reason: 1})
    for path in (objects, labels):
        written = city.with_name("gtFine-refined") / path.relative_to(city)
        assert written.read_bytes() == path.read_bytes()


def test_a_map_of_another_size_than_its_image_is_not_decoded(command: Command, city: Path) -> None:
    objects = second_city(city)
    claim(objects, 3000, 2000)
    assert kept(open_dataset(city)) == [{None}, {"size-mismatch"}]
    assert kept(open_dataset(city, need_images=False))[1] == {"unreadable-mask"}
    assert kept(open_dataset(city, need_images=False, max_pixels=5_999_999))[1] == {"image-too-large"}
    said = command("refine", city, "--json")
    assert (said.code, json.loads(said.out)["refined"]) == (0, 1), said.err
    assert (city.with_name("gtFine-refined") / objects.relative_to(city)).read_bytes() == objects.read_bytes()


def test_a_photograph_on_its_side_has_the_size_of_an_upright_map(city: Path) -> None:
    image = city.parent / "leftImg8bit" / "val" / "ulm" / "ulm_0_1_leftImg8bit.png"
    image.unlink()
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", SIZE).save(image.with_suffix(".jpg"), exif=turned)
    assert kept(open_dataset(city)) == [{None}]


def test_images_do_not_decide_what_is_measured(city: Path) -> None:
    Image.new("RGB", (40, 30)).save(city.parent / "leftImg8bit" / "val" / "ulm" / "ulm_0_1_leftImg8bit.png")
    assert kept(open_dataset(city, need_images=False)) == [{None}]


def test_cityscapes_without_images_gets_a_sentence(city: Path) -> None:
    (city.parent / "leftImg8bit").rename(city.parent / "x")
    with pytest.raises(DataError, match=r"none of its 1 files has an image; .* leftImg8bit, with --images"):
        open_dataset(city)


def test_a_png_that_is_a_link_out_of_its_folder_is_read_only_when_asked(panoptic: Path, tmp_path: Path) -> None:
    png, elsewhere = tmp_path / "panoptic_val" / "2.png", tmp_path / "elsewhere.png"
    png.rename(elsewhere)
    png.symlink_to(elsewhere)
    with pytest.raises(DataError, match=r"2\.png: is a link that leads out of .*panoptic_val; --follow-links allows"):
        open_dataset(panoptic)
    *_, second = open_dataset(panoptic, follow_links=True).samples()
    assert second.regions[2].mask is not None
    png.unlink()
    png.symlink_to("1.png")
    assert len(open_dataset(panoptic)) == 2
