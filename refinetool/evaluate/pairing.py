"""Which image of one file is which of another."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from refinetool import masks
from refinetool.errors import DataError, UsageError
from refinetool.evaluate.shapes import Canvas
from refinetool.formats.joining import joined
from refinetool.records import Sample, Size

UNKNOWN_SIZE = (0, 0)
"""What a sample says whose masks and image can't be read."""


@dataclass(frozen=True, slots=True)
class Match:
    """One image in up to three files, None where a file does not have it.

    candidates: Its line of a file of candidates, as `refine --candidates` writes it.
    canvases: What `canvas` has drawn, by width of the band; empty it when the image is done.
    """

    key: str
    prediction: Sample | None
    truth: Sample | None
    coarse: Sample | None
    candidates: str | None = None
    canvases: dict[int, Canvas] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        samples = self._samples()
        if len({sample.layout == "semantic" for sample in samples.values()}) > 1:
            layouts = " and ".join(f"{sample.layout} in the {name}" for name, sample in samples.items())
            raise UsageError(
                f"Image {self.key}: {layouts}. Class maps can only be compared with class maps, objects with objects."
            )
        known = {name: sample.size for name, sample in samples.items() if sample.size != UNKNOWN_SIZE}
        if len(set(known.values())) > 1:
            sizes = ", ".join(f"{width} x {height} in the {name}" for name, (height, width) in known.items())
            raise DataError(
                f"Image {self.key}: masks are {sizes}. Masks are not resized for evaluation; make the files from the "
                "same images."
            )

    @property
    def semantic(self) -> bool:
        return any(sample.layout == "semantic" for sample in self._samples().values())

    @property
    def size(self) -> Size:
        """(H, W), (0, 0) if no file knows it."""
        return next((s.size for s in self._samples().values() if s.size != UNKNOWN_SIZE), UNKNOWN_SIZE)

    def canvas(self, boundary_ratio: float) -> Canvas:
        """Where the masks of this image are drawn, for all who compare them; void is that of the ground truth."""
        band_px = masks.boundary_width(self.size, boundary_ratio)
        if band_px not in self.canvases:
            void = None if self.truth is None or self.truth.void is None else masks.decode(self.truth.void)
            self.canvases[band_px] = Canvas(self.size, void, band_px)
        return self.canvases[band_px]

    def _samples(self) -> dict[str, Sample]:
        named = {"prediction": self.prediction, "ground truth": self.truth, "coarse file": self.coarse}
        return {name: sample for name, sample in named.items() if sample is not None}


def matches(
    prediction: Iterable[Sample], truth: Iterable[Sample], coarse: Iterable[Sample] | None = None
) -> Iterator[Match]:
    """Join the samples of two or three files by key, as `formats.joining` does."""
    for key, found in joined(prediction, truth, *(() if coarse is None else (coarse,))):
        yield Match(key=key, prediction=found.get(0), truth=found.get(1), coarse=found.get(2))
