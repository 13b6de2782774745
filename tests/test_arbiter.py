"""The arbiter: its network and its files, what it is asked, what becomes of its answers, and how it is trained."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import Command
from fakes import BrightBackend
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_competition import HALF, HEIGHT, WIDTH, asked, part_of, ramp, separate
from training_data import paint_folder

from refinetool import load
from refinetool.backends.models import load_backend
from refinetool.competition import arbiter_for, compete, contest_of, denials
from refinetool.errors import DataError, Interrupted, UsageError, WeightsError
from refinetool.masks import encode
from refinetool.modules.arbiter import ArbiterNet, network_inputs, read_arbiter, serialise_arbiter
from refinetool.records import BoolArray, Contest, FloatMap, Layout, Region, Sample
from refinetool.refine import Refiner, load_refiner
from refinetool.settings import (
    ArbiterTrainSettings,
    CompetitionSettings,
    ExclusiveSettings,
    RefineSettings,
    ViewSettings,
)
from refinetool.train.arbiter.contests import (
    Case,
    Contests,
    contests_in,
    distinct,
    gather_contests,
    share_pixels,
    stacked,
)
from refinetool.train.arbiter.run import (
    ArbiterRun,
    contest_loss,
    gathered,
    read_record,
    settled_logits,
    train_arbiter,
)
from refinetool.train.data.pictures import AnnotatedPicture, SourcePicture
from refinetool.train.data.sources import list_pictures
from refinetool.train.steps import TrainProgress

SIDE = 32


class Bold:
    """An arbiter that raises all logits, and keeps what it is asked."""

    def __init__(self, moved: float, *, least_px: int = 0) -> None:
        self.moved = moved
        self.least_px = least_px
        self.asked: list[Contest] = []

    def settle(self, contest: Contest) -> FloatMap:
        self.asked.append(contest)
        return np.full(contest.logits.shape, self.moved, np.float32)


def contest(seed: int, side: int = SIDE) -> Contest:
    rng = np.random.default_rng(seed)
    logits, denied = rng.normal(0, 4, (2, side, side)).astype(np.float32)
    coarse, others = rng.random((2, side, side)).astype(np.float32)
    pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
    return Contest(logits, -np.abs(denied), coarse, others, pixels, exclusive=seed % 2 == 0)


def shaken(seed: int) -> ArbiterNet:
    """A network whose last layer is not zero."""
    torch.manual_seed(seed)
    network = ArbiterNet().eval()
    torch.nn.init.normal_(network.leave.weight)
    torch.nn.init.constant_(network.weight, -0.2)
    return network


# --- the network and its files


def test_a_new_network_changes_nothing() -> None:
    with torch.inference_mode():
        assert (ArbiterNet()(**network_inputs([contest(0)])) == 0).all()


def test_a_batch_is_its_singles_on_any_grid() -> None:
    network = shaken(1)
    for side in (SIDE, 56):
        three = [contest(n, side) for n in range(3)]
        with torch.inference_mode():
            together = network(**network_inputs(three))
            for one, expected in zip(three, together, strict=True):
                torch.testing.assert_close(network(**network_inputs([one]))[0], expected, rtol=1e-4, atol=1e-4)
        assert together.shape == (3, side, side)


@pytest.mark.parametrize("name", ["logits", "denied", "coarse", "others", "pixels", "exclusive"])
def test_the_network_sees_everything(name: str) -> None:
    one, other = contest(1), contest(2)
    mixed = replace(one, **{name: getattr(other, name)})
    with torch.inference_mode():
        answers = shaken(2)(**network_inputs([one, mixed]))
    assert (answers[0] - answers[1]).abs().max() > 1e-2


ABOUT: dict[str, Any] = {"steps": 7, "settings": {"min_object_px": 31}}


def write_arbiter(path: Path, seed: int = 3, about: dict[str, Any] = ABOUT) -> ArbiterNet:
    network = shaken(seed)
    path.write_bytes(serialise_arbiter(network, about))
    return network


def test_a_file_gives_the_network_back(tmp_path: Path) -> None:
    path = tmp_path / "arbiter.safetensors"
    network = write_arbiter(path)
    found = read_arbiter(path)
    with torch.inference_mode():
        expected = network(**network_inputs([contest(4)]))[0]
    np.testing.assert_allclose(found.settle(contest(4)), expected, atol=1e-4)
    assert (found.about, found.least_px) == (ABOUT, 31)
    write_arbiter(path, seed=4)
    assert read_arbiter(path).digest != found.digest


def text(path: Path) -> None:
    path.write_text("an arbiter?")


def foreign(path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, path)


def cut(path: Path) -> None:
    write_arbiter(path)
    path.write_bytes(path.read_bytes()[:-100])


def changed(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    write_arbiter(path)
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    change(tensors)
    save_file(tensors, path, metadata=metadata)


def not_finite(path: Path) -> None:
    changed(path, lambda tensors: tensors["leave.bias"].fill_(torch.nan))


def incomplete(path: Path) -> None:
    changed(path, lambda tensors: tensors.pop("leave.bias"))


def for_unknown_sizes(path: Path) -> None:
    write_arbiter(path, about={"steps": 7})


@pytest.mark.parametrize("spoil", [text, foreign, cut, not_finite, incomplete, for_unknown_sizes])
def test_damaged_files_are_refused_in_one_sentence(spoil: Callable[[Path], None], tmp_path: Path) -> None:
    path = tmp_path / "arbiter.safetensors"
    spoil(path)
    with pytest.raises(WeightsError, match=r"arbiter\.safetensors: this is not an arbiter") as caught:
        load_backend("embedded", checkpoint=None, device="cpu", precision="fp32", arbiter=path)
    assert "\n" not in str(caught.value)


# --- which model has one


def test_the_embedded_model_has_arbiters(tmp_path: Path) -> None:
    def backend(checkpoint: str | None = None, **more: Any) -> Any:
        return load_backend("embedded", checkpoint=checkpoint, device="cpu", precision="fp32", **more)

    own = backend()
    assert {arbiter.least_px for arbiter in own.arbiters} == {36, 200}
    for other in (backend("random:0"), backend(head="none"), backend(head="sam2refiner")):
        assert not other.arbiters
    write_arbiter(tmp_path / "mine.safetensors")
    mine = backend(arbiter=tmp_path / "mine.safetensors")
    assert [arbiter.least_px for arbiter in mine.arbiters] == [31]
    assert mine.fingerprint != own.fingerprint
    assert mine.base_fingerprint == own.base_fingerprint
    write_arbiter(tmp_path / "mine.safetensors", about={"settings": {"min_object_px": 400}})
    assert backend(arbiter=tmp_path / "mine.safetensors").fingerprint != mine.fingerprint, "asked for other masks"


@pytest.mark.parametrize(
    "settings",
    [
        RefineSettings(competition=CompetitionSettings(weight=0.0)),
        RefineSettings(competition=CompetitionSettings(arbitrate=False)),
        RefineSettings(method="grid-merge"),
        RefineSettings(method="grabcut"),
    ],
)
def test_an_arbiter_that_would_settle_nothing_is_refused(settings: RefineSettings, tmp_path: Path) -> None:
    """Even if it can't be read: the contradiction is what the user should hear of."""
    with pytest.raises(UsageError, match="nothing to settle"):
        load("embedded", device="cpu", settings=settings, arbiter=tmp_path / "missing.safetensors")


