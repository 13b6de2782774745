"""Embeddings and predictions of models with square inputs: values that keep the features and the masks on the device.

N rows, K candidates, S the input side, m the mask grid (S/4, or finer with a head), g = S/16 the feature grid.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from refinetool.backends.frames import Frame, in_view, pick_cells, rasterise, sample
from refinetool.records import FloatArray, FloatMaps, IntArray, Masks, Size

PIXELS_AT_ONCE = 2**25
"""Number of full-size mask pixels, as float32, processed at a time: 128 MiB."""

LARGEST_LOGIT = 32.0
"""Bound of logits that are used as a mask prompt, as in the official predictors."""


@dataclass(frozen=True, slots=True, eq=False)
class SquareEmbedding:
    """The features of one view.

    features: (C, g, g), input of the mask decoder.
    extras: Further maps of the image that the decoder of this model needs.
    """

    frame: Frame
    features: Tensor
    extras: tuple[Tensor, ...]

    @property
    def size(self) -> Size:
        return self.frame.view

    def similarity(self, masks: Masks) -> FloatMaps:
        """Cosine similarity of every cell with the mean feature under each mask: see `Embedding` (eq. 1 and 2).

        As in SAMRefiner's eq. 1, the mean is taken before normalisation.
        """
        cells = self.features.shape[-1]
        picked = torch.from_numpy(pick_cells(masks, self.frame, cells=cells)).to(self.features.device)
        height, width = picked.shape[1:]
        features = self.features[:, :height, :width].flatten(1).float()
        weights = picked.flatten(1).float()
        means = weights @ features.T / weights.sum(dim=1, keepdim=True).clamp(min=1)
        cosine = F.normalize(means, dim=1) @ F.normalize(features, dim=0)
        extent = self.frame.extent(cells)
        exact = sample(
            cosine.clamp(-1, 1).reshape(-1, height, width),
            (height, width),
            step=(extent[0] / height, extent[1] / width),
        )
        similarity: FloatMaps = exact.cpu().numpy()
        return similarity


@dataclass(frozen=True, slots=True, eq=False)
class SquarePrediction:
    """Predictions for N regions of one view: logits (N, K, m, m) and predicted IoUs (N, K), float32 on the device."""

    frame: Frame
    grid: Tensor
    predicted_iou: Tensor

    @property
    def scores(self) -> FloatArray:
        scores: FloatArray = self.predicted_iou.cpu().numpy()
        return scores

    def overlap(self, masks: Masks) -> FloatArray:
        """IoU of each candidate with its mask on the mask grid, padding left out; 1 where both are empty."""
        cells = self.grid.shape[-1]
        shown = in_view(self.frame, cells=cells).to(self.grid.device)
        ious = torch.zeros(self.predicted_iou.shape)
        for rows in _chunks(len(masks), self.frame.view):
            given = torch.tensor(masks[rows]).to(self.grid.device)
            mask = (rasterise(given * 2.0 - 1.0, self.frame, cells=cells) > 0)[:, None] & shown
            candidates = (self.grid[rows] > 0) & shown
            shared = (candidates & mask).sum(dim=(2, 3))
            either = (candidates | mask).sum(dim=(2, 3))
            ious[rows] = torch.where(either > 0, shared / either, 1.0).cpu()
        result: FloatArray = ious.numpy()
        return result

    def masks(self, choice: IntArray) -> Masks:
        """Return the chosen candidates at view size.

        The official predictors resize m -> S pixels, cut off the padding and resize to the view, bilinearly each time.
        Here the part of the mask grid that the view covers is sampled bilinearly once, at the same positions.
        """
        view = self.frame.view
        chosen = self._chosen(choice)
        extent = self.frame.extent(chosen.shape[-1])
        masks = np.zeros((len(choice), *view), dtype=np.bool_)
        for part in _chunks(len(choice), view):
            full = sample(chosen[part], view, step=(extent[0] / view[0], extent[1] / view[1]))
            masks[part] = (full > 0).cpu().numpy()
        return masks

    def logits(self, choice: IntArray) -> FloatMaps:
        chosen = self._chosen(choice).clamp(-LARGEST_LOGIT, LARGEST_LOGIT)
        extent = self.frame.extent(chosen.shape[-1])
        height, width = (math.ceil(cells) for cells in extent)
        exact = sample(chosen[:, :height, :width], (height, width), step=(extent[0] / height, extent[1] / width))
        result: FloatArray = exact.cpu().numpy()
        return result

    def stability(self, offset: float) -> FloatArray:
        shown = in_view(self.frame, cells=self.grid.shape[-1]).to(self.grid.device)
        inner = ((self.grid > offset) & shown).sum(dim=(2, 3))
        outer = ((self.grid > -offset) & shown).sum(dim=(2, 3))  # contains the inner one
        result: FloatArray = torch.where(outer > 0, inner / outer, 1.0).cpu().numpy()
        return result

    def _chosen(self, choice: IntArray) -> Tensor:
        rows = torch.arange(len(choice), device=self.grid.device)
        return self.grid[rows, torch.tensor(choice).to(self.grid.device)]


@dataclass(frozen=True, slots=True, eq=False)
class TokenAnswers:
    """The decoder's output for N rows before a candidate is chosen, used as training data of IoU adaption.

    features: float32 (N, H), the input of the last layer of the IoU head.
    tokens: The predictions of all T mask tokens, 0 the single-mask output, as the decoder returns them.
    """

    features: Tensor
    tokens: SquarePrediction


def _chunks(count: int, size: Size) -> Iterator[slice]:
    at_once = max(1, PIXELS_AT_ONCE // math.prod(size))
    return (slice(start, start + at_once) for start in range(0, count, at_once))
