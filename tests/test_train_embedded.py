"""Training the embedded model, on pictures made here."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from refinetool.backends.sam2 import BOX_CORNERS
from refinetool.errors import DataError
from refinetool.modules.embedded import build_embedded, decode, encode, set_image_size
from refinetool.settings import TrainSettings
from refinetool.train.data import IGNORE, ExampleSource, find_objects, index_folder, meeting_lines
from refinetool.train.embedded import FULL, TrainProgress, prompt_groups, rate_at, side_at, train_embedded
from refinetool.train.losses import dice_loss, hard_iou, mask_loss

QUICK = TrainSettings(
    steps=4,
    small_side=64,
    small_share=1.0,
    images_per_step=2,
    prompts_per_image=4,
    warmup_steps=2,
    save_every=2,
    validate_every=1000,
    validation_examples=2,
    workers=0,
)


def paint_folder(folder: Path, *, classes: bool) -> Path:
    rng = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    for number in range(4):
        ids = np.zeros((90, 120), np.uint8)
        ids[15:50, 10:60] = 1
        ids[55:85, 70:110] = 1 if classes else 2
        ids[0:4] = IGNORE
        colours = rng.integers(0, 255, (3, 3), dtype=np.uint8)
        image = colours[np.where(ids == IGNORE, 0, ids)]
        Image.fromarray(image).save(folder / "images" / f"{number}.jpg")
        Image.fromarray(ids).save(folder / "masks" / f"{number}.png")
    (folder / "split.json").write_text(json.dumps({"train": ["0", "1", "2"], "val": ["3"]}))
    if classes:
        (folder / "classes.json").write_text("{}")
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return paint_folder(tmp_path / "data", classes=False)


def source(folder: Path, side: int) -> ExampleSource:
    return ExampleSource([index_folder(folder, "train")], settings=QUICK, side_of=lambda _: side, seed=1)


def test_ids_are_objects_and_classes_are_split(folder: Path, tmp_path: Path) -> None:
    assert [len(picture.objects) for picture in index_folder(folder, "train")] == [2, 2, 2]
    by_class = index_folder(paint_folder(tmp_path / "classes", classes=True), "val")[0].objects
    assert [(thing.value, thing.box, thing.seed) for thing in by_class] == [
        (1, (10, 15, 110, 85), None),
        (1, (10, 15, 60, 50), (10, 15)),
        (1, (70, 55, 110, 85), (70, 55)),
    ]


def test_specks_are_no_objects() -> None:
    ids = np.zeros((50, 50), np.uint8)
    ids[:5, :5] = 3
    assert find_objects(ids, by_class=False) == []


@pytest.mark.parametrize("missing", ["split.json", "masks/1.png", "images/2.jpg"])
def test_an_incomplete_folder_is_named(folder: Path, missing: str) -> None:
    (folder / missing).unlink()
    with pytest.raises(DataError, match=str(folder)):
        index_folder(folder, "train")


def test_an_example_is_a_function_of_its_number(folder: Path) -> None:
    first, second, other = source(folder, 64)[5], source(folder, 64)[5], source(folder, 64)[6]
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first.image, other.image)


def test_an_example_has_the_documented_shapes_and_ranges(folder: Path) -> None:
    side, k = 64, QUICK.prompts_per_image
    for number in range(6):
        example = source(folder, side)[number]
        assert example.image.shape == (3, side, side)
        assert example.points.shape == (k, 4, 2)
        assert example.masks.shape == (k, side // 4, side // 4)
        assert example.targets.shape == example.weights.shape == (k, side // 2, side // 2)
        assert example.edges.shape == (side // 4, side // 4)
        assert example.labels[:, :2].tolist() == [list(BOX_CORNERS)] * k
        assert example.points.min() >= -2
        assert example.points.max() <= side + 2
        assert (example.masks.amax((1, 2)) > 0).all()
        assert ((example.coarse_iou >= 0) & (example.coarse_iou <= 1)).all()


def test_the_box_holds_the_positive_point(folder: Path) -> None:
    for number in range(10):
        points = source(folder, 64)[number].points
        assert (points[:, 2] >= points[:, 0] - 3).all()
        assert (points[:, 2] <= points[:, 1] + 3).all()


def test_edges_lie_between_ids_and_not_beside_ignored_pixels() -> None:
    ids = np.zeros((8, 8), np.uint8)
    ids[:, 4:] = 1
    ids[6:] = IGNORE
    assert meeting_lines(ids, cell=2).tolist() == [[0, 0, 1, 0]] * 3 + [[0, 0, 0, 0]]


def test_losses_against_worked_values() -> None:
    probability = torch.tensor([[[[1.0, 0.0], [0.5, 1.0]]]])
    target = torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]])
    known = torch.tensor([[[[True, True], [True, False]]]])
    assert dice_loss(probability, target, known=known).item() == pytest.approx(1 - (2 * 1.5 + 1) / (1.5 + 2 + 1))
    assert hard_iou(probability > 0.4, target > 0.5, known=known).item() == 1.0
    assert hard_iou(probability > 0.4, target > 0.5, known=torch.ones_like(known)).item() == pytest.approx(2 / 3)


def test_the_loss_of_a_perfect_mask_is_nearly_nothing() -> None:
    target = torch.zeros(1, 16, 16)
    target[:, 4:12, 4:12] = 1
    logits = ((target[:, None, ::2, ::2] - 0.5) * 60).repeat(1, 4, 1, 1)
    losses = mask_loss(logits, torch.ones(1, 4), target, torch.ones(1, 16, 16))
    worse = mask_loss(-logits, torch.ones(1, 4), target, torch.ones(1, 16, 16))
    assert losses.true_iou.min() > 0.75
    assert losses.mask < 0.1 * worse.mask
    assert worse.iou > 0.9


def test_ignored_cells_do_not_count() -> None:
    target, weight = torch.zeros(1, 8, 8), torch.ones(1, 8, 8)
    target[:, :4] = 1
    weight[:, :, 4:] = 0
    logits = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    logits[..., 2:] = logits[..., 1:2]  # upsampling must not carry anything across the line
    changed = target.clone()
    changed[:, :, 4:] = 1 - changed[:, :, 4:]
    score = torch.full((1, 4), 0.5)
    assert mask_loss(logits, score, target, weight).mask == mask_loss(logits, score, changed, weight).mask


def test_the_rate_rises_stays_and_falls() -> None:
    settings = replace(QUICK, steps=1000, warmup_steps=100, decay_share=0.5, final_rate=0.1)
    assert rate_at(50, settings=settings) == pytest.approx(0.5)
    assert rate_at(300, settings=settings) == 1.0
    assert rate_at(750, settings=settings) == pytest.approx(0.55)
    assert rate_at(1000, settings=settings) == pytest.approx(0.1)


def test_the_side_grows_once() -> None:
    settings = replace(QUICK, steps=10, small_share=0.7)
    assert [side_at(step, settings=settings) for step in range(1, 11)] == [64] * 7 + [256] * 3


@pytest.mark.parametrize("count", [1, 4, 6])
def test_prompt_groups_share_out_every_prompt_once(count: int) -> None:
    groups = prompt_groups(count, torch.Generator().manual_seed(2))
    assert sorted(row for rows, _ in groups for row in rows) == list(range(count))
    assert groups[0][1] == FULL


def test_the_architecture_runs_at_other_sides_with_the_same_weights() -> None:
    model = build_embedded(image_size=256).eval()
    set_image_size(model, 64)
    with torch.no_grad():
        embedding, fine = encode(model, torch.zeros(1, 3, 64, 64))
        points = (torch.tensor([[[8.0, 8.0], [40.0, 40.0]]]), torch.tensor([[2, 3]], dtype=torch.int32))
        logits, scores = decode(model, embedding, fine, points=points, masks=torch.zeros(1, 1, 16, 16))
    assert logits.shape == (1, 4, 16, 16)
    assert ((scores >= 0) & (scores <= 1)).all()
    stored = sum(tensor.numel() * 2 for tensor in model.state_dict().values())
    assert stored < 16e6


def train(folder: Path, output: Path, settings: TrainSettings, *, resume: bool) -> list[TrainProgress]:
    reports: list[TrainProgress] = []
    train_embedded([folder], output, settings=settings, device="cpu", resume=resume, on_progress=reports.append)
    return reports


def test_a_resumed_run_equals_an_uninterrupted_one(folder: Path, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    whole = train(folder, tmp_path / "whole", QUICK, resume=False)
    # The same schedule, cut off by the caller after the second step, when a checkpoint has been written.
    with pytest.raises(KeyboardInterrupt):
        train_embedded(
            [folder], tmp_path / "cut", settings=QUICK, device="cpu", resume=False, on_progress=stop_after(3)
        )
    rest = train(folder, tmp_path / "cut", QUICK, resume=True)
    assert [report.step for report in rest] == [3, 4]
    assert [report.loss for report in rest] == [report.loss for report in whole[2:]]
    first, second = (load_file(tmp_path / name / "embedded.safetensors") for name in ("whole", "cut"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert whole[-1].validation is not None
    assert set(whole[-1].validation) == {"coarse", "full", "box", "harm", "better", "iou_error"}


def stop_after(steps: int):  # type: ignore[no-untyped-def]
    def on_progress(progress: TrainProgress) -> None:
        if progress.step == steps:
            raise KeyboardInterrupt

    return on_progress


def test_the_export_says_what_made_it(folder: Path, tmp_path: Path) -> None:
    settings = replace(QUICK, steps=1)
    train(folder, tmp_path / "run", settings, resume=False)
    with safe_open(tmp_path / "run" / "embedded.safetensors", "pt") as weights:
        metadata = weights.metadata()
    assert json.loads(metadata["settings"])["seed"] == settings.seed
    assert metadata["data"] == folder.name
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 1


def test_resuming_nothing_says_so(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing to resume"):
        train(folder, tmp_path / "none", QUICK, resume=True)
