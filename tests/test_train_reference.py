"""Episodes, simulated annotations, training of the reference encoder, and few-shot evaluation."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import Command
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from PIL import Image

from refinetool.backends.models import load_backend
from refinetool.backends.reference import load_prompter, read_reference_encoder
from refinetool.errors import DataError, UsageError
from refinetool.evaluate.few_shot import FewShotScores, Overlap, score_episode
from refinetool.formats.class_names import COCO_CLASSES, VOC_CLASSES
from refinetool.masks import tight_box
from refinetool.records import BoolArray
from refinetool.settings import FewShotSettings, ReferenceSettings, ReferenceTrainSettings
from refinetool.train.files import CHECKPOINT_FILE
from refinetool.train.reference.annotations import CURVES, KINDS, Kind, draw_points, simulate, walk
from refinetool.train.reference.data import (
    class_name,
    classes_of,
    fold_classes,
    list_class_pictures,
    named_classes,
)
from refinetool.train.reference.episodes import (
    fixed_episodes,
    index_classes,
    read_episodes,
    write_episodes,
)
from refinetool.train.reference.few_shot import ByPrototype, grab_cut, run_episodes
from refinetool.train.reference.run import (
    ReferenceRun,
    rate_at,
    read_record,
    split_episodes,
    train_reference,
)
from refinetool.train.reference.store import squashed
from refinetool.train.steps import TrainProgress

torch.set_num_threads(1)
SIDE = 64
SMALL = ReferenceTrainSettings(
    steps=4,
    episodes_per_step=2,
    validation_episodes=4,
    validate_every=2,
    save_every=2,
    side=64,
    encoder=ReferenceSettings(queries=4),
)


# --- data


def blob(x: int, y: int, radius: int = 12) -> BoolArray:
    rows, columns = np.mgrid[:SIDE, :SIDE]
    inside: BoolArray = np.hypot(rows - y, columns - x) < radius
    return inside


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Six training and four validation pictures with a red disc (`cat`) or a blue one (`dog`), and one with both."""
    folder = tmp_path / "pets"
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    rng = np.random.default_rng(0)
    split: dict[str, list[str]] = {"train": [], "val": []}
    for number in range(10):
        values = np.zeros((SIDE, SIDE), np.uint8)
        pixels = rng.integers(90, 130, (SIDE, SIDE, 3)).astype(np.uint8)
        for value, colour in ((1, (220, 30, 30)), (2, (30, 30, 220))):
            if number % 2 == value - 1 or number == 0:
                disc = blob(*rng.integers(16, 48, 2))
                values[disc], pixels[disc] = value, colour
        values[0, 0] = 255
        stem = f"p{number}"
        Image.fromarray(pixels).save(folder / "images" / f"{stem}.jpg", quality=95)
        Image.fromarray(values).save(folder / "masks" / f"{stem}.png")
        split["val" if number > 5 else "train"].append(stem)
    (folder / "split.json").write_text(json.dumps(split))
    (folder / "classes.json").write_text(json.dumps({"0": "background", "1": "Cat", "2": "dog"}))
    return folder


def pictures_of(source: Path) -> list:  # type: ignore[type-arg]
    return list_class_pictures(source, images=None, validation_share=0.1, max_pixels=10**6)


def test_pictures_know_their_classes_by_name(source: Path) -> None:
    pictures = pictures_of(source)
    assert [picture.validation for picture in pictures] == [False] * 6 + [True] * 4
    assert classes_of(pictures) == ["cat", "dog"]
    assert set(pictures[0].areas) == {"cat", "dog"}
    found = pictures[2].read()
    assert set(found.masks) == {"cat"}
    assert int(found.masks["cat"].sum()) == pictures[2].areas["cat"]
    assert found.void.sum() == 1
    assert found.image[found.masks["cat"]].mean(axis=0)[0] > 180


