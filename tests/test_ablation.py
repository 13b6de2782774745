"""The tables of ablations, with a model whose answers are known."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from fakes import BrightBackend
from PIL import Image

from refinetool import ablation, masks
from refinetool.ablation import ROWS, EmbedOnce, Row, is_top1, score_rows, score_splits
from refinetool.backends import Embedding
from refinetool.errors import DataError
from refinetool.masks import boundary_iou
from refinetool.records import BoolArray, ImageArray, Prompts, Region, Sample
from refinetool.refine import Refiner
from refinetool.settings import ABLATION, METHODS, PromptSettings

SIZE = (60, 80)
RATIO = 0.02


def rectangle(x0: int, y0: int, x1: int, y1: int) -> BoolArray:
    mask = np.zeros(SIZE, dtype=np.bool_)
    mask[y0:y1, x0:x1] = True
    return mask


TRUTHS = (rectangle(8, 8, 30, 28), rectangle(45, 20, 70, 50))
COARSE = (rectangle(10, 10, 31, 29), rectangle(43, 22, 72, 48))


@pytest.fixture
def sample(tmp_path: Path) -> Sample:
    image = np.zeros((*SIZE, 3), np.uint8)
    for truth in TRUTHS:
        image[truth] = 255
    Image.fromarray(image).save(tmp_path / "one.png")
    regions = tuple(
        Region(n, 1, masks.encode(coarse), truth=masks.encode(truth))
        for n, (coarse, truth) in enumerate(zip(COARSE, TRUTHS, strict=True))
    )
    return Sample("one", tmp_path / "one.png", SIZE, regions)


@dataclass(frozen=True)
class Counting(BrightBackend):
    """Counts what it encodes and remembers what it is asked."""

    encoded: list[int] = field(default_factory=list)
    asked: list[Prompts] = field(default_factory=list)

    def embed(self, images: Sequence[ImageArray]) -> list[Embedding]:
        self.encoded.append(len(images))
        return super().embed(images)


def test_scores_equal_refining_row_by_row(sample: Sample) -> None:
    rows = (Row("tight", replace(ABLATION, prompts=PromptSettings(box="tight"))), Row("elastic", ABLATION))
    before, *scores = score_rows(
        [sample], rows, BrightBackend(), boundary_ratio=RATIO, max_pixels=10**9, on_image=lambda: None
    )
    assert before.name == "coarse mask"
    assert before.iou == pytest.approx(np.mean([masks.iou(c, t) for c, t in zip(COARSE, TRUTHS, strict=True)]))
    for row, score in zip(rows, scores, strict=True):
        refiner = Refiner(BrightBackend(), row.settings)
        prepared = refiner.prepare(sample)
        outcome = refiner.finish(prepared, refiner.segment(prepared.jobs))
        found = [masks.decode(one.mask) for one in outcome.annotations if one.mask is not None]
        assert score.objects == 2
        assert score.iou == pytest.approx(np.mean([masks.iou(f, t) for f, t in zip(found, TRUTHS, strict=True)]))
        expected = np.mean([boundary_iou(f, t, RATIO) for f, t in zip(found, TRUTHS, strict=True)])
        assert score.boundary_iou == pytest.approx(expected)
        assert score.top1 == 1.0, "the fake is surest of the best candidate"


def test_an_image_is_encoded_once_for_all_rows(sample: Sample) -> None:
    backend = Counting()
    rows = ablation.box_rows(ABLATION)
    score_rows([sample, sample], rows, backend, boundary_ratio=RATIO, max_pixels=10**9, on_image=lambda: None)
    assert backend.encoded == [1, 1]


def test_one_embedding_serves_equal_pictures_alone() -> None:
    once = EmbedOnce(BrightBackend())
    dark, bright = np.zeros((4, 5, 3), np.uint8), np.full((4, 5, 3), 255, np.uint8)
    first, second, again = once.embed([dark, bright, dark])
    assert first is again
    assert first is not second
    once.forget()
    assert once.embed([dark])[0] is not first


def test_rows_of_table_1_ask_what_they_say() -> None:
    asked = {
        row.name: (row.settings.prompts.use_point, row.settings.prompts.use_box, row.settings.prompts.use_mask)
        for row in ROWS["prompts"](ABLATION)
    }
    assert asked == {
        "point": (True, False, False),
        "box": (False, True, False),
        "mask": (False, False, True),
        "point + box": (True, True, False),
        "point + mask": (True, False, True),
        "box + mask": (False, True, True),
        "all": (True, True, True),
    }
    assert all(row.settings.prompts.use_negative == row.settings.prompts.use_point for row in ROWS["prompts"](ABLATION))


def test_table_7_has_every_method() -> None:
    assert {row.name for row in ROWS["methods"](ABLATION)} == set(METHODS)


@pytest.mark.parametrize("name", [name for name in ROWS if name != "split"])
def test_no_table_has_two_rows_alike(name: ablation.TableName) -> None:
    rows = ROWS[name](ABLATION)
    assert len({row.name for row in rows}) == len(rows)
    assert len({repr(row.settings) for row in rows}) == len(rows)


def test_top1_counts_ties_as_right_and_leaves_hopeless_objects_out() -> None:
    assert is_top1([0.2, 0.8, 0.8], 2)
    assert is_top1([0.2, 0.8, 0.8 + 1e-7], 1)
    assert not is_top1([0.2, 0.8, 0.81], 1)
    assert is_top1([0.0, 0.0, 0.0], 1) is None


def test_an_empty_proposal_counts_as_empty(sample: Sample) -> None:
    dark = replace(sample, regions=(replace(sample.regions[0], mask=masks.encode(rectangle(32, 52, 42, 58))),))
    _, score = score_rows(
        [dark], [Row("all", ABLATION)], BrightBackend(), boundary_ratio=RATIO, max_pixels=10**9, on_image=lambda: None
    )
    assert score.iou == 0.0


def test_nothing_to_measure_is_said(sample: Sample) -> None:
    blind = replace(sample, regions=tuple(replace(region, truth=None) for region in sample.regions))
    with pytest.raises(DataError, match="no coarse mask has a ground truth"):
        score_rows(
            [blind],
            [Row("all", ABLATION)],
            BrightBackend(),
            boundary_ratio=RATIO,
            max_pixels=10**9,
            on_image=lambda: None,
        )


def test_class_maps_are_scored_with_and_without_splitting(sample: Sample) -> None:
    both = Region(1, 1, masks.encode(COARSE[0] | COARSE[1]))
    coarse = replace(sample, layout="semantic", regions=(both,))
    truth = replace(coarse, regions=(replace(both, mask=masks.encode(TRUTHS[0] | TRUTHS[1])),))
    before, *scores = score_splits(
        [(coarse, truth)], ROWS["split"](ABLATION), BrightBackend(), max_pixels=10**9, on_image=lambda: None
    )
    guess, right = COARSE[0] | COARSE[1], TRUTHS[0] | TRUTHS[1]
    assert before.miou == pytest.approx((masks.iou(guess, right) + masks.iou(~guess, ~right)) / 2)
    assert [score.name for score in scores] == ["without splitting", "split, paper's rule", "split, relaxed rule"]
    assert all(score.miou > before.miou for score in scores)
