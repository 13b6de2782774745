"""IoU adaption: the arithmetic against slow spellings of it, the features against direct answers, runs against runs."""

import json
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import Command, save_squares
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from refinetool.backends.models import MODELS, load_backend
from refinetool.backends.predictions import SquarePrediction
from refinetool.backends.square import SquareBackend
from refinetool.errors import DataError, Interrupted, StorageError, UsageError, WeightsError
from refinetool.formats import open_dataset
from refinetool.modules.iou_adapter import IouAdapter, corrected, fresh_factors, merged, read_adapter, serialise
from refinetool.records import Prompts, Sample
from refinetool.refine import Refiner, load_refiner
from refinetool.running import runners
from refinetool.running.run import refine_dataset
from refinetool.running.runners import LoadedJob
from refinetool.settings import ADAPT_RECIPES, METHODS, AdaptSettings, PromptSettings, RefineSettings
from refinetool.train.iou import adapt as iou
from refinetool.train.iou import features as iou_features
from refinetool.train.iou import gathering
from refinetool.train.iou.adapt import AdaptSummary, Head, adapt_iou, compare, drawn, fit, ranking_loss, split
from refinetool.train.iou.features import QUESTIONS, FeatureFile, Features, features_path
from refinetool.train.iou.gathering import LocalGatherer

WIDTH, TOKENS = 12, 4
RANDOM = "random:0"
QUICK = AdaptSettings(steps=12, decay_steps=(6,), learning_rate=0.5, margin=0.1, held_out=0.4)


def an_adapter(*, model: str = "embedded", fingerprint: str = "0" * 64, seed: int = 0, width: int = 256) -> IouAdapter:
    generator = torch.Generator().manual_seed(seed)
    down, up = torch.randn(4, width, generator=generator), torch.randn(TOKENS, 4, generator=generator)
    return IouAdapter(down, up, model, fingerprint, True, {"seed": seed})


def save(adapter: IouAdapter, path: Path) -> Path:
    path.write_bytes(serialise(adapter))
    return path


# --- the adapter


def test_a_correction_is_w_x_plus_b_plus_b_a_x() -> None:
    layer = nn.Linear(5, 3)
    down, up, inputs = torch.randn(2, 5), torch.randn(3, 2), torch.randn(4, 5)
    with torch.no_grad():
        found = corrected(inputs, layer, down=down, up=up)
        for n in range(4):
            for t in range(3):
                plain = sum(layer.weight[t, h] * inputs[n, h] for h in range(5)) + layer.bias[t]
                low_rank = sum(up[t, r] * sum(down[r, h] * inputs[n, h] for h in range(5)) for r in range(2))
                assert float(found[n, t]) == pytest.approx(float(plain + low_rank), abs=1e-5)


def test_before_training_it_changes_nothing_and_has_the_size_of_the_paper() -> None:
    down, up = fresh_factors(rank=4, features=256, scores=4, generator=torch.Generator().manual_seed(0))
    assert down.numel() + up.numel() == 1040
    assert not up.any()
    assert float(down.abs().max()) <= 1 / 16
    assert float(down.std()) == pytest.approx(1 / 16 / 3**0.5, rel=0.05)  # of a uniform distribution


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_merged_layer_is_the_corrected_one(dtype: torch.dtype) -> None:
    layer = nn.Linear(WIDTH, TOKENS).to(dtype)
    adapter, inputs = an_adapter(width=WIDTH), torch.randn(20, WIDTH)
    wide = nn.Linear(WIDTH, TOKENS)
    wide.load_state_dict({name: values.float() for name, values in layer.state_dict().items()})
    with torch.no_grad():
        expected = corrected(inputs, wide, down=adapter.down, up=adapter.up)
        found = merged(adapter, layer)
        assert found.weight.dtype == dtype
        tolerance = 20 * float(torch.finfo(dtype).eps) * float(expected.abs().max())
        assert torch.allclose(found.float()(inputs), expected, atol=tolerance)
        assert torch.allclose(layer.float()(inputs), wide(inputs))  # the layer itself stays


def test_an_adapter_of_other_sizes_is_refused() -> None:
    with pytest.raises(WeightsError, match=r"12 inputs and 4 scores.*has 13 and 4"):
        merged(an_adapter(width=12), nn.Linear(13, 4))