def test_objects_of_pictures_may_have_names_of_their_own(source: Path) -> None:
    (source / "classes.json").unlink()
    with pytest.raises(DataError, match=r"neither classes.json nor objects.json"):
        pictures_of(source)
    listed = {f"p{n}": [{"id": 1, "category": "cat"}, {"id": 2, "category": "cat"}] for n in range(10)}
    (source / "objects.json").write_text(json.dumps(listed))
    pictures = pictures_of(source)
    assert classes_of(pictures) == ["cat"]
    found = pictures[0].read()
    assert int(found.masks["cat"].sum()) == pictures[0].areas["cat"]  # both of its objects


def test_coco_files_and_voc_roots_are_read_too(source: Path, tmp_path: Path) -> None:
    ring = [10, 10, 40, 10, 40, 40, 10, 40]
    record = {
        "images": [{"id": n, "file_name": f"p{n}.jpg", "height": SIDE, "width": SIDE} for n in range(4)],
        "annotations": [
            {"id": n + 1, "image_id": n, "category_id": 5, "segmentation": [ring], "iscrowd": int(n == 3)}
            for n in range(4)
        ],
        "categories": [{"id": 5, "name": "sofa"}],
    }
    (tmp_path / "coco.json").write_text(json.dumps(record))
    pictures = list_class_pictures(
        tmp_path / "coco.json", images=source / "images", validation_share=0.5, max_pixels=10**6
    )
    assert len(pictures) == 3  # a crowd alone is no class
    assert classes_of(pictures) == ["couch"]
    assert pictures[0].read().masks["couch"].sum() == 900
    assert 0 < sum(picture.validation for picture in pictures) < 3
    voc = tmp_path / "voc"
    (voc / "JPEGImages").mkdir(parents=True)
    (voc / "SegmentationClass").mkdir()
    for n in range(2):
        (voc / "JPEGImages" / f"p{n}.jpg").write_bytes((source / "images" / f"p{n}.jpg").read_bytes())
        values = np.zeros((SIDE, SIDE), np.uint8)
        values[5:20, 5:20] = 1 + n
        values[0] = 255
        Image.fromarray(values).save(voc / "SegmentationClass" / f"p{n}.png")
    pictures = list_class_pictures(voc, images=None, validation_share=0.5, max_pixels=10**6)
    assert classes_of(pictures) == ["airplane", "bicycle"]
    assert pictures[0].read().void.sum() == SIDE


def test_folds_are_those_of_the_literature() -> None:
    assert len(COCO_CLASSES) == 80
    assert len(VOC_CLASSES) == 21
    assert fold_classes("pascal-5i", 1) == ("bus", "car", "cat", "chair", "cow")
    assert fold_classes("coco-20i", 0)[:4] == ("person", "airplane", "boat", "parking meter")
    assert fold_classes("coco-20i", 3)[-1] == "toothbrush"
    assert {len(fold_classes("coco-20i", fold)) for fold in range(4)} == {20}
    assert class_name("Motorbike") == class_name("motorcycle") == "motorcycle"
    assert named_classes(["pascal-5i:0", "Cat"], known=["cat"])[:3] == ["airplane", "bicycle", "bird"]
    with pytest.raises(UsageError, match="no class 'cta' in the data; did you mean cat"):
        named_classes(["cta"], known=["cat", "dog"])
    with pytest.raises(UsageError, match="no fold 'coco-20i:4'"):
        named_classes(["coco-20i:4"], known=["cat"])


# --- annotations


def masks_with(seed: int) -> BoolArray:
    rng = np.random.default_rng(seed)
    return blob(int(rng.integers(0, SIDE)), int(rng.integers(0, SIDE)), int(rng.integers(1, 20)))


