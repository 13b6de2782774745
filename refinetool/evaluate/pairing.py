"""Which image of one file is which of another."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from refinetool import masks
from refinetool.errors import DataError, UsageError
from refinetool.evaluate.shapes import Canvas
from refinetool.formats import COCO_RESULTS
from refinetool.formats.joining import joined
from refinetool.records import Sample, Size

PREDICTION, TRUTH, COARSE = "prediction", "ground truth", "coarse file"
"""What messages call the files, in the order in which they are read."""

UNKNOWN_SIZE = (0, 0)
"""The size of a sample whose masks and image can't be read."""


def in_order(keys: Iterable[str]) -> list[str]:
    """Sort keys of images as numbers if they all are, so that `9` comes before `10`, and as texts otherwise."""
    known = list(keys)
    return sorted(known, key=int if all(key.isdecimal() for key in known) else None)


@dataclass(frozen=True, slots=True)
class Match:
    """One image in up to three files, None where a file does not have it.

    candidates: Its line in a file of candidates, as `refine --candidates` writes it.
    canvases: The canvases that `canvas` has made, by width of the band; cleared when the image is done.
    """

    key: str
    prediction: Sample | None
    truth: Sample | None
    coarse: Sample | None
    candidates: str | None = None
    canvases: dict[int, Canvas] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        samples = self.samples()
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
        return any(sample.layout == "semantic" for sample in self.samples().values())

    @property
    def size(self) -> Size:
        """(H, W), (0, 0) if no file knows it."""
        return next((s.size for s in self.samples().values() if s.size != UNKNOWN_SIZE), UNKNOWN_SIZE)

    def canvas(self, boundary_ratio: float) -> Canvas:
        """The canvas that all evaluators of this image share; its void pixels are those of the ground truth."""
        band_px = masks.boundary_width(self.size, boundary_ratio)
        if band_px not in self.canvases:
            void = None if self.truth is None or self.truth.void is None else masks.decode(self.truth.void)
            self.canvases[band_px] = Canvas(self.size, void, band_px)
        return self.canvases[band_px]

    def samples(self) -> dict[str, Sample]:
        """The samples of the files that have this image, by the names of the files."""
        named = {PREDICTION: self.prediction, TRUTH: self.truth, COARSE: self.coarse}
        return {name: sample for name, sample in named.items() if sample is not None}


@dataclass(frozen=True, slots=True)
class SharedImages:
    """Which files have an image in common with the ground truth, going by the matches seen so far.

    examples: The first image of each file that has any, by the name of the file.
    sharing: The names of the files that share an image with the ground truth.
    """

    examples: dict[str, str] = field(default_factory=dict)
    sharing: set[str] = field(default_factory=set)

    def watch(self, found: Iterable[Match]) -> Iterator[Match]:
        """Pass matches on, taking note of which files they come from."""
        for match in found:
            names = match.samples().keys()
            for name in names:
                self.examples.setdefault(name, match.key)
            if TRUTH in names:
                self.sharing.update(names)
            yield match

    def refuse_strangers(self, *, matched_by: str) -> None:
        """Raise DataError if a file has images but none that the ground truth has.

        Args:
            matched_by: What images are matched by, for the message.
        """
        for name in (PREDICTION, COARSE):
            if name in self.examples and name not in self.sharing:
                ours, theirs = self.examples[name], self.examples.get(TRUTH)
                examples = f"{ours!r} and {theirs!r}, for example" if theirs else f"{ours!r}, for example, and none"
                raise DataError(
                    f"Nothing to score: the {name} and the ground truth have no image in common ({examples}). Images "
                    f"are matched by {matched_by}; name files of the same images."
                )


def share_ids(formats: Iterable[str]) -> bool:
    """Whether objects in files of these formats can be matched by id.

    COCO results have no ids and go by their places in the list, so they match only one another.
    """
    return len({format == COCO_RESULTS for format in formats}) == 1


def match_images(
    prediction: Iterable[Sample], truth: Iterable[Sample], coarse: Iterable[Sample] | None = None
) -> Iterator[Match]:
    """Join the samples of two or three files by key, in the way of `formats.joining`."""
    for key, found in joined(prediction, truth, *(() if coarse is None else (coarse,))):
        yield Match(key=key, prediction=found.get(0), truth=found.get(1), coarse=found.get(2))
