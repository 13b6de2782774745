"""Training the embedded model, on pictures made here."""

import json
import os
import signal
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from training_data import PACKING, QUICK, packed_folder, paint_folder

from refinetool.errors import DataError, Interrupted, StorageError, UsageError, WeightsError
from refinetool.modules.embedded import DETAIL_PREFIX, build_embedded
from refinetool.modules.heads import Prompted
from refinetool.modules.sam2_passes import decode, see, set_image_size
from refinetool.settings import TrainSettings
from refinetool.train.curves import draw_curves
from refinetool.train.embedded.run import train_embedded
from refinetool.train.files import MetricsLog, read_metrics, read_run
from refinetool.train.losses import dice_loss, hard_iou, harm_loss, mask_loss
from refinetool.train.questions import FULL, mined_groups
from refinetool.train.schedule import learning_rate_at, seconds_left, share_done, side_at
from refinetool.train.steps import TrainProgress


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


def test_only_masks_that_became_worse_are_harmed() -> None:
    target = torch.zeros(4, 4, 4)
    target[:, :2] = 1
    weight = torch.ones(4, 4, 4)
    weight[:, :, 3] = 0  # unknown: nothing there counts
    coarse = torch.where(target > 0.5, 1.0, -1.0)
    coarse[1, 2] = 1  # IoU 6 / 9
    coarse[2] = 0  # a prompt without a mask
    # Half the object is found in rows 0 and 2, everything in row 1; row 3 is exact.
    logits = torch.full((4, 4, 4), -40.0)
    logits[:, 0], logits[1, 1], logits[3, 1] = 40, 40, 40
    loss = harm_loss(logits.requires_grad_(), coarse=coarse, target=target, weight=weight)
    assert loss.item() == pytest.approx((1 - 3 / 6) / 4), "of four masks, only the first lost IoU"
    loss.backward()  # type: ignore[no-untyped-call]
    soft = harm_loss(torch.zeros(4, 4, 4), coarse=coarse, target=target, weight=weight)
    after = 0.5 * 6 / (0.5 * 12 + 6 - 0.5 * 6)
    assert soft.item() == pytest.approx(((1 - after) + (6 / 9 - after) + 0 + (1 - after)) / 4)


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
    rates = [
        learning_rate_at(step, share_done(step, 0.0, settings=settings), settings=settings)
        for step in (50, 300, 750, 1000)
    ]
    assert rates == pytest.approx([0.5, 1.0, 0.55, 0.1])


def test_a_run_may_go_by_the_clock() -> None:
    settings = replace(QUICK, minutes=2.0, decay_share=0.5, final_rate=0.1)
    shares = [share_done(1000, seconds, settings=settings) for seconds in (0, 30, 90, 120, 150)]
    assert shares == pytest.approx([0, 0.25, 0.75, 1, 1])
    assert learning_rate_at(1000, shares[2], settings=settings) == pytest.approx(0.55)
    assert seconds_left(1000, 90, rate=3.0, settings=settings) == pytest.approx(30)
    assert seconds_left(1, 90, rate=1.5, settings=QUICK) == pytest.approx(2)


def test_the_side_grows_once() -> None:
    settings = replace(QUICK, side=256, steps=10, small_share=0.7)
    assert [side_at(step / 10, settings=settings) for step in range(1, 11)] == [64] * 7 + [256] * 3


@pytest.mark.parametrize("count", [1, 4, 6])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.75, 1.0])
def test_prompt_groups_share_out_every_prompt_once(count: int, share: float) -> None:
    groups = mined_groups(count, torch.Generator().manual_seed(2), full_share=share)
    assert sorted(row for rows, _ in groups for row in rows) == list(range(count))
    assert groups[0][1] == FULL


@pytest.mark.parametrize(
    ("share", "sizes"), [(0.5, [(2, True), (1, False), (1, True)]), (0.75, [(3, True), (1, False)]), (1.0, [(4, True)])]
)
def test_a_share_of_the_prompts_is_full(share: float, sizes: list[tuple[int, bool]]) -> None:
    groups = mined_groups(4, torch.Generator().manual_seed(2), full_share=share)
    assert [(len(rows), kinds.mask) for rows, kinds in groups] == sizes


