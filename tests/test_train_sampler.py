"""The sampler in torch, against slow or independent ways of doing the same."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import distance_transform_edt
from torch import Tensor
from training_data import IGNORED, QUICK, packed_folder

from refinetool.backends.sam2 import BOX_CORNERS
from refinetool.masks import bounding_box, distance_inside, iou, tight_box
from refinetool.prompts import background_point, deepest_point, depth_measure, mask_prompt
from refinetool.settings import PromptSettings
from refinetool.train.data import corruptions
from refinetool.train.data.corruptions import DEFECTS, REACH, Scene, corrupt, superpixels
from refinetool.train.data.crops import WHOLE, nearest, resampling
from refinetool.train.data.distance import signed_distance, squared_depth
from refinetool.train.data.draws import Draws, draws_for
from refinetool.train.data.photometric import noise_bank, photometric
from refinetool.train.data.prompts import deepest_points, gaussian_masks, mine, on_quarter_grid, tight_boxes
from refinetool.train.data.resolution import in_pixels
from refinetool.train.data.sampler import Sampler, meeting_lines
from refinetool.train.data.store import PictureStore, load_store

masks_of_any_kind = st.builds(
    lambda seed, share, height, width: np.random.default_rng(seed).random((height, width)) < share,
    st.integers(0, 10_000),
    st.sampled_from([0.01, 0.1, 0.5, 0.9, 0.99, 1.0]),
    st.integers(2, 24),
    st.integers(2, 24),
)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Small tensors: more threads would only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> PictureStore:
    return load_store(packed_folder(tmp_path_factory.mktemp("packed")), "train", device="cpu")


def sampler(store: PictureStore, *, seed: int = 1) -> Sampler:
    return Sampler(store, settings=QUICK, seed=seed)


def blob(side: int, *, radius: float) -> Tensor:
    """A wavy disc, bool (side, side)."""
    y, x = torch.meshgrid(torch.arange(side) - side / 2, torch.arange(side) - side / 2, indexing="ij")
    return x.hypot(y) < radius * (1 + 0.3 * torch.sin(3 * torch.atan2(y, x)))


# --- random numbers


def test_draws_are_uniform_and_normal() -> None:
    draws = draws_for(3, torch.arange(20_000))
    uniform, normal = draws.uniform("a").double(), draws.normal("b").double()
    assert uniform.min() >= 0
    assert uniform.max() < 1
    for values, mean, deviation in ((uniform, 0.5, 1 / math.sqrt(12)), (normal, 0.0, 1.0)):
        assert abs(values.mean() - mean) < 4 * deviation / math.sqrt(20_000)
        assert float(values.std()) == pytest.approx(deviation, rel=0.03)
    assert abs(torch.corrcoef(torch.stack((uniform, draws.uniform("c").double())))[0, 1]) < 0.03
    assert abs(torch.corrcoef(torch.stack((uniform[1:], uniform[:-1])))[0, 1]) < 0.03


def test_draws_depend_on_the_row_alone() -> None:
    draws = draws_for(3, torch.arange(10))
    some = draws_for(3, torch.tensor([7, 2]))
    assert torch.equal(draws.normal("a", 5)[[7, 2]], some.normal("a", 5))
    assert torch.equal(draws.split("k", 3).uniform("a").view(10, 3)[7], some.split("k", 3).uniform("a")[:3])
    assert not torch.equal(draws.uniform("a"), draws.uniform("b"))
    assert not torch.equal(draws.uniform("a"), draws.fork("x").uniform("a"))
    assert not torch.equal(draws.uniform("a"), draws_for(4, torch.arange(10)).uniform("a"))


def test_choices_follow_their_weights() -> None:
    chosen = draws_for(0, torch.arange(9000)).choice("kind", torch.tensor([1.0, 0.0, 2.0]))
    counts = torch.bincount(chosen, minlength=3)
    assert counts[1] == 0
    assert float(counts[2]) == pytest.approx(6000, rel=0.05)


# --- distances


@settings(deadline=None)
@given(mask=masks_of_any_kind, reach=st.integers(1, 30))
def test_signed_distance_equals_scipys(mask: np.ndarray, reach: int) -> None:
    found = signed_distance(torch.from_numpy(mask)[None], reach=reach)[0].numpy()
    if mask.all() or not mask.any():
        expected = np.full(mask.shape, reach if mask.all() else -reach)
    else:
        expected = np.clip(distance_transform_edt(mask) - distance_transform_edt(~mask), -reach, reach)
    np.testing.assert_allclose(found, expected, atol=1e-5)


@settings(deadline=None)
@given(mask=masks_of_any_kind)
def test_squared_depth_equals_that_of_the_masks_module(mask: np.ndarray) -> None:
    found = squared_depth(torch.from_numpy(mask)[None])[0].numpy()
    np.testing.assert_allclose(np.sqrt(found), distance_inside(mask, border_is_background=False), atol=1e-4)


# --- prompts


@settings(deadline=None)
@given(mask=masks_of_any_kind.filter(lambda mask: bool(mask.any())))
def test_points_and_masks_equal_those_of_the_prompts_module(mask: np.ndarray) -> None:
    width = mask.shape[1]
    masks = torch.from_numpy(mask)[None]
    box = bounding_box(mask)
    assert box is not None
    assert tuple(tight_boxes(masks)[0].tolist()) == box
    positive, negative = deepest_points(masks)
    centre = deepest_point(mask, tight_box(mask), depth=depth_measure(PromptSettings()))
    assert (int(positive) % width, int(positive) // width) == centre
    away = background_point(mask, box)
    assert (None if negative < 0 else (int(negative) % width, int(negative) // width)) == away
    found = gaussian_masks(masks, positive, settings=PromptSettings())[0].numpy()
    np.testing.assert_allclose(found, mask_prompt(mask, centre, settings=PromptSettings()), atol=1e-4)


def test_prompts_are_in_model_pixels() -> None:
    coarse = torch.zeros(2, 32, 32, dtype=torch.bool)
    coarse[0, 8:16, 4:20] = True
    coarse[1, 0, 31] = True  # less than half of a cell of the quarter grid
    mined = mine(coarse, draws_for(0, torch.arange(2)))
    assert mined.labels[:, :2].tolist() == [list(BOX_CORNERS)] * 2
    assert mined.labels[0].tolist() == [2, 3, 1, -1]  # the mask fills its box
    first, last = mined.points[0, 0], mined.points[0, 1]
    assert ((first <= torch.tensor([8.7, 16.4])) & (first >= torch.tensor([8 - 1.29, 16 - 1.29]))).all()
    assert ((last >= torch.tensor([39.3, 31.6])) & (last <= torch.tensor([41.29, 33.29]))).all()
    assert mined.points[0, 2, 1] in (22, 26)  # a middle row of cells of four pixels
    assert (mined.masks.amax((1, 2)) > 14).all()
    assert on_quarter_grid(coarse)[1].sum() == 1


def test_two_in_five_boxes_stay_tight() -> None:
    coarse = torch.zeros(2000, 32, 32, dtype=torch.bool)
    coarse[:, 8:16, 4:20] = True
    boxes = mine(coarse, draws_for(0, torch.arange(2000))).points[:, :2].flatten(1)
    tight = (boxes == torch.tensor([8.0, 16.0, 40.0, 32.0])).all(1)
    assert float(tight.float().mean()) == pytest.approx(0.4, abs=0.03)


# --- crops


@settings(deadline=None)
@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=3), target=st.integers(4, 40), mirror=st.booleans())
def test_resampling_equals_torchs_antialiased_filter(lengths: list[int], target: int, mirror: bool) -> None:
    source = max(lengths)
    lines = torch.rand(len(lengths), source, generator=torch.Generator().manual_seed(0))
    matrices = resampling(
        torch.tensor(lengths), source=source, target=target, mirrored=torch.full((len(lengths),), mirror)
    )
    for line, length, matrix in zip(lines, lengths, matrices, strict=True):
        block = line[None, None, None, :length].expand(1, 1, 2, length)
        expected = F.interpolate(block, (2, target), mode="bilinear", align_corners=False, antialias=True)[0, 0, 0]
        assert matrix.sum(1).tolist() == [WHOLE] * target
        found = matrix @ line / WHOLE
        torch.testing.assert_close(found, expected.flip(0) if mirror else expected, atol=0.02, rtol=0)


def test_nearest_takes_what_lies_under_the_centre() -> None:
    lengths = torch.tensor([8, 3])
    plain = nearest(lengths, target=4, mirrored=torch.tensor([False, False]))
    assert plain.tolist() == [[1, 3, 5, 7], [0, 1, 1, 2]]
    assert nearest(lengths, target=4, mirrored=torch.tensor([True, True])).tolist() == plain.flip(1).tolist()


def test_edges_lie_between_ids_and_not_beside_ignored_pixels() -> None:
    ids = torch.zeros(1, 8, 8, dtype=torch.int64)
    ids[:, :, 4:] = 1
    ids[:, 6:] = IGNORED
    assert meeting_lines(ids, cell=2)[0].tolist() == [[0, 0, 1, 0]] * 3 + [[0, 0, 0, 0]]


# --- defects


def smooth_images(count: int, side: int) -> Tensor:
    """Colours that change slowly, float32 (count, 3, side, side)."""
    cells = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(0)) * 255
    return F.interpolate(cells, (side, side), mode="bilinear", align_corners=False).round()


def scene_of(masks: Tensor) -> Scene:
    side = masks.shape[1]
    neighbours = torch.zeros_like(masks)
    neighbours[:, :, : side // 3] = True
    image = smooth_images(len(masks), side)
    labels = superpixels(
        image,
        torch.full((len(masks),), 64),
        draws_for(0, torch.arange(len(masks))),
        compactness=10.0,
        rounds=2,
    )
    return Scene(masks, signed_distance(masks, reach=REACH), neighbours & ~masks, labels)


@pytest.mark.parametrize("defect", DEFECTS.values(), ids=DEFECTS)
def test_a_defect_changes_masks_and_is_the_same_alone(defect: Callable[[Scene, Tensor, Draws], Tensor]) -> None:
    masks = torch.stack([blob(64, radius=radius) for radius in (8, 12, 16, 20)] * 6)
    scene, draws = scene_of(masks), draws_for(5, torch.arange(len(masks)))
    severity = torch.full((len(masks),), 1.0)
    spoilt = defect(scene, severity, draws)
    assert spoilt.shape == masks.shape
    assert spoilt.dtype == torch.bool
    reached = [iou(a.numpy(), b.numpy()) for a, b in zip(spoilt, masks, strict=True)]
    assert 0.5 < float(np.mean(reached)) < 0.97
    row = torch.tensor([7])
    assert torch.equal(defect(scene.take(row), severity[row], draws.take(row))[0], spoilt[7])


def test_more_severe_defects_are_worse() -> None:
    masks = blob(48, radius=13).expand(30, -1, -1)
    scene, draws = scene_of(masks), draws_for(5, torch.arange(30))
    for name, defect in DEFECTS.items():
        mild, bad = (
            float(corruptions.overlap(defect(scene, torch.full((30,), s), draws), masks).mean()) for s in (0.4, 1.6)
        )
        assert bad < mild, name


@pytest.mark.parametrize(
    ("family", "low", "high"), [("any", 0.45, 0.97), ("any", 0.65, 0.9), ("any", 0.9, 1.0), ("blobs", 0.4, 0.8)]
)
def test_most_coarse_masks_reach_the_range(family: str, low: float, high: float) -> None:
    masks = torch.stack([blob(64, radius=radius) for radius in (8, 14, 20)] * 30)
    lows, highs = (torch.full((90,), bound) for bound in (low, high))
    blobs = torch.full((90,), family == "blobs")
    draws = draws_for(2, torch.arange(90))
    coarse = corrupt(scene_of(masks), draws, blobs=blobs, low=lows, high=highs, tries=6)
    reached = np.array([iou(a.numpy(), b.numpy()) for a, b in zip(coarse, masks, strict=True)])
    assert ((reached >= low) & (reached <= high)).mean() > 0.9
    assert coarse.flatten(1).any(1).all()


@pytest.mark.parametrize("kind", ["pixel", "full", "line"])
def test_odd_masks_come_through(kind: str) -> None:
    masks = torch.zeros(20, 32, 32, dtype=torch.bool)
    if kind == "full":
        masks[:] = True
    elif kind == "line":
        masks[:, :, 5] = True
    else:
        masks[:, 0, 0] = True
    low, high = torch.full((20,), 0.5), torch.full((20,), 0.9)
    blobs = torch.arange(20) < 10
    coarse = corrupt(scene_of(masks), draws_for(2, torch.arange(20)), blobs=blobs, low=low, high=high, tries=3)
    assert coarse.flatten(1).any(1).all()
    mined = mine(coarse, draws_for(3, torch.arange(20)))
    assert torch.isfinite(mined.points).all()
    assert torch.isfinite(mined.masks).all()


def test_blobs_come_from_grids_of_a_few_cells_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """With every other defect emptied, blobs do not change, and other masks do."""
    masks = torch.stack([blob(64, radius=radius) for radius in (8, 14, 20)] * 10)
    low, high = torch.full((30,), 0.4), torch.full((30,), 0.8)

    def drawn(*, blobs: bool) -> Tensor:
        every = torch.full((30,), blobs)
        return corrupt(scene_of(masks), draws_for(2, torch.arange(30)), blobs=every, low=low, high=high, tries=3)

    before = [drawn(blobs=blobs) for blobs in (True, False)]
    kept = ("low-resolution", "biased-activation")
    emptied = [
        defect if name in kept else lambda scene, *_: torch.zeros_like(scene.masks) for name, defect in DEFECTS.items()
    ]
    monkeypatch.setattr(corruptions, "IN_ORDER", emptied)
    assert torch.equal(drawn(blobs=True), before[0])
    assert not torch.equal(drawn(blobs=False), before[1])


def test_superpixels_follow_colours_and_do_not_depend_on_the_batch() -> None:
    image = torch.zeros(2, 3, 64, 64)
    image[:, 0, :, 29:] = 200  # an edge that no cell of the lattice ends at
    image[1] += torch.arange(64) * 0.3 // 1
    counts = torch.tensor([36, 16])
    draws = draws_for(1, torch.arange(2))
    labels = superpixels(image, counts, draws, compactness=10.0, rounds=2)
    left, right = set(labels[0, :, :29].flatten().tolist()), set(labels[0, :, 29:].flatten().tolist())
    assert not left & right
    assert 25 <= len(left | right) <= 36
    alone = superpixels(image[1:], counts[1:], draws.take(torch.tensor([1])), compactness=10.0, rounds=2)
    assert torch.equal(alone[0], labels[1])


# --- colours


def test_colours_change_within_reason() -> None:
    images = smooth_images(24, 32)
    changed = photometric(images, draws_for(0, torch.arange(24)), bank=noise_bank("cpu"))
    assert torch.equal(changed, changed.round())
    assert changed.min() >= 0
    assert changed.max() <= 255
    grey_before, grey_after = (batch.mean(1).flatten(1) for batch in (images, changed))
    for before, after in zip(grey_before, grey_after, strict=True):
        assert torch.corrcoef(torch.stack((before, after)))[0, 1] > 0.8
    assert (changed - images).abs().mean() > 10


# --- examples


def test_an_example_has_the_documented_shapes_and_ranges(store: PictureStore) -> None:
    side, k = 64, QUICK.prompts_per_image
    batch = sampler(store).batch(torch.arange(12), side=side)
    assert batch.image.shape == (12, 3, side, side)
    assert batch.image.dtype == torch.uint8
    assert batch.points.shape == (12, k, 4, 2)
    assert batch.labels.dtype == torch.int32
    assert batch.masks.shape == (12, k, side // 4, side // 4)
    assert batch.targets.shape == batch.weights.shape == (12, k, side // 2, side // 2)
    assert batch.edges.shape == (12, side // 4, side // 4)
    assert (batch.labels[..., :2] == torch.tensor(BOX_CORNERS)).all()
    assert batch.points.min() >= 0
    assert batch.points.max() <= side
    assert (batch.masks.amax((2, 3)) > 0).all()
    assert ((batch.coarse_iou >= 0) & (batch.coarse_iou <= 1)).all()
    assert (batch.targets.amax((2, 3)) > 127).all()
    assert batch.weights.max() <= 160


def test_an_example_is_a_function_of_its_number_whatever_the_batch(store: PictureStore) -> None:
    source = sampler(store)
    whole = source.batch(torch.arange(8), side=64)
    again, part = source.batch(torch.arange(8), side=64), source.batch(torch.tensor([6, 3]), side=64)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    for a, b in zip(whole, part, strict=True):
        torch.testing.assert_close(a[[6, 3]].float(), b.float(), atol=0.01, rtol=0)
    other = sampler(store, seed=2).batch(torch.arange(8), side=64)
    assert not torch.equal(other.image, whole.image)


def test_the_truth_is_where_the_colours_are(store: PictureStore) -> None:
    """The painted boxes have one colour each: the target covers pixels of one colour, apart from a blurred rim."""
    plain = replace(QUICK, composite_share=0.0, other_object_share=0.0, prompts_per_image=1)
    source = Sampler(store, settings=plain, seed=3)
    crops = source._crops(draws_for(3, torch.arange(16)), side=64)
    for image, target in zip(crops.image, crops.target, strict=True):
        inner = distance_inside(target.numpy(), border_is_background=False) > 5
        assert inner.any()
        assert image[:, torch.from_numpy(inner)].std(1).max() < 12


def test_coarse_masks_have_the_pixels_of_their_crops(store: PictureStore) -> None:
    plain = replace(QUICK, composite_share=0.0, smaller_share=1.0)
    source = Sampler(store, settings=plain, seed=3)
    numbers = torch.arange(4)
    pixels = source._crops(draws_for(3, numbers), side=256).pixels
    coarse = source.batch(numbers, side=256).coarse
    assert (pixels < coarse.shape[-1]).any()
    for masks in coarse.unbind(1):
        assert torch.equal(in_pixels(masks, pixels), masks)
    cells = torch.rand(masks.shape) < 0.5
    assert not torch.equal(in_pixels(cells, pixels), cells)


def test_the_box_holds_the_positive_point(store: PictureStore) -> None:
    points = sampler(store).batch(torch.arange(20), side=64).points
    assert (points[..., 2, :] >= points[..., 0, :] - 4).all()
    assert (points[..., 2, :] <= points[..., 1, :] + 4).all()


def test_coarse_masks_are_spread_over_the_range(store: PictureStore) -> None:
    reached = sampler(store).batch(torch.arange(60), side=64).coarse_iou.flatten()
    assert 0.65 < float(reached.mean()) < 0.88
    assert float(((reached >= QUICK.coarse_low) & (reached <= 1)).float().mean()) > 0.9
    assert 0.05 < float((reached > 0.9).float().mean()) < 0.45
