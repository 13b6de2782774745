"""COCO files: read as pycocotools reads them, written back as the same text with other masks."""

import codecs
import errno
import json
import os
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from refinetool import masks
from refinetool.errors import DataError, StorageError, UsageError
from refinetool.formats import Dataset, coco_index, open_dataset
from refinetool.records import Annotation, BoolArray, Outcome
from refinetool.statuses import Reason

HEIGHT, WIDTH = 12, 16
RING = [2, 2, 9, 2, 9, 8, 2, 8]
SIDES = {"height": HEIGHT, "width": WIDTH}

# What the COCO API's own files look like: no blanks after commas in lists, keys in no useful order, ids with gaps.
INSTANCES = """{"info": {"description": "toy", "year": 2017, "url": "http:\\/\\/example.org"},
"licenses": [{"id": 1, "name": "Attribution"}],
"images": [{"license": 1,"file_name": "b.jpg","height": 12,"width": 16,"id": 522418,"date_captured": "2013-11-14"},
 {"license": 1,"file_name": "a.jpg","height": 12,"width": 16,"id": 9},
 {"license": 1,"file_name": "none.jpg","height": 12,"width": 16,"id": 30}],
"annotations": [
 {"segmentation": [[2.0,2.0,9.0,2.0,9.0,8.0,2.0,8.0],[11.5,1.25,15,1.25,15,4]],"area": 42.5,"iscrowd": 0,
  "image_id": 522418,"bbox": [2.0,2.0,7.0,6.0],"category_id": 18,"id": 900100},
 {"segmentation": {"counts": [0,5,7,30,150],"size": [12,16]},"area": 35,"iscrowd": 1,"image_id": 9,
  "bbox": [0,0,3,12],"category_id": 1,"id": 3},
 {"id": 7, "image_id": 522418, "category_id": 90, "iscrowd": 0, "attributes": {"occluded": false, "größe": "xl"},
  "segmentation": {"size": [12, 16], "counts": "%s"}, "bbox": [1.5e0, 3, 4, 5], "area": 12.000},
 {"id": 4, "image_id": 9, "category_id": 1, "segmentation": {"size": [12,16], "counts": [10, 20, 162]}}
],
"categories": [{"supercategory": "animal","id": 18,"name": "dog"},{"id": 1,"name": "person"},{"id": 90,"name": "cup"}],
"extra": [null, {"annotations": []}]}
"""


def rectangle(x0: int, y0: int, x1: int, y1: int, shape: tuple[int, int] = (HEIGHT, WIDTH)) -> BoolArray:
    mask = np.zeros(shape, dtype=bool)
    mask[y0:y1, x0:x1] = True
    return mask


def string_counts(mask: BoolArray) -> str:
    return coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))["counts"].decode()


def make_images(folder: Path, *names: str, size: tuple[int, int] = (WIDTH, HEIGHT)) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size).save(path)
    return folder


@pytest.fixture
def instances(tmp_path: Path) -> Path:
    make_images(tmp_path / "images", "a.jpg", "b.jpg")
    path = tmp_path / "instances.json"
    path.write_text(INSTANCES % string_counts(rectangle(1, 3, 5, 8)).replace("\\", "\\\\"), encoding="utf-8")
    return path


def outcomes(dataset: Dataset, refined: Mapping[int, BoolArray]) -> Callable[[str], Outcome | None]:
    """Outcomes that refine the regions with the given ids."""
    found = {}
    for sample in dataset.samples():
        annotations = tuple(
            Annotation(masks.encode(refined[region.id]), None)
            if region.id in refined
            else Annotation(region.mask, Reason.DRIFT)
            for region in sample.regions
        )
        found[sample.key] = Outcome(sample.key, annotations)
    return found.get


def written(path: Path, refined: Mapping[int, BoolArray], **notes: object) -> str:
    """The text of the file with those regions refined."""
    dataset = open_dataset(path)
    destination = path.with_name("refined.json")
    dataset.write(outcomes(dataset, refined), destination, notes)
    return destination.read_text(encoding="utf-8")


def annotations_of(text: str) -> dict[int, dict[str, Any]]:
    return {annotation["id"]: annotation for annotation in json.loads(text)["annotations"]}


# --- reading


def test_samples_follow_the_file(instances: Path) -> None:
    dataset = open_dataset(instances)
    samples = list(dataset.samples())
    assert dataset.format == "coco" and len(dataset) == 3
    assert [sample.key for sample in samples] == ["522418", "9", "30"]
    assert [sample.image for sample in samples] == [
        instances.parent / "images" / f"{name}.jpg" for name in ("b", "a", "none")
    ]
    assert {sample.size for sample in samples} == {(HEIGHT, WIDTH)}
    assert [[(region.id, region.category, region.keep) for region in sample.regions] for sample in samples] == [
        [(900100, 18, None), (7, 90, None)],
        [(3, 1, "crowd"), (4, 1, None)],
        [],
    ]
    assert list(dataset.samples()) == samples, "reading starts anew"


