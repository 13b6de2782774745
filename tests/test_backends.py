"""One contract for all backends, run over the official classes at small sizes with random weights.

The independent references are the packages' own predictors, which preprocess, prompt and upsample by themselves, and
slow implementations written out here.
"""

import importlib
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from refinetool import masks
from refinetool.backends import weights
from refinetool.backends.batches import in_batches, power_of_two
from refinetool.backends.embedded import EmbeddedBackend
from refinetool.backends.frames import Frame, letterboxed, rasterise, squashed
from refinetool.backends.models import MODELS, find_model, load_backend, pick_device, read_state
from refinetool.backends.predictions import SquareEmbedding, SquarePrediction
from refinetool.backends.sam import HqSamBackend, SamBackend, import_hq_sam
from refinetool.backends.sam2 import Sam2Backend
from refinetool.backends.square import Precision, SquareBackend
from refinetool.errors import UsageError, WeightsError
from refinetool.masks import bounding_box
from refinetool.modules.embedded import EmbeddedModel, build_embedded
from refinetool.modules.head_files import build_head
from refinetool.modules.heads import Decoded, Prompted
from refinetool.modules.sam2_passes import normalised, see
from refinetool.records import BoolArray, FloatArray, ImageArray, Outcome, Prompts, Region, Sample, Size
from refinetool.refine import Refiner
from refinetool.running.journal import Journal
from refinetool.running.run import run
from refinetool.running.runners import ThreadRunner
from refinetool.settings import METHODS, NO_GUARD, ModelDefaults, RefineSettings, ViewSettings

SIDE, WIDTH = 128, 32
torch.set_num_threads(1)  # the models are so small that threads only wait for each other
LAYOUTS = ("all", "points", "box", "mask")
SIZES: tuple[Size, ...] = ((48, 64), (90, 33), (5, 7), (200, 310))


GPU_TOLERANCE = 1e-3
"""Of logits, where the kernels of a device don't give the same bits for a row whatever its place in a batch."""


# --- small models and prompts


