"""Masks stored as colours, TIFFs and BMPs, with a suffix, or alone: read, and written back in their own way."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import Command
from PIL import Image

from refinetool import masks
from refinetool.errors import DataError, MaskError
from refinetool.formats import Dataset, open_dataset
from refinetool.formats.rasters import ColourTable, read_label_map, read_values, voc_colours, with_values
from refinetool.records import Annotation, BoolArray, Outcome

SQUARE = np.zeros((8, 10), dtype=np.uint8)
SQUARE[2:5, 3:7] = 255
GROWN = np.zeros((8, 10), dtype=np.bool_)
GROWN[1:6, 2:8] = True
MAP = np.where(SQUARE == 255, 2, 0).astype(np.uint8)
MAP[6, 1:4] = 1
MAP[0] = 255

LABELS = """# label:color_rgb:parts:actions
background:0,0,0::
cat:10,20,30::
dog:250,250,250:head,tail:
void:1,1,1::
"""
COLOURS = {0: (0, 0, 0), 1: (10, 20, 30), 2: (250, 250, 250), 255: (1, 1, 1)}


def painted(values: np.ndarray, colours: dict[int, tuple[int, int, int]] | None = None) -> np.ndarray:
    table = {value: tuple(colour) for value, colour in enumerate(voc_colours().colours)} if colours is None else colours
    return np.array([[table[value] for value in row] for row in values.tolist()], dtype=np.uint8)


def save(path: Path, pixels: np.ndarray, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, **options)
    return path


def photo(path: Path) -> Path:
    return save(path, np.zeros((8, 10, 3), dtype=np.uint8))


def refine(dataset: Dataset, destination: Path, new: BoolArray = GROWN, region: int = -1) -> None:
    """Write a data set in which one region of each sample is refined."""
    outcomes = {}
    for sample in dataset.samples():
        made = [Annotation(found.mask, found.keep or "drift") for found in sample.regions]  # type: ignore[arg-type]
        made[region] = Annotation(masks.encode(new), None)
        outcomes[sample.key] = Outcome(sample.key, tuple(made))
    dataset.write(outcomes.get, destination, {})


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_the_colours_of_voc_are_those_of_its_palette() -> None:
    colours = voc_colours().colours
    known = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 3: (128, 128, 0), 4: (0, 0, 128), 15: (192, 128, 128)}
    assert {value: tuple(colours[value]) for value in known} == known
    assert tuple(colours[20]) == (0, 64, 128)
    assert tuple(colours[255]) == (224, 224, 192)
    assert len(np.unique(colours, axis=0)) == 256


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
def test_grey_in_several_samples_stays_so(mode: str, tmp_path: Path) -> None:
    old = Image.fromarray(SQUARE).convert(mode)
    if mode != "RGB":
        old.putalpha(200)
    photo(tmp_path / "images" / "a.jpg")
    (tmp_path / "masks").mkdir()
    old.save(tmp_path / "masks" / "a.png")
    dataset = open_dataset(tmp_path / "masks")
    assert dataset.format == "masks"
    (sample,) = dataset.samples()
    assert sample.regions[0].mask == masks.encode(SQUARE > 0)
    refine(dataset, tmp_path / "out")
    expected = Image.fromarray(GROWN.astype(np.uint8) * 255).convert(mode)
    if mode != "RGB":
        expected.putalpha(200)
    with Image.open(tmp_path / "out" / "a.png") as new:
        assert new.mode == mode
        assert (np.asarray(new) == np.asarray(expected)).all()


@pytest.mark.parametrize("place", [".", "SegmentationClass"])
def test_classes_in_the_colours_of_a_label_map(place: str, tmp_path: Path) -> None:
    root = tmp_path / "voc"
    save(root / "SegmentationClass" / "a.png", painted(MAP, COLOURS))
    photo(root / "JPEGImages" / "a.jpg")
    (root / "labelmap.txt").write_text(LABELS)
    dataset = open_dataset(root / place)
    assert dataset.format == "voc-class"
    (sample,) = dataset.samples()
    assert [(region.id, region.category) for region in sample.regions] == [(1, 1), (2, 2)]
    assert sample.void == masks.encode(MAP == 255)
    refine(dataset, tmp_path / "out")
    expected = np.where(GROWN, 2, np.where(MAP == 2, 0, MAP)).astype(np.uint8)
    expected[MAP == 255] = 255
    inner = "" if place == "SegmentationClass" else "SegmentationClass/"
    assert (pixels(tmp_path / "out" / f"{inner}a.png") == painted(expected, COLOURS)).all()


def test_objects_in_the_colours_of_voc(tmp_path: Path) -> None:
    save(tmp_path / "SegmentationObject" / "a.png", painted(MAP))
    photo(tmp_path / "JPEGImages" / "a.jpg")
    (tmp_path / "labelmap.txt").write_text(LABELS)  # colours of classes, not of objects
    dataset = open_dataset(tmp_path)
    assert dataset.format == "voc-object"
    (sample,) = dataset.samples()
    assert [region.id for region in sample.regions] == [1, 2]
    refine(dataset, tmp_path.parent / "out-objects", region=0)
    new = read_values(tmp_path.parent / "out-objects" / "SegmentationObject" / "a.png")
    assert (new == np.where(MAP == 255, 255, np.where(MAP == 2, 2, GROWN))).all()


def test_unknown_colours_are_not_guessed(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", painted(MAP, COLOURS | {1: (9, 9, 10)}))
    with pytest.raises(MaskError, match=r"a\.png: has colours that are not those of PASCAL VOC, and no labelmap.txt"):
        read_values(path)
    (tmp_path / "labelmap.txt").write_text(LABELS)
    with pytest.raises(MaskError, match=r"a\.png: has colours that are not in labelmap\.txt"):
        read_values(path, colours=read_label_map(tmp_path / "labelmap.txt"))


@pytest.mark.parametrize(
    ("text", "values"),
    [
        (LABELS, [0, 1, 2, 255]),
        ("a:1,2,3::\nb:4,5,6\n", [0, 1, 2]),
        ("\ufeffvoid:9,9,9::\n\n# c\na:1,2,3::\nb:224,224,192::\nc:7,7,7", [0, 255, 1, 255, 2]),
    ],
)
def test_label_maps(text: str, values: list[int], tmp_path: Path) -> None:
    (tmp_path / "labelmap.txt").write_text(text, encoding="utf-8")
    table = read_label_map(tmp_path / "labelmap.txt")
    assert table is not None
    assert table.values.tolist() == values


def test_a_label_map_without_colours_is_none(tmp_path: Path) -> None:
    (tmp_path / "labelmap.txt").write_text("# label:color_rgb:parts:actions\nbackground:::\nbox:::\n")
    assert read_label_map(tmp_path / "labelmap.txt") is None


@pytest.mark.parametrize("line", ["cat:x", "cat:1,2::", "cat:1,2,300::", "cat:a,b,c"])
def test_a_broken_label_map_gets_a_sentence(line: str, tmp_path: Path) -> None:
    (tmp_path / "labelmap.txt").write_text(f"background:0,0,0::\n{line}\n")
    with pytest.raises(DataError, match=r"labelmap\.txt, line 2: .* is no label"):
        read_label_map(tmp_path / "labelmap.txt")


def test_a_colour_table_finds_what_it_paints() -> None:
    values = np.random.default_rng(0).integers(0, 256, (20, 30)).astype(np.uint8)
    table = voc_colours()
    found = table.find(table.paint(values))
    assert found is not None
    assert (found == values).all()
    assert ColourTable(table.colours[:5], table.values[:5]).find(table.paint(values)) is None


# --- TIFF and BMP


@pytest.mark.parametrize("suffix", ["tif", "tiff", "bmp"])
@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB"])
def test_tiff_and_bmp_stay_what_they_are(suffix: str, mode: str, tmp_path: Path) -> None:
    old = Image.fromarray(SQUARE)
    if mode == "P":
        old = Image.fromarray(SQUARE // 255)
        old.putpalette([0, 0, 0, 255, 0, 0])
    elif mode != "L":
        old = old.convert(mode)
    (tmp_path / "masks").mkdir()
    path = tmp_path / "masks" / f"a.{suffix}"
    options = {} if suffix == "bmp" else {"compression": "group4" if mode == "1" else "tiff_lzw"}
    old.save(path, dpi=(300, 300), **options)
    photo(tmp_path / "images" / "a.jpg")
    dataset = open_dataset(tmp_path / "masks", format="masks")
    (sample,) = dataset.samples()
    assert sample.regions[0].mask == masks.encode(SQUARE > 0)
    refine(dataset, tmp_path / "out")
    with Image.open(path) as before, Image.open(tmp_path / "out" / f"a.{suffix}") as after:
        assert (after.mode, after.size, after.getpalette()) == (before.mode, before.size, before.getpalette())
        assert after.info.get("compression") == before.info.get("compression")
        assert after.info["dpi"] == pytest.approx(before.info["dpi"])
        assert (np.asarray(after.convert("RGB")) > 0).any(axis=2).tolist() == GROWN.tolist()


def test_a_tiff_keeps_its_place_on_earth(tmp_path: Path) -> None:
    tags = {33550: (0.5, 0.5, 0.0), 33922: (0.0, 0.0, 0.0, 400000.0, 5000000.0, 0.0)}
    path = save(tmp_path / "a.tif", SQUARE, tiffinfo=tags)
    (tmp_path / "b.tif").write_bytes(with_values(path, GROWN.astype(np.uint8)))
    with Image.open(tmp_path / "b.tif") as image:
        assert {tag: image.tag_v2[tag] for tag in tags} == tags


def test_tiffs_that_can_not_hold_masks_are_refused(tmp_path: Path) -> None:
    lossy = save(tmp_path / "a.tif", SQUARE, compression="jpeg")
    with pytest.raises(DataError, match=r"a\.tif: is compressed as a photograph"):
        read_values(lossy)
    several = save(tmp_path / "b.tif", SQUARE, save_all=True, append_images=[Image.fromarray(SQUARE)])
    with pytest.raises(DataError, match=r"b\.tif: holds 2 pictures"):
        read_values(several)
    deep = save(tmp_path / "c.tif", SQUARE.astype(np.float32))
    with pytest.raises(DataError, match=r"c\.tif: has pixels of the kind F"):
        read_values(deep)
    (tmp_path / "d.tif").write_bytes(several.read_bytes()[:60])
    with pytest.raises(MaskError, match=r"d\.tif: "):
        read_values(tmp_path / "d.tif")
    (tmp_path / "e.bmp").write_bytes(b"not a picture")
    with pytest.raises(MaskError, match=r"e\.bmp: can't be read"):
        read_values(tmp_path / "e.bmp")


# --- names, and single masks


def test_masks_beside_their_images_are_told_by_a_suffix(tmp_path: Path) -> None:
    folder = tmp_path / "carvana"
    for name in ("a", "sub/b"):
        save(folder / f"{name}_mask.png", SQUARE)
        photo(folder / f"{name}.png")
    dataset = open_dataset(folder, mask_suffix="_mask")
    assert [(sample.key, sample.image) for sample in dataset.samples()] == [
        ("a", folder / "a.png"),
        ("sub/b", folder / "sub" / "b.png"),
    ]
    refine(dataset, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").rglob("*.png")) == ["a_mask.png", "b_mask.png"]
    with pytest.raises(DataError, match="holds no PNGs whose names end in _label"):
        open_dataset(folder, mask_suffix="_label")


@pytest.mark.parametrize(
    "words",
    [
        ("refine", "IN", "-o", "OUT"),
        ("corrupt", "IN", "-o", "OUT"),
        ("eval", "IN", "IN"),
        ("adapt-iou", "IN", "-o", "OUT.safetensors"),
        ("ablate", "IN", "IN"),
    ],
)
def test_commands_take_the_suffix(command: Command, tmp_path: Path, words: tuple[str, ...]) -> None:
    save(tmp_path / "IN" / "a_mask.png", SQUARE)
    photo(tmp_path / "IN" / "a.png")
    arguments = [tmp_path / word if word.isupper() or "." in word else word for word in words]
    said = command(*arguments, "--mask-suffix", "_label")
    assert (said.code, "whose names end in _label" in said.err) == (1, True), said.err
    if words[0] in ("refine", "corrupt"):
        said = command(*arguments, "--mask-suffix", "_mask")
        assert said.code == 0, said.err
        assert [path.name for path in (tmp_path / "OUT").rglob("*.png")] == ["a_mask.png"]


def test_the_command_takes_a_mask_and_its_image(command: Command, folder: Path) -> None:
    coarse = np.zeros((60, 80), dtype=np.uint8)
    coarse[12:34, 10:42] = 255
    for suffix in ("png", "tif", "bmp"):
        mask = save(folder / f"coarse.{suffix}", coarse)
        said = command("refine", mask, "--images", folder / "images" / "1.png")
        assert said.code == 0, said.err
        assert "1 of 1 mask refined" in said.out
        refined = pixels(folder / f"coarse.refined.{suffix}")
        assert (refined > 0).sum() == 600
        assert refined.max() == 255
    said = command("refine", mask, "--images", folder / "images", "--overwrite")
    assert (said.code, "1.png" in said.err, "--images" in said.err) == (1, False, True)


def test_a_single_mask_finds_the_image_of_its_name(tmp_path: Path) -> None:
    save(tmp_path / "cat_mask.png", SQUARE)
    photo(tmp_path / "cat.jpg")
    (sample,) = open_dataset(tmp_path / "cat_mask.png", mask_suffix="_mask").samples()
    assert sample.image == tmp_path / "cat.jpg"
