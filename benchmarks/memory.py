"""Measures how the peak memory of a run grows with the number of images.

    python benchmarks/memory.py [--images 1000 10000] [--workers 1] [--method smooth]

Refines tiny generated images with one mask each, in a process of its own, and prints the peak resident memory of that
process. With --workers 2, it is the driver's; the workers have their own. The method `smooth` needs no model, so the
memory of a model does not hide the rest.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from refinetool import masks

SIDE = 32


def make(folder: Path, count: int) -> Path:
    """Write the images and their COCO file."""
    folder.mkdir()
    (folder / "images").mkdir()
    mask = np.zeros((SIDE, SIDE), dtype=np.bool_)
    mask[8:24, 6:26] = True
    segmentation = {"size": [SIDE, SIDE], "counts": masks.encode(mask).counts.decode()}
    image = Image.fromarray(np.where(mask, 200, 40).astype(np.uint8)).convert("RGB")
    images, annotations = [], []
    for n in range(count):
        image.save(folder / "images" / f"{n}.png")
        images.append({"id": n, "file_name": f"{n}.png", "height": SIDE, "width": SIDE})
        annotations.append(
            {"id": n, "image_id": n, "category_id": 1, "iscrowd": 0, "segmentation": segmentation, "area": 320}
            | {"bbox": [6, 8, 20, 16]}
        )
    record = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "box"}]}
    path = folder / "coarse.json"
    path.write_text(json.dumps(record))
    return path


def peak_of(coarse: Path, output: Path, options: list[str]) -> float:
    """Refine, and return the peak resident memory of the process in MB."""
    command = [sys.executable, __file__, "--run", str(coarse), str(output), *options]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 10000])
    parser.add_argument("--workers", default="1")
    parser.add_argument("--method", default="smooth")
    parser.add_argument("--run", nargs=2, metavar=("COARSE", "OUTPUT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    options = ["--workers", arguments.workers, "--method", arguments.method]
    if arguments.run:
        from refinetool import cli

        sys.argv = ["refinetool", "refine", arguments.run[0], "-o", arguments.run[1], "--quiet", *options]
        try:
            cli.main()
        except SystemExit as end:
            if end.code:
                raise
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000)
        return
    first = 0.0
    print(f"{'images':>8}  {'peak MB':>8}  {'ratio':>6}")
    with tempfile.TemporaryDirectory() as name:
        for count in arguments.images:
            folder = Path(name, str(count))
            peak = peak_of(make(folder, count), folder / "out.json", options)
            first = first or peak
            print(f"{count:8}  {peak:8.1f}  {peak / first:6.3f}", flush=True)


if __name__ == "__main__":
    main()
