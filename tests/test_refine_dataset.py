"""A data set from file to file: what is written, what is left for later, what is never overwritten."""

import csv
import json
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from fake_refiner import SIZE, Shift, samples_of
from PIL import Image
from pycocotools import mask as coco_masks

import refinetool
from refinetool.errors import Interrupted, StorageError, UsageError
from refinetool.masks import decode
from refinetool.running import identity, runners
from refinetool.running import run as running
from refinetool.running.journal import journal_path
from refinetool.running.run import Progress, Summary, refine_dataset
from refinetool.settings import ModelDefaults, RefineSettings


class Backend:
    fingerprint = "f1"
    defaults = ModelDefaults()


class ShiftWithSettings(Shift):
    """The fake refiner as `load_refiner` would return it."""

    def __init__(self, settings: RefineSettings) -> None:
        super().__init__()
        self.settings, self.backend = settings, Backend()


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Python's own handler of Ctrl-C, even where the tests were started in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[ShiftWithSettings]:
    """The refiners that were loaded, each a fake one."""
    refiners: list[ShiftWithSettings] = []

    def load_refiner(_: str, *, settings: RefineSettings, **__: object) -> ShiftWithSettings:
        refiners.append(ShiftWithSettings(settings))
        return refiners[-1]

    monkeypatch.setattr(runners, "load_refiner", load_refiner)
    monkeypatch.setattr(identity, "pick_device", lambda device: device)
    monkeypatch.setattr(identity, "pick_precision", lambda precision, _: precision)
    return refiners


def coco(folder: Path, *, count: int = 12) -> Path:
    """A COCO file of images with 0 to 3 masks each, and the images."""
    samples = samples_of(count, folder / "images")
    records = [
        {
            "id": region.id,
            "image_id": number,
            "category_id": 1,
            "segmentation": {"size": list(SIZE), "counts": region.mask.counts.decode()},
            "bbox": [0, 0, 1, 1],
            "area": 1,
            "iscrowd": 0,
        }
        for number, sample in enumerate(samples)
        for region in sample.regions
    ]
    images = [
        {"id": number, "file_name": sample.image.name, "height": SIZE[0], "width": SIZE[1]}
        for number, sample in enumerate(samples)
    ]
    path = folder / "coarse.json"
    path.write_text(json.dumps({"images": images, "annotations": records, "categories": [{"id": 1, "name": "thing"}]}))
    return path


def refine(coarse: Path, output: Path, **changes: object) -> Summary:
    arguments = {"images": coarse.parent / "images", "settings": RefineSettings(image_batch=4), "threads": 2}
    return refine_dataset(coarse, output=output, device="cpu", **(arguments | changes))


def masks_of(path: Path) -> dict[int, np.ndarray]:
    """The masks of a COCO file, as pycocotools reads them."""
    document = json.loads(path.read_text())
    return {record["id"]: coco_masks.decode(record["segmentation"]).astype(bool) for record in document["annotations"]}


@pytest.mark.usefixtures("loaded")
def test_a_coco_file_comes_back_refined(tmp_path: Path) -> None:
    coarse, output = coco(tmp_path), tmp_path / "refined.json"
    summary = refine(coarse, output)
    before, after = masks_of(coarse), masks_of(output)
    assert before.keys() == after.keys()
    assert all((np.roll(before[number], 1, axis=1) == after[number]).all() for number in before)
    assert (summary.output, summary.journal, summary.refined) == (output, None, 18)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["coarse.json", "images", "refined.json"]
    notes = json.loads(output.read_text())["info"]["refinetool"]
    assert (notes["model"], notes["fingerprint"], notes["device"]) == ("embedded", "f1", "cpu")
    assert notes["settings"]["guard"]["max_area_ratio"] == RefineSettings().guard.max_area_ratio
    assert "image_batch" not in notes["settings"], "it decides no mask"
    assert notes["versions"]["refinetool"] == refinetool.__version__


@pytest.mark.usefixtures("interruptible")
def test_an_interrupted_data_set_is_resumed_to_the_same_bytes(tmp_path: Path, loaded: list[ShiftWithSettings]) -> None:
    def interrupt(progress: Progress) -> None:
        if progress.done == 20:
            signal.raise_signal(signal.SIGINT)

    coarse, output, whole = coco(tmp_path, count=60), tmp_path / "refined.json", tmp_path / "whole.json"
    with pytest.raises(Interrupted, match="of 60 images"):
        refine(coarse, output, on_progress=interrupt)
    assert not output.exists()
    with pytest.raises(UsageError, match=r"--resume continues from them, --fresh starts over"):
        refine(coarse, output)
    summary = refine(coarse, output, resume=True, settings=RefineSettings(image_batch=1))
    assert summary.reused == len(loaded[0].asked) > 0
    assert not set(loaded[0].asked) & set(loaded[1].prepared)
    refine(coarse, whole)
    assert output.read_bytes() == whole.read_bytes()
    assert not journal_path(output).exists()


