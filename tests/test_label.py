"""`refinetool label`: references of all kinds, targets, several classes, refinement, and what is refused."""

import json
import pickle
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import Command, Said
from fakes import BrightBackend
from PIL import Image
from pycocotools import mask as coco_mask
from test_backends import backend_of

from refinetool import labeller as labelling
from refinetool import masks
from refinetool.backends import Embedding
from refinetool.errors import DataError
from refinetool.formats import open_dataset
from refinetool.formats.class_maps import voc_palette, write_class_maps
from refinetool.formats.references import References, draw_strokes, read_references
from refinetool.label import find_targets, label_dataset
from refinetool.labeller import Labeller, empty_target, judge, share_out
from refinetool.records import Annotation, BoolArray, ImageArray, Region, Sample
from refinetool.refine import Refiner
from refinetool.running import runners
from refinetool.settings import MAX_PIXELS, NO_GUARD, LabelSettings, RefineSettings, SnapSettings, ViewSettings
from refinetool.statuses import Reason

HEIGHT, WIDTH = 40, 60
COLOURS = {1: (220, 30, 30), 2: (30, 30, 220)}


class ColourPrompter:
    """A reference encoder without a network: the token of a class is the mean colour under its annotations."""

    fingerprint = "colours"
    recipe = replace  # has a threshold, see below

    def __init__(self) -> None:
        self.recipe = type("Recipe", (), {"threshold": 0.5})()  # type: ignore[assignment]

    def look(self, image: ImageArray) -> ImageArray:
        return image

    def shot(self, image: ImageArray, annotation: BoolArray) -> Any:
        return image[annotation].mean(axis=0)

    def tokens(self, _: ImageArray, shots: Sequence[Any]) -> Any:
        return np.array(shots)[None]

    @staticmethod
    def joined(tokens: Sequence[Any]) -> Any:
        return np.concatenate(tokens)


class ColourPrediction:
    def __init__(self, logits: Any) -> None:
        self._logits = logits
        self.scores = np.full((len(logits), 1), 0.8, np.float32)

    def logits(self, _: Any) -> Any:
        return self._logits


class ColourEmbedding:
    def __init__(self, image: ImageArray) -> None:
        self.image = image
        self.size = image.shape[:2]


class ColourBackend(BrightBackend):
    """Finds the pixels whose colour is near that of a token; a class with several shots, near any of them."""

    def embed(self, images: Sequence[ImageArray]) -> list[Embedding]:
        return [ColourEmbedding(image) for image in images]  # type: ignore[misc]

    def predict_from_tokens(self, embedding: Any, tokens: Any) -> ColourPrediction:
        image = embedding.image.astype(np.float32)
        distance = np.abs(image[None, None] - tokens[:, :, None, None]).max(axis=-1).min(axis=1)
        return ColourPrediction((60 - distance).astype(np.float32) / 5)


@pytest.fixture
def colours(monkeypatch: pytest.MonkeyPatch, command: Command) -> Command:
    """Runs commands with a model that finds colours in the place of the networks."""
    backend = ColourBackend()

    def load(self: labelling.LabelJob) -> Any:
        prompter = ColourPrompter()
        found = Labeller(prompter, backend, self.references, settings=self.settings, refiner=None)
        return found, self._identity(found, prompter.fingerprint)

    monkeypatch.setattr(labelling.LabelJob, "load", load)
    return command


def picture(path: Path, places: dict[int, tuple[int, int, int, int]]) -> dict[int, BoolArray]:
    """Save a grey picture with coloured boxes (x0, y0, x1, y1), and return their masks."""
    pixels = np.full((HEIGHT, WIDTH, 3), 120, np.uint8)
    found = {}
    for category, (x0, y0, x1, y1) in places.items():
        pixels[y0:y1, x0:x1] = COLOURS[category]
        found[category] = np.zeros((HEIGHT, WIDTH), np.bool_)
        found[category][y0:y1, x0:x1] = True
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(path)
    return found


def marks(**first: Any) -> dict[str, Any]:
    """A file of references: a red box marked as given, and a blue one by its bbox."""
    return {
        "images": [{"id": 7, "file_name": "ref.png", "width": WIDTH, "height": HEIGHT}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 1, **first},
            {"id": 2, "image_id": 7, "category_id": 2, "bbox": [40, 5, 12, 10], "segmentation": []},
        ],
        "categories": [{"id": 1, "name": "red"}, {"id": 2, "name": "blue"}, {"id": 3, "name": "never marked"}],
    }