def test_the_architecture_runs_at_other_sides_with_the_same_weights() -> None:
    model = build_embedded(image_size=256).eval()
    set_image_size(model, 64)
    with torch.no_grad():
        features = see(model, torch.zeros(1, 3, 64, 64))
        points = (torch.tensor([[[8.0, 8.0], [40.0, 40.0]]]), torch.tensor([[2, 3]], dtype=torch.int32))
        encoder = model.sam_prompt_encoder
        sparse, dense = encoder(points=points, boxes=None, masks=torch.zeros(1, 1, 16, 16))
        positions = encoder.get_dense_pe()
        decoded = decode(model, features.embedding, features.fine_maps, sparse=sparse, dense=dense, positions=positions)
        seen = model.detail.look(features).maps
        refined, score, _ = model.detail(seen, Prompted(points, torch.ones(1, 32, 32)), decoded)
    assert decoded.logits.shape == (1, 4, 16, 16)
    assert refined.shape == (1, 32, 32)
    assert 0 <= score.item() <= 1
    assert ((decoded.scores >= 0) & (decoded.scores <= 1)).all()
    stored = sum(tensor.numel() * 2 for tensor in model.state_dict().values())
    assert stored < 16e6


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Small tensors: more threads would only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return packed_folder(tmp_path / "data").folder


def train(
    data: Path,
    output: Path,
    settings: TrainSettings,
    *,
    resume: bool = False,
    start: Path | None = None,
    on_progress: Callable[[TrainProgress], None] = lambda _: None,
) -> list[TrainProgress]:
    reports: list[TrainProgress] = []

    def listen(progress: TrainProgress) -> None:
        reports.append(progress)
        on_progress(progress)

    train_embedded(
        [data],
        output,
        images=None,
        start=start,
        settings=settings,
        packing=PACKING,
        device="cpu",
        resume=resume,
        on_packing=lambda *_: None,
        on_progress=listen,
    )
    return reports


def interrupt_at(step: int) -> Callable[[TrainProgress], None]:
    def on_progress(progress: TrainProgress) -> None:
        if progress.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    return on_progress


def same_weights(first: Path, second: Path) -> bool:
    one, two = (load_file(path / "embedded.safetensors") for path in (first, second))
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def test_an_interrupted_run_goes_on_as_if_nothing_had_been(folder: Path, tmp_path: Path) -> None:
    settings = replace(QUICK, validate_every=2, save_every=1000)
    whole = train(folder, tmp_path / "whole", settings)
    with pytest.raises(Interrupted, match=r"stopped after step 2; .*checkpoint\.pt"):
        train(folder, tmp_path / "cut", settings, on_progress=interrupt_at(1))
    rest = train(folder, tmp_path / "cut", settings, resume=True)
    assert [report.step for report in rest] == [3, 4]
    assert [report.loss for report in rest] == [report.loss for report in whole[2:]]
    assert same_weights(tmp_path / "whole", tmp_path / "cut")
    logs = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "cut")]
    one, two = ([(line["step"], line["loss"], line["validation"]) for line in log] for log in logs)
    assert one == two
    assert set(logs[0][-1]["validation"]) == {"coarse", "full", "box", "harm", "better", "iou_error"}


def test_a_killed_run_goes_on_from_its_checkpoint(folder: Path, tmp_path: Path) -> None:
    whole = train(folder, tmp_path / "whole", QUICK)

    def die(progress: TrainProgress) -> None:
        if progress.step == 3:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        train(folder, tmp_path / "cut", QUICK, on_progress=die)
    rest = train(folder, tmp_path / "cut", QUICK, resume=True)
    assert [report.loss for report in rest] == [report.loss for report in whole[2:]]
    assert same_weights(tmp_path / "whole", tmp_path / "cut")


def test_what_a_run_leaves(folder: Path, tmp_path: Path) -> None:
    settings = replace(QUICK, steps=2, validate_every=1)
    train(folder, tmp_path / "run", settings)
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left == {
        "run.json",
        "checkpoint.pt",
        "metrics.jsonl",
        "curves.png",
        "embedded.safetensors",
        "samples-000001.png",
        "samples-000002.png",
    }
    with Image.open(tmp_path / "run" / "samples-000002.png") as picture:
        assert picture.width > 4 * settings.side
    with Image.open(tmp_path / "run" / "curves.png") as picture:
        assert picture.width > 500
    record = read_run(tmp_path / "run")
    assert record.settings == settings
    assert record.data == (folder,)
    with safe_open(tmp_path / "run" / "embedded.safetensors", "pt") as weights:
        metadata = weights.metadata()
    assert json.loads(metadata["settings"]) == asdict(settings)
    assert metadata["data"] == "data"
    tensors = load_file(tmp_path / "run" / "embedded.safetensors")
    assert {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()} == {torch.float16}


def test_raw_data_are_packed_into_the_output(tmp_path: Path) -> None:
    raw = paint_folder(tmp_path / "raw", classes=False)
    train(raw, tmp_path / "run", replace(QUICK, steps=1))
    assert (tmp_path / "run" / "packed" / "pack.json").is_file()


