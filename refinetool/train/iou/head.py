"""The part of a model that IoU adaption corrects: the last layer of its IoU head."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from refinetool.backends.square import SquareBackend
from refinetool.modules.iou_adapter import corrected


@dataclass(frozen=True, slots=True, eq=False)
class Head:
    """The frozen last layer of an IoU head, in float32 on the CPU, and whether a sigmoid follows it."""

    layer: nn.Linear
    sigmoid: bool

    @classmethod
    def of(cls, backend: SquareBackend) -> "Head":
        """Copy the last layer of a backend's IoU head."""
        return cls(_layer(backend.score_layer.state_dict()), backend.scores_are_probabilities)

    @classmethod
    def unpacked(cls, record: Mapping[str, Any]) -> "Head":
        """Return the head that was packed, to the bit."""
        return cls(_layer({name: torch.tensor(values) for name, values in record["layer"].items()}), record["sigmoid"])

    def packed(self) -> dict[str, object]:
        """Convert to JSON types."""
        layer = {name: values.tolist() for name, values in self.layer.state_dict().items()}
        return {"layer": layer, "sigmoid": self.sigmoid}

    def scores(self, inputs: Tensor, *, down: Tensor, up: Tensor) -> Tensor:
        """Predict scores of the alternatives, tokens 1 to C, with an adapter: (..., H) to (..., C)."""
        every: Tensor = corrected(inputs, self.layer, down=down, up=up)
        return (every.sigmoid() if self.sigmoid else every)[..., 1:]


def _layer(given: Mapping[str, Tensor]) -> nn.Linear:
    """Return a layer with weight (T, H) and bias (T) as given."""
    scores, features = given["weight"].shape
    layer = nn.Linear(features, scores)
    layer.load_state_dict({name: values.float().cpu() for name, values in given.items()})
    return layer.requires_grad_(False)