def test_a_file_comes_back_as_it_was_and_names_its_model(tmp_path: Path) -> None:
    adapter = an_adapter()
    path = save(adapter, tmp_path / "a.safetensors")
    found = read_adapter(path, model="embedded", fingerprint="0" * 64)
    assert torch.equal(found.down, adapter.down) and torch.equal(found.up, adapter.up)
    assert (found.digest, found.about) == (adapter.digest, {"seed": 0})
    assert found.with_masks
    assert len({found.digest, an_adapter(seed=1).digest, replace(adapter, with_masks=False).digest}) == 3
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["refinetool_iou_adapter"])["model"] == "embedded"
    assert len({serialise(adapter) for _ in range(8)}) == 1  # the same bytes every time


def not_safetensors(path: Path) -> None:
    path.write_bytes(b"no tensors")


def other_tensors(path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, path)


def infinite(path: Path) -> None:
    save(replace(an_adapter(), up=torch.full((TOKENS, 4), torch.inf)), path)


def unfit(path: Path) -> None:
    save(replace(an_adapter(), up=torch.zeros(TOKENS, 3)), path)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda _: None, "No such file"),
        (not_safetensors, "not an IoU adapter"),
        (other_tensors, "not an IoU adapter"),
        (lambda path: save(an_adapter(model="sam-vit-b"), path), "made for sam-vit-b, but the model is embedded"),
        (lambda path: save(an_adapter(fingerprint="1" * 64), path), "other weights"),
        (infinite, "not finite"),
        (unfit, "damaged"),
    ],
)
def test_a_file_that_can_not_be_used_is_refused_in_a_sentence(
    tmp_path: Path, make: Callable[[Path], object], says: str
) -> None:
    path = tmp_path / "a.safetensors"
    make(path)
    with pytest.raises(WeightsError, match=says) as told:
        read_adapter(path, model="embedded", fingerprint="0" * 64)
    assert str(path) in str(told.value) and "\n" not in str(told.value)


# --- in a model


def pictures(count: int, size: tuple[int, int] = (60, 80)) -> list[np.ndarray]:
    return [np.random.default_rng(n).integers(0, 255, (*size, 3), dtype=np.uint8) for n in range(count)]


def some_prompts(count: int = 3) -> Prompts:
    rng = np.random.default_rng(1)
    points = rng.uniform(5, 55, (count, 2, 2)).astype(np.float32)
    boxes = np.concatenate([rng.uniform(0, 20, (count, 2)), rng.uniform(30, 59, (count, 2))], axis=1)
    return Prompts(points, np.tile((1, 0), (count, 1)), boxes.astype(np.float32), None)


