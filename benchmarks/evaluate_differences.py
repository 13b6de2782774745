"""Measures how far `eval` differs from the official tools where its rules differ on purpose.

    python benchmarks/evaluate_differences.py [--truth truth.json --results results.json] [--images 60]

Without files, it makes images of random blobs. A tenth of the true objects, or of the detections, is then changed in
one way at a time, and AP is computed by `eval` and by the official tool: pycocotools, the rule of the Boundary IoU
scripts on top of it, and, if it is installed, lvis. For DAVIS, frames with void pixels are scored by `eval` and by the
rule of the official script, which takes void pixels in the ground truth for background. The differences are in
docs/design/evaluation-differences.md.
"""

import argparse
import contextlib
import copy
import io
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from evaluate_large import disturbed, outline
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from refinetool.evaluate import evaluate
from refinetool.evaluate.clips import compute_contour_f
from refinetool.formats import open_dataset

SIZE = (480, 640)
BOUNDARY_RATIO = 0.02
CHANGED = 0.1
"""The fraction of true objects or detections that is changed."""
NAMES = ("AP", "AP small", "AP medium", "AP large")
VOID = 255
SMALLEST_PX = 60
"""The smaller side of the objects of clips at least, so that none of them is all void."""

Record = dict[str, Any]
Figures = dict[str, float | None]


def make_scene(images: int) -> tuple[Record, list[Record]]:
    """Return ground truth and results; of ten objects, about one is missed and one is found twice."""
    rng = np.random.default_rng(0)
    truths: list[Record] = []
    results: list[Record] = []
    for image in range(1, images + 1):
        for _ in range(int(rng.integers(3, 9))):
            ring = outline(rng, SIZE)
            exact, near = (disturbed(rng, ring, SIZE, amount) for amount in (0, 0.06))
            if not coco_mask.area(exact):
                continue
            category = int(rng.integers(1, 4))
            common = {"image_id": image, "category_id": category}
            box = coco_mask.toBbox(exact).tolist()
            truth = {"id": len(truths) + 1, "iscrowd": 0, "area": int(coco_mask.area(exact)), "bbox": box}
            truths.append({**common, **truth, "segmentation": exact})
            for _ in range(int(rng.choice(3, p=(0.1, 0.8, 0.1)))):
                results.append({**common, "segmentation": near, "score": float(rng.random())})
    listed = [{"id": n, "height": SIZE[0], "width": SIZE[1], "file_name": f"{n}.jpg"} for n in range(1, images + 1)]
    categories = [{"id": id, "name": str(id)} for id in (1, 2, 3)]
    return {"images": listed, "annotations": truths, "categories": categories}, results


def read_files(truth: Path, results: Path) -> tuple[Record, list[Record]]:
    """Return ground truth and results of two files; annotations become results without boxes."""
    record, found = (json.loads(path.read_text()) for path in (truth, results))
    found = found if isinstance(found, list) else found["annotations"]
    sizes = COCO.__new__(COCO)
    sizes.imgs = {image["id"]: image for image in record["images"]}
    for one in (*record["annotations"], *found):
        run_lengths = sizes.annToRLE(one)
        counts = run_lengths["counts"]
        one["segmentation"] = {**run_lengths, "counts": counts.decode() if isinstance(counts, bytes) else counts}
    kept = ("image_id", "category_id", "segmentation")
    return record, [{**{name: one[name] for name in kept}, "score": one.get("score", 1.0)} for one in found]


