"""Measures the effect of other thresholds of guard and snap, for the tables of the design notes.

    python benchmarks/thresholds.py DATA --pictures 8 --guard 0.1 0.2 0.3 --radius 0 0.1

DATA is a folder of data folders with validation splits, as for `methods.py`, which makes the same kind of objects and
coarse masks. The model is run once for every mask; then each setting judges the same answers.
"""

import argparse
import math
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from methods import jobs_of, known_pixels

from refinetool import masks
from refinetool.formats import open_dataset
from refinetool.masks import boundary_iou, iou
from refinetool.records import BoolArray, FloatArray, Outcome, Sample
from refinetool.refine import Refiner, load_refiner
from refinetool.running.truth import with_truth
from refinetool.settings import EvaluateSettings, RefineSettings, SnapSettings

SEED = 777
"""Not the seed of the benchmark page, so that values chosen here are measured there on other objects, except a few."""
GOOD_IOU = 0.95


def variants(arguments: argparse.Namespace) -> dict[str, RefineSettings]:
    """Return the defaults, and the defaults with one value changed."""
    plain = RefineSettings()
    found = {"defaults": plain}
    for gain in arguments.guard:
        found[f"expected gain {gain:g}"] = replace(plain, guard=replace(plain.guard, min_expected_gain=gain))
    for score in arguments.score:
        found[f"predicted IoU {score:g}"] = replace(plain, guard=replace(plain.guard, min_predicted_iou=score))
    for overlap, ratio in arguments.drift:
        bounds = replace(plain.guard, min_coarse_iou=overlap, max_area_ratio=ratio)
        found[f"coarse IoU {overlap:g}, area ratio {ratio:g}"] = replace(plain, guard=bounds)
    for confidence, depth in arguments.parts:
        parts = replace(plain.guard, min_part_confidence=confidence, min_part_depth=depth)
        found[f"part confidence {confidence:g}, depth {depth:g}"] = replace(plain, guard=parts)
    for radius in arguments.radius:
        snap = SnapSettings(mode="guided", radius=radius) if radius else SnapSettings(mode="none")
        found[f"snap radius {radius:g}"] = replace(plain, snap=snap)
    return found


def figures(sample: Sample, outcome: Outcome, known: BoolArray) -> Iterator[tuple[float, float, float, float]]:
    """Yield IoU and boundary IoU of each coarse mask and of the resulting mask, over the known pixels."""
    ratio = EvaluateSettings().boundary_ratio
    for region, found in zip(sample.regions, outcome.annotations, strict=True):
        if region.mask is None or region.truth is None or found.mask is None:
            continue
        truth, coarse, refined = (masks.decode(rle) & known for rle in (region.truth, region.mask, found.mask))
        yield (
            iou(coarse, truth),
            boundary_iou(coarse, truth, ratio),
            iou(refined, truth),
            boundary_iou(refined, truth, ratio),
        )


def table(rows: Mapping[str, Mapping[str, list[tuple[float, float, float, float]]]]) -> str:
    """Format IoU / boundary IoU by suite, and the fraction of masks worse by more than 0.01, for each setting."""
    suites = list(next(iter(rows.values())))
    lines = [
        "| | all | worse | good masks | " + " | ".join(suites) + " |",
        "|---|---|---|---|" + "---|" * len(suites),
    ]

    def pair(values: FloatArray) -> str:
        return f"{values[0]:.3f} / {values[1]:.3f}"

    for number, (name, by_suite) in enumerate(rows.items()):
        parts = {suite: np.array(found) for suite, found in by_suite.items()}
        whole = np.concatenate(list(parts.values()))
        if number == 0:
            means = [pair(part[:, :2].mean(0)) for part in parts.values()]
            lines.append(f"| coarse | {pair(whole[:, :2].mean(0))} | | | " + " | ".join(means) + " |")
        gain = whole[:, 2] - whole[:, 0]
        good = whole[:, 0] > GOOD_IOU
        kept = gain[good].mean() if good.any() else math.nan
        means = [pair(part[:, 2:].mean(0)) for part in parts.values()]
        lines.append(
            f"| {name} | {pair(whole[:, 2:].mean(0))} | {np.mean(gain < -0.01):.0%} | {kept:+.3f} | "
            + " | ".join(means)
            + " |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--pictures", type=int, default=8, help="pictures per validation split")
    parser.add_argument("--guard", nargs="*", type=float, default=[], help="minimum expected gains")
    parser.add_argument("--score", nargs="*", type=float, default=[], help="minimum predicted IoUs")
    parser.add_argument(
        "--drift",
        nargs=2,
        action="append",
        type=float,
        default=[],
        metavar=("IOU", "RATIO"),
        help="minimum IoU with, and maximum ratio to the area of, the coarse mask",
    )
    parser.add_argument(
        "--parts",
        nargs=2,
        action="append",
        type=float,
        default=[],
        metavar=("CONFIDENCE", "DEPTH"),
        help="minimum confidence and depth of changed parts",
    )
    parser.add_argument("--radius", nargs="*", type=float, default=[], help="radii of the snapping filter; 0: none")
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--checkpoint")
    arguments = parser.parse_args()
    settings = variants(arguments)
    model = load_refiner(
        arguments.model,
        checkpoint=arguments.checkpoint,
        device="auto",
        precision="auto",
        settings=settings["defaults"],
    )
    rows: dict[str, dict[str, list[tuple[float, float, float, float]]]] = {name: {} for name in settings}
    with tempfile.TemporaryDirectory() as folder:
        for job in jobs_of(arguments.data, Path(folder), pictures=arguments.pictures, seed=SEED):
            if job.with_grids:
                continue  # the COCO files are for measuring; nothing is chosen on them
            coarse, truth = (
                open_dataset(path, images=job.images, format=job.format) for path in (job.coarse, job.truth)
            )
            for sample in with_truth(coarse.samples(), truth.samples()):
                prepared = model.prepare(sample)
                answers = model.segment(prepared.jobs)
                known = known_pixels(sample, job.id_maps)
                for name, one in settings.items():
                    outcome = Refiner(model.backend, one).finish(prepared, answers)
                    rows[name].setdefault(job.suite, []).extend(figures(sample, outcome, known))
            print(f"{job.data}, {job.suite}", flush=True)
    print(table(rows))


if __name__ == "__main__":
    main()