def check_family(model: str, folder: Path) -> None:
    """Features explain the scores, and a model with an adapter merged scores as the adapter says."""
    plain = load_backend(model, checkpoint=RANDOM, device="cpu", precision="fp32", iou_adapter=None)
    image, prompts = pictures(1)[0], some_prompts()
    (embedding,) = plain.embed([image])
    answer = plain.predict_tokens(embedding, prompts)
    assert answer.features.shape == (3, plain.score_layer.in_features) and answer.tokens.scores.shape == (3, 4)
    head = Head.of(plain)
    adapter = an_adapter(model=model, fingerprint=plain.fingerprint)
    with torch.no_grad():
        zero = torch.zeros_like(adapter.up)
        before = head.scores(answer.features, down=adapter.down, up=zero)
        after = head.scores(answer.features, down=adapter.down, up=adapter.up)
    np.testing.assert_allclose(before, answer.tokens.scores[:, 1:], rtol=1e-4, atol=1e-5)

    path = save(adapter, folder / "a.safetensors")
    adapted = load_backend(model, checkpoint=RANDOM, device="cpu", precision="fp32", iou_adapter=path)
    assert adapted.fingerprint != plain.fingerprint
    found = adapted.predict_tokens(embedding, prompts)  # the encoder is the same: one embedding serves all
    np.testing.assert_allclose(found.tokens.scores[:, 1:], after, rtol=1e-4, atol=1e-4 * float(after.abs().max()))
    assert isinstance(found.tokens, SquarePrediction)
    assert torch.equal(found.tokens.grid, answer.tokens.grid)  # only scores change
    (prediction,) = adapted.predict([embedding], [prompts])
    best = 1 + found.tokens.scores[:, 1:].argmax(axis=1)
    offered = prediction.masks(1 + prediction.scores[:, 1:].argmax(axis=1))
    # The embedded model shows its alternatives on the finer grid of its detail head.
    assert np.mean(offered == found.tokens.masks(best)) > 0.95

    asked = (prompts, replace(prompts, masks=np.full((3, 60, 80), 5.0, np.float32)))
    path = save(replace(adapter, with_masks=False), folder / "single.safetensors")
    choosy = load_backend(model, checkpoint=RANDOM, device="cpu", precision="fp32", iou_adapter=path)
    both = choosy.predict([embedding] * 2, asked)  # two layouts in one call
    for number, (backend, question) in enumerate(zip((adapted, plain), asked, strict=True)):  # who is to score it
        # Not to the last bit: a sigmoid over two layers' scores vectorises in another way than one over one layer's.
        mine, theirs = (one.predict_tokens(embedding, question).tokens.scores for one in (choosy, backend))
        np.testing.assert_allclose(mine, theirs, rtol=1e-6)
        (alone,) = backend.predict([embedding], [question])
        np.testing.assert_allclose(both[number].scores, alone.scores, rtol=1e-6)

    other = save(an_adapter(model=model, fingerprint="elsewhere"), folder / "b.safetensors")
    with pytest.raises(WeightsError, match="other weights"):
        load_backend(model, checkpoint=RANDOM, device="cpu", precision="fp32", iou_adapter=other)


def test_an_adapter_in_the_embedded_model(tmp_path: Path) -> None:
    check_family("embedded", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["sam-vit-b", "sam-hq-vit-tiny", "sam2.1-hiera-t"])
def test_an_adapter_in_every_family(model: str, tmp_path: Path) -> None:
    check_family(model, tmp_path)


def test_predicting_leaves_the_model_as_it_is(folder: Path) -> None:
    """An adapter that scores only prompts without a mask is not swapped in and out."""
    plain = load_backend("embedded", checkpoint=RANDOM, device="cpu", precision="fp32")
    adapter = replace(an_adapter(model="embedded", fingerprint=plain.fingerprint), with_masks=False)
    path = save(adapter, folder / "a.safetensors")
    backend = load_backend("embedded", checkpoint=RANDOM, device="cpu", precision="fp32", iou_adapter=path)
    before = {name: id(module) for name, module in backend.model.named_modules()}
    (embedding,) = backend.embed([np.zeros((40, 50, 3), np.uint8)])
    box = Prompts(
        np.zeros((1, 0, 2), np.float32), np.zeros((1, 0), np.int64), np.array([[3, 4, 20, 30]], np.float32), None
    )
    both = replace(box, masks=np.full((1, 40, 50), 3, np.float32))
    alone = [backend.predict([embedding], [asked])[0].scores for asked in (box, both)]
    together = [found.scores for found in backend.predict([embedding, embedding], [both, box])]
    np.testing.assert_array_equal(alone, together[::-1])
    assert {name: id(module) for name, module in backend.model.named_modules()} == before
    (unadapted,) = plain.predict([embedding], [both])
    np.testing.assert_allclose(alone[1], unadapted.scores, rtol=1e-6)
    assert (alone[0] != plain.predict([embedding], [box])[0].scores).any()


def test_an_adapter_works_in_half_precision(tmp_path: Path) -> None:
    plain = load_backend("embedded", checkpoint=RANDOM, device="cpu", precision="bf16")
    path = save(an_adapter(fingerprint=plain.fingerprint), tmp_path / "a.safetensors")
    adapted = load_backend("embedded", checkpoint=RANDOM, device="cpu", precision="bf16", iou_adapter=path)
    prompts, image = some_prompts(), pictures(1)[0]
    answers = [backend.predict_tokens(backend.embed([image])[0], prompts) for backend in (plain, adapted)]
    assert answers[0].features.dtype == torch.float32
    expected = Head.of(adapted).scores(answers[0].features, down=torch.zeros(1, 256), up=torch.zeros(4, 1))
    np.testing.assert_allclose(answers[1].tokens.scores[:, 1:], expected, atol=0.02)