def small_sam(modeling: ModuleType, decoder: Callable[..., nn.Module], **sizes: int) -> nn.Module:
    encoder = modeling.ImageEncoderViT(
        img_size=SIDE,
        embed_dim=WIDTH,
        depth=2,
        num_heads=2,
        out_chans=WIDTH,
        window_size=4,
        use_rel_pos=True,
        global_attn_indexes=(1,),
    )
    prompts = modeling.PromptEncoder(WIDTH, (SIDE // 16, SIDE // 16), (SIDE, SIDE), 16)
    transformer = modeling.TwoWayTransformer(depth=2, embedding_dim=WIDTH, num_heads=4, mlp_dim=64)
    model: nn.Module = modeling.Sam(encoder, prompts, decoder(transformer_dim=WIDTH, transformer=transformer, **sizes))
    return model


def small_sam2() -> nn.Module:
    from sam2.modeling.backbones.hieradet import Hiera
    from sam2.modeling.backbones.image_encoder import FpnNeck, ImageEncoder
    from sam2.modeling.position_encoding import PositionEmbeddingSine
    from sam2.modeling.sam2_base import SAM2Base

    trunk = Hiera(
        embed_dim=16,
        num_heads=1,
        stages=(1, 1, 2, 1),
        global_att_blocks=(3,),
        window_spec=(8, 4, 14, 7),
        window_pos_embed_bkg_spatial_size=(7, 7),
    )
    neck = FpnNeck(PositionEmbeddingSine(WIDTH), d_model=WIDTH, backbone_channel_list=trunk.channel_list)
    model: nn.Module = SAM2Base(
        ImageEncoder(trunk, neck, scalp=1),
        memory_attention=None,
        memory_encoder=None,
        num_maskmem=0,
        image_size=SIDE,
        directly_add_no_mem_embed=True,
        use_high_res_features_in_sam=True,
        iou_prediction_use_sigmoid=True,
        pred_obj_scores=True,
    )
    return model


def build(kind: str) -> tuple[type[SquareBackend], nn.Module]:
    match kind:
        case "sam":
            from segment_anything import modeling

            return SamBackend, small_sam(modeling, modeling.MaskDecoder)
        case "sam-hq":
            modeling = import_hq_sam().modeling
            return HqSamBackend, small_sam(modeling, modeling.MaskDecoderHQ, vit_dim=WIDTH)
        case "sam2" | "sam2 + detail" | "sam2 + sam2refiner":
            return Sam2Backend, small_sam2()
        case _:
            return EmbeddedBackend, build_embedded(image_size=SIDE)


def head_of(kind: str, model: nn.Module) -> nn.Module | None:
    """The head of a SAM 2 model, with weights that matter, as after training."""
    _, _, name = kind.partition(" + ")
    if not name:
        return model.detail if isinstance(model, EmbeddedModel) else None
    assert name in ("detail", "sam2refiner")
    head = build_head(name, {}, model)
    for parameter in head.parameters():
        parameter.data.add_(0.05 * torch.randn(parameter.shape))
    return head


HEADED = ("sam2 + detail", "sam2 + sam2refiner", "embedded + sam2refiner")


@cache
def backend_of(kind: str, precision: Precision = "fp32", device: str = "cpu") -> SquareBackend:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        adapter, model = build(kind)
        for parameter in model.parameters():
            # Plain initial weights ignore prompts almost entirely.
            if parameter.ndim > 1:
                parameter.data.mul_(2)
        options = {}
        if issubclass(adapter, Sam2Backend):
            options["head"] = head_of(kind, model)
    return adapter(
        model,
        **options,
        name=kind,
        defaults=ModelDefaults(selection="single"),
        fingerprint="-",
        base_fingerprint="-",
        device=device,
        precision=precision,
        image_batch=2,
        prompt_batch=4,
    )


@pytest.fixture(params=["sam", "sam-hq", "sam2", "embedded", *HEADED])
def backend(request: pytest.FixtureRequest) -> SquareBackend:
    return backend_of(request.param)


def picture(size: Size, seed: int = 0) -> ImageArray:
    """Smooth colours: they survive resizing, so that resampling filters hardly matter."""
    coarse = np.random.default_rng(seed).uniform(0, 255, (3, 4, 4))
    fine = F.interpolate(torch.tensor(coarse)[None], size, mode="bicubic", align_corners=False)[0]
    return fine.clamp(0, 255).permute(1, 2, 0).numpy().astype(np.uint8)


def blob(size: Size, *, centre: tuple[float, float], radius: float) -> BoolArray:
    """A disc; centre as a share of (H, W), radius as a share of the smaller side."""
    y, x = np.mgrid[: size[0], : size[1]] + 0.5
    inside: BoolArray = np.hypot(y - centre[0] * size[0], x - centre[1] * size[1]) <= radius * min(size)
    return inside


def prompts_for(size: Size, count: int, *, layout: str = "all", seed: int = 0) -> Prompts:
    rng = np.random.default_rng(seed)
    height, width = size
    points = rng.uniform(0, 1, (count, 2, 2)) * (width - 1, height - 1)
    corners = np.sort(rng.uniform(0, 1, (count, 2, 2)), axis=1) * (width, height)
    labels = np.tile((1, 0), (count, 1))
    labels[::3, 1] = -1
    points[::3, 1] = np.nan
    logits = [
        np.where(blob(size, centre=(a, b), radius=0.3), 15.0, -15.0) for a, b in rng.uniform(0.3, 0.7, (count, 2))
    ]
    with_points = 2 if layout in ("all", "points") else 0
    return Prompts(
        points=points.astype(np.float32)[:, :with_points],
        labels=labels[:, :with_points],
        boxes=corners.reshape(-1, 4).astype(np.float32) if layout in ("all", "box") else None,
        masks=np.array(logits, dtype=np.float32).reshape(count, *size) if layout in ("all", "mask") else None,
    )


def answer(backend: SquareBackend, image: ImageArray, prompts: Prompts) -> SquarePrediction:
    (prediction,) = backend.predict(backend.embed([image]), [prompts])
    assert isinstance(prediction, SquarePrediction)
    return prediction


def seen(backend: SquareBackend, image: ImageArray) -> SquareEmbedding:
    (embedding,) = backend.embed([image])
    assert isinstance(embedding, SquareEmbedding)
    return embedding


# --- the contract


def test_a_batch_equals_singles_to_the_last_bit(backend: SquareBackend) -> None:
    """Whatever else is asked: other images, other regions, other places in a batch of fixed size."""
    images = [picture(size, seed) for seed, size in enumerate(SIZES)]
    prompts = [
        prompts_for(size, count, layout=layout, seed=count)
        for size, count, layout in zip(SIZES, (2, 5, 1, 2), ("all", "mask", "all", "points"), strict=True)
    ]
    together = backend.predict(backend.embed(images), prompts)
    backwards = backend.predict(backend.embed(images[::-1]), prompts[::-1])[::-1]
    for image, asked, mixed, turned in zip(images, prompts, together, backwards, strict=True):
        alone = answer(backend, image, asked)
        assert isinstance(mixed, SquarePrediction)
        assert isinstance(turned, SquarePrediction)
        rows = [answer(backend, image, asked.take([n])) for n in range(len(asked))]
        assert torch.equal(mixed.grid, alone.grid)
        assert torch.equal(turned.grid, alone.grid)
        assert torch.equal(torch.cat([row.grid for row in rows]), alone.grid)
        for other in (mixed.scores, turned.scores, np.concatenate([row.scores for row in rows])):
            np.testing.assert_array_equal(other, alone.scores)


def test_all_batches_have_one_size(backend: SquareBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[int]] = {"encoder": [], "decoder": []}
    encode, decode = backend._encode, backend._decode
    monkeypatch.setattr(backend, "_encode", lambda pixels: (seen["encoder"].append(len(pixels)), encode(pixels))[1])
    monkeypatch.setattr(
        backend,
        "_decode",
        lambda embeddings, question: (seen["decoder"].append(len(embeddings)), decode(embeddings, question))[1],
    )
    embeddings = backend.embed([picture((20, 30), n) for n in range(5)])
    backend.predict(embeddings, [prompts_for((20, 30), 1, seed=n) for n in range(5)])
    assert seen["encoder"] == [2, 2, 2], "five images of different samples share three calls"
    assert seen["decoder"] == [4] * (2 if backend.mixes_images else 5)


@pytest.mark.parametrize(("given", "used"), [(1, 1), (2, 2), (3, 2), (8, 8), (31, 16), (32, 32)])
def test_batches_are_powers_of_two(given: int, used: int) -> None:
    assert power_of_two(given) == used


@pytest.mark.parametrize("fits", [1, 2, 3])
def test_a_batch_that_does_not_fit_is_halved(fits: int) -> None:
    sizes = []

    def call(rows: Sequence[int]) -> list[int]:
        sizes.append(len(rows))
        if len(rows) > fits:
            raise MemoryError
        return [10 * row for row in rows]

    assert in_batches(range(10), size=4, call=call) == [10 * row for row in range(10)]
    assert max(size for size in sizes if size <= fits) == min(fits, 2)


def test_a_row_that_does_not_fit_by_itself_is_reported() -> None:
    def call(rows: Sequence[int]) -> list[int]:
        raise MemoryError(f"{len(rows)} rows")

    with pytest.raises(MemoryError, match="1 rows"):
        in_batches([1, 2, 3], size=4, call=call)


def test_other_errors_are_not_tried_again() -> None:
    sizes = []

    def call(rows: Sequence[int]) -> list[int]:
        sizes.append(len(rows))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        in_batches([1, 2, 3], size=4, call=call)
    assert sizes == [4]


def test_a_run_that_was_stopped_ends_in_the_same_masks(backend: SquareBackend, tmp_path: Path) -> None:
    """Its batches hold other images than those of an uninterrupted run."""
    samples = []
    for n, size in enumerate(SIZES * 2):
        path = tmp_path / f"{n}.png"
        Image.fromarray(picture(size, n)).save(path)
        discs = [blob(size, centre=(0.3 + 0.1 * k, 0.6 - 0.1 * k), radius=0.35) for k in range(1 + n % 3)]
        regions = tuple(Region(k, None, masks.encode(disc)) for k, disc in enumerate(discs))
        samples.append(Sample(f"{n}", path, size, regions))
    refiner = Refiner(backend, RefineSettings(guard=NO_GUARD))

    def outcomes(path: Path, count: int) -> list[Outcome | None]:
        with Journal(path, job={}, fresh=False) as journal:
            runner = ThreadRunner(refiner, 2, {})
            run(
                samples[:count],
                runner,
                journal=journal,
                total=count,
                on_progress=lambda _: None,
                stop=threading.Event(),
            )
            return [journal.find(sample.key) for sample in samples]

    whole = outcomes(tmp_path / "whole", len(samples))
    assert None in outcomes(tmp_path / "parts", 3)
    assert outcomes(tmp_path / "parts", len(samples)) == whole


@pytest.mark.parametrize("kind", ["sam", "sam-hq", "sam2"])
def test_the_method_tight_box_is_the_official_box_prompt(kind: str) -> None:
    """No points are sent, not even absent ones: those would change the answer."""
    size = (90, 33)
    backend, image = backend_of(kind), picture(size)
    coarse = blob(size, centre=(0.5, 0.4), radius=0.4)
    settings = replace(METHODS["tight-box"], view=ViewSettings(mode="frame"))
    sample = Sample("1", Path(), size, (Region(1, None, masks.encode(coarse)),))
    (job,) = Refiner(backend, settings).prepare_pixels(sample, image).jobs
    ours = answer(backend, image, job.prompts).grid[:, 0]
    box = torch.tensor([bounding_box(coarse)], dtype=torch.float32)
    predictor: Any
    if kind == "sam2":
        from sam2.sam2_image_predictor import SAM2ImagePredictor

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch.jit.script", category=FutureWarning)
            predictor = SAM2ImagePredictor(backend.model)
        predictor._bb_feat_sizes = [(SIDE // stride, SIDE // stride) for stride in (4, 8, 16)]
        predictor.set_image(image)
        boxes = predictor._transforms.transform_boxes(box, normalize=True, orig_hw=size)
        _, _, official = predictor._predict(None, None, boxes, None, multimask_output=False, return_logits=True)
    else:
        package = importlib.import_module("segment_anything") if kind == "sam" else import_hq_sam()
        predictor = package.SamPredictor(backend.model)
        predictor.set_image(image)
        boxes = predictor.transform.apply_boxes_torch(box, size)
        _, _, official = predictor.predict_torch(None, None, boxes, None, multimask_output=False, return_logits=True)
    torch.testing.assert_close(ours.clamp(-32, 32), official[:, 0].clamp(-32, 32), rtol=1e-3, atol=1e-3)
    absent = replace(job.prompts, points=np.zeros((1, 2, 2), np.float32), labels=np.full((1, 2), -1))
    assert (answer(backend, image, absent).grid[:, 0] - official[:, 0]).abs().max() > 0.01, "it matters"


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["sam", "sam-hq", "sam2", "embedded", *HEADED])
def test_on_a_gpu_a_batch_equals_singles_within_a_tolerance(kind: str) -> None:
    backend = backend_of(kind, device="cuda")
    images = [picture(size, seed) for seed, size in enumerate(SIZES)]
    prompts = [prompts_for(size, 2, seed=n) for n, size in enumerate(SIZES)]
    together = backend.predict(backend.embed(images), prompts)
    for image, asked, mixed in zip(images, prompts, together, strict=True):
        alone = answer(backend, image, asked)
        assert isinstance(mixed, SquarePrediction)
        torch.testing.assert_close(mixed.grid, alone.grid, rtol=GPU_TOLERANCE, atol=GPU_TOLERANCE)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("count", [0, 1, 40])
def test_any_number_of_regions_with_any_prompts(backend: SquareBackend, count: int, layout: str) -> None:
    size = (48, 64)
    predicted = answer(backend, picture(size), prompts_for(size, count, layout=layout))
    k = backend.candidates
    assert predicted.scores.shape == (count, k)
    assert predicted.scores.dtype == np.float32
    assert np.isfinite(predicted.scores).all()
    masks = predicted.masks(np.zeros(count, dtype=np.int64))
    assert masks.shape == (count, *size)
    assert masks.dtype == np.bool_
    assert predicted.overlap(masks).shape == (count, k)


@pytest.mark.parametrize("size", SIZES)
def test_masks_come_back_at_view_size(backend: SquareBackend, size: Size) -> None:
    (embedding,) = backend.embed([picture(size)])
    assert embedding.size == size
    (predicted,) = backend.predict([embedding], [prompts_for(size, 2)])
    assert predicted.masks(np.array([0, 1])).shape == (2, *size)


def test_an_image_without_regions_among_others(backend: SquareBackend) -> None:
    images = [picture((20, 30), seed) for seed in range(3)]
    prompts = [prompts_for((20, 30), count) for count in (0, 2, 0)]
    counts = [len(predicted.scores) for predicted in backend.predict(backend.embed(images), prompts)]
    assert counts == [0, 2, 0]


def test_no_images_give_nothing(backend: SquareBackend) -> None:
    assert backend.embed([]) == []
    assert backend.predict([], []) == []


def test_prompts_that_ask_nothing_are_refused(backend: SquareBackend) -> None:
    nothing = Prompts(np.zeros((1, 0, 2), np.float32), np.zeros((1, 0), np.int64), None, None)
    with pytest.raises(ValueError, match="neither points nor boxes nor masks"):
        answer(backend, picture((20, 30)), nothing)


def test_inputs_stay_as_they_are(backend: SquareBackend) -> None:
    image, prompts, choice = picture((20, 30)), prompts_for((20, 30), 3), np.array([0, 1, 1])
    given_masks = np.array([blob((20, 30), centre=(0.5, 0.5), radius=0.3)] * 3)
    arrays = [image, prompts.points, prompts.labels, prompts.boxes, prompts.masks, choice, given_masks]
    before = [array.copy() for array in arrays if array is not None]
    for array in arrays:
        assert array is not None
        array.flags.writeable = False
    (embedding,) = backend.embed([image])
    embedding.similarity(given_masks)
    (predicted,) = backend.predict([embedding], [prompts])
    predicted.masks(choice)
    predicted.overlap(given_masks)
    for array, old in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(array, old)


def test_prompts_of_every_kind_count(backend: SquareBackend) -> None:
    size = (48, 64)
    base = prompts_for(size, 1, seed=1)
    other = prompts_for(size, 1, seed=2)
    reference = answer(backend, picture(size), base).grid
    for changed in (
        Prompts(other.points, base.labels, base.boxes, base.masks),
        Prompts(base.points, np.array([[0, -1]]), base.boxes, base.masks),
        Prompts(base.points, base.labels, other.boxes, base.masks),
        Prompts(base.points, base.labels, base.boxes, other.masks),
    ):
        difference = (answer(backend, picture(size), changed).grid - reference).abs().max()
        assert difference > 1e-3 * reference.abs().max()


def test_coordinates_of_absent_points_mean_nothing(backend: SquareBackend) -> None:
    size = (48, 64)
    points = np.array([[(10, 20), (np.nan, np.inf)]], dtype=np.float32)
    labels = np.array([[1, -1]])
    elsewhere = np.array([[(10, 20), (3, 4)]], dtype=np.float32)
    one, two = (answer(backend, picture(size), Prompts(p, labels, None, None)) for p in (points, elsewhere))
    torch.testing.assert_close(one.grid, two.grid, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["sam", "sam-hq", "sam2", "embedded", *HEADED])
def test_bf16_is_near_fp32(kind: str) -> None:
    size = (48, 64)
    precise, fast = (answer(backend_of(kind, p), picture(size), prompts_for(size, 3)) for p in ("fp32", "bf16"))
    assert fast.grid.dtype == torch.float32
    error = (fast.grid - precise.grid).norm() / precise.grid.norm()
    assert 0 < error < 0.1
    np.testing.assert_allclose(fast.scores, precise.scores, rtol=0.1, atol=0.05)


def test_similarity_is_a_cosine_on_the_feature_grid(backend: SquareBackend) -> None:
    size = (40, 100)
    masks = np.array([blob(size, centre=(0.5, 0.3), radius=0.4), np.zeros(size, bool), np.zeros(size, bool)])
    masks[2, 0, 0] = True
    similarity = seen(backend, picture(size)).similarity(masks)
    assert similarity.shape[0] == 3
    assert similarity.dtype == np.float32
    assert np.abs(similarity).max() <= 1 + 1e-6
    assert (similarity[1] == 0).all()
    np.testing.assert_allclose(similarity[2, 0, 0], 1, rtol=1e-5, err_msg="a mask too small for any cell's centre")


# --- against the packages' own predictors


def official_points(frame: Frame, prompts: Prompts) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixel centres of the view as pixel indices of the model, worked out point by point."""
    down, across = frame.filled[0] / frame.view[0], frame.filled[1] / frame.view[1]
    placed = [
        [((x + 0.5) * across - 0.5, (y + 0.5) * down - 0.5) if label >= 0 else (0, 0) for (x, y), label in row]
        for row in (list(zip(p, q, strict=True)) for p, q in zip(prompts.points, prompts.labels, strict=True))
    ]
    return torch.tensor(placed, dtype=torch.float32), torch.tensor(prompts.labels)


@pytest.mark.parametrize("kind", ["sam", "sam-hq"])
@pytest.mark.parametrize("size", [(48, 64), (90, 33)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sam_as_its_own_predictor(kind: str, size: Size, layout: str) -> None:
    package: Any = import_hq_sam() if kind == "sam-hq" else pytest.importorskip("segment_anything")
    backend, image, prompts = backend_of(kind), picture(size), prompts_for(size, 3, layout=layout)
    frame = letterboxed(size, side=SIDE)
    predictor = package.SamPredictor(backend.model)
    predictor.set_image(image)
    torch.testing.assert_close(seen(backend, image).features, predictor.features[0], rtol=1e-4, atol=1e-4)

    points, labels = official_points(frame, prompts) if prompts.labels.size else (None, None)
    boxes = None
    if prompts.boxes is not None:
        boxes = predictor.transform.apply_boxes_torch(torch.tensor(prompts.boxes), size)
    masks = None
    if prompts.masks is not None:
        masks = rasterise(torch.tensor(prompts.masks), frame, cells=SIDE // 4)[:, None]
    expected = [
        predictor.predict_torch(points, labels, boxes, masks, multimask_output=many, return_logits=True)
        for many in (False, True)
    ]
    logits, scores = (torch.cat([part[i] for part in expected], dim=1) for i in (2, 1))
    ours = answer(backend, image, prompts)
    torch.testing.assert_close(ours.grid, logits, rtol=1e-3, atol=1e-3 * float(logits.abs().max()))
    np.testing.assert_allclose(ours.scores, scores, rtol=1e-3, atol=1e-4)

    official = torch.cat([part[0] for part in expected], dim=1) > 0
    agreement = [np.mean(ours.masks(np.full(3, k)) == official[:, k].numpy()) for k in range(backend.candidates)]
    assert min(agreement) > 0.97, "read once or resized twice: only pixels on an edge may differ"


@pytest.mark.parametrize("kind", ["sam2", "embedded"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sam2_as_its_own_predictor(kind: str, layout: str) -> None:
    from sam2.sam2_image_predictor import SAM2ImagePredictor

    size = (90, 33)
    backend, image, prompts = backend_of(kind), picture(size), prompts_for(size, 3, layout=layout)
    frame = squashed(size, side=SIDE)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.jit.script", category=FutureWarning)
        predictor = SAM2ImagePredictor(backend.model)
    predictor._bb_feat_sizes = [(SIDE // stride, SIDE // stride) for stride in (4, 8, 16)]
    predictor.set_image(image)
    torch.testing.assert_close(seen(backend, image).features, predictor.get_image_embedding()[0], rtol=1e-4, atol=1e-4)

    if layout == "mask":  # its predictor can't; SAM2Base pads by one absent point, the prompt encoder by another
        points, labels = torch.zeros((3, 1, 2)), torch.full((3, 1), -1)
    else:
        points, labels = official_points(frame, prompts) if prompts.labels.size else (None, None)
    if kind == "embedded" and not prompts.labels.size:  # trained with two points, absent ones included
        points, labels = torch.zeros((3, 2, 2)), torch.full((3, 2), -1)
    boxes = None
    if prompts.boxes is not None:
        boxes = predictor._transforms.transform_boxes(torch.tensor(prompts.boxes), normalize=True, orig_hw=size)
    masks = None
    if prompts.masks is not None:
        masks = rasterise(torch.tensor(prompts.masks), frame, cells=SIDE // 4)[:, None]
    expected = [
        predictor._predict(points, labels, boxes, masks, multimask_output=many, return_logits=True)
        for many in (False, True)
    ]
    logits, scores = (torch.cat([part[i] for part in expected], dim=1) for i in (2, 1))
    # The embedded model's detail head changes the single mask; its decoder is SAM2's.
    head = kind == "embedded"
    ours = backend.predict_tokens(seen(backend, image), prompts).tokens if head else answer(backend, image, prompts)
    bounded = ours.grid.clamp(-32, 32)  # as the predictor returns them
    torch.testing.assert_close(bounded, logits, rtol=1e-3, atol=1e-3 * float(logits.abs().max()))
    np.testing.assert_allclose(ours.scores, scores, rtol=1e-3, atol=1e-4)
    official = torch.cat([part[0] for part in expected], dim=1) > 0
    for k in range(4):
        assert np.mean(ours.masks(np.full(3, k)) == official[:, k].numpy()) > 0.999


def test_the_embedded_model_sees_what_it_was_trained_on() -> None:
    backend, image = backend_of("embedded"), picture((SIDE, SIDE))
    colours = torch.tensor(image).permute(2, 0, 1)[None].float() / 255
    with torch.no_grad():
        features = see(backend.model, normalised(colours))
        maps = backend.model.detail.look(features).maps
    embedding = seen(backend, image)
    torch.testing.assert_close(embedding.features, features.embedding[0])
    # The image at S/2 is further on than in the plain head; what comes of it is compared below.
    of_the_head = (maps[0], None, *maps[2:])
    for ours, theirs in zip(embedding.extras, (*features.fine_maps, *of_the_head), strict=True):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", ["all", "mask", "box"])
def test_the_detail_head_corrects_the_single_mask_only(layout: str) -> None:
    size = (SIDE, SIDE)
    backend, image, prompts = backend_of("embedded"), picture(size), prompts_for(size, 3, layout=layout)
    found = answer(backend, image, prompts)
    tokens = backend.predict_tokens(seen(backend, image), prompts).tokens
    assert found.grid.shape == (3, 4, SIDE // 2, SIDE // 2)
    np.testing.assert_allclose(found.scores[:, 1:], tokens.scores[:, 1:], atol=1e-5)

    colours = torch.tensor(image).permute(2, 0, 1)[None].float() / 255
    coarse = torch.zeros(3, SIDE // 2, SIDE // 2)
    if prompts.masks is not None:
        share = F.interpolate(
            torch.tensor(prompts.masks > 0)[None].float(), (SIDE // 2, SIDE // 2), mode="bilinear", antialias=True
        )[0]
        coarse = torch.where(share > 0.5, 1.0, -1.0)
    with torch.no_grad():
        maps = [
            one.expand(3, -1, -1, -1) for one in backend.model.detail.look(see(backend.model, normalised(colours))).maps
        ]
        nothing = torch.zeros(3, 0, 0)
        decoded = Decoded(tokens.grid, nothing, nothing, nothing, nothing, ())
        refined, score, _ = backend.model.detail(maps, Prompted(None, coarse), decoded)
        assert score is not None
    torch.testing.assert_close(found.grid[:, 0], refined, rtol=1e-3, atol=1e-3 * float(refined.abs().max()))
    np.testing.assert_allclose(found.scores[:, 0], score, atol=1e-4)
    assert (found.grid[:, 0] - F.interpolate(tokens.grid, scale_factor=2, mode="bilinear")[:, 0]).abs().max() > 0.01


# --- frames: there and back


FRAMES = st.builds(
    lambda make, h, w: make((h, w), side=1024),
    st.sampled_from((letterboxed, squashed)),
    st.integers(1, 3000),
    st.integers(1, 3000),
)


@given(frame=FRAMES, x=st.floats(0, 1), y=st.floats(0, 1))
def test_points_keep_their_place(frame: Frame, x: float, y: float) -> None:
    height, width = frame.view
    point = np.array([[(x * (width - 1), y * (height - 1))]], dtype=np.float32)
    placed = frame.place_points(point, np.array([[1]]))[0, 0]
    shares = (placed[::-1] + 0.5) / frame.filled
    np.testing.assert_allclose(shares, (point[0, 0, ::-1] + 0.5) / frame.view, rtol=1e-4, atol=1e-4)
    assert (shares > 0).all()
    assert (shares < 1).all()


@given(frame=FRAMES)
def test_the_box_of_the_view_is_what_it_fills(frame: Frame) -> None:
    height, width = frame.view
    placed = frame.place_boxes(np.array([[0, 0, width, height]], dtype=np.float32))
    np.testing.assert_allclose(placed, [[0, 0, frame.filled[1], frame.filled[0]]], rtol=1e-5)


def test_a_letterboxed_view_has_the_official_size() -> None:
    from segment_anything.utils.transforms import ResizeLongestSide

    for view in ((480, 640), (333, 500), (1, 1), (5, 7), (2000, 1999)):
        assert letterboxed(view, side=1024).filled == ResizeLongestSide.get_preprocess_shape(*view, 1024)
    assert letterboxed((1, 5000), side=1024).filled == (1, 1024), "the official size would be empty"


def test_masks_are_read_at_the_right_place() -> None:
    """A logit that is linear in the model's square is linear in the view: known pixel by pixel."""
    for frame in (letterboxed((37, 60), side=SIDE), letterboxed((60, 37), side=SIDE), squashed((37, 60), side=SIDE)):
        cells = SIDE // 4
        centres = (torch.arange(cells) + 0.5) * 4  # in model pixels
        logits = (0.7 * centres[:, None] + 0.4 * centres - 45.0).expand(1, 1, cells, cells)
        candidates = SquarePrediction(frame, logits, torch.zeros(1, 1))
        (mask,) = candidates.masks(np.array([0]))
        y, x = (np.mgrid[: frame.view[0], : frame.view[1]] + 0.5) * np.reshape(frame.scale, (2, 1, 1))
        inner = (y > 2) & (x > 2) & (y < SIDE - 2) & (x < SIDE - 2)  # bilinear reading is flat beyond
        values = 0.7 * y + 0.4 * x - 45.0
        np.testing.assert_array_equal(mask[inner], (values > 0)[inner])


def test_candidates_are_chosen_per_region() -> None:
    signs = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
    candidates = SquarePrediction(
        squashed((3, 4), side=16), signs[..., None, None].expand(2, 2, 4, 4), torch.zeros(2, 2)
    )
    assert candidates.masks(np.array([0, 0])).mean(axis=(1, 2)).tolist() == [1, 0]
    assert candidates.masks(np.array([1, 1])).mean(axis=(1, 2)).tolist() == [0, 1]


def test_overlap_is_the_iou_on_the_grid() -> None:
    rng = np.random.default_rng(0)
    frame = squashed((32, 32), side=SIDE)  # pixels are the cells of the mask grid
    logits = torch.tensor(rng.normal(size=(3, 4, 32, 32)), dtype=torch.float32)
    masks = rng.random((3, 32, 32)) > 0.5
    candidates = logits.numpy() > 0
    expected = [
        [(candidates[n, k] & masks[n]).sum() / (candidates[n, k] | masks[n]).sum() for k in range(4)] for n in range(3)
    ]
    np.testing.assert_allclose(SquarePrediction(frame, logits, torch.zeros(3, 4)).overlap(masks), expected, rtol=1e-6)


@pytest.mark.parametrize("frame", [squashed((37, 60), side=SIDE), letterboxed((64, 128), side=SIDE)])
def test_logits_can_go_in_again_as_they_came_out(frame: Frame) -> None:
    """Logits of a prediction, brought to the model's mask grid again, are what they were wherever the view is."""
    grid = torch.tensor(np.random.default_rng(1).normal(scale=20, size=(2, 3, 32, 32)), dtype=torch.float32)
    prediction = SquarePrediction(frame, grid, torch.zeros(2, 3))
    again = rasterise(torch.tensor(prediction.logits(np.array([2, 0]))), frame, cells=32)
    height, width = (int(cells) for cells in frame.extent(32))
    expected = grid[[0, 1], [2, 0], :height, :width].clamp(-32, 32)
    torch.testing.assert_close(again[:, :height, :width], expected, rtol=1e-5, atol=1e-4)


def test_stability_is_the_iou_of_two_thresholds() -> None:
    frame = letterboxed((64, 128), side=SIDE)
    grid = torch.tensor(np.random.default_rng(2).normal(size=(2, 3, 32, 32)), dtype=torch.float32)
    grid[1, 2] = -5.0
    stability = SquarePrediction(frame, grid, torch.zeros(2, 3)).stability(0.5)
    for n, k in np.ndindex(2, 3):
        tight, loose = (grid[n, k, :16].numpy() > cut for cut in (0.5, -0.5))
        expected = (tight & loose).sum() / (tight | loose).sum() if loose.any() else 1.0
        assert stability[n, k] == pytest.approx(expected)


def test_overlap_leaves_padding_out() -> None:
    frame = letterboxed((32, 64), side=SIDE)
    candidates = SquarePrediction(frame, torch.ones((1, 1, 32, 32)), torch.zeros(1, 1))
    assert candidates.overlap(np.ones((1, 32, 64), dtype=bool)).item() == 1
    nothing = SquarePrediction(frame, -torch.ones((1, 1, 32, 32)), torch.zeros(1, 1))
    assert nothing.overlap(np.zeros((1, 32, 64), dtype=bool)).item() == 1


def slow_similarity(features: FloatArray, frame: Frame, mask: BoolArray) -> FloatArray:
    """Cell by cell: collect the features whose centre the mask covers, take cosines, then stretch to the view."""
    cells = features.shape[-1]
    size_px = frame.side / cells
    collected = []
    for i in range(cells):
        for j in range(cells):
            y, x = ((i + 0.5) * size_px / frame.scale[0], (j + 0.5) * size_px / frame.scale[1])
            if y < frame.view[0] and x < frame.view[1] and mask[int(y), int(x)]:
                collected.append(features[:, i, j])
    query = np.mean(collected, axis=0)
    extent = (frame.filled[0] / size_px, frame.filled[1] / size_px)
    rows, columns = int(np.ceil(extent[0])), int(np.ceil(extent[1]))
    cosine = np.array(
        [
            [
                features[:, i, j] @ query / np.linalg.norm(features[:, i, j]) / np.linalg.norm(query)
                for j in range(columns)
            ]
            for i in range(rows)
        ]
    )
    at_rows = (np.arange(rows) + 0.5) * extent[0] / rows - 0.5
    at_columns = (np.arange(columns) + 0.5) * extent[1] / columns - 0.5
    stretched = np.array([np.interp(at_rows, np.arange(rows), column) for column in cosine.T]).T
    return np.array([np.interp(at_columns, np.arange(columns), row) for row in stretched], dtype=np.float32)


@pytest.mark.parametrize(
    "frame", [letterboxed((30, 70), side=256), letterboxed((70, 41), side=256), squashed((30, 70), side=256)]
)
def test_similarity_equals_the_slow_way(frame: Frame) -> None:
    features = torch.tensor(np.random.default_rng(1).normal(1, 1, (6, 16, 16)), dtype=torch.float32)
    masks = np.array([blob(frame.view, centre=c, radius=0.4) for c in ((0.5, 0.5), (0.2, 0.9))])
    ours = SquareEmbedding(frame, features, ()).similarity(masks)
    for similarity, mask in zip(ours, masks, strict=True):
        np.testing.assert_allclose(similarity, slow_similarity(features.numpy(), frame, mask), atol=1e-5)


# --- mask prompts


def official_raster(masks: torch.Tensor, size: Size) -> torch.Tensor:
    """SAM's way: resize so that the longer side has 1024 pixels, pad with background, resize to 256."""
    filled = letterboxed(size, side=1024).filled
    large = F.interpolate(masks[None], filled, mode="bilinear", align_corners=False)
    padded = F.pad(large, (0, 1024 - filled[1], 0, 1024 - filled[0]), value=-1.0)
    return F.interpolate(padded, (256, 256), mode="bilinear", align_corners=False)[0]


@pytest.mark.parametrize("size", [(333, 500), (500, 333), (1200, 1600), (60, 90)])
def test_mask_prompts_lie_where_the_official_way_puts_them(size: Size) -> None:
    masks = np.array([blob(size, centre=c, radius=0.3) for c in ((0.5, 0.5), (0.8, 0.3))])
    signs = torch.tensor(np.where(masks, 1.0, -1.0), dtype=torch.float32)
    ours = rasterise(signs, letterboxed(size, side=1024), cells=256) > 0
    official = official_raster(signs, size) > 0
    shared, either = (ours & official).sum(dim=(1, 2)), (ours | official).sum(dim=(1, 2))
    assert (shared / either > 0.985).all()


def test_mask_prompts_are_sharp() -> None:
    mask = blob((100, 150), centre=(0.5, 0.5), radius=0.3)
    frame = letterboxed((100, 150), side=SIDE)
    for background in (-15.0, 0.0):
        logits = torch.tensor(np.where(mask, 15.0, background), dtype=torch.float32)[None]
        values = rasterise(logits, frame, cells=32).round(decimals=3).abs().unique()
        assert set(values.tolist()) == {15.0, abs(background)}


def test_a_mask_that_fills_the_view_has_background_in_the_padding() -> None:
    frame = letterboxed((50, 100), side=SIDE)
    (grid,) = rasterise(torch.full((1, 50, 100), 7.0), frame, cells=32)
    torch.testing.assert_close(grid[:16], torch.full((16, 32), 7.0))
    torch.testing.assert_close(grid[16:], torch.full((16, 32), -7.0))


def test_a_prompt_on_the_models_own_grid_is_left_alone() -> None:
    logits = torch.tensor(np.random.default_rng(0).normal(size=(2, 32, 32)), dtype=torch.float32)
    torch.testing.assert_close(rasterise(logits, squashed((91, 77), side=SIDE), cells=32), logits)


def test_a_view_one_cell_wide_is_not_smeared() -> None:
    logits = torch.tensor([15.0, -15.0]).view(1, 2, 1)
    (grid,) = rasterise(logits, letterboxed((16, 1), side=1024), cells=16)
    assert (grid[:, 0] > 0).tolist() == [True] * 8 + [False] * 8


@settings(max_examples=60)
@given(
    frame=FRAMES,
    grid=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    spot=st.tuples(st.floats(0, 0.999), st.floats(0, 0.999)),
)
def test_a_tiny_mask_keeps_a_cell_in_its_place(frame: Frame, grid: Size, spot: tuple[float, float]) -> None:
    cells = 16
    y, x = int(spot[0] * grid[0]), int(spot[1] * grid[1])
    logits = torch.full((1, *grid), -15.0)
    logits[0, y, x] = 15.0
    ys, xs = (rasterise(logits, frame, cells=cells)[0] > 0).nonzero(as_tuple=True)
    assert len(ys) > 0
    height, width = frame.extent(cells)
    for at, span, size, index in ((ys, height, grid[0], y), (xs, width, grid[1], x)):
        assert at.min() + 1 >= index / size * span - 0.5
        assert at.max() <= (index + 1) / size * span + 0.5


# --- names and weights


def test_every_name_but_the_embedded_one_has_published_weights() -> None:
    assert set(MODELS) - {"embedded"} == set(weights.PUBLISHED) - {"resnet50"}


def test_an_unknown_name_gets_the_nearest_one() -> None:
    with pytest.raises(UsageError, match=r"no model 'sam2.1-hiera-xl'; did you mean sam2.1-hiera-l\?.*embedded, sam-"):
        find_model("sam2.1-hiera-xl")


def load(checkpoint: str | None, *, device: str = "cpu", precision: str = "fp32") -> SquareBackend:
    backend = load_backend("embedded", checkpoint=checkpoint, device=device, precision=precision)
    assert isinstance(backend, SquareBackend)
    return backend


def test_random_weights_repeat_and_leave_the_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, two, other = load("random:0"), load("random:0"), load("random:1")
    torch.testing.assert_close(torch.rand(3), expected)
    assert one.fingerprint == two.fingerprint != other.fingerprint
    assert len(one.fingerprint) == 64
    assert (one.name, one.defaults.view, one.defaults.selection) == ("embedded", "crop", "single")
    image, prompts = picture((40, 30)), prompts_for((40, 30), 2)
    torch.testing.assert_close(answer(one, image, prompts).grid, answer(two, image, prompts).grid)


def test_a_checkpoint_brings_its_weights(tmp_path: Path) -> None:
    source = load("random:3")
    state = {name: tensor.contiguous() for name, tensor in source.model.state_dict().items()}
    save_file(state, tmp_path / "a.safetensors")
    torch.save(state, tmp_path / "b.pt")
    torch.save({"model": state}, tmp_path / "c.pth")
    image, prompts = picture((40, 30)), prompts_for((40, 30), 2)
    expected = answer(source, image, prompts).grid
    fingerprints = set()
    for path in sorted(tmp_path.iterdir()):
        loaded = load(str(path))
        fingerprints.add(loaded.fingerprint)
        torch.testing.assert_close(answer(loaded, image, prompts).grid, expected)
    assert len(fingerprints) == 3, "they are of the file"
    assert load(str(path)).fingerprint in fingerprints


def test_half_precision_weights_load(tmp_path: Path) -> None:
    state = {name: tensor.half().contiguous() for name, tensor in load("random:3").model.state_dict().items()}
    save_file(state, tmp_path / "half.safetensors")
    assert next(load(str(tmp_path / "half.safetensors")).model.parameters()).dtype == torch.float32


def test_a_checkpoint_of_another_model_is_named(tmp_path: Path) -> None:
    state = load("random:0").model.state_dict()
    state["no_mem_embed"] = torch.zeros(1, 1, 7)
    state["head.weight"] = state.pop("no_mem_pos_enc")
    torch.save(state, tmp_path / "other.pt")
    with pytest.raises(WeightsError) as caught:
        load(str(tmp_path / "other.pt"))
    message = str(caught.value)
    assert "other.pt does not fit embedded" in message
    assert "1 tensors are missing (no_mem_pos_enc)" in message
    assert "1 tensors are not expected (head.weight)" in message
    assert "no_mem_embed is (1, 1, 7), expected (1, 1, 128)" in message


class Malicious:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return (Path.touch, (Path("opened-by-a-checkpoint"),))  # type: ignore[return-value]


def test_a_checkpoint_never_runs_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Malicious()}, tmp_path / "bad.pt")
    with pytest.raises(WeightsError, match=r"bad\.pt can't be read as weights") as refusal:
        load(str(tmp_path / "bad.pt"))
    assert "weights_only" not in str(refusal.value), "torch's advice is to run the code"
    assert not (tmp_path / "opened-by-a-checkpoint").exists()


@pytest.mark.parametrize("name", ["cut.pt", "cut.safetensors"])
def test_an_incomplete_checkpoint_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    state = {"a": torch.zeros(1000)}
    if path.suffix == ".pt":
        torch.save(state, path)
    else:
        save_file(state, path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(WeightsError, match="can't be read as weights"):
        read_state(path)


def test_a_file_without_tensors_is_refused(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(WeightsError, match="holds a list, expected named tensors"):
        read_state(tmp_path / "list.pt")


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"nowhere\.pt can't be read: No such file"):
        load(str(tmp_path / "nowhere.pt"))


def test_official_weights_that_are_not_cached_are_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REFINETOOL_CACHE", str(tmp_path))
    with pytest.raises(WeightsError, match="refinetool models fetch sam-vit-b") as caught:
        load_backend("sam-vit-b", checkpoint=None, device="cpu", precision="fp32")
    assert "sam_vit_b_01ec64.pth" in str(caught.value)
    assert "--checkpoint" in str(caught.value)


@pytest.mark.parametrize("checkpoint", ["random:", "random:x", "random:-1"])
def test_a_bad_seed_is_refused(checkpoint: str) -> None:
    with pytest.raises(UsageError, match="random:0"):
        load(checkpoint)


def test_devices_and_precisions_that_do_not_exist() -> None:
    with pytest.raises(UsageError, match="no device 'gpu'; the choices are auto, cpu, cuda and cuda:N"):
        load("random:0", device="gpu")
    with pytest.raises(UsageError, match=r"cuda:99 was asked for, but torch finds \d+ GPUs"):
        load("random:0", device="cuda:99")
    with pytest.raises(UsageError, match="no precision 'fp8'"):
        load("random:0", precision="fp8")
    assert pick_device("auto") in ("cpu", "cuda")


def test_the_table_of_models_needs_no_torch() -> None:
    code = "import sys, refinetool.backends.models; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- the real sizes


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MODELS if not name.endswith(("vit-l", "vit-h"))])
def test_official_sizes_build_and_answer(name: str) -> None:
    backend = load_backend(name, checkpoint="random:0", device="cpu", precision="fp32")
    assert isinstance(backend, SquareBackend)
    size = (60, 90)
    for layout in ("all", "mask"):
        predicted = answer(backend, picture(size), prompts_for(size, 2, layout=layout))
        assert np.isfinite(predicted.scores).all()
        assert predicted.masks(np.zeros(2, dtype=np.int64)).shape == (2, *size)


@pytest.mark.slow
def test_a_compiled_encoder_answers_as_the_plain_one_up_to_rounding() -> None:
    plain, compiled = (load_backend("embedded", checkpoint=None, device="cpu", precision="fp32") for _ in range(2))
    compiled.compile()
    view = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    (one,), (other,) = plain.embed([view]), compiled.embed([view])
    assert isinstance(one, SquareEmbedding)
    assert isinstance(other, SquareEmbedding)
    assert torch.allclose(one.features, other.features, atol=1e-4)


def test_an_encoder_that_can_not_be_compiled_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> object:
        def call(_: object) -> None:
            raise RuntimeError("no C++ compiler\nand much more")

        return call

    backend = load_backend("embedded", checkpoint=None, device="cpu", precision="fp32")
    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(UsageError, match=r"embedded can't be compiled here: no C\+\+ compiler; drop --compile$"):
        backend.compile()
