"""Heads on SAM 2 models: their files, how they are chosen, and how they are trained."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_backends import picture, prompts_for
from torch import Tensor
from training_data import PACKING, QUICK, packed_folder

from refinetool.backends.models import find_model, head_weights, load_backend, load_network
from refinetool.errors import DataError, UsageError, WeightsError
from refinetool.modules.head_files import HeadRecord, base_digest, build_head, serialise_head
from refinetool.running.run import refine_dataset
from refinetool.settings import (
    NO_GUARD,
    TRAIN_EMBEDDED_HEAD,
    TRAIN_HEAD,
    UNBOUNDED,
    HeadKind,
    RefineSettings,
    TrainSettings,
    ViewSettings,
)
from refinetool.train.data.hqseg import MEASURING, TRAINING
from refinetool.train.data.sources import list_pictures
from refinetool.train.files import export, read_run
from refinetool.train.head.run import train_head
from refinetool.train.losses import point_loss
from refinetool.train.questions import BOX_ONLY, FULL, draw_clicks, mixed_groups
from refinetool.train.ranks import ALONE, Ranks
from refinetool.train.steps import TrainProgress

RANDOM = "random:0"
QUICK_HEAD = replace(
    QUICK,
    prompts="mixed",
    mask_loss="points",
    harm_loss=0.0,
    weight_decay=0.0,
    steps=3,
)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Small tensors: more threads would only wait for each other."""
    torch.set_num_threads(1)


def write_head(
    path: Path,
    *,
    kind: HeadKind = "sam2refiner",
    options: Mapping[str, Any] | None = None,
    model: str = "embedded",
    checkpoint: str | None = RANDOM,
    **changed: Any,
) -> Path:
    """A head with weights that matter, on a model with random weights."""
    sam, _ = load_network(find_model("embedded"), checkpoint)
    torch.manual_seed(1)
    head = build_head(kind, options or {}, sam)
    for parameter in head.parameters():
        parameter.data.add_(0.03 * torch.randn(parameter.shape))
    record = replace(HeadRecord(kind, options or {}, model, base_digest(sam), {"step": "3"}), **changed)
    path.write_bytes(serialise_head(head, record))
    return path


def load(head: str, *, checkpoint: str | None = RANDOM, model: str = "embedded", **more: Any) -> Any:
    return load_backend(model, checkpoint=checkpoint, device="cpu", precision="fp32", head=head, **more)


def grids(backend: Any) -> tuple[Tensor, Any]:
    size = (90, 120)
    (found,) = backend.predict(backend.embed([picture(size)]), [prompts_for(size, 2)])
    return found.grid, found.scores


# --- choosing a head


def test_the_default_head_of_the_embedded_model_is_its_own() -> None:
    auto, detail, none = load("auto"), load("detail"), load("none")
    assert auto.fingerprint == detail.fingerprint != none.fingerprint
    assert torch.equal(grids(auto)[0], grids(detail)[0])
    assert grids(auto)[0].shape[-1] == 128
    plain, scores = grids(none)
    assert plain.shape[-1] == 64
    tokens = auto.predict_tokens(auto.embed([picture((90, 120))])[0], prompts_for((90, 120), 2)).tokens
    torch.testing.assert_close(plain, tokens.grid)
    np.testing.assert_allclose(scores, tokens.scores, atol=1e-6)


def test_a_head_from_a_file_is_used(tmp_path: Path) -> None:
    path = write_head(tmp_path / "head.safetensors", options={"cues": True})
    backend = load(str(path))
    grid, scores = grids(backend)
    assert grid.shape[-1] == 256
    assert backend.fingerprint != load("auto").fingerprint
    without = grids(load("none"))
    # LA changes what the decoder sees, so all candidates move; the scores stay the decoder's.
    assert (grid[:, 0] - F.interpolate(without[0], scale_factor=4, mode="bilinear")[:, 0]).abs().max() > 0.1
    assert scores.shape == without[1].shape


