"""Crops with less detail, and outlines that are trusted as far as they follow the edges of the picture."""

from dataclasses import replace
from fractions import Fraction
from math import floor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from training_data import PACKING, paint_folder

from refinetool.records import VOID
from refinetool.train.data.crops import LEAST_AREA_PX, SMALL_PX, Crops, draw_windows
from refinetool.train.data.draws import draws_for
from refinetool.train.data.pack import pack
from refinetool.train.data.resolution import in_pixels, shrunk
from refinetool.train.data.sharpness import sharpness
from refinetool.train.data.store import load_store

SIDE = 160


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def crops(count: int, *, radius: float = 50.0) -> Crops:
    """A disc of another colour, which is region 1 and the target, in each crop."""
    y, x = torch.meshgrid(*(torch.arange(SIDE) - SIDE / 2 + 0.5 for _ in range(2)), indexing="ij")
    disc = (x.hypot(y) < radius)[None].expand(count, -1, -1)
    image = torch.where(disc[:, None], 200.0, 40.0).expand(-1, 3, -1, -1).contiguous()
    members = torch.zeros(count, 1, 256, dtype=torch.bool)
    return Crops(image, disc.long(), disc.clone(), members, torch.ones(count), torch.full((count, 2), SIDE))


def lines(ids: torch.Tensor) -> int:
    """The number of different lines that follow each other in a map, which is at most the side it was reduced to."""
    return 1 + int((ids[1:] != ids[:-1]).any(1).sum())


ALL = torch.ones(12, dtype=torch.bool)


def noisy(count: int) -> Crops:
    """Crops in which no two lines of ids are alike."""
    ids = torch.randint(254, (count, SIDE, SIDE), generator=torch.Generator().manual_seed(0))
    return replace(crops(count), ids=ids)


