"""What refinement gains without a model: GrabCut, guided filter and Gaussian smoothing on a COCO file of coarse masks.

    python benchmarks/baselines.py coarse.json truth.json --images IMAGES [--refined NAME=refined.json ...]

Each method sees what a crop view shows: the mask's box and a margin around it. Each one's masks are written to a COCO
file of their own and that file is evaluated, so a model's output (`--refined`) is measured in the very same way. Prints
a Markdown table; `r` is the radius of a disc of the mask's area.
"""

import argparse
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from refinetool import masks, snap
from refinetool.evaluate import Report, evaluate
from refinetool.formats import Dataset, open_dataset
from refinetool.images import read_image
from refinetool.records import REFINED, Annotation, BoolArray, ImageArray, Outcome, Sample, kept
from refinetool.settings import EvaluateSettings, RefineSettings, SnapSettings, ViewSettings

GRABCUT_ROUNDS = 3
RNG_SEED = 0

Refine = Callable[[ImageArray, BoolArray], BoolArray]
"""uint8 (H, W, 3) RGB and the coarse mask, bool (H, W), to a better mask."""


@dataclass(frozen=True)
class Method:
    name: str
    refine: Refine


def grabcut(band_share: float) -> Refine:
    """GrabCut where everything within `band_share` r of the border is in doubt, the rest certain."""

    def refine(image: ImageArray, mask: BoolArray) -> BoolArray:
        band_px = max(1.0, band_share * disc_radius(mask))
        inside, outside = (masks.distance_inside(side, border_is_background=False) for side in (mask, ~mask))
        trimap = np.full(mask.shape, cv2.GC_BGD, dtype=np.uint8)
        trimap[(outside > 0) & (outside <= band_px)] = cv2.GC_PR_BGD
        trimap[(inside > 0) & (inside <= band_px)] = cv2.GC_PR_FGD
        trimap[inside > band_px] = cv2.GC_FGD
        if mask.all():  # no background to learn colours from
            return mask
        cv2.setRNGSeed(RNG_SEED)  # its colour clusters start at random
        models = np.zeros((1, 65)), np.zeros((1, 65))
        cv2.grabCut(np.ascontiguousarray(image), trimap, None, *models, GRABCUT_ROUNDS, cv2.GC_INIT_WITH_MASK)
        return np.isin(trimap, (cv2.GC_FGD, cv2.GC_PR_FGD))

    return refine


def guided(radius_share: float, epsilon: float) -> Refine:
    """The guided filter of `--snap guided`."""
    return lambda image, mask: snap.guided_snap(image, mask, radius_share=radius_share, epsilon=epsilon)


def gaussian(sigma_share: float) -> Refine:
    """Blur with a standard deviation of `sigma_share` r and cut at one half: smooth, but blind to the image."""

    def refine(_image: ImageArray, mask: BoolArray) -> BoolArray:
        sigma_px = sigma_share * disc_radius(mask)
        return cv2.GaussianBlur(mask.astype(np.float32), (0, 0), max(sigma_px, 0.3)) > 0.5

    return refine


def disc_radius(mask: BoolArray) -> float:
    return math.sqrt(np.count_nonzero(mask) / math.pi)


def methods() -> list[Method]:
    snapping = SnapSettings()
    return [
        *(Method(f"Gaussian blur, sigma {share} r", gaussian(share)) for share in (0.06, 0.12)),
        *(
            Method(f"guided filter, radius {share} r", guided(share, snapping.epsilon))
            for share in (snapping.radius, 0.25, 0.5)
        ),
        *(Method(f"GrabCut, band {share} r", grabcut(share)) for share in (0.15, 0.25)),
    ]