def test_only_the_weights_of_a_head_count(tmp_path: Path) -> None:
    one = load(str(write_head(tmp_path / "one.safetensors")))
    other = load(str(write_head(tmp_path / "two.safetensors", about={"step": "4"})))
    moved = load(str(write_head(tmp_path / "three.safetensors", options={"residual": True})))
    assert one.fingerprint == other.fingerprint
    assert len({one.fingerprint, moved.fingerprint, load("none").fingerprint}) == 3


def test_the_guard_has_no_thresholds_for_other_heads(tmp_path: Path) -> None:
    for head in ("none", str(write_head(tmp_path / "head.safetensors"))):
        defaults = load(head).defaults
        guard = defaults.guard
        assert guard.min_predicted_iou == guard.min_expected_gain == UNBOUNDED
        assert guard.sure_iou == 1.0
        assert (guard.min_coarse_iou, guard.max_area_ratio) == (0.4, 2.5)
        assert defaults.selection == "single"
    assert load("auto").defaults.guard.min_expected_gain > 0


def test_random_weights_come_with_random_heads() -> None:
    first, second, other = (load("sam2refiner", checkpoint=f"random:{seed}") for seed in (3, 3, 4))
    assert first.fingerprint == second.fingerprint != other.fingerprint
    assert torch.equal(grids(first)[0], grids(second)[0])


def test_a_head_comes_with_the_embedded_model() -> None:
    """Trained on these weights: others are refused, so it must be trained again with them."""
    backend = load("sam2refiner", checkpoint=None)
    grid, _ = grids(backend)
    assert grid.shape[-1] == 256
    assert backend.fingerprint != load("auto", checkpoint=None).fingerprint
    assets = [path for path in head_weights(find_model("embedded"), "sam2refiner").parent.iterdir() if path.is_file()]
    assert sum(path.stat().st_size for path in assets) < 16e6


@pytest.mark.parametrize("head", ["detail", "sam2refiner"])
def test_sam_has_no_heads(head: str) -> None:
    with pytest.raises(UsageError, match=f"sam-vit-b can't have a head: .*--head {head}"):
        load(head, model="sam-vit-b")


def test_a_head_that_does_not_exist_is_named() -> None:
    with pytest.raises(
        UsageError, match=r"no head 'sam3refiner', and no such file; the choices are auto, none, detail"
    ):
        load("sam3refiner")
    with pytest.raises(UsageError, match=r"there is no sam2refiner head for sam2\.1-hiera-t yet"):
        from refinetool.backends.models import load_model_head

        load_model_head(find_model("sam2.1-hiera-t"), torch.nn.Linear(1, 1), "sam2refiner", checkpoint="weights.pt")


def test_another_base_is_refused(tmp_path: Path) -> None:
    path = write_head(tmp_path / "head.safetensors")
    with pytest.raises(WeightsError, match="trained on embedded with other weights than those loaded now"):
        load(str(path), checkpoint="random:1")
    other = write_head(tmp_path / "other.safetensors", model="sam2.1-hiera-t")
    with pytest.raises(WeightsError, match=r"trained on sam2\.1-hiera-t, but the model is embedded; use it with"):
        load(str(other))


def test_the_own_head_of_a_model_is_not_part_of_its_base() -> None:
    """Training the detail head on does not make other heads useless."""
    sam, _ = load_network(find_model("embedded"), RANDOM)
    before = base_digest(sam)
    with torch.no_grad():
        sam.get_parameter("detail.leave.weight").add_(1)
    assert base_digest(sam) == before
    with torch.no_grad():
        sam.get_parameter("no_mem_embed").add_(1)
    assert base_digest(sam) != before