MARKS: dict[str, dict[str, Any]] = {
    "polygon": {"segmentation": [[5, 5, 20, 5, 20, 25, 5, 25]]},
    "box": {"bbox": [5, 5, 15, 20]},
    "points": {"points": [[8, 9], [12, 20]]},
    "flat points": {"points": [8, 9, 12, 20]},
    "keypoints": {"keypoints": [8, 9, 2, 0, 0, 0, 12, 20, 1]},
    "scribble": {"scribble": [[8, 9, 12, 20, 15, 10]]},
    "one stroke": {"scribble": [8, 9, 12, 20]},
    "strokes of pairs": {"scribble": [[[8, 9], [12, 20]], [[15, 10]]]},
}


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """`refs.json` beside `ref.png`, and `targets`: red and blue, red alone, nothing."""
    picture(tmp_path / "ref.png", {1: (5, 5, 20, 25), 2: (40, 5, 52, 15)})
    (tmp_path / "refs.json").write_text(json.dumps(marks(**MARKS["polygon"])))
    picture(tmp_path / "targets" / "both.png", {1: (2, 2, 14, 30), 2: (30, 10, 50, 30)})
    picture(tmp_path / "targets" / "red.jpg", {1: (20, 5, 50, 35)})
    picture(tmp_path / "targets" / "none.png", {})
    return tmp_path


def labelled(job: Path, command: Command, *more: object, output: str = "labels.json") -> Said:
    return command("label", job / "targets", "--references", job / "refs.json", "-o", job / output, *more)


def found_in(path: Path) -> dict[str, dict[int, BoolArray]]:
    record = json.loads(path.read_text())
    names = {image["id"]: image["file_name"] for image in record["images"]}
    found: dict[str, dict[int, BoolArray]] = {name: {} for name in names.values()}
    for annotation in record["annotations"]:
        mask = coco_mask.decode(annotation["segmentation"]).astype(bool)
        found[names[annotation["image_id"]]][annotation["category_id"]] = mask
    return found


# --- the command


def test_every_image_gets_the_classes_that_are_in_it(job: Path, colours: Command) -> None:
    said = labelled(job, colours)
    assert said.code == 0, said.err
    found = found_in(job / "labels.json")
    assert list(found) == ["both.png", "none.png", "red.jpg"]
    truth = picture(job / "elsewhere" / "x.png", {1: (2, 2, 14, 30), 2: (30, 10, 50, 30)})
    assert {category: mask.tolist() for category, mask in found["both.png"].items()} == {
        category: mask.tolist() for category, mask in truth.items()
    }
    assert list(found["red.jpg"]) == [1]
    assert found["none.png"] == {}
    record = json.loads((job / "labels.json").read_text())
    assert [category["name"] for category in record["categories"]] == ["red", "blue", "never marked"]
    for annotation in record["annotations"]:
        mask = coco_mask.decode(annotation["segmentation"])
        assert annotation["area"] == mask.sum()
        assert 0 < annotation["score"] <= 0.8  # the predicted IoU times the mean probability
    assert "3 masks in 3 images" in said.out
    assert "3 without: the class was not found" in said.out
    assert not (job / "labels.json.journal.jsonl").exists()


def test_the_output_is_what_refine_takes(job: Path, colours: Command) -> None:
    assert labelled(job, colours).code == 0
    said = colours("refine", job / "labels.json", "--images", job / "targets", "-o", job / "refined.json", "--no-guard")
    assert said.code == 0, said.err
    before, after = (json.loads((job / name).read_text()) for name in ("labels.json", "refined.json"))
    assert [a["id"] for a in before["annotations"]] == [a["id"] for a in after["annotations"]] == [1, 2, 3]
    assert [a["score"] for a in before["annotations"]] == [a["score"] for a in after["annotations"]]