# --- the loss and the training


scores_and_overlaps = st.integers(1, 6).flatmap(
    lambda n: st.tuples(
        *(arrays(np.float32, (n, 3), elements=st.floats(0, 1, width=16)) for _ in range(2)), st.floats(0, 0.5)
    )
)


@given(scores_and_overlaps)
def test_the_ranking_loss_is_the_paper_s(case: tuple[np.ndarray, np.ndarray, float]) -> None:
    scores, overlaps, margin = case
    total = 0.0
    for x, o in zip(scores.tolist(), overlaps.tolist(), strict=True):
        j = o.index(max(o))
        total += sum(max(0.0, x[i] - x[j] + margin) for i in range(3) if i != j)
    found = ranking_loss(torch.from_numpy(scores), torch.from_numpy(overlaps), margin=margin)
    assert float(found) == pytest.approx(total / len(scores), abs=1e-5)


def lessons(count: int = 20, *, width: int = WIDTH, seed: int = 0) -> dict[str, Features]:
    """Masks whose best candidate is told by their features: candidate k where feature k is the largest of three."""
    rng = np.random.default_rng(seed)
    found = {}
    for number in range(count):
        inputs = rng.uniform(0, 1, (int(rng.integers(1, 5)), len(QUESTIONS), width)).astype(np.float32)
        overlaps = (inputs[..., :3] * 0.5 + 0.3).astype(np.float32)
        found[f"image {number}"] = Features(inputs, overlaps)
    return found


def a_head(*, sigmoid: bool = True) -> Head:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Head(nn.Linear(WIDTH, TOKENS).requires_grad_(False), sigmoid)


def test_training_finds_what_can_be_found() -> None:
    found, head = lessons(60), a_head()
    keys = list(found)
    recipe = replace(QUICK, steps=300, decay_steps=(200,), learning_rate=2.0, both_prompts=True)
    down, up = fit(keys[:40], found.__getitem__, head, recipe=recipe)
    single = compare(keys[40:], found.__getitem__, head, down=down, up=up, with_masks=True)[2]
    assert single.prompts == "single"
    assert single.top1_before < 0.6
    assert single.top1_after > 0.8
    assert single.coarse_iou_after > single.coarse_iou_before
    assert not up[0].any()  # the single-mask output keeps its score


@pytest.mark.parametrize("recipe", [QUICK, replace(QUICK, momentum=0.9, weight_decay=5e-3)])
def test_steps_are_those_of_torch_s_sgd(recipe: AdaptSettings) -> None:
    found, head = lessons(), a_head(sigmoid=False)
    recipe = replace(recipe, both_prompts=True, images_per_step=len(found))  # so that order does not matter
    down, up = fresh_factors(
        rank=4, features=WIDTH, scores=TOKENS, generator=torch.Generator().manual_seed(recipe.seed)
    )
    down.requires_grad_(), up.requires_grad_()
    optimizer = torch.optim.SGD(
        (down, up), lr=recipe.learning_rate, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, list(recipe.decay_steps), gamma=0.1)
    inputs = torch.from_numpy(np.concatenate([one.inputs[:, :2].reshape(-1, WIDTH) for one in found.values()]))
    overlaps = torch.from_numpy(np.concatenate([one.overlaps[:, :2].reshape(-1, 3) for one in found.values()]))
    for _ in range(recipe.steps):
        optimizer.zero_grad()
        scores = (head.layer(inputs) + inputs @ down.T @ up.T)[:, 1:]
        ranking_loss(scores, overlaps, margin=recipe.margin).backward()
        optimizer.step()
        schedule.step()
    got = fit(list(found), found.__getitem__, head, recipe=recipe)
    for mine, theirs in zip(got, (down, up), strict=True):
        assert torch.allclose(mine, theirs.detach(), atol=1e-4)


def test_training_is_decided_by_its_seed() -> None:
    found, head = lessons(), a_head()
    runs = [fit(list(found), found.__getitem__, head, recipe=replace(QUICK, seed=seed)) for seed in (0, 0, 1)]
    assert all(torch.equal(one, same) for one, same in zip(runs[0], runs[1], strict=True))
    assert not torch.equal(runs[0][1], runs[2][1])