def broken(kind: str, path: Path) -> Path:
    match kind:
        case "text":
            path.write_text("a head?")
        case "foreign":
            save_file({"weight": torch.zeros(3)}, path)
        case "cut":
            write_head(path)
            path.write_bytes(path.read_bytes()[:-100])
        case "nan":
            write_head(path)
            tensors = load_file(path)
            with safe_open(path, "pt") as file:
                metadata = file.metadata()
            tensors["mr.leave.bias"][:] = torch.nan
            save_file(tensors, path, metadata=metadata)
        case "options":
            write_head(path, options={}).touch()
            tensors = load_file(path)
            described = {"format": 1, "kind": "sam2refiner", "options": {"la": "no"}, "model": "embedded"}
            described |= {"base": "-", "about": {}}
            save_file(tensors, path, metadata={"refinetool_head": json.dumps(described)})
        case "misfit":
            write_head(path)
            sam, _ = load_network(find_model("embedded"), RANDOM)
            head = build_head("sam2refiner", {"pr": False}, sam)
            path.write_bytes(serialise_head(head, HeadRecord("sam2refiner", {}, "embedded", base_digest(sam), {})))
    return path


@pytest.mark.parametrize("kind", ["text", "foreign", "cut", "nan", "options", "misfit"])
def test_damaged_heads_are_refused_in_one_sentence(kind: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"head\.safetensors: (this is not a head|the head is damaged)") as caught:
        load(str(broken(kind, tmp_path / "head.safetensors")))
    assert "\n" not in str(caught.value)


def test_an_adapter_is_for_one_head(tmp_path: Path) -> None:
    from refinetool.modules.iou_adapter import IouAdapter, serialise

    head = str(write_head(tmp_path / "head.safetensors"))
    backend = load(head)
    layer = backend.score_layer
    down, up = torch.randn(2, layer.in_features), 0.1 * torch.randn(layer.out_features, 2)
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(serialise(IouAdapter(down, up, "embedded", backend.fingerprint, True, {})))
    adapted = load(head, iou_adapter=path)
    assert torch.equal(grids(adapted)[0], grids(backend)[0])
    assert not np.allclose(grids(adapted)[1], grids(backend)[1])
    with pytest.raises(WeightsError, match="other weights"):
        load("auto", iou_adapter=path)


# --- losses and prompts of training