def test_an_arbiter_for_a_model_whose_objects_do_not_compete_is_refused(tmp_path: Path) -> None:
    """Only the model's defaults tell, once it is loaded."""
    write_arbiter(tmp_path / "mine.safetensors")
    with pytest.raises(UsageError, match="nothing to settle"):
        load("sam2.1-hiera-t", checkpoint="random:0", device="cpu", arbiter=tmp_path / "mine.safetensors")


# --- what it is asked, and what becomes of its answers


def test_its_moves_are_added_to_what_competition_does() -> None:
    jobs, answers = separate([(0, 0, 12, HEIGHT), (18, 0, WIDTH, HEIGHT)], [ramp(rising=False), ramp(rising=True)])
    plain = compete(jobs, answers, settings=HALF)
    arbiter = Bold(3.0)
    bold = compete(jobs, answers, settings=HALF, arbiters=[arbiter])
    assert len(arbiter.asked) == 2
    for before, after, answer in zip(plain, bold, answers, strict=True):
        assert before.logits is not None and after.logits is not None
        np.testing.assert_allclose(after.logits, before.logits + 3, atol=1e-5)
        assert (after.masks == (after.logits > 0)).all()
        assert (after.masks & ~answer.masks).any(), "it may add pixels"


def test_an_arbiter_is_left_out_where_objects_do_not_compete_or_logits_are_unknown() -> None:
    jobs, answers = separate([(0, 0, 12, HEIGHT)], [ramp(rising=False)])
    arbiter = Bold(3.0)
    compete(jobs, answers, settings=CompetitionSettings(weight=0.0), arbiters=[arbiter])
    compete(jobs, [replace(answers[0], logits=None)], settings=HALF, arbiters=[arbiter])
    assert arbiter.asked == []


