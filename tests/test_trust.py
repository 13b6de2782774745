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
from refinetool.masks import spread
from refinetool.post.trust import alignment, gradient, margin, settled
from refinetool.records import REFINED, BoolArray, ImageArray, Region, Sample
from refinetool.refine import Refiner
from refinetool.settings import NO_GUARD, RefineSettings, SnapSettings, TrustSettings

SIZE = (60, 80)
SETTINGS = TrustSettings(margin=1.0, edges_from=1.1, edges_to=1.4)


def disc(x: float, y: float, radius: float) -> BoolArray:
    ys, xs = np.mgrid[: SIZE[0], : SIZE[1]]
    return np.hypot(xs - x, ys - y) < radius


OBJECT = disc(40, 30, 18)


def photograph(of: BoolArray = OBJECT) -> ImageArray:
    """An object of another colour, with some noise."""
    noise = np.random.default_rng(0).normal(0, 4, (*SIZE, 3))
    return np.clip(np.where(of[..., None], [180, 90, 60], [60, 120, 90]) + noise, 0, 255).astype(np.uint8)


def on_outline(image: ImageArray, mask: BoolArray) -> float:
    """The mean alignment along the outline."""
    depth = ndimage.distance_transform_edt(mask) + ndimage.distance_transform_edt(~mask)
    return float(alignment(image, mask)[depth <= 1].mean())


def test_an_outline_on_an_edge_is_aligned_and_one_beside_it_is_not() -> None:
    image = photograph()
    on_edge, beside = on_outline(image, OBJECT), on_outline(image, disc(40, 30, 15))
    assert on_edge > SETTINGS.edges_to
    assert beside < SETTINGS.edges_from


def test_an_outline_is_trusted_only_where_it_is_good() -> None:
    """One half follows the object, the other is drawn loosely around it."""
    loose = OBJECT | (disc(40, 30, 25) & (np.arange(SIZE[1]) > 42))
    aligned = alignment(photograph(), loose)
    assert aligned[30, 22] > SETTINGS.edges_to
    assert aligned[30, 65] < SETTINGS.edges_from


def test_alignment_is_what_its_words_say() -> None:
    """Against SciPy's distances and blur on the whole image, the gradient taken as given."""
    image, mask = photograph(), disc(37, 28, 16)
    depth = ndimage.distance_transform_edt(mask) + ndimage.distance_transform_edt(~mask)
    change = gradient(image).astype(np.float64)
    radius = np.sqrt(mask.sum() / np.pi)

    def mean(where: BoolArray) -> np.ndarray:
        sigma = max(4.0, 0.35 * radius)
        weight, total = (
            ndimage.gaussian_filter(plane, sigma, mode="mirror") for plane in (where * 1.0, change * where)
        )
        return total / np.maximum(weight, 1e-9)

    expected = mean(depth <= 1) / np.maximum(mean(depth <= max(4.0, 0.2 * radius)), 1e-9)
    near = depth <= 6
    np.testing.assert_allclose(alignment(image, mask)[near], expected[near], rtol=0.02)


def test_the_gradient_is_the_root_of_squared_sobel_derivatives() -> None:
    image = photograph()
    squares = np.zeros(SIZE)
    for channel in range(3):
        calm = ndimage.gaussian_filter(image[..., channel].astype(np.float64), 1, mode="mirror", truncate=4)
        squares += ndimage.sobel(calm, axis=0, mode="mirror") ** 2 + ndimage.sobel(calm, axis=1, mode="mirror") ** 2
    np.testing.assert_allclose(gradient(image), np.sqrt(squares), rtol=0.02, atol=0.5)


@pytest.mark.parametrize("mask", [np.ones(SIZE, np.bool_), np.zeros(SIZE, np.bool_)])
def test_without_an_outline_there_is_nothing_to_align(mask: BoolArray) -> None:
    assert not alignment(photograph(), mask).any()


def test_a_flat_image_aligns_nothing() -> None:
    assert not alignment(np.full((*SIZE, 3), 90, np.uint8), OBJECT).any()


@given(st.floats(0, 5), st.floats(0, 5), st.floats(0, 1), st.floats(0, 1))
def test_the_margin_grows_with_alignment_and_agreement(a: float, b: float, p: float, q: float) -> None:
    low, high = (
        float(margin(np.array([choose(a, b)], np.float32), choose(p, q), settings=SETTINGS)[0]) for choose in (min, max)
    )
    assert 0 <= low <= high <= 2 * SETTINGS.margin


def test_the_margin_begins_and_ends_where_the_settings_say() -> None:
    aligned = np.array([1.0, SETTINGS.edges_from, 1.25, SETTINGS.edges_to, 9.0], np.float32)
    for agreement, factor in ((SETTINGS.agreement_from, 1.0), (0.875, 1.5), (SETTINGS.agreement_to, 2.0)):
        expected = np.array([0, 0, 0.5, 1, 1]) * factor * SETTINGS.margin
        np.testing.assert_allclose(margin(aligned, agreement, settings=SETTINGS), expected, atol=1e-5)


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
    blob = disc(40, 30, 27)
    logits = np.where(OBJECT, 0.8, -0.8).astype(np.float32)
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
    coarse[10:18, 36:44] = False
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