def test_points_see_what_a_dense_loss_sees() -> None:
    """On masks without detail, the loss at points is that of all pixels."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.zeros(3, 64, 64, dtype=torch.bool)
    truth[:, :, 32:] = True
    weight = torch.ones(3, 32, 32)
    for logit in (-4.0, 0.5, 3.0):
        logits = torch.full((3, 8, 8), logit)
        p = torch.sigmoid(torch.tensor(logit))
        entropy = F.binary_cross_entropy_with_logits(torch.full((3, 64, 64), logit), truth.float())
        dice = 1 - 2 * p * 0.5 / (p + 0.5)
        found = point_loss(logits, truth, weight, generator=generator)
        assert found.item() == pytest.approx(float(entropy + dice), rel=0.02)


def test_points_are_where_the_mask_is_in_doubt() -> None:
    """Three quarters of the points lie where the logits are smallest, so errors there weigh most."""
    truth = torch.zeros(1, 64, 64, dtype=torch.bool)
    sure, unsure = torch.full((1, 64, 64), -8.0), torch.full((1, 64, 64), -8.0)
    sure[:, :8, :8] = 8.0  # wrong, and sure of it
    unsure[:, :8, :8] = 0.1  # wrong, and in doubt: 1.6 % of the square
    weight = torch.ones(1, 32, 32)
    losses = [
        point_loss(logits, truth, weight, generator=torch.Generator().manual_seed(0)) for logits in (sure, unsure)
    ]
    dense = F.binary_cross_entropy_with_logits(unsure, truth.float())
    assert losses[1] > 3 * dense
    assert losses[0] > losses[1]


def test_unknown_cells_hold_no_points() -> None:
    truth = torch.zeros(2, 64, 64, dtype=torch.bool)
    logits, weight = torch.full((2, 64, 64), -6.0), torch.ones(2, 32, 32)
    logits[:, :, 32:] = 6.0
    weight[:, :, 15:] = 0
    loss = point_loss(logits.requires_grad_(), truth, weight, generator=torch.Generator().manual_seed(0))
    loss.backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert not logits.grad[:, :, 33:].any()
    assert logits.grad[:, :, :28].any()


@given(seed=st.integers(0, 1000), count=st.integers(1, 10))
@settings(max_examples=20, deadline=None)
def test_clicks_are_inside_or_beside(seed: int, count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    truth = torch.zeros(2, 40, 40, dtype=torch.bool)
    truth[0, 10:20, 5:25] = True
    truth[0, 12:15, 8:12] = False
    truth[1] = True  # nothing beside it
    points, labels = draw_clicks(truth, count=count, generator=generator)
    assert points.shape == (2, count, 2)
    assert labels[:, 0].tolist() == [1, 1]
    assert (labels[1] != 0).all()
    for n in range(2):
        for (x, y), label in zip(points[n].int().tolist(), labels[n].tolist(), strict=True):
            if label >= 0:
                assert bool(truth[n, y, x]) == (label == 1)
            if n == 0 and label == 0:
                assert 9 <= y < 21, "within the box, enlarged by a fifth"
                assert 3 <= x < 27


@pytest.mark.parametrize("count", [1, 3, 4, 9])
def test_mixed_prompts_are_of_all_kinds(count: int) -> None:
    groups = mixed_groups(count, torch.Generator().manual_seed(5))
    assert sorted(row for rows, _ in groups for row in rows) == list(range(count))
    assert groups[0][1] == FULL
    if count >= 4:
        assert groups[1][1] == BOX_ONLY
        assert 1 <= groups[2][1].clicks <= 10
        assert groups[3][1].plain


# --- refining with a head

ONE_IMAGE = {"limit": 1, "device": "cpu", "precision": "fp32", "checkpoint": RANDOM}


@pytest.mark.parametrize(
    "changed",
    [
        RefineSettings(guard=NO_GUARD),
        RefineSettings(guard=NO_GUARD, passes=2),
        RefineSettings(guard=NO_GUARD, passes=2, cascade="logits-a"),
        RefineSettings(guard=NO_GUARD, passes=2, cascade="logits-b"),
        RefineSettings(guard=NO_GUARD, selection="predicted", view=ViewSettings(mode="frame")),
        RefineSettings(),
    ],
    ids=["plain", "passes", "cascade a", "cascade b", "frame", "guard"],
)
def test_everything_works_with_a_head(changed: RefineSettings, folder: Path, tmp_path: Path) -> None:
    head = write_head(tmp_path / "head.safetensors", options={"residual": True})
    output = tmp_path / "refined.json"
    summary = refine_dataset(folder / "coarse.json", output=output, head=str(head), settings=changed, **ONE_IMAGE)
    assert summary.masks == 1
    assert summary.failed == 0
    before, after = (json.loads(path.read_text()) for path in (folder / "coarse.json", output))
    assert [one["id"] for one in after["annotations"]] == [one["id"] for one in before["annotations"]]


def test_another_head_does_not_resume_a_run(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "refined.json"
    first = refine_dataset(folder / "coarse.json", output=output, head="none", **ONE_IMAGE)
    again = refine_dataset(folder / "coarse.json", output=output, head="none", resume=True, **ONE_IMAGE)
    other = refine_dataset(folder / "coarse.json", output=output, head="detail", resume=True, **ONE_IMAGE)
    assert (first.reused, again.reused, other.reused) == (0, 1, 0)
    assert other.redone == 1


def test_an_output_may_not_replace_the_head(folder: Path, tmp_path: Path) -> None:
    head = write_head(tmp_path / "head.json")
    with pytest.raises(UsageError, match="head"):
        refine_dataset(folder / "coarse.json", output=head, head=str(head), overwrite=True, **ONE_IMAGE)


# --- training


def train(
    data: Path,
    output: Path,
    trained: TrainSettings = QUICK_HEAD,
    *,
    kind: HeadKind = "sam2refiner",
    options: Mapping[str, Any] | None = None,
    checkpoint: str | None = RANDOM,
    model: str = "embedded",
    resume: bool = False,
    start: Path | None = None,
    on_progress: Callable[[TrainProgress], None] = lambda _: None,
) -> list[TrainProgress]:
    reports: list[TrainProgress] = []

    def listen(progress: TrainProgress) -> None:
        reports.append(progress)
        on_progress(progress)

    train_head(
        [data],
        output,
        model=model,
        checkpoint=checkpoint,
        kind=kind,
        options=options or {},
        images=None,
        start=start,
        settings=trained,
        packing=PACKING,
        device="cpu",
        ranks=ALONE,
        resume=resume,
        on_packing=lambda *_: None,
        on_progress=listen,
    )
    return reports


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    return packed_folder(tmp_path / "data").folder


def test_a_trained_head_is_one_that_refine_takes(pack: Path, tmp_path: Path) -> None:
    train(pack, tmp_path / "run", options={"cues": True})
    path = tmp_path / "run" / "head.safetensors"
    with safe_open(path, "pt") as file:
        described = json.loads(file.metadata()["refinetool_head"])
    assert (described["model"], described["kind"], described["options"]) == ("embedded", "sam2refiner", {"cues": True})
    assert json.loads(described["about"]["settings"])["prompts"] == "mixed"
    assert not any(name.startswith(("image_encoder", "sam_")) for name in load_file(path)), "only the head"
    assert grids(load(str(path)))[0].shape[-1] == 256
    assert read_run(tmp_path / "run").about["checkpoint"] == RANDOM


def test_a_resumed_head_equals_an_uninterrupted_one(pack: Path, tmp_path: Path) -> None:
    whole = train(pack, tmp_path / "whole", replace(QUICK_HEAD, steps=4))

    def die(progress: TrainProgress) -> None:
        if progress.step == 3:
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        train(pack, tmp_path / "cut", replace(QUICK_HEAD, steps=4), on_progress=die)
    rest = train(pack, tmp_path / "cut", replace(QUICK_HEAD, steps=4), resume=True)
    assert [report.step for report in rest] == [3, 4]
    assert [report.loss for report in rest] == [report.loss for report in whole[2:]]
    one, two = (load_file(tmp_path / name / "head.safetensors") for name in ("whole", "cut"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_detail_head_is_trained_the_same_way_alone_and_with_its_model(pack: Path, tmp_path: Path) -> None:
    from refinetool.train.embedded.run import train_embedded

    sam, _ = load_network(find_model("embedded"), RANDOM)
    export(sam.state_dict(), tmp_path / "whole.safetensors", metadata={})
    settings = replace(QUICK, steps=2, part="detail")
    train_embedded(
        [pack],
        tmp_path / "embedded",
        images=None,
        start=tmp_path / "whole.safetensors",
        settings=settings,
        packing=PACKING,
        device="cpu",
        resume=False,
        on_packing=lambda *_: None,
        on_progress=lambda _: None,
    )
    base, _ = load_network(find_model("embedded"), str(tmp_path / "whole.safetensors"))
    own = tmp_path / "start.safetensors"
    record = HeadRecord("detail", {}, "embedded", base_digest(base), {})
    own.write_bytes(serialise_head(base.get_submodule("detail"), record))
    train(pack, tmp_path / "alone", settings, checkpoint=str(tmp_path / "whole.safetensors"), start=own)
    together = load_file(tmp_path / "embedded" / "embedded.safetensors")
    alone = load_file(tmp_path / "alone" / "head.safetensors")
    for name, tensor in alone.items():
        assert torch.equal(tensor, together[f"detail.{name}"]), name


def test_a_head_can_go_on_from_a_head(pack: Path, tmp_path: Path) -> None:
    start = write_head(tmp_path / "start.safetensors", options={"residual": True})
    train(pack, tmp_path / "run", replace(QUICK_HEAD, learning_rate=1e-12), start=start)
    before, after = load_file(start), load_file(tmp_path / "run" / "head.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_what_can_not_be_trained_is_refused(pack: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="sam-vit-b can't have a head"):
        train(pack, tmp_path / "run", model="sam-vit-b")
    with pytest.raises(UsageError, match="multiple of 64"):
        train(pack, tmp_path / "run", replace(QUICK_HEAD, side=96))
    with pytest.raises(UsageError, match="no module is left"):
        train(pack, tmp_path / "run", options={"la": False, "pr": False, "mr": False})
    with pytest.raises(UsageError, match="cues"):
        train(pack, tmp_path / "run", options={"mr": False, "cues": True})
    with pytest.raises(DataError, match="nothing to resume"):
        train(pack, tmp_path / "run", resume=True)


def test_the_recipes_differ_in_size_only() -> None:
    assert TRAIN_HEAD.steps == 20 * 44_320 // 32
    for name in ("prompts", "mask_loss", "auxiliary_loss", "learning_rate", "weight_decay", "second_beta"):
        assert getattr(TRAIN_HEAD, name) == getattr(TRAIN_EMBEDDED_HEAD, name)


def test_processes_share_a_batch() -> None:
    numbers = torch.arange(10, 18)
    parts = [Ranks(rank, 4).share(numbers).tolist() for rank in range(4)]
    assert parts == [[10, 11], [12, 13], [14, 15], [16, 17]]
    assert torch.equal(ALONE.share(numbers), numbers)
    with pytest.raises(UsageError, match="8 images can't be shared by 3 processes"):
        Ranks(0, 3).share(numbers)


AGREEING = """
import torch
from refinetool.train.ranks import join_ranks

