"""Packing training data: what goes in comes out, within the bound, and what is wrong is said."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from training_data import IGNORED, PACKING, paint_folder

from refinetool.errors import DataError, StorageError, UsageError
from refinetool.settings import PackSettings
from refinetool.train.data.objects import find_objects, read_ids
from refinetool.train.data.pack import Pack, is_pack, pack, packed, pictures_of, read_pack
from refinetool.train.data.sources import LAST_ID, AnnotatedPicture, drawn_for_validation, id_map, list_pictures


def silent(_done: int, _total: int) -> None:
    pass


def packed_up(*data: Path, output: Path, settings: PackSettings = PACKING) -> Pack:
    return pack(data, output, images=None, settings=settings, on_progress=silent)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return paint_folder(tmp_path / "data", classes=False)


# --- folders


def test_ids_are_objects_and_classes_are_split(folder: Path, tmp_path: Path) -> None:
    for mask in (folder / "masks").iterdir():
        assert len(find_objects(read_ids(mask), by_class=False, min_px=1)) == 2
    last = sorted((paint_folder(tmp_path / "classes", classes=True) / "masks").iterdir())[-1]
    by_class = find_objects(read_ids(last), by_class=True, min_px=1)
    assert [(thing.value, thing.box, thing.seed) for thing in by_class] == [
        (1, (10, 15, 110, 85), None),
        (1, (10, 15, 60, 50), (10, 15)),
        (1, (70, 55, 110, 85), (70, 55)),
    ]


def test_specks_are_no_objects() -> None:
    ids = np.zeros((50, 50), np.uint8)
    ids[:5, :5] = 3
    for by_class in (False, True):
        assert find_objects(ids, by_class=by_class, min_px=26) == []
        assert len(find_objects(ids, by_class=by_class, min_px=25)) == 1


# --- what goes in comes out


def test_a_pack_holds_the_pictures_and_their_objects(folder: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    made = pack(
        [folder],
        tmp_path / "pack",
        images=None,
        settings=PACKING,
        on_progress=lambda done, total: told.append((done, total)),
    )
    assert told[-1] == (4, 4)
    assert [(source.name, source.train, source.validation) for source in made.sources] == [("data", 3, 1)]
    assert made.tensors["validation"].tolist() == [0, 0, 0, 1]
    for number, (image, ids) in enumerate(pictures_of(made, range(4))):
        original = np.asarray(Image.open(folder / "images" / f"{number}.jpg")).astype(int)
        assert np.abs(image - original).mean() < 8
        truth = np.asarray(Image.open(folder / "masks" / f"{number}.png"))
        assert ((ids == IGNORED) == (truth == IGNORED)).all()
        members = np.unpackbits(made.tensors["members"], axis=1).astype(bool)[2 * number : 2 * number + 2]
        masks = {tuple(box): row[ids] for box, row in zip(boxes_of(made, number), members, strict=True)}
        assert (masks[10, 15, 60, 50] == (truth == 1)).all()
        assert (masks[70, 55, 110, 85] == (truth == 2)).all()


def boxes_of(made: Pack, number: int) -> list[list[int]]:
    boxes: list[list[int]] = made.tensors["boxes"][2 * number : 2 * number + 2].tolist()
    return boxes


def test_a_pack_can_be_read_again(folder: Path, tmp_path: Path) -> None:
    made = packed_up(folder, output=tmp_path / "pack")
    again = read_pack(tmp_path / "pack")
    assert again.digest == made.digest
    assert again.sources == made.sources
    assert all((again.tensors[name] == made.tensors[name]).all() for name in made.tensors)


def test_the_same_data_make_the_same_pack(folder: Path, tmp_path: Path) -> None:
    assert packed_up(folder, output=tmp_path / "a").digest == packed_up(folder, output=tmp_path / "b").digest


def test_large_pictures_are_made_smaller(folder: Path, tmp_path: Path) -> None:
    made = packed_up(folder, output=tmp_path / "pack", settings=replace(PACKING, side=80))
    assert made.tensors["sizes"].tolist() == [[60, 80]] * 4
    for image, ids in pictures_of(made, range(4)):
        assert image.shape == (60, 80, 3)
        assert ids.shape == (60, 80)


# --- overlapping objects


@settings(deadline=None)
@given(seed=st.integers(0, 1000), count=st.integers(1, 6), shrink=st.sampled_from([1.0, 0.6]))
def test_an_id_map_gives_every_object_back(seed: int, count: int, shrink: float) -> None:
    rng = np.random.default_rng(seed)
    height, width = 40, 50
    objects = []
    for _ in range(count):
        y, x = rng.integers(0, 30), rng.integers(0, 40)
        mask = np.zeros((height, width), bool)
        mask[y : y + rng.integers(3, 25), x : x + rng.integers(3, 25)] = True
        objects.append(mask)
    void = np.zeros((height, width), bool)
    void[:2] = True
    size = round(height * shrink), round(width * shrink)
    rows, columns = (((np.arange(n) + 0.5) * m / n).astype(int) for n, m in zip(size, (height, width), strict=True))
    found = id_map(
        AnnotatedPicture(np.zeros((height, width, 3), np.uint8), tuple(objects), void), size=size, min_area_px=1
    )
    seen = [(mask & ~void)[rows][:, columns] for mask in objects]
    expected = sorted(mask.tobytes() for mask in seen if mask.any())
    assert sorted(row[found.ids].tobytes() for row in found.members) == expected
    assert (found.ids == IGNORED).sum() == void[rows][:, columns].sum()
    for row, box, area in zip(found.members, found.boxes, found.areas, strict=True):
        mask = row[found.ids]
        assert mask.sum() == area
        assert mask[box[1] : box[3], box[0] : box[2]].sum() == area


def test_the_smallest_objects_go_if_ids_run_out() -> None:
    objects = []
    for number in range(300):
        mask = np.zeros((60, 60), bool)
        y, x = divmod(number, 20)
        mask[3 * y : 3 * y + 2, 3 * x : 3 * x + (2 if number < 250 else 1)] = True
        objects.append(mask)
    picture = AnnotatedPicture(np.zeros((60, 60, 3), np.uint8), tuple(objects), np.zeros((60, 60), bool))
    found = id_map(picture, size=(60, 60), min_area_px=1)
    assert 200 <= len(found.areas) <= LAST_ID
    assert found.ids.max() <= LAST_ID
    assert (found.areas == 4).sum() >= 200


# --- bounds


def noisy_folder(folder: Path) -> Path:
    paint_folder(folder, classes=False)
    rng = np.random.default_rng(1)
    for path in (folder / "images").iterdir():
        Image.fromarray(rng.integers(0, 255, (90, 120, 3), dtype=np.uint8)).save(path)
    return folder


def test_a_bound_lowers_quality_and_side(tmp_path: Path) -> None:
    folder = noisy_folder(tmp_path / "data")
    free = packed_up(folder, output=tmp_path / "free", settings=replace(PACKING, side=120))
    tight = replace(PACKING, side=120, max_megabytes=0.4 * free.megabytes)
    made = packed_up(folder, output=tmp_path / "tight", settings=tight)
    assert made.tensors["images"].nbytes <= 0.4 * 1e6 * free.megabytes
    assert (made.side, made.quality) < (free.side, free.quality)


def test_what_can_not_fit_is_said(tmp_path: Path) -> None:
    folder = noisy_folder(tmp_path / "data")
    with pytest.raises(DataError, match=r"don't fit into 0\.001 MB .* --max-megabytes"):
        packed_up(folder, output=tmp_path / "pack", settings=replace(PACKING, max_megabytes=0.001))
    assert not (tmp_path / "pack").exists()


# --- other formats


def coco_file(folder: Path, *, count: int) -> Path:
    (folder / "images").mkdir(parents=True)
    images, annotations = [], []
    for number in range(count):
        Image.fromarray(np.full((60, 80, 3), 90, np.uint8)).save(folder / "images" / f"{number}.jpg")
        images.append({"id": number, "file_name": f"{number}.jpg", "height": 60, "width": 80})
        for row, (x, y, crowd) in enumerate(((5, 5, 0), (15, 10, 0), (50, 30, 1))):
            ring = [x, y, x + 20, y, x + 20, y + 20, x, y + 20]
            segmentation = {"size": [60, 80], "counts": [0, 60 * 2, 4800 - 120]} if crowd else [ring]
            annotations.append(
                {"id": 3 * number + row, "image_id": number, "category_id": 1, "iscrowd": crowd}
                | {"segmentation": segmentation, "bbox": [x, y, 20, 20], "area": 400}
            )
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    (folder / "annotations.json").write_text(json.dumps(content))
    return folder / "annotations.json"


def test_coco_objects_keep_what_overlaps_and_crowds_are_ignored(tmp_path: Path) -> None:
    made = packed_up(coco_file(tmp_path / "coco", count=6), output=tmp_path / "pack")
    assert len(made) == 6
    assert made.tensors["areas"].tolist() == [400] * 12
    _, ids = next(pictures_of(made, [0]))
    assert (ids[:, :2] == IGNORED).all()
    assert 0 < made.tensors["validation"].sum() < 6


def test_a_drawn_val_list_does_not_change_when_data_are_added() -> None:
    keys = [f"picture {number}" for number in range(400)]
    few, many = (drawn_for_validation(some, share=0.1) for some in (keys[:200], keys))
    assert few == {key for key in many if key in keys[:200]}
    assert 20 < len(many) < 60
    assert len(drawn_for_validation(keys[:2], share=1e-9)) == 1


def test_voc_roots_bring_their_lists(tmp_path: Path) -> None:
    root = tmp_path / "VOC"
    for name in ("JPEGImages", "SegmentationObject", "SegmentationClass", "ImageSets/Segmentation"):
        (root / name).mkdir(parents=True)
    for number in range(3):
        ids = np.zeros((50, 60), np.uint8)
        ids[5:25, 5:30] = 1
        ids[25:45, 30:55] = 2
        ids[:3] = 255
        Image.fromarray(np.full((50, 60, 3), 40 * number, np.uint8)).save(root / "JPEGImages" / f"{number}.jpg")
        for name in ("SegmentationObject", "SegmentationClass"):
            picture = Image.fromarray(ids)
            picture.putpalette([value for grey in range(256) for value in (grey, grey, grey)])
            picture.save(root / name / f"{number}.png")
    (root / "ImageSets/Segmentation/train.txt").write_text("0\n2\n")
    (root / "ImageSets/Segmentation/val.txt").write_text("1\n")
    made = packed_up(root, output=tmp_path / "pack")
    assert [(source.train, source.validation) for source in made.sources] == [(2, 1)]
    assert made.tensors["areas"].tolist() == [500, 500] * 3


def hqseg_folder(root: Path) -> Path:
    for kind in ("im", "gt"):
        (root / "DIS5K/DIS-TR" / kind).mkdir(parents=True)
    grey = np.zeros((40, 50), np.uint8)
    grey[:20, :20] = 255
    Image.fromarray(grey).save(root / "DIS5K/DIS-TR/gt/0.png")
    Image.fromarray(np.full((40, 50, 3), 90, np.uint8)).save(root / "DIS5K/DIS-TR/im/0.jpg")
    return root


def test_small_objects_of_any_source_are_left_out(tmp_path: Path) -> None:
    sizes = {
        paint_folder(tmp_path / "folder", classes=False): [1200, 1750],
        coco_file(tmp_path / "coco", count=2): [400, 400],
        hqseg_folder(tmp_path / "hqseg"): [400],
    }
    for source, expected in sizes.items():
        for floor in (400, 401, 1201):
            pictures = list_pictures(source, images=None, validation_share=0.5, max_pixels=10**5, min_object_px=floor)
            found = sorted(int(mask.sum()) for mask in pictures[0].read().objects)
            assert found == [size for size in expected if size >= floor]


# --- one folder, used again or not


def test_a_pack_is_made_once(folder: Path, tmp_path: Path) -> None:
    made: list[int] = []

    def get(data: Path) -> Pack:
        return packed(
            [data], tmp_path / "p", images=None, settings=PACKING, on_progress=lambda done, _: made.append(done)
        )

    first = get(folder)
    assert len(made) == 4
    assert get(folder).digest == first.digest
    assert len(made) == 4
    Image.fromarray(np.zeros((90, 120, 3), np.uint8)).save(folder / "images" / "0.jpg")
    assert get(folder).digest != first.digest
    assert len(made) == 8
    assert get(tmp_path / "p").digest == read_pack(tmp_path / "p").digest


def test_packs_and_other_data_do_not_mix(folder: Path, tmp_path: Path) -> None:
    packed_up(folder, output=tmp_path / "pack")
    with pytest.raises(UsageError, match="is a pack, which"):
        packed([folder, tmp_path / "pack"], tmp_path / "p", images=None, settings=PACKING, on_progress=silent)


# --- what is wrong is said


@pytest.mark.parametrize("missing", ["split.json", "masks/1.png", "images/2.jpg"])
def test_an_incomplete_folder_is_named(folder: Path, tmp_path: Path, missing: str) -> None:
    (folder / missing).unlink()
    with pytest.raises(DataError, match=str(folder)):
        packed_up(folder, output=tmp_path / "pack")


def test_nothing_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or folder"):
        packed_up(tmp_path / "nowhere", output=tmp_path / "pack")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [('{"train": ["0"], "val": []}', "no val image"), ('{"train": ["0"]}', "expected"), ("[", "expected")],
)
def test_a_bad_split_is_said(folder: Path, tmp_path: Path, content: str, sentence: str) -> None:
    (folder / "split.json").write_text(content)
    with pytest.raises(DataError, match=sentence):
        packed_up(folder, output=tmp_path / "pack")


@pytest.mark.parametrize("broken", ["images/1.jpg", "masks/1.png"])
def test_a_broken_picture_is_named(folder: Path, tmp_path: Path, broken: str) -> None:
    (folder / broken).write_bytes((folder / broken).read_bytes()[:40])
    with pytest.raises(DataError, match=broken):
        packed_up(folder, output=tmp_path / "pack")
    assert not is_pack(tmp_path / "pack")


def test_other_files_are_not_overwritten(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("...")
    with pytest.raises(StorageError, match="is not a pack"):
        packed_up(folder, output=tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.tex").exists()


@pytest.mark.parametrize("name", ["pack.json", "pictures.safetensors"])
def test_a_damaged_pack_is_said(folder: Path, tmp_path: Path, name: str) -> None:
    packed_up(folder, output=tmp_path / "pack")
    damaged = tmp_path / "pack" / name
    damaged.write_bytes(damaged.read_bytes()[:30])
    with pytest.raises(DataError, match="can't be read as a pack"):
        read_pack(tmp_path / "pack")
