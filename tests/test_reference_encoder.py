"""The reference encoder: shapes, invariances, gradients, and a pair that it learns; tokens in all decoders."""

import copy
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from test_backends import backend_of, build, picture
from torch import Tensor, nn

from refinetool.backends.image_encoders import (
    IMAGE_ENCODERS,
    Features,
    ImageEncoder,
    load_image_encoder,
)
from refinetool.backends.models import load_backend
from refinetool.backends.predictions import SquareEmbedding
from refinetool.backends.reference import (
    Prompter,
    load_prompter,
    read_reference_encoder,
    recipe_for,
    shipped_reference_weights,
)
from refinetool.backends.square import SquareBackend
from refinetool.errors import UsageError, WeightsError
from refinetool.modules.reference_encoder import (
    ReferenceEncoder,
    masked_mean,
    on_grid,
    pseudo_mask,
    sine_positions,
)
from refinetool.settings import ReferenceSettings
from refinetool.train.reference.step import mask_loss
from refinetool.train.reference.weights import write_reference_encoder

torch.set_num_threads(1)
SETTINGS = ReferenceSettings()
BACKENDS = ("sam", "sam-hq", "sam2", "embedded")
OFFICIAL = ("resnet50", "vgg16", "dinov2-b14")


def pairs(count: int, *, channels: int = 12, grid: tuple[int, int] = (6, 8), seed: int = 0) -> tuple[Tensor, ...]:
    """Reference, annotation, target and pseudo mask of some pairs."""
    generator = torch.Generator().manual_seed(seed)
    reference, target = (torch.randn(count, channels, *grid, generator=generator) for _ in range(2))
    annotation = (torch.rand(count, 1, *grid, generator=generator) > 0.6).float()
    return reference, annotation, target, torch.rand(count, 1, *grid, generator=generator)


def small(width: int = 16) -> ReferenceEncoder:
    torch.manual_seed(0)
    return ReferenceEncoder(mid_channels=12, width=width, queries=5, heads=4).eval()


# --- shapes and numbers


def test_with_resnet_50_it_has_the_papers_1_6_million_parameters() -> None:
    encoder = ReferenceEncoder(mid_channels=1536, width=256, queries=50, heads=4)
    attention = 4 * (256 * 256 + 256) + 2 * 256  # four projections and a norm
    assert (
        sum(p.numel() for p in encoder.parameters()) == 1536 * 256 + 513 * 256 + 4 * attention + 50 * 256 == 1_592_064
    )


@pytest.mark.parametrize("width", [8, 128, 256])
def test_tokens_have_the_width_of_the_decoder(width: int) -> None:
    assert small(width)(*pairs(3)).shape == (3, 5, width)


def test_the_grids_of_reference_and_target_may_differ() -> None:
    reference, annotation, _, _ = pairs(2, grid=(4, 5))
    _, _, target, pseudo = pairs(2, grid=(7, 3))
    assert small()(reference, annotation, target, pseudo).shape == (2, 5, 16)


def test_a_pair_gets_the_same_tokens_in_any_order_of_the_batch() -> None:
    given = pairs(4)
    order = [2, 0, 3, 1]
    tokens = small()(*given)
    assert torch.allclose(small()(*(part[order] for part in given)), tokens[order], atol=1e-5)
    assert torch.allclose(small()(*(part[1:2] for part in given)), tokens[1:2], atol=1e-5)


def test_tokens_depend_on_reference_annotation_target_and_pseudo_mask() -> None:
    given = pairs(1)
    tokens = small()(*given)
    for changed in range(4):
        other = [1 - part if part.shape[1] == 1 and n == changed else part for n, part in enumerate(given)]
        if changed in (0, 2):
            other[changed] = given[changed].flip(3)
        assert not torch.allclose(small()(*other), tokens, atol=1e-3), changed