def refined(sample: Sample, method: Method, clock: "Clock") -> Outcome:
    image = read_image(sample.image, size=sample.size, max_pixels=RefineSettings().max_pixels)
    annotations = []
    for region in sample.regions:
        if region.mask is None or region.keep is not None:
            annotations.append(Annotation(mask=region.mask, status=kept(region.keep or "no-mask")))
            continue
        coarse = masks.decode(region.mask)
        result = clock.time(lambda: in_crop(image, coarse, method.refine))  # noqa: B023 - called at once
        annotations.append(
            Annotation(mask=masks.encode(result), status=REFINED)
            if result.any()
            else Annotation(mask=region.mask, status=kept("empty"))
        )
    return Outcome(key=sample.key, annotations=tuple(annotations))


def in_crop(image: ImageArray, mask: BoolArray, refine: Refine) -> BoolArray:
    """Refine within the box and the margin that crop views have; outside nothing is added."""
    box = masks.bounding_box(mask)
    result = np.zeros_like(mask)
    if box is None:
        return result
    x0, y0, x1, y1 = box
    margin = ViewSettings().margin
    margin_x, margin_y = math.ceil(margin * (x1 - x0)), math.ceil(margin * (y1 - y0))
    crop = slice(max(0, y0 - margin_y), y1 + margin_y), slice(max(0, x0 - margin_x), x1 + margin_x)
    result[crop] = refine(image[crop], mask[crop])
    return result


class Clock:
    """Adds up the processor time of what is timed, which other programs on the machine hardly change."""

    def __init__(self) -> None:
        self.seconds, self.calls = 0.0, 0

    def time(self, work: Callable[[], BoolArray]) -> BoolArray:
        start = time.thread_time()
        result = work()
        self.seconds += time.thread_time() - start
        self.calls += 1
        return result

    @property
    def milliseconds(self) -> float:
        return 1000 * self.seconds / max(1, self.calls)


def measured(method: Method, coarse: Dataset, truth: Dataset, images: Path, folder: Path) -> tuple[Report, Clock]:
    clock = Clock()
    outcomes = {sample.key: refined(sample, method, clock) for sample in coarse.samples()}
    destination = folder / f"{method.name.replace(' ', '-')}.json"
    coarse.write(outcomes.get, destination, {"baseline": method.name})
    return evaluated(destination, coarse, truth, images), clock


def evaluated(prediction: Path, coarse: Dataset, truth: Dataset, images: Path) -> Report:
    return evaluate(
        open_dataset(prediction, images=images), truth, coarse=coarse, boundary_ratio=EvaluateSettings().boundary_ratio
    )


def table(reports: Iterator[tuple[str, Report, float | None]]) -> Iterator[str]:
    yield "| method | IoU | boundary IoU | gain | better | worse | CPU ms per mask |"
    yield "|---|---|---|---|---|---|---|"
    for index, (name, report, milliseconds) in enumerate(reports):
        iou, boundary_iou = report.measures
        if index == 0:
            yield f"| coarse | {iou.before:.3f} | {boundary_iou.before:.3f} | | | | |"
        speed = "" if milliseconds is None else f"{milliseconds:.0f}"
        yield (
            f"| {name} | {iou.value:.3f} | {boundary_iou.value:.3f} | {iou.gain:+.3f} / {boundary_iou.gain:+.3f} "
            f"| {report.better:.0%} | {report.worse:.0%} | {speed} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("coarse", type=Path, help="COCO JSON of coarse masks")
    parser.add_argument("truth", type=Path, help="COCO JSON of the ground truth")
    parser.add_argument("--images", type=Path, required=True, help="folder of the images")
    parser.add_argument("--refined", action="append", default=[], metavar="NAME=FILE", help="another row from a file")
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    coarse = open_dataset(arguments.coarse, images=arguments.images)
    truth = open_dataset(arguments.truth, images=arguments.images)

    def reports(folder: Path) -> Iterator[tuple[str, Report, float | None]]:
        for method in methods():
            report, clock = measured(method, coarse, truth, arguments.images, folder)
            yield method.name, report, clock.milliseconds
        for row in arguments.refined:
            name, _, path = row.partition("=")
            yield name, evaluated(Path(path), coarse, truth, arguments.images), None

    with tempfile.TemporaryDirectory() as folder:
        for line in table(reports(Path(folder))):
            print(line, flush=True)


if __name__ == "__main__":
    main()
