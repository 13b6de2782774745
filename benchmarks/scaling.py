"""Measures how the speed of refining grows with the number of worker processes.

    python benchmarks/scaling.py [--images 200] [--workers 1 2] [--model embedded] [--device cpu]

Refines made-up photographs with 8 masks each, once with every number of workers, and once with a single process on a
single thread as the unit that the others are compared with. Prints seconds to start (until the first image is done),
images per second from then on, and the ratio to that unit. With --device cuda, a worker has a GPU.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from skimage import data

from refinetool import masks

MASKS = 8
SIDE = 384


def make(folder: Path, count: int) -> Path:
    """Write photographs, each a shifted cut of one of scikit-image's, and a COCO file with discs as coarse masks."""
    sources = [data.astronaut(), data.chelsea(), data.coffee(), data.rocket()]
    ys, xs = np.mgrid[:SIDE, :SIDE]
    images: list[dict[str, object]] = []
    annotations: list[dict[str, object]] = []
    (folder / "images").mkdir()
    for n in range(count):
        source = sources[n % len(sources)]
        pixels = np.roll(source, (7 * n, 13 * n), axis=(0, 1))
        picture = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BILINEAR)
        picture.save(folder / "images" / f"{n}.jpg", quality=90)
        images.append({"id": n, "file_name": f"{n}.jpg", "height": SIDE, "width": SIDE})
        for m in range(MASKS):
            radius = 20 + 5 * m
            x, y = ((m % 4 + 0.5) / 4) * SIDE, ((m // 4 + 0.5) / 2) * SIDE
            rle = masks.encode(np.hypot(xs - x, ys - y) < radius)
            segmentation = {"size": [SIDE, SIDE], "counts": rle.counts.decode()}
            annotations.append(
                {"id": len(annotations), "image_id": n, "category_id": 1, "iscrowd": 0, "segmentation": segmentation}
                | {"area": 1, "bbox": [0, 0, 1, 1]}
            )
    record = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "disc"}]}
    path = folder / "coarse.json"
    path.write_text(json.dumps(record))
    return path


def refine(coarse: Path, output: Path, *options: str) -> tuple[float, float]:
    """Refine in a process of its own; returns seconds of the whole, and seconds of the run without start and write."""
    command = [sys.executable, "-m", "refinetool", "refine", str(coarse), "-o", str(output), "--json", *options]
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return time.perf_counter() - began, json.loads(done.stdout)["seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--checkpoint", default=None, help="random:SEED measures models without their weights")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    options = ["--model", arguments.model, "--device", arguments.device]
    options += ["--checkpoint", arguments.checkpoint] if arguments.checkpoint else []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        coarse = make(folder, arguments.images)
        outputs = []
        unit = 0.0
        one_core = arguments.device == "cpu"
        variants = [("1, one core", "1", one_core), *((str(n), str(n), False) for n in arguments.workers)]
        print(f"{'workers':>12}  {'seconds':>8}  {'start':>6}  {'images/s':>8}  {'ratio':>6}")
        for label, count, limited in variants:
            outputs.append(folder / f"{label}.json")
            everything = [*options, "--workers", count]
            cores = os.sched_getaffinity(0)
            if limited:
                os.sched_setaffinity(0, {min(cores)})  # inherited by the process
            whole, seconds = refine(coarse, outputs[-1], *everything)
            os.sched_setaffinity(0, cores)
            rate = arguments.images / seconds
            unit = unit or rate
            print(f"{label:>12}  {whole:8.1f}  {whole - seconds:6.1f}  {rate:8.2f}  {rate / unit:6.2f}", flush=True)
        identical = all(output.read_bytes() == outputs[0].read_bytes() for output in outputs)
        print("all outputs are identical" if identical else "THE OUTPUTS DIFFER")


if __name__ == "__main__":
    main()