def test_class_maps_hold_the_same_masks(job: Path, colours: Command) -> None:
    assert labelled(job, colours).code == 0
    assert labelled(job, colours, output="maps").code == 0
    found = found_in(job / "labels.json")
    for name in found:
        with Image.open(job / "maps" / f"{Path(name).stem}.png") as opened:
            values = np.array(opened)
            assert opened.getpalette()[:6] == [0, 0, 0, 128, 0, 0]  # type: ignore[index]
        expected = np.zeros((HEIGHT, WIDTH), np.uint8)
        for category, mask in found[name].items():
            expected[mask] = category
        assert (values == expected).all()
    assert json.loads((job / "maps" / "classes.json").read_text())["2"] == "blue"
    assert labelled(job, colours, "--overwrite", output="maps").code == 0
    assert len(open_dataset(job / "maps", images=job / "targets", format="voc-class")) == 3


@pytest.mark.parametrize("kind", MARKS)
def test_a_reference_may_be_marked_in_any_way(job: Path, colours: Command, kind: str) -> None:
    (job / "refs.json").write_text(json.dumps(marks(**MARKS[kind])))
    assert labelled(job, colours).code == 0
    assert found_in(job / "labels.json")["red.jpg"].keys() == {1}


def test_a_folder_of_class_maps_is_references_too(job: Path, colours: Command) -> None:
    values = np.zeros((HEIGHT, WIDTH), np.uint8)
    values[5:25, 5:20], values[5:15, 40:52] = 1, 2
    (job / "marked").mkdir()
    Image.fromarray(values).save(job / "marked" / "ref.png")
    (job / "images").mkdir()
    shutil.copy(job / "ref.png", job / "images" / "ref.png")
    said = colours("label", job / "targets", "--references", job / "marked", "-o", job / "labels.json")
    assert said.code == 0, said.err
    record = json.loads((job / "labels.json").read_text())
    assert len(record["annotations"]) == 3
    assert record["categories"] == [{"id": 1, "name": "class 1"}, {"id": 2, "name": "class 2"}]


def test_several_shots_of_a_class_are_used_together(job: Path, colours: Command) -> None:
    """One red and one blue example of the same class: both colours are found."""
    both = marks(**MARKS["polygon"])
    picture(job / "second.png", {2: (5, 5, 20, 25)})
    both["images"].append({"id": 8, "file_name": "second.png", "width": WIDTH, "height": HEIGHT})
    both["annotations"] = [both["annotations"][0], {"image_id": 8, "category_id": 1, "bbox": [5, 5, 15, 20]}]
    (job / "refs.json").write_text(json.dumps(both))
    assert labelled(job, colours).code == 0
    assert int(found_in(job / "labels.json")["both.png"][1].sum()) == 12 * 28 + 20 * 20


def test_rejected_masks_are_counted_and_recorded(job: Path, colours: Command) -> None:
    said = labelled(job, colours, "--min-area", "500", "--record", job / "record.csv", "--json")
    assert said.code == 0, said.err
    told = json.loads(said.out)
    assert (told["masks"], told["refined"], told["kept"]) == (6, 1, {"empty-result": 3, "too-small": 2})
    lines = (job / "record.csv").read_text().splitlines()
    assert len(lines) == 7
    assert sum(",kept:too-small," in line for line in lines) == 2
    said = labelled(job, colours, "--min-score", "0.99", "--overwrite", "--json")
    assert json.loads(said.out)["kept"] == {"empty-result": 3, "low-score": 3}


def test_a_limited_run_is_continued_and_ends_like_one_in_a_row(job: Path, colours: Command) -> None:
    said = labelled(job, colours, "--limit", "1")
    assert said.code == 0
    assert list(found_in(job / "labels.json")) == ["both.png"]
    assert labelled(job, colours).code == 2  # there is an output, and a journal
    said = labelled(job, colours, "--resume", "--json")
    assert said.code == 0, said.err
    assert json.loads(said.out)["reused"] == 1
    assert labelled(job, colours, output="whole.json").code == 0
    assert (job / "labels.json").read_bytes() == (job / "whole.json").read_bytes()


def test_other_references_start_afresh(job: Path, colours: Command) -> None:
    assert labelled(job, colours, "--limit", "1").code == 0
    (job / "refs.json").write_text(json.dumps(marks(**MARKS["points"])))
    told = json.loads(labelled(job, colours, "--resume", "--json").out)
    assert (told["reused"], told["redone"]) == (0, 1)