def test_masks_are_those_of_pycocotools(instances: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reference = COCO(str(instances))
    capsys.readouterr()
    for sample in open_dataset(instances).samples():
        for region in sample.regions:
            assert region.mask is not None
            assert np.array_equal(masks.decode(region.mask), reference.annToMask(reference.anns[region.id]))


def test_crowds_are_refined_if_asked(instances: Path) -> None:
    regions = [region for sample in open_dataset(instances, include_crowd=True).samples() for region in sample.regions]
    assert [region.keep for region in regions] == [None] * 4


def minimal(segmentation: object, **others: object) -> dict[str, Any]:
    return {
        "images": [{"id": 1, "file_name": "a.jpg", "height": HEIGHT, "width": WIDTH}],
        "annotations": [{"id": 5, "image_id": 1, "category_id": 1, "segmentation": segmentation, **others}],
    }


def write_json(folder: Path, document: object, name: str = "coarse.json") -> Path:
    make_images(folder, "a.jpg")
    path = folder / name
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("segmentation", "keep"),
    [
        ([], "empty"),
        (None, "empty"),
        ([[3, 3, 3, 3, 3, 3]], "empty"),
        ({"size": [12, 16], "counts": [192]}, "empty"),
        ({"size": [16, 12], "counts": [0, 192]}, "size-mismatch"),
        ({"size": [12, 16], "counts": [0, 193]}, "unreadable-mask"),
        ({"size": [12, 16], "counts": [-1, 193]}, "unreadable-mask"),
        ({"size": [12, 16], "counts": [0.5, 191.5]}, "unreadable-mask"),
        ({"size": [12, 16], "counts": "zzz"}, "unreadable-mask"),
        ({"size": [12, 16], "counts": "52"}, "unreadable-mask"),
        ({"size": [12, 16], "counts": "é"}, "unreadable-mask"),
        ({"size": [12, 16]}, "unreadable-mask"),
        ([[1, 2, 3, 4]], "unreadable-mask"),
        ([[1, 2, 3, 4, 5, 6, 7]], "unreadable-mask"),
        ([1, 2, 3, 4, 5, 6], "unreadable-mask"),
        ([[1, 2, 3, None, 5, 6]], "unreadable-mask"),
        ([[1, 2, 3, float("nan"), 5, 6]], "unreadable-mask"),
        ([[1, 2, 3, 1e9, 5, 6]], "unreadable-mask"),
        ("polygon", "unreadable-mask"),
        (7, "unreadable-mask"),
    ],
)
def test_a_record_that_holds_no_mask_is_kept_with_the_reason(segmentation: object, keep: str, tmp_path: Path) -> None:
    path = write_json(tmp_path, minimal(segmentation))
    (sample,) = open_dataset(path).samples()
    assert sample.regions[0].keep == keep
    assert written(path, {}) == path.read_text()


def test_rings_of_one_or_two_corners_cover_nothing(tmp_path: Path) -> None:
    (sample,) = open_dataset(write_json(tmp_path, minimal([[5, 5, 6, 6], RING]))).samples()
    assert sample.regions[0].mask == masks.encode(rectangle(2, 2, 9, 8))


def test_optional_keys_may_be_missing(tmp_path: Path) -> None:
    document = minimal([RING])
    del document["annotations"][0]["category_id"], document["images"][0]["width"]
    (sample,) = open_dataset(write_json(tmp_path, document)).samples()
    assert sample.size == (HEIGHT, WIDTH), "taken from the image's header"
    assert sample.regions[0].category is None


def test_numbers_written_as_floats_and_texts_for_images_are_understood(tmp_path: Path) -> None:
    document = minimal([RING], area=42.0)
    document["images"][0]["id"] = document["annotations"][0]["image_id"] = "frame-1"
    document["annotations"][0].update(id=5.0, category_id=1.0)
    (sample,) = open_dataset(write_json(tmp_path, document)).samples()
    assert sample.key == "frame-1"
    assert (sample.regions[0].id, sample.regions[0].category) == (5, 1)


# --- where the images are


@pytest.mark.parametrize("place", ["images", "data", "data/images", "val2017", "."])
def test_images_are_looked_for_in_the_usual_places(place: str, tmp_path: Path) -> None:
    make_images(tmp_path / place, "a.jpg")
    path = tmp_path / "data" / "instances_val2017.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(minimal([RING])))
    (sample,) = open_dataset(path).samples()
    assert sample.image.is_file()


