"""Measures reading and writing a COCO file of 600,000 annotations, compared with pycocotools and the standard library.

    python benchmarks/large_json.py FOLDER [--annotations 600000]

Makes the file in FOLDER (about 300 MB, kept for the next run), runs each variant once in its own process, and prints
CPU seconds (all variants use one thread, so this is the time on an idle machine), wall-clock seconds, and peak memory.
Writing needs the same disk space again for the output, and once more for temporary drafts.
"""

import argparse
import json
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from pycocotools.coco import COCO

import refinetool.formats.coco  # noqa: F401 - so that imports are not measured
from refinetool import masks
from refinetool.formats import open_dataset
from refinetool.records import Annotation, Outcome

HEIGHT, WIDTH = 480, 640
ANNOTATIONS_PER_IMAGE = 7.3
"""As in COCO's training set."""


# --- the file


def segmentations(choose: random.Random, count: int) -> Iterator[str]:
    """Yield objects like those of real files: hand-drawn polygons, and every eighth object as RLE."""
    for number in range(count):
        radius = choose.uniform(6, 60) * choose.uniform(0.5, 2)
        x, y = choose.uniform(radius, WIDTH - radius), choose.uniform(radius, HEIGHT - radius)
        corners = choose.randrange(10, 40)
        angles = np.linspace(0, 2 * np.pi, corners, endpoint=False)
        radii = np.array([radius * choose.uniform(0.8, 1) for _ in range(corners)])
        ring = np.stack([x + radii * np.cos(angles), y + radii * np.sin(angles)], axis=1).round(2)
        if number % 8:
            yield json.dumps([ring.ravel().tolist()])
        else:
            rows, columns = np.mgrid[:HEIGHT, :WIDTH]
            rle = masks.encode((columns - x) ** 2 + (rows - y) ** 2 < (radius * (1 + 0.2 * np.sin(columns / 5))) ** 2)
            yield json.dumps({"size": [HEIGHT, WIDTH], "counts": rle.counts.decode()})


def make_file(path: Path, annotations: int) -> None:
    """Write the file; as in COCO, annotations are not ordered by image."""
    choose = random.Random(0)
    images = int(annotations / ANNOTATIONS_PER_IMAGE)
    pool = list(segmentations(choose, 2000))
    partial = path.with_suffix(".partial")
    with partial.open("w") as file:
        file.write('{"info": {"description": "made for measuring"}, "licenses": [], "images": [')
        for n in range(images):
            file.write(", " if n else "")
            file.write(f'{{"license": 4, "file_name": "{n:012}.jpg", "height": {HEIGHT}, "width": {WIDTH}, "id": {n}}}')
        file.write('], "annotations": [')
        for n in range(annotations):
            file.write(", " if n else "")
            file.write(
                f'{{"segmentation": {choose.choice(pool)}, "area": {choose.uniform(50, 9000):.4f}, "iscrowd": 0, '
                f'"image_id": {choose.randrange(images)}, "bbox": [1.5, 2.25, 30.0, 40.75], '
                f'"category_id": {choose.randint(1, 80)}, "id": {n + 1}}}'
            )
        categories = [{"supercategory": "any", "id": n, "name": str(n)} for n in range(1, 81)]
        file.write(f'], "categories": {json.dumps(categories)}}}')
    (path.parent / f"{0:012}.jpg").touch()  # a file without images would be refused
    partial.rename(path)


# --- variants; each is measured in its own process


def load_with_pycocotools(path: Path) -> None:
    COCO(str(path))


def load_with_json(path: Path) -> None:
    with path.open() as file:
        json.load(file)


def index(path: Path) -> None:
    open_dataset(path)


def read_samples(path: Path) -> None:
    """Read every mask as RLE, with polygons rasterised."""
    for _ in open_dataset(path).samples():
        pass


def write_unchanged(path: Path) -> None:
    out = path.with_name("unchanged.json")
    open_dataset(path).write(lambda _: None, out, {})
    with path.open("rb") as old, out.open("rb") as new:
        while piece := old.read(1 << 20):
            assert new.read(len(piece)) == piece
    out.unlink()


def write_some_changed(path: Path) -> None:
    """Replace every mask of every tenth image by the same mask, with new outlines, areas and boxes."""
    dataset = open_dataset(path)
    refined = {
        sample.key: Outcome(sample.key, tuple(Annotation(region.mask, None) for region in sample.regions))
        for sample in dataset.samples()
        if sample.key.endswith("0")
    }
    out = path.with_name("changed.json")
    dataset.write(refined.get, out, {"benchmark": True})
    out.unlink()


WAYS: dict[str, Callable[[Path], None]] = {
    "pycocotools.COCO(file)": load_with_pycocotools,
    "json.load": load_with_json,
    "open_dataset": index,
    "open_dataset, all samples": read_samples,
    "open_dataset, write, nothing refined": write_unchanged,
    "open_dataset, all samples, write, a tenth refined": write_some_changed,
}


def measure(way: str, path: Path) -> list[float]:
    """Return CPU seconds, wall-clock seconds and peak megabytes of one variant."""
    command = [sys.executable, __file__, str(path), "--way", way]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return [float(number) for number in output.splitlines()[-1].split()]


def report(way: str, path: Path) -> None:
    """Run one variant in this process and print the numbers that `measure` reads."""
    processor, clock = time.process_time(), time.perf_counter()
    WAYS[way](path)
    processor, clock = time.process_time() - processor, time.perf_counter() - clock
    print(processor, clock, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--annotations", type=int, default=600_000)
    parser.add_argument("--way", choices=list(WAYS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.way:
        report(arguments.way, arguments.folder)
        return
    path = arguments.folder / f"instances_{arguments.annotations}.json"
    arguments.folder.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        make_file(path, arguments.annotations)
    print(f"{arguments.annotations:,} annotations, {path.stat().st_size / 1e6:.0f} MB\n")
    print(
        "| variant | CPU, s | relative to pycocotools | clock, s | peak memory, MB |\n| --- | --- | --- | --- | --- |"
    )
    reference = None
    for way in WAYS:
        processor, clock, megabytes = measure(way, path)
        reference = reference or processor
        ratio = processor / reference
        print(f"| {way} | {processor:.1f} | {ratio:.2f} x | {clock:.1f} | {megabytes:.0f} |", flush=True)


if __name__ == "__main__":
    main()
