"""YOLO's and LabelMe's text files: the same lines and shapes back, with other outlines."""

import base64
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import Command
from PIL import Image

from refinetool import masks
from refinetool.errors import DataError, UsageError
from refinetool.formats import Dataset, Written, open_dataset
from refinetool.formats.rings import rasterised
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
