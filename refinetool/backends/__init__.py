"""Segmentation models behind one small protocol: embed images, then answer prompts.

A backend owns everything its model is particular about: resizing, padding, normalisation, half-pixel shifts, 1024 and
256. Outside it there is one frame, the pixels of the view that was embedded. Embeddings and predictions are values:
hold them, pass them on, mix those of two images; nothing is stored in the backend between calls.
"""

from collections.abc import Sequence
from typing import Protocol

from refinetool.records import BoolArray, FloatArray, ImageArray, IntArray, Prompts, Size
from refinetool.settings import ModelDefaults


class Embedding(Protocol):
    """What the model has seen of one view. Lives on the model's device."""

    @property
    def size(self) -> Size:
        """(H, W) of the view in pixels."""

    def similarity(self, masks: BoolArray) -> FloatArray:
        """How alike each cell of the feature grid is to what each mask covers.

        Args:
            masks: bool (N, H, W) over the view.

        Returns:
            float32 (N, h, w) cosine in -1..1 between a cell's feature and the mean feature under the mask, on a grid
            that covers exactly the view (padding cut off). A mask too small for the grid falls back to the cells it
            touches; an empty one gives zeros.
        """


class Prediction(Protocol):
    """K candidate masks for each of N regions of one view. Lives on the model's device.

    Candidate 0 is the single-mask output; candidates 1..K-1 are the alternatives of the multimask output.
    """

    @property
    def scores(self) -> FloatArray:
        """float32 (N, K): the model's predicted IoU."""

    def overlap(self, masks: BoolArray) -> FloatArray:
        """float32 (N, K): IoU of each candidate with its mask, bool (N, H, W), measured on the model's mask grid."""

    def masks(self, choice: IntArray) -> BoolArray:
        """bool (N, H, W) at view size: candidate `choice[n]` of region n. Only these are upsampled and copied out."""

    def logits(self, choice: IntArray) -> FloatArray:
        """float32 (N, h, w): the logits of those candidates on the model's mask grid, padding cut off, in -32..32.

        They can go into the model again as the mask prompt of a further pass.
        """

    def stability(self, offset: float) -> FloatArray:
        """float32 (N, K): IoU of each candidate cut at `offset` with itself cut at -`offset`; 1 where both are empty.

        What SAM's automatic mask generator calls the stability score: low where the outline hangs on the threshold.
        """


class Backend(Protocol):
    """A promptable segmentation model. A batch of N equals N batches of one."""

    name: str
    defaults: ModelDefaults
    """What suits this model where the user chose nothing."""
    fingerprint: str
    """Hash of architecture and weights: goes into journals and outputs."""

    @property
    def views_at_once(self) -> int:
        """How many views are best asked about together. More or fewer give the same answers."""

    def embed(self, images: Sequence[ImageArray]) -> list[Embedding]:
        """Encode views, each uint8 (H, W, 3) RGB of any size."""

    def predict(self, embeddings: Sequence[Embedding], prompts: Sequence[Prompts]) -> list[Prediction]:
        """Answer the prompts of each embedding; N may differ between them and may be 0."""


__all__ = ["Backend", "Embedding", "Prediction"]
