"""The arbiter: a small network that settles which pixels an object keeps and gains, knowing what the others claim.

It sees the logits of an object's mask, what the other objects deny it, all coarse masks and the image, on the grid of
the logits, and whether objects may overlap, and says by how much the logits should move. It is a U-Net that works at a
half, a quarter and an eighth of the sides of the grid; its output is interpolated. It depends on the model only through
the logits.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from refinetool.errors import WeightsError
from refinetool.modules.described_files import read_described
from refinetool.modules.head_files import state_digest
from refinetool.records import Contest, FloatMap

HALF, QUARTER, EIGHTH = 24, 48, 64
"""Channels at 1/2, 1/4 and 1/8 of the grid."""
MULTIPLE = 8
"""The sides of a grid are multiples of this."""
INPUTS = 10
LOGIT_BOUND, LOGIT_SCALE = 16.0, 4.0
DENIED_BOUND, DENIED_SCALE = -10.0, 2.0
"""Logits and what is denied are clamped and divided, so that they have the scale of the other inputs."""
METADATA = "refinetool_arbiter"
"""The entry of a file's metadata that describes the arbiter, as JSON."""


class ArbiterNet(nn.Module):
    """The network. A new one changes nothing, because its last layer is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.at_half = nn.Sequential(_block(INPUTS, HALF, stride=2), _block(HALF, HALF))
        self.at_quarter = nn.Sequential(_block(HALF, QUARTER, stride=2), _block(QUARTER, QUARTER))
        self.at_eighth = nn.Sequential(
            _block(QUARTER, EIGHTH, stride=2), _block(EIGHTH, EIGHTH), _block(EIGHTH, EIGHTH)
        )
        self.to_quarter, self.to_half = nn.Conv2d(EIGHTH, QUARTER, 1), nn.Conv2d(QUARTER, HALF, 1)
        self.up_quarter, self.up_half = _block(QUARTER, QUARTER), _block(HALF, HALF)
        self.leave = nn.Conv2d(HALF, 1, 3, padding=1)
        self.weight = nn.Parameter(torch.zeros(()))
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)  # type: ignore[arg-type]

    def forward(
        self, *, logits: Tensor, denied: Tensor, coarse: Tensor, others: Tensor, pixels: Tensor, exclusive: Tensor
    ) -> Tensor:
        """Return how much the logits move, float32 (N, h, w).

        Args:
            logits, denied, coarse, others: float32 (N, h, w), see `Contest`.
            pixels: uint8 (N, h, w, 3) RGB.
            exclusive: bool (N,).
        """
        image = pixels.permute(0, 3, 1, 2).float() / 127.5 - 1
        logits, denied = logits.clamp(-LOGIT_BOUND, LOGIT_BOUND), denied.clamp(min=DENIED_BOUND)
        maps = (logits / LOGIT_SCALE, logits.tanh(), denied / DENIED_SCALE, denied.exp(), coarse, others)
        told = exclusive[:, None, None, None].float().expand(-1, 1, *logits.shape[1:])
        half = self.at_half(torch.cat((torch.stack(maps, 1), image, told), 1))
        quarter = self.at_quarter(half)
        quarter = self.up_quarter(_twice(self.to_quarter(self.at_eighth(quarter))) + quarter)
        half = self.up_half(_twice(self.to_half(quarter)) + half)
        moved: Tensor = _twice(self.leave(half).float())[:, 0] + self.weight * denied
        return moved


def _block(before: int, after: int, *, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, 3, stride, 1), nn.GroupNorm(4, after), nn.ReLU())


def _twice(maps: Tensor) -> Tensor:
    return F.interpolate(maps, scale_factor=2.0, mode="bilinear", align_corners=False)


def network_inputs(contests: Sequence[Contest]) -> dict[str, Tensor]:
    """Return the arguments of `ArbiterNet.forward` for contests of one grid."""
    names = [each.name for each in fields(Contest)]
    return {name: torch.from_numpy(np.stack([getattr(one, name) for one in contests])) for name in names}


@dataclass(frozen=True, slots=True, eq=False)
class Arbiter:
    """A trained arbiter, on the CPU. Safe to use from several threads.

    digest: SHA-256 of its weights.
    about: The recipe of its training, in JSON types.
    least_px: Pixels of the smallest objects that it learnt from, and of the smallest coarse masks it is asked for.
    """

    network: ArbiterNet
    digest: str
    about: Mapping[str, Any]
    least_px: int

    def settle(self, contest: Contest) -> FloatMap:
        """Return by how much the logits of a mask should move: float32 (h, w)."""
        with torch.inference_mode():
            moved: FloatMap = self.network(**network_inputs([contest]))[0].numpy()
        return moved


def serialise_arbiter(network: nn.Module, about: Mapping[str, Any]) -> bytes:
    """Serialise an arbiter, with the recipe of its training in the metadata."""
    tensors = {name: tensor.detach().float().contiguous().cpu() for name, tensor in network.state_dict().items()}
    return save(tensors, metadata={METADATA: json.dumps({"format": 1, "about": about}, sort_keys=True)})


def read_arbiter(path: Path) -> Arbiter:
    """Read an arbiter.

    Raises:
        WeightsError: The file can't be read, is something else, or does not fit.
    """
    described, tensors = read_described(path, entry=METADATA, what="an arbiter", writer="refinetool train arbiter")
    network = ArbiterNet()
    expected = {name: tensor.shape for name, tensor in network.state_dict().items()}
    match described:
        case {"format": 1, "about": {"settings": {"min_object_px": int(smallest)}} as about} if {
            name: tensor.shape for name, tensor in tensors.items()
        } == expected and all(tensor.isfinite().all() for tensor in tensors.values()):
            network.load_state_dict(tensors)
            ready = network.eval().requires_grad_(False).to(memory_format=torch.channels_last)
            return Arbiter(ready, state_digest(tensors), about, smallest)
    raise WeightsError(
        f"{path}: this is not an arbiter, or one of another version, or a damaged one; "
        "refinetool train arbiter writes one"
    )
