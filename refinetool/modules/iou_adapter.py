"""The IoU adapter of SAMRefiner++: a low-rank correction of the last layer of a model's IoU head.

With W (T, H) and b (T,) that layer, x (H,) its input, A (r, H) and B (T, r) the adapter:

    y = W x + b + B (A x)

The scale is 1 and there is no activation between A and B, so the corrected layer is again linear, with W + B A in place
of W, and prediction costs no more than before. T is the number of mask tokens, one score each.
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
from safetensors.torch import save
from torch import Tensor, nn

from refinetool.errors import WeightsError
from refinetool.modules.described_files import read_described

FORMAT = 1
"""`_read` accepts no other."""
METADATA = "refinetool_iou_adapter"
"""The entry of a file's metadata that describes the adapter, as JSON."""
KEYS = ("iou_adapter.down.weight", "iou_adapter.up.weight")


@dataclass(frozen=True, slots=True, eq=False)
class IouAdapter:
    """An adapter and the model it was trained for.

    down: float32 (r, H), the A of the equation.
    up: float32 (T, r), the B.
    model: Name of the model.
    fingerprint: Hash of that model's architecture and weights, from its backend.
    with_masks: Whether it also scores candidates of prompts with a mask, or only those of points and boxes, which it
        was trained on.
    about: The recipe and the results of the training, in JSON types.
    """

    down: Tensor
    up: Tensor
    model: str
    fingerprint: str
    with_masks: bool
    about: Mapping[str, Any]

    @property
    def digest(self) -> str:
        """SHA-256 of everything that affects scores; other content of the file does not count."""
        digest = hashlib.sha256(f"{self.with_masks}".encode())
        for factor in (self.down, self.up):
            digest.update(f"{tuple(factor.shape)}".encode())
            digest.update(factor.contiguous().numpy().tobytes())
        return digest.hexdigest()


def fresh_factors(*, rank: int, features: int, scores: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Initialise A and B: A uniform within 1/sqrt(H), as in Kaiming's rule for a linear layer; B zero.

    Returns:
        float32 (r, H) and (T, r). Since B is zero, the scores are unchanged at first.
    """
    bound = 1 / math.sqrt(features)
    down = torch.empty(rank, features).uniform_(-bound, bound, generator=generator)
    return down, torch.zeros(scores, rank)


def corrected(features: Tensor, layer: nn.Linear, *, down: Tensor, up: Tensor) -> Tensor:
    """Compute W x + b + B (A x) for features (..., H): (..., T)."""
    scores: Tensor = layer(features)
    return scores + features @ down.T @ up.T


def merged(adapter: IouAdapter, layer: nn.Linear) -> nn.Linear:
    """Merge an adapter into the last layer of an IoU head: a copy with W + B A, added in float32, in W's dtype.

    Raises:
        WeightsError: The layer has other sizes than the adapter.
    """
    expected = (adapter.up.shape[0], adapter.down.shape[1])
    if tuple(layer.weight.shape) != expected:
        raise WeightsError(
            f"the IoU adapter is for a layer with {expected[1]} inputs and {expected[0]} scores, but that of "
            f"{adapter.model} has {layer.in_features} and {layer.out_features}; train an adapter for this model"
        )
    result = copy.deepcopy(layer)
    correction = (adapter.up @ adapter.down).to(layer.weight.device)
    with torch.no_grad():
        result.weight.copy_(layer.weight.float() + correction)
    return result


def serialise(adapter: IouAdapter) -> bytes:
    """Serialise an adapter as safetensors, with model, fingerprint and training record in the metadata."""
    described = {
        "format": FORMAT,
        "model": adapter.model,
        "fingerprint": adapter.fingerprint,
        "with_masks": adapter.with_masks,
        "about": adapter.about,
    }
    factors = dict(zip(KEYS, (adapter.down.contiguous(), adapter.up.contiguous()), strict=True))
    # A single entry, because safetensors writes several in an order that changes from call to call.
    return save(factors, metadata={METADATA: json.dumps(described, sort_keys=True)})


def read_adapter(path: Path, *, model: str, fingerprint: str) -> IouAdapter:
    """Read an adapter for a model.

    Args:
        model, fingerprint: The model to use it with, and the hash of its weights.

    Raises:
        WeightsError: The file can't be read, is something else, or was made for another model or other weights.
    """
    described, tensors = _read(path)
    if described["model"] != model:
        raise WeightsError(
            f"{path}: this IoU adapter was made for {described['model']}, but the model is {model}; "
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
            f"{path}: A is {tuple(down.shape)} and B {tuple(up.shape)}, which don't match; the file is damaged"
        )
    if not (down.isfinite().all() and up.isfinite().all()):
        raise WeightsError(f"{path}: the IoU adapter holds values that are not finite; train it again")
    return IouAdapter(down, up, model, fingerprint, described["with_masks"], described["about"])


def scores_masks(path: Path) -> bool:
    """Whether the adapter in a file also scores candidates of prompts with a mask, not only of points and boxes.

    Raises:
        WeightsError: The file can't be read, or is something else.
    """
    return bool(_read(path)[0]["with_masks"])


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    described, tensors = read_described(path, entry=METADATA, what="an IoU adapter", writer="refinetool adapt-iou")
    match described:
        case {"format": 1, "model": str(), "fingerprint": str(), "with_masks": bool(), "about": dict()}:
            if sorted(tensors) == sorted(KEYS) and all(factor.is_floating_point() for factor in tensors.values()):
                return described, tensors
    raise WeightsError(
        f"{path}: this is not an IoU adapter, or one of another version; refinetool adapt-iou writes one"
    )
