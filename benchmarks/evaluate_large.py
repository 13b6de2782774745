"""Measures time and memory of `refinetool eval` on 5,000 images with 37,000 masks.

    python benchmarks/evaluate_large.py FOLDER [--images 5000] [--masks 37000] [--workers 2]

Makes `truth.json` (polygons), `coarse.json` and `refined.json` (RLE with scores) in FOLDER, with image and object sizes
like in COCO, and keeps them for the next run. Then runs the command with all metrics for COCO files, and prints
wall-clock seconds, CPU seconds, and peak resident memory, summed over its processes.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray

from refinetool import masks

SIZES = ((480, 640), (640, 480), (427, 640), (375, 500), (640, 427))
"""(H, W) that are common in COCO."""

FRACTIONS = (0.41, 0.34, 0.25)
SIDES_PX = ((6, 32), (32, 96), (96, 300))
"""Fraction of the objects, and the range of their sides: small, medium and large objects as in COCO."""

CATEGORIES = 80
LOOK_EVERY_S = 0.1

Record: TypeAlias = dict[str, Any]


def outline(rng: np.random.Generator, size: tuple[int, int]) -> NDArray[np.float64]:
    """Return the corners (P, 2) of a wavy closed outline, similar to hand-drawn polygons."""
    low, high = SIDES_PX[rng.choice(len(SIDES_PX), p=FRACTIONS)]
    radius = rng.uniform(low, high) / 2
    corners = int(rng.integers(12, 50))
    angles = np.sort(rng.uniform(0, 2 * np.pi, corners))
    waves = 1 + sum(0.12 * np.sin(k * angles + rng.uniform(0, 6)) for k in (2, 3, 5))
    x, y = rng.uniform(0, size[1]), rng.uniform(0, size[0])
    ring = np.stack([x + radius * waves * np.cos(angles), y + radius * waves * np.sin(angles)], axis=1)
    return np.clip(ring, 0, [size[1], size[0]]).round(2)


def disturbed(
    rng: np.random.Generator, ring: NDArray[np.float64], size: tuple[int, int], amount: float
) -> dict[str, object]:
    """Return the outline's mask as RLE, with each corner moved."""
    side = float(np.sqrt(max(1.0, np.ptp(ring[:, 0]) * np.ptp(ring[:, 1]))))
    moved = ring + rng.normal(scale=amount * side / 2, size=ring.shape)
    mask = np.zeros(size, dtype=np.uint8)
    cv2.fillPoly(mask, [np.rint(moved).astype(np.int32)], 1)
    return {"size": list(size), "counts": masks.encode(mask > 0).counts.decode()}


def records(images: int, count: int) -> Iterator[tuple[Record, list[tuple[Record, Record, Record]]]]:
    """Yield each image with its annotations, each as (truth, coarse, refined)."""
    rng = np.random.default_rng(0)
    owners = np.sort(rng.integers(0, images, count))
    bounds = np.searchsorted(owners, np.arange(images + 1))
    for number in range(images):
        height, width = size = SIZES[int(rng.integers(len(SIZES)))]
        annotations = []
        for id in range(int(bounds[number]), int(bounds[number + 1])):
            ring = outline(rng, size)
            x0, y0 = ring.min(axis=0)
            x1, y1 = ring.max(axis=0)
            x, y = ring.T
            area = abs(float(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))) / 2
            common = {
                "id": id,
                "image_id": number + 1,
                "category_id": int(rng.integers(1, CATEGORIES + 1)),
                "iscrowd": 0,
                "area": round(area, 2),
                "bbox": [float(x0), float(y0), float(x1 - x0), float(y1 - y0)],
            }
            score = {"score": round(float(rng.random()), 4)}
            annotations.append(
                (
                    common | {"segmentation": [ring.ravel().tolist()]},
                    common | score | {"segmentation": disturbed(rng, ring, size, 0.12)},
                    common | score | {"segmentation": disturbed(rng, ring, size, 0.03)},
                )
            )
        image = {"id": number + 1, "file_name": f"{number + 1:012}.jpg", "height": height, "width": width}
        yield image, annotations


def make_files(folder: Path, images: int, count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    listed: list[Record] = []
    written: tuple[list[Record], ...] = ([], [], [])
    for image, annotations in records(images, count):
        listed.append(image)
        for versions in annotations:
            for annotation, into in zip(versions, written, strict=True):
                into.append(annotation)
    categories = [{"id": n, "name": str(n)} for n in range(1, CATEGORIES + 1)]
    for name, version in zip(("truth", "coarse", "refined"), written, strict=True):
        record = {"images": listed, "annotations": version, "categories": categories}
        (folder / f"{name}.json").write_text(json.dumps(record))


def resident_bytes(root: int) -> int:
    """Return the resident memory of a process and its descendants (shared pages count in each); Linux only."""
    parents: dict[int, int] = {}
    sizes: dict[int, int] = {}
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines() if ":" in line)
        except OSError:
            continue
        pid = int(status.parent.name)
        parents[pid] = int(fields["PPid"])
        sizes[pid] = 1024 * int(fields.get("VmRSS", "0 kB").split()[0])
    family = {root}
    while grown := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= grown
    return sum(sizes.get(pid, 0) for pid in family)


def run(folder: Path, workers: int) -> None:
    files = [str(folder / f"{name}.json") for name in ("refined", "truth")]
    arguments = ["eval", *files, "--coarse", str(folder / "coarse.json"), "--workers", str(workers)]
    code = "import sys; from refinetool.cli import main; sys.argv[0] = 'refinetool'; main()"
    before, start, peak = os.times(), time.perf_counter(), 0
    with subprocess.Popen([sys.executable, "-c", code, *arguments]) as process:
        while process.poll() is None:
            peak = max(peak, resident_bytes(process.pid))
            time.sleep(LOOK_EVERY_S)
    after = os.times()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    print(f"{time.perf_counter() - start:.1f} s, {spent:.1f} s of CPU time, at most {peak / 2**20:.0f} MiB")
    if process.returncode:
        sys.exit(process.returncode)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--masks", type=int, default=37_000)
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    if not (arguments.folder / "refined.json").is_file():
        make_files(arguments.folder, arguments.images, arguments.masks)
    run(arguments.folder, arguments.workers)


if __name__ == "__main__":
    main()