def test_lvis_names_images_by_address(tmp_path: Path) -> None:
    document = minimal([RING])
    image = document["images"][0]
    del image["file_name"]
    image["coco_url"] = "http://images.cocodataset.org/train2017/000000391895.jpg"
    for place in ("train2017", "."):
        folder = make_images(tmp_path / place / "there", f"{place}/000000391895.jpg")
        (sample,) = open_dataset(write_json(tmp_path, document), images=folder).samples()
        assert sample.image == folder / place / "000000391895.jpg"


EXPORTED = (
    "images\\sub\\a.jpg",
    "/data/upload/1/a.jpg",
    "/data/upload/1/0af1bc2d-a.jpg",
    "/data/local-files/?d=photos/a.jpg",
    "/data/local-files/?d=a.jpg",
    "http://localhost:8080/data/a.jpg?token=7",
    "s3://bucket/some/a.jpg",
    "images/a.jpg",
    "C:\\photos\\a.jpg",
    "C:a.jpg",
    "../photos/a.jpg",
    r"x\..\..\a.jpg",
    "/etc/a.jpg",
)
"""Names of an image as tools write them, with paths of other machines."""


@pytest.mark.parametrize("inner", [".", "train"])
@pytest.mark.parametrize("name", EXPORTED)
def test_images_are_found_by_the_last_part_of_their_name(name: str, inner: str, tmp_path: Path) -> None:
    document = minimal([RING])
    document["images"][0]["file_name"] = name
    folder = make_images(tmp_path / "photos", f"{inner}/a.jpg", f"{inner}/b.jpg")
    make_images(tmp_path, "a.jpg")  # outside the folder
    (sample,) = open_dataset(write_json(tmp_path, document), images=folder).samples()
    assert sample.image == folder / inner / "a.jpg"


@pytest.mark.parametrize("name", EXPORTED)
def test_no_image_outside_the_folder_is_found(name: str, tmp_path: Path) -> None:
    document = minimal([RING])
    document["images"][0]["file_name"] = name
    make_images(tmp_path, "a.jpg", "x/a.jpg", "photos/b.jpg")
    with pytest.raises(DataError, match=r"none of its 1 images is where it was looked for, the first as .*photos"):
        open_dataset(write_json(tmp_path, document), images=tmp_path / "photos")


def test_of_images_with_one_name_that_with_the_same_folders_is_found(tmp_path: Path) -> None:
    document = minimal([RING])
    document["images"][0]["file_name"] = "/data/set/train/1.jpg"
    folder = make_images(tmp_path / "photos", "train/1.jpg", "val/1.jpg", "other/1.jpg")
    (sample,) = open_dataset(write_json(tmp_path, document), images=folder).samples()
    assert sample.image == folder / "train" / "1.jpg"
    document["images"][0]["file_name"] = "/data/set/test/1.jpg"
    with pytest.raises(DataError, match="none of its 1 images"):
        open_dataset(write_json(tmp_path, document), images=folder)


def test_a_path_within_the_folder_comes_first(tmp_path: Path) -> None:
    document = minimal([RING])
    document["images"][0]["file_name"] = "val/a.jpg"
    folder = make_images(tmp_path / "photos", "val/a.jpg", "a.jpg")
    (sample,) = open_dataset(write_json(tmp_path, document), images=folder).samples()
    assert sample.image == folder / "val" / "a.jpg"


@pytest.mark.parametrize("inner", ["", "train/", "instances_train/"])
def test_annotations_beside_images_in_subsets_as_cvat_and_datumaro_write_them(inner: str, tmp_path: Path) -> None:
    make_images(tmp_path, f"images/{inner}a.jpg", "images/val/b.jpg")
    (tmp_path / "annotations").mkdir()
    path = tmp_path / "annotations" / "instances_train.json"
    path.write_text(json.dumps(minimal([RING])))
    (sample,) = open_dataset(path).samples()
    assert sample.image == tmp_path / "images" / f"{inner}a.jpg"


def test_folders_around_the_file_are_not_crawled(tmp_path: Path) -> None:
    make_images(tmp_path, "data/elsewhere/a.jpg", "elsewhere/a.jpg")
    path = tmp_path / "data" / "coarse.json"
    path.write_text(json.dumps(minimal([RING])))
    with pytest.raises(DataError, match="none of its 1 images"):
        open_dataset(path)


