"""Files of heads: safetensors that name the kind of head, the model it was trained on, and that model's weights."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from refinetool.errors import WeightsError, first_line
from refinetool.modules.described_files import read_described
from refinetool.modules.detail import DetailHead
from refinetool.modules.embedded import DETAIL_PREFIX
from refinetool.modules.sam2refiner import AugmentedDetailHead, Sam2RefinerHead
from refinetool.settings import HeadKind, RefinerOptions

FORMAT = 1
"""`read_head` accepts no other."""
METADATA = "refinetool_head"
"""The entry of a file's metadata that describes the head, as JSON."""


@dataclass(frozen=True, slots=True)
class HeadRecord:
    """What a file says of its head.

    options: Those of `settings.RefinerOptions`, by name; of the detail head `la` alone, whether it sits on top of LA.
    model: Name of the model that it was trained on.
    base: `base_digest` of that model.
    about: The recipe of the training, in JSON types.
    """

    kind: HeadKind
    options: Mapping[str, Any]
    model: str
    base: str
    about: Mapping[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class HeadFile:
    """A head that was read: its record, its tensors by name, and the SHA-256 of both."""

    record: HeadRecord
    tensors: Mapping[str, Tensor]
    digest: str


def build_head(kind: HeadKind, options: Mapping[str, Any], sam: Any) -> nn.Module:
    """Build a head for a `SAM2Base`, with random weights from torch's global generator.

    Raises:
        ValueError, TypeError: There is no such option.
    """
    match kind:
        case "detail":
            if surplus := options.keys() - {"la"}:
                raise ValueError(f"the detail head has no option {min(surplus)}")
            channels = int(sam.sam_prompt_encoder.embed_dim)
            detail = DetailHead(fine_channels=(channels // 8, channels // 4), channels=channels)
            head: nn.Module = AugmentedDetailHead(detail, sam) if options.get("la") else detail
        case "sam2refiner":
            head = Sam2RefinerHead(RefinerOptions(**options), sam)
    return head.to(memory_format=torch.channels_last)  # faster on a CPU


def base_digest(sam: nn.Module) -> str:
    """Compute the SHA-256 of the names, shapes and values of a model's tensors, without those of its own head."""
    state = sam.state_dict()
    return state_digest({name: tensor for name, tensor in state.items() if not name.startswith(DETAIL_PREFIX)})


def state_digest(state: Mapping[str, Tensor]) -> str:
    """Compute the SHA-256 of names, shapes and values of tensors, independent of their order."""
    digest = hashlib.sha256()
    for name in sorted(state):
        values = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {tuple(values.shape)}\n".encode())
        digest.update(values.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def serialise_head(head: nn.Module, record: HeadRecord) -> bytes:
    """Serialise a head: its weights in fp16, and its record in the metadata."""
    tensors = {
        name: (tensor.half() if tensor.is_floating_point() else tensor).detach().contiguous().cpu()
        for name, tensor in head.state_dict().items()
    }
    # A single entry, because safetensors writes several in an order that changes from call to call.
    return save(tensors, metadata={METADATA: json.dumps({"format": FORMAT, **asdict(record)}, sort_keys=True)})


def read_head(path: Path) -> HeadFile:
    """Read a head.

    Raises:
        WeightsError: The file can't be read, is something else, or holds values that are not finite.
    """
    described, tensors = read_described(path, entry=METADATA, what="a head", writer="refinetool train head")
    match described:
        case {
            "format": 1,
            "kind": ("detail" | "sam2refiner") as kind,
            "options": dict() as options,
            "model": str() as model,
            "base": str() as base,
            "about": dict() as about,
        } if all(tensor.isfinite().all() for tensor in tensors.values()) and _are_switches(options):
            record = HeadRecord(kind, options, model, base, about)
            named = hashlib.sha256(f"{kind} {json.dumps(options, sort_keys=True)} {state_digest(tensors)}".encode())
            return HeadFile(record, tensors, named.hexdigest())
    raise WeightsError(
        f"{path}: this is not a head, or one of another version, or a damaged one; refinetool train head writes one"
    )


def _are_switches(options: Mapping[str, Any]) -> bool:
    names = {option.name for option in fields(RefinerOptions)}
    return all(name in names and isinstance(value, bool) for name, value in options.items())


def load_head(path: Path, sam: nn.Module, *, model: str) -> tuple[nn.Module, HeadFile]:
    """Read a head and build it on the model that it was trained on.

    Args:
        sam: The `SAM2Base` to use it with, and `model` its name.

    Raises:
        WeightsError: As `read_head`, or the head belongs to another model or to other weights, or does not fit.
    """
    found = read_head(path)
    record = found.record
    if record.model != model:
        raise WeightsError(
            f"{path}: this head was trained on {record.model}, but the model is {model}; "
            f"use it with --model {record.model}, or train one with refinetool train head --model {model}"
        )
    if record.base != base_digest(sam):
        raise WeightsError(
            f"{path}: this head was trained on {model} with other weights than those loaded now; "
            "name the checkpoint that it was trained on, or run refinetool train head again"
        )
    try:
        head = build_head(record.kind, record.options, sam)
        head.load_state_dict(found.tensors)
    except (ValueError, TypeError, RuntimeError, KeyError) as error:
        raise WeightsError(f"{path}: the head is damaged: {first_line(error)}; train it again") from error
    return head, found
