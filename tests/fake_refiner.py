"""A refiner for tests of running, small and easy to foresee: a refined mask is the coarse one, a pixel to the right."""

import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from refinetool.errors import ImageError
from refinetool.masks import decode, encode, iou
from refinetool.records import Annotation, Outcome, Region, Sample
from refinetool.statuses import Reason

SIZE = (12, 16)


def sample_of(number: int, folder: Path) -> Sample:
    """One image with 0 to 3 regions; every fourth region is a crowd, to be kept."""
    generator = np.random.default_rng(number)
    regions = []
    for row in range(number % 4):
        mask = np.zeros(SIZE, dtype=bool)
        x, y = generator.integers(0, 8, 2)
        mask[y : y + 4, x : x + 5] = True
        regions.append(Region(10 * number + row, 1, encode(mask), keep=Reason.CROWD if row == 3 else None))
    return Sample(f"image {number}", folder / f"{number}.jpg", SIZE, tuple(regions))


def samples_of(count: int, folder: Path) -> list[Sample]:
    folder.mkdir(exist_ok=True)
    samples = [sample_of(number, folder) for number in range(count)]
    for sample in samples:
        if not sample.image.exists():
            sample.image.write_bytes(b"pixels")
    return samples


@dataclass
class Read:
    """A prepared sample with one job per region: its key and mask."""

    sample: Sample
    masks: list[np.ndarray]

    @property
    def jobs(self) -> list[tuple[str, np.ndarray]]:
        return [(self.sample.key, mask) for mask in self.masks]


@dataclass
class Shift:
    """The fake refiner. Counts what it is asked and how many samples are between prepare and segment."""

    slowest: float = 0.0
    jobs_at_once: int = 4
    batches: list[tuple[str, ...]] = field(default_factory=list)
    prepared: list[str] = field(default_factory=list)
    jobs_of: dict[str, int] = field(default_factory=dict)
    waiting: int = 0
    most_waiting: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def prepare(self, sample: Sample) -> Read:
        with self.lock:
            self.prepared.append(sample.key)
            self.waiting += sum(region.keep is None for region in sample.regions)
            self.most_waiting = max(self.most_waiting, self.waiting)
        self.dawdle(sample)
        if not sample.image.exists():
            raise ImageError(f"{sample.image}: no such image", reason=Reason.IMAGE_UNREADABLE)
        read = Read(sample, [decode(region.mask) for region in sample.regions if region.keep is None])
        self.jobs_of[sample.key] = len(read.jobs)
        return read

    def segment(self, jobs: Sequence[tuple[str, np.ndarray]]) -> list[np.ndarray]:
        self.batches.append(tuple(key for key, _ in jobs))
        with self.lock:
            self.waiting -= len(jobs)
        return [np.roll(mask, 1, axis=1) for _, mask in jobs]

    def finish(self, read: Read, refined: list[np.ndarray]) -> Outcome:
        self.dawdle(read.sample)
        answers = iter(zip(read.masks, refined, strict=True))
        return Outcome(read.sample.key, tuple(self.annotation(region, answers) for region in read.sample.regions))

    def annotation(self, region: Region, answers: Iterator[tuple[np.ndarray, np.ndarray]]) -> Annotation:
        if region.keep is not None:
            return Annotation(region.mask, region.keep)
        coarse, refined = next(answers)
        return Annotation(encode(refined), None, 0.875, iou(coarse, refined))

    @property
    def asked(self) -> list[str]:
        """Samples of which the model has answered every job, in order."""
        answered = Counter(key for batch in self.batches for key in batch)
        return [key for key, count in answered.items() if count == self.jobs_of[key]]

    def dawdle(self, sample: Sample) -> None:
        """Take a time that has nothing to do with the order of the samples."""
        time.sleep(self.slowest * (int(sample.image.stem) * 7 % 10) / 10)


def expected(sample: Sample) -> Outcome:
    """What the fake makes of a sample, asked directly."""
    refiner = Shift()
    read = refiner.prepare(sample)
    return refiner.finish(read, refiner.segment(read.jobs))
