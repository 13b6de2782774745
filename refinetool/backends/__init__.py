"""The protocol of segmentation models: embed images, then predict masks for prompts.

A backend handles everything that is specific to its model: resizing, padding, normalisation, half-pixel shifts, 1024
and 256. Outside a backend there is one coordinate frame, the pixels of the embedded view. Embeddings and predictions
are values: callers can keep them, pass them on, and mix those of several images. A backend stores nothing between
calls.
"""

from collections.abc import Sequence
from typing import Protocol

from refinetool.records import Contest, FloatArray, FloatMap, FloatMaps, ImageArray, IntArray, Masks, Prompts, Size
from refinetool.settings import ModelDefaults


class Embedding(Protocol):
    """The model's features of one view, on the model's device."""

    @property
    def size(self) -> Size:
        """(H, W) of the view in pixels."""

    def similarity(self, masks: Masks) -> FloatMaps:
        """Compute how similar each cell of the feature grid is to the area under each mask.

        Args:
            masks: bool (N, H, W) over the view.

        Returns:
            float32 (N, h, w) cosine in -1..1 between a cell's feature and the mean feature under the mask, on a grid
            that covers exactly the view (padding removed). A mask too small for the grid uses the cells it touches; an
            empty mask gives zeros.
        """


class Prediction(Protocol):
    """K candidate masks for each of N regions of one view, on the model's device.

    Candidate 0 is the single-mask output; candidates 1..K-1 are the alternatives of the multimask output.
    """

    @property
    def scores(self) -> FloatArray:
        """float32 (N, K): the model's predicted IoU."""

    def overlap(self, masks: Masks) -> FloatArray:
        """float32 (N, K): IoU of each candidate with its mask, bool (N, H, W), measured on the model's mask grid."""

    def masks(self, choice: IntArray) -> Masks:
        """bool (N, H, W) at view size: candidate `choice[n]` of region n. Only these are upsampled and copied."""

    def logits(self, choice: IntArray) -> FloatMaps:
        """float32 (N, h, w): the logits of those candidates on the model's mask grid, padding removed, in -32..32.

        They can be used as the mask prompt of a further pass.
        """

    def stability(self, offset: float) -> FloatArray:
        """float32 (N, K): IoU of each candidate thresholded at `offset` and at -`offset`; 1 where both are empty.

        This is the stability score of SAM's automatic mask generator: low where the outline depends on the threshold.
        """


class Arbiter(Protocol):
    """Settles what each object of an image keeps and gains once all masks are predicted; see `competition`."""

    @property
    def least_px(self) -> int:
        """It is not asked for coarse masks of fewer pixels."""

    def settle(self, contest: Contest) -> FloatMap:
        """Return by how much the logits of the mask should move: float32 (h, w)."""


class Backend(Protocol):
    """A promptable segmentation model. A batch of N equals N batches of one."""

    name: str
    defaults: ModelDefaults
    """The model's defaults, used where the user chose nothing."""
    fingerprint: str
    """Hash of architecture and weights, written into journals and outputs."""
    arbiters: Sequence[Arbiter]
    """What corrects the masks of an image together, each for masks of another size."""

    @property
    def views_at_once(self) -> int:
        """Number of views to process together for the best speed. Results do not depend on it."""

    def embed(self, images: Sequence[ImageArray]) -> list[Embedding]:
        """Encode views, each uint8 (H, W, 3) RGB of any size."""

    def predict(self, embeddings: Sequence[Embedding], prompts: Sequence[Prompts]) -> list[Prediction]:
        """Predict masks for the prompts of each embedding; N may differ between them and may be 0."""


__all__ = ["Arbiter", "Backend", "Embedding", "Prediction"]