def test_other_settings_or_weights_redo_everything(
    tmp_path: Path, loaded: list[ShiftWithSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    coarse, output = coco(tmp_path), tmp_path / "refined.json"
    refine(coarse, output, limit=6)
    for changes in ({"settings": RefineSettings(passes=2)}, {"precision": "bf16"}, {"model": "other"}):
        assert (refine(coarse, output, limit=6, resume=True, **changes).redone) == 4
    monkeypatch.setattr(Backend, "fingerprint", "f2")
    assert refine(coarse, output, limit=6, resume=True).redone == 4
    monkeypatch.setattr(Backend, "fingerprint", "f1")
    assert refine(coarse, output, limit=6, resume=True).reused == 4, "the first run's lines are still there"
    assert refine(coarse, output, limit=6, fresh=True, overwrite=True).reused == 0
    assert len(loaded[-1].prepared) == 4


def test_a_limit_leaves_the_rest_for_later(tmp_path: Path, loaded: list[ShiftWithSettings]) -> None:
    coarse, output = coco(tmp_path), tmp_path / "refined.json"
    summary = refine(coarse, output, limit=4)
    before, after = masks_of(coarse), masks_of(output)
    changed = {number for number in before if (before[number] != after[number]).any()}
    assert changed == {10, 20, 21, 30, 31, 32}, "those of the first four images"
    assert (summary.images, summary.journal) == (4, journal_path(output))
    summary = refine(coarse, output, resume=True)
    assert (summary.images, summary.reused, summary.journal) == (12, 3, None)
    assert len(loaded[1].prepared) == 6
    refine(coarse, tmp_path / "whole.json")
    assert output.read_bytes() == (tmp_path / "whole.json").read_bytes()


def test_failed_images_are_left_for_later(tmp_path: Path, loaded: list[ShiftWithSettings]) -> None:
    coarse, output = coco(tmp_path), tmp_path / "refined.json"
    (tmp_path / "images/5.jpg").rename(tmp_path / "5.jpg")
    summary = refine(coarse, output)
    assert (summary.failed, summary.journal) == (1, journal_path(output))
    assert "5.jpg" in summary.errors[0]
    (tmp_path / "5.jpg").rename(tmp_path / "images/5.jpg")
    summary = refine(coarse, output, resume=True)
    assert (summary.failed, summary.redone, summary.journal) == (0, 1, None)
    assert len(loaded[1].prepared) == 1
    refine(coarse, tmp_path / "whole.json")
    assert output.read_bytes() == (tmp_path / "whole.json").read_bytes()


def test_a_dry_run_touches_nothing(tmp_path: Path, loaded: list[ShiftWithSettings]) -> None:
    coarse, output = coco(tmp_path), tmp_path / "refined.json"
    (tmp_path / "images/5.jpg").unlink()
    told: list[Progress] = []
    summary = refine(coarse, output, dry_run=True, on_progress=told.append)
    assert (summary.images, summary.masks, summary.kept) == (12, 18, {"dry-run": 17, "image-missing": 1})
    assert (summary.failed, summary.output, summary.refined) == (1, None, 0)
    assert [(progress.done, progress.total) for progress in told] == [(n + 1, 12) for n in range(12)]
    assert not loaded
    assert sorted(path.name for path in tmp_path.iterdir()) == ["coarse.json", "images"]


@pytest.mark.usefixtures("loaded")
def test_an_output_in_the_way(tmp_path: Path) -> None:
    coarse, output = coco(tmp_path), tmp_path / "refined.json"
    with pytest.raises(UsageError, match="would replace the input"):
        refine(coarse, coarse, overwrite=True)
    with pytest.raises(UsageError, match="there is no folder"):
        refine(coarse, tmp_path / "absent" / "refined.json")
    with pytest.raises(UsageError, match="would replace the image folder"):
        refine(coarse, tmp_path / "images", overwrite=True)
    (tmp_path / "folder").mkdir()
    with pytest.raises(UsageError, match="will be a file, but this is a folder"):
        refine(coarse, tmp_path / "folder", overwrite=True)
    output.write_text("precious")
    with pytest.raises(UsageError, match="exists already; --overwrite"):
        refine(coarse, output)
    with pytest.raises(UsageError, match="nothing is left to do; --overwrite"):
        refine(coarse, output, resume=True)
    with pytest.raises(UsageError, match="choose one"):
        refine(coarse, output, resume=True, fresh=True)
    assert output.read_text() == "precious"
    assert refine(coarse, output, overwrite=True).refined == 18


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize("moment", ["loading", "writing"])
def test_an_interrupt_beside_the_run_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    coarse, output = coco(tmp_path), tmp_path / "refined.json"
    with monkeypatch.context() as patched:
        patched.setattr(*{"loading": (runners, "load_refiner"), "writing": (running, "write")}[moment], interrupted)
        with pytest.raises(Interrupted, match=r"before .*refined\.json was written"):
            refine(coarse, output)
    assert not output.exists()
    assert refine(coarse, output, resume=True).reused == {"loading": 0, "writing": 9}[moment]


def test_a_full_disk_at_the_end_loses_nothing(
    tmp_path: Path, loaded: list[ShiftWithSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise StorageError("the disk is full")

    coarse, output = coco(tmp_path), tmp_path / "refined.json"
    with monkeypatch.context() as patched:
        patched.setattr(running, "write", full)
        with pytest.raises(StorageError):
            refine(coarse, output)
    assert refine(coarse, output, resume=True).reused == 9
    assert len(loaded) == 2
    assert not loaded[1].prepared


def pngs(folder: Path) -> Path:
    """A folder of 0/255 masks, one per image, and the images."""
    (folder / "masks").mkdir()
    samples = [sample for sample in samples_of(9, folder / "images") if sample.regions]
    for sample in samples:
        Image.new("RGB", SIZE[::-1]).save(sample.image)
        mask = decode(sample.regions[0].mask)
        Image.fromarray(mask.astype(np.uint8) * 255).save(folder / "masks" / f"{sample.image.stem}.png")
    return folder / "masks"


@pytest.mark.usefixtures("loaded")
def test_a_folder_is_replaced_only_if_it_can_be_nothing_but_an_output(tmp_path: Path) -> None:
    coarse, output = pngs(tmp_path), tmp_path / "refined"
    refine(coarse, output)
    first = {path.name: path.read_bytes() for path in output.iterdir()}
    assert len(first) == 6
    (output / "1.png").write_bytes(b"to be replaced")
    with pytest.raises(UsageError, match="exists already"):
        refine(coarse, output)
    assert refine(coarse, output, overwrite=True).output == output
    assert {path.name: path.read_bytes() for path in output.iterdir()} == first
    (output / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"holds notes.txt, which is not an output"):
        refine(coarse, output, overwrite=True)
    with pytest.raises(UsageError, match="would lie within the input"):
        refine(coarse, coarse / "refined")
    with pytest.raises(UsageError, match="would replace the folder with the"):
        refine(coarse, tmp_path, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "masks", "refined"]


@pytest.mark.usefixtures("loaded")
def test_the_record_has_a_line_for_every_mask(tmp_path: Path) -> None:
    coarse = coco(tmp_path)
    summary = refine_dataset(coarse, output=tmp_path / "out.json", record=tmp_path / "masks.csv")
    with (tmp_path / "masks.csv").open(newline="") as table:
        rows = list(csv.DictReader(table))
    annotations = json.loads(coarse.read_text())["annotations"]
    assert sorted(int(row["id"]) for row in rows) == sorted(record["id"] for record in annotations)
    assert sum(row["status"] == "refined" for row in rows) == summary.refined
    assert {row["status"] for row in rows if row["status"] != "refined"} == {f"kept:{why}" for why in summary.kept}


@pytest.mark.usefixtures("loaded")
@pytest.mark.parametrize(("include_crowd", "refined", "kept"), [(False, 0, {"crowd": 18}), (True, 18, {})])
def test_crowds_are_refined_where_the_settings_ask_for_it(
    tmp_path: Path, include_crowd: bool, refined: int, kept: dict[str, int]
) -> None:
    coarse = coco(tmp_path)
    coarse.write_text(coarse.read_text().replace('"iscrowd": 0', '"iscrowd": 1'))
    settings = RefineSettings(image_batch=4, include_crowd=include_crowd)
    summary = refine(coarse, tmp_path / "refined.json", settings=settings)
    assert (summary.refined, summary.kept) == (refined, kept)


@pytest.mark.usefixtures("loaded")
def test_ground_truth_needs_no_images_beside_it(tmp_path: Path) -> None:
    coarse = coco(tmp_path)
    (tmp_path / "truths" / "2026").mkdir(parents=True)
    truth = tmp_path / "truths" / "2026" / "truth.json"
    truth.write_text(coarse.read_text())
    settings = RefineSettings(image_batch=4, selection="oracle")
    summary = refine(coarse, tmp_path / "refined.json", images=None, truth=truth, settings=settings)
    assert (summary.refined, summary.kept) == (18, {})
