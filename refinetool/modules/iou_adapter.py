"""The IoU adapter of SAMRefiner++: a low-rank correction of the last layer of a model's IoU head.

With W (T, H) and b (T,) that layer, x (H,) its input, A (r, H) and B (T, r) the adapter:

    y = W x + b + B (A x)

Scale 1 and nothing between A and B, so the corrected layer is again a linear one, with W + B A for W: an adapter is
merged into a model, and predicting costs no more than before. T is one score per mask token.
"""

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

FORMAT = "refinetool-iou-adapter-1"
KEYS = ("iou_adapter.down.weight", "iou_adapter.up.weight")


@dataclass(frozen=True, slots=True, eq=False)
class IouAdapter:
    """A correction and the model it was made for.

    down: float32 (r, H), the A of the equation.
    up: float32 (T, r), the B.
    model: name of the model.
    fingerprint: hash of that model's architecture and weights, as its backend states it.
    about: the recipe and the figures of the training, as JSON can hold them.
    """

    down: Tensor
    up: Tensor
    model: str
    fingerprint: str
    about: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """SHA-256 over shapes and values: what decides a score, whatever was written about it."""
        digest = hashlib.sha256()
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


def merge(adapter: IouAdapter, layer: nn.Linear) -> None:
    """Put an adapter into the last layer of an IoU head: W becomes W + B A, added in float32 and kept in W's dtype.

    Raises:
        WeightsError: the layer has other sizes than the adapter.
    """
    expected = (adapter.up.shape[0], adapter.down.shape[1])
    if tuple(layer.weight.shape) != expected:
        raise WeightsError(
            f"the IoU adapter is for a layer of {expected[1]} inputs and {expected[0]} scores, and that of "
            f"{adapter.model} has {layer.in_features} and {layer.out_features}; train an adapter for this model"
        )
    correction = (adapter.up @ adapter.down).to(layer.weight.device)
    with torch.no_grad():
        layer.weight.copy_(layer.weight.float() + correction)


def serialise(adapter: IouAdapter) -> bytes:
    """The bytes of a file: safetensors, with model, fingerprint and what is to be known in its metadata."""
    metadata = {
        "format": FORMAT,
        "model": adapter.model,
        "fingerprint": adapter.fingerprint,
        "about": json.dumps(adapter.about, sort_keys=True),
    }
    factors = dict(zip(KEYS, (adapter.down.contiguous(), adapter.up.contiguous()), strict=True))
    return save(factors, metadata=metadata)


def read_adapter(path: Path, *, model: str, fingerprint: str) -> IouAdapter:
    """Read an adapter for a model.

    Args:
        model, fingerprint: the model it is to be used with, and the hash of its weights.

    Raises:
        WeightsError: the file can't be read, is something else, or was made for another model or other weights.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except OSError as error:
        raise WeightsError(f"{path}: the IoU adapter can't be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise WeightsError(f"{path}: this is no IoU adapter ({error}); refinetool adapt-iou writes one") from error
    if metadata.get("format") != FORMAT or sorted(tensors) != sorted(KEYS):
        raise WeightsError(
            f"{path}: this is no IoU adapter, or one of another version; refinetool adapt-iou writes one"
        )
    if metadata["model"] != model:
        raise WeightsError(
            f"{path}: this IoU adapter was made for {metadata['model']} and the model is {model}; "
            f"use it with --model {metadata['model']}, or run refinetool adapt-iou --model {model}"
        )
    if metadata["fingerprint"] != fingerprint:
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
    return IouAdapter(down, up, model, fingerprint, json.loads(metadata["about"]))
