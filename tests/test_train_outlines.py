"""Crops with less detail, and outlines that are trusted as far as they follow the edges of the picture."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from training_data import PACKING, paint_folder

from refinetool.records import VOID
from refinetool.train.data.crops import Crops
from refinetool.train.data.draws import draws_for
from refinetool.train.data.pack import pack
from refinetool.train.data.resolution import LEAST_AREA_PX, SIDES, shrunk
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
    return Crops(image, disc.long(), disc.clone(), members, torch.ones(count))


def cells(ids: torch.Tensor) -> int:
    """The number of different lines that follow each other in a map, which is at most the side it was reduced to."""
    return 1 + int((ids[1:] != ids[:-1]).any(1).sum())


def test_smaller_crops_have_fewer_lines() -> None:
    given = crops(12)
    reduced = shrunk(given, draws_for(1, torch.arange(12)), share=1.0)
    for ids, target, image in zip(reduced.ids, reduced.target, reduced.image, strict=True):
        assert cells(ids) <= SIDES[1]
        assert torch.equal(target, ids == 1)
        assert not torch.equal(image, given.image[0])
        assert (image - 200).abs()[0, SIDE // 2, SIDE // 2] <= 1
    assert len({cells(ids) for ids in reduced.ids}) > 3


def test_the_object_keeps_some_area() -> None:
    radius = 9.0
    given = crops(20, radius=radius)
    noise = torch.randint(254, given.ids.shape, generator=torch.Generator().manual_seed(0))
    reduced = shrunk(replace(given, ids=noise), draws_for(2, torch.arange(20)), share=1.0)
    covered = float(given.target[0].float().mean())
    sides = [cells(ids) for ids in reduced.ids]  # no two lines of noise are alike
    assert min(sides) ** 2 * covered == pytest.approx(LEAST_AREA_PX, rel=0.05)


def test_only_a_fraction_is_reduced_whatever_the_batch() -> None:
    given, draws = crops(200), draws_for(3, torch.arange(200))
    reduced = shrunk(given, draws, share=0.25)
    changed = (reduced.image != given.image).flatten(1).any(1)
    assert 30 <= int(changed.sum()) <= 70
    some = torch.tensor([150, 3, 77])
    alone = shrunk(given.take(some), draws.take(some), share=0.25)
    assert torch.equal(alone.image, reduced.image[some])
    assert torch.equal(alone.ids, reduced.ids[some])
    unchanged = shrunk(given, draws, share=0.0)
    assert torch.equal(unchanged.image, given.image)


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