def test_fields_of_lvis_stay(tmp_path: Path) -> None:
    """LVIS has no `iscrowd`, no `file_name` and fields of its own."""
    make_images(tmp_path / "images", "val2017/000000000042.jpg")
    text = """{"info": {}, "images": [{"id": 42, "height": 12, "width": 16, "neg_category_ids": [7, 9],
  "not_exhaustive_category_ids": [], "coco_url": "http://images.cocodataset.org/val2017/000000000042.jpg"}],
 "categories": [{"id": 3, "frequency": "r", "synset": "aerosol.n.02", "image_count": 4, "def": "a \\u00fc"}],
 "annotations": [{"id": 1, "image_id": 42, "category_id": 3, "area": 42.0, "bbox": [2, 2, 7, 6],
  "segmentation": [[2, 2, 9, 2, 9, 8, 2, 8]]}], "licenses": []}"""
    path = tmp_path / "lvis.json"
    path.write_text(text)
    dataset = open_dataset(path)
    (sample,) = dataset.samples()
    assert sample.image == tmp_path / "images" / "val2017" / "000000000042.jpg"
    made = Outcome("42", (Annotation(masks.encode(rectangle(3, 2, 9, 8)), None),))
    dataset.write({"42": made}.get, tmp_path / "out.json", {})
    expected = text.replace("[[2, 2, 9, 2, 9, 8, 2, 8]]", "[[3,2,9,2,9,8,3,8]]").replace("42.0", "36")
    assert (tmp_path / "out.json").read_text() == expected.replace("[2, 2, 7, 6]", "[3,2,6,6]")


def test_some_images_may_be_missing_but_not_all(tmp_path: Path) -> None:
    document = minimal([RING])
    document["images"].insert(0, {"id": 2, "file_name": "lost.jpg", "height": 3, "width": 4})
    path = write_json(tmp_path, document)
    assert len(list(open_dataset(path, images=tmp_path).samples())) == 2
    (tmp_path / "other").mkdir()
    with pytest.raises(DataError, match=r"none of its 2 images .* first as .*other/lost\.jpg; .*--images"):
        open_dataset(path, images=tmp_path / "other")
    with pytest.raises(DataError, match=r"nowhere: no such folder; .*--images"):
        open_dataset(path, images=tmp_path / "nowhere")


# --- files that are refused


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"annotations": [{"image_id": 1}]}, r"line 1, column \d+: an annotation has no 'id'"),
        ({"annotations": [{"id": "7", "image_id": 1}]}, "an annotation has the id '7'"),
        ({"annotations": [{"id": 10**30, "image_id": 1}]}, r"the id 10+; expected a whole number below 2\*\*63"),
        ({"annotations": [{"id": 2**63, "image_id": 1}]}, r"expected a whole number below 2\*\*63"),
        ({"annotations": [{"id": 1, "image_id": 1, "category_id": 10**30}]}, r"a whole number below 2\*\*63"),
        ({"annotations": [{"id": 1, "image_id": [1]}]}, r"has the image_id \[1\]; expected a number or a text"),
        (
            {"annotations": [{"id": 1, "image_id": "1"}]},
            "names image '1', a text, but the image is listed with a number",
        ),
        (
            {"images": [{"id": "1", "file_name": "a.jpg"}]},
            "names image 1, a number, but the image is listed with a text",
        ),
        ({"images": [{"id": 1, "file_name": 5}]}, "image 1 has the file_name 5; expected a text"),
        ({"categories": [{"name": "cat"}]}, "a category has no 'id'"),
        ({"annotations": [{"id": 1, "image_id": 8}, {"id": 2, "image_id": 9}]}, "image 8, .* 1 others"),
        ({"annotations": [{"id": 1}]}, "annotation 1 has no 'image_id'"),
        ({"annotations": [{"id": 1, "image_id": 1, "category_id": "cat"}]}, "the category_id 'cat'"),
        ({"annotations": [{"id": 4, "image_id": 1}] * 2}, "annotation id 4 was already used at line 1, column .*;"),
        ({"annotations": {}}, "expected the list of annotations"),
        ({"annotations": [[]]}, r"one of the annotations is \[\]"),
        ({"annotations": [{"segments_info": []}]}, "panoptic"),
        ({"categories": [{"id": "1"}]}, "a category has the id '1'"),
        ({"images": [{"file_name": "a.jpg"}]}, "an image has no 'id'"),
        ({"images": [{"id": 1}]}, "image 1 has no 'file_name'"),
        ({"images": [{"id": 1, "file_name": "a.jpg"}] * 2}, "image id 1 occurs twice"),
        ({"images": [{"id": 1, "file_name": "a.jpg"}, {"id": "1", "file_name": "a.jpg"}]}, "number and text"),
        ({"images": [{"id": 1, "file_name": "a.jpg", "width": "16"}]}, "the width '16'"),
        ({"images": [{"id": 1, "file_name": "/"}]}, "is called '/', which names no file"),
        ({"images": [{"id": 1, "file_name": "../.."}]}, "is called '../..', which names no file"),
        ({"images": [{"id": 1, "file_name": "/a\0.jpg"}]}, "holds a NUL character"),
    ],
)
def test_contradictions_get_a_sentence(change: dict[str, object], sentence: str, tmp_path: Path) -> None:
    path = write_json(tmp_path, minimal([RING]) | change)
    with pytest.raises(DataError, match=f"coarse.json.*{sentence}"):
        open_dataset(path, images=tmp_path)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "the file is empty"),
        ("   ", "the file is empty"),
        ("PNG", "is not JSON"),
        ('{"images": [\n{"id": 1,}]}', r"line 2, column \d+: not valid JSON"),
        ('{"images": [', "cut off"),
        ('{"forms": []}', "has no 'annotations' and no 'images'"),
        ('{"images": []}', "has no 'annotations'"),
        ('{"images": [], "annotations": [], "images": []}', "a second 'images'"),
        ('{"images": [], "annotations": []} x', "something follows"),
        ("[1]", "one of the annotations is 1"),
        ('[{"category_id": 1}]', "has no 'image_id'"),
    ],
)
def test_broken_files_get_a_sentence(text: str, sentence: str, tmp_path: Path) -> None:
    path = tmp_path / "coarse.json"
    path.write_text(text)
    with pytest.raises(DataError, match=f"coarse.json.*{sentence}"):
        open_dataset(path, images=tmp_path)


