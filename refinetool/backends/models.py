"""The table of models, and `load_backend`, which builds the backend of a model by name.

torch and the segmentation packages are imported when a model is loaded, not with this module.
"""

import hashlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar, get_args

from refinetool.backends import weights
from refinetool.backends.names import EMBEDDED, suggest
from refinetool.errors import UsageError, WeightsError, first_line
from refinetool.settings import BATCHES, MAX_SEED, GuardThresholds, HeadKind, ModelDefaults

if TYPE_CHECKING:
    from torch import Tensor, nn

    from refinetool.backends.square import Precision, SquareBackend

T = TypeVar("T")

RANDOM_PREFIX = "random:"
DEFAULT_HEAD, NO_HEAD = "auto", "none"
HEAD_KINDS: tuple[HeadKind, ...] = get_args(HeadKind)
MAX_DIGITS = 20
"""Longer numbers in a name are refused before they are converted, for which Python has a limit of its own."""


@dataclass(frozen=True, slots=True)
class Model:
    """One model by name.

    backend: The `SquareBackend` that builds and runs it, as `module:class`; imported when the model is loaded.
    variant: The name of the model within that backend.
    defaults: The settings used where the user chose nothing.
    head: The head used where the user chose nothing, which is part of the weights; `none` for none.
    arbiters: The arbiters for the model and this head that come with refinetool, each for masks of another size, by how
        the names of their files end.
    """

    name: str
    about: str
    backend: str
    variant: str
    defaults: ModelDefaults = field(default_factory=ModelDefaults)
    head: str = NO_HEAD
    arbiters: tuple[str, ...] = ()

    def backend_class(self) -> "type[SquareBackend]":
        """Import the class of the backend, and torch with it."""
        found: type[SquareBackend] = pkgutil.resolve_name(self.backend)
        return found

    @property
    def takes_heads(self) -> bool:
        """Whether the model is of SAM 2's kind, and so can have a head."""
        from refinetool.backends.sam2 import Sam2Backend

        return issubclass(self.backend_class(), Sam2Backend)


SAM = "refinetool.backends.sam:SamBackend"
HQ_SAM = "refinetool.backends.sam:HqSamBackend"
SAM2 = "refinetool.backends.sam2:Sam2Backend"

