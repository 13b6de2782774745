"""YOLO's and LabelMe's text files: the same lines and shapes back, with other outlines."""

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import Command
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from refinetool import masks
from refinetool.errors import DataError, UsageError
from refinetool.formats import Dataset, Written, open_dataset
from refinetool.formats.rings import rasterised
from refinetool.images import read_sample
from refinetool.records import Annotation, BoolArray, Outcome, Sample
from refinetool.settings import PolygonSettings
from refinetool.statuses import Reason

SIZE = (60, 80)


def photo(path: Path, size: tuple[int, int] = SIZE) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.full((*size, 3), 40, dtype=np.uint8)
    pixels[13:33, 11:41] = 220
    Image.fromarray(pixels).save(path)
    return path


def rectangle(x0: int, y0: int, x1: int, y1: int) -> BoolArray:
    mask = np.zeros(SIZE, dtype=np.bool_)
    mask[y0:y1, x0:x1] = True
    return mask


RING = rectangle(10, 10, 40, 40) & ~rectangle(20, 20, 30, 30)
TWO = rectangle(5, 5, 20, 30) | rectangle(50, 20, 70, 50) | rectangle(30, 2, 34, 6)


def write(dataset: Dataset, destination: Path, *new: BoolArray | None) -> Written:
    """Write the first sample with new masks for its regions; None keeps one."""
    sample = next(iter(dataset.samples()))
    made = [
        Annotation(region.mask, Reason.DRIFT) if mask is None else Annotation(masks.encode(mask), None)
        for region, mask in zip(sample.regions, new, strict=True)
    ]
    return dataset.write({sample.key: Outcome(sample.key, tuple(made))}.get, destination, {})


def first(path: Path, **options: Any) -> Sample:
    return next(iter(open_dataset(path, **options).samples()))


# --- YOLO

LINES = (
    "2 0.125 0.2 0.5125 0.2 0.5125 0.55 0.125 0.55\n"
    "\n"
    "0 0.5 0.5 0.25 0.25\r\n"
    "1  0.1 0.1  0.2 0.1  0.2 0.3   0.1 0.3 0.875\n"
    "x 0.1 0.1 0.2 0.1 0.2 0.3"
)


@pytest.fixture
def yolo(tmp_path: Path) -> Path:
    root = tmp_path / "set"
    for name in ("train/a", "val/b"):
        photo(root / "images" / f"{name}.jpg")
        (root / "labels" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "labels" / f"{name}.txt").write_bytes(LINES.encode())
    (root / "data.yaml").write_text("path: .\ntrain: images/train\nval: images/val\nnames: {0: a, 1: b, 2: c}\n")
    return root


@pytest.mark.parametrize("place", [".", "labels", "labels/train"])
def test_a_yolo_data_set_is_read(place: str, yolo: Path) -> None:
    dataset = open_dataset(yolo / place)
    assert dataset.format == "yolo"
    sample = next(iter(dataset.samples()))
    assert sample.image == yolo / "images" / "train" / "a.jpg"
    assert sample.size == SIZE
    expected = [(0, 2, None), (2, 0, "empty"), (3, 1, None), (4, None, "unreadable-mask")]
    assert [(region.id, region.category, region.keep) for region in sample.regions] == expected
    assert sample.regions[0].mask == masks.encode(rectangle(10, 12, 41, 33))
    assert sample.regions[2].mask == masks.encode(rectangle(8, 6, 16, 18)), "the last number is a score"


def test_only_refined_lines_of_yolo_change(yolo: Path, tmp_path: Path) -> None:
    written = write(
        open_dataset(yolo), tmp_path / "out", rectangle(11, 13, 41, 33), None, rectangle(8, 7, 16, 18), None
    )
    assert (written.changed, written.notes) == (2, ())
    lines, before = (
        (folder / "labels" / "train" / "a.txt").read_bytes().decode().splitlines(keepends=True)
        for folder in (tmp_path / "out", yolo)
    )
    assert [lines[n] for n in (1, 2, 4)] == [before[n] for n in (1, 2, 4)]
    assert lines[0] == "2 0.137500 0.216667 0.512500 0.216667 0.512500 0.550000 0.137500 0.550000\n"
    assert lines[3].endswith(" 0.875\n")
    for name in ("labels/val/b.txt", "data.yaml"):
        assert (tmp_path / "out" / name).read_bytes() == (yolo / name).read_bytes()
    again = first(tmp_path / "out", images=yolo / "images")
    assert again.regions[0].mask == masks.encode(rectangle(11, 13, 41, 33))
    assert again.regions[2].mask == masks.encode(rectangle(8, 7, 16, 18))