@given(seed=st.integers(0, 10_000), kind=st.sampled_from(KINDS), most=st.booleans())
@hypothesis_settings(max_examples=60, deadline=None)
def test_an_annotation_marks_pixels_of_the_object_or_its_box(seed: int, kind: Kind, most: bool) -> None:
    mask = masks_with(seed)
    drawn = simulate(mask, kind, rng=np.random.default_rng(seed), most=most)
    assert drawn.any()
    again = simulate(mask, kind, rng=np.random.default_rng(seed), most=most)
    assert (drawn == again).all()
    if kind == "box":
        x0, y0, x1, y1 = tight_box(mask)
        assert drawn[y0:y1, x0:x1].all()
        assert drawn.sum() == (x1 - x0) * (y1 - y0)
    else:
        assert not (drawn & ~mask).any()
    if kind == "mask":
        assert (drawn == mask).all()
    if kind == "point":
        assert drawn.sum() <= min(20, mask.sum())
        assert not most or drawn.sum() == min(20, mask.sum())


def test_points_and_strokes_vary_and_strokes_are_longer() -> None:
    mask = np.ones((256, 256), np.bool_)
    rng = np.random.default_rng(0)
    points = [simulate(mask, "point", rng=rng, most=False).sum() for _ in range(200)]
    assert set(points) == set(range(1, 21))
    strokes = [simulate(mask, "scribble", rng=rng, most=False).sum() for _ in range(50)]
    assert np.median(strokes) > 20 * np.median(points)
    assert draw_points(mask, count=7, rng=rng).sum() == 7


def test_a_walk_keeps_within_its_speed_and_turns_little_by_little() -> None:
    rng = np.random.default_rng(3)
    for _ in range(20):
        path = walk((100, 100), CURVES, scale=0.5, rng=rng)
        assert CURVES.vertices[0] <= len(path) <= CURVES.vertices[1]
        steps = np.diff(path, axis=0)
        lengths = np.hypot(*steps.T)
        assert lengths.max() <= 0.5 * CURVES.top_speed + 1e-9
        moving = lengths > 1e-6
        headings = np.unwrap(np.arctan2(steps[moving, 1], steps[moving, 0]))
        if moving.all():
            assert np.abs(np.diff(headings)).max() <= 0.5 + 1e-9


# --- episodes


def test_episodes_have_distinct_pictures_of_their_class(source: Path) -> None:
    pictures = pictures_of(source)
    areas = {picture.key: picture.areas for picture in pictures}
    index = index_classes(
        [p for p in pictures if p.validation], pictures, classes=["cat", "dog", "cow"], min_area=0.001
    )
    assert sorted(index.targets) == ["cat", "dog"]
    episodes = fixed_episodes(index, count=20, shots=3, kinds=KINDS, seed=1)
    assert episodes == fixed_episodes(index, count=20, shots=3, kinds=KINDS, seed=1)
    assert episodes != fixed_episodes(index, count=20, shots=3, kinds=KINDS, seed=2)
    validation = {p.key for p in pictures if p.validation}
    for episode in episodes:
        assert episode.target in validation
        assert episode.target not in episode.references
        assert len(set(episode.references)) == 3
        assert all(episode.name in areas[key] for key in (episode.target, *episode.references))
    assert {episode.kind for episode in episodes} == set(KINDS)
    assert [episode.name for episode in episodes].count("cat") == 10


def test_small_and_lonely_classes_are_left_out(source: Path) -> None:
    pictures = pictures_of(source)
    assert not index_classes(pictures, pictures, classes=["cat"], min_area=0.9).targets
    assert not index_classes(pictures[:1], pictures[:1], classes=["cat"], min_area=0).targets


def test_episodes_are_written_and_read_back(source: Path, tmp_path: Path) -> None:
    pictures = pictures_of(source)
    episodes = fixed_episodes(
        index_classes(pictures, pictures, classes=["cat"], min_area=0), count=3, shots=2, kinds=KINDS, seed=0
    )
    write_episodes(episodes, tmp_path / "episodes.json")
    assert read_episodes(tmp_path / "episodes.json") == episodes
    for text in ("{", "[]", '{"version": 7, "episodes": []}', '{"version": 1, "episodes": [{"name": "x"}]}'):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(DataError, match=r"bad.json"):
            read_episodes(tmp_path / "bad.json")


