"""Damaged files of YOLO, LabelMe, COCO panoptic and Cityscapes, label maps, TIFFs: a sentence, or masks that stay."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_formats_panoptic import city_map, panoptic_map
from test_formats_text import LINES, SHAPES

from refinetool import masks
from refinetool.errors import RefinetoolError
from refinetool.formats import open_dataset
from refinetool.formats.coco_panoptic import with_ids
from refinetool.records import Annotation, Outcome

SIZE = (60, 80)
ODD = [b"", b"\0", b"-1", b"1e999", b"NaN", b"null", b"[]", b"{}", b'"x"', b"9" * 400, b"\xff\xfe", b"[[[["]


def lay_out(folder: Path) -> dict[str, list[Path]]:
    """One small data set per format: what to open, and then its files."""
    for image in (
        "yolo/images/a.jpg",
        "labelme/a.jpg",
        "images/1.jpg",
        "leftImg8bit/a_leftImg8bit.png",
        "tif/images/a.jpg",
    ):
        (folder / image).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.zeros((*SIZE, 3), dtype=np.uint8)).save(folder / image)
    for name in ("yolo/labels", "panoptic", "gtFine", "tif/masks", "voc/SegmentationClass", "voc/JPEGImages"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "yolo" / "labels" / "a.txt").write_bytes(LINES.encode())
    (folder / "labelme" / "a.json").write_text(json.dumps({"shapes": SHAPES, "imagePath": "a.jpg", "imageData": None}))
    (folder / "panoptic" / "1.png").write_bytes(with_ids(panoptic_map()))
    segments = [{"id": n, "category_id": 1, "iscrowd": 0, "area": 1, "bbox": [0, 0, 1, 1]} for n in (5, 301, 16777215)]
    record = {
        "images": [{"id": 1, "file_name": "1.jpg", "height": 60, "width": 80}],
        "annotations": [{"image_id": 1, "file_name": "1.png", "segments_info": segments}],
        "categories": [{"id": 1, "name": "a", "isthing": 1}],
    }
    (folder / "panoptic.json").write_text(json.dumps(record))
    Image.fromarray(city_map().astype(np.uint16)).save(folder / "gtFine" / "a_gtFine_instanceIds.png")
    Image.fromarray((city_map() % 256).astype(np.uint8)).save(folder / "gtFine" / "a_gtFine_labelIds.png")
    Image.fromarray((city_map() == 26001).astype(np.uint8) * 255).save(folder / "tif" / "masks" / "a.tif")
    colours = np.where((city_map() == 26001)[..., None], np.uint8([10, 20, 30]), np.uint8(0))
    Image.fromarray(colours).save(folder / "voc" / "SegmentationClass" / "a.png")
    shutil.copy(folder / "images" / "1.jpg", folder / "voc" / "JPEGImages" / "a.jpg")
    (folder / "voc" / "labelmap.txt").write_text("background:0,0,0::\nbox:10,20,30::\n")
    return {
        "yolo": [folder / "yolo", folder / "yolo" / "labels" / "a.txt"],
        "labelme": [folder / "labelme", folder / "labelme" / "a.json"],
        "coco-panoptic": [folder / "panoptic.json", folder / "panoptic.json", folder / "panoptic" / "1.png"],
        "cityscapes": [folder / "gtFine", *sorted((folder / "gtFine").iterdir())],
        "masks": [folder / "tif" / "masks", folder / "tif" / "masks" / "a.tif"],
        "voc-class": [folder / "voc", folder / "voc" / "labelmap.txt", folder / "voc" / "SegmentationClass" / "a.png"],
    }


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
    at, length = (int(rng.integers(0, len(data))) for _ in range(2))
    match rng.integers(0, 4):
        case 0:
            return data[:at]
        case 1:
            return data[:at] + bytes(rng.integers(0, 256, 4, dtype=np.uint8)) + data[at + 4 :]
        case 2:
            return data[:at] + ODD[int(rng.integers(0, len(ODD)))] + data[at + length % 12 :]
        case _:
            return data[:at] + data[at : at + length % 40] * 3 + data[at:]


def pristine(path: Path) -> bool:
    """Whether a data set is as it was laid out: then it must be read and written."""
    dataset = open_dataset(path)
    return any(region.keep is None for sample in dataset.samples() for region in sample.regions)


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("format", ["yolo", "labelme", "coco-panoptic", "cityscapes", "masks", "voc-class"])
def test_damage_gets_a_sentence_or_keeps_masks(format: str, seed: int, tmp_path: Path) -> None:
    opened, *files = lay_out(tmp_path)[format]
    rng = np.random.default_rng(seed)
    if seed == 0:
        assert pristine(opened)
    else:
        file = files[seed % len(files)]
        file.write_bytes(damaged(file.read_bytes(), rng))
    new = np.zeros(SIZE, dtype=np.bool_)
    new[5:25, 10:50] = True
    try:
        dataset = open_dataset(opened, format=format)
        outcomes = {}
        for sample in dataset.samples():
            mask = masks.encode(new) if sample.size == SIZE else None
            made = [
                Annotation(mask, None)
                if region.keep is None and mask
                else Annotation(region.mask, region.keep or "drift")  # type: ignore[arg-type]
                for region in sample.regions
            ]
            outcomes[sample.key] = Outcome(sample.key, tuple(made))
        dataset.write(outcomes.get, tmp_path / "out" / f"new{opened.suffix}", {})
    except RefinetoolError as error:
        assert len(str(error)) > 10