def test_a_mask_that_nobody_contests_is_settled_too() -> None:
    jobs, answers = separate([(0, 0, 12, HEIGHT)], [ramp(rising=False)])
    arbiter = Bold(3.0)
    (found,) = compete(jobs, answers, settings=HALF, arbiters=[arbiter])
    assert [(one.denied == 0).all() and (one.others == 0).all() for one in arbiter.asked] == [True]
    assert found.logits is not None
    np.testing.assert_allclose(found.logits[0], ramp(rising=False) + 3, atol=1e-5)
    assert (found.masks == (found.logits > 0)).all()


def test_masks_smaller_than_those_it_learnt_from_are_left_to_the_rule() -> None:
    boxes, logits = [(0, 0, 12, HEIGHT), (18, 0, WIDTH, HEIGHT)], [ramp(rising=False) - 1, ramp(rising=True)]
    jobs, answers = separate(boxes, logits)
    small, large = (int(job.coarse.sum()) for job in jobs)
    assert small < large
    plain = compete(jobs, answers, settings=HALF)
    arbiter = Bold(3.0, least_px=large)
    settled = compete(jobs, answers, settings=HALF, arbiters=[arbiter])
    assert len(arbiter.asked) == 1
    for before, after, moved in zip(plain, settled, (0, 3), strict=True):
        assert before.logits is not None and after.logits is not None
        np.testing.assert_allclose(after.logits, before.logits + moved, atol=1e-5)
        assert (after.masks == (after.logits > 0)).all()


@given(least=st.lists(st.integers(0, 50), unique=True), pixels=st.integers(0, 60))
def test_the_arbiter_for_the_largest_masks_that_are_not_larger_is_asked(least: list[int], pixels: int) -> None:
    asked = arbiter_for(pixels, [Bold(0.0, least_px=each) for each in least])
    below = [each for each in sorted(least) if each <= pixels]
    assert (asked.least_px if asked else None) == (below[-1] if below else None)


def test_a_contest_shows_the_image_and_all_other_masks() -> None:
    """In windows of their own, against maps of the whole image."""
    rng = np.random.default_rng(5)
    windows, boxes = [(0, 0, 16, 16), (8, 0, 24, 16), (10, 8, 26, 24)], [(2, 2, 9, 9), (8, 3, 20, 12), (12, 10, 20, 20)]
    image = rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    coarse = [rng.random((y1 - y0, x1 - x0)) < 0.6 for x0, y0, x1, y1 in boxes]
    jobs, answers = [], []
    for n, (window, box) in enumerate(zip(windows, boxes, strict=True)):
        x0, y0, x1, y1 = window
        job, answer = asked(window, [part_of(n, box, coarse[n])], [rng.normal(0, 3, (y1 - y0, x1 - x0))])
        own = np.zeros((HEIGHT, WIDTH), np.bool_)
        own[box[1] : box[3], box[0] : box[2]] = coarse[n]
        jobs.append(replace(job, pixels=image[y0:y1, x0:x1], coarse=own[None, y0:y1, x0:x1]))
        answers.append(answer)
    whole = np.zeros((3, HEIGHT, WIDTH), np.bool_)
    for n, (x0, y0, x1, y1) in enumerate(boxes):
        whole[n, y0:y1, x0:x1] = coarse[n]
    every_part = [part for job in jobs for part in job.parts]
    found = list(denials(jobs, answers, max_shared=0.5))
    assert [number for number, _, _ in found] == [0, 1, 2]
    for number, row, denied in found:
        logits = answers[number].logits
        assert logits is not None
        made = contest_of(jobs[number], row, logits[row], denied, every_part, exclusive=number == 1)
        x0, y0, x1, y1 = windows[number]
        others = np.delete(whole, number, axis=0).any(axis=0)
        assert made.exclusive == (number == 1)
        assert (made.logits == logits[row]).all()
        assert (made.pixels == image[y0:y1, x0:x1]).all()
        assert (made.coarse == whole[number, y0:y1, x0:x1]).all()
        assert (made.others == others[y0:y1, x0:x1]).all()
        np.testing.assert_allclose(made.denied, denied, atol=1e-6)