def test_a_broken_image_costs_only_itself(job: Path, colours: Command) -> None:
    (job / "targets" / "broken.png").write_bytes(b"no image")
    said = labelled(job, colours)
    assert said.code == 1
    assert "broken.png: the image can't be read" in said.err
    assert list(found_in(job / "labels.json")) == ["both.png", "none.png", "red.jpg"]


def test_a_single_image_can_be_labelled(job: Path, colours: Command) -> None:
    said = colours("label", job / "targets" / "red.jpg", "--references", job / "refs.json", "-o", job / "one.json")
    assert said.code == 0, said.err
    assert list(found_in(job / "one.json")) == ["red.jpg"]


# --- bad input


def edited(change: Callable[[dict[str, Any]], object]) -> str:
    record = marks(**MARKS["polygon"])
    change(record)
    return json.dumps(record)


BAD = {
    "not JSON": ("{", "refs.json"),
    "no categories": (edited(lambda r: r.pop("categories")), "no readable list of categories"),
    "no annotations": (edited(lambda r: r.update(annotations=[])), "nothing is marked"),
    "annotations of another type": (edited(lambda r: r.update(annotations=3)), "no list of annotations"),
    "nothing marked": (edited(lambda r: r["annotations"][0].pop("segmentation")), "annotation 1: marks nothing"),
    "unknown image": (edited(lambda r: r["annotations"][0].update(image_id=9)), "annotation 1: its image_id 9"),
    "unknown category": (edited(lambda r: r["annotations"][0].update(category_id=9)), "its category_id 9"),
    "category of another type": (edited(lambda r: r["annotations"][0].update(category_id=[1])), "its category_id [1]"),
    "a point outside": (
        edited(lambda r: r["annotations"].append({"id": 5, "image_id": 7, "category_id": 1, "points": [99, 3]})),
        "annotation 5: its point (99, 3) is not in the image of 60 x 40",
    ),
    "an odd number": (
        edited(lambda r: r["annotations"].append({"id": 5, "image_id": 7, "category_id": 1, "points": [9, 3, 1]})),
        "odd number of coordinates",
    ),
    "words in a stroke": (
        edited(lambda r: r["annotations"].append({"id": 5, "image_id": 7, "category_id": 1, "scribble": ["a"]})),
        "annotation 5: its scribble is not a list of numbers",
    ),
    "a box outside": (
        edited(lambda r: r["annotations"].append({"id": 5, "image_id": 7, "category_id": 1, "bbox": [90, 3, 5, 5]})),
        "annotation 5: its box covers no pixel",
    ),
    "a short box": (
        edited(lambda r: r["annotations"].append({"id": 5, "image_id": 7, "category_id": 1, "bbox": [9, 3]})),
        "its bbox has 2 numbers",
    ),
    "a broken mask": (
        edited(lambda r: r["annotations"][0].update(segmentation={"size": [3, 3], "counts": "x"})),
        "annotation 1: its segmentation can't be used",
    ),
}


@pytest.mark.parametrize(("text", "told"), BAD.values(), ids=list(BAD))
def test_bad_references_are_refused_in_one_sentence(job: Path, colours: Command, text: str, told: str) -> None:
    (job / "refs.json").write_text(text)
    said = labelled(job, colours)
    assert said.code == 1
    assert told in said.err
    assert len(said.err.strip().splitlines()) == 1
    assert not (job / "labels.json").exists()


def test_bad_paths_are_refused(job: Path, colours: Command) -> None:
    assert "no such file or folder" in colours("label", job / "targets", "--references", job / "no", "-o", "x.json").err
    (job / "empty").mkdir()
    said = colours("label", job / "empty", "--references", job / "refs.json", "-o", job / "x.json")
    assert (said.code, "holds no images" in said.err) == (1, True)
    said = labelled(job, colours, output="refs.json")
    assert (said.code, "would replace the references" in said.err) == (2, True)
    before = (job / "ref.png").read_bytes()
    said = labelled(job, colours, "--overwrite", output="targets")
    assert said.code == 2
    assert (job / "ref.png").read_bytes() == before
    (job / "mine").mkdir()
    (job / "mine" / "thesis.txt").write_text("precious")
    said = labelled(job, colours, "--overwrite", output="mine")
    assert (said.code, "holds thesis.txt" in said.err) == (2, True)