@pytest.mark.parametrize("format", ["coco", "coco-results", None])
@pytest.mark.parametrize(("encoding", "mark"), [("utf-16-le", codecs.BOM_UTF16_LE), ("utf-16-be", codecs.BOM_UTF16_BE)])
def test_utf_16_is_named(encoding: str, mark: bytes, format: str | None, tmp_path: Path) -> None:
    """PowerShell writes what a command prints as UTF-16."""
    path = tmp_path / "coarse.json"
    path.write_bytes(mark + json.dumps(minimal([RING])).encode(encoding))
    with pytest.raises(DataError, match=r"coarse\.json: is UTF-16; save it as UTF-8"):
        open_dataset(path, images=tmp_path, format=format)


def test_a_file_that_is_not_there_gets_a_sentence(tmp_path: Path) -> None:
    for format in (None, "coco", "coco-results"):
        with pytest.raises(DataError, match=r"no\.json: can't be read \(No such file or directory\)"):
            open_dataset(tmp_path / "no.json", format=format)


# --- writing


def test_nothing_refined_gives_the_same_bytes(instances: Path) -> None:
    assert written(instances, {}) == instances.read_text(encoding="utf-8")


def test_only_three_values_of_refined_records_change(instances: Path) -> None:
    text = instances.read_text(encoding="utf-8")
    new = rectangle(3, 4, 10, 9)
    runs = "[40,5,7,5,7,5,7,5,7,5,7,5,7,5,75]"
    expected = (
        text.replace("[[2.0,2.0,9.0,2.0,9.0,8.0,2.0,8.0],[11.5,1.25,15,1.25,15,4]]", "[[3,4,10,4,10,9,3,9]]")
        .replace('"area": 42.5', '"area": 35')
        .replace("[2.0,2.0,7.0,6.0]", "[3,4,7,5]")
        .replace('{"size": [12,16], "counts": [10, 20, 162]}', f'{{"size":[12,16],"counts":{runs}}}')
        .replace('"year": 2017, "url": "http:\\/\\/example.org"', '"year": 2017, "url": "http:\\/\\/example.org",X')
        .replace(",X", ',"refinetool":{"model":"tiny"}')
    )
    assert written(instances, {900100: new, 4: new}, model="tiny") == expected


def test_strings_stay_strings_and_lists_stay_lists(instances: Path) -> None:
    new = rectangle(0, 0, 16, 12)
    refined = annotations_of(written(instances, {7: new, 4: new}))
    assert refined[7]["segmentation"] == {"size": [12, 16], "counts": string_counts(new)}
    assert refined[4]["segmentation"] == {"size": [12, 16], "counts": [0, 192]}
    assert (refined[7]["area"], refined[7]["bbox"]) == (192, [0, 0, 16, 12])
    assert not {"area", "bbox", "iscrowd"} & refined[4].keys(), "nothing is invented"


def test_rings_become_run_lengths_where_there_is_a_hole(instances: Path) -> None:
    ring = rectangle(3, 3, 9, 9) & ~rectangle(5, 5, 6, 6)
    dataset = open_dataset(instances)
    destination = instances.with_name("refined.json")
    result = dataset.write(outcomes(dataset, {900100: ring}), destination, {})
    assert (result.path, result.changed) == (destination, 1)
    assert result.notes == ("Polygons that became run lengths, because their new masks have holes: 1.",)
    refined = annotations_of(destination.read_text(encoding="utf-8"))[900100]
    assert refined["segmentation"] == {"size": [12, 16], "counts": string_counts(ring)}
    assert (refined["iscrowd"], refined["area"]) == (0, 35)


