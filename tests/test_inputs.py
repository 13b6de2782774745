"""What users of the library may hand over as image and masks."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fakes import BrightBackend
from PIL import Image

import refinetool
from refinetool.errors import RefinetoolError
from refinetool.inputs import as_image, as_masks
from refinetool.refine import Refiner
from refinetool.settings import MAX_PIXELS, RefineSettings

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 255, (8, 12, 3), dtype=np.uint8)
MASKS = RNG.random((3, 8, 12)) > 0.5


def saved(folder: Path, turn: int | None = None) -> Path:
    exif = Image.Exif()
    if turn:
        exif[0x0112] = turn
    Image.fromarray(PIXELS).save(folder / "a.png", exif=exif)
    return folder / "a.png"


@pytest.mark.parametrize(
    "convert",
    [
        lambda _: PIXELS,
        lambda _: Image.fromarray(PIXELS),
        lambda _: Image.fromarray(PIXELS).convert("RGBA"),
        saved,
        lambda folder: str(saved(folder)),
        lambda _: torch.tensor(PIXELS),
        lambda _: torch.tensor(PIXELS).permute(2, 0, 1),
        lambda _: PIXELS[:, ::-1].copy()[:, ::-1],
    ],
    ids=["array", "PIL", "PIL with alpha", "path", "text", "tensor", "tensor, channels first", "strided"],
)
def test_images(convert: Any, tmp_path: Path) -> None:
    found = as_image(convert(tmp_path), size=(8, 12), max_pixels=MAX_PIXELS)
    assert found.dtype == np.uint8
    assert (found == PIXELS).all()


def test_a_grey_image_is_grey_in_colours() -> None:
    grey = Image.fromarray(PIXELS[..., 0])
    assert (as_image(grey, size=None, max_pixels=MAX_PIXELS) == PIXELS[..., :1]).all()


@pytest.mark.parametrize(
    ("size", "shape"),
    [((8, 12), (8, 12)), ((12, 8), (12, 8)), (None, (12, 8))],
    ids=["as stored", "turned", "no masks"],
)
def test_a_file_is_turned_to_the_size_of_the_masks(size: Any, shape: tuple[int, int], tmp_path: Path) -> None:
    assert as_image(saved(tmp_path, turn=6), size=size, max_pixels=MAX_PIXELS).shape[:2] == shape


@pytest.mark.parametrize(
    "masks",
    [
        MASKS,
        MASKS.astype(np.uint8) * 255,
        MASKS.astype(np.float32),
        list(MASKS),
        tuple(MASKS),
        [Image.fromarray(mask) for mask in MASKS],
        [Image.fromarray(mask.astype(np.uint8) * 255) for mask in MASKS],
        torch.tensor(MASKS),
        torch.tensor(MASKS)[:, None].float(),
        [torch.tensor(mask) for mask in MASKS],
    ],
    ids=["bool", "255", "float", "list", "tuple", "PIL bits", "PIL grey", "tensor", "tensor (N, 1, H, W)", "tensors"],
)
def test_masks(masks: Any) -> None:
    found = as_masks(masks)
    assert found.dtype == np.bool_
    assert (found == MASKS).all()


def test_a_single_mask_is_one_of_one() -> None:
    for mask in (MASKS[0], torch.tensor(MASKS[0]), Image.fromarray(MASKS[0])):
        assert (as_masks(mask) == MASKS[:1]).all()


@pytest.mark.parametrize(
    ("image", "masks", "said"),
    [
        (None, MASKS, "the image is a NoneType; expected uint8"),
        (PIXELS[..., 0], MASKS, r"the image is uint8 \(8, 12\); expected uint8 \(H, W, 3\) in RGB order, a PIL"),
        (PIXELS / 255, MASKS, "the image is float64"),
        (torch.tensor(PIXELS).float(), MASKS, "the image is float32"),
        ("no/such.jpg", MASKS, r"no/such\.jpg: there is no such image"),
        (PIXELS, 7, "the coarse masks are a int; expected"),
        (PIXELS, "masks.png", "the coarse masks are a str; expected"),
        (PIXELS, [MASKS[0], "b"], "coarse mask 1 is a str; expected"),
        (PIXELS, [MASKS[0], MASKS[1, :5]], r"coarse mask 1 is \(5, 12\); expected \(8, 12\)"),
        (PIXELS, MASKS[None, None], r"the coarse masks are \(1, 1, 3, 8, 12\)"),
        (PIXELS, MASKS[:, :5], r"the coarse masks are \(3, 5, 12\); expected \(N, 8, 12\), the size of the image"),
        (PIXELS, MASKS * 0.4, "coarse mask 0: the mask contains"),
        (PIXELS, torch.zeros(1, 8, 12, dtype=torch.bfloat16), "a tensor of torch.bfloat16 can't be used"),
        (PIXELS, [Image.fromarray(PIXELS)], r"coarse mask 0: the mask has shape \(8, 12, 3\)"),
    ],
)
def test_anything_else_gets_a_sentence(image: Any, masks: Any, said: str) -> None:
    with pytest.raises(RefinetoolError, match=said):
        Refiner(BrightBackend(), RefineSettings()).refine_image(image, masks)


def test_an_image_without_masks(tmp_path: Path) -> None:
    assert Refiner(BrightBackend(), RefineSettings()).refine_image(saved(tmp_path), []) == []


def test_public_names_are_listed_without_being_imported() -> None:
    assert set(refinetool.__all__) <= set(dir(refinetool))
    looked = (
        "import sys, refinetool; print('refine_dataset' in dir(refinetool), 'refinetool.running.run' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", looked], capture_output=True, text=True, check=True).stdout
    assert said.split() == ["True", "False"]
