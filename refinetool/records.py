"""Records that the steps of refinement exchange. They are frozen, small, and validated when they are made.

Axes: N regions, K candidates, P points, H W the pixels of a view or image, h w a coarser grid over the same area.
Frame: pixels of the original image (or of the view cut from it), x right, y down. Sizes are (H, W), points are
(x, y) = (column, row) pixel indices, boxes are half-open xyxy, so `mask[y0:y1, x0:x1]` is the box.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from refinetool.statuses import Reason

Mask: TypeAlias = np.ndarray[tuple[int, int], np.dtype[np.bool_]]
"""bool (H, W). The type checker knows the rank: a stack of masks in place of a mask is an error."""
Masks: TypeAlias = np.ndarray[tuple[int, int, int], np.dtype[np.bool_]]
"""bool (N, H, W)."""
FloatMap: TypeAlias = np.ndarray[tuple[int, int], np.dtype[np.float32]]
"""float32 (h, w)."""
FloatMaps: TypeAlias = np.ndarray[tuple[int, int, int], np.dtype[np.float32]]
"""float32 (N, h, w)."""
BoolArray: TypeAlias = NDArray[np.bool_]
FloatArray: TypeAlias = NDArray[np.float32]
IntArray: TypeAlias = NDArray[np.int64]
ImageArray: TypeAlias = np.ndarray[tuple[int, int, int], np.dtype[np.uint8]]
"""uint8 (H, W, 3), RGB."""
Size: TypeAlias = tuple[int, int]
"""(H, W) in pixels."""
Point: TypeAlias = tuple[int, int]
"""(x, y) pixel indices."""
Box: TypeAlias = tuple[int, int, int, int]
"""Half-open (x0, y0, x1, y1) in pixels."""

FOREGROUND, BACKGROUND, ABSENT = 1, 0, -1
"""Point labels, as segment-anything numbers them."""

VOID = 255
"""The value of pixels in a map that are ignored, as in PASCAL VOC."""

Layout: TypeAlias = Literal["instances", "indexed", "semantic"]
"""How the regions of a sample are related: `instances` may overlap; `indexed` regions share one map, so they don't;
`semantic` regions share a map and are classes, so each is split into parts before it is refined."""


@dataclass(frozen=True, slots=True)
class Rle:
    """A mask as COCO's compressed RLE: column order, starting with background."""

    size: Size
    counts: bytes


@dataclass(frozen=True, slots=True)
class Region:
    """One coarse mask of the user's file.

    `mask` is None where the file holds none that can be decoded; `keep` then says why. A region with a `keep` reason
    is not refined and stays unchanged. `fault` is a sentence for the user that says what is wrong with it in the file,
    where something is. `truth` is the ground truth, where it is known and candidates are chosen by it.
    `score` and `area` (pixels, of the outline) are the values in the file, None where it has none: `score` ranks
    detections, and `area` tells small ground-truth objects from large ones.
    """

    id: int
    category: int | None
    mask: Rle | None
    keep: Reason | None = None
    truth: Rle | None = None
    score: float | None = None
    area: float | None = None
    fault: str | None = None

    def __post_init__(self) -> None:
        if self.mask is None and self.keep is None:
            raise ValueError(f"region {self.id} has neither a mask nor a reason to keep it as it is")


@dataclass(frozen=True, slots=True)
class Sample:
    """One image, by path, and its coarse regions in the order of the file.

    `size` is the image size (H, W) according to the annotations. `void` marks pixels that no region may claim or lose
    (`VOID` in a map). `within` is the folder that links must not lead out of, resolved; None if they may.
    """

    key: str
    image: Path
    size: Size
    regions: tuple[Region, ...]
    layout: Layout = "instances"
    void: Rle | None = None
    within: Path | None = None

    def __post_init__(self) -> None:
        for region in self.regions:
            for mask in (region.mask, region.truth):
                if mask is not None and mask.size != self.size:
                    raise ValueError(f"region {region.id} is {mask.size}, its sample {self.key} is {self.size}")

    @property
    def faults(self) -> tuple[str, ...]:
        """What is wrong with regions in the file: a sentence for each that is faulty, in their order."""
        return tuple(region.fault for region in self.regions if region.fault is not None)


def seed_of(text: str) -> int:
    """Return a number that follows from a text, to seed what is drawn at random for an image.

    The text may be a file name that is not valid Unicode, which Python represents with lone surrogates.
    """
    return zlib.crc32(text.encode("utf-8", "surrogatepass"))