def test_the_prototype_is_the_mean_under_the_annotation() -> None:
    reference, annotation, _, _ = pairs(3)
    found = masked_mean(reference, annotation)
    for row in range(3):
        cells = [reference[row, :, y, x] for y, x in annotation[row, 0].nonzero().tolist()]
        expected = torch.stack(cells).sum(0) / (len(cells) + 5e-4)
        assert torch.allclose(found[row, :, 0, 0], expected, atol=1e-6)


@pytest.mark.parametrize("normalise", [True, False])
def test_the_pseudo_mask_is_the_largest_cosine_to_an_annotated_cell(normalise: bool) -> None:
    reference, annotation, target, _ = pairs(2, grid=(3, 4))
    found = pseudo_mask(target, reference * annotation, normalise=normalise)
    for row in range(2):
        marked = [reference[row, :, y, x] for y, x in annotation[row, 0].nonzero().tolist()]
        slow = torch.tensor(
            [
                # cells outside the annotation are zero vectors, whose cosine is 0
                [
                    max([0.0, *(float(F.cosine_similarity(target[row, :, y, x], one, dim=0)) for one in marked)])
                    for x in range(4)
                ]
                for y in range(3)
            ]
        )
        if normalise:
            slow = (slow - slow.min()) / (slow.max() - slow.min())
        assert torch.allclose(found[row, 0], slow, atol=1e-5)


def test_an_empty_annotation_gives_a_flat_pseudo_mask_and_finite_tokens() -> None:
    reference, annotation, target, _ = pairs(1)
    nothing = torch.zeros_like(annotation)
    pseudo = pseudo_mask(target, reference * nothing, normalise=True)
    assert (pseudo == 0).all()
    assert small()(reference, nothing, target, pseudo).isfinite().all()


def test_a_single_pixel_survives_max_pooling_and_not_nearest() -> None:
    point = torch.zeros(1, 512, 512)
    point[0, 301, 77] = 1
    assert on_grid(point, (64, 64), resize="max").nonzero().tolist() == [[0, 0, 37, 9]]
    assert not on_grid(point, (64, 64), resize="nearest").any()
    assert on_grid(torch.ones(2, 3, 5), (6, 10), resize="max").all()  # a grid finer than the picture