MODELS: dict[str, Model] = {
    model.name: model
    for model in (
        Model(
            EMBEDDED,
            "small SAM 2 that comes with refinetool",
            "refinetool.backends.embedded:EmbeddedBackend",
            "",
            ModelDefaults(
                view="crop",
                selection="single",
                snap="guided",
                guard=GuardThresholds(
                    min_expected_gain=0.325,
                    sure_iou=0.965,
                    min_coarse_iou=0.1,
                    max_area_ratio=8.0,
                    min_part_confidence=0.6,
                    min_part_depth=0.6,
                ),
                competition=0.35,
                single_threaded=True,
            ),
            head="detail",
            arbiters=("arbiter", "arbiter-small"),
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
    head: str = DEFAULT_HEAD,
    iou_adapter: Path | None = None,
    arbiter: Path | None = None,
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
        head: For SAM 2 models: `none`, a kind of head, a file that `train head` wrote for this model and these weights,
            or `auto` for the model's default. Heads other than that become part of the fingerprint.
        iou_adapter: A file that `adapt-iou` wrote for this model, these weights and this head; it becomes part of the
            fingerprint.
        arbiter: A file that `train arbiter` wrote, or None for the model's own ones; it becomes part of the
            fingerprint.
        image_batch, prompt_batch: Views per encoder call and regions per decoder call; None for the device's default.

    Raises:
        UsageError: The name, device, precision, seed or head does not exist.
        WeightsError: The weights are missing, unreadable, not the published ones, or do not fit the model; or the head
            or the adapter is unreadable or for another model; or the arbiter is unreadable.
    """
    model = find_model(name)
    place = pick_device(device)
    chosen_precision = pick_precision(precision, place)
    network, digest = load_network(model, checkpoint)
    fingerprint = base = _hash(f"{model.name} {digest}")
    defaults, options = model.defaults, {}
    if model.head != NO_HEAD:
        from refinetool.modules.head_files import base_digest

        base = _hash(f"{model.name} {base_digest(network)}")
    if model.takes_heads:
        options["head"], head_digest = load_model_head(model, network, head, checkpoint=checkpoint)
        if head_digest is not None:
            fingerprint = _hash(f"{fingerprint} {head_digest}")
            defaults = _with_another_head(defaults)
    elif head not in (DEFAULT_HEAD, NO_HEAD):
        raise UsageError(f"{name} can't have a head: heads are for SAM 2 models; drop --head {head}")

    from refinetool.modules.arbiter import read_arbiter

    arbiter_files: list[Path] = []
    if arbiter is not None:
        arbiter_files = [weights.user_path(arbiter)]
    elif head in (DEFAULT_HEAD, model.head) and not is_random(checkpoint):
        arbiter_files = arbiter_weights(model)
    arbiters = [read_arbiter(path) for path in arbiter_files]
    for each in arbiters:
        fingerprint = _hash(f"{fingerprint} {each.digest} {each.least_px}")
    correction = None
    if iou_adapter is not None:
        from refinetool.modules.iou_adapter import read_adapter

        correction = read_adapter(weights.user_path(iou_adapter), model=model.name, fingerprint=fingerprint)
        fingerprint = _hash(f"{fingerprint} {correction.digest}")
    views, prompts = BATCHES[place.partition(":")[0]]
    backend = model.backend_class()(
        network,
        name=model.name,
        defaults=defaults,
        fingerprint=fingerprint,
        base_fingerprint=base,
        device=place,
        precision=chosen_precision,
        image_batch=image_batch or views,
        prompt_batch=prompt_batch or prompts,
        **options,
    )
    backend.arbiters = arbiters
    if correction is not None:
        backend.adapt(correction)
    return backend


# --- heads


def load_model_head(
    model: Model, network: "nn.Module", head: str, *, checkpoint: str | None
) -> "tuple[nn.Module | None, str | None]":
    """Return the head of a SAM 2 model, and a digest that tells it from the model's default; see `load_backend`.

    With random weights, heads that are named by their kind have random weights, too.
    """
    from refinetool.modules.head_files import build_head, load_head, state_digest

    if head in (DEFAULT_HEAD, model.head):
        return (None if model.head == NO_HEAD else network.get_submodule(model.head)), None
    if head == NO_HEAD:
        return None, NO_HEAD
    if head in HEAD_KINDS:
        if is_random(checkpoint):
            built = seeded(checkpoint, lambda: build_head(head, {}, network))
            return built, state_digest(built.state_dict())
        packaged = head_weights(model, head)
        if not packaged.is_file():
            raise UsageError(
                f"there is no {head} head for {model.name} yet; train one with refinetool train head --model "
                f"{model.name}, and name its file with --head"
            )
        path = packaged
    else:
        path = weights.user_path(head)
        if not path.is_file():
            names = ", ".join((DEFAULT_HEAD, NO_HEAD, *HEAD_KINDS))
            raise UsageError(f"there is no head {head!r}, and no such file; the choices are {names}, or a file's path")
    found, file = load_head(path, network, model=model.name)
    return found, file.digest


def head_weights(model: Model, kind: str) -> Path:
    """Return the path of a head that comes with refinetool; there need not be one."""
    return Path(str(files("refinetool").joinpath("assets", f"{model.name}-{kind}.safetensors")))


def arbiter_weights(model: Model) -> list[Path]:
    """Return the paths of the arbiters that come with refinetool."""
    assets = files("refinetool").joinpath("assets")
    return [Path(str(assets.joinpath(f"{model.name}-{name}.safetensors"))) for name in model.arbiters]


def _with_another_head(defaults: ModelDefaults) -> ModelDefaults:
    """Return a model's defaults for a head with which the guard was not measured."""
    return replace(defaults, selection="single", guard=GuardThresholds())


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


def load_network(model: Model, checkpoint: str | None) -> "tuple[nn.Module, str]":
    """Build the network of a model and load its weights, see `load_backend`; returns it with a digest of them."""
    backend = model.backend_class()
    return _random(backend, model, checkpoint) if is_random(checkpoint) else _loaded(backend, model, checkpoint)


def is_random(checkpoint: str | None) -> TypeGuard[str]:
    """Whether a checkpoint is `random:SEED` instead of a file."""
    return checkpoint is not None and checkpoint.startswith(RANDOM_PREFIX)


def seeded(checkpoint: str, build: "Callable[[], T]") -> "T":
    """Build a module with the random weights that `random:SEED` stands for; raises UsageError without a seed."""
    import torch

    seed = checkpoint.removeprefix(RANDOM_PREFIX)
    if not (seed.isdecimal() and len(seed) < MAX_DIGITS and int(seed) <= MAX_SEED):
        raise UsageError(f"{checkpoint!r} has no seed; write a whole number of up to 63 bits, as in random:0")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(seed))
        return build()


def _random(backend: "type[SquareBackend]", model: Model, checkpoint: str) -> "tuple[nn.Module, str]":
    from refinetool.modules.head_files import state_digest

    network = seeded(checkpoint, lambda: backend.network(model.variant))
    return network, state_digest(network.state_dict())


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
        raise WeightsError(
            f"{path} can't be read as weights ({first_line(error)}); it may be incomplete or hold code"
        ) from error
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