def test_reduced_crops_have_as_many_lines_as_pixels() -> None:
    given, pixels = noisy(12), torch.stack((torch.arange(30, 54, 2), torch.arange(40, 52)), 1)
    reduced = shrunk(given, pixels, rows=ALL)
    assert [lines(ids.T) for ids in reduced.ids] == pixels[:, 0].tolist()
    assert [lines(ids) for ids in reduced.ids] == pixels[:, 1].tolist()
    assert torch.equal(reduced.pixels, pixels)
    assert not torch.equal(reduced.image, given.image)
    assert (reduced.image - 200).abs()[:, 0, SIDE // 2, SIDE // 2].max() <= 1


def test_image_and_truth_are_reduced_alike() -> None:
    reduced = shrunk(crops(12), torch.full((12, 2), 40), rows=ALL)
    assert torch.equal(reduced.target, reduced.ids == 1)
    bright = reduced.image[:, 0] > 120
    assert (bright == reduced.target).float().mean() > 0.98


def test_only_some_rows_are_reduced_whatever_the_batch() -> None:
    given, pixels = noisy(12), torch.full((12, 2), 50)
    rows = torch.arange(12) % 3 == 0
    reduced = shrunk(given, pixels, rows=rows)
    assert torch.equal((reduced.image != given.image).flatten(1).any(1), rows)
    assert torch.equal((reduced.pixels != given.pixels).any(1), rows)
    some = torch.tensor([9, 1, 6])
    alone = shrunk(given.take(some), pixels[some], rows=rows[some])
    assert torch.equal(alone.image, reduced.image[some])
    assert torch.equal(alone.ids, reduced.ids[some])


@pytest.mark.parametrize("pixels", [(20, 31), (63, 20)])
def test_coarse_masks_get_the_pixels_of_the_picture(pixels: tuple[int, int]) -> None:
    """A cell is what the mask is at the centre of the cell's pixel."""
    side = 64
    masks = torch.rand(2, side, side, generator=torch.Generator().manual_seed(1)) < 0.5
    redrawn = in_pixels(masks, torch.tensor([pixels] * 2))
    half = Fraction(1, 2)
    sources = [
        [floor((floor((cell + half) * count / side) + half) * side / count) for cell in range(side)] for count in pixels
    ]
    for mask, found in zip(masks.numpy(), redrawn.numpy(), strict=True):
        assert np.array_equal(found, [[mask[y, x] for x in sources[0]] for y in sources[1]])


def test_coarse_masks_of_fine_pictures_stay_as_they_are() -> None:
    masks = torch.rand(2, 64, 64, generator=torch.Generator().manual_seed(1)) < 0.5
    assert torch.equal(in_pixels(masks, torch.tensor([[64, 80], [500, 64]])), masks)


def test_no_coarse_mask_vanishes_between_pixels() -> None:
    lone = torch.zeros(1, 64, 64, dtype=torch.bool)
    lone[0, 0, 0] = True  # beside the centre of its pixel, which has eight cells a side
    assert torch.equal(in_pixels(lone, torch.tensor([[8, 8]])), lone)


def test_objects_are_shown_as_small_as_in_large_pictures(tmp_path: Path) -> None:
    folder = paint_folder(tmp_path / "data", classes=False, count=6)
    packed = pack([folder], tmp_path / "pack", images=None, settings=PACKING, on_progress=lambda *_: None)
    store = load_store(packed, "train", device="cpu")
    plain = draw_windows(store, draws_for(4, torch.arange(60)), frame_share=0.5, smaller_share=0.0)
    assert not plain.reduced.any()
    small = draw_windows(store, draws_for(4, torch.arange(60)), frame_share=0.5, smaller_share=1.0)
    extent = (store.boxes[small.object][:, 2:] - store.boxes[small.object][:, :2]).amax(1)
    scale = small.pixels / (small.boxes[:, 2:] - small.boxes[:, :2])
    assert (scale[:, 0] / scale[:, 1] - 1).abs().max() < 0.1  # shapes stay
    shown = extent * scale.mean(1)
    assert shown[small.reduced].max() <= SMALL_PX[1] * 1.1
    assert (store.areas[small.object] * scale.prod(1))[small.reduced].min() > 0.8 * LEAST_AREA_PX
    assert small.reduced.any()
    half = draw_windows(store, draws_for(5, torch.arange(400)), frame_share=0.0, smaller_share=0.5)
    always = draw_windows(store, draws_for(5, torch.arange(400)), frame_share=0.0, smaller_share=1.0)
    assert 0.35 < float(half.reduced.sum() / always.reduced.sum()) < 0.65


def picture(shift: int, *, void: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """A noisy picture of a square, and an outline of it that is `shift` pixels off."""
    rng = np.random.default_rng(0)
    image = np.full((100, 100, 3), 60, np.uint8)
    image[30:70, 30:70] = 180
    image += rng.integers(0, 20, image.shape, dtype=np.uint8)
    ids = np.zeros((100, 100), np.uint8)
    ids[30 + shift : 70 + shift, 30 + shift : 70 + shift] = 1
    if void:
        ids[25:32, 20:80] = ids[68:75, 20:80] = ids[20:80, 25:32] = ids[20:80, 68:75] = VOID
    return image, ids


def test_outlines_on_edges_are_sharper() -> None:
    exact, off = (sharpness(*picture(shift)) for shift in (0, 3))
    assert exact is not None and off is not None
    assert exact > 5
    assert off < 1.5


def test_ignored_outlines_are_not_measured() -> None:
    assert sharpness(*picture(0, void=True)) is None


def test_sources_are_trusted_by_their_sharpness(tmp_path: Path) -> None:
    exact = paint_folder(tmp_path / "exact", classes=False, count=6)
    loose = paint_folder(tmp_path / "loose", classes=False, count=6)
    for path in (loose / "masks").iterdir():
        ids = np.roll(np.array(Image.open(path)), (4, 4), (0, 1))
        Image.fromarray(ids).save(path)
    packed = pack([exact, loose], tmp_path / "pack", images=None, settings=PACKING, on_progress=lambda *_: None)
    store = load_store(packed, "train", device="cpu")
    trusted, doubted = (store.trust[group] for group in store.groups)
    assert (trusted > 0.9).all()
    assert (doubted < 0.2).all()


def test_sources_without_outlines_are_trusted(tmp_path: Path) -> None:
    folder = paint_folder(tmp_path / "data", classes=False)
    for path in (folder / "masks").iterdir():
        ids = np.array(Image.open(path))
        ids[12:18], ids[47:53], ids[52:58], ids[82:88] = (VOID,) * 4
        ids[:, 7:13], ids[:, 57:63], ids[:, 67:73], ids[:, 107:113] = (VOID,) * 4
        Image.fromarray(ids).save(path)
    packed = pack([folder], tmp_path / "pack", images=None, settings=PACKING, on_progress=lambda *_: None)
    assert (load_store(packed, "train", device="cpu").trust == 1).all()