def test_sine_positions_are_those_written_out() -> None:
    height, width, channels = 3, 5, 8
    found = sine_positions((height, width), channels=channels)
    for row in range(height):
        for column in range(width):
            for axis, (place, length) in enumerate(((row, height), (column, width))):
                for c in range(channels // 2):
                    angle = 2 * math.pi * (place + 1) / length / 10_000 ** (2 * (c // 2) / (channels // 2))
                    expected = math.sin(angle) if c % 2 == 0 else math.cos(angle)
                    assert found[row * width + column, axis * channels // 2 + c] == pytest.approx(expected, abs=1e-5)


def attended(layer: Any, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention with four heads, a residual connection and a norm, for one pair, written out."""
    width = queries.shape[1]
    weights, biases = layer.attention.in_proj_weight.chunk(3), layer.attention.in_proj_bias.chunk(3)
    q, k, v = (x @ w.T + b for x, w, b in zip((queries, keys, values), weights, biases, strict=True))
    answers = []
    for head in range(4):
        own = slice(head * width // 4, (head + 1) * width // 4)
        scores = (q[:, own] @ k[:, own].T / math.sqrt(width // 4)).softmax(dim=1)
        answers.append(scores @ v[:, own])
    summed = queries + torch.cat(answers, dim=1) @ layer.attention.out_proj.weight.T + layer.attention.out_proj.bias
    centred = summed - summed.mean(dim=1, keepdim=True)
    normed = centred / (centred.pow(2).mean(dim=1, keepdim=True) + 1e-5).sqrt()
    return normed * layer.norm.weight + layer.norm.bias


def test_tokens_are_those_written_out() -> None:
    """Equations 1 to 5 for one pair: positions are added to keys alone, and the mask channel is ten times the mask."""
    model = small()
    reference, annotation, target, pseudo = pairs(1)
    reduce, merge = (model.augmenter.reduce[0].weight[:, :, 0, 0], model.augmenter.merge[0].weight[:, :, 0, 0])
    cells = [(reduce @ part[0].flatten(1)).relu() for part in (reference, target)]  # (C, L)
    marks = [part[0].flatten(1) for part in (annotation, pseudo)]  # (1, L)
    prototype = (cells[0] * marks[0]).sum(1, keepdim=True) / (marks[0].sum() + 5e-4)
    augmented = [
        (merge @ torch.cat((one, prototype.expand_as(one), 10 * mark))).relu().T
        for one, mark in zip(cells, marks, strict=True)
    ]
    positions = sine_positions((6, 8), channels=16)
    generator = model.generator
    tokens: Tensor = generator.queries
    for own, ask, exchange in (
        (augmented[0], generator.ask_reference, generator.exchange_first),
        (augmented[1], generator.ask_target, generator.exchange_second),
    ):
        tokens = attended(ask, tokens, own + positions, own)
        tokens = attended(exchange, tokens, tokens, tokens)
    assert torch.allclose(model(reference, annotation, target, pseudo)[0], tokens, atol=1e-4)


# --- decoding


def tokens_for(backend: SquareBackend, rows: int, count: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, count, backend.token_width, generator=torch.Generator().manual_seed(seed))


def seen(backend: SquareBackend, size: tuple[int, int], seed: int = 0) -> SquareEmbedding:
    (embedding,) = backend.embed([picture(size, seed)])
    assert isinstance(embedding, SquareEmbedding)
    return embedding


def trainable(embedding: SquareEmbedding) -> SquareEmbedding:
    """The same values in tensors that may be part of a graph."""
    return replace(embedding, features=embedding.features.clone(), extras=tuple(e.clone() for e in embedding.extras))


def official_logits(kind: str, embedding: SquareEmbedding, tokens: Tensor) -> Tensor:
    """What the package's own decoder makes of tokens without a mask: the single-mask output, (1, m, m)."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        _, model = build(kind)
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data.mul_(2)
    network: Any = model.eval()
    prompts = network.sam_prompt_encoder if kind in ("sam2", "embedded") else network.prompt_encoder
    features = embedding.features[None].clone()
    dense = prompts.no_mask_embed.weight.reshape(1, -1, 1, 1).expand_as(features)
    with torch.no_grad():
        if kind in ("sam2", "embedded"):
            fine = [level[None].clone() for level in embedding.extras[:2]]
            logits, *_ = network.sam_mask_decoder(
                image_embeddings=features,
                image_pe=prompts.get_dense_pe(),
                sparse_prompt_embeddings=tokens,
                dense_prompt_embeddings=dense,
                multimask_output=False,
                repeat_image=False,
                high_res_features=fine,
            )
        else:
            logits, _ = network.mask_decoder(features, prompts.get_dense_pe(), tokens, dense, multimask_output=False)
    found: Tensor = logits[:, 0]
    return found


@pytest.mark.parametrize("kind", ["sam", "sam2", "embedded"])
def test_tokens_enter_the_decoder_as_in_the_official_one(kind: str) -> None:
    backend = backend_of(kind)
    embedding = seen(backend, (48, 64))
    tokens = tokens_for(backend, 1, 7)
    expected = official_logits(kind, embedding, tokens)
    assert torch.allclose(backend.decode_tokens([embedding], tokens), expected, atol=2e-4)
    if kind != "embedded":  # whose detail head follows
        assert torch.allclose(backend.predict_from_tokens(embedding, tokens).grid[:, 0], expected, atol=2e-4)


@pytest.mark.parametrize("kind", BACKENDS)
def test_several_targets_are_decoded_each_with_its_own_image(kind: str) -> None:
    """The decoder of SAM repeats one image for all prompts, so that a batch of targets fails or mixes them up."""
    backend = backend_of(kind)
    embeddings = [seen(backend, (48, 64), seed=n) for n in range(3)]
    tokens = tokens_for(backend, 3, 5)
    together = backend.decode_tokens(embeddings, tokens)
    for row, embedding in enumerate(embeddings):
        alone = backend.decode_tokens([embedding], tokens[row : row + 1])
        assert torch.allclose(together[row], alone[0], atol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=1e-3)


@pytest.mark.parametrize("kind", BACKENDS)
def test_rows_of_an_image_do_not_depend_on_each_other(kind: str) -> None:
    backend = backend_of(kind)
    embedding = seen(backend, (90, 33))
    tokens = tokens_for(backend, 6, 9)
    whole = backend.predict_from_tokens(embedding, tokens)
    assert whole.grid.shape[:2] == (6, backend.candidates)
    for row in (0, 5):
        alone = backend.predict_from_tokens(embedding, tokens[row : row + 1])
        assert torch.equal(alone.grid[0], whole.grid[row])
        assert torch.equal(alone.predicted_iou[0], whole.predicted_iou[row])
    assert whole.masks(np.zeros(6, np.int64)).shape == (6, 90, 33)


@pytest.mark.parametrize("kind", BACKENDS)
def test_gradients_reach_the_reference_encoder_alone(kind: str) -> None:
    backend = backend_of(kind)
    encoder = Blocks(12)
    image = torch.rand(1, 3, 64, 64)
    features = encoder(image)
    model = ReferenceEncoder(mid_channels=12, width=backend.token_width, queries=4, heads=4)
    annotation = torch.zeros(1, 1, *features.grid)
    annotation[..., 2:5, 2:5] = 1
    with torch.inference_mode(False):
        embedding = seen(backend, (48, 64))
        embedding = trainable(embedding)
    pseudo = pseudo_mask(features.high, encoder.annotated(features, annotation), normalise=True)
    backend.model.requires_grad_(False)
    logits = backend.decode_tokens([embedding], model(features.mid, annotation, features.mid, pseudo))
    mask_loss(logits, torch.ones_like(logits), torch.ones_like(logits)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        if not name.endswith("in_proj_bias"):  # of which the part for the keys has no effect
            assert parameter.grad.abs().max() > 0, name
    assert all(parameter.grad is None for parameter in [*backend.model.parameters(), *encoder.parameters()])
    backend.model.requires_grad_(True)


# --- image encoders


class Blocks(ImageEncoder):
    """An encoder without weights: the mean colours of blocks, and simple functions of them."""

    side = 64
    name, fingerprint = "blocks", "blocks"

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mid_channels = channels
        self.network = nn.Conv2d(3, channels, 1, bias=False)
        with torch.random.fork_rng():
            torch.manual_seed(1)
            nn.init.normal_(self.network.weight)
        self.requires_grad_(False)

    def forward(self, pixels: Tensor) -> Features:
        mid = self.network(F.avg_pool2d(pixels, 4))
        return Features(mid, mid)


@pytest.mark.parametrize(
    ("name", "grid", "high"),
    [
        ("resnet50", 8, 2048),
        ("vgg16", 4, 512),
        pytest.param("dinov2-b14", 37, 768, marks=pytest.mark.slow),
        ("embedded", 4, 256),
    ],
)
def test_image_encoders_have_all_maps_on_one_grid(name: str, grid: int, high: int) -> None:
    encoder = load_image_encoder(name, checkpoint="random:0", device="cpu")
    side = encoder.side if name == "dinov2-b14" else 64
    with torch.no_grad():
        features = encoder(torch.randn(1, 3, side, side))
        annotation = torch.zeros(1, 1, *features.grid)
        annotation[..., 1:3, 1:3] = 1
        annotated = encoder.annotated(features, annotation)
    assert features.grid == (grid, grid)
    assert features.mid.shape[1] == encoder.mid_channels
    assert features.high.shape[1] == high
    assert annotated.shape == features.high.shape
    assert (annotated * (1 - annotation) == 0).all()
    assert not encoder.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())


def test_the_last_layer_of_a_resnet_sees_annotated_cells_alone() -> None:
    encoder = load_image_encoder("resnet50", checkpoint="random:0", device="cpu")
    annotation = torch.zeros(1, 1, 8, 8)
    annotation[..., 2:5, 2:5] = 1
    with torch.no_grad():
        features = encoder(torch.randn(1, 3, 64, 64))
        elsewhere = Features(torch.where(annotation > 0, features.mid, torch.randn(features.mid.shape)), features.high)
        assert torch.equal(encoder.annotated(features, annotation), encoder.annotated(elsewhere, annotation))
        assert not torch.allclose(encoder.annotated(features, annotation), features.high * annotation)


def test_at_the_papers_size_resnet_50_has_64_cells_a_side() -> None:
    encoder = load_image_encoder("resnet50", checkpoint="random:0", device="cpu")
    with torch.no_grad():
        features = encoder(encoder.pixels(picture((20, 30)))[None])
    assert (features.grid, features.mid.shape[1]) == ((64, 64), 1536)


def test_images_are_squashed_and_normalised() -> None:
    encoder = Blocks(4)
    grey = np.full((30, 50, 3), 128, np.uint8)
    pixels = encoder.pixels(grey)
    assert pixels.shape == (3, 64, 64)
    expected = [(128 / 255 - m) / s for m, s in zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)]
    assert pixels.mean(dim=(1, 2)).tolist() == pytest.approx(expected, abs=1e-5)


def test_the_embedded_image_encoder_has_the_weights_in_the_package() -> None:
    encoder = load_image_encoder("embedded", checkpoint=None, device="cpu")
    backend = load_backend("embedded", checkpoint=None, device="cpu", precision="fp32")
    trunk = backend.model.image_encoder.trunk.state_dict()
    assert all(torch.equal(tensor, trunk[name]) for name, tensor in encoder.network.state_dict().items())


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(WeightsError, match="does not fit the image encoder resnet50"):
        load_image_encoder("resnet50", checkpoint=str(tmp_path / "other.safetensors"), device="cpu")
    with pytest.raises(UsageError, match="there is no image encoder 'resnet'; did you mean resnet50"):
        load_image_encoder("resnet", checkpoint=None, device="cpu")


@pytest.mark.parametrize("name", ["vgg16", "dinov2-b14"])
def test_encoders_without_a_known_checksum_say_where_their_weights_are(name: str) -> None:
    with pytest.raises(WeightsError, match=r"download https://.*--encoder-checkpoint"):
        load_image_encoder(name, checkpoint=None, device="cpu")


def test_missing_weights_of_resnet_50_say_how_to_fetch_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("REFINETOOL_CACHE", str(tmp_path))
    with pytest.raises(WeightsError, match="refinetool models fetch resnet50"):
        load_image_encoder("resnet50", checkpoint=None, device="cpu")


@pytest.mark.slow
def test_a_published_dinov2_file_can_be_read(tmp_path: Path) -> None:
    """The published file has a mask token and names of its own for a few tensors."""
    encoder = load_image_encoder("dinov2-b14", checkpoint="random:0", device="cpu")
    state = {name: tensor.clone() for name, tensor in encoder.network.state_dict().items()}
    torch.save({**state, "mask_token": torch.zeros(1, 768)}, tmp_path / "dinov2.pth")
    loaded = load_image_encoder("dinov2-b14", checkpoint=str(tmp_path / "dinov2.pth"), device="cpu")
    assert all(torch.equal(loaded.network.state_dict()[name], tensor) for name, tensor in state.items())


@cache
def looked(name: str) -> tuple[ImageEncoder, Features, Features]:
    """An image encoder with random weights, and what it sees in a reference and in a target."""
    encoder = load_image_encoder(name, checkpoint="random:1", device="cpu")
    with torch.inference_mode():
        seen = [encoder(encoder.pixels(picture(size, seed))[None]) for size, seed in (((40, 50), 0), ((48, 64), 9))]
    return encoder, seen[0], seen[1]


@pytest.mark.parametrize("kind", BACKENDS)
@pytest.mark.parametrize("name", ["embedded", *(pytest.param(name, marks=pytest.mark.slow) for name in OFFICIAL)])
def test_every_image_encoder_works_with_every_decoder(name: str, kind: str) -> None:
    """Random weights: two shots of a class, one of another; masks come out at the size of the target."""
    assert set(IMAGE_ENCODERS) == {"embedded", *OFFICIAL}
    backend = backend_of(kind)
    encoder, reference, target = looked(name)
    recipe = recipe_for(encoder, backend, settings=SETTINGS)
    torch.manual_seed(3)
    prompter = Prompter(recipe.build(), encoder, recipe, device=backend.device)
    mark = np.zeros((40, 50), np.bool_)
    mark[10:20, 15:30] = True
    (embedding,) = backend.embed([picture((48, 64), 9)])
    for shots in (2, 1):
        tokens = prompter.tokens(target, [prompter.shot_of(reference, mark)] * shots)
        assert tokens.shape == (1, 50 * shots, backend.token_width)
        prediction = backend.predict_from_tokens(embedding, tokens)
        assert prediction.masks(np.zeros(1, np.int64)).shape == (1, 48, 64)
        assert np.isfinite(prediction.scores).all()


# --- files


@pytest.fixture
def prompter() -> Iterator[Prompter]:
    backend = backend_of("embedded")
    encoder = Blocks(12)
    recipe = replace(recipe_for(encoder, backend, settings=SETTINGS), queries=5)
    torch.manual_seed(0)
    yield Prompter(recipe.build(), encoder, recipe, device=torch.device("cpu"))


def test_weights_are_written_with_their_recipe_and_read_back(prompter: Prompter, tmp_path: Path) -> None:
    recipe = replace(prompter.recipe, kinds=("box",), held_out=("cat",), threshold=0.2, trained={"steps": 3})
    write_reference_encoder(prompter.model, recipe, tmp_path / "made.safetensors")
    model, found = read_reference_encoder(tmp_path / "made.safetensors")
    assert found == recipe
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, prompter.model.state_dict()[name].half().float())


def test_other_files_are_refused_in_one_sentence(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    for name in ("other.safetensors", "text.safetensors", "missing.safetensors"):
        with pytest.raises(WeightsError, match="reference encoder"):
            read_reference_encoder(tmp_path / name)
    with pytest.raises(WeightsError, match="its description lacks 'kinds'"):
        read_reference_encoder(tmp_path / "other.safetensors")


def test_weights_for_another_decoder_are_refused(prompter: Prompter, tmp_path: Path) -> None:
    path = tmp_path / "made.safetensors"
    write_reference_encoder(prompter.model, replace(prompter.recipe, decoder="sam-vit-b"), path)
    options: dict[str, Any] = {"image_encoder": None, "encoder_checkpoint": None, "settings": SETTINGS}
    with pytest.raises(WeightsError, match="was trained for the decoder of sam-vit-b"):
        load_prompter(str(path), backend=backend_of("embedded"), **options)
    trunk = load_image_encoder("embedded", checkpoint=None, device="cpu")
    stale = replace(
        recipe_for(trunk, backend_of("embedded"), settings=SETTINGS), decoder_fingerprint="of older weights"
    )
    write_reference_encoder(stale.build(), stale, path)
    with pytest.raises(WeightsError, match="was trained with other weights of the model embedded"):
        load_prompter(str(path), backend=backend_of("embedded"), **options)
    with pytest.raises(UsageError, match="leave out --encoder"):
        load_prompter(str(path), backend=backend_of("embedded"), **(options | {"image_encoder": "resnet50"}))
    with pytest.raises(WeightsError, match="no reference encoder's weights for sam2 in the package"):
        load_prompter(None, backend=backend_of("sam2"), **options)


def test_fingerprints_change_with_the_weights(prompter: Prompter) -> None:
    other = copy.deepcopy(prompter.model)
    with torch.no_grad():
        other.generator.queries[0, 0] += 1
    changed = Prompter(other, prompter.encoder, prompter.recipe, device=torch.device("cpu"))
    assert changed.fingerprint != prompter.fingerprint


@pytest.mark.skipif(not shipped_reference_weights().is_file(), reason="no reference encoder in the package")
def test_the_shipped_weights_fit_the_embedded_model_and_are_small() -> None:
    backend = load_backend("embedded", checkpoint=None, device="cpu", precision="fp32")
    shipped = load_prompter(None, image_encoder=None, encoder_checkpoint=None, backend=backend, settings=SETTINGS)
    assert shipped.recipe.held_out
    assert json.dumps(dict(shipped.recipe.trained))
    assert shipped_reference_weights().stat().st_size < 4e6


# --- learning


def test_it_learns_one_pair_of_pictures() -> None:
    """Coloured shapes: the reference marks the red one, and the target's red shape is to be found, not its blue one."""
    torch.manual_seed(0)
    backend = load_backend("embedded", checkpoint=None, device="cpu", precision="fp32")
    backend.model.requires_grad_(False)
    encoder = load_image_encoder("embedded", checkpoint=None, device="cpu")
    rows, columns = np.mgrid[:128, :160]
    shapes = [np.hypot(rows - y, columns - x) < 24 for y, x in ((40, 45), (80, 110), (85, 50), (45, 115))]
    images = []
    for red, blue in ((shapes[0], shapes[1]), (shapes[2], shapes[3])):
        image = np.full((128, 160, 3), 120, np.uint8)
        image[red], image[blue] = (220, 40, 40), (40, 40, 220)
        images.append(image)
    features = [encoder(encoder.pixels(image)[None]) for image in images]
    (embedding,) = backend.embed([images[1]])
    assert isinstance(embedding, SquareEmbedding)
    embedding = trainable(embedding)
    annotation = on_grid(torch.from_numpy(shapes[0])[None].float(), features[0].grid, resize="max")
    pseudo = pseudo_mask(features[1].high, encoder.annotated(features[0], annotation), normalise=True)
    truth = F.adaptive_avg_pool2d(torch.from_numpy(shapes[2])[None].float(), (64, 64))
    model = ReferenceEncoder(mid_channels=encoder.mid_channels, width=backend.token_width, queries=8, heads=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(150):
        logits = backend.decode_tokens([embedding], model(features[0].mid, annotation, features[1].mid, pseudo))
        loss = mask_loss(logits, truth, torch.ones_like(truth))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        tokens = model.eval()(features[0].mid, annotation, features[1].mid, pseudo)
    found = backend.predict_from_tokens(embedding, tokens).masks(np.zeros(1, np.int64))[0]
    assert (found & shapes[2]).sum() / (found | shapes[2]).sum() > 0.9
    assert not (found & shapes[3]).any()


# --- the loss


def test_the_loss_leaves_void_pixels_out_and_falls_to_zero() -> None:
    truth = torch.zeros(2, 8, 8)
    truth[:, 2:5, 2:5] = 1
    counted = torch.ones_like(truth)
    counted[:, :, 6:] = 0
    right = (truth * 2 - 1) * 30
    assert float(mask_loss(right, truth, counted)) == pytest.approx(0, abs=1e-3)
    spoilt = torch.where(counted > 0, right, -right)
    assert float(mask_loss(spoilt, truth, counted)) == pytest.approx(0, abs=1e-3)
    undecided = torch.zeros_like(truth)
    area, pixels = 9, 48
    expected = math.log(2) + 1 - (area + 1) / (pixels / 2 + area + 1)
    assert float(mask_loss(undecided, truth, counted)) == pytest.approx(expected, abs=1e-5)
