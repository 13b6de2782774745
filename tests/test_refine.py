"""The flow, with a model whose answers are known: bright pixels near the box."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar, Literal

import cv2
import numpy as np
import pytest
from fakes import BrightBackend, BrightEmbedding
from PIL import Image

from refinetool import masks
from refinetool.backends import Embedding, Prediction
from refinetool.errors import DataError, ImageError, UsageError
from refinetool.records import BoolArray, ImageArray, Layout, Outcome, Prompts, Region, Sample
from refinetool.refine import Refiner
from refinetool.settings import (
    NO_GUARD,
    CompetitionSettings,
    GuardSettings,
    GuardThresholds,
    ModelDefaults,
    PromptSettings,
    RefineSettings,
    SnapSettings,
    ViewSettings,
)
from refinetool.statuses import Reason

SIZE = (60, 80)


def rectangle(x0: int, y0: int, x1: int, y1: int) -> BoolArray:
    mask = np.zeros(SIZE, dtype=np.bool_)
    mask[y0:y1, x0:x1] = True
    return mask


TRUTHS = (rectangle(8, 8, 30, 28), rectangle(45, 20, 70, 50))
COARSE = (rectangle(10, 10, 31, 29), rectangle(43, 22, 72, 48))


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    image = np.zeros((*SIZE, 3), np.uint8)
    for truth in TRUTHS:
        image[truth] = 255
    path = tmp_path / "picture.png"
    Image.fromarray(image).save(path)
    return path


def pixels(path: Path) -> ImageArray:
    return np.array(Image.open(path))


def sample_of(
    path: Path, found: list[BoolArray], layout: Layout = "instances", void: BoolArray | None = None
) -> Sample:
    regions = tuple(Region(n + 1, None, masks.encode(mask)) for n, mask in enumerate(found))
    return Sample("one", path, SIZE, regions, layout, None if void is None else masks.encode(void))


def run(refiner: Refiner, sample: Sample) -> Outcome:
    prepared = refiner.prepare(sample)
    return refiner.finish(prepared, refiner.segment(prepared.jobs))


def decoded(outcome: Outcome) -> list[BoolArray]:
    return [masks.decode(annotation.mask) for annotation in outcome.annotations if annotation.mask is not None]


@pytest.mark.parametrize("view", ["frame", "crop"])
def test_bright_objects_are_recovered_in_every_view(picture: Path, view: str) -> None:
    settings = RefineSettings(view=ViewSettings(mode=view, min_side_px=20))  # type: ignore[arg-type]
    outcome = run(Refiner(BrightBackend(), settings), sample_of(picture, list(COARSE)))
    for found, truth, annotation in zip(decoded(outcome), TRUTHS, outcome.annotations, strict=True):
        assert annotation.refined
        assert annotation.predicted_iou == pytest.approx(0.9)
        assert (found == truth).all()


def test_coarse_iou_is_that_of_the_refined_mask(picture: Path) -> None:
    outcome = run(Refiner(BrightBackend(), RefineSettings()), sample_of(picture, list(COARSE)))
    for annotation, coarse, truth in zip(outcome.annotations, COARSE, TRUTHS, strict=True):
        assert annotation.coarse_iou == pytest.approx((coarse & truth).sum() / (coarse | truth).sum())


def test_regions_without_a_usable_mask_pass_through_in_place(picture: Path) -> None:
    crowd = Region(7, 1, masks.encode(COARSE[1]), keep=Reason.CROWD)
    broken = Region(8, 1, None, keep=Reason.UNREADABLE_MASK)
    empty = Region(9, 1, masks.encode(np.zeros(SIZE, np.bool_)))
    good = Region(10, 1, masks.encode(COARSE[0]))
    sample = Sample("one", picture, SIZE, (crowd, broken, empty, good))
    outcome = run(Refiner(BrightBackend(), RefineSettings()), sample)
    assert [annotation.status for annotation in outcome.annotations] == [
        "kept:crowd",
        "kept:unreadable-mask",
        "kept:empty",
        "refined",
    ]
    assert [annotation.mask for annotation in outcome.annotations[:3]] == [crowd.mask, None, empty.mask]


def test_a_sample_without_work_asks_the_model_nothing(picture: Path) -> None:
    refiner = Refiner(BrightBackend(), RefineSettings())
    prepared = refiner.prepare(Sample("one", picture, SIZE, ()))
    assert prepared.jobs == ()
    assert refiner.finish(prepared, refiner.segment(prepared.jobs)).annotations == ()


def test_batch_equals_singles(picture: Path) -> None:
    refiner = Refiner(BrightBackend(), RefineSettings(view=ViewSettings(mode="crop", min_side_px=20)))
    samples = [sample_of(picture, [COARSE[0]]), sample_of(picture, list(COARSE)), sample_of(picture, [])]
    prepared = [refiner.prepare(sample) for sample in samples]
    answers = iter(refiner.segment([job for one in prepared for job in one.jobs]))
    together = [refiner.finish(one, [next(answers) for _ in one.jobs]) for one in prepared]
    assert together == [run(refiner, sample) for sample in samples]


@pytest.mark.parametrize(
    ("backend", "coarse", "status"),
    [
        (BrightBackend(score=0.2), COARSE[0], "kept:low-score"),
        (BrightBackend(), rectangle(32, 52, 42, 58), "kept:empty-result"),
        (BrightBackend(), rectangle(2, 2, 11, 11), "kept:drift"),
    ],
)
def test_the_guard_keeps_the_coarse_mask(picture: Path, backend: BrightBackend, coarse: BoolArray, status: str) -> None:
    tight = RefineSettings(prompts=PromptSettings(box="tight"), guard=GuardSettings(0.5, 0.3, 3.0, 0.0))
    outcome = run(Refiner(backend, tight), sample_of(picture, [coarse]))
    assert outcome.annotations[0].status == status
    assert (decoded(outcome)[0] == coarse).all()


def test_later_passes_start_from_the_refined_mask(picture: Path) -> None:
    far = rectangle(24, 12, 34, 26)  # one pass of at most 10 % per side does not reach the far edge of the truth
    settings = RefineSettings(guard=GuardSettings(0, 0, 1e9, -1))
    areas = [
        decoded(run(Refiner(BrightBackend(), replace(settings, passes=passes)), sample_of(picture, [far])))[0].sum()
        for passes in (1, 3, 6)
    ]
    assert areas[0] < areas[1] < areas[2]


def test_parts_of_a_class_are_refined_apart_and_united(picture: Path) -> None:
    both = COARSE[0] | COARSE[1]
    speck = rectangle(0, 58, 2, 60)
    outcome = run(Refiner(BrightBackend(), RefineSettings()), sample_of(picture, [both | speck], "semantic"))
    assert outcome.annotations[0].refined
    assert (decoded(outcome)[0] == (TRUTHS[0] | TRUTHS[1] | speck)).all()


@pytest.mark.parametrize("layout", ["semantic", "indexed"])
def test_regions_of_one_map_stay_disjoint_and_out_of_the_void(picture: Path, layout: Layout) -> None:
    void = rectangle(8, 8, 12, 28)
    overlapping = [COARSE[0], rectangle(14, 5, 33, 30) & ~COARSE[0]]
    outcome = run(Refiner(BrightBackend(), RefineSettings()), sample_of(picture, overlapping, layout, void))
    first, second = decoded(outcome)
    assert not (first & second).any()
    assert not ((first | second) & void).any()


class Smeared(BrightBackend):
    """A model whose answers are two pixels too wide, as those of a coarse grid can be."""

    def predict(self, embeddings: Sequence[Embedding], prompts: Sequence[Prompts]) -> list[Prediction]:
        wide = [BrightEmbedding(cv2.dilate(e.bright.astype(np.uint8), np.ones((5, 5))) > 0) for e in embeddings]  # type: ignore[attr-defined]
        return super().predict(wide, prompts)


@pytest.mark.parametrize(("mode", "exact"), [("none", False), ("guided", True)])
def test_snapping_follows_the_edge(picture: Path, mode: Literal["none", "guided"], exact: bool) -> None:
    settings = RefineSettings(snap=SnapSettings(mode=mode, radius=0.3, epsilon=1e-4), guard=NO_GUARD)
    outcome = run(Refiner(Smeared(), settings), sample_of(picture, list(COARSE)))
    ious = [masks.iou(found, truth) for found, truth in zip(decoded(outcome), TRUTHS, strict=True)]
    assert all((iou > 0.99) == exact for iou in ious), ious


def test_snapping_brings_no_new_pieces(picture: Path) -> None:
    """A bright speck near a bright object is within reach of the filter, and was not asked about."""
    with Image.open(picture) as image:
        spotted = np.array(image)
    spotted[16:20, 31:33] = 255  # a pixel beside the first object
    Image.fromarray(spotted).save(picture)

    class Blind(BrightBackend):
        def embed(self, images: Sequence[ImageArray]) -> list[Embedding]:
            return [BrightEmbedding(TRUTHS[0] | TRUTHS[1]) for _ in images]

    settings = RefineSettings(snap=SnapSettings(mode="guided", radius=0.9, epsilon=1e-6), guard=NO_GUARD)
    outcome = run(Refiner(Blind(), settings), sample_of(picture, [COARSE[0]]))
    assert masks.components(decoded(outcome)[0]).areas.size == 1


@pytest.mark.parametrize(
    ("chosen", "status"),
    [
        (GuardSettings(), "kept:low-score"),
        (GuardSettings(min_predicted_iou=0.4), "refined"),
    ],
)
def test_none_stands_for_what_suits_the_model(picture: Path, chosen: GuardSettings, status: str) -> None:
    backend = BrightBackend(score=0.5, defaults=ModelDefaults(guard=GuardThresholds(min_predicted_iou=0.6)))
    refiner = Refiner(backend, RefineSettings(guard=chosen))
    assert run(refiner, sample_of(picture, [COARSE[0]])).annotations[0].status == status


def test_settings_are_resolved_once_and_for_all() -> None:
    suits = ModelDefaults(
        view="crop",
        selection="single",
        snap="guided",
        guard=GuardThresholds(0.1, 0.2, sure_iou=0.9, min_coarse_iou=0.3, max_area_ratio=4.0),
        competition=0.4,
    )
    resolved = RefineSettings().resolved(suits)
    assert (resolved.view.mode, resolved.selection, resolved.snap.mode) == ("crop", "single", "guided")
    guard = resolved.guard
    assert (guard.min_predicted_iou, guard.min_expected_gain, guard.sure_iou) == (0.1, 0.2, 0.9)
    assert (guard.min_coarse_iou, guard.max_area_ratio) == (0.3, 4.0)
    assert resolved.competition.weight == 0.4
    assert resolved.resolved(ModelDefaults()) == resolved
    chosen = RefineSettings(
        selection="coarse",
        view=ViewSettings(mode="frame"),
        snap=SnapSettings(mode="none"),
        competition=CompetitionSettings(weight=0.0),
    )
    kept = chosen.resolved(suits)
    assert (kept.view, kept.selection, kept.snap) == (chosen.view, chosen.selection, chosen.snap)
    assert kept.competition == chosen.competition


def test_objects_compete_for_what_both_claim(picture: Path) -> None:
    left, right = rectangle(43, 20, 60, 50), rectangle(57, 20, 72, 50)
    found = {}
    for weight in (0.0, 1.0):
        settings = RefineSettings(guard=NO_GUARD, competition=CompetitionSettings(weight=weight))
        found[weight] = decoded(run(Refiner(BrightBackend(), settings), sample_of(picture, [left, right])))
    both = found[0.0][0] & found[0.0][1]
    assert both.any()
    # The model is equally sure of both, so neither has more than half of the probability.
    for before, after in zip(found[0.0], found[1.0], strict=True):
        assert (after == (before & ~both)).all()


@pytest.mark.parametrize(("score", "said"), [(1.3, 1.0), (-0.2, 0.0)])
def test_scores_beyond_zero_and_one_are_clipped(picture: Path, score: float, said: float) -> None:
    """SAM's IoU head has no sigmoid."""
    settings = RefineSettings(guard=NO_GUARD, selection="single")
    outcome = run(Refiner(BrightBackend(score=score), settings), sample_of(picture, [COARSE[0]]))
    assert outcome.annotations[0].predicted_iou == said