@pytest.mark.parametrize(
    ("layout", "arbitrate", "exclusive", "told"),
    [
        ("instances", True, False, {False}),
        ("instances", True, True, {True}),
        ("indexed", True, False, {True}),
        ("semantic", True, False, {True}),
        ("indexed", False, True, set()),
    ],
)
def test_it_is_told_where_objects_cannot_overlap(
    layout: Layout, arbitrate: bool, exclusive: bool, told: set[bool]
) -> None:
    arbiter = Bold(0.0)
    settings = RefineSettings(
        competition=CompetitionSettings(weight=1.0, arbitrate=arbitrate), exclusive=ExclusiveSettings(enabled=exclusive)
    )
    refiner = Refiner(BrightBackend(arbiters=[arbiter]), settings)
    image = np.full((60, 80, 3), 255, np.uint8)
    halves = [np.arange(80)[None].repeat(60, 0) // 40 == n for n in range(2)]
    regions = tuple(Region(n + 1, None, encode(mask)) for n, mask in enumerate(halves))
    prepared = refiner.prepare_pixels(Sample("one", Path(), (60, 80), regions, layout), image)
    refiner.finish(prepared, refiner.segment(prepared.jobs))
    assert {contest.exclusive for contest in arbiter.asked} == told


# --- training

QUICK = ArbiterTrainSettings(
    steps=6, contests_per_step=2, contests=6, validation_contests=2, validate_every=3, save_every=3, min_object_px=50
)


def touching_folder(folder: Path) -> Path:
    """Images of two boxes side by side, so that they compete."""
    data = paint_folder(folder, classes=False, count=5)
    from PIL import Image

    for path in (data / "masks").iterdir():
        ids = np.zeros((90, 120), np.uint8)
        ids[15:70, 10:60], ids[15:70, 60:110] = 1, 2
        Image.fromarray(ids).save(path)
    return data


def quick_run(data: Path) -> ArbiterRun:
    return ArbiterRun((data,), None, "embedded", "random:1", QUICK)


def train(
    run: ArbiterRun,
    output: Path,
    *,
    resume: bool = False,
    on_progress: Callable[[TrainProgress], None] = lambda _: None,
) -> Path:
    return train_arbiter(
        run, output, device="cpu", resume=resume, on_gathering=lambda *_: None, on_progress=on_progress
    )


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    data = touching_folder(tmp_path / "data")
    whole = train(quick_run(data), tmp_path / "whole")

    def stop(progress: TrainProgress) -> None:
        if progress.step == 4:
            raise Interrupted("stop")

    with pytest.raises(Interrupted):
        train(quick_run(data), tmp_path / "halves", on_progress=stop)
    run = read_record(tmp_path / "halves")
    assert run == quick_run(data)
    halves = train(run, tmp_path / "halves", resume=True)
    assert halves.read_bytes() == whole.read_bytes()
    assert read_arbiter(whole).about["steps"] == 6
    data.joinpath("images", "0.jpg").touch()
    with pytest.raises(DataError, match="began with other data"):
        train(run, tmp_path / "halves", resume=True)


def listed(folder: Path, *, min_object_px: int) -> list[SourcePicture]:
    return list_pictures(folder, images=None, validation_share=0.1, max_pixels=10**6, min_object_px=min_object_px)


def test_contests_depend_on_seed_and_images_alone(tmp_path: Path) -> None:
    pictures = listed(touching_folder(tmp_path), min_object_px=50)
    refiner = load_refiner("embedded", checkpoint="random:1", device="cpu", precision="fp32", settings=RefineSettings())

    def gather(count: int, seed: int = 0) -> Contests:
        return gather_contests(
            pictures, refiner, count=count, settings=replace(QUICK, seed=seed), on_progress=lambda *_: None
        )

    few, more, others = gather(3), gather(5), gather(3, seed=1)
    assert (len(few), len(more)) == (3, 5)
    assert torch.equal(few.coarse, more.coarse[:3])
    assert torch.equal(few.logits, more.logits[:3])
    assert not torch.equal(few.coarse, others.coarse)


def test_no_more_contests_are_measured_on_than_learnt_from(tmp_path: Path) -> None:
    run = quick_run(touching_folder(tmp_path))
    few = replace(run, settings=replace(run.settings, contests=2, validation_contests=600))
    totals: set[int] = set()
    training, validation = gathered(few, device="cpu", on_progress=lambda _, total: totals.add(total))
    assert (len(training), len(validation), totals) == (2, 2, {4})


def test_images_without_objects_are_refused(tmp_path: Path) -> None:
    pictures = listed(touching_folder(tmp_path), min_object_px=10**6)
    refiner = load_refiner("embedded", checkpoint="random:1", device="cpu", precision="fp32", settings=RefineSettings())
    huge = replace(QUICK, min_object_px=10**6)
    with pytest.raises(DataError, match="no image holds an object of at least 1000000 px"):
        gather_contests(pictures, refiner, count=3, settings=huge, on_progress=lambda *_: None)


def box(x0: int, x1: int) -> BoolArray:
    mask = np.zeros((10, 40), np.bool_)
    mask[:, x0:x1] = True
    return mask


def test_wholes_that_are_only_their_parts_are_left_out() -> None:
    parts, whole, behind, crossing = [box(0, 5), box(6, 12)], box(0, 5) | box(6, 12), box(0, 30), box(27, 40)
    kept = distinct([whole, behind, *parts, crossing])
    assert [mask.sum() for mask in kept] == [parts[0].sum(), parts[1].sum(), crossing.sum(), behind.sum()]


def test_shared_pixels_are_found() -> None:
    assert not share_pixels([])
    assert not share_pixels([box(0, 5), box(5, 9), box(9, 30)])
    assert share_pixels([box(0, 5), box(5, 9), box(8, 30)])


@pytest.mark.parametrize("shared", [0, 4])
def test_overlaps_of_the_source_are_learnt_as_they_are(shared: int) -> None:
    objects = [np.zeros((90, 120), np.bool_) for _ in range(2)]
    objects[0][15:70, 10 : 60 + shared], objects[1][15:70, 60:110] = True, True
    image = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    picture = AnnotatedPicture(image, tuple(objects), np.zeros((90, 120), np.bool_))
    refiner = Refiner(BrightBackend(), RefineSettings())
    made = replace(QUICK, flat_share=0, sparse_share=0)
    flat = replace(QUICK, flat_share=1, told_share=1, sparse_share=0)

    def cases(settings: ArbiterTrainSettings) -> list[Case]:
        rows = (contests_in("x", picture, refiner, np.random.default_rng(n), settings=settings) for n in range(8))
        return [found for row in rows for found in row]

    areas = {int(mask.sum()) for mask in objects}
    assert all(bool(case.contest.exclusive) is (shared == 0) for case in cases(flat))
    assert {int(case.truth.sum()) for case in cases(flat)} == areas
    assert ({int(case.truth.sum()) for case in cases(made)} == areas) is (shared > 0)


def test_a_mirrored_contest_is_seen_in_a_mirror() -> None:
    masks = [np.arange(SIDE * SIDE).reshape(SIDE, SIDE) % (n + 2) == 0 for n in range(2)]
    rows = stacked([Case(contest(n), mask, masks[1 - n]) for n, mask in enumerate(masks)])
    mirrored = rows.mirrored()
    assert torch.equal(mirrored.pixels[0, 3, 0], rows.pixels[0, 3, SIDE - 1])
    assert torch.equal(mirrored.logits, rows.logits.flip(2))
    assert torch.equal(mirrored.truth, rows.truth.flip(2))
    assert torch.equal(mirrored.known, rows.known.flip(2))
    assert torch.equal(mirrored.exclusive, rows.exclusive)


def test_the_network_learns_what_the_others_say() -> None:
    """Where others deny a cell, it is never the object's; so it should learn to give it up."""
    rng = np.random.default_rng(0)
    found = []
    for n in range(8):
        one = contest(n)
        wide, theirs = np.zeros((SIDE, SIDE), np.bool_), np.zeros((SIDE, SIDE), np.bool_)
        wide[4:28, 4:28] = True
        theirs[:, int(rng.integers(14, 20)) :] = True
        denied = np.where(theirs, -1.0, 0.0).astype(np.float32)
        one = replace(one, logits=np.where(wide, 2, -4).astype(np.float32), denied=denied)
        found.append(Case(one, wide & ~theirs, np.zeros((SIDE, SIDE), np.bool_)))
    rows = stacked(found)
    torch.manual_seed(0)
    network, settings = ArbiterNet(), ArbiterTrainSettings()
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-3)

    def loss() -> torch.Tensor:
        return contest_loss(settled_logits(network, rows, weight=0.35), rows, settings=settings).total

    before = loss().item()
    for _ in range(30):
        optimizer.zero_grad()
        loss().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    assert loss().item() < 0.5 * before