def test_held_out_classes_are_in_no_episode(source: Path) -> None:
    pictures = pictures_of(source)
    index, fixed = split_episodes(pictures, held_out={"dog"}, settings=SMALL)
    assert list(index.targets) == ["cat"]
    assert {episode.name for episode in fixed} == {"cat"}
    validation = {picture.key for picture in pictures if picture.validation}
    assert {episode.target for episode in fixed} <= validation
    assert not validation & {*index.targets["cat"], *index.references["cat"]}
    assert not validation & {key for episode in fixed for key in episode.references}
    with pytest.raises(DataError, match="no class with training episodes is left"):
        split_episodes(pictures, held_out={"dog", "cat"}, settings=SMALL)


# --- training


def a_run(source: Path, **changes: object) -> ReferenceRun:
    settings = replace(SMALL, **changes)  # type: ignore[arg-type]
    return ReferenceRun((source,), None, (), "embedded", None, "embedded", None, settings)


def test_an_interrupted_run_ends_like_one_in_a_row(source: Path, tmp_path: Path) -> None:
    seen: list[TrainProgress] = []
    run = a_run(source)
    whole = train_reference(run, tmp_path / "whole", device="cpu", resume=False, on_progress=seen.append)
    assert [progress.step for progress in seen] == [1, 2, 3, 4]
    assert [progress.validation is not None for progress in seen] == [False, True, False, True]

    class StopError(Exception):
        pass

    def stop(progress: TrainProgress) -> None:
        if progress.step == 3:
            raise StopError

    with pytest.raises(StopError):
        train_reference(run, tmp_path / "cut", device="cpu", resume=False, on_progress=stop)
    assert read_record(tmp_path / "cut") == replace(run, data=(source.absolute(),))
    cut = train_reference(
        read_record(tmp_path / "cut"), tmp_path / "cut", device="cpu", resume=True, on_progress=lambda _: None
    )
    states = [torch.load(path.parent / CHECKPOINT_FILE, weights_only=True)["model"] for path in (whole, cut)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    model, recipe = read_reference_encoder(whole)
    assert (recipe.decoder, recipe.image_encoder, recipe.queries) == ("embedded", "embedded", 4)
    assert recipe.threshold in SMALL.thresholds
    assert recipe.trained["data"] == ["pets"]
    assert model.width == 128
    lines = [json.loads(line) for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]


def test_training_lowers_the_loss(source: Path, tmp_path: Path) -> None:
    """Red discs against blue ones: a class that colour alone tells apart."""
    losses: list[float] = []
    train_reference(
        a_run(source, steps=40, episodes_per_step=4, learning_rate=1e-3, validate_every=40, save_every=40),
        tmp_path / "run",
        device="cpu",
        resume=False,
        on_progress=lambda progress: losses.append(progress.loss),
    )
    assert np.mean(losses[-8:]) < 0.8 * np.mean(losses[:8])


def test_other_data_are_not_resumed(source: Path, tmp_path: Path) -> None:
    run = a_run(source, steps=2)
    train_reference(run, tmp_path / "run", device="cpu", resume=False, on_progress=lambda _: None)
    with pytest.raises(DataError, match="the run began with other data"):
        train_reference(
            replace(run, held_out=("dog",)), tmp_path / "run", device="cpu", resume=True, on_progress=lambda _: None
        )
    with pytest.raises(DataError, match="nothing to resume"):
        train_reference(run, tmp_path / "new", device="cpu", resume=True, on_progress=lambda _: None)
    (tmp_path / "run" / CHECKPOINT_FILE).write_bytes(b"junk")
    with pytest.raises(DataError, match="can't be read as a checkpoint"):
        train_reference(run, tmp_path / "run", device="cpu", resume=True, on_progress=lambda _: None)


def test_the_learning_rate_is_a_cosine_to_zero() -> None:
    settings = ReferenceTrainSettings(steps=100, learning_rate=2.0)
    assert rate_at(0, settings=settings) == 2.0
    assert rate_at(50, settings=settings) == pytest.approx(1.0)
    assert rate_at(100, settings=settings) == pytest.approx(0.0)


def test_thin_masks_do_not_vanish_when_they_are_squashed() -> None:
    line = np.zeros((300, 300), np.bool_)
    line[150] = True
    assert squashed(line, 64).any()
    half = np.zeros((128, 256), np.bool_)
    half[:, :128] = True
    assert squashed(half, 64).sum() == 64 * 32


def test_the_commands_train_label_and_evaluate(source: Path, tmp_path: Path, command: Command) -> None:
    said = command("train", "reference", "--data", source, "-o", tmp_path / "run", "--steps", "2", "--hold-out", "dog")
    assert said.code == 0, said.err
    weights = tmp_path / "run" / "reference.safetensors"
    assert read_reference_encoder(weights)[1].held_out == ("dog",)
    asked = ("--protocol", "few-shot", "--classes", "dog", "--count", "2", "--shots", "1", "--shots", "2")
    episodes = tmp_path / "episodes.json"
    said = command("eval", weights, source, *asked, "--episodes", episodes, "--json", "--quiet")
    assert said.code == 0, said.err
    told = json.loads(said.out)
    assert [(row["kind"], row["shots"]) for row in told["rows"]] == [(kind, n) for kind in KINDS for n in (1, 2)]
    assert told["seen_in_training"] == []
    assert all(list(row["labels"]["classes"]) == ["dog"] for row in told["rows"])
    drawn = episodes.read_bytes()
    for method in ("prototype", "grabcut"):
        said = command("eval", method, source, *asked, "--episodes", episodes, "--kind", "box", "--refine", "--quiet")
        assert said.code == 0, said.err
        assert "refined mIoU" in said.out
    assert episodes.read_bytes() == drawn
    said = command("train", "reference", "-o", tmp_path / "run", "--resume", "--steps", "3", "--quiet")
    assert said.code == 0, said.err


def test_what_commands_refuse(source: Path, tmp_path: Path, command: Command) -> None:
    assert "no data to train on" in command("train", "reference", "-o", tmp_path / "run").err
    said = command("train", "reference", "--data", source, "-o", tmp_path / "run", "--kind", "dot")
    assert (said.code, "no kind of annotation 'dot'" in said.err) == (2, True)
    said = command("train", "reference", "--data", source, "-o", tmp_path / "run", "--hold-out", "cow")
    assert (said.code, "no class 'cow' in the data" in said.err) == (2, True)
    said = command("eval", "prototype", source, "--protocol", "few-shot", "--coarse", tmp_path / "x.json")
    assert (said.code, "--coarse compares files of masks" in said.err) == (2, True)
    (tmp_path / "episodes.json").write_text(
        json.dumps(
            {
                "version": 1,
                "episodes": [{"name": "cat", "target": "pets/zz", "references": ["pets/p0"], "kind": "box", "seed": 1}],
            }
        )
    )
    said = command(
        "eval", "prototype", source, "--protocol", "few-shot", "--episodes", tmp_path / "episodes.json", "--quiet"
    )
    assert (said.code, "names pets/zz, which is no image with a cat" in said.err) == (1, True)


# --- measuring


def test_pixels_are_summed_over_the_episodes_of_a_class() -> None:
    truth, half, nothing = np.zeros((4, 10), np.bool_), np.zeros((4, 10), np.bool_), np.zeros((4, 10), np.bool_)
    truth[:2], half[:1] = True, True
    scores = score_episode("a", half, truth, void=nothing) + score_episode("a", truth, truth, void=nothing)
    scores += score_episode("b", nothing, truth, void=nothing)
    assert scores.classes["a"] == Overlap(30, 40)
    assert scores.mean_iou == pytest.approx((0.75 + 0) / 2)
    background = (20 + 20 + 20) / (30 + 20 + 40)
    assert scores.foreground_background_iou == pytest.approx((30 / 60 + background) / 2)
    assert scores.episodes == 3


def test_void_pixels_do_not_count() -> None:
    truth, void = np.zeros((4, 10), np.bool_), np.zeros((4, 10), np.bool_)
    truth[:2], void[1:3] = True, True
    wrong = truth ^ void
    assert score_episode("a", wrong, truth, void=void).mean_iou == 1.0
    assert score_episode("a", wrong, truth, void=void).background.iou == 1.0


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 255), st.integers(0, 255)), max_size=6))
def test_scores_can_be_merged_in_any_grouping(episodes: list[tuple[str, int, int]]) -> None:
    nothing = np.zeros((2, 4), np.bool_)

    def of(number: int) -> BoolArray:
        return np.array(list(f"{number:08b}"), dtype="U1").reshape(2, 4) == "1"

    each = [score_episode(name, of(a), of(b), void=nothing) for name, a, b in episodes]
    whole = sum(each, FewShotScores())
    parts = sum(each[:2], FewShotScores()) + sum(each[2:], FewShotScores())
    assert whole == parts


