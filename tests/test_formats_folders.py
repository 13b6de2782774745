"""Folders of masks: VOC, DAVIS and two-valued PNGs, read as samples and written back pixel by pixel as defined."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from refinetool import masks
from refinetool.errors import DataError, StorageError, UsageError
from refinetool.formats import Dataset, open_dataset
from refinetool.records import Annotation, BoolArray, Outcome, Sample
from refinetool.statuses import Reason

PALETTE = [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0] + [7] * 747 + [224, 224, 192]
MAP = np.array(
    [
        [0, 0, 255, 255, 0, 0],
        [0, 3, 3, 255, 12, 0],
        [0, 3, 3, 255, 12, 0],
        [0, 0, 255, 255, 0, 0],
    ],
    dtype=np.uint8,
)


def save_map(path: Path, values: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.frombytes("P", values.shape[::-1], values.astype(np.uint8).tobytes())
    image.putpalette(PALETTE)
    image.save(path)
    return path


def save_grey(path: Path, values: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, dtype=np.uint8)).save(path)
    return path


def save_photo(path: Path, shape: tuple[int, ...] = MAP.shape) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", shape[::-1]).save(path)
    return path


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).copy()


def outcome(sample: Sample, *new: BoolArray | None) -> Outcome:
    """New masks for the regions in order; None keeps what there is."""
    annotations = [
        Annotation(region.mask, Reason.DRIFT) if mask is None else Annotation(masks.encode(mask), None)
        for region, mask in zip(sample.regions, new, strict=True)
    ]
    return Outcome(sample.key, tuple(annotations))


def nothing(key: str) -> None:
    """No outcome for any key."""
    assert key


def snapshot(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- VOC


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    root = tmp_path / "VOC2012"
    for stem in ("2007_000032", "2007_000039"):
        save_photo(root / "JPEGImages" / f"{stem}.jpg")
        save_map(root / "SegmentationClass" / f"{stem}.png", MAP)
    return root


def test_a_voc_root_is_read_as_class_maps(voc: Path) -> None:
    dataset = open_dataset(voc)
    assert (dataset.format, len(dataset)) == ("voc-class", 2)
    sample = next(iter(dataset.samples()))
    assert (sample.key, sample.layout, sample.size) == ("2007_000032", "semantic", (4, 6))
    assert sample.image == voc / "JPEGImages" / "2007_000032.jpg"
    assert [(region.id, region.category, region.keep) for region in sample.regions] == [(3, 3, None), (12, 12, None)]
    for region in sample.regions:
        assert region.mask is not None
        assert np.array_equal(masks.decode(region.mask), region.id == MAP)
    assert sample.void is not None
    assert np.array_equal(masks.decode(sample.void), MAP == 255)


def test_object_maps_have_no_categories(voc: Path) -> None:
    (voc / "SegmentationClass").rename(voc / "SegmentationObject")
    for path in (voc, voc / "SegmentationObject"):
        dataset = open_dataset(path)
        sample = next(iter(dataset.samples()))
        assert (dataset.format, sample.layout, sample.regions[0].category) == ("voc-object", "indexed", None)


@pytest.mark.parametrize(
    ("format", "there"), [("voc-object", "SegmentationClass"), ("voc-class", "SegmentationObject")]
)
def test_a_missing_folder_of_a_voc_root_is_named(format: str, there: str, voc: Path) -> None:
    if there == "SegmentationObject":
        (voc / "SegmentationClass").rename(voc / there)
    other = {"voc-object": "voc-class", "voc-class": "voc-object"}[format]
    with pytest.raises(DataError, match=rf"VOC2012: has no folder \w+, only {there}; name the format {other}"):
        open_dataset(voc, format=format)


@pytest.mark.parametrize("inner", ["480p", "."])
@pytest.mark.parametrize("format", [None, "davis"])
def test_a_davis_root_is_read_as_clips(inner: str, format: str | None, tmp_path: Path) -> None:
    root = tmp_path / "DAVIS"
    for clip in ("bear", "dog"):
        save_photo(root / "JPEGImages" / inner / clip / "00000.jpg")
        save_map(root / "Annotations" / inner / clip / "00000.png", MAP)
    dataset = open_dataset(root, format=format)
    assert dataset.format == "davis"
    first, second = dataset.samples()
    assert (first.key, second.image) == ("bear/00000", root / "JPEGImages" / inner / "dog" / "00000.jpg")
    dataset.write(nothing, tmp_path / "out", {})
    assert (tmp_path / "out" / "Annotations" / inner / "bear" / "00000.png").is_file()
    if inner == "480p":
        save_map(root / "Annotations" / "1080p" / "bear" / "00000.png", MAP)
        with pytest.raises(UsageError, match=r"several resolutions \(1080p, 480p\); name one of the folders"):
            open_dataset(root, format=format)


def test_a_refined_map_is_painted_as_defined(voc: Path) -> None:
    dataset = open_dataset(voc)
    first, _ = dataset.samples()
    grown = np.zeros(MAP.shape, dtype=bool)
    grown[1:4, 0:5] = True  # over background, void and the kept region
    result = dataset.write({first.key: outcome(first, grown, None)}.get, voc.parent / "out", {"no": "place"})
    assert (result.changed, result.notes) == (1, ())
    painted = voc.parent / "out" / "SegmentationClass" / "2007_000032.png"
    assert pixels(painted).tolist() == [
        [0, 0, 255, 255, 0, 0],
        [3, 3, 3, 255, 12, 0],
        [3, 3, 3, 255, 12, 0],
        [3, 3, 255, 255, 3, 0],
    ]
    with Image.open(painted) as new, Image.open(voc / "SegmentationClass" / "2007_000032.png") as old:
        assert (new.mode, new.getpalette()) == ("P", old.getpalette())
    untouched = "SegmentationClass/2007_000039.png"
    assert snapshot(voc.parent / "out").keys() == {untouched, "SegmentationClass/2007_000032.png"}
    assert (voc.parent / "out" / untouched).read_bytes() == (voc / untouched).read_bytes()


def test_what_a_refined_region_leaves_becomes_background(voc: Path) -> None:
    dataset = open_dataset(voc / "SegmentationClass")
    first, _ = dataset.samples()
    shrunk = np.zeros(MAP.shape, dtype=bool)
    shrunk[1, 1] = True
    dataset.write({first.key: outcome(first, shrunk, None)}.get, voc.parent / "out", {})
    expected = np.where((MAP == 3) & ~shrunk, 0, MAP)
    assert np.array_equal(pixels(voc.parent / "out" / "2007_000032.png"), expected)


@given(st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_maps_come_back_with_void_and_kept_regions_as_they_were(
    tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("maps")
    choose = np.random.default_rng(seed)
    old = choose.choice(np.array([0, 1, 2, 9, 255], dtype=np.uint8), (7, 11))
    save_map(folder / "SegmentationClass" / "a.png", old)
    save_photo(folder / "SegmentationClass" / "a.jpg", old.shape)
    dataset = open_dataset(folder / "SegmentationClass")
    (sample,) = dataset.samples()
    wanted = choose.choice(np.array([0, *(region.id for region in sample.regions)]), old.shape)
    refined = [region.id for region in sample.regions if choose.random() < 0.6]
    new = [wanted == region.id if region.id in refined else None for region in sample.regions]
    dataset.write({"a": outcome(sample, *new)}.get, folder / "out", {})
    expected = old.copy()
    if refined:
        for y, x in np.ndindex(old.shape):
            if old[y, x] != 255 and (old[y, x] == 0 or old[y, x] in refined):
                expected[y, x] = wanted[y, x] if wanted[y, x] in refined else 0
    assert np.array_equal(pixels(folder / "out" / "a.png"), expected)


def test_nothing_refined_gives_the_same_bytes(voc: Path) -> None:
    dataset = open_dataset(voc)
    everything_kept = {sample.key: outcome(sample, None, None) for sample in dataset.samples()}
    for number, find in enumerate((nothing, everything_kept.get)):
        dataset.write(find, voc.parent / f"out{number}", {})
        assert snapshot(voc.parent / f"out{number}" / "SegmentationClass") == snapshot(voc / "SegmentationClass")


def test_a_broken_map_is_kept_and_the_others_are_read(voc: Path) -> None:
    broken = voc / "SegmentationClass" / "2007_000032.png"
    broken.write_bytes(broken.read_bytes()[:60])
    dataset = open_dataset(voc)
    first, second = dataset.samples()
    assert [(region.mask, region.keep) for region in first.regions] == [(None, "unreadable-mask")]
    assert [fault.partition(": ")[0] for fault in first.faults] == [str(broken)]
    assert first.size == (4, 6), "taken from the image"
    assert len(second.regions) == 2
    dataset.write({first.key: outcome(first, None)}.get, voc.parent / "out", {})
    assert (voc.parent / "out" / "SegmentationClass" / broken.name).read_bytes() == broken.read_bytes()


def test_a_map_that_changed_meanwhile_is_refused(voc: Path) -> None:
    dataset = open_dataset(voc)
    first, _ = dataset.samples()
    save_map(voc / "SegmentationClass" / "2007_000032.png", np.zeros_like(MAP))
    find = {first.key: outcome(first, MAP == 3, None)}.get
    with pytest.raises(DataError, match="has changed since it was read"):
        dataset.write(find, voc.parent / "out", {})
    assert not list(voc.parent.glob("*out*")), "nothing is left behind"


# --- DAVIS


def test_frames_in_sub_folders_are_index_maps(tmp_path: Path) -> None:
    masks_folder, frames = tmp_path / "Annotations" / "480p", tmp_path / "JPEGImages" / "480p"
    for name in ("bear/00000", "bear/00001", "cows/00000"):
        save_map(masks_folder / f"{name}.png", MAP)
        save_photo(frames / f"{name}.jpg")
    (frames / "cows" / "00000.jpg").unlink()
    dataset = open_dataset(masks_folder)
    samples = list(dataset.samples())
    assert dataset.format == "davis"
    assert [sample.key for sample in samples] == ["bear/00000", "bear/00001", "cows/00000"]
    assert [sample.image for sample in samples] == [frames / f"{sample.key}.jpg" for sample in samples]
    assert {sample.layout for sample in samples} == {"indexed"}
    new = np.zeros(MAP.shape, dtype=bool)
    new[0, 0] = True
    dataset.write({"cows/00000": outcome(samples[2], new, None)}.get, tmp_path / "out", {})
    assert pixels(tmp_path / "out" / "cows" / "00000.png")[0, 0] == 3
    assert snapshot(tmp_path / "out").keys() == snapshot(masks_folder).keys()


# --- two-valued masks


SQUARE = np.zeros((8, 10), dtype=np.uint8)
SQUARE[2:5, 3:7] = 255


def test_masks_are_matched_to_images_by_name(tmp_path: Path) -> None:
    save_grey(tmp_path / "gt" / "a.png", SQUARE)
    save_grey(tmp_path / "gt" / "deep" / "b.png", SQUARE)
    save_photo(tmp_path / "im" / "a.JPG", SQUARE.shape)
    save_photo(tmp_path / "im" / "deep" / "b.webp", SQUARE.shape)
    dataset = open_dataset(tmp_path / "gt")
    assert (dataset.format, len(dataset)) == ("masks", 2)
    assert [(sample.key, sample.image.name, sample.layout) for sample in dataset.samples()] == [
        ("a", "a.JPG", "instances"),
        ("deep/b", "b.webp", "instances"),
    ]
    sample = next(iter(dataset.samples()))
    assert sample.regions[0].mask == masks.encode(SQUARE > 0)


def test_of_two_images_of_a_name_the_photograph_is_taken(tmp_path: Path) -> None:
    save_grey(tmp_path / "gt" / "a.png", SQUARE)
    for suffix in (".bmp", ".jpeg", ".png"):
        save_photo(tmp_path / "im" / f"a{suffix}", SQUARE.shape)
    (sample,) = open_dataset(tmp_path / "gt").samples()
    assert sample.image.name == "a.jpeg"


def test_a_folder_per_image_holds_one_object_per_file(tmp_path: Path) -> None:
    save_photo(tmp_path / "images" / "cells.png", SQUARE.shape)
    for number in range(3):
        save_grey(tmp_path / "masks" / "cells" / f"{number}.png", np.roll(SQUARE, number))
    dataset = open_dataset(tmp_path / "masks")
    (sample,) = dataset.samples()
    assert (sample.key, [region.id for region in sample.regions]) == ("cells", [0, 1, 2])
    new = SQUARE == 0
    result = dataset.write({"cells": outcome(sample, None, new, None)}.get, tmp_path / "out", {})
    assert result.changed == 1
    before, after = snapshot(tmp_path / "masks"), snapshot(tmp_path / "out")
    assert before.pop("cells/1.png") != after.pop("cells/1.png")
    assert before == after
    assert np.array_equal(pixels(tmp_path / "out" / "cells" / "1.png"), new * 255)


@pytest.mark.parametrize("high", [1, 255, 38])
def test_the_value_of_the_object_stays(high: int, tmp_path: Path) -> None:
    save_photo(tmp_path / "images" / "a.jpg", SQUARE.shape)
    save_grey(tmp_path / "masks" / "a.png", SQUARE // 255 * high)
    dataset = open_dataset(tmp_path / "masks", format="masks")
    (sample,) = dataset.samples()
    assert sample.regions[0].mask == masks.encode(SQUARE > 0)
    dataset.write({"a": outcome(sample, SQUARE == 0)}.get, tmp_path / "out", {})
    assert np.array_equal(pixels(tmp_path / "out" / "a.png"), (SQUARE == 0) * high)


def test_soft_edges_are_cut_in_the_middle_and_told(tmp_path: Path) -> None:
    soft = np.tile(np.array([0, 0, 0, 0, 64, 128, 129, 200, 255, 255, 255, 255, 255], dtype=np.uint8), (4, 1))
    save_photo(tmp_path / "images" / "a.jpg", soft.shape)
    save_grey(tmp_path / "masks" / "a.png", soft)
    dataset = open_dataset(tmp_path / "masks", format="masks")
    (sample,) = dataset.samples()
    assert sample.regions[0].mask == masks.encode(soft > 128)
    result = dataset.write({"a": outcome(sample, soft > 128)}.get, tmp_path / "out", {})
    assert result.notes == ("Masks with soft edges, taken at more than 128 and written as 0 and 255: 1.",)
    assert np.array_equal(pixels(tmp_path / "out" / "a.png"), (soft > 128) * 255)


def test_masks_that_can_not_be_used_are_kept_with_the_reason(tmp_path: Path) -> None:
    save_photo(tmp_path / "images" / "cells.png", SQUARE.shape)
    folder = tmp_path / "masks" / "cells"
    save_grey(folder / "0.png", SQUARE)
    save_grey(folder / "1.png", SQUARE * 0)
    save_grey(folder / "2.png", SQUARE[:5])
    save_grey(folder / "3.png", np.arange(80).reshape(8, 10))
    save_map(folder / "4.png", np.arange(80).reshape(8, 10) % 3)
    (folder / "5.png").write_bytes(b"")
    (sample,) = open_dataset(tmp_path / "masks", format="masks").samples()
    reasons = [None, "empty", "size-mismatch", "unreadable-mask", "unreadable-mask", "unreadable-mask"]
    assert [region.keep for region in sample.regions] == reasons
    mismatch, soft, several, broken = sample.faults
    assert (
        mismatch == f"{folder / '2.png'}: measures 10 x 5 pixels (width x height), the first mask of its image 10 x 8."
    )
    assert soft.startswith(f"{folder / '3.png'}: holds the values 0, 1, 2, 3, 4, 5, 6, 7 ...; expected two. If")
    assert several.startswith(f"{folder / '4.png'}: holds the values 0, 1, 2 ...; expected two.")
    assert broken.startswith(f"{folder / '5.png'}: ")


# --- masks of several kinds in one folder


def test_masks_of_all_lossless_kinds_are_read(tmp_path: Path) -> None:
    for name in ("a.png", "b.tif", "c.BMP", "deep/d.tiff"):
        save_grey(tmp_path / "masks" / name, SQUARE)
        save_photo(tmp_path / "images" / f"{name.partition('.')[0]}.jpg", SQUARE.shape)
    dataset = open_dataset(tmp_path / "masks")
    assert [sample.key for sample in dataset.samples()] == ["a", "b", "c", "deep/d"]
    dataset.write(nothing, tmp_path / "out", {})
    assert dataset.remarks() == ()
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "masks")


@pytest.mark.parametrize("format", ["masks", "voc-object"])
def test_two_masks_of_one_name_are_refused(format: str, tmp_path: Path) -> None:
    for name in ("a.bmp", "a.tif"):
        save_grey(tmp_path / "masks" / name, SQUARE)
    save_photo(tmp_path / "images" / "a.jpg", SQUARE.shape)
    with pytest.raises(DataError, match=r"a\.tif: is a second mask of the image of a\.bmp; keep one"):
        open_dataset(tmp_path / "masks", format=format)


@pytest.mark.parametrize("suffix", ["tif", "bmp"])
def test_a_tiff_of_the_name_of_a_png_is_its_image(suffix: str, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    save_grey(folder / "a.png", SQUARE)
    for name in ("a", "alone"):
        save_photo(folder / f"{name}.{suffix}", SQUARE.shape)
    dataset = open_dataset(folder, format="masks")
    assert [(sample.key, sample.image) for sample in dataset.samples()] == [("a", folder / f"a.{suffix}")]
    assert dataset.remarks() == ()


@pytest.mark.parametrize("suffix", ["tif", "bmp"])
def test_a_tiff_of_the_name_of_a_folder_of_pngs_is_their_image(suffix: str, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    save_grey(folder / "a" / "1.png", SQUARE)
    for name in ("a", "alone"):
        save_photo(folder / f"{name}.{suffix}", SQUARE.shape)
    dataset = open_dataset(folder, format="masks")
    assert [(sample.key, sample.image) for sample in dataset.samples()] == [("a", folder / f"a.{suffix}")]
    assert dataset.remarks() == ()


def test_images_in_a_folder_within_that_of_the_masks_are_no_masks(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    save_grey(folder / "a.png", SQUARE)
    save_photo(folder / "images" / "a.tif", SQUARE.shape)
    save_photo(folder / "images" / "b.jpg", SQUARE.shape)
    dataset = open_dataset(folder, images=folder / "images", format="masks")
    assert [sample.image for sample in dataset.samples()] == [folder / "images" / "a.tif"]
    assert dataset.remarks() == ()


LOSSLESS = "masks have to be PNGs, TIFFs or BMPs, each with a name of its own."


@pytest.mark.parametrize(
    ("names", "note"),
    [
        (("p1.jpg",), f"1 file was not read as a mask: p1.jpg; {LOSSLESS}"),
        (("a.tif",), f"1 file was not read as a mask: a.tif; {LOSSLESS}"),
        (("x/p2.JPEG", "p3.webp"), f"2 files were not read as masks, the first p3.webp; {LOSSLESS}"),
    ],
)
@pytest.mark.parametrize("format", ["masks", "voc-object"])
def test_files_among_masks_that_are_not_read_are_told(
    names: tuple[str, ...], note: str, format: str, tmp_path: Path
) -> None:
    save_grey(tmp_path / "masks" / "a.png", SQUARE)
    save_photo(tmp_path / "images" / "a.jpg", SQUARE.shape)
    for name in names:
        save_photo(tmp_path / "masks" / name, SQUARE.shape)
    dataset = open_dataset(tmp_path / "masks", format=format)
    assert dataset.remarks() == (note,)


def test_the_other_maps_of_a_voc_root_are_not_told(voc: Path) -> None:
    (voc / "SegmentationObject").mkdir()
    save_grey(voc / "SegmentationObject" / "a.png", SQUARE)
    dataset = open_dataset(voc, format="voc-class")
    assert dataset.remarks() == ()


def test_photographs_beside_their_masks_are_not_told(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    for name in ("a", "b"):
        save_photo(folder / f"{name}.jpg", SQUARE.shape)
    save_grey(folder / "a_mask.png", SQUARE)
    save_photo(folder / "b_mask.jpg", SQUARE.shape)
    dataset = open_dataset(folder, mask_suffix="_mask")
    assert dataset.remarks() == (f"1 file was not read as a mask: b_mask.jpg; {LOSSLESS}",)
    save_grey(folder / "a.png", SQUARE)
    (folder / "a_mask.png").unlink()
    assert open_dataset(folder).remarks() == ()


# --- telling formats apart, and what is refused


def maps(folder: Path, save: Callable[[Path, np.ndarray], Path], values: np.ndarray, name: str = "a") -> Path:
    save(folder / f"{name}.png", values)
    save_photo(folder / f"{name}.jpg", values.shape)
    return folder


EDGE = np.clip(np.arange(400) * 3 - 300, 0, 255).reshape(1, 400).repeat(3, axis=0)


@pytest.mark.parametrize(
    ("folder", "save", "values", "name", "format"),
    [
        ("SegmentationClass", save_map, MAP, "a", "voc-class"),
        ("SegmentationClassAug", save_grey, MAP, "a", "voc-class"),
        ("SegmentationObject", save_map, MAP, "a", "voc-object"),
        ("x", save_map, MAP, "seq/00000", "davis"),
        ("x", save_map, MAP.clip(0, 1), "seq/00000", "davis"),
        ("x", save_grey, SQUARE, "a", "masks"),
        ("x", save_map, SQUARE, "a", "masks"),
        ("x", save_grey, SQUARE // 255, "seq/a", "masks"),
        ("x", save_grey, EDGE, "a", "masks"),
        ("x", save_grey, SQUARE * 0, "a", "masks"),
    ],
)
def test_formats_are_told_from_names_and_values(
    *, folder: str, save: Callable[[Path, np.ndarray], Path], values: np.ndarray, name: str, format: str, tmp_path: Path
) -> None:
    assert open_dataset(maps(tmp_path / folder, save, values, name)).format == format


TWO_OBJECTS = np.where(np.arange(10) == 4, np.minimum(SQUARE, 7), SQUARE)
TWENTY_CLASSES = np.arange(20).reshape(4, 5)


@pytest.mark.parametrize(
    ("save", "values"),
    [
        (save_map, MAP),
        (save_grey, MAP),
        (save_map, MAP.clip(0, 1)),
        (save_grey, TWO_OBJECTS),  # mostly black and white, but no soft edge has two values
        (save_grey, TWENTY_CLASSES),
    ],
)
def test_where_classes_and_objects_look_alike_the_user_is_asked(
    save: Callable[[Path, np.ndarray], Path], values: np.ndarray, tmp_path: Path
) -> None:
    folder = maps(tmp_path / "x", save, values)
    with pytest.raises(UsageError, match="may number classes or objects; name the format voc-class, voc-object, davis"):
        open_dataset(folder)
    for format in ("voc-class", "voc-object", "davis"):
        assert open_dataset(folder, format=format).format == format


def test_a_voc_root_with_both_kinds_is_asked_about(voc: Path) -> None:
    maps(voc / "SegmentationObject", save_map, MAP)
    with pytest.raises(UsageError, match="has classes and objects; name the format"):
        open_dataset(voc)
    assert open_dataset(voc, format="voc-object", images=voc / "SegmentationObject").format == "voc-object"


def test_a_format_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no format 'xml'; choose one of coco, "):
        open_dataset(tmp_path, format="xml")


def test_folders_without_masks_or_images_get_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    with pytest.raises(DataError, match="bare: holds no PNGs"):
        open_dataset(tmp_path / "bare")
    save_grey(tmp_path / "alone" / "a.png", SQUARE)
    with pytest.raises(DataError, match=r"none of its 1 masks has an image of the same name in .*--images"):
        open_dataset(tmp_path / "alone")
    with pytest.raises(DataError, match=r"nowhere: no such folder"):
        open_dataset(tmp_path / "alone", images=tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"can't be read \(No such file"):
        open_dataset(tmp_path / "nowhere")


def test_sixteen_bits_are_refused_at_once(tmp_path: Path) -> None:
    save_grey(tmp_path / "x" / "a.png", SQUARE)
    Image.fromarray(SQUARE.astype(np.uint16) * 100).save(tmp_path / "x" / "b.png")
    for name in ("a.jpg", "b.jpg"):
        save_photo(tmp_path / "x" / name, SQUARE.shape)
    for format in (None, "masks", "davis"):
        with pytest.raises(DataError, match=r"b\.png: has 16 bits per pixel"):
            open_dataset(tmp_path / "x", format=format)


# --- storage


def test_outputs_that_would_touch_something_are_refused(voc: Path) -> None:
    dataset: Dataset = open_dataset(voc)
    with pytest.raises(UsageError, match="would replace the input"):
        dataset.write(nothing, voc, {})
    with pytest.raises(UsageError, match="would lie within the input"):
        dataset.write(nothing, voc / "SegmentationClass" / "refined", {})
    (voc.parent / "full").mkdir()
    (voc.parent / "full" / "keepsake.txt").write_text("mine")
    with pytest.raises(StorageError, match="full: exists already"):
        dataset.write(nothing, voc.parent / "full", {})
    (voc.parent / "empty").mkdir()
    dataset.write(nothing, voc.parent / "empty", {})
    assert len(snapshot(voc.parent / "empty")) == 2