def test_the_loss_is_that_of_the_definition() -> None:
    draws = [np.random.default_rng(n).random((2, SIDE, SIDE)) for n in range(6)]
    rows = stacked([Case(contest(n), draw[0] < 0.4, draw[1] < 0.2) for n, draw in enumerate(draws)])
    settings = ArbiterTrainSettings()
    moved = rows.logits.float() + torch.randn(rows.logits.shape, generator=torch.Generator().manual_seed(0))
    expected, harmed, below_coarse = 0.0, 0, 0
    for n in range(6):
        truth, known = draws[n][0] < 0.4, draws[n][1] >= 0.2
        denied = rows.denied[n].float().numpy()

        def chances(logits: torch.Tensor) -> FloatMap:
            return np.asarray(1 / (1 + np.exp(-logits.double().numpy())))

        def soft(p: FloatMap, t: BoolArray = truth, k: BoolArray = known) -> float:
            return float((p * t)[k].sum() / (p + t - p * t)[k].sum())

        p, alone = chances(moved[n]), rows.logits[n].float()
        heavy = 1 + settings.contested_weight * (denied < settings.contested_below)
        expected += (heavy * -np.log(np.where(truth, p, 1 - p)) * known).mean() + 1 - soft(p)
        before = max(soft(chances(alone)), soft(chances(alone + settings.competition * rows.denied[n].float())))
        expected += settings.harm_weight * max(0.0, before - soft(p))
        coarse = soft((rows.coarse[n] > 127).numpy().astype(np.float32))
        expected += settings.coarse_harm_weight * max(0.0, coarse - soft(p))
        harmed += before > soft(p)
        below_coarse += coarse > soft(p)
    assert 0 < harmed < 6
    assert 0 < below_coarse < 6
    assert contest_loss(moved, rows, settings=settings).total.item() == pytest.approx(expected / 6, rel=1e-4)


