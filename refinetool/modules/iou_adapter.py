"""The IoU adapter of SAMRefiner++: a low-rank correction of the last layer of a model's IoU head.

With W (T, H) and b (T,) that layer, x (H,) its input, A (r, H) and B (T, r) the adapter:

    y = W x + b + B (A x)

Scale 1 and nothing between A and B, so the corrected layer is again a linear one, with W + B A for W, and predicting
costs no more than before. T is one score per mask token.
"""

import copy
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from refinetool.errors import WeightsError

FORMAT = 1
METADATA = "refinetool_iou_adapter"
"""The entry of a file's metadata that describes the adapter, as JSON."""
KEYS = ("iou_adapter.down.weight", "iou_adapter.up.weight")


@dataclass(frozen=True, slots=True, eq=False)
class IouAdapter:
    """A correction and the model it was made for.

    down: float32 (r, H), the A of the equation.
    up: float32 (T, r), the B.
    model: name of the model.
    fingerprint: hash of that model's architecture and weights, as its backend states it.
    with_masks: whether it also scores answers to prompts with a mask, or only to points and boxes, which it was
        trained on.
    about: the recipe and the figures of the training, as JSON can hold them.
    """

    down: Tensor
    up: Tensor
    model: str
    fingerprint: str
    with_masks: bool
    about: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """SHA-256 over what decides a score, whatever else is written in the file."""
        digest = hashlib.sha256(f"{self.with_masks}".encode())
        for factor in (self.down, self.up):
            digest.update(f"{tuple(factor.shape)}".encode())
            digest.update(factor.contiguous().numpy().tobytes())
        return digest.hexdigest()


def fresh_factors(*, rank: int, features: int, scores: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A and B before training: A uniform within 1/sqrt(H), as Kaiming's rule has it for a linear layer; B zero.

    Returns:
        float32 (r, H) and (T, r). Since B is zero, the model is at first as it was.
    """
    bound = 1 / math.sqrt(features)
    down = torch.empty(rank, features).uniform_(-bound, bound, generator=generator)
    return down, torch.zeros(scores, rank)


def corrected(features: Tensor, layer: nn.Linear, *, down: Tensor, up: Tensor) -> Tensor:
    """W x + b + B (A x) for features (..., H): (..., T)."""
    scores: Tensor = layer(features)
    return scores + features @ down.T @ up.T


def merged(adapter: IouAdapter, layer: nn.Linear) -> nn.Linear:
    """The last layer of an IoU head with an adapter in it: a copy with W + B A for W, added in float32, in W's dtype.

    Raises:
        WeightsError: the layer has other sizes than the adapter.
    """
    expected = (adapter.up.shape[0], adapter.down.shape[1])
    if tuple(layer.weight.shape) != expected:
        raise WeightsError(
            f"the IoU adapter is for a layer of {expected[1]} inputs and {expected[0]} scores, and that of "
            f"{adapter.model} has {layer.in_features} and {layer.out_features}; train an adapter for this model"
        )
    result = copy.deepcopy(layer)
    correction = (adapter.up @ adapter.down).to(layer.weight.device)
    with torch.no_grad():
        result.weight.copy_(layer.weight.float() + correction)
    return result


def serialise(adapter: IouAdapter) -> bytes:
    """The bytes of a file: safetensors, with model, fingerprint and what is to be known in its metadata."""
    described = {
        "format": FORMAT,
        "model": adapter.model,
        "fingerprint": adapter.fingerprint,
        "with_masks": adapter.with_masks,
        "about": adapter.about,
    }
    factors = dict(zip(KEYS, (adapter.down.contiguous(), adapter.up.contiguous()), strict=True))
    # One entry: safetensors writes several in an order that changes from call to call.
    return save(factors, metadata={METADATA: json.dumps(described, sort_keys=True)})


def read_adapter(path: Path, *, model: str, fingerprint: str) -> IouAdapter:
    """Read an adapter for a model.

    Args:
        model, fingerprint: the model it is to be used with, and the hash of its weights.

    Raises:
        WeightsError: the file can't be read, is something else, or was made for another model or other weights.
    """
    described, tensors = _read(path)
    if described["model"] != model:
        raise WeightsError(
            f"{path}: this IoU adapter was made for {described['model']} and the model is {model}; "
            f"use it with --model {described['model']}, or run refinetool adapt-iou --model {model}"
        )
    if described["fingerprint"] != fingerprint:
        raise WeightsError(
            f"{path}: this IoU adapter was made for {model} with other weights than those loaded now; "
            f"name the checkpoint it was made with, or run refinetool adapt-iou again"
        )
    down, up = (tensors[name].float() for name in KEYS)
    if down.ndim != 2 or up.ndim != 2 or up.shape[1] != down.shape[0]:
        raise WeightsError(
            f"{path}: A is {tuple(down.shape)} and B {tuple(up.shape)}, which don't fit each other; the file is damaged"
        )
    if not (down.isfinite().all() and up.isfinite().all()):
        raise WeightsError(f"{path}: the IoU adapter holds values that are not finite; train it again")
    return IouAdapter(down, up, model, fingerprint, described["with_masks"], described["about"])


def scores_masks(path: Path) -> bool:
    """Whether the adapter of a file scores answers to prompts with a mask, and not only those to points and boxes.

    Raises:
        WeightsError: the file can't be read, or is something else.
    """
    return bool(_read(path)[0]["with_masks"])


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            described = json.loads((file.metadata() or {}).get(METADATA, "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except OSError as error:
        raise WeightsError(f"{path}: the IoU adapter can't be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise WeightsError(f"{path}: this is no IoU adapter ({error}); refinetool adapt-iou writes one") from error
    if described.get("format") != FORMAT or sorted(tensors) != sorted(KEYS):
        raise WeightsError(
            f"{path}: this is no IoU adapter, or one of another version; refinetool adapt-iou writes one"
        )
    return described, tensors
