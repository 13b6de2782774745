"""Examples whose coarse masks are the model's own answers."""

from dataclasses import replace

import pytest
import torch
from training_data import QUICK, packed_folder

from refinetool.backends.sam2 import BOX_CORNERS
from refinetool.modules.embedded import EmbeddedModel, build_embedded
from refinetool.modules.sam2_passes import set_image_size
from refinetool.train.data.examples import Example
from refinetool.train.data.prompts import on_quarter_grid, tight_boxes
from refinetool.train.data.sampler import Sampler
from refinetool.train.data.store import load_store
from refinetool.train.head import on_frozen
from refinetool.train.head.on_frozen import OnFrozen
from refinetool.train.kernels import mixed_precision
from refinetool.train.questions import FULL, look, pose, refine
from refinetool.train.second_pass import second_pass


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> Example:
    torch.set_num_threads(1)
    store = load_store(packed_folder(tmp_path_factory.mktemp("packed")), "train", device="cpu")
    return Sampler(store, settings=QUICK, seed=1).batch(torch.arange(3), side=64)


@pytest.fixture
def model() -> EmbeddedModel:
    torch.manual_seed(0)
    made = build_embedded(image_size=64).eval()
    set_image_size(made, 64)
    return made


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def test_the_coarse_masks_are_the_models_answers(batch: Example, model: EmbeddedModel) -> None:
    changed = second_pass(batch, model, model.detail, generator=seeded())
    with torch.no_grad(), mixed_precision(batch.image.device):
        question = pose(look(model, model.detail, batch.image), batch, rows=[0, 1, 2, 3], kinds=FULL, generator=None)
        answers = refine(model, model.detail, question)[0] > 0
    expected = torch.where(answers.flatten(1).any(1)[:, None, None], answers, batch.coarse.flatten(0, 1))
    assert torch.equal(changed.coarse.flatten(0, 1), expected)
    assert not torch.equal(changed.coarse, batch.coarse)
    truth = batch.targets >= 128
    both, either = (changed.coarse & truth).sum((2, 3)), (changed.coarse | truth).sum((2, 3))
    assert changed.coarse_iou == pytest.approx(both / either)
    for name in ("image", "targets", "weights", "edges", "truth"):
        assert torch.equal(getattr(changed, name), getattr(batch, name)), name


def test_prompts_are_mined_from_the_new_masks(batch: Example, model: EmbeddedModel) -> None:
    changed = second_pass(batch, model, model.detail, generator=seeded())
    coarse = changed.coarse.flatten(0, 1)
    grid = on_quarter_grid(coarse)
    masks, points = changed.masks.flatten(0, 1), changed.points.flatten(0, 1)
    assert torch.equal(masks > 0, grid)
    boxes = tight_boxes(coarse) * 2.0
    corners = points[:, :2].flatten(1)
    assert ((corners - boxes).abs() <= 0.12 * 64).all()
    assert (changed.labels.flatten(0, 1)[:, :2] == torch.tensor(BOX_CORNERS)).all()
    for point, inside in zip(points[:, 2], grid, strict=True):
        assert inside[int(point[1]) // 4, int(point[0]) // 4]


def test_masks_that_come_back_empty_stay_coarse(batch: Example, model: EmbeddedModel) -> None:
    assert model.detail.leave.bias is not None
    torch.nn.init.constant_(model.detail.leave.bias, -1000.0)
    changed = second_pass(batch, model, model.detail, generator=seeded())
    assert torch.equal(changed.coarse, batch.coarse)


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (1.0, 3)])
def test_as_many_steps_as_wanted_are_second_passes(
    batch: Example, model: EmbeddedModel, monkeypatch: pytest.MonkeyPatch, share: float, expected: int
) -> None:
    modes = []

    def observed(given: Example, sam: object, head: torch.nn.Module, *, generator: torch.Generator) -> Example:
        modes.append(head.training)
        return second_pass(given, sam, model.detail, generator=generator)

    monkeypatch.setattr(on_frozen, "second_pass", observed)
    settings = replace(QUICK, part="detail", second_pass_share=share)
    job = OnFrozen(model, model.detail, settings=settings, set_side=lambda side: set_image_size(model, side))
    for seed in range(3):
        job.loss(batch, host=torch.Generator().manual_seed(seed), noise=seeded())
        assert model.detail.training
    assert modes == [False] * expected
