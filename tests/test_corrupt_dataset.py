"""`refinetool corrupt`: the same file back with worse masks, whatever the order, the threads and the format."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import Command
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from shapes import SIZE, disc, photograph

from refinetool import masks
from refinetool.corrupt import Corrupted, CorruptionInfo
from refinetool.corrupt.dataset import corrupt_dataset, corrupt_sample, share_out
from refinetool.corrupt.suites import BANDS, KINDS, SUITES, Suite, single
from refinetool.errors import Interrupted, UsageError
from refinetool.formats import open_dataset
from refinetool.masks import iou
from refinetool.records import BoolArray, Region, Sample
from refinetool.settings import CorruptSettings, TrainSettings

OBJECTS = (disc(14, 14, 9), disc(46, 30, 12), disc(30, 40, 6))
SETTINGS = CorruptSettings(tries=12, superpixel_counts=(30, 80))


def rle(mask: BoolArray) -> dict[str, Any]:
    found = masks.encode(mask)
    return {"size": list(found.size), "counts": found.counts.decode()}


@pytest.fixture
def truth(tmp_path: Path) -> Path:
    """Three images with three objects each, one of them a polygon, and in the first a crowd and a broken mask."""
    (tmp_path / "images").mkdir()
    images, annotations = [], []
    for number in (1, 2, 3):
        Image.fromarray(np.roll(photograph(), 7 * number, axis=1)).save(tmp_path / "images" / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": SIZE[1], "height": SIZE[0]})
        for n, mask in enumerate(OBJECTS):
            moved = np.roll(mask, number, axis=0)
            shape: Any = rle(moved) if n else [ring.ravel().tolist() for ring in masks.outline(moved)]
            annotations.append(
                {
                    "id": 10 * number + n,
                    "image_id": number,
                    "category_id": 1 + n % 2,
                    "segmentation": shape,
                    "iscrowd": 0,
                }
            )
    annotations.append(
        {"id": 90, "image_id": 1, "category_id": 1, "segmentation": rle(OBJECTS[0]), "iscrowd": 1, "score": 0.5}
    )
    broken = {"size": list(SIZE), "counts": "broken"}
    annotations.append({"id": 91, "image_id": 1, "category_id": 1, "segmentation": broken, "iscrowd": 0})
    path = tmp_path / "truth.json"
    path.write_text(json.dumps({"info": {"year": 2026}, "images": images, "annotations": annotations}))
    return path


def class_maps(folder: Path) -> Path:
    """Two class maps that hold two classes side by side and a ring of void, with their images."""
    for number in (1, 2):
        values = np.zeros(SIZE, np.uint8)
        values[np.roll(OBJECTS[1], -20, axis=1)] = 7
        values[disc(44, 30, 12)] = 3
        values[disc(14, 14, 8)] = 7
        values[disc(14, 14, 10) & (values == 0)] = 255
        values[0, :5] = 255
        (folder / "JPEGImages").mkdir(parents=True, exist_ok=True)
        (folder / "SegmentationClass").mkdir(parents=True, exist_ok=True)
        palette = Image.fromarray(values, mode="P")
        palette.putpalette([n for n in range(256) for _ in range(3)])
        palette.save(folder / "SegmentationClass" / f"{number}.png")
        Image.fromarray(np.roll(photograph(), number, axis=0)).save(folder / "JPEGImages" / f"{number}.jpg")
    return folder


def read_map(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.array(image)


def by_id(path: Path) -> dict[int, BoolArray]:
    dataset = open_dataset(path, need_images=False, include_crowd=True)
    return {
        region.id: masks.decode(region.mask)
        for sample in dataset.samples()
        for region in sample.regions
        if region.mask is not None
    }


# --- files


@pytest.mark.parametrize("suite", SUITES)
def test_every_suite_says_what_it_did(truth: Path, tmp_path: Path, suite: str) -> None:
    summary = corrupt_dataset(
        truth,
        output=tmp_path / "coarse.json",
        suite=SUITES[suite],  # type: ignore[index]
        settings=SETTINGS,
        record=tmp_path / "record.json",
    )
    good, coarse = by_id(truth), by_id(tmp_path / "coarse.json")
    record = {each["id"]: each for each in json.loads((tmp_path / "record.json").read_text())}
    assert set(record) == set(good) - {90}
    for number, each in record.items():
        assert each["iou"] == iou(good[number], coarse[number])
        assert each["reached"] == (each["low"] <= each["iou"] <= each["high"] and each["defects"] != "")
        assert each["generator"] in {part.generator for part in SUITES[suite].parts}  # type: ignore[index]
        assert each["coarse_area"] == coarse[number].sum() > 0
    assert summary.corrupted == 9
    assert summary.masks == 11
    assert summary.kept == {"crowd": 1, "unreadable-mask": 1}
    assert summary.reached == sum(each["reached"] for each in record.values())
    assert summary.bands[-1].mean_iou == pytest.approx(np.mean([each["iou"] for each in record.values()]))


def test_only_masks_change(truth: Path, tmp_path: Path) -> None:
    corrupt_dataset(truth, output=tmp_path / "coarse.json", suite=single("boundary"), settings=SETTINGS)
    before, after = (json.loads(path.read_text()) for path in (truth, tmp_path / "coarse.json"))
    assert before["images"] == after["images"]
    assert after["info"]["year"] == 2026
    assert after["info"]["refinetool"]["command"] == "corrupt"
    assert after["info"]["refinetool"]["suite"]["name"] == "boundary"
    for old, new in zip(before["annotations"], after["annotations"], strict=True):
        if old["id"] >= 90:
            assert old == new
        else:
            assert {**old, "segmentation": None} == {**new, "segmentation": None}
            assert old["segmentation"] != new["segmentation"]


def test_two_runs_give_the_same_bytes_whatever_the_threads(truth: Path, tmp_path: Path) -> None:
    for name, workers in (("one", 1), ("again", 1), ("many", 4)):
        corrupt_dataset(truth, output=tmp_path / f"{name}.json", settings=SETTINGS, workers=workers)
    corrupt_dataset(truth, output=tmp_path / "other.json", settings=CorruptSettings(seed=1, tries=12))
    one, again, many, other = ((tmp_path / f"{name}.json").read_bytes() for name in ("one", "again", "many", "other"))
    assert one == again == many
    assert one != other


def test_a_mask_does_not_depend_on_what_else_is_in_the_file(truth: Path, tmp_path: Path) -> None:
    """Neither on the order of the annotations, nor on other images, nor on other objects of its image."""
    data = json.loads(truth.read_text())
    data["annotations"] = [each for each in data["annotations"] if each["id"] in (10, 21, 22, 31)][::-1]
    data["images"] = data["images"][::-1]
    (tmp_path / "some.json").write_text(json.dumps(data))
    for name in ("truth", "some"):
        corrupt_dataset(tmp_path / f"{name}.json", output=tmp_path / f"{name}.coarse.json", settings=SETTINGS)
    everything, some = by_id(tmp_path / "truth.coarse.json"), by_id(tmp_path / "some.coarse.json")
    assert set(some) == {10, 21, 22, 31}
    for number, mask in some.items():
        assert (mask == everything[number]).all()


@pytest.mark.parametrize("suite", SUITES)
def test_class_maps_stay_maps(tmp_path: Path, suite: str) -> None:
    root = class_maps(tmp_path / "voc")
    summary = corrupt_dataset(
        root,
        output=tmp_path / "coarse",
        format="voc-class",
        suite=SUITES[suite],  # type: ignore[index]
        settings=SETTINGS,
        record=tmp_path / "record.csv",
    )
    assert summary.corrupted == 4
    with (tmp_path / "record.csv").open() as file:
        rows = list(csv.DictReader(file))
    for number in (1, 2):
        good = read_map(root / "SegmentationClass" / f"{number}.png")
        coarse = read_map(tmp_path / "coarse" / "SegmentationClass" / f"{number}.png")
        assert ((coarse == 255) == (good == 255)).all()
        assert set(np.unique(coarse)) == {0, 3, 7, 255}
        assert (coarse != good).any()
        for row in rows:
            if row["image"].endswith(f"{number}.jpg"):
                value = int(row["id"])
                assert float(row["iou"]) == pytest.approx(iou(coarse == value, good == value), abs=1e-4)


def test_index_maps_and_folders_of_masks(tmp_path: Path) -> None:
    for format in ("davis", "masks"):
        for number, mask in enumerate(OBJECTS[:2]):
            values = mask * np.uint8(255 if format == "masks" else number + 1)
            path = tmp_path / format / "clip" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(values).save(path)
            image = tmp_path / "images" / "clip" / f"{number}.png"
            image.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(photograph()).save(image)
        output = tmp_path / f"{format}-coarse"
        summary = corrupt_dataset(
            tmp_path / format, output=output, format=format, images=tmp_path / "images", settings=SETTINGS
        )
        assert summary.corrupted == summary.reached == 2
        for number, mask in enumerate(OBJECTS[:2]):
            coarse = read_map(output / "clip" / f"{number}.png") > 0
            assert 0.75 <= iou(coarse, mask) <= 0.85


def test_coco_results_stay_results(tmp_path: Path, truth: Path) -> None:
    results = [{"image_id": 1, "category_id": 1, "score": 0.25, "segmentation": rle(OBJECTS[1])}]
    (tmp_path / "results.json").write_text(json.dumps(results))
    corrupt_dataset(tmp_path / "results.json", output=tmp_path / "out.json", sizes=truth, settings=SETTINGS)
    (found,) = json.loads((tmp_path / "out.json").read_text())
    assert {**found, "segmentation": None} == {**results[0], "segmentation": None}
    assert 0.75 <= iou(masks.decode(masks.Rle(SIZE, found["segmentation"]["counts"].encode())), OBJECTS[1]) <= 0.85


# --- what goes wrong


def test_without_images_suites_that_need_none_work(truth: Path, tmp_path: Path) -> None:
    for image in (tmp_path / "images").iterdir():
        image.unlink()
    summary = corrupt_dataset(truth, output=tmp_path / "coarse.json", suite=SUITES["weak"], settings=SETTINGS)
    assert summary.corrupted == 9
    assert summary.failed == 0


def test_a_missing_image_keeps_its_masks(truth: Path, tmp_path: Path) -> None:
    (tmp_path / "images" / "2.png").unlink()
    summary = corrupt_dataset(truth, output=tmp_path / "coarse.json", settings=SETTINGS)
    assert summary.kept == {"crowd": 1, "image-missing": 3, "unreadable-mask": 1}
    assert summary.failed == 1
    assert "2.png" in summary.errors[0]
    good, coarse = by_id(truth), by_id(tmp_path / "coarse.json")
    assert all((good[number] == coarse[number]).all() for number in (20, 21, 22))


def test_an_output_that_exists_is_not_replaced_unasked(truth: Path, tmp_path: Path) -> None:
    (tmp_path / "coarse.json").write_text("mine")
    with pytest.raises(UsageError, match="exists already"):
        corrupt_dataset(truth, output=tmp_path / "coarse.json", settings=SETTINGS)
    with pytest.raises(UsageError, match="would replace the input"):
        corrupt_dataset(truth, output=truth, settings=SETTINGS, overwrite=True)
    corrupt_dataset(truth, output=tmp_path / "coarse.json", settings=SETTINGS, overwrite=True)
    assert (tmp_path / "coarse.json").read_text() != "mine"


def test_an_interruption_leaves_nothing(truth: Path, tmp_path: Path) -> None:
    def stop(_: object) -> None:
        raise KeyboardInterrupt

    before = set(tmp_path.iterdir())
    with pytest.raises(Interrupted, match="run the command again"):
        corrupt_dataset(truth, output=tmp_path / "coarse.json", settings=SETTINGS, on_progress=stop)
    assert set(tmp_path.iterdir()) == before


def test_a_limit_leaves_the_rest_as_it_is(truth: Path, tmp_path: Path) -> None:
    told = []
    summary = corrupt_dataset(
        truth,
        output=tmp_path / "coarse.json",
        settings=SETTINGS,
        limit=2,
        on_progress=lambda now: told.append(now.done),
    )
    assert told == [1, 2]
    assert summary.corrupted == 6
    good, coarse = by_id(truth), by_id(tmp_path / "coarse.json")
    same = {number for number in good if (good[number] == coarse[number]).all()}
    assert same == {30, 31, 32, 90}


def test_specks_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    Image.fromarray(photograph()).save(tmp_path / "images" / "1.png")
    ring = [20.25, 20.0, 21.5, 20.0, 21.5, 21.5]
    data = {
        "images": [{"id": 1, "file_name": "1.png", "width": SIZE[1], "height": SIZE[0]}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "segmentation": [ring], "iscrowd": 0}],
    }
    (tmp_path / "truth.json").write_text(json.dumps(data))
    summary = corrupt_dataset(tmp_path / "truth.json", output=tmp_path / "coarse.json", settings=SETTINGS)
    assert (summary.corrupted, summary.kept) == (0, {"too-small": 1})
    (after,) = json.loads((tmp_path / "coarse.json").read_text())["annotations"]
    assert after["segmentation"] == [ring]


def test_specks_of_a_map_keep_their_pixels() -> None:
    speck = np.zeros(SIZE, np.bool_)
    speck[24, 30:34] = True
    around = disc(30, 24, 12) & ~speck
    regions = tuple(Region(n, None, masks.encode(mask)) for n, mask in ((1, speck), (2, around)))
    sample = Sample("a", Path("missing.png"), SIZE, regions, "indexed")
    for seed in range(5):
        result = corrupt_sample(sample, suite=single("cam-like"), settings=CorruptSettings(seed=seed))
        assert [annotation.status for annotation in result.outcome.annotations] == ["kept:too-small", "refined"]
        assert result.outcome.annotations[1].mask is not None
        coarse = masks.decode(result.outcome.annotations[1].mask)
        assert not (coarse & speck).any()
        assert result.examples[0].made.iou == iou(coarse, around)


def test_a_mask_that_stays_keeps_its_text(tmp_path: Path, truth: Path) -> None:
    """Where no attempt keeps ten pixels, the polygon is not rewritten, and its band counts as missed."""
    ring = [20, 20, 23, 20, 23, 24, 20, 24]
    data = json.loads(truth.read_text())
    data["annotations"] = [data["annotations"][0] | {"segmentation": [ring]}]
    truth.write_text(json.dumps(data))
    summary = corrupt_dataset(truth, output=tmp_path / "coarse.json", suite=single("partial"), settings=SETTINGS)
    assert (summary.corrupted, summary.reached) == (1, 0)
    (after,) = json.loads((tmp_path / "coarse.json").read_text())["annotations"]
    assert after["segmentation"] == [ring]


# --- sharing a map


def made(mask: BoolArray, evidence: NDArray[np.float32] | None = None) -> Corrupted:
    info = CorruptionInfo("partial", 0.0, 1.0, 1.0, 1, True, ("cut-off",), (), evidence)
    return Corrupted(mask, info)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(1, 4))
def test_shared_out_masks_do_not_overlap_and_cover_what_was_claimed(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    claims = [disc(rng.uniform(0, 64), rng.uniform(0, 48), rng.uniform(4, 20)) for _ in range(count)]
    # In a map, good masks do not overlap; coarse ones may.
    before = [np.any(claims[:n], axis=0) if n else np.zeros(SIZE, np.bool_) for n in range(count)]
    pairs = [(claim & ~taken, claim) for claim, taken in zip(claims, before, strict=True) if (claim & ~taken).any()]
    gts, claims = [gt for gt, _ in pairs], [claim for _, claim in pairs]
    shared = share_out(gts, [made(claim) for claim in claims])
    assert np.sum(shared, axis=0).max() == 1
    assert (np.any(shared, axis=0) == np.any(claims, axis=0)).all()
    assert all(mask.any() for mask in shared)


def test_the_strongest_evidence_wins() -> None:
    left, right = disc(20, 24, 14), disc(36, 24, 14)
    weak, strong = np.where(left, 0.6, 0.1).astype(np.float32), np.where(right, 0.9, 0.1).astype(np.float32)
    shared = share_out([left, right], [made(left, weak), made(right, strong)])
    assert (shared[1] == right).all()
    assert (shared[0] == (left & ~right)).all()


def test_a_region_that_would_vanish_keeps_its_good_mask() -> None:
    good, all_over = disc(20, 24, 3), disc(20, 24, 14)
    shared = share_out([good, all_over], [made(good), made(all_over, np.ones(SIZE, np.float32))])
    assert (shared[0] == good).all()
    assert (shared[1] == (all_over & ~good)).all()


def test_a_good_mask_that_is_put_back_makes_no_other_vanish() -> None:
    left, right = disc(16, 24, 8), disc(46, 24, 8)
    sure = np.ones(SIZE, np.float32)
    shared = share_out([left, right], [made(right, sure), made(right)])
    assert (shared[0] == left).all()
    assert (shared[1] == right).all()


def test_a_mask_that_sharing_took_out_of_its_band_is_drawn_again() -> None:
    values = {1: disc(24, 24, 12), 2: disc(48, 24, 12) & ~disc(24, 24, 12)}
    reached = []
    for seed in range(6):
        regions = tuple(Region(n, None, masks.encode(mask)) for n, mask in values.items())
        sample = Sample("a", Path("missing.png"), SIZE, regions, "indexed")
        suite = single("grow-shrink").with_band(0.6, 0.8)
        result = corrupt_sample(sample, suite=suite, settings=CorruptSettings(seed=seed))
        reached += [example.made.reached for example in result.examples]
    assert np.mean(reached) > 0.8


# --- suites


def test_suites_and_bands_are_those_of_the_table() -> None:
    assert BANDS["default"] == (0.75, 0.85)
    for suite in SUITES.values():
        assert sum(part.fraction for part in suite.parts) == pytest.approx(1)
        assert all(0 <= part.low < part.high <= 1 for part in suite.parts)
        assert all(part.generator in KINDS for part in suite.parts)
    assert not SUITES["weak"].needs_image
    assert SUITES["train-mix"].needs_image


def test_the_page_has_the_bands_of_the_code() -> None:
    page = (Path(__file__).parents[1] / "docs" / "how-to" / "corrupt.md").read_text()
    rows = [line.split("|")[1:] for line in page.splitlines() if line.startswith("| `")]
    for name, kind in KINDS.items():
        band = f"{kind.low:.2f} to {kind.high:.2f}"
        assert any(f"`{name}`" in first and band in last for first, _, last, _ in rows), f"{name}, {band}"
    (mix,) = [row for row in rows if "`embedded-mix`" in row[0]]
    train = TrainSettings()
    assert f"`blobs` {100 * train.blob_share:.0f} %" in mix[1]
    assert f"`mix` {train.coarse_low:.2f} to {train.coarse_high:.2f}" in mix[2]
    assert f"{100 * train.good_share / (1 - train.blob_share):.0f} % of it 0.90 to 1.00" in mix[2]


@pytest.mark.parametrize("generator", KINDS)
def test_every_generator_has_its_name_and_works_alone(truth: Path, tmp_path: Path, generator: str) -> None:
    suite = single(generator)  # type: ignore[arg-type]
    summary = corrupt_dataset(truth, output=tmp_path / "coarse.json", suite=suite, settings=SETTINGS)
    assert {band.generator for band in summary.bands} == {generator}
    assert summary.reached >= 6


def test_an_object_alone_is_not_merged(truth: Path, tmp_path: Path) -> None:
    data = json.loads(truth.read_text())
    data["annotations"] = [each for each in data["annotations"] if each["id"] % 10 == 1 and each["id"] < 90]
    truth.write_text(json.dumps(data))
    parts = single("merge-neighbour").parts + single("partial").parts
    summary = corrupt_dataset(truth, output=tmp_path / "coarse.json", suite=Suite("both", parts), settings=SETTINGS)
    assert [band.generator for band in summary.bands] == ["partial"]


# --- the command


def test_the_command(command: Command, truth: Path, tmp_path: Path) -> None:
    record, picture = tmp_path / "record.csv", tmp_path / "sheet.png"
    said = command("corrupt", truth, "--suite", "weak", "--record", record, "--picture", picture, "--seed", 3)
    assert said.code == 0, said.err
    assert "9 of 11 masks made coarse" in said.out
    assert "1 not changed: crowds" in said.out
    assert "3/3 images" in said.err
    assert (tmp_path / "truth.coarse.json").is_file()
    assert len(list(csv.DictReader(record.read_text().splitlines()))) == 9
    assert read_map(picture).shape[2] == 3


def test_the_command_as_json(command: Command, truth: Path, tmp_path: Path) -> None:
    arguments = ("--generator", "partial", "--band", "hard", "--output", tmp_path / "out.json", "--json", "-q")
    said = command("corrupt", truth, *arguments)
    summary = json.loads(said.out)
    (band,) = summary["bands"]
    assert (band["generator"], band["low"], band["high"]) == ("partial", *BANDS["hard"])
    assert summary["reached"] == 9
    assert 0.6 <= band["mean_iou"] <= 0.75


def test_a_band_in_numbers(command: Command, truth: Path, tmp_path: Path) -> None:
    arguments = ("--suite", "weak", "--iou-low", 0.5, "--iou-high", 0.55, "-o", tmp_path / "out.json", "--json", "-q")
    bands = json.loads(command("corrupt", truth, *arguments).out)["bands"]
    assert {(band["low"], band["high"]) for band in bands} == {(0.5, 0.55)}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--iou-low", 0.5), "--iou-low and --iou-high go together"),
        (("--iou-low", 0.9, "--iou-high", 0.5), "--iou-low 0.9 is above --iou-high 0.5"),
        (("--band", "hard", "--iou-low", 0.5), "both set the band"),
    ],
)
def test_bands_that_make_no_sense(command: Command, truth: Path, arguments: tuple[object, ...], sentence: str) -> None:
    said = command("corrupt", truth, *arguments)
    assert said.code == 2
    assert sentence in said.err


def test_images_that_failed_end_in_an_exit_code(command: Command, truth: Path, tmp_path: Path) -> None:
    (tmp_path / "images" / "2.png").write_bytes(b"no image")
    said = command("corrupt", truth, "--generator", "superpixel")
    assert said.code == 1
    assert "3 not changed: the image can't be read" in said.out
    assert "2.png" in said.err
