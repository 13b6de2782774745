"""How much a model improves corrupted masks of the val lists, and which guard thresholds would have been right.

    python benchmarks/val_sets.py DATA/ecssd DATA/coco_mval ... --model embedded -o rows.jsonl
    python benchmarks/val_sets.py --rows rows.jsonl

Data folders are laid out as `refinetool train embedded` wants them. Objects and corruptions are drawn with a fixed
seed; masks are refined without the guard, and one row per mask is written: data set, defect, coarse and refined IoU and
boundary IoU, predicted IoU, IoU with the coarse mask, growth. The second form prints the tables from such rows, so
that thresholds can be compared without running the model again.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from refinetool.corrupt import corrupt, low_resolution, superpixel_defects, superpixel_labels
from refinetool.images import read_image
from refinetool.masks import boundary_iou, bounding_box, iou
from refinetool.records import BoolArray
from refinetool.refine import load_refiner
from refinetool.settings import GuardSettings, RefineSettings, SnapSettings, ViewSettings
from refinetool.train.data import index_folder, object_mask, read_ids
from refinetool.views import crop_around

UNGUARDED = GuardSettings(min_predicted_iou=0.0, min_coarse_iou=0.0, max_area_ratio=float("inf"))
GOOD_SHARE = 0.15
RATIO = 0.02


@dataclass(frozen=True)
class Row:
    """One refined mask and what is known about it."""

    data: str
    defect: str
    coarse: float
    coarse_boundary: float
    refined: float
    refined_boundary: float
    predicted_iou: float
    coarse_iou: float
    growth: float
    area: float
    """Share of the image."""


def measure(
    folders: Sequence[Path], *, split: str, per_picture: int, pictures: int, defect: str, refiner: Any
) -> Iterator[Row]:
    """Corrupt and refine objects of the pictures of a list, `per_picture` of each."""
    for folder in folders:
        rng = np.random.default_rng(12345)
        listed = index_folder(folder, split)  # type: ignore[arg-type]
        for picture in [listed[n] for n in rng.permutation(len(listed))[:pictures]]:
            ids = read_ids(picture.mask)
            image = read_image(picture.image, size=(ids.shape[0], ids.shape[1]), max_pixels=1 << 30)
            truths = [object_mask(ids, picture.objects[n]) for n in rng.permutation(len(picture.objects))[:per_picture]]
            coarse = [coarse_mask(image, truth, rng, defect=defect) for truth in truths]
            for truth, given, found in zip(truths, coarse, refiner.refine_image(image, np.stack(coarse)), strict=True):
                yield Row(
                    folder.name,
                    defect,
                    iou(given, truth),
                    boundary_iou(given, truth, RATIO),
                    iou(found.mask, truth),
                    boundary_iou(found.mask, truth, RATIO),
                    found.predicted_iou or 0.0,
                    found.coarse_iou or 0.0,
                    float(found.mask.sum() / given.sum()),
                    float(truth.mean()),
                )


def coarse_mask(image: Any, truth: BoolArray, rng: np.random.Generator, *, defect: str) -> BoolArray:
    """A corrupted copy of a mask, made on a window around it so that defects scale with the object.

    `mixed` is what training draws from, a seventh of it nearly right. `superpixel` toggles superpixels until the IoU
    is 0.75 to 0.85, `low-resolution` blurs to a few cells, IoU 0.6 to 0.8: what the published benchmarks have.
    """
    box = bounding_box(truth)
    assert box is not None
    x0, y0, x1, y1 = crop_around(box, size=truth.shape, settings=ViewSettings())
    window = np.ascontiguousarray(truth[y0:y1, x0:x1])
    labels = superpixel_labels(image[y0:y1, x0:x1], count=int(rng.integers(40, 200)), compactness=10.0)
    if defect == "superpixel":
        part = drawn(lambda severity: superpixel_defects(window, rng, severity, labels=labels), window, 0.75, 0.85)
    elif defect == "low-resolution":
        part = drawn(lambda severity: low_resolution(window, rng, severity), window, 0.6, 0.8)
    else:
        low, high = (0.9, 0.99) if rng.random() < GOOD_SHARE else (0.55, 0.9)
        part = corrupt(window, rng, labels=labels, neighbour=None, low=low, high=high, tries=8)
    coarse = np.zeros_like(truth)
    coarse[y0:y1, x0:x1] = part
    return coarse


def drawn(attempt: Callable[[float], BoolArray], truth: BoolArray, low: float, high: float) -> BoolArray:
    """The first of 30 attempts, ever more severe, whose IoU with the truth is in the band; else the closest."""
    attempts = [attempt(severity) for severity in np.linspace(0.2, 2.0, 30)]
    return min(attempts, key=lambda mask: max(low - iou(mask, truth), iou(mask, truth) - high, 0.0))


def doubted(row: Row, guard: GuardSettings) -> bool:
    """Whether the guard would keep the coarse mask of this row."""
    return (
        row.growth == 0
        or row.predicted_iou < guard.min_predicted_iou
        or row.coarse_iou < guard.min_coarse_iou
        or max(row.growth, 1 / row.growth) > guard.max_area_ratio
    )


def summary(rows: Sequence[Row], guard: GuardSettings) -> str:
    """One table row: n, IoU and boundary IoU before and after, share better, worse and kept, gain on good masks."""
    kept = np.array([doubted(row, guard) for row in rows])
    coarse, edges = (np.array([getattr(row, name) for row in rows]) for name in ("coarse", "coarse_boundary"))
    refined = np.where(kept, coarse, [row.refined for row in rows])
    refined_edges = np.where(kept, edges, [row.refined_boundary for row in rows])
    good = coarse > 0.9
    on_good = f"{(refined - coarse)[good].mean():+.3f}" if good.any() else "-"
    before, after = f"{coarse.mean():.3f} / {edges.mean():.3f}", f"{refined.mean():.3f} / {refined_edges.mean():.3f}"
    better, worse = (refined > coarse + 0.01).mean(), (refined < coarse - 0.01).mean()
    return f"{len(rows)} | {before} | {after} | {better:.0%} | {worse:.0%} | {kept.mean():.0%} | {on_good}"


def tables(rows: Sequence[Row]) -> None:
    """Print the gain per data set with the default guard, and over all rows for other guards."""
    default = GuardSettings()
    print("| data | n | coarse IoU / bIoU | refined IoU / bIoU | better | worse | kept | on masks above 0.9 |")
    print("|---|---|---|---|---|---|---|---|")
    for name in sorted({f"{row.data}, {row.defect}" for row in rows}):
        print(f"| {name} | {summary([row for row in rows if f'{row.data}, {row.defect}' == name], default)} |")
    print(f"| all | {summary(rows, default)} |")
    for field, values in (
        ("min_predicted_iou", (0.0, 0.4, 0.5, 0.6, 0.65, 0.7, 0.75, 0.8)),
        ("min_coarse_iou", (0.0, 0.2, 0.3, 0.4, 0.5, 0.6)),
        ("max_area_ratio", (1.3, 1.5, 2.0, 2.5, 3.0, 5.0)),
    ):
        print(f"\n| {field} | n | coarse | refined | better | worse | kept | on masks above 0.9 |")
        print("|---|---|---|---|---|---|---|---|")
        for value in values:
            print(f"| {value} | {summary(rows, replace(UNGUARDED, **{field: value}))} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", type=Path)
    parser.add_argument("--rows", type=Path, help="print the tables of rows measured before")
    parser.add_argument("-o", "--output", type=Path, help="where to write the rows")
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--checkpoint")
    parser.add_argument("--split", default="val", choices=("train", "val"))
    parser.add_argument("--pictures", type=int, default=40, help="pictures per folder")
    parser.add_argument("--per-picture", type=int, default=2)
    parser.add_argument("--defect", default="mixed", choices=("mixed", "superpixel", "low-resolution"))
    parser.add_argument("--view", default="auto", choices=("auto", "frame", "crop"))
    parser.add_argument("--margin", type=float, default=ViewSettings().margin)
    parser.add_argument("--min-side", type=int, default=ViewSettings().min_side_px)
    parser.add_argument("--snap", default="auto", choices=("auto", "none", "guided"))
    parser.add_argument("--radius", type=float, default=SnapSettings().radius)
    parser.add_argument("--epsilon", type=float, default=SnapSettings().epsilon)
    parser.add_argument("--passes", type=int, default=1)
    parser.add_argument("--box", default="elastic", choices=("elastic", "tight"))
    arguments = parser.parse_args()
    if arguments.rows:
        tables([Row(**json.loads(line)) for line in arguments.rows.read_text().splitlines()])
        return
    defaults = RefineSettings()
    settings = replace(
        defaults,
        passes=arguments.passes,
        guard=UNGUARDED,
        prompts=replace(defaults.prompts, box=arguments.box),
        view=replace(defaults.view, mode=arguments.view, margin=arguments.margin, min_side_px=arguments.min_side),
        snap=SnapSettings(mode=arguments.snap, radius=arguments.radius, epsilon=arguments.epsilon),
    )
    refiner = load_refiner(
        arguments.model, checkpoint=arguments.checkpoint, device="auto", precision="fp32", settings=settings
    )
    rows = list(
        measure(
            arguments.folders,
            split=arguments.split,
            per_picture=arguments.per_picture,
            pictures=arguments.pictures,
            defect=arguments.defect,
            refiner=refiner,
        )
    )
    if arguments.output:
        arguments.output.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
    tables(rows)


if __name__ == "__main__":
    main()