def test_categories_that_no_map_can_hold_are_refused(job: Path, colours: Command) -> None:
    text = (
        (job / "refs.json")
        .read_text()
        .replace('"category_id": 1', '"category_id": 300')
        .replace('"id": 1, "name"', '"id": 300, "name"')
    )
    (job / "refs.json").write_text(text)
    said = labelled(job, colours, output="maps")
    assert (said.code, "category 300 can't be a value of a class map" in said.err) == (2, True)
    assert labelled(job, colours).code == 0


# --- parts


def test_pixels_go_to_the_likeliest_class_above_the_threshold() -> None:
    logits = np.array([[[2.0, -1.0]], [[1.0, -0.5]]], np.float32)
    owners, chances = share_out(logits, size=(1, 2), threshold=0.5)
    assert owners.tolist() == [[0, -1]]
    assert chances[0].tolist() == pytest.approx([1 / (1 + np.exp(-2.0)), 1 / (1 + np.exp(0.5))])
    assert share_out(logits, size=(1, 2), threshold=0.3)[0].tolist() == [[0, 1]]


def test_a_mask_that_refinement_turned_into_another_one_is_rejected() -> None:
    size = (20, 20)
    label, close, far = (np.zeros(size, np.bool_) for _ in range(3))
    label[2:12, 2:12], close[2:12, 2:14], far[10:20, 10:20] = True, True, True
    region = empty_target("a", Path("a.png"), size=size, categories=(4,)).regions[0]
    settings = LabelSettings(min_area_px=10)

    def judged(after: BoolArray | None, reason: Reason | None = None) -> Annotation:
        refined = None if after is None else Annotation(masks.encode(after), reason)
        return judge(region, masks.encode(label), 0.7, refined, settings=settings)

    assert judged(None) == Annotation(masks.encode(label), None, 0.7)
    assert judged(close).mask == masks.encode(close)
    assert judged(close).coarse_iou == pytest.approx(100 / 120)
    assert judged(far).reason == Reason.DRIFT
    assert judged(label, Reason.LOW_SCORE) == Annotation(masks.encode(label), None, 0.7)  # the refiner kept it


class Counting(ColourBackend):
    """Counts the images that are embedded."""

    def __init__(self) -> None:
        super().__init__()
        object.__setattr__(self, "embedded", [])

    def embed(self, images: Sequence[ImageArray]) -> list[Embedding]:
        self.embedded.extend(images)  # type: ignore[attr-defined]
        return super().embed(images)


def test_an_image_is_embedded_once_for_labelling_and_refining(job: Path) -> None:
    """With a real backend that refines in the whole frame; what is refined is what `refine` makes of the same mask."""
    backend = backend_of("sam")
    seen: list[tuple[int, ...]] = []
    embed = backend.embed
    settings = RefineSettings(view=ViewSettings(mode="frame"), guard=NO_GUARD, snap=SnapSettings(mode="none"))
    references = read_references(job / "refs.json", images=None, follow_links=False, max_pixels=MAX_PIXELS)

    class Shared(ColourPrompter):
        @staticmethod
        def joined(tokens: Sequence[Any]) -> Any:
            return ColourPrompter.joined(tokens)

    class Mixed:
        """SAM, with labels by colour."""

        name, defaults, fingerprint, views_at_once = "sam", backend.defaults, "-", 1
        arbiters = ()

        def embed(self, images: Sequence[ImageArray]) -> Any:
            seen.extend(image.shape for image in images)
            self.images = list(images)
            return embed(images)

        def predict(self, embeddings: Any, prompts: Any) -> Any:
            return backend.predict(embeddings, prompts)

        def predict_from_tokens(self, _: Embedding, tokens: Any) -> ColourPrediction:
            return ColourBackend().predict_from_tokens(ColourEmbedding(self.images[0]), tokens)

    mixed = Mixed()
    refiner = Refiner(mixed, settings)  # type: ignore[arg-type]
    found = Labeller(Shared(), mixed, references, settings=LabelSettings(min_agreement=0.0), refiner=refiner)
    target = empty_target("both", job / "targets" / "both.png", size=(HEIGHT, WIDTH), categories=found.categories)
    prepared = found.prepare(target)
    outcome = found.finish(prepared, found.segment(prepared.jobs))
    assert seen == [(HEIGHT, WIDTH, 3)]
    plain = Labeller(Shared(), mixed, references, settings=LabelSettings(), refiner=None)
    labels = plain.finish(prepared, plain.segment(prepared.jobs))
    again = replace(
        target,
        regions=tuple(
            Region(region.id, region.category, one.mask)
            for region, one in zip(target.regions, labels.annotations, strict=True)
        ),
    )
    alone = Refiner(backend, settings)
    ready = alone.prepare(again)
    expected = alone.finish(ready, alone.segment(ready.jobs))
    assert [one.mask for one in outcome.annotations] == [
        one.mask if one.refined else label.mask
        for one, label in zip(expected.annotations, labels.annotations, strict=True)
    ]
    assert any(one.refined for one in expected.annotations)