def test_other_keys_beside_the_counts_stay_and_so_does_iscrowd(tmp_path: Path) -> None:
    segmentation = {"counts": [0, 192], "by": "hand", "size": [12, 16]}
    path = write_json(tmp_path, minimal(segmentation, iscrowd=1))
    dataset = open_dataset(path, include_crowd=True)
    dataset.write(outcomes(dataset, {5: rectangle(1, 0, 2, 1)}), tmp_path / "out.json", {})
    refined = annotations_of((tmp_path / "out.json").read_text())[5]
    assert list(refined["segmentation"].items()) == [("counts", [12, 1, 179]), ("by", "hand"), ("size", [12, 16])]
    assert refined["iscrowd"] == 1


def test_an_empty_mask_is_never_written(instances: Path) -> None:
    assert written(instances, {7: rectangle(0, 0, 0, 0)}) == instances.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        ("{}", '{"refinetool":{"n":1}}'),
        ("null", '{"refinetool":{"n":1}}'),
        ('{ "a": [1] }', '{ "a": [1],"refinetool":{"n":1} }'),
        ('{"refinetool" : {"old": 2}, "b": 3}', '{"refinetool" : {"n":1}, "b": 3}'),
        ('"a text"', '"a text"'),
        ("[]", "[]"),
    ],
)
def test_notes_go_into_info(info: str, expected: str, tmp_path: Path) -> None:
    path = write_json(tmp_path, minimal([RING]))
    text = path.read_text()
    path.write_text(text[:-1] + f', "info": {info}}}')
    assert written(path, {}, n=1) == text[:-1] + f', "info": {expected}}}'


def test_info_is_added_where_there_is_none(tmp_path: Path) -> None:
    path = write_json(tmp_path, minimal([RING]))
    assert written(path, {}, n="é") == '{"info":{"refinetool":{"n":"\\u00e9"}},' + path.read_text()[1:]


# A document is rendered twice from one style: as it was, and as it should be with some values replaced.


class Verbatim(str):
    """Text that stands in the file as it is."""


def render(value: Any, style: int, place: str = "") -> str:
    choose = random.Random(f"{style}{place}")
    blanks = [choose.choice(["", "", " ", "\n", "\t", "\r\n    "]) for _ in range(4)]
    if isinstance(value, Verbatim):
        return value
    if isinstance(value, dict):
        names = sorted(value)
        choose.shuffle(names)
        members = (
            f"{blanks[0]}{json.dumps(n)}{blanks[1]}:{blanks[2]}{render(value[n], style, f'{place}/{n}')}" for n in names
        )
        return "{" + ",".join(members) + blanks[3] + "}"
    if isinstance(value, list):
        items = (f"{blanks[0]}{render(item, style, f'{place}/{n}')}" for n, item in enumerate(value))
        return "[" + ",".join(items) + blanks[3] + "]"
    return json.dumps(value, ensure_ascii=choose.random() < 0.5)


def random_document(choose: random.Random) -> dict[str, Any]:
    images = [
        {"id": 100 * n, "file_name": "ä.jpg", "height": HEIGHT, "width": WIDTH, "café": "/"}
        for n in range(choose.randint(1, 4))
    ]
    forms = [[RING], [[1.5, 1, 6.25, 1, 6, 7], RING], {"size": [12, 16], "counts": [10, 20, 162]}]
    forms.append({"size": [12, 16], "counts": string_counts(rectangle(4, 4, 8, 8))})
    optional = {"area": 3.50, "bbox": [1e0, 2, 3, 4], "iscrowd": 0, "note": '{"a": ["\u2028€]', "score": 0.1}
    annotations = []
    for number in range(choose.randint(0, 6)):
        image = choose.choice(images)["id"]
        annotation = {"id": 7 * number, "image_id": image, "category_id": 2, "segmentation": choose.choice(forms)}
        annotations.append(annotation | dict(choose.sample(list(optional.items()), choose.randint(0, 5))))
    return {"images": images, "annotations": annotations, "ünknown": {"images": []}, "categories": [{"id": 2}]}


