"""Files written by other libraries: refined, and read by them again. Each test needs its library (`exporters.txt`)."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import Command
from PIL import Image
from pycocotools.coco import COCO

from refinetool.formats import open_dataset
from refinetool.masks import decode

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own


def truth(number: int) -> np.ndarray:
    """The bright rectangle of image 1, 2 or 3 of the fixture `folder`."""
    mask = np.zeros((60, 80), dtype=np.bool_)
    x, y = 10 + number, 12 + number
    mask[y : y + 20, x : x + 30] = True
    return mask


def found(path: Path, **options: Any) -> dict[str, np.ndarray]:
    """The first mask of each image by the name of the image."""
    samples = open_dataset(path, **options).samples()
    return {one.image.stem: decode(one.regions[0].mask) for one in samples if one.regions and one.regions[0].mask}


def assert_refined(masks: dict[str, np.ndarray]) -> None:
    assert len(masks) == 3
    for name, mask in masks.items():
        assert (mask == truth(int(name.rpartition("-")[2]))).all(), name


def refined(command: Command, *arguments: object) -> None:
    said = command("refine", *arguments)
    assert said.code == 0, said.err
    assert "3 of 3 masks refined" in said.out


def same_but_for_masks(before: Path, after: Path) -> None:
    """Whether everything but masks, areas and boxes is the same."""
    old, new = (json.loads(path.read_text()) for path in (before, after))
    new.get("info", {}).pop("refinetool", None)
    for record in (old, new):
        record.setdefault("info", {})
        for annotation in record["annotations"]:
            for name in ("segmentation", "area", "bbox"):
                annotation.pop(name, None)
    assert new == old


def test_pycocotools_and_faster_coco_eval_read_what_is_written(command: Command, folder: Path) -> None:
    refined(command, folder / "coarse.json")
    faster = pytest.importorskip("faster_coco_eval")
    for kind in (COCO, faster.COCO):
        read = kind(str(folder / "coarse.refined.json"))
        for number in (1, 2, 3):
            (annotation,) = read.loadAnns(read.getAnnIds(imgIds=[number]))
            assert (read.annToMask(annotation) == truth(number)).all()
            assert annotation["iscrowd"] == 0


@pytest.fixture
def detections(folder: Path) -> Any:
    """The data set as supervision reads it."""
    sv = pytest.importorskip("supervision")
    return sv.DetectionDataset.from_coco(str(folder / "images"), str(folder / "coarse.json"), force_masks=True)


def test_supervisions_coco(command: Command, folder: Path, detections: Any) -> None:
    coarse = folder / "sv" / "annotations.json"
    detections.as_coco(images_directory_path=str(folder / "sv" / "images"), annotations_path=str(coarse))
    refined(command, coarse)
    assert_refined(found(folder / "sv" / "annotations.refined.json"))
    same_but_for_masks(coarse, folder / "sv" / "annotations.refined.json")


def test_supervisions_yolo(command: Command, folder: Path, detections: Any) -> None:
    root = folder / "yolo"
    detections.as_yolo(str(root / "images"), str(root / "labels"), str(root / "data.yaml"))
    refined(command, root)
    assert_refined(found(folder / "yolo-refined", images=root / "images"))
    sv = pytest.importorskip("supervision")
    out = folder / "yolo-refined"
    again = sv.DetectionDataset.from_yolo(
        str(root / "images"), str(out / "labels"), str(out / "data.yaml"), force_masks=True
    )
    assert again.classes == detections.classes
    for path, _, read in again:
        drawn, true = read.mask[0], truth(int(Path(path).stem))
        assert (drawn & true).sum() / (drawn | true).sum() > 0.9, "supervision draws outlines a pixel too wide"


def items(folder: Path, *, crowd: bool = False) -> Any:
    """The data set as Datumaro holds it, with an attribute."""
    dm = pytest.importorskip("datumaro")
    made = []
    for number in (1, 2, 3):
        mask = np.zeros((60, 80), dtype=np.int32)
        x, y = 10 + number, 12 + number
        mask[y - 1 : y + 21, x - 1 : x + 31] = 1
        label = dm.Mask(
            mask, label=1, id=70 + number, group=70 + number, attributes={"occluded": True, "is_crowd": crowd}
        )
        image = dm.Image.from_file(path=str(folder / "images" / f"{number}.png"))
        made.append(
            dm.DatasetItem(f"{number}", subset="train", annotations=[label], media=image, attributes={"id": number})
        )
    return dm.Dataset.from_iterable(made, categories=["background", "box"], media_type=dm.Image)


@pytest.mark.parametrize("crowd", [False, True])
def test_datumaros_coco(command: Command, folder: Path, crowd: bool) -> None:
    items(folder, crowd=crowd).export(str(folder / "dm"), "coco_instances", save_media=True)
    (coarse,) = (folder / "dm" / "annotations").glob("*.json")
    if crowd:  # what Datumaro makes of masks unless they say that they are none
        assert "3 kept coarse: crowds; --include-crowd" in command("refine", coarse, "--dry-run").out
    refined(command, coarse, *(["--include-crowd"] if crowd else []))
    after = coarse.with_name(f"{coarse.stem}.refined.json")
    assert_refined(found(after))
    same_but_for_masks(coarse, after)


def test_datumaros_voc(command: Command, folder: Path) -> None:
    items(folder).export(str(folder / "dm"), "voc_segmentation", save_media=True)
    refined(command, folder / "dm", "--format", "voc-class")
    assert_refined(found(folder / "dm-refined", format="voc-class", images=folder / "dm" / "JPEGImages"))
    for name in ("1", "2", "3"):
        with Image.open(folder / "dm" / "SegmentationClass" / f"{name}.png") as old:  # noqa: SIM117
            with Image.open(folder / "dm-refined" / "SegmentationClass" / f"{name}.png") as new:
                assert (new.mode, new.size) == (old.mode, old.size)
                colours = [np.unique(np.array(one.convert("RGB")).reshape(-1, 3), axis=0) for one in (old, new)]
                assert np.array_equal(*colours)


CONFIG = """<View><Image name="image" value="$image"/>
<PolygonLabels name="label" toName="image"><Label value="box"/></PolygonLabels></View>"""


def test_label_studios_coco(command: Command, folder: Path) -> None:
    converter = pytest.importorskip("label_studio_sdk.converter")
    tasks = []
    for number in (1, 2, 3):
        (folder / "images" / f"{number}.png").rename(folder / "images" / f"0af1bc2d-{number}.png")
        x0, y0, x1, y1 = 9 + number, 11 + number, 41 + number, 33 + number
        points = [[100 * x / 80, 100 * y / 60] for x, y in ((x0, y0), (x1, y0), (x1, y1), (x0, y1))]
        value = {"points": points, "polygonlabels": ["box"], "closed": True}
        result = {"id": "a", "type": "polygonlabels", "from_name": "label", "to_name": "image", "value": value}
        result |= {"original_width": 80, "original_height": 60, "image_rotation": 0}
        image = f"/data/upload/1/0af1bc2d-{number}.png"
        tasks.append({"id": number, "data": {"image": image}, "annotations": [{"id": number, "result": [result]}]})
    (folder / "tasks.json").write_text(json.dumps(tasks))
    made = converter.Converter(CONFIG, project_dir=None, download_resources=False)
    made.convert_to_coco(str(folder / "tasks.json"), str(folder / "ls"), is_dir=False)
    coarse = folder / "ls" / "result.json"
    refined(command, coarse, "--images", folder / "images")
    after = folder / "ls" / "result.refined.json"
    assert_refined(found(after, images=folder / "images"))
    same_but_for_masks(coarse, after)


def test_lvis_reads_what_is_written(command: Command, folder: Path) -> None:
    lvis = pytest.importorskip("lvis")
    record = json.loads((folder / "coarse.json").read_text())
    for image in record["images"]:
        image["coco_url"] = f"http://images.cocodataset.org/val2017/{image.pop('file_name')}"
        image |= {"neg_category_ids": [2], "not_exhaustive_category_ids": []}
    for annotation in record["annotations"]:
        del annotation["iscrowd"]
    record["categories"][0] |= {"frequency": "r", "synset": "box.n.01"}
    (folder / "lvis.json").write_text(json.dumps(record))
    refined(command, folder / "lvis.json")
    same_but_for_masks(folder / "lvis.json", folder / "lvis.refined.json")
    read = lvis.LVIS(str(folder / "lvis.refined.json"))
    for number in (1, 2, 3):
        (annotation,) = read.load_anns(read.get_ann_ids(img_ids=[number]))
        assert (read.ann_to_mask(annotation) == truth(number)).all()


def test_labelmes_files(command: Command, folder: Path) -> None:
    """A polygon and a mask in each file, written and read again by LabelMe itself."""
    labelme = pytest.importorskip("labelme")
    for number in (1, 2, 3):
        x, y = 9 + number, 11 + number
        corners = [[float(a), float(b)] for a, b in ((x, y), (x + 32, y), (x + 32, y + 22), (x, y + 22))]
        mask = labelme.utils.img_arr_to_b64(np.full((22, 32), 255, dtype=np.uint8))
        common = {"label": "Größe", "group_id": 7, "description": "loose", "flags": {"seen": True}, "mine": [1]}
        box = [corners[0], [x + 31.0, y + 21.0]]
        shapes = [
            {**common, "shape_type": "polygon", "points": corners, "mask": None},
            {**common, "shape_type": "mask", "points": box, "mask": mask},
            {**common, "shape_type": "rectangle", "points": box, "mask": None},
        ]
        image = folder / "images" / f"{number}.png"
        labelme.LabelFile().save(
            filename=str(image.with_suffix(".json")),
            shapes=shapes,
            image_path=image.name,
            image_height=60,
            image_width=80,
            image_data=labelme.LabelFile.load_image_file(str(image)),
            other_data={"reviewer": "é"},
            flags={"night": False},
        )
    said = command("refine", folder / "images", "--format", "labelme", "--output", folder / "out")
    assert said.code == 0, said.err
    assert "6 of 9 masks refined" in said.out
    for number in (1, 2, 3):
        before, after = (
            labelme.LabelFile(str(place / f"{number}.json")) for place in (folder / "images", folder / "out")
        )
        drawn = [
            labelme.utils.shape_to_mask((60, 80), after.shapes[0]["points"], shape_type="polygon"),
            np.zeros((60, 80), dtype=np.bool_),
        ]
        (x0, y0), (x1, y1) = np.array(after.shapes[1]["points"], dtype=int)
        drawn[1][y0 : y1 + 1, x0 : x1 + 1] = after.shapes[1]["mask"]
        assert (drawn[1] == truth(number)).all()
        outside, inside = (np.count_nonzero(a & ~b) for a, b in ((drawn[0], truth(number)), (truth(number), drawn[0])))
        assert inside == 0 and outside <= 51, "LabelMe draws the outline itself as inside"
        for read in (before, after):
            del read.shapes[0]["points"], read.shapes[1]["points"], read.shapes[1]["mask"]
        assert after.shapes == before.shapes
        assert (after.image_path, after.flags, after.other_data) == (before.image_path, before.flags, before.other_data)
        assert after.image_data == before.image_data


def test_ultralytics_converter(command: Command, folder: Path) -> None:
    """COCO to YOLO by Ultralytics before refinement, and after: the same lines but for coordinates."""
    converter = pytest.importorskip("ultralytics.data.converter")
    (folder / "annotations").mkdir()
    (folder / "coarse.json").rename(folder / "annotations" / "instances_train.json")
    options = {"use_segments": True, "cls91to80": False}
    converter.convert_coco(str(folder / "annotations"), str(folder / "yolo"), **options)
    (folder / "images").rename(folder / "yolo" / "images" / "train")
    refined(command, folder / "yolo")
    assert_refined(found(folder / "yolo-refined", images=folder / "yolo" / "images"))
    refined(command, folder / "annotations" / "instances_train.json", "--images", folder / "yolo" / "images" / "train")
    (folder / "annotations" / "instances_train.json").unlink()
    converter.convert_coco(str(folder / "annotations"), str(folder / "again"), **options)
    of_coco = found(folder / "again", images=folder / "yolo" / "images")
    assert_refined(of_coco)


def test_panopticapi_reads_what_is_written(command: Command, folder: Path) -> None:
    """Ids and PNGs by panopticapi; its panoptic quality of the refined file is 1, and was lower before."""
    utils, evaluation = (pytest.importorskip(f"panopticapi.{name}") for name in ("utils", "evaluation"))
    categories = {
        1: {"id": 1, "name": "box", "isthing": 1, "color": [220, 20, 60]},
        2: {"id": 2, "name": "wall", "isthing": 0, "color": [7, 246, 231]},
    }
    annotations: dict[str, list[dict[str, Any]]] = {"exact": [], "coarse": []}
    images = json.loads((folder / "coarse.json").read_text())["images"]
    for number in (1, 2, 3):
        ids = utils.IdGenerator(categories)
        box, wall = ids.get_id(1), ids.get_id(2)
        loose = np.zeros((60, 80), dtype=np.bool_)
        loose[11 + number : 33 + number, 9 + number : 41 + number] = True
        for name, mask in (("exact", truth(number)), ("coarse", loose)):
            (folder / name).mkdir(exist_ok=True)
            Image.fromarray(utils.id2rgb(np.where(mask, box, wall))).save(folder / name / f"{number}.png")
            segments = [
                {"id": id, "category_id": category, "iscrowd": 0, "area": int(pixels.sum())}
                for id, category, pixels in ((box, 1, mask), (wall, 2, ~mask))
            ]
            one = {"image_id": number, "file_name": f"{number}.png", "segments_info": segments}
            annotations[name].append(one)
    record = {"images": images, "categories": list(categories.values()), "annotations": annotations["coarse"]}
    utils.save_json(record, str(folder / "coarse.json"))
    said = command("refine", folder / "coarse.json", "--images", folder / "images")
    assert said.code == 0, said.err
    assert "3 of 6 masks refined" in said.out
    after = json.loads((folder / "coarse.refined.json").read_text())
    quality = []
    for name, predicted in (("coarse", annotations["coarse"]), ("coarse.refined", after["annotations"])):
        pairs = list(zip(annotations["exact"], predicted, strict=True))
        found = evaluation.pq_compute_single_core(0, pairs, str(folder / "exact"), str(folder / name), categories)
        quality.append(found.pq_average(categories, isthing=None)[0]["pq"])
    assert quality[0] < 0.95 and quality[1] == 1, quality
    for record_of in (record, after):
        record_of.pop("info", None)
        for annotation in record_of["annotations"]:
            for segment in annotation["segments_info"]:
                segment.pop("area"), segment.pop("bbox", None)
    assert after == record
