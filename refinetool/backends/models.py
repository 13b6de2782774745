"""The table of models, and `load_backend`, which builds the backend of a model by name.

torch and the segmentation packages are imported when a model is loaded, not with this module.
"""

import hashlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

from refinetool.backends import weights
from refinetool.backends.names import EMBEDDED, suggest
from refinetool.errors import UsageError, WeightsError
from refinetool.settings import BATCHES, MAX_SEED, ModelDefaults

if TYPE_CHECKING:
    from torch import Tensor, nn

    from refinetool.backends.square import Precision, SquareBackend

T = TypeVar("T")

RANDOM_PREFIX = "random:"
MAX_DIGITS = 20
"""Longer numbers in a name are refused before they are converted, for which Python has a limit of its own."""


@dataclass(frozen=True, slots=True)
class Model:
    """One model by name.

    backend: The `SquareBackend` that builds and runs it, as `module:class`; imported when the model is loaded.
    variant: The name of the model within that backend.
    defaults: The settings used where the user chose nothing.
    """

    name: str
    about: str
    backend: str
    variant: str
    defaults: ModelDefaults = field(default_factory=ModelDefaults)


SAM = "refinetool.backends.sam:SamBackend"
HQ_SAM = "refinetool.backends.sam:HqSamBackend"
SAM2 = "refinetool.backends.sam2:Sam2Backend"

MODELS: dict[str, Model] = {
    model.name: model
    for model in (
        Model(
            EMBEDDED,
            "small SAM2 that comes with refinetool",
            "refinetool.backends.embedded:EmbeddedBackend",
            "",
            ModelDefaults(
                view="crop",
                selection="single",
                snap="guided",
                min_predicted_iou=0.76,
                min_expected_gain=0.22,
                single_threaded=True,
            ),
        ),
        Model("sam-vit-b", "SAM, ViT-B encoder, 94 M parameters", SAM, "vit_b"),
        Model("sam-vit-l", "SAM, ViT-L encoder, 312 M parameters", SAM, "vit_l"),
        Model("sam-vit-h", "SAM, ViT-H encoder, 641 M parameters", SAM, "vit_h"),
        Model("sam-hq-vit-b", "HQ-SAM, ViT-B encoder", HQ_SAM, "vit_b"),
        Model("sam-hq-vit-l", "HQ-SAM, ViT-L encoder", HQ_SAM, "vit_l"),
        Model("sam-hq-vit-h", "HQ-SAM, ViT-H encoder", HQ_SAM, "vit_h"),
        Model("sam-hq-vit-tiny", "Light HQ-SAM, TinyViT encoder", HQ_SAM, "vit_tiny"),
        Model("sam2.1-hiera-t", "SAM 2.1, Hiera-T encoder", SAM2, "sam2.1/sam2.1_hiera_t"),
        Model("sam2.1-hiera-s", "SAM 2.1, Hiera-S encoder", SAM2, "sam2.1/sam2.1_hiera_s"),
        Model("sam2.1-hiera-b+", "SAM 2.1, Hiera-B+ encoder", SAM2, "sam2.1/sam2.1_hiera_b+"),
        Model("sam2.1-hiera-l", "SAM 2.1, Hiera-L encoder", SAM2, "sam2.1/sam2.1_hiera_l"),
        Model("sam2-hiera-t", "SAM 2, Hiera-T encoder", SAM2, "sam2/sam2_hiera_t"),
        Model("sam2-hiera-s", "SAM 2, Hiera-S encoder", SAM2, "sam2/sam2_hiera_s"),
        Model("sam2-hiera-b+", "SAM 2, Hiera-B+ encoder", SAM2, "sam2/sam2_hiera_b+"),
        Model("sam2-hiera-l", "SAM 2, Hiera-L encoder", SAM2, "sam2/sam2_hiera_l"),
    )
}
"""All models by name. To add one, add a line here; a new kind of model also needs a file with a `SquareBackend`."""