def test_strokes_are_drawn_with_a_round_brush_and_cut_off() -> None:
    drawn = draw_strokes([[(10, 50), (400, 50)], [(5, 5)]], (100, 300))
    rows, columns = np.nonzero(drawn)
    assert columns.max() == 299
    assert rows.max() - 50 <= 2
    assert drawn[5, 5]


def test_the_palette_is_that_of_voc() -> None:
    palette = voc_palette()
    assert palette[:4].tolist() == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0]]
    assert palette[15].tolist() == [192, 128, 128]
    assert palette[255].tolist() == [224, 224, 192]


def test_a_map_refuses_values_it_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="category 255"):
        write_class_maps([Sample("a", Path("a"), (2, 2), ())], tmp_path / "maps", names={255: "void"})


def test_references_know_their_kinds_and_their_digest(job: Path) -> None:
    def read() -> References:
        return read_references(job / "refs.json", images=None, follow_links=False, max_pixels=MAX_PIXELS)

    first = read()
    assert [shot.kinds for shot in first.shots] == [("mask",), ("box",)]
    picture(job / "ref.png", {1: (5, 5, 20, 26)})
    assert read().digest != first.digest


# --- with networks


def test_the_whole_job_runs_with_the_embedded_model_and_random_tokens(job: Path) -> None:
    summary = label_dataset(
        job / "targets",
        job / "refs.json",
        output=job / "labels.json",
        reference_encoder="random:1",
        settings=LabelSettings(min_area_px=1),
        refine=RefineSettings(),
        device="cpu",
    )
    assert (summary.images, summary.masks, summary.failed) == (3, 6, 0)
    assert len(open_dataset(job / "labels.json", images=job / "targets")) == 3
    first = (job / "labels.json").read_bytes()
    label_dataset(
        job / "targets",
        job / "refs.json",
        output=job / "labels.json",
        reference_encoder="random:1",
        settings=LabelSettings(min_area_px=1),
        refine=RefineSettings(),
        device="cpu",
        overwrite=True,
        threads=1,
    )
    assert (job / "labels.json").read_bytes() == first


def test_a_worker_finds_what_this_process_finds(job: Path) -> None:
    """What a worker is sent is pickled, and what it is handed are units of samples."""
    references = read_references(job / "refs.json", images=None, follow_links=False, max_pixels=MAX_PIXELS)
    settings = LabelSettings(min_area_px=1)
    sent = labelling.LabelJob(
        "embedded", None, "cpu", "fp32", "random:1", None, None, references, settings, RefineSettings()
    )
    loaded = runners._WorkerJob(pickle.loads(pickle.dumps(sent)), runners.Share("cpu", 1, 1))()
    here, identity = sent.load()
    assert loaded.about == identity
    samples = list(find_targets(job / "targets", follow_links=False).samples(here.categories))
    results = [pickle.loads(pickle.dumps(result)) for result in loaded.work(samples)]
    for sample, result in zip(samples, results, strict=True):
        prepared = here.prepare(sample)
        assert result.outcome == here.finish(prepared, here.segment(prepared.jobs))


@pytest.mark.ray
def test_two_workers_write_the_same_bytes(job: Path) -> None:
    for workers, name in ((1, "one.json"), (2, "two.json")):
        label_dataset(
            job / "targets",
            job / "refs.json",
            output=job / name,
            reference_encoder="random:1",
            settings=LabelSettings(min_area_px=1),
            device="cpu",
            workers=workers,
        )
    assert (job / "one.json").read_bytes() == (job / "two.json").read_bytes()