def test_one_prompt_per_mask_or_both() -> None:
    features = lessons(1)["image 0"]
    both, _ = iou._single_answers(features, "key", 0, recipe=replace(QUICK, both_prompts=True))
    assert np.array_equal(both, features.inputs[:, :2].reshape(-1, WIDTH))
    many = Features(np.tile(np.arange(3, dtype=np.float32)[None, :, None], (2000, 1, 1)), np.zeros((2000, 3, 3)))
    one, _ = iou._single_answers(many, "key", 0, recipe=QUICK)
    later, _ = iou._single_answers(many, "key", 1, recipe=QUICK)
    assert set(one.ravel()) == {0.0, 1.0} and 0.45 < one.mean() < 0.55
    assert not np.array_equal(one, later)


def test_full_prompts_are_left_alone_where_that_is_asked_for() -> None:
    found, head = lessons(40), a_head()
    recipe = replace(QUICK, steps=200, learning_rate=2.0, both_prompts=True)
    down, up = fit(list(found), found.__getitem__, head, recipe=recipe)
    figures = [
        compare(list(found), found.__getitem__, head, down=down, up=up, with_masks=with_masks)
        for with_masks in (True, False)
    ]
    assert figures[0][:3] == figures[1][:3]
    assert figures[0][3].changed > 0 == figures[1][3].changed
    assert figures[1][3].top1_before == figures[1][3].top1_after


def test_figures_are_counted_as_a_loop_would() -> None:
    found, head = lessons(12), a_head()
    down, up = an_adapter(width=WIDTH).down, an_adapter(width=WIDTH).up
    figures = compare(list(found), found.__getitem__, head, down=down, up=up, with_masks=True)
    for one, asked in zip(figures, ((0,), (1,), (0, 1), (2,)), strict=True):
        right = {False: 0, True: 0}
        overlap = {False: 0.0, True: 0.0}
        n = changed = 0
        for features in found.values():
            for row in range(len(features)):
                for question in asked:
                    x, o = torch.from_numpy(features.inputs[row, question]), features.overlaps[row, question]
                    taken = {}
                    for adapted in (False, True):
                        y = head.layer.weight @ x + head.layer.bias + (up @ (down @ x) if adapted else 0)
                        taken[adapted] = int(torch.sigmoid(y)[1:].argmax())
                        right[adapted] += o[taken[adapted]] == o.max()
                        overlap[adapted] += float(o[taken[adapted]])
                    n += 1
                    changed += taken[False] != taken[True]
        assert one.answers == n
        assert (one.top1_before, one.top1_after) == pytest.approx((right[False] / n, right[True] / n))
        assert (one.coarse_iou_before, one.coarse_iou_after) == pytest.approx((overlap[False] / n, overlap[True] / n))
        assert one.changed == pytest.approx(changed / n)


@given(st.integers(2, 40), st.floats(0, 1), st.integers(0, 3))
def test_images_teach_or_are_held_out(count: int, share: float, seed: int) -> None:
    keys = [str(n) for n in range(count)]
    teach, apart = split(keys, held_out=share, seed=seed, source=Path("x"))
    assert sorted(teach + apart, key=int) == keys and teach and apart
    assert abs(len(apart) - share * count) <= 1


def test_large_data_sets_are_sampled() -> None:
    assert drawn(5, 5, seed=0).tolist() == [0, 1, 2, 3, 4]
    some = drawn(1000, 10, seed=0)
    assert len(set(some.tolist())) == 10 and some.tolist() == sorted(some) and some.max() > 100
    assert not np.array_equal(some, drawn(1000, 10, seed=1))


def test_recipes() -> None:
    assert iou.recipe_for("embedded") == ADAPT_RECIPES["single"]
    assert {iou.recipe_for(name).learning_rate for name in MODELS if name != "embedded"} == {0.01}
    assert (ADAPT_RECIPES["release"].momentum, ADAPT_RECIPES["release"].weight_decay) == (0.9, 5e-4)


# --- the features


def samples_of(folder: Path) -> list[Sample]:
    return list(open_dataset(folder / "coarse.json", images=folder / "images").samples())


@pytest.fixture(scope="module")
def backend() -> SquareBackend:
    return load_backend("embedded", checkpoint=RANDOM, device="cpu", precision="fp32")