def test_the_command_writes_what_refine_takes(command: Command, tmp_path: Path) -> None:
    data, out = touching_folder(tmp_path / "data"), tmp_path / "run"
    options = ("--checkpoint", "random:1", "--contests", 4, "--steps", 2, "--batch", 2, "--min-object-px", 150)
    made = command("train", "arbiter", "--data", data, "-o", out, *options)
    assert made.code == 0, made.err
    assert "arbiter.safetensors" in made.out
    file = out / "arbiter.safetensors"
    assert read_arbiter(file).least_px == 150
    refiner = load("embedded", checkpoint="random:1", device="cpu", arbiter=file)
    masks = np.stack([np.arange(80)[None].repeat(60, 0) // 40 == n for n in range(2)])
    assert len(refiner.refine_image(np.zeros((60, 80, 3), np.uint8), masks)) == 2
    again = command("train", "arbiter", "-o", tmp_path / "nothing", "--resume")
    assert again.code != 0
    assert "nothing to resume" in again.err


def test_views_of_many_objects_have_contests(tmp_path: Path) -> None:
    write_arbiter(tmp_path / "mine.safetensors")
    settings = RefineSettings(view=ViewSettings(mode="frame"))
    refiner = load(
        "embedded", checkpoint="random:1", device="cpu", settings=settings, arbiter=tmp_path / "mine.safetensors"
    )
    masks = np.stack([np.arange(80)[None].repeat(60, 0) // 40 == n for n in range(2)])
    assert len(refiner.refine_image(np.zeros((60, 80, 3), np.uint8), masks)) == 2