@dataclass(frozen=True, slots=True)
class Prompts:
    """The prompts for N regions of one view.

    points: float32 (N, P, 2), (x, y) pixel indices in the view.
    labels: int64 (N, P), 1 foreground, 0 background, -1 no point (its coordinates are ignored).
    boxes: float32 (N, 4), half-open xyxy in the view, or None.
    masks: float32 (N, h, w), logits spread over the whole view on a grid of any size, or None.
    """

    points: FloatArray
    labels: IntArray
    boxes: FloatArray | None
    masks: FloatArray | None

    def __post_init__(self) -> None:
        n, p = self.labels.shape
        expected = {"points": (n, p, 2), "boxes": (n, 4)}
        for name, shape in expected.items():
            array = getattr(self, name)
            if array is not None and array.shape != shape:
                raise ValueError(f"{name} are {array.shape}, expected {shape}")
        if self.masks is not None and (self.masks.ndim != 3 or len(self.masks) != n):
            raise ValueError(f"masks are {self.masks.shape}, expected ({n}, h, w)")

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: slice | Sequence[int]) -> "Prompts":
        """Return the prompts of some of the regions."""
        return Prompts(
            self.points[rows],
            self.labels[rows],
            None if self.boxes is None else self.boxes[rows],
            None if self.masks is None else self.masks[rows],
        )


@dataclass(frozen=True, slots=True)
class Candidates:
    """The candidates of one region: K masks of the image's size with their predicted IoUs, and the chosen index.

    Candidate 0 is the single-mask output; the others are the alternatives of the multimask output.
    """

    masks: tuple[Rle, ...]
    scores: tuple[float, ...]
    selected: int


@dataclass(frozen=True, slots=True, eq=False)
class Proposal:
    """The mask proposed in place of one coarse mask; each post step returns a new proposal.

    image: uint8 (H, W, 3) RGB, the image in the view.
    coarse: bool (H, W), not empty.
    mask: bool (H, W).
    logits: float32 (h, w) over the same area, above 0 where the model sees the object; None where no model was run.
    predicted_iou: The model's own estimate in 0..1; None where no model was run.
    coarse_iou: IoU of mask and coarse mask, None until the guard has judged the proposal.
    reason: Why the coarse mask is kept, None unless there is a reason.
    """

    image: ImageArray
    coarse: Mask
    mask: Mask
    logits: FloatMap | None
    predicted_iou: float | None
    coarse_iou: float | None = None
    reason: Reason | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Contest:
    """A mask and what the other objects of its image say to it, all on the grid of its logits, (h, w), over its view.

    logits: float32, those of the mask.
    denied: float32, log(1 - p) summed over its rivals, so 0 where none claims a pixel.
    coarse: float32 in 0..1, the fraction of each cell inside the coarse mask.
    others: float32 in 0..1, that inside the coarse mask of any other object.
    pixels: uint8 (h, w, 3) RGB, the image.
    exclusive: Whether no pixel belongs to two objects.
    """

    logits: FloatMap
    denied: FloatMap
    coarse: FloatMap
    others: FloatMap
    pixels: ImageArray
    exclusive: bool


@dataclass(frozen=True, slots=True)
class Annotation:
    """The result for one region: its mask, its status and its scores.

    mask: The refined one, or the coarse one where there is a reason to keep it; None where the file held none.
    reason: Why the coarse mask is kept, None where it was refined.
    predicted_iou: The model's own estimate in 0..1, None where no model was run.
    coarse_iou: IoU of the proposal with the coarse mask, None where there was no proposal.
    candidates: All candidates of the model, None unless they are kept.
    """

    mask: Rle | None
    reason: Reason | None
    predicted_iou: float | None = None
    coarse_iou: float | None = None
    candidates: Candidates | None = None

    @property
    def refined(self) -> bool:
        return self.reason is None

    @property
    def status(self) -> str:
        """`refined` or `kept:<reason>`, as in tables."""
        return "refined" if self.reason is None else f"kept:{self.reason}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result for a sample: one annotation per region, in the same order.

    `error` is the message to show if the whole sample could not be refined; all its annotations are then kept.
    `faults` are those of the sample (`Sample.faults`), to be counted and shown; so a journal need not keep them.
    """

    key: str
    annotations: tuple[Annotation, ...]
    error: str | None = None
    faults: tuple[str, ...] = ()