def test_questions_are_what_refine_asks_with_the_other_prompts_off(folder: Path, backend: SquareBackend) -> None:
    def mined(**switches: bool) -> Prompts:
        prompts = replace(PromptSettings(), **switches)
        (job,) = Refiner(backend, replace(RefineSettings(), prompts=prompts)).prepare(samples_of(folder)[0]).jobs
        return job.prompts

    expected = (
        mined(use_box=False, use_mask=False),
        mined(use_point=False, use_negative=False, use_mask=False),
        mined(),
    )
    for asked, wanted in zip(iou_features.questions(mined()), expected, strict=True):
        assert np.array_equal(asked.labels, wanted.labels)
        there = wanted.labels >= 0
        assert np.array_equal(asked.points[there], wanted.points[there])
        for part in ("boxes", "masks"):
            mine, theirs = getattr(asked, part), getattr(wanted, part)
            assert (mine is None) == (theirs is None) and (mine is None or np.array_equal(mine, theirs))


def test_features_are_those_of_direct_answers(folder: Path, backend: SquareBackend, tmp_path: Path) -> None:
    chosen = replace(RefineSettings(), prompts=replace(PromptSettings(), box="tight"))
    path = tmp_path / "out.features.jsonl"
    with FeatureFile(path, job={}, fresh=False) as cache:
        samples = samples_of(folder)
        prompter = LocalGatherer(LoadedJob(Refiner(backend, chosen), {}, 1), threads=2)
        found = gathering.gather(
            samples, prompter, cache=cache, total=3, on_progress=lambda *_: None, stop=threading.Event()
        )
        assert found.keys == tuple(sample.key for sample in samples)
        assert (found.masks, found.reused, found.failed) == (3, 0, 0)
        for sample in samples:
            held = cache.load(sample.key)
            (job,) = Refiner(backend, chosen).prepare(sample).jobs
            (embedding,) = backend.embed([job.pixels])
            for question, asked in enumerate(iou_features.questions(job.prompts)):
                prediction = backend.predict_tokens(embedding, asked).tokens
                np.testing.assert_allclose(held.overlaps[:, question], prediction.overlap(job.coarse)[:, 1:])
                with torch.no_grad():
                    layer = backend.score_layer
                    scores = torch.sigmoid(layer(torch.from_numpy(held.inputs[:, question])))
                np.testing.assert_allclose(scores, prediction.scores, atol=1e-5)


def test_features_survive_a_kill_and_changes_are_seen(tmp_path: Path) -> None:
    path, found = tmp_path / "f.jsonl", lessons(3)
    with FeatureFile(path, job={"model": "a"}, fresh=False) as cache:
        for key, features in found.items():
            cache.append(key, features, digest=f"of {key}")
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 5)
    with FeatureFile(path, job={"model": "a"}, fresh=False) as cache:
        held = cache.find("image 0", digest="of image 0")
        assert held is not None
        assert np.array_equal(held.inputs, found["image 0"].inputs)
        assert np.array_equal(held.overlaps, found["image 0"].overlaps)
        assert cache.find("image 0", digest="another") is None
        assert cache.find("image 2", digest="of image 2") is None  # cut off
        cache.append("image 2", found["image 2"], digest="of image 2")
    with FeatureFile(path, job={"model": "a"}, fresh=False) as cache:
        assert cache.find("image 1", digest="of image 1") and cache.find("image 2", digest="of image 2")
    with FeatureFile(path, job={"model": "b"}, fresh=False) as cache:
        assert cache.find("image 1", digest="of image 1") is None


def test_another_file_is_not_overwritten_with_features(tmp_path: Path) -> None:
    path = tmp_path / "f.jsonl"
    path.write_text("my notes\n")
    with pytest.raises(UsageError, match="something else"):
        FeatureFile(path, job={}, fresh=True)
    assert path.read_text() == "my notes\n"
    with pytest.raises(StorageError, match="can't be opened"):
        FeatureFile(tmp_path / "no" / "f.jsonl", job={}, fresh=False)


# --- whole runs