def test_lines_of_yolo_that_are_no_outlines_are_explained(yolo: Path) -> None:
    path = yolo / "labels" / "train" / "a.txt"
    path.write_text("x 0.1 0.1 0.2 0.1 0.2 0.3\n\n1 0.1 0.1 0.2 0.1 nan 0.3\n0 0.5 0.5 0.25 0.25\n")
    assert first(yolo).faults == (
        f"{path}, line 1: 'x 0.1 0.1 0.2 0.1 0.2 0.3' holds something other than numbers.",
        f"{path}, line 3: a corner of its rings is not a finite number.",
    )


@pytest.mark.parametrize(
    ("holes", "expected", "note"),
    [("rle", "filled", "which are filled: 1."), ("fill", "filled", "filled: 1."), ("keep", "kept", "")],
)
def test_a_line_of_yolo_and_holes(holes: Any, expected: str, note: str, yolo: Path, tmp_path: Path) -> None:
    dataset = open_dataset(yolo, polygons=PolygonSettings(holes=holes))
    written = write(dataset, tmp_path / "out", RING, None, None, None)
    assert note in " ".join(written.notes)
    assert bool(written.notes) == bool(note)
    again = first(tmp_path / "out", images=yolo / "images")
    assert again.regions[0].mask == masks.encode(RING if expected == "kept" else rectangle(10, 10, 40, 40))


def test_islands_of_a_line_of_yolo_are_joined_without_a_pixel(yolo: Path, tmp_path: Path) -> None:
    write(open_dataset(yolo), tmp_path / "out", TWO, None, None, None)
    assert first(tmp_path / "out", images=yolo / "images").regions[0].mask == masks.encode(TWO)


def test_labels_in_a_folder_of_a_split_as_roboflow_exports_them(tmp_path: Path) -> None:
    photo(tmp_path / "train" / "images" / "a.jpg")
    (tmp_path / "train" / "labels").mkdir()
    (tmp_path / "train" / "labels" / "a.txt").write_text(LINES)
    (tmp_path / "data.yaml").write_text("names: [a]\n")
    (tmp_path / "README.roboflow.txt").write_text("hello")
    dataset = open_dataset(tmp_path)
    assert (dataset.format, len(dataset)) == ("yolo", 1)
    assert first(tmp_path).image == tmp_path / "train" / "images" / "a.jpg"


def test_yolo_without_images_or_labels_gets_a_sentence(yolo: Path) -> None:
    with pytest.raises(UsageError, match=r"data\.yaml: name the folder of the data set instead, .*set"):
        open_dataset(yolo / "data.yaml")
    with pytest.raises(UsageError, match=r"b\.txt: these are YOLO labels of one image; name their folder, .*val"):
        open_dataset(yolo / "labels" / "val" / "b.txt")
    (yolo / "nothing").mkdir()
    with pytest.raises(DataError, match=r"none of its 2 label files has an image, .* --images"):
        open_dataset(yolo, images=yolo / "nothing")
    with pytest.raises(DataError, match="nothing: holds no labels"):
        open_dataset(yolo / "nothing", format="yolo")
    (yolo / "images" / "train" / "a.jpg").unlink()
    sample = first(yolo)
    assert {region.keep for region in sample.regions} == {"image-missing"}


def test_the_command_refines_yolo(command: Command, yolo: Path) -> None:
    said = command("refine", yolo)
    assert said.code == 0, said.err
    assert "2 of 8 masks refined" in said.out
    again = first(yolo.with_name("set-refined"), images=yolo / "images")
    assert again.regions[0].mask == masks.encode(rectangle(11, 13, 41, 33))


# --- LabelMe


def png(mask: BoolArray) -> str:
    data = io.BytesIO()
    Image.fromarray(mask).save(data, format="PNG")
    return base64.b64encode(data.getvalue()).decode()


def shape(points: list[list[float]], kind: str = "polygon", **more: Any) -> dict[str, Any]:
    return {"label": "größe", "points": points, "group_id": None, "shape_type": kind, "flags": {}, **more}


SHAPES = [
    shape([[10, 12], [41, 12.0], [41, 33], [10, 33]], description="x"),
    shape([[3, 4], [6, 8]], "rectangle"),
    shape([[8, 6], [15, 17]], "mask", mask=png(np.ones((12, 8), dtype=np.bool_))),
    shape([[8, 6], [15, 17]], "mask", mask="?"),
]