def test_a_run_by_the_clock_ends(folder: Path, tmp_path: Path) -> None:
    settings = replace(QUICK, minutes=1e-6, steps=1000)
    reports = train(folder, tmp_path / "run", settings)
    assert [report.step for report in reports] == [1]
    assert reports[0].steps is None
    longer = train(folder, tmp_path / "run", replace(settings, minutes=None, steps=3), resume=True)
    assert [report.step for report in longer] == [2, 3]


def test_training_can_start_from_weights(folder: Path, tmp_path: Path) -> None:
    train(folder, tmp_path / "first", replace(QUICK, steps=1))
    start = tmp_path / "first" / "embedded.safetensors"
    settings = replace(QUICK, steps=1, learning_rate=1e-12, weight_decay=0.0)
    train(folder, tmp_path / "second", settings, start=start)
    first, second = (load_file(tmp_path / name / "embedded.safetensors") for name in ("first", "second"))
    learnt = [name for name in first if "running_" not in name and not name.endswith("num_batches_tracked")]
    assert all(torch.equal(first[name], second[name]) for name in learnt)


@pytest.mark.parametrize("part", ["detail", "sam2"])
def test_a_part_can_learn_alone(folder: Path, tmp_path: Path, part: Literal["detail", "sam2"]) -> None:
    train(folder, tmp_path / "first", replace(QUICK, steps=1))
    start = tmp_path / "first" / "embedded.safetensors"
    train(folder, tmp_path / "second", replace(QUICK, steps=2, part=part), start=start)
    before, after = (load_file(tmp_path / name / "embedded.safetensors") for name in ("first", "second"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith(DETAIL_PREFIX) == (part == "detail") for name in changed)


def test_weights_without_a_detail_head_can_be_given_one(folder: Path, tmp_path: Path) -> None:
    train(folder, tmp_path / "first", replace(QUICK, steps=1))
    whole = load_file(tmp_path / "first" / "embedded.safetensors")
    bare = {name: tensor for name, tensor in whole.items() if not name.startswith(DETAIL_PREFIX)}
    save_file(bare, tmp_path / "bare.safetensors")
    train(folder, tmp_path / "second", replace(QUICK, steps=1, part="detail"), start=tmp_path / "bare.safetensors")
    grown = load_file(tmp_path / "second" / "embedded.safetensors")
    assert grown.keys() == whole.keys()
    assert all(torch.equal(grown[name], bare[name]) for name in bare)


def test_a_detail_head_alone_needs_weights(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--from"):
        train(folder, tmp_path / "run", replace(QUICK, part="detail"))


def test_foreign_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(WeightsError, match="does not fit the embedded model"):
        train(folder, tmp_path / "run", QUICK, start=tmp_path / "other.pt")


def test_resuming_nothing_says_so(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing to resume"):
        train(folder, tmp_path / "none", QUICK, resume=True)
    with pytest.raises(DataError, match="nothing to resume"):
        read_run(tmp_path / "none")


def test_resuming_with_other_data_says_so(folder: Path, tmp_path: Path) -> None:
    train(folder, tmp_path / "run", replace(QUICK, steps=1))
    other = paint_folder(tmp_path / "other", classes=False, count=5)
    with pytest.raises(DataError, match="other data"):
        train(other, tmp_path / "run", replace(QUICK, steps=2), resume=True)


def test_a_damaged_checkpoint_says_so(folder: Path, tmp_path: Path) -> None:
    train(folder, tmp_path / "run", replace(QUICK, steps=1))
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:5000])
    with pytest.raises(DataError, match="can't be read as a checkpoint"):
        train(folder, tmp_path / "run", replace(QUICK, steps=2), resume=True)


def test_a_side_the_model_can_not_have_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="multiple of 32"):
        train(folder, tmp_path / "run", replace(QUICK, side=100))


def test_an_output_that_can_not_be_written_is_said(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file in the way")
    with pytest.raises(StorageError):
        train(folder, tmp_path / "run", replace(QUICK, steps=1))


def test_a_log_drops_what_will_be_written_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, step=0)
    for step in (1, 2, 3):
        log.write({"step": step})
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    MetricsLog(path, step=2).write({"step": 3})
    assert read_metrics(path) == [{"step": 1}, {"step": 2}, {"step": 3}]


def test_curves_are_drawn_of_a_run_that_was_never_measured() -> None:
    line = {"step": 50, "loss": 2.0, "images_per_second": 3.0, "validation": None}
    assert draw_curves([line]).startswith(b"\x89PNG")
