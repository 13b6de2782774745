"""Baselines, cascades and the oracle: the parts of the flow that exist for comparison."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from fakes import BrightBackend, BrightPrediction
from PIL import Image

from refinetool import masks
from refinetool.backends import Embedding, Prediction
from refinetool.baselines.classical import grabcut, smooth
from refinetool.baselines.grid import grid_points, max_iou, merged
from refinetool.candidates import choose
from refinetool.errors import DataError, UsageError
from refinetool.masks import disc_radius
from refinetool.records import BoolArray, FloatArray, Outcome, Prompts, Region, Sample
from refinetool.refine import Refiner, load_refiner
from refinetool.running.journal import Journal
from refinetool.running.truth import with_truth
from refinetool.settings import METHODS, NO_GUARD, GridSettings, PromptSettings, RefineSettings, SnapSettings
from refinetool.statuses import Reason

SIZE = (60, 80)
PLAIN = RefineSettings(guard=NO_GUARD, snap=SnapSettings(mode="none"))


def rectangle(x0: int, y0: int, x1: int, y1: int) -> BoolArray:
    mask = np.zeros(SIZE, dtype=np.bool_)
    mask[y0:y1, x0:x1] = True
    return mask


TRUTH = rectangle(20, 15, 50, 40)
COARSE = rectangle(17, 18, 52, 41)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    noise = np.random.default_rng(0).integers(0, 30, (*SIZE, 3))
    image = np.where(TRUTH[..., None], 200 + noise, 20 + noise).astype(np.uint8)
    path = tmp_path / "picture.png"
    Image.fromarray(image).save(path)
    return path


def sample_of(path: Path, coarse: BoolArray, truth: BoolArray | None = None) -> Sample:
    known = None if truth is None else masks.encode(truth)
    return Sample("one", path, SIZE, (Region(5, 1, masks.encode(coarse), truth=known),))


def refined(refiner: Refiner, sample: Sample) -> Outcome:
    prepared = refiner.prepare(sample)
    return refiner.finish(prepared, refiner.segment(prepared.jobs))


def mask_of(outcome: Outcome) -> BoolArray:
    (annotation,) = outcome.annotations
    assert annotation.mask is not None
    return masks.decode(annotation.mask)


# --- without a model


@pytest.mark.parametrize("method", ["grabcut", "guided", "smooth"])
def test_classical_methods_load_no_model_and_predict_no_iou(method: str, picture: Path) -> None:
    refiner = load_refiner("sam-vit-h", checkpoint=None, device="cpu", precision="fp32", settings=METHODS[method])
    outcome = refined(refiner, sample_of(picture, COARSE))
    (annotation,) = outcome.annotations
    assert annotation.refined
    assert annotation.predicted_iou is None
    assert annotation.coarse_iou == pytest.approx(masks.iou(mask_of(outcome), COARSE))


def test_grabcut_finds_an_object_of_its_own_colour(picture: Path) -> None:
    refiner = load_refiner("embedded", checkpoint=None, device="cpu", precision="fp32", settings=METHODS["grabcut"])
    near = rectangle(18, 17, 51, 42)  # off by no more than its band
    found = mask_of(refined(refiner, sample_of(picture, near)))
    assert masks.iou(found, TRUTH) > 0.97 > masks.iou(near, TRUTH) + 0.1


def test_grabcut_of_a_mask_that_fills_the_picture_is_that_mask() -> None:
    image = np.zeros((8, 9, 3), np.uint8)
    assert grabcut(image, np.ones((8, 9), np.bool_), band_share=0.2, rounds=1).all()


def test_grabcut_touches_nothing_beyond_its_band(picture: Path) -> None:
    image = np.array(Image.open(picture))
    far = rectangle(2, 2, 12, 12)  # far from the object of another colour
    changed = grabcut(image, far, band_share=0.2, rounds=2) ^ far
    distance = masks.distance_inside(~far, border_is_background=False)
    depth = masks.distance_inside(far, border_is_background=False)
    assert (distance + depth)[changed].max(initial=0) <= max(1.0, 0.2 * disc_radius(far))


def test_smoothing_fills_a_hole_and_drops_a_speck() -> None:
    mask = rectangle(10, 10, 50, 50)
    ragged = mask.copy()
    ragged[30, 30], ragged[5, 70] = False, True
    calm = smooth(ragged, sigma_share=0.06)
    assert calm[30, 30]
    assert not calm[5, 70]
    assert masks.iou(calm, mask) > 0.97


def test_a_class_map_refined_without_a_model_has_no_score(picture: Path) -> None:
    sample = replace(sample_of(picture, COARSE), layout="semantic")
    refiner = load_refiner("embedded", checkpoint=None, device="cpu", precision="fp32", settings=METHODS["smooth"])
    (annotation,) = refined(refiner, sample).annotations
    assert annotation.refined
    assert annotation.predicted_iou is None


# --- automatic masks


def test_grid_points_are_the_centres_of_equal_tiles() -> None:
    points = grid_points((40, 80), per_side=4)
    assert len(points) == 16
    assert points[0].tolist() == [9.5, 4.5]
    assert points[-1].tolist() == [69.5, 34.5]


def portions(found: Sequence[BoolArray], scores: Sequence[float]) -> Iterator[tuple[BoolArray, FloatArray]]:
    """The masks in portions of two."""
    for start in range(0, len(found), 2):
        yield np.stack(found[start : start + 2]), np.array(scores[start : start + 2], np.float32)


def test_choices_among_automatic_masks_equal_a_plain_loop() -> None:
    rng = np.random.default_rng(3)
    corners = rng.integers((0, 0, 8, 8), (60, 40, 40, 40), (9, 4))
    found = [rectangle(x, y, x + w, y + h) for x, y, w, h in corners]
    scores = rng.random(9).tolist()
    coarse = np.stack([COARSE, rectangle(0, 0, 30, 30), rectangle(70, 50, 80, 60)])
    best = max_iou(portions(found, scores), coarse, settings=GridSettings())
    union = merged(portions(found, scores), coarse, settings=GridSettings())
    for n, mask in enumerate(coarse):
        ious = [masks.iou(segment, mask) for segment in found]
        if max(ious) > 0:
            first = int(np.argmax(ious))
            assert (best.masks[n] == found[first]).all()
            assert best.predicted_iou[n] == pytest.approx(scores[first])
        taken = [k for k, segment in enumerate(found) if (segment & mask).sum() / segment.sum() > 0.5]
        expected = np.any([found[k] for k in taken], axis=0) if taken else np.zeros(SIZE, np.bool_)
        assert (union.masks[n] == expected).all()
        if taken:
            assert union.predicted_iou[n] == pytest.approx(np.mean([scores[k] for k in taken]))


class GridBackend(BrightBackend):
    """Answers a point with a box around it; every other point is answered unsurely."""

    def predict(self, embeddings: Sequence[Embedding], prompts: Sequence[Prompts]) -> list[Prediction]:
        predictions: list[Prediction] = []
        for embedding, asked in zip(embeddings, prompts, strict=True):
            assert asked.boxes is None
            corners = np.concatenate([asked.points[:, 0] - 15, asked.points[:, 0] + 15], axis=1).clip(0)
            predictions.append(BrightPrediction(corners, embedding.bright, 0.95))  # type: ignore[attr-defined]
        return predictions


@pytest.mark.parametrize("method", ["grid-max-iou", "grid-merge"])
@pytest.mark.parametrize("prompt_batch", [1, 7, 64])
def test_grid_methods_choose_among_what_the_model_finds(method: str, prompt_batch: int, picture: Path) -> None:
    settings = replace(METHODS[method], prompt_batch=prompt_batch, grid=replace(GridSettings(), points_per_side=6))
    outcome = refined(Refiner(GridBackend(), settings), sample_of(picture, COARSE))
    (annotation,) = outcome.annotations
    assert annotation.refined
    found = mask_of(outcome)
    assert not (found & ~TRUTH).any(), "the model only finds what is bright"
    if method == "grid-merge":
        assert (found == TRUTH).all(), "all of it is covered by boxes that lie mostly inside the coarse mask"


def test_a_part_without_an_automatic_mask_stays_coarse(picture: Path) -> None:
    settings = replace(METHODS["grid-merge"], grid=replace(GridSettings(), min_predicted_iou=0.99))
    outcome = refined(Refiner(GridBackend(), settings), sample_of(picture, COARSE))
    assert [annotation.status for annotation in outcome.annotations] == ["kept:empty-result"]


# --- cascades


@dataclass(frozen=True)
class Listening(BrightBackend):
    """Remembers what it was asked."""

    heard: list[Prompts] = field(default_factory=list)

    def predict(self, embeddings: Sequence[Embedding], prompts: Sequence[Prompts]) -> list[Prediction]:
        self.heard.extend(prompts)
        return super().predict(embeddings, prompts)


@pytest.mark.parametrize("cascade", ["regen", "logits-a", "logits-b"])
def test_what_each_pass_of_a_cascade_asks(cascade: str, picture: Path) -> None:
    backend = Listening()
    settings = replace(PLAIN, passes=3, cascade=cascade)  # type: ignore[arg-type]
    refined(Refiner(backend, settings), sample_of(picture, COARSE))
    first, *later = backend.heard
    assert len(later) == 2
    assert (first.masks is None) == (cascade == "logits-a")
    for asked in later:
        assert asked.masks is not None
        assert asked.boxes is not None
        assert (asked.labels[:, 0] == 1).all()
        logits = set(np.unique(asked.masks)) == {-8.0, 8.0}  # what the fake model gives
        assert logits == (cascade != "regen")


# --- candidates and the oracle


def test_the_oracle_takes_the_candidate_nearest_to_the_truth(picture: Path) -> None:
    """Candidate 1 of the fake is everything in the box, 2 the bright pixels, 3 nothing."""
    tight = replace(PLAIN, prompts=PromptSettings(box="tight"), keep_candidates=True)
    for truth, expected in ((TRUTH, 2), (COARSE, 1)):
        oracle = replace(tight, selection="oracle")
        (annotation,) = refined(Refiner(BrightBackend(), oracle), sample_of(picture, COARSE, truth)).annotations
        offered = annotation.candidates
        assert offered is not None
        assert offered.selected == expected
        ious = [masks.iou(masks.decode(rle), truth) for rle in offered.masks]
        assert ious[expected] == max(ious[1:])
        assert annotation.mask == offered.masks[expected]


@pytest.mark.parametrize(("offered", "taken"), [([0.9], 0), ([0.9, 0.1], 1), ([0.9, 0.1, 0.3], 2)])
def test_the_single_mask_is_taken_only_where_there_is_no_other(offered: list[float], taken: int) -> None:
    class Scored(BrightPrediction):
        scores = np.tile(np.array(offered, np.float32), (3, 1))

    prediction = Scored(np.zeros((3, 4), np.float32), TRUTH, 0.0)
    chosen = choose(prediction, coarse=np.stack([COARSE] * 3), truth=None, selection="predicted")
    assert chosen.tolist() == [taken] * 3


def test_candidates_survive_the_journal(picture: Path, tmp_path: Path) -> None:
    settings = replace(PLAIN, keep_candidates=True)
    sample = sample_of(picture, COARSE)
    outcome = refined(Refiner(BrightBackend(), settings), sample)
    assert outcome.annotations[0].candidates is not None
    with Journal(tmp_path / "journal.jsonl", job={}, fresh=False) as journal:
        assert journal.reuse(sample) is None
        journal.append(outcome, seconds=0.1)
    with Journal(tmp_path / "journal.jsonl", job={}, fresh=False) as journal:
        assert journal.reuse(sample) == outcome
        assert journal.reuse(sample_of(picture, COARSE, TRUTH)) is None, "other truth, other oracle"


def test_truth_is_matched_by_image_and_id(picture: Path) -> None:
    crowd = Region(6, 1, masks.encode(COARSE), keep=Reason.CROWD)
    alone = Region(7, 1, masks.encode(COARSE))
    sample = replace(sample_of(picture, COARSE), regions=(crowd, *sample_of(picture, COARSE).regions, alone))
    (informed,) = with_truth([sample], [sample_of(picture, TRUTH), replace(sample_of(picture, TRUTH), key="other")])
    assert [region.keep for region in informed.regions] == ["crowd", None, "no-truth"]
    assert informed.regions[1].truth == masks.encode(TRUTH)


def test_class_maps_have_no_oracle(picture: Path) -> None:
    sample = replace(sample_of(picture, COARSE), layout="semantic")
    with pytest.raises(UsageError, match="class map"):
        list(with_truth([sample], [sample]))


def test_truth_of_another_size_is_refused(picture: Path) -> None:
    small = Sample("one", picture, (6, 8), (Region(5, 1, masks.encode(TRUTH[:6, :8])),))
    with pytest.raises(DataError, match="8 x 6"):
        list(with_truth([sample_of(picture, COARSE)], [small]))