@pytest.fixture
def labelme(tmp_path: Path) -> Path:
    folder = tmp_path / "labelled"
    photo(folder / "a.jpg")
    record = {
        "version": "5.4.1",
        "flags": {},
        "shapes": SHAPES,
        "imagePath": "..\\\\photos\\\\a.jpg",
        "imageData": None,
    }
    text = json.dumps(record | {"imageHeight": 60, "imageWidth": 80}, indent=2, ensure_ascii=False)
    (folder / "a.json").write_text(text, encoding="utf-8")
    return folder


def test_labelme_is_read(labelme: Path) -> None:
    for path in (labelme, labelme / "a.json"):
        dataset = open_dataset(path)
        assert dataset.format == "labelme"
        (sample,) = dataset.samples()
        assert sample.image == labelme / "a.jpg"
        assert [region.keep for region in sample.regions] == [None, "empty", None, "unreadable-mask"]
        assert sample.regions[0].mask == masks.encode(rectangle(10, 12, 41, 33))
        assert sample.regions[2].mask == masks.encode(rectangle(8, 6, 16, 18))


def test_only_points_and_masks_of_labelme_change(labelme: Path, tmp_path: Path) -> None:
    written = write(open_dataset(labelme / "a.json"), tmp_path / "out.json", TWO, None, RING, None)
    assert written.changed == 2
    before, after = (json.loads(path.read_text("utf-8")) for path in (labelme / "a.json", tmp_path / "out.json"))
    drawn = rasterised([np.array(after["shapes"][0]["points"])], size=SIZE)
    assert (drawn == TWO).all()
    for record in (before, after):
        del record["shapes"][0]["points"], record["shapes"][2]["points"], record["shapes"][2]["mask"]
    assert after == before
    photo(tmp_path / "a.jpg")
    assert first(tmp_path / "out.json").regions[2].mask == masks.encode(RING), "a mask keeps its holes"
    untouched = (tmp_path / "out.json").read_text("utf-8").split('"points"')
    assert untouched[0] == (labelme / "a.json").read_text("utf-8").split('"points"')[0]
    assert '"label": "größe"' in untouched[1]


def test_the_command_refines_labelme(command: Command, labelme: Path) -> None:
    said = command("refine", labelme)
    assert said.code == 0, said.err
    assert "1 of 4 masks refined" in said.out
    sample = first(labelme.with_name("labelled-refined"), images=labelme)
    assert sample.regions[0].mask == masks.encode(rectangle(11, 13, 41, 33))


def relabelled(folder: Path, **changes: Any) -> Path:
    """The file with other values; None leaves a value out."""
    path = folder / "a.json"
    record = {**json.loads(path.read_text("utf-8")), **changes}
    path.write_text(json.dumps({name: value for name, value in record.items() if value is not None}, indent=1))
    return path


def test_a_labelme_file_of_another_image_size_keeps_its_masks(command: Command, labelme: Path) -> None:
    path = relabelled(labelme, imageHeight=30)
    before = path.read_bytes()
    said = command("refine", labelme, "--json")
    assert said.code == 1
    assert "a.jpg: the image measures 80 x 60 pixels (width x height), its annotations say 80 x 30;" in said.err
    summary = json.loads(said.out)
    assert (summary["failed"], summary["refined"]) == (1, 0)
    assert summary["kept"]["size-mismatch"] == 2
    assert (labelme.with_name("labelled-refined") / "a.json").read_bytes() == before


@pytest.mark.parametrize("height", [None, "60", 60.5, True])
def test_a_size_of_labelme_that_is_no_whole_number_is_not_used(height: Any, labelme: Path) -> None:
    relabelled(labelme, imageHeight=height)
    assert first(labelme).size == SIZE


def test_a_size_of_labelme_is_bounded(labelme: Path) -> None:
    relabelled(labelme, imageHeight=100_000, imageWidth=100_000)
    assert {region.keep for region in first(labelme).regions} == {"size-mismatch"}
    for side in (0, -60, 10**400):
        relabelled(labelme, imageHeight=side)
        (region,) = first(labelme).regions
        assert region.keep == "unreadable-mask"
        assert "a.json: has the imageHeight" in str(region.fault)


