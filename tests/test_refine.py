"""The flow, with a model whose answers are known: bright pixels near the box."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fakes import BrightBackend
from PIL import Image

from refinetool import masks
from refinetool.candidates import packed
from refinetool.errors import DataError, ImageError
from refinetool.records import REFINED, BoolArray, ImageArray, Layout, Outcome, Region, Sample
from refinetool.refine import Refiner
from refinetool.settings import GuardSettings, PromptSettings, RefineSettings, SnapSettings, ViewSettings

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
    return refiner.finish(prepared, refiner.segment([prepared])[0])


def decoded(outcome: Outcome) -> list[BoolArray]:
    return [masks.decode(annotation.mask) for annotation in outcome.annotations if annotation.mask is not None]


@pytest.mark.parametrize("view", ["frame", "crop"])
def test_bright_objects_are_recovered_in_every_view(picture: Path, view: str) -> None:
    settings = RefineSettings(view=ViewSettings(mode=view, min_side_px=20))  # type: ignore[arg-type]
    outcome = run(Refiner(BrightBackend(), settings), sample_of(picture, list(COARSE)))
    for found, truth, annotation in zip(decoded(outcome), TRUTHS, outcome.annotations, strict=True):
        assert annotation.status == REFINED
        assert annotation.predicted_iou == pytest.approx(0.9)
        assert (found == truth).all()


def test_coarse_iou_is_that_of_the_refined_mask(picture: Path) -> None:
    outcome = run(Refiner(BrightBackend(), RefineSettings()), sample_of(picture, list(COARSE)))
    for annotation, coarse, truth in zip(outcome.annotations, COARSE, TRUTHS, strict=True):
        assert annotation.coarse_iou == pytest.approx((coarse & truth).sum() / (coarse | truth).sum())


def test_regions_without_a_usable_mask_pass_through_in_place(picture: Path) -> None:
    crowd = Region(7, 1, masks.encode(COARSE[1]), keep="crowd")
    broken = Region(8, 1, None, keep="unreadable-mask")
    empty = Region(9, 1, masks.encode(np.zeros(SIZE, np.bool_)))
    good = Region(10, 1, masks.encode(COARSE[0]))
    sample = Sample("one", picture, SIZE, (crowd, broken, empty, good))
    outcome = run(Refiner(BrightBackend(), RefineSettings()), sample)
    assert [annotation.status for annotation in outcome.annotations] == [
        "kept:crowd",
        "kept:unreadable-mask",
        "kept:empty",
        REFINED,
    ]
    assert [annotation.mask for annotation in outcome.annotations[:3]] == [crowd.mask, None, empty.mask]


def test_a_sample_without_work_asks_the_model_nothing(picture: Path) -> None:
    refiner = Refiner(BrightBackend(), RefineSettings())
    prepared = refiner.prepare(Sample("one", picture, SIZE, ()))
    assert len(prepared) == 0
    assert refiner.finish(prepared, refiner.segment([prepared])[0]).annotations == ()


def test_batch_equals_singles(picture: Path) -> None:
    refiner = Refiner(BrightBackend(), RefineSettings(prompt_batch=1, image_batch=2))
    samples = [sample_of(picture, [COARSE[0]]), sample_of(picture, list(COARSE)), sample_of(picture, [])]
    prepared = [refiner.prepare(sample) for sample in samples]
    together = [refiner.finish(one, answer) for one, answer in zip(prepared, refiner.segment(prepared), strict=True)]
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
    tight = RefineSettings(prompts=PromptSettings(box="tight"), guard=GuardSettings(0.5, 0.3, 3.0))
    outcome = run(Refiner(backend, tight), sample_of(picture, [coarse]))
    assert outcome.annotations[0].status == status
    assert (decoded(outcome)[0] == coarse).all()


def test_later_passes_start_from_the_refined_mask(picture: Path) -> None:
    far = rectangle(24, 12, 34, 26)  # one pass of at most 10 % per side does not reach the far edge of the truth
    settings = RefineSettings(guard=GuardSettings(0, 0, 1e9))
    areas = [
        decoded(run(Refiner(BrightBackend(), replace(settings, passes=passes)), sample_of(picture, [far])))[0].sum()
        for passes in (1, 3, 6)
    ]
    assert areas[0] < areas[1] < areas[2]


def test_parts_of_a_class_are_refined_apart_and_united(picture: Path) -> None:
    both = COARSE[0] | COARSE[1]
    speck = rectangle(0, 58, 2, 60)
    outcome = run(Refiner(BrightBackend(), RefineSettings()), sample_of(picture, [both | speck], "semantic"))
    assert outcome.annotations[0].status == REFINED
    assert (decoded(outcome)[0] == (TRUTHS[0] | TRUTHS[1] | speck)).all()


@pytest.mark.parametrize("layout", ["semantic", "indexed"])
def test_regions_of_one_map_stay_disjoint_and_out_of_the_void(picture: Path, layout: Layout) -> None:
    void = rectangle(8, 8, 12, 28)
    overlapping = [COARSE[0], rectangle(14, 5, 33, 30) & ~COARSE[0]]
    outcome = run(Refiner(BrightBackend(), RefineSettings()), sample_of(picture, overlapping, layout, void))
    first, second = decoded(outcome)
    assert not (first & second).any()
    assert not ((first | second) & void).any()


def test_snapping_follows_the_edge(picture: Path) -> None:
    settings = RefineSettings(snap=SnapSettings(mode="guided", radius=0.2, epsilon=1e-4))
    outcome = run(Refiner(BrightBackend(), settings), sample_of(picture, list(COARSE)))
    assert all((found == truth).all() for found, truth in zip(decoded(outcome), TRUTHS, strict=True))


def test_refine_image_returns_arrays_in_order(picture: Path) -> None:
    refined = Refiner(BrightBackend(), RefineSettings()).refine_image(
        pixels(picture), np.stack([COARSE[1], COARSE[0], np.zeros(SIZE, np.bool_)])
    )
    assert [found.status for found in refined] == [REFINED, REFINED, "kept:empty"]
    assert (refined[0].mask == TRUTHS[1]).all()
    assert (refined[1].mask == TRUTHS[0]).all()


@pytest.mark.parametrize(
    ("image", "coarse", "said"),
    [
        (np.zeros((*SIZE, 3), np.float32), np.zeros((1, *SIZE), np.bool_), "expected uint8"),
        (np.zeros((*SIZE, 3), np.uint8), np.zeros(SIZE, np.bool_), "expected (N, 60, 80)"),
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


def test_packed_groups_keep_order_and_fill_up_to_the_limit() -> None:
    pieces = [(0, slice(0, 4)), (0, slice(4, 8)), (1, slice(0, 4)), (2, slice(0, 4))]
    assert packed(pieces, [4, 1, 3, 2], limit=4) == [pieces[:1], pieces[1:3], pieces[3:]]


@pytest.mark.parametrize("layout", ["semantic", "indexed"])
def test_a_kept_region_of_a_map_keeps_its_pixels_against_a_refined_one(picture: Path, layout: Layout) -> None:
    kept_mask = rectangle(8, 8, 14, 28)  # inside the bright object that the other region will claim
    regions = (
        Region(1, None, masks.encode(COARSE[0] & ~kept_mask)),
        Region(2, None, masks.encode(kept_mask), keep="crowd"),
    )
    outcome = run(Refiner(BrightBackend(), RefineSettings()), Sample("one", picture, SIZE, regions, layout))
    first, second = decoded(outcome)
    assert [annotation.status for annotation in outcome.annotations] == [REFINED, "kept:crowd"]
    assert (second == kept_mask).all()
    assert (first == (TRUTHS[0] & ~kept_mask)).all()


def test_a_class_of_specks_is_kept_as_too_small(picture: Path) -> None:
    specks = rectangle(0, 58, 2, 60) | rectangle(50, 2, 51, 4)
    outcome = run(Refiner(BrightBackend(), RefineSettings()), sample_of(picture, [specks], "semantic"))
    assert outcome.annotations[0].status == "kept:too-small"
    assert (decoded(outcome)[0] == specks).all()
