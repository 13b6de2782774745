"""Trust in good coarse outlines."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fakes import BrightBackend
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage

from refinetool import masks
from refinetool.records import REFINED, BoolArray, ImageArray, Region, Sample
from refinetool.refine import Refiner
from refinetool.settings import NO_GUARD, RefineSettings, SnapSettings, TrustSettings
from refinetool.trust import alignment, gradient, margin, settled, spread

SIZE = (60, 80)
SETTINGS = TrustSettings()


def disc(x: float, y: float, radius: float) -> BoolArray:
    ys, xs = np.mgrid[: SIZE[0], : SIZE[1]]
    return np.hypot(xs - x, ys - y) < radius


OBJECT = disc(40, 30, 18)


def photograph(of: BoolArray = OBJECT) -> ImageArray:
    """An object of another colour, with some noise."""
    noise = np.random.default_rng(0).normal(0, 4, (*SIZE, 3))
    return np.clip(np.where(of[..., None], [180, 90, 60], [60, 120, 90]) + noise, 0, 255).astype(np.uint8)


def test_an_outline_on_an_edge_is_aligned_and_one_beside_it_is_not() -> None:
    image = photograph()
    on_edge, beside = alignment(image, OBJECT), alignment(image, disc(40, 30, 15))
    assert on_edge > SETTINGS.edges_to
    assert beside < SETTINGS.edges_from
    assert alignment(image, disc(46, 30, 18)) < on_edge


def test_alignment_is_what_its_words_say() -> None:
    """Against distances from SciPy on the whole image, gradient taken as given."""
    image, mask = photograph(), disc(37, 28, 16)
    depth = ndimage.distance_transform_edt(mask) + ndimage.distance_transform_edt(~mask)
    change = gradient(image)
    band = depth <= max(4.0, 0.2 * np.sqrt(mask.sum() / np.pi))
    expected = change[depth <= 1].mean() / change[band].mean()
    assert alignment(image, mask) == pytest.approx(expected, rel=1e-3)


def test_the_gradient_is_the_root_of_squared_sobel_derivatives() -> None:
    image = photograph()
    squares = np.zeros(SIZE)
    for channel in range(3):
        calm = ndimage.gaussian_filter(image[..., channel].astype(np.float64), 1, mode="mirror", truncate=4)
        squares += ndimage.sobel(calm, axis=0, mode="mirror") ** 2 + ndimage.sobel(calm, axis=1, mode="mirror") ** 2
    np.testing.assert_allclose(gradient(image), np.sqrt(squares), rtol=0.02, atol=0.5)


@pytest.mark.parametrize("mask", [np.ones(SIZE, np.bool_), np.zeros(SIZE, np.bool_)])
def test_without_an_outline_there_is_nothing_to_align(mask: BoolArray) -> None:
    assert alignment(photograph(), mask) == 1.0


def test_a_flat_image_aligns_nothing() -> None:
    assert alignment(np.full((*SIZE, 3), 90, np.uint8), OBJECT) == 1.0


@given(st.floats(0, 5), st.floats(0, 5), st.floats(0, 1), st.floats(0, 1))
def test_the_margin_grows_with_alignment_and_agreement(a: float, b: float, p: float, q: float) -> None:
    low, high = (min(a, b), min(p, q)), (max(a, b), max(p, q))
    assert 0 <= margin(*low, settings=SETTINGS) <= margin(*high, settings=SETTINGS) <= 2 * SETTINGS.margin


def test_the_margin_begins_and_ends_where_the_settings_say() -> None:
    assert margin(SETTINGS.edges_from, SETTINGS.agreement_from, settings=SETTINGS) == 0
    assert margin(SETTINGS.edges_to, 0.0, settings=SETTINGS) == SETTINGS.margin
    assert margin(0.0, SETTINGS.agreement_to, settings=SETTINGS) == SETTINGS.margin
    assert margin(1.25, 0.875, settings=SETTINGS) == pytest.approx(SETTINGS.margin)


def test_where_the_model_is_sure_its_mask_stands_and_elsewhere_the_coarse_one() -> None:
    image, coarse = photograph(), OBJECT.copy()
    coarse[28:33, 35:45] = False  # a hole, of which the model is sure that it is none
    depth = masks.distance_inside(OBJECT, border_is_background=False)
    outside = masks.distance_inside(~OBJECT, border_is_background=False)
    logits = (0.8 * (depth - outside - 1.5)).astype(np.float32)  # a model whose outline is 1.5 px too tight
    refined = logits > 0
    result = settled(image, coarse, refined, logits, settings=SETTINGS)
    assert masks.iou(result, OBJECT) > 0.99 > masks.iou(refined, OBJECT) + 0.05
    width = margin(alignment(image, coarse), masks.iou(coarse, refined), settings=SETTINGS)
    sure = np.abs(logits) >= width
    assert (result[sure] == refined[sure]).all()
    assert (result[~sure] == coarse[~sure]).all()


def test_a_blob_without_edges_gets_no_say() -> None:
    blob = disc(48, 36, 22)
    logits = np.where(OBJECT, 0.2, -0.2).astype(np.float32)
    assert (settled(photograph(), blob, OBJECT, logits, settings=SETTINGS) == OBJECT).all()


def test_logits_are_spread_as_masks_are() -> None:
    """Bilinear with cell centres: a ramp stays a ramp."""
    ramp = np.arange(8, dtype=np.float32)[None].repeat(6, axis=0)
    fine = spread(ramp, (24, 32))
    np.testing.assert_allclose(fine[0, 4:-4], (np.arange(32)[4:-4] + 0.5) / 4 - 0.5, atol=1e-6)


@pytest.mark.parametrize(("mode", "trusts"), [("outline", True), ("none", False), ("auto", False)])
def test_refine_settles_where_it_is_told_to(mode: str, trusts: bool, tmp_path: Path) -> None:
    """The fake's logits are 8 and -8, beyond the usual margin: with a wider one the coarse mask comes back."""
    path = tmp_path / "picture.png"
    bright = np.where(OBJECT[..., None], 220, 30).repeat(3, axis=2).astype(np.uint8)
    Image.fromarray(bright).save(path)
    coarse = OBJECT.copy()
    coarse[20:24, 36:40] = False
    sample = Sample("one", path, SIZE, (Region(1, None, masks.encode(coarse)),))
    settings = RefineSettings(
        guard=NO_GUARD,
        snap=SnapSettings(mode="none"),
        trust=replace(SETTINGS, mode=mode, margin=9.0),  # type: ignore[arg-type]
    )
    refiner = Refiner(BrightBackend(), settings)
    prepared = refiner.prepare(sample)
    (annotation,) = refiner.finish(prepared, refiner.segment([prepared])[0]).annotations
    assert annotation.status == REFINED
    assert annotation.mask is not None
    assert (masks.decode(annotation.mask) == (coarse if trusts else OBJECT)).all()