@given(st.integers(0, 2**32))
@settings(max_examples=60, deadline=None)
def test_whatever_the_style_only_refined_values_change(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    folder = tmp_path_factory.mktemp("style")
    make_images(folder, "ä.jpg")
    choose = random.Random(seed)
    document = random_document(choose)
    path = folder / "coarse.json"
    path.write_bytes(render(document, seed).encode())
    new = {"area": 20, "bbox": [3, 2, 5, 4]}
    refined = {}
    for annotation in document["annotations"]:
        if choose.random() < 0.6:
            segmentation = annotation["segmentation"]
            refined[annotation["id"]] = rectangle(3, 2, 8, 6)
            if isinstance(segmentation, list):
                text = "[[3,2,8,2,8,6,3,6]]"
            else:  # size and counts stand in the order in which they stood
                as_list = isinstance(segmentation["counts"], list)
                runs = [38, 4, 8, 4, 8, 4, 8, 4, 8, 4, 102] if as_list else string_counts(rectangle(3, 2, 8, 6))
                order = json.loads(render(annotation, seed, f"/annotations/{annotation['id'] // 7}"))["segmentation"]
                text = json.dumps(order | {"counts": runs}, separators=(",", ":"))
            annotation["segmentation"] = Verbatim(text)
            for name in new.keys() & annotation.keys():
                annotation[name] = Verbatim(json.dumps(new[name], separators=(",", ":")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coco_index, "WINDOW_BYTES", choose.choice([7, 100, 1 << 20]))
        dataset = open_dataset(path)
    dataset.write(outcomes(dataset, refined), folder / "out.json", {})
    assert (folder / "out.json").read_bytes() == render(document, seed).encode()


def blob(seed: int) -> BoolArray:
    noise = np.random.default_rng(seed).random((HEIGHT, WIDTH))
    return masks.components(noise > 0.5).labels == 1


@pytest.mark.parametrize("seed", range(12))
def test_a_refined_file_reads_back_as_the_refined_masks(seed: int, instances: Path) -> None:
    new = {number: blob(seed + number) for number in (900100, 7, 4)}
    text = written(instances, new)
    instances.write_text(text, encoding="utf-8")
    for sample in open_dataset(instances).samples():
        for region in sample.regions:
            if region.id in new:
                assert region.mask is not None
                assert np.array_equal(masks.decode(region.mask), new[region.id])


def test_the_evaluators_take_the_file(instances: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from faster_coco_eval import COCO as FasterCoco  # noqa: N811

    new = {900100: rectangle(3, 3, 9, 9) & ~rectangle(5, 5, 6, 6), 7: rectangle(0, 0, 4, 4)}
    written(instances, new, model="tiny")
    refined = str(instances.with_name("refined.json"))
    for reader in (COCO(refined), FasterCoco(refined)):
        for number, mask in new.items():
            assert np.array_equal(reader.annToMask(reader.anns[number]), mask)
    capsys.readouterr()


def test_outcomes_are_asked_for_once_per_image(instances: Path) -> None:
    dataset, asked = open_dataset(instances), []

    def find(key: str) -> None:
        asked.append(key)

    dataset.write(find, instances.with_name("out.json"), {})
    assert asked == ["522418", "9", "30"]


# --- results


def results_file(folder: Path, *images: int | str, name: str = "results.json") -> Path:
    records = [
        {"image_id": image, "category_id": 3, "segmentation": {"size": [12, 16], "counts": string_counts(blob(n))}}
        | {"score": 0.5 + n / 100, "bbox": [0, 0, 1, 1]}
        for n, image in enumerate(images)
    ]
    path = folder / name
    path.write_text(json.dumps(records, indent=1))
    return path


def test_results_with_a_file_of_images(tmp_path: Path) -> None:
    make_images(tmp_path, "a.jpg")
    listed = write_json(tmp_path, minimal([RING]), "images.json")
    path = results_file(tmp_path, 1, 1)
    dataset = open_dataset(path, sizes=listed, images=tmp_path)
    (sample,) = dataset.samples()
    assert dataset.format == "coco-results"
    assert (sample.image, [region.id for region in sample.regions]) == (tmp_path / "a.jpg", [0, 1])
    new = rectangle(2, 3, 5, 5)
    dataset.write(outcomes(dataset, {1: new}), tmp_path / "out.json", {"model": "tiny"})
    before, after = (json.loads(p.read_text()) for p in (path, tmp_path / "out.json"))
    assert after[0] == before[0]
    assert after[1] == before[1] | {
        "segmentation": {"size": [12, 16], "counts": string_counts(new)},
        "bbox": [2, 3, 3, 2],
    }
    with pytest.raises(UsageError, match=r"images\.json: .* would replace the list of images"):
        dataset.write(outcomes(dataset, {}), listed, {})


@pytest.mark.parametrize("name", ["42.png", "000000000042.jpg", "COCO_val2014_000000000042.jpg", "val/000042.jpg"])
def test_results_find_images_by_number(name: str, tmp_path: Path) -> None:
    make_images(tmp_path / "images", name)
    (sample,) = open_dataset(results_file(tmp_path, 42)).samples()
    assert sample.image == tmp_path / "images" / name
    assert sample.size == (HEIGHT, WIDTH)


def test_results_without_any_image_get_a_sentence(tmp_path: Path) -> None:
    make_images(tmp_path, "other.jpg")
    with pytest.raises(DataError, match=r"by number \(7 \.\.\.\), and .* has none of them; .*--sizes"):
        open_dataset(results_file(tmp_path, 7))


def test_results_of_an_unlisted_image_get_a_sentence(tmp_path: Path) -> None:
    listed = write_json(tmp_path, minimal([RING]), "images.json")
    with pytest.raises(DataError, match="line 20, column 2: annotation 1 names image 99"):
        open_dataset(results_file(tmp_path, 1, 99), sizes=listed)


def test_results_keep_what_their_own_size_allows_when_the_image_is_broken(tmp_path: Path) -> None:
    make_images(tmp_path, "1.jpg")
    (tmp_path / "2.jpg").write_bytes(b"no image")
    samples = list(open_dataset(results_file(tmp_path, 1, 2)).samples())
    assert [sample.size for sample in samples] == [(HEIGHT, WIDTH)] * 2


def test_results_can_be_read_by_sizes_that_are_known_from_elsewhere(tmp_path: Path) -> None:
    """Run lengths state their own size; polygons take the one that is known, not that of a picture found by number."""
    make_images(tmp_path, "thumb_1.png", "thumb_2.png", "thumb_3.png", size=(4, 3))
    path = results_file(tmp_path, 1, 2, 3)
    records = json.loads(path.read_text())
    for record in records[1:]:
        record["segmentation"] = [RING]
    path.write_text(json.dumps(records))
    listed = write_json(tmp_path, {"images": [{"id": 2, "file_name": "2.png"} | SIDES], "annotations": []})
    results = open_dataset(path, need_images=False)
    sized = results.with_sizes(open_dataset(listed, need_images=False).sizes())
    assert [sample.size for sample in results.samples()] == [(3, 4)] * 3
    assert [sample.size for sample in sized.samples()] == [(HEIGHT, WIDTH), (HEIGHT, WIDTH), (3, 4)]


def test_sizes_are_those_stated_or_those_of_the_listed_images(tmp_path: Path) -> None:
    make_images(tmp_path, "b.jpg", size=(7, 5))
    images = [
        {"id": 1, "file_name": "a.jpg"} | SIDES,
        {"id": 2, "file_name": "b.jpg"},
        {"id": 3, "file_name": "no.jpg"},
    ]
    listed = write_json(tmp_path, {"images": images, "annotations": []})
    assert open_dataset(listed).sizes() == {"1": (HEIGHT, WIDTH), "2": (5, 7)}


# --- storage


def test_the_input_is_never_overwritten(instances: Path) -> None:
    dataset = open_dataset(instances)
    alias = instances.with_name("alias.json")
    alias.symlink_to(instances)
    for destination in (instances, instances.parent / "images" / ".." / "instances.json", alias):
        with pytest.raises(UsageError, match="would replace the input"):
            dataset.write(outcomes(dataset, {}), destination, {})


def test_a_full_disk_leaves_nothing_behind(instances: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    dataset = open_dataset(instances)
    before = sorted(instances.parent.iterdir())
    with pytest.raises(StorageError, match=r"out\.json: the disk is full"):
        dataset.write(outcomes(dataset, {}), instances.with_name("out.json"), {})
    assert sorted(instances.parent.iterdir()) == before


def test_an_output_that_can_not_be_made_gets_a_sentence(instances: Path) -> None:
    dataset = open_dataset(instances)
    with pytest.raises(StorageError, match=r"out\.json: can't be written \((Not a directory|File exists)\)"):
        dataset.write(outcomes(dataset, {}), instances.parent / "images" / "a.jpg" / "out.json", {})


def test_parents_are_made_and_an_earlier_output_is_replaced(instances: Path) -> None:
    dataset = open_dataset(instances)
    destination = instances.parent / "deep" / "er" / "out.json"
    for _ in range(2):
        dataset.write(outcomes(dataset, {}), destination, {})
    assert destination.read_bytes() == instances.read_bytes()
    assert list(destination.parent.iterdir()) == [destination]


def test_an_input_that_changed_meanwhile_is_refused(instances: Path) -> None:
    dataset = open_dataset(instances)
    find = outcomes(dataset, {})
    instances.write_text(instances.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    with pytest.raises(DataError, match="has changed since it was read"):
        dataset.write(find, instances.with_name("out.json"), {})