def load_backend(
    name: str,
    *,
    checkpoint: str | None,
    device: str,
    precision: str,
    iou_adapter: Path | None = None,
    image_batch: int | None = None,
    prompt_batch: int | None = None,
) -> "SquareBackend":
    """Build a model by name and load its weights.

    Args:
        name: One of `MODELS`.
        checkpoint: A weights file; `random:SEED` for random weights, the same on every call; None for the weights in
            the package (`embedded`) or in the cache.
        device: `auto` (a GPU if there is one), `cpu`, `cuda` or `cuda:N`.
        precision: `fp32`, `bf16`, or `auto`: bf16 on GPUs that support it.
        iou_adapter: A file that `adapt-iou` wrote for this model and these weights; it becomes part of the fingerprint.
        image_batch, prompt_batch: Views per encoder call and regions per decoder call; None for the device's default.

    Raises:
        UsageError: The name, device, precision or seed does not exist.
        WeightsError: The weights are missing, unreadable, not the published ones, or do not fit the model; or the
            adapter is unreadable or for another model.
    """
    model = find_model(name)
    place = pick_device(device)
    chosen_precision = pick_precision(precision, place)
    backend_class: type[SquareBackend] = pkgutil.resolve_name(model.backend)
    if is_random(checkpoint):
        network, digest = _random(backend_class, model, checkpoint)
    else:
        network, digest = _loaded(backend_class, model, checkpoint)
    fingerprint = _hash(f"{model.name} {digest}")
    correction = None
    if iou_adapter is not None:
        from refinetool.modules.iou_adapter import read_adapter

        correction = read_adapter(weights.user_path(iou_adapter), model=model.name, fingerprint=fingerprint)
        fingerprint = _hash(f"{fingerprint} {correction.digest}")
    views, prompts = BATCHES[place.partition(":")[0]]
    backend = backend_class(
        network,
        name=model.name,
        defaults=model.defaults,
        fingerprint=fingerprint,
        device=place,
        precision=chosen_precision,
        image_batch=image_batch or views,
        prompt_batch=prompt_batch or prompts,
    )
    if correction is not None:
        backend.adapt(correction)
    return backend


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def find_model(name: str) -> Model:
    """Return a model by name; raises UsageError if there is none."""
    try:
        return MODELS[name]
    except KeyError:
        raise UsageError(f"there is no model {name!r}; {suggest(name, MODELS)}") from None


def pick_device(device: str) -> str:
    """Return the torch device for a user's choice; raises UsageError if there is no such device."""
    import torch

    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        return device
    kind, _, index = device.partition(":")
    if kind != "cuda" or not ((index.isdecimal() and len(index) < MAX_DIGITS) or device == "cuda"):
        raise UsageError(f"there is no device {device!r}; the choices are auto, cpu, cuda and cuda:N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(index or 0) >= count:
        raise UsageError(f"device {device} was asked for, but torch finds {count} GPUs; try --device auto")
    return device


def pick_precision(precision: str, device: str) -> "Precision":
    """Resolve `auto` on a device; raises UsageError for an unknown precision."""
    import torch

    match precision:
        case "auto":
            return "bf16" if device.startswith("cuda") and torch.cuda.is_bf16_supported() else "fp32"
        case "fp32" | "bf16":
            return precision
        case _:
            raise UsageError(f"there is no precision {precision!r}; the choices are auto, fp32 and bf16")


# --- loading weights


def is_random(checkpoint: str | None) -> TypeGuard[str]:
    """Whether a checkpoint is `random:SEED` instead of a file."""
    return checkpoint is not None and checkpoint.startswith(RANDOM_PREFIX)


def _random(backend: "type[SquareBackend]", model: Model, checkpoint: str) -> "tuple[nn.Module, str]":
    network = seeded(lambda: backend.network(model.variant), checkpoint)
    return network, state_digest(network.state_dict())


def seeded(build: "Callable[[], T]", checkpoint: str) -> "T":
    """Build a network whose weights are random and the same on every call.

    Raises:
        UsageError: The checkpoint is not `random:SEED`, or there is no such seed.
    """
    import torch

    seed = checkpoint.removeprefix(RANDOM_PREFIX)
    if not (seed.isdecimal() and len(seed) < MAX_DIGITS and int(seed) <= MAX_SEED):
        raise UsageError(f"{checkpoint!r} has no seed; write a whole number of up to 63 bits, as in random:0")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(seed))
        return build()