def run(folder: Path, **changes: object) -> AdaptSummary:
    arguments: dict[str, object] = {
        "output": folder / "a.safetensors",
        "images": folder / "images",
        "checkpoint": RANDOM,
        "device": "cpu",
        "precision": "fp32",
        "recipe": QUICK,
        "threads": 2,
        "keep": True,
    }
    return adapt_iou(folder / "coarse.json", **(arguments | changes))  # type: ignore[arg-type]


def test_a_run_writes_an_adapter_that_refine_loads(folder: Path) -> None:
    told: list[tuple[int, int]] = []
    summary = run(folder, on_progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert (summary.images, summary.masks, summary.fit_images, summary.held_out_images) == (3, 3, 2, 1)
    assert [one.prompts for one in summary.figures] == ["point", "box", "single", "all"]
    assert summary.features is None and not features_path(folder / "a.safetensors").exists()
    assert summary.output is not None
    adapted = load_backend(
        "embedded", checkpoint=RANDOM, device="cpu", precision="fp32", iou_adapter=folder / "a.safetensors"
    )
    found = read_adapter(
        summary.output,
        model="embedded",
        fingerprint=load_backend("embedded", checkpoint=RANDOM, device="cpu", precision="fp32").fingerprint,
    )
    assert found.about["recipe"]["steps"] == QUICK.steps
    assert found.about["held_out"][2]["prompts"] == "single"
    assert adapted.score_layer.weight.shape == (4, 256)


def test_an_interrupted_run_ends_as_an_uninterrupted_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(folder, output=folder / "whole.safetensors")

    def stop(done: int, _total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="are kept in"):
        run(folder, on_progress=stop)
    assert not (folder / "a.safetensors").exists()
    with pytest.raises(UsageError, match="--resume continues"):
        run(folder)
    asked: list[int] = []
    real = gathering.answers

    def counted(*arguments: object, **more: object) -> Features:
        asked.append(1)
        return real(*arguments, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(gathering, "answers", counted)
    summary = run(folder, resume=True)
    assert (summary.reused, len(asked)) == (2, 1)
    assert (folder / "a.safetensors").read_bytes() == (folder / "whole.safetensors").read_bytes()


def test_runs_repeat_to_the_byte_whatever_the_threads(folder: Path) -> None:
    files = [folder / f"{threads}.safetensors" for threads in (1, 3)]
    for threads, path in zip((1, 3), files, strict=True):
        run(folder, output=path, threads=threads)
    assert files[0].read_bytes() == files[1].read_bytes()


def test_another_recipe_needs_no_model_calls(folder: Path) -> None:
    first = run(folder, keep_features=True)
    assert first.features is not None
    again = run(folder, resume=True, overwrite=True, recipe=replace(QUICK, learning_rate=0.1), keep_features=True)
    assert again.reused == 3


def test_where_it_does_not_help_nothing_is_written(folder: Path) -> None:
    summary = run(folder, keep=False, recipe=replace(QUICK, learning_rate=0.0))
    assert not summary.helps and summary.output is None
    assert not (folder / "a.safetensors").exists()
    assert summary.features is not None and summary.features.exists()


def test_broken_images_are_told_and_left_out(folder: Path) -> None:
    (folder / "images" / "2.png").write_bytes(b"broken")
    summary = run(folder)
    assert (summary.images, summary.failed) == (2, 1)
    assert "2.png" in summary.errors[0]
    (folder / "images" / "3.png").unlink()
    with pytest.raises(DataError, match="1 readable images have masks; IoU adaption needs at least two"):
        run(folder, output=folder / "b.safetensors")


def test_masks_that_are_kept_do_not_teach(folder: Path) -> None:
    record = json.loads((folder / "coarse.json").read_text())
    record["annotations"][0] |= {"iscrowd": 1, "segmentation": {"size": [60, 80], "counts": [100, 50, 4650]}}
    (folder / "coarse.json").write_text(json.dumps(record))
    assert run(folder).images == 2


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"resume": True, "fresh": True}, "choose one"),
        ({"output": "no/a.safetensors"}, "there is no folder"),
        ({"output": "images"}, "would replace the image folder"),
        ({"output": "coarse.json", "overwrite": True}, "would replace the input"),
        ({"output": "there.safetensors"}, "exists already"),
    ],
)
def test_outputs_in_the_way(folder: Path, arguments: dict[str, object], says: str) -> None:
    (folder / "there.safetensors").write_bytes(b"")
    if "output" in arguments:
        arguments = arguments | {"output": folder / str(arguments["output"])}
    with pytest.raises(UsageError, match=says):
        run(folder, **arguments)


