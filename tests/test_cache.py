"""Embeddings kept between runs: the same answers, no encoding, a bounded folder, and no harm from what is broken."""

import os
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor

from refinetool.backends.cache import SUFFIX, EmbeddingCache
from refinetool.backends.models import load_backend
from refinetool.backends.square import SquareBackend
from refinetool.errors import StorageError
from refinetool.records import ImageArray, Prompts

ABOUT = ("weights", "fp32")


def image(number: int) -> ImageArray:
    return np.random.default_rng(number).integers(0, 256, (40 + number, 50, 3), dtype=np.uint8)


def tensors(number: int) -> tuple[Tensor, ...]:
    return torch.full((25, 10), float(number)), torch.full((3,), number, dtype=torch.bfloat16)


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*/*{SUFFIX}"))


@pytest.mark.parametrize("model", ["embedded", pytest.param("sam-hq-vit-tiny", marks=pytest.mark.slow)])
def test_kept_embeddings_give_the_same_answers_and_nothing_is_encoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    def load(cached: bool) -> SquareBackend:
        backend = load_backend(model, checkpoint="random:0", device="cpu", precision="fp32")
        if cached:
            backend.remember(tmp_path / "kept", limit=10**9)
        return backend

    views = [image(n) for n in range(3)]
    boxes = np.array([[5, 6, 30, 25]], dtype=np.float32)
    points = (np.array([[[10.0, 12.0]]], dtype=np.float32), np.array([[1]], dtype=np.int64))
    prompts = [Prompts(*points, boxes, None) for _ in views]

    def answers(backend: SquareBackend, given: list[ImageArray]) -> list[np.ndarray]:
        found = backend.predict(backend.embed(given), prompts[: len(given)])
        return [part for one in found for part in (one.logits(np.zeros(1, dtype=np.int64)), one.scores)]

    plain = answers(load(cached=False), views)
    first = load(cached=True)
    answers(first, views[1:2])
    mixed = answers(first, views)
    later = load(cached=True)
    monkeypatch.setattr(later, "_encode", lambda _: pytest.fail("all views are kept"))
    kept = answers(later, views)
    for one, other, again in zip(plain, mixed, kept, strict=True):
        assert np.array_equal(one, other)
        assert np.array_equal(one, again)
    assert len(files(tmp_path / "kept")) == 3


def test_embeddings_of_a_compiled_encoder_are_kept_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, compiled = (load_backend("embedded", checkpoint=None, device="cpu", precision="fp32") for _ in range(2))
    monkeypatch.setattr(torch, "compile", lambda call, **_: call)
    compiled.compile()
    for backend in (plain, compiled):
        backend.remember(tmp_path, limit=10**9)
        backend.embed([image(0)])
    assert len(files(tmp_path)) == 2, "they differ by rounding"


def test_what_is_kept_comes_back_for_these_pixels_and_this_model_only(tmp_path: Path) -> None:
    cache = EmbeddingCache(tmp_path, limit=10**6, about=ABOUT)
    cache.keep(image(1), tensors(1))
    found = EmbeddingCache(tmp_path, limit=10**6, about=ABOUT).find(image(1))
    assert found is not None
    assert [(one.dtype, one.tolist()) for one in found] == [(one.dtype, one.tolist()) for one in tensors(1)]
    assert cache.find(image(2)) is None
    assert EmbeddingCache(tmp_path, limit=10**6, about=("weights", "bf16")).find(image(1)) is None
    turned = image(1).reshape(50, 41, 3)
    assert cache.find(turned) is None, "the same bytes in another shape"


def test_the_folder_is_bounded_and_what_was_used_stays(tmp_path: Path) -> None:
    cache = EmbeddingCache(tmp_path, limit=7_000, about=ABOUT)  # a file has about 1,150 bytes
    for number in range(5):
        cache.keep(image(number), tensors(number))
    assert len(files(tmp_path)) == 5
    for path in files(tmp_path):
        os.utime(path, ns=(1, 1))
    assert cache.find(image(0)) is not None, "used last"
    for number in range(5, 8):
        cache.keep(image(number), tensors(number))
    assert sum(path.stat().st_size for path in files(tmp_path)) <= 7_000
    assert cache.find(image(0)) is not None
    assert cache.find(image(7)) is not None
    assert sum(cache.find(image(number)) is None for number in (1, 2, 3, 4)) >= 2


def test_another_run_counts_what_is_there(tmp_path: Path) -> None:
    for number in range(8):
        EmbeddingCache(tmp_path, limit=7_000, about=ABOUT).keep(image(number), tensors(number))
    assert sum(path.stat().st_size for path in files(tmp_path)) <= 7_000


def test_damaged_files_are_written_again(tmp_path: Path) -> None:
    cache = EmbeddingCache(tmp_path, limit=10**6, about=ABOUT)
    cache.keep(image(1), tensors(1))
    (path,) = files(tmp_path)
    whole = path.read_bytes()
    foreign = safetensors.torch.save({"weight": torch.zeros(3)})
    for damaged in (b"", whole[:100], b"\xff" * len(whole), foreign):
        path.write_bytes(damaged)
        assert cache.find(image(1)) is None
    cache.keep(image(1), tensors(1))
    assert path.read_bytes() == whole


def test_a_full_disk_is_told_once_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = EmbeddingCache(tmp_path, limit=10**6, about=ABOUT)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    cache.keep(image(1), tensors(1))
    cache.keep(image(2), tensors(2))
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}: embeddings are no longer kept: No space left on device"
    ]
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_folder_that_can_not_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"file: the folder for embeddings can't be made"):
        EmbeddingCache(tmp_path / "file", limit=1, about=ABOUT)