def _loaded(backend: "type[SquareBackend]", model: Model, checkpoint: str | None) -> "tuple[nn.Module, str]":
    path, digest = _source(model, checkpoint)
    state = read_state(path)
    network = backend.network(model.variant)
    problem = misfit(expected=network.state_dict(), found=state)
    if problem:
        raise WeightsError(f"{path} does not fit {model.name}: {problem}. Name the model the file was saved from")
    network.load_state_dict(state)
    return network, digest


def _source(model: Model, checkpoint: str | None) -> tuple[Path, str]:
    """Return the file to load and its SHA-256."""
    if checkpoint is None and model.name != EMBEDDED:
        return weights.cached(model.name)
    path = weights.user_path(checkpoint) if checkpoint is not None else embedded_weights()
    try:
        return path, weights.sha256_of(path)
    except OSError as error:
        raise WeightsError(f"the weights {path} can't be read: {error.strerror}") from error


def embedded_weights() -> Path:
    """Return the path of the weights of the embedded model. Wheels are always unpacked, so it is a file."""
    return Path(str(files("refinetool").joinpath("assets", "embedded.safetensors")))


def read_state(path: Path) -> "dict[str, Tensor]":
    """Read named tensors without executing code that a file may hold.

    Args:
        path: `.safetensors`, or a state dict saved with torch.save, which may be under the key `model`.

    Raises:
        WeightsError: The file holds something else.
    """
    import torch
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            found: Any = load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the unpickler carries out what the file says, and raises whatever that leads to
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise WeightsError(f"{path} can't be read as weights ({reason}); it may be incomplete or hold code") from error
    state = found.get("model", found) if isinstance(found, dict) else found
    if not isinstance(state, dict) or not all(_is_weight(name, value) for name, value in state.items()):
        raise WeightsError(
            f"{path} holds a {type(found).__name__}, expected named tensors of plain numbers as torch.save writes them"
        )
    return state


def _is_weight(name: object, value: object) -> bool:
    """Whether a value of a state dict is a plain tensor: not complex, quantised, sparse, nested or without values."""
    import torch

    if not isinstance(name, str) or not isinstance(value, torch.Tensor):
        return False
    plain = value.layout is torch.strided and value.device.type == "cpu" and not value.is_nested
    return plain and not value.is_quantized and not value.is_complex()


def misfit(*, expected: "Mapping[str, Tensor]", found: "Mapping[str, Tensor]") -> str | None:
    """Describe why weights do not fit a network; None if they do."""
    missing = sorted(expected.keys() - found.keys())
    surplus = sorted(found.keys() - expected.keys())
    shapes = [
        f"{name} is {tuple(found[name].shape)}, expected {tuple(expected[name].shape)}"
        for name in expected.keys() & found.keys()
        if found[name].shape != expected[name].shape
    ]
    kinds = [
        f"{name} is {found[name].dtype}, expected {expected[name].dtype}"
        for name in expected.keys() & found.keys()
        if expected[name].is_floating_point() and not found[name].is_floating_point()
    ]
    problems = [
        f"{len(names)} {what} ({min(names)}{', ...' if len(names) > 1 else ''})"
        for names, what in (
            (missing, "tensors are missing"),
            (surplus, "tensors are not expected"),
            (shapes, "tensors have another shape"),
            (kinds, "tensors are of another type"),
        )
        if names
    ]
    if not problems:
        return None
    return f"of {len(found)} tensors found and {len(expected)} expected, " + ", ".join(problems)


def state_digest(state: "Mapping[str, Tensor]") -> str:
    """Compute the SHA-256 of names, shapes and values of tensors, independent of their order."""
    import torch

    digest = hashlib.sha256()
    for name in sorted(state):
        values = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
        digest.update(values.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