def test_the_prototype_finds_a_colour(source: Path) -> None:
    """On features that are colours, the prototype of red discs finds another red disc."""
    from test_reference_encoder import Blocks

    from refinetool.backends.reference import Prompter, recipe_for

    backend = load_backend("embedded", checkpoint=None, device="cpu", precision="fp32")
    encoder = Blocks(12)
    recipe = recipe_for(encoder, backend, settings=ReferenceSettings(queries=4))
    prompter = Prompter(recipe.build(), encoder, recipe, device=torch.device("cpu"))
    pictures = pictures_of(source)
    index = index_classes([p for p in pictures if p.validation], pictures, classes=["cat"], min_area=0)
    episodes = fixed_episodes(index, count=4, shots=2, kinds=("mask",), seed=0)
    rows = run_episodes(
        episodes,
        pictures,
        ByPrototype(FewShotSettings()),
        prompter,
        kinds=("mask",),
        shots=(2,),
        refiner=None,
        on_progress=lambda *_: None,
    )
    assert rows[0].scores.mean_iou > 0.7


def test_grabcut_cuts_out_what_a_soft_mask_marks() -> None:
    disc = blob(32, 30, 14)
    image = np.random.default_rng(0).integers(90, 130, (SIDE, SIDE, 3)).astype(np.uint8)
    image[disc] = (220, 30, 30)
    rows, columns = np.mgrid[:SIDE, :SIDE]
    soft = np.clip(1.2 - np.hypot(rows - 26, columns - 36) / 24, 0, 1).astype(np.float32)  # beside the disc
    found = grab_cut(image, soft, settings=FewShotSettings())
    assert (found & disc).sum() / (found | disc).sum() > 0.95


def test_grabcut_without_sure_pixels_falls_back_on_a_threshold() -> None:
    image = np.zeros((20, 20, 3), np.uint8)
    soft = np.full((20, 20), 0.9, np.float32)
    assert grab_cut(image, soft, settings=FewShotSettings()).all()
    assert not grab_cut(image, np.zeros_like(soft), settings=FewShotSettings()).any()


def test_the_prompter_of_random_weights_is_the_same_on_every_call() -> None:
    backend = load_backend("embedded", checkpoint=None, device="cpu", precision="fp32")
    made = [
        load_prompter(
            "random:5", image_encoder=None, encoder_checkpoint=None, backend=backend, settings=ReferenceSettings()
        )
        for _ in range(2)
    ]
    assert made[0].fingerprint == made[1].fingerprint