ranks, device = join_ranks("cpu")
tensors = [torch.full((2,), float(ranks.rank)), torch.tensor([[10.0 * ranks.rank]])]
ranks.average(tensors)
assert ranks.count == 2
assert tensors[0].tolist() == [0.5, 0.5]
assert tensors[1].tolist() == [[5.0]]
assert ranks.agree(7.0 + ranks.rank, device=device) == 7.0
ranks.wait()
"""


def with_torchrun(*arguments: str) -> None:
    """Run a program in two processes."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments]
    done = subprocess.run(
        torchrun, capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_processes_average_and_agree(tmp_path: Path) -> None:
    (tmp_path / "agreeing.py").write_text(AGREEING)
    with_torchrun(str(tmp_path / "agreeing.py"))


@pytest.mark.slow
def test_two_processes_train_one_head(pack: Path, tmp_path: Path) -> None:
    """From raw data, which only one of them packs; one writes what a single process would."""
    arguments = ["--data", str(pack.parent / "data"), "--checkpoint", RANDOM, "--device", "cpu", "--side", "64"]
    with_torchrun(
        "-m", "refinetool", "train", "head", *arguments, "--steps", "2", "--batch", "2", "-o", str(tmp_path / "run")
    )
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left == {
        "run.json",
        "checkpoint.pt",
        "metrics.jsonl",
        "curves.png",
        "head.safetensors",
        "packed",
        "samples-000002.png",
    }
    assert grids(load(str(tmp_path / "run" / "head.safetensors")))[0].shape[-1] == 256


def test_hqseg_is_read_from_hq_sams_folders(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number, (images, masks) in enumerate((TRAINING[0], TRAINING[2], MEASURING[1])):
        for folder in (images, masks):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        for stem in ("a", "b"):
            pixels = rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / images / f"{stem}.jpg")
            grey = np.zeros((40, 50), np.uint8)
            grey[5 : 20 + number, 10:30] = 255
            grey[5, 10] = 127
            Image.fromarray(grey).save(tmp_path / masks / f"{stem}.png")
    found = list_pictures(tmp_path, images=None, validation_share=0.5, max_pixels=10_000, min_object_px=1)
    assert [(picture.key, picture.validation) for picture in found] == [
        ("DIS-TR/im/a", False),
        ("DIS-TR/im/b", False),
        ("cascade_psp/fss_all/a", False),
        ("cascade_psp/fss_all/b", False),
        ("COIFT/images/a", True),
        ("COIFT/images/b", True),
    ]
    annotated = found[2].read()
    (mask,) = annotated.objects
    assert mask.sum() == 16 * 20 - 1
    assert annotated.image.shape == (40, 50, 3)
    (tmp_path / TRAINING[0][1] / "b.png").unlink()
    with pytest.raises(DataError, match=r"b\.jpg has no mask; expected .*b\.png"):
        list_pictures(tmp_path, images=None, validation_share=0.5, max_pixels=10_000, min_object_px=1)
