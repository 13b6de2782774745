"""The mean of the weights of embedded models."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import Command
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from training_data import QUICK, packed_folder

from refinetool.cli import train
from refinetool.errors import DataError, UsageError, WeightsError
from refinetool.modules.embedded import DETAIL_PREFIX, EmbeddedModel, build_embedded
from refinetool.settings import TrainSettings
from refinetool.train.data.pack import Pack
from refinetool.train.data.sampler import Sampler
from refinetool.train.data.store import load_store
from refinetool.train.embedded import average as averaging
from refinetool.train.embedded.average import average_embedded, mean_state, normalise
from refinetool.train.files import export, settings_entry, trained_with

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Pack:
    return packed_folder(tmp_path_factory.mktemp("pack"))


def a_model(seed: int) -> EmbeddedModel:
    torch.manual_seed(seed)
    return build_embedded(image_size=QUICK.side)


def written(model: EmbeddedModel, path: Path) -> Path:
    export(model.state_dict(), path, metadata=settings_entry(QUICK))
    return path


def average(weights: list[Path], output: Path, data: Path) -> dict[str, Tensor]:
    return load_file(
        average_embedded(weights, output, data=data, examples=4, device="cpu", on_progress=lambda *_: None)
    )


def test_the_mean_is_taken_tensor_by_tensor() -> None:
    some = {"weight": torch.tensor([1.0, 2.0]).half(), "count": torch.tensor(7)}
    others = {"weight": torch.tensor([2.0, 6.0]).half(), "count": torch.tensor(9)}
    mean = mean_state([some, others, others])
    assert mean["weight"].tolist() == pytest.approx([5 / 3, 14 / 3])
    assert mean["count"] == 7


def test_what_the_files_have_in_common_stays_to_the_bit(tmp_path: Path, pack: Pack) -> None:
    one, other = a_model(1), a_model(1)
    with torch.no_grad():
        for parameter in other.detail.parameters():
            parameter.add_(0.125)
    files = [written(model, tmp_path / f"{n}.safetensors") for n, model in enumerate((one, other, other))]
    before, after = load_file(files[0]), average(files, tmp_path / "mean", pack.folder)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if not name.startswith(DETAIL_PREFIX):
            assert torch.equal(tensor, after[name]), name
        elif not name.endswith(STATISTICS):
            assert torch.allclose(after[name].float(), tensor.float() + 0.25 / 3, atol=2e-3), name


def test_statistics_are_those_of_what_the_layers_see(pack: Pack) -> None:
    """Means over batches of what reaches each layer, taken by a hook, whatever the statistics were before."""
    model = a_model(2)
    layers = {name: layer for name, layer in model.detail.named_modules() if isinstance(layer, nn.BatchNorm2d)}
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}
    for name, layer in layers.items():
        layer.running_mean.fill_(9.0)  # type: ignore[union-attr]
        layer.register_forward_pre_hook(lambda _, given, name=name: seen[name].append(given[0].float()))
    sampler = Sampler(load_store(pack, "train", device="cpu"), settings=QUICK, seed=0)
    normalise(model, sampler, examples=6, settings=QUICK, on_progress=lambda *_: None)
    assert len(layers) > 5
    for name, layer in layers.items():
        if len(seen[name]) == 3:  # the others see images once
            for figure, of in (("running_mean", torch.mean), ("running_var", torch.var)):
                expected = torch.stack([of(one.transpose(0, 1).flatten(1), dim=1) for one in seen[name]]).mean(0)
                assert torch.allclose(getattr(layer, figure), expected, rtol=0.02, atol=1e-3), (name, figure)
    assert not any(module.training for module in model.modules())


def test_the_command(tmp_path: Path, pack: Pack, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "AVERAGE_EXAMPLES", 4)
    files = [written(a_model(seed), tmp_path / f"{seed}.safetensors") for seed in (1, 2)]
    said = command("train", "average", *files, "--data", pack.folder, "-o", tmp_path / "mean", "--device", "cpu")
    assert said.code == 0, said.err
    assert "averaging: 4/4 examples" in said.err
    with safe_open(tmp_path / "mean" / "embedded.safetensors", "pt") as file:
        assert file.metadata()["averaged"] == f"{files[0]}, {files[1]}"


def test_examples_are_like_those_of_the_last_file(tmp_path: Path, pack: Pack, monkeypatch: pytest.MonkeyPatch) -> None:
    def averaged(*weights: Path) -> Path:
        return average_embedded(
            weights, tmp_path / "mean", data=pack.folder, examples=4, device="cpu", on_progress=lambda *_: None
        )

    used: list[TrainSettings] = []
    monkeypatch.setattr(averaging, "normalise", lambda *_, settings, **__: used.append(settings))
    recorded = replace(QUICK, full_share=0.75, seed=5, images_per_step=256)
    expected = replace(recorded, images_per_step=TrainSettings().images_per_step)  # a GPU's batches may not fit
    plain, told = (tmp_path / f"{name}.safetensors" for name in ("plain", "told"))
    export(a_model(1).state_dict(), plain, metadata={})
    export(a_model(1).state_dict(), told, metadata=settings_entry(recorded) | {"step": "7"})
    averaged(told, plain)
    assert trained_with(averaged(plain, told)) == expected  # so that a mean can be averaged again
    assert used == [TrainSettings(), expected]
    export(a_model(1).state_dict(), told, metadata={"settings": '{"seed": 5'})
    with pytest.raises(WeightsError, match=r"told\.safetensors: this is not a model with a record"):
        averaged(plain, told)


def test_what_is_refused(tmp_path: Path, pack: Pack) -> None:
    model = a_model(1)
    whole = written(model, tmp_path / "embedded.safetensors")
    plain = tmp_path / "plain.safetensors"
    save_file({name: t for name, t in load_file(whole).items() if not name.startswith(DETAIL_PREFIX)}, plain)
    with pytest.raises(UsageError, match="nothing to average in 1 file"):
        average([whole], tmp_path / "mean", pack.folder)
    with pytest.raises(UsageError, match=r"embedded\.safetensors"):
        average([whole, whole], tmp_path, pack.folder)
    with pytest.raises(WeightsError, match=r"plain\.safetensors does not fit .* 176 tensors are missing"):
        average([whole, plain], tmp_path / "mean", pack.folder)
    with pytest.raises(DataError):
        average([whole, whole], tmp_path / "mean", tmp_path / "nowhere")
    assert not (tmp_path / "mean").exists()