def make_federated(record: Record, rng: np.random.Generator) -> Record:
    """Give the ground truth the fields of LVIS."""
    ids = [category["id"] for category in record["categories"]]
    for image in record["images"]:
        image["neg_category_ids"] = [int(id) for id in rng.choice(ids, size=max(1, len(ids) // 10), replace=False)]
        image["not_exhaustive_category_ids"] = []
    for category in record["categories"]:
        category["frequency"] = "f"
    return record


def make_empty(one: Record) -> Record:
    empty: Record = coco_mask.encode(np.zeros(one["segmentation"]["size"], dtype=np.uint8, order="F"))
    return {"segmentation": {**empty, "counts": empty["counts"].decode()}}


CHANGES: dict[str, tuple[str, float, Callable[[Record], Record]]] = {
    "nothing": ("truth", 0.0, lambda _: {}),
    "truth with area 0": ("truth", CHANGED, lambda _: {"area": 0}),
    "empty truth": ("truth", CHANGED, lambda one: {"area": 0, **make_empty(one)}),
    "empty detections": ("results", CHANGED, make_empty),
    "truth with ignore": ("truth", CHANGED, lambda _: {"ignore": 1}),
    "truth that is a crowd": ("truth", CHANGED, lambda _: {"iscrowd": 1}),
    "results with boxes": ("results", 1.0, lambda one: {"bbox": coco_mask.toBbox(one["segmentation"]).tolist()}),
}
"""The side and the fraction of objects that are changed, and their new fields."""


class BoundaryEval(COCOeval):  # type: ignore[misc]
    """pycocotools with the rule of the Boundary IoU scripts: the smaller of both overlaps, the mask IoU with crowds;
    objects with `ignore` are ignored."""

    def _prepare(self) -> None:
        marked = {one["id"] for one in self.cocoGt.dataset["annotations"] if one.get("ignore")}
        super()._prepare()
        for truths in self._gts.values():
            for one in truths:
                one["ignore"] = one["ignore"] or one["id"] in marked

    def computeIoU(self, imgId: int, catId: int) -> Any:  # noqa: N802, N803
        overlaps = super().computeIoU(imgId, catId)
        truths, found = self._gts[imgId, catId], self._dts[imgId, catId]
        if not len(truths) or not len(found):
            return overlaps
        order = np.argsort([-one["score"] for one in found], kind="mergesort")[: self.params.maxDets[-1]]
        crowds = [one["iscrowd"] for one in truths]
        bands = [[find_band(one["segmentation"]) for one in side] for side in ([found[i] for i in order], truths)]
        of_bands = coco_mask.iou(*bands, crowds)
        return np.where(np.array(crowds) == 1, overlaps, np.minimum(overlaps, of_bands))


def find_band(segmentation: Record) -> Record:
    """The band along the inside of the boundary; pixels beyond the image are background."""
    pixels = np.pad(coco_mask.decode(segmentation), 1)
    width = max(1, round(BOUNDARY_RATIO * float(np.hypot(*segmentation["size"]))))
    band = pixels - cv2.erode(pixels, np.ones((3, 3), np.uint8), iterations=width)
    found: Record = coco_mask.encode(np.asfortranarray(band[1:-1, 1:-1]))
    return found


def ask_coco(kind: type[COCOeval], truth: Path, results: Path) -> Figures:
    reference = COCO(str(truth))
    evaluation = kind(reference, reference.loadRes(str(results)), "segm")
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return dict(zip(NAMES, evaluation.stats[[0, 3, 4, 5]].tolist(), strict=True))


def ask_lvis(truth: Path, results: Path) -> Figures:
    import lvis  # type: ignore[import-not-found]

    vars(np)["float"] = float  # lvis 0.5.3 is older than NumPy 1.24
    evaluation = lvis.LVISEval(str(truth), str(results), "segm")
    evaluation.run()
    return dict(zip(NAMES, (float(evaluation.results[name]) for name in ("AP", "APs", "APm", "APl")), strict=True))


def ask_here(prefix: str, protocol: str, truth: Path, results: Path) -> Figures:
    sources = (open_dataset(path, need_images=False) for path in (results, truth))
    report = evaluate(*sources, protocol=protocol, boundary_ratio=BOUNDARY_RATIO)
    values = {measure.name: measure.value for measure in report.measures}
    return {name: values[prefix + name] for name in NAMES}


def compare_precision(truth: Record, results: list[Record], folder: Path) -> Iterator[str]:
    """Yield a line for each change and tool: AP by the tool, and here."""
    rules: dict[str, tuple[Callable[..., Figures], str, str]] = {
        "pycocotools": (lambda *paths: ask_coco(COCOeval, *paths), "", "coco"),
        "Boundary IoU": (lambda *paths: ask_coco(BoundaryEval, *paths), "boundary ", "coco"),
        "lvis": (ask_lvis, "", "lvis"),
    }
    for change, (side, fraction, describe) in CHANGES.items():
        rng = np.random.default_rng(1)
        changed, found = make_federated(copy.deepcopy(truth), np.random.default_rng(2)), copy.deepcopy(results)
        for one in changed["annotations"] if side == "truth" else found:
            if rng.random() < fraction:
                one.update(describe(one))
        paths = folder / "truth.json", folder / "results.json"
        for path, content in zip(paths, (changed, found), strict=True):
            path.write_text(json.dumps(content))
        for name, (ask, prefix, protocol) in rules.items():
            try:
                with contextlib.redirect_stdout(io.StringIO()):
                    official = ask(*paths)
            except ImportError:
                continue
            here = ask_here(prefix, protocol, *paths)
            pairs = ", ".join(f"{key} {show(official[key])} {show(here[key])}" for key in NAMES)
            yield f"{change}: {name}, official and here: {pairs}"


def show(value: float | None) -> str:
    return "-" if value is None or value < 0 else f"{100 * value:.2f}"


def compare_clips(folder: Path, clips: int, frames: int) -> Iterator[str]:
    """Yield J&F of clips whose ground truth has a void band around each object, by both rules."""
    rng = np.random.default_rng(3)
    for width in (0, 2, 5):
        official = []
        for clip in range(clips):
            ring = outline(rng, SIZE)
            while np.ptp(ring, axis=0).min() < SMALLEST_PX:
                ring = outline(rng, SIZE)
            for frame in range(frames):
                moved = ring + frame
                truth, found = (
                    cv2.fillPoly(np.zeros(SIZE, np.uint8), [np.rint(points).astype(np.int32)], 1)
                    for points in (moved, moved + rng.normal(scale=4, size=ring.shape))
                )
                if width:
                    near = np.ones((2 * width + 1, 2 * width + 1), np.uint8)
                    truth[(cv2.dilate(truth, near) > 0) & (cv2.erode(truth, near) == 0)] = VOID
                if 0 < frame < frames - 1:
                    official.append(score_official(truth, found))
                for side, pixels in (("truth", truth), ("found", found)):
                    path = folder / f"{side}{width}" / f"clip{clip}" / f"{frame:05d}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    image = Image.fromarray(pixels, mode="P")
                    image.putpalette([value for level in range(256) for value in (level, level, level)])
                    image.save(path)
        sources = [
            open_dataset(folder / f"{side}{width}", format="davis", need_images=False) for side in ("found", "truth")
        ]
        report = evaluate(*sources, protocol="davis")
        here = next(measure.value for measure in report.measures if measure.name == "J&F")
        yield f"void within {width} px of outlines: official {show(float(np.mean(official)))}, here {show(here)}"


def score_official(truth: np.ndarray, found: np.ndarray) -> float:
    """J&F of a frame by the official script's rule: void pixels of the ground truth are background."""
    theirs, ours = truth == 1, found == 1
    either = np.count_nonzero(theirs | ours)
    region = np.count_nonzero(theirs & ours) / either if either else 1.0
    return (region + compute_contour_f(theirs, ours)) / 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--truth", type=Path, help="COCO annotations")
    parser.add_argument("--results", type=Path, help="COCO results or annotations")
    parser.add_argument("--images", type=int, default=60, help="images of random blobs, without files")
    arguments = parser.parse_args()
    if arguments.truth is None:
        truth, results = make_scene(arguments.images)
    else:
        truth, results = read_files(arguments.truth, arguments.results)
    with tempfile.TemporaryDirectory() as folder:
        for line in compare_precision(truth, results, Path(folder)):
            print(line, flush=True)
        if arguments.truth is None:
            for line in compare_clips(Path(folder), clips=8, frames=6):
                print(line, flush=True)


if __name__ == "__main__":
    main()