class Points(BrightBackend):
    """Writes down the positive points that it is asked about."""

    asked: ClassVar[list[tuple[float, ...]]] = []

    def predict(self, embeddings: Sequence[Embedding], prompts: Sequence[Prompts]) -> list[Prediction]:
        self.asked.extend(tuple(point) for one in prompts for point in one.points[:, 0].tolist())
        return super().predict(embeddings, prompts)


def points_of(sample: Sample, *, seed: int, passes: int) -> list[tuple[float, ...]]:
    """The random points that are asked about a sample, pass after pass."""
    settings = RefineSettings(seed=seed, passes=passes, guard=NO_GUARD, prompts=PromptSettings(point="random"))
    Points.asked.clear()
    run(Refiner(Points(), settings), sample)
    return list(Points.asked)


def random_points(picture: Path, regions: Sequence[int], *, seed: int, key: str = "one") -> list[tuple[float, ...]]:
    """The random points of two passes about some of the regions, by region."""
    found = tuple(
        Region(n + 1, None, masks.encode(mask), keep=None if n in regions else Reason.CROWD)
        for n, mask in enumerate(COARSE)
    )
    return sorted(points_of(Sample(key, picture, SIZE, found), seed=seed, passes=2))


def test_random_points_depend_on_the_region_and_nothing_else(picture: Path) -> None:
    both = random_points(picture, [0, 1], seed=3)
    assert both == sorted(random_points(picture, [0], seed=3) + random_points(picture, [1], seed=3))
    assert both != random_points(picture, [0, 1], seed=4)
    assert both != random_points(picture, [0, 1], seed=3, key="two")