def test_a_labelme_image_as_stored_or_upright(labelme: Path) -> None:
    """Tools differ in whether a size is that of the stored image or of the upright one; the pixels follow the file."""
    turned = Image.Exif()
    turned[0x0112] = 6
    with Image.open(labelme / "a.jpg") as image:
        image.save(labelme / "a.jpg", exif=turned)
    for size in (SIZE, SIZE[::-1]):
        relabelled(labelme, imageHeight=size[0], imageWidth=size[1])
        sample = first(labelme)
        assert sample.size == size
        assert read_sample(sample, max_pixels=10**6).shape[:2] == size


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("}", "}}", r"a.json, line \d+, column 2: not valid JSON: something follows the end"),
        ('"version"', '"shapes": [], "version"', r"a.json, line \d+, column \d+: a second 'shapes'; expected one"),
        ('"version"', '"imageHeight": 3, "version"', r"a second 'imageHeight'; expected one"),
        ('"shapes": [', '"shapes": null, "x": [', r"a.json, line \d+, column \d+: expected the list of shapes"),
        ('"imageWidth": 80', '"imageWidth": 80,', r"not valid JSON: expected a name in double quotes"),
    ],
)
def test_a_broken_labelme_file_is_explained(
    *, old: str, new: str, fault: str, command: Command, labelme: Path, tmp_path: Path
) -> None:
    path = labelme / "a.json"
    text = path.read_text("utf-8")
    at = text.rindex(old) if old == "}" else text.index(old)
    path.write_text(text[:at] + new + text[at + len(old) :], "utf-8")
    said = command("refine", labelme, "--format", "labelme", "-o", tmp_path / "out", "--json")
    assert said.code == 0, said.err
    summary = json.loads(said.out)
    assert summary["kept"] == {"unreadable-mask": 1}
    assert summary["faulty"] == 1
    assert re.search(fault, *summary["faults"])
    assert (tmp_path / "out" / "a.json").read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("odd", "fault"),
    [
        (None, "is None; expected an object"),
        (shape([[1, 2], [30, 2], [30]]), "its points can't be read"),
        (
            shape([[1, 2], [30, 2], [30, 900]]),
            "a corner of its rings is at 900, far outside the image of 80 x 60 pixels",
        ),
        (shape([[8, 6], [15, 17]], "mask", mask="?"), "its points or mask can't be read"),
        (
            shape([[8, 6], [15, 17]], "mask", mask=png(np.ones((5, 8), dtype=np.bool_))),
            "its mask claims 8 x 5 pixels (width x height), its points 8 x 12",
        ),
        (
            shape([[76, 6], [83, 17]], "mask", mask=png(np.ones((12, 8), dtype=np.bool_))),
            "its points lie outside the image of 80 x 60 pixels (width x height)",
        ),
    ],
)
def test_a_broken_shape_is_explained(odd: Any, fault: str, labelme: Path) -> None:
    path = relabelled(labelme, shapes=[SHAPES[0], odd])
    good, bad = first(labelme).regions
    assert (good.keep, good.fault) == (None, None)
    assert (bad.keep, bad.fault) == ("unreadable-mask", f"{path}: shapes[1]: {fault}.")


def test_a_mask_of_labelme_is_compared_with_its_box_before_it_is_decoded(
    labelme: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    relabelled(labelme, shapes=[shape([[1, 1], [20, 20]], "mask", mask=png(np.ones((3000, 3000), dtype=np.bool_)))])

    def decode(image: Image.Image) -> None:
        raise AssertionError(f"an image of {image.size} was decoded")

    monkeypatch.setattr(PngImageFile, "load", decode)
    (region,) = first(labelme).regions
    assert "its mask claims 3000 x 3000 pixels (width x height), its points 20 x 20" in str(region.fault)


# --- files that are not read


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"type": "FeatureCollection", "features": []}', "a GeoJSON file"),
        ('{"_via_settings": {}, "_via_img_metadata": {}}', "VGG Image Annotator"),
        ('{"dm_format_version": "1.0", "items": []}', "Datumaro's own JSON"),
        ('[{"id": 1, "annotations": [{"result": []}], "data": {"image": "x"}}]', "Label Studio"),
        ('{"description": "", "objects": [{"classTitle": "cat"}]}', "Supervisely"),
        ('<?xml version="1.0"?>\n<annotations><version>1.1</version>', "an XML of CVAT"),
        ("<annotation>\n<folder>VOC</folder>", "an XML of PASCAL VOC"),
    ],
)
def test_other_files_are_named(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_text(text)
    with pytest.raises(DataError, match=f"this looks like .*{said}"):
        open_dataset(tmp_path / "x")


def test_a_coco_file_that_speaks_of_features_is_coco(tmp_path: Path) -> None:
    photo(tmp_path / "a.jpg")
    record = {"info": {"by": "FeatureCollection"}, "images": [{"id": 1, "file_name": "a.jpg"}], "annotations": []}
    (tmp_path / "x.json").write_text(json.dumps(record))
    assert open_dataset(tmp_path / "x.json").format == "coco"
