"""The baselines that models are held against do what their names say."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from refinetool import masks
from refinetool.records import BoolArray, ImageArray

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "baselines.py"


@pytest.fixture(scope="module")
def baselines() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("baselines", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = sys.modules["baselines"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules["baselines"]


def ball_on_grass() -> tuple[ImageArray, BoolArray, BoolArray]:
    """A picture, the true mask and a coarse one, off by some pixels."""
    ys, xs = np.mgrid[:90, :120]
    truth = np.hypot(xs - 60, ys - 45) < 20
    noise = np.random.default_rng(3).normal(0, 8, (90, 120, 3))
    image = np.where(truth[..., None], [190, 60, 50], [70, 140, 60]) + noise
    return np.clip(image, 0, 255).astype(np.uint8), truth, np.roll(truth, (3, -4), axis=(0, 1))


def test_grabcut_and_the_guided_filter_find_the_ball(baselines: ModuleType) -> None:
    image, truth, coarse = ball_on_grass()
    assert masks.iou(baselines.in_crop(image, coarse, baselines.grabcut(0.3)), truth) > 0.99
    assert masks.iou(baselines.in_crop(image, coarse, baselines.guided(0.5, 1e-4)), truth) > 0.93
    assert masks.iou(coarse, truth) < 0.8


def test_the_blur_is_blind_to_the_image(baselines: ModuleType) -> None:
    image, _, coarse = ball_on_grass()
    blur = baselines.gaussian(0.12)
    np.testing.assert_array_equal(
        baselines.in_crop(image, coarse, blur), baselines.in_crop(np.zeros_like(image), coarse, blur)
    )


def test_every_method_repeats_itself_and_stands_a_pixel_and_a_full_mask(baselines: ModuleType) -> None:
    image, _, coarse = ball_on_grass()
    dot, everything = np.zeros_like(coarse), np.ones_like(coarse)
    dot[7, 11] = True
    for method in baselines.methods():
        for mask in (coarse, dot, everything):
            first = baselines.in_crop(image, mask, method.refine)
            assert first.shape == mask.shape and first.dtype == np.bool_
            np.testing.assert_array_equal(first, baselines.in_crop(image, mask, method.refine))