def test_equal_masks_get_random_points_of_their_own(picture: Path) -> None:
    """In each region, in each part of a class, and in each pass, where the masks don't tell the draws apart."""
    alike = points_of(sample_of(picture, [TRUTHS[0]] * 2), seed=3, passes=2)
    assert len(set(alike)) == 4, "two regions, two passes; the second finds what the first was given"
    squares = [rectangle(5, 40, 15, 50), rectangle(60, 5, 70, 15)]
    parts = points_of(sample_of(picture, [squares[0] | squares[1]], "semantic"), seed=3, passes=1)
    places = {(x - 5, y - 40) if x < 20 else (x - 60, y - 5) for x, y in parts}
    assert len(parts) == len(places) == 2, "not the same place in both squares"


@pytest.mark.parametrize("seen", [TRUTHS[0] & ~TRUTHS[0], TRUTHS[1]], ids=["nothing", "one of two"])
def test_a_pass_that_loses_a_mask_starts_from_the_one_before(picture: Path, seen: BoolArray) -> None:
    class Forgetful(BrightBackend):
        """Finds only what is seen the first time, and what is bright the next."""

        calls: ClassVar[list[int]] = []

        def predict(self, embeddings: Sequence[Embedding], prompts: Sequence[Prompts]) -> list[Prediction]:
            self.calls.append(1)
            if len(self.calls) == 1:
                embeddings = [BrightEmbedding(seen) for _ in embeddings]
            return super().predict(embeddings, prompts)

    settings = RefineSettings(passes=2, view=ViewSettings(mode="frame"))
    outcome = run(Refiner(Forgetful(), settings), sample_of(picture, list(COARSE)))
    assert [(found == truth).all() for found, truth in zip(decoded(outcome), TRUTHS, strict=True)] == [True, True]