# --- the command


def test_the_command(command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runners, "load_refiner", load_refiner)  # the fake of `command` has no layer to train
    words = ("adapt-iou", folder / "coarse.json", "--images", folder / "images", "--checkpoint", RANDOM)
    words = (*words, "--device", "cpu", "-o", folder / "a.safetensors")
    said = command(*words, "--learning-rate", "0")
    assert said.code == 1
    assert "adaption does not help here" in said.err and "nothing was written" in said.err
    assert "points alone" in said.out and "only 2 answers were held out" in said.out
    assert "features are kept in" in said.out
    said = command(*words, "--resume", "--learning-rate", "0", "--keep", "--json")
    assert said.code == 0
    record = json.loads(said.out)
    assert (record["reused"], record["helps"], record["recipe"]["learning_rate"]) == (3, False, 0.0)
    assert record["output"].endswith("a.safetensors")
    assert "--keep" in said.err
    said = command(*words)
    assert said.code == 2 and "exists already" in said.err
    said = command(*words[:-1], folder / "b.safetensors", "--workers", "none")
    assert said.code == 2 and "--workers is 'none'" in said.err
    said = command("adapt-iou", folder / "coarse.json", "-o", folder / "b.safetensors", "--model", "sam-vit-x")
    assert said.code == 2 and "there is no model" in said.err


def test_files_that_are_not_masks_are_told(command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runners, "load_refiner", load_refiner)
    save_squares(folder, "masks/1.png", "masks/2.png", "masks/3.png", "masks/more.jpg")
    words = ("--images", folder / "images", "--checkpoint", RANDOM, "--device", "cpu", "--learning-rate", "0", "--keep")
    said = command("adapt-iou", folder / "masks", *words, "-o", folder / "a.safetensors")
    assert said.code == 0, said.err
    assert "1 file was not read as a mask: more.jpg;" in said.out


def test_refine_refuses_an_adapter_of_another_model(folder: Path) -> None:
    path = save(an_adapter(model="sam-vit-b"), folder / "a.safetensors")
    with pytest.raises(WeightsError, match="sam-vit-b"):
        load_backend("embedded", checkpoint=RANDOM, device="cpu", precision="fp32", iou_adapter=path)


def test_refine_uses_an_adapter_from_the_command_line(folder: Path, tmp_path: Path) -> None:
    """The adapter changes what the model chooses for single prompts, and the journal's idea of the job with it."""
    run(folder)
    points = replace(METHODS["samrefiner"].prompts, use_mask=False)
    settings = replace(METHODS["samrefiner"], selection="predicted", prompts=points)

    def loaded(adapter: Path | None) -> Refiner:
        return load_refiner(
            "embedded", checkpoint=RANDOM, device="cpu", precision="fp32", settings=settings, iou_adapter=adapter
        )

    with_it, without = loaded(folder / "a.safetensors"), loaded(None)
    assert with_it.backend.fingerprint != without.backend.fingerprint
    refine_dataset(
        folder / "coarse.json",
        output=tmp_path / "out.json",
        images=folder / "images",
        checkpoint=RANDOM,
        settings=settings,
        iou_adapter=folder / "a.safetensors",
    )
    written = json.loads((tmp_path / "out.json").read_text())["info"]["refinetool"]
    assert written["fingerprint"] == with_it.backend.fingerprint


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"selection": "auto"}, "--selection predicted"),
        ({"selection": "coarse"}, "--selection predicted"),
        ({"selection": "predicted"}, "--no-mask"),
    ],
)
def test_an_adapter_that_would_not_be_asked_is_refused(folder: Path, changes: dict[str, Any], says: str) -> None:
    run(folder, recipe=replace(QUICK, with_masks=False))
    with pytest.raises(UsageError, match=says):
        load_refiner(
            "embedded",
            checkpoint=RANDOM,
            device="cpu",
            precision="fp32",
            settings=replace(METHODS["samrefiner"], **changes),
            iou_adapter=folder / "a.safetensors",
        )