def test_an_object_inside_another_survives_the_merge(picture: Path) -> None:
    """The model finds the large object where the small one lies, and neither vanishes."""
    inner = rectangle(14, 12, 24, 22)
    outer = COARSE[0] & ~inner
    for order in ([inner, outer], [outer, inner]):
        outcome = run(Refiner(BrightBackend(), RefineSettings()), sample_of(picture, order, "indexed"))
        small = order.index(inner) if order[0] is inner else 1
        found = decoded(outcome)
        assert outcome.annotations[small].mask is not None
        assert found[small].any(), "no region vanishes"
        assert not (found[0] & found[1]).any()
        if outcome.annotations[small].status == "kept:crowded-out":
            assert (found[small] == order[small]).all(), "it keeps its pixels"
            assert (found[1 - small] == (TRUTHS[0] & ~inner)).all(), "the rest is merged around it"


def test_a_region_that_others_crowd_out_keeps_its_coarse_mask(picture: Path) -> None:
    inner = rectangle(14, 12, 24, 22)
    outer = COARSE[0] & ~inner
    outcome = run(Refiner(BrightBackend(), RefineSettings()), sample_of(picture, [inner, outer], "indexed"))
    assert [annotation.status for annotation in outcome.annotations] == ["kept:crowded-out", "refined"]
    assert outcome.annotations[0].mask == masks.encode(inner)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (RefineSettings(passes=0), "number of passes is 0"),
        (
            RefineSettings(prompts=PromptSettings(use_point=False, use_negative=False, use_box=False, use_mask=False)),
            "no prompt",
        ),
    ],
)
def test_settings_that_refine_nothing_are_refused(settings: RefineSettings, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Refiner(BrightBackend(), settings)


def test_an_image_in_memory_has_no_ground_truth_to_choose_by(picture: Path) -> None:
    refiner = Refiner(BrightBackend(), RefineSettings(selection="oracle"))
    with pytest.raises(UsageError, match="refine_dataset"):
        refiner.refine_image(picture, COARSE)


def test_refine_image_returns_arrays_in_order(picture: Path) -> None:
    refined = Refiner(BrightBackend(), RefineSettings()).refine_image(
        pixels(picture), np.stack([COARSE[1], COARSE[0], np.zeros(SIZE, np.bool_)])
    )
    assert [found.status for found in refined] == ["refined", "refined", "kept:empty"]
    assert (refined[0].mask == TRUTHS[1]).all()
    assert (refined[1].mask == TRUTHS[0]).all()


@pytest.mark.parametrize(
    ("image", "coarse", "said"),
    [
        (np.zeros((*SIZE, 3), np.float32), np.zeros((1, *SIZE), np.bool_), "expected uint8"),
        (np.zeros((*SIZE, 4), np.uint8), np.zeros((1, *SIZE), np.bool_), "expected uint8 (H, W, 3)"),
        (np.zeros(SIZE, np.uint8), np.zeros((1, *SIZE), np.bool_), "expected uint8 (H, W, 3)"),
        (np.zeros((*SIZE, 3), np.uint8), np.zeros((1, 80, 60), np.bool_), "expected (N, 60, 80)"),
        (np.zeros((*SIZE, 3), np.uint8), np.full((1, *SIZE), np.nan), "NaN"),
        (np.zeros((*SIZE, 3), np.uint8), np.full((1, *SIZE), 0.7), "0.7"),
    ],
)
def test_refine_image_says_what_is_wrong(image: ImageArray, coarse: BoolArray, said: str) -> None:
    with pytest.raises(DataError) as failure:
        Refiner(BrightBackend(), RefineSettings()).refine_image(image, coarse)
    assert said in str(failure.value)


def test_an_image_of_another_size_is_refused(picture: Path) -> None:
    mask = np.ones((30, 80), np.bool_)
    sample = Sample("one", picture, (30, 80), (Region(1, None, masks.encode(mask)),))
    with pytest.raises(ImageError) as failure:
        Refiner(BrightBackend(), RefineSettings()).prepare(sample)
    assert failure.value.reason == "size-mismatch"


@pytest.mark.parametrize("layout", ["semantic", "indexed"])
def test_a_kept_region_of_a_map_keeps_its_pixels_against_a_refined_one(picture: Path, layout: Layout) -> None:
    kept_mask = rectangle(8, 8, 14, 28)  # inside the bright object that the other region will claim
    regions = (
        Region(1, None, masks.encode(COARSE[0] & ~kept_mask)),
        Region(2, None, masks.encode(kept_mask), keep=Reason.CROWD),
    )
    outcome = run(Refiner(BrightBackend(), RefineSettings()), Sample("one", picture, SIZE, regions, layout))
    first, second = decoded(outcome)
    assert [annotation.status for annotation in outcome.annotations] == ["refined", "kept:crowd"]
    assert (second == kept_mask).all()
    assert (first == (TRUTHS[0] & ~kept_mask)).all()


def test_a_class_of_specks_is_kept_as_too_small(picture: Path) -> None:
    specks = rectangle(0, 58, 2, 60) | rectangle(50, 2, 51, 4)
    outcome = run(Refiner(BrightBackend(), RefineSettings()), sample_of(picture, [specks], "semantic"))
    assert outcome.annotations[0].status == "kept:too-small"
    assert (decoded(outcome)[0] == specks).all()
