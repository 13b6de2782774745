"""Measures the time of each stage of refining one photograph with 8 masks with the embedded model.

    python benchmarks/stages.py [--rounds 7] [--precision fp32|bf16] [--threads 2]

The photograph is from scikit-image (512 x 512), the masks are discs spread over it. Prints medians in milliseconds and
each stage's fraction of the total, so that machines can be compared.
"""

import argparse
import statistics
import time
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch
from skimage import data

from refinetool import masks
from refinetool.candidates import ask
from refinetool.prompts import expand_boxes
from refinetool.records import BoolArray, Region, Sample
from refinetool.refine import load_refiner
from refinetool.settings import NO_GUARD, RefineSettings

MASKS = 8


def discs(size: tuple[int, int]) -> list[BoolArray]:
    """Return discs of several sizes on a grid of 4 x 2 positions."""
    ys, xs = np.mgrid[: size[0], : size[1]]
    places = [(x, y) for y in (0.3, 0.7) for x in (0.15, 0.4, 0.62, 0.85)]
    return [np.hypot(xs - x * size[1], ys - y * size[0]) < 25 + 6 * n for n, (x, y) in enumerate(places)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    image = data.astronaut()
    size = (image.shape[0], image.shape[1])
    settings = replace(RefineSettings(), guard=NO_GUARD)
    refiner = load_refiner("embedded", checkpoint=None, device="cpu", precision=arguments.precision, settings=settings)
    regions = tuple(Region(n, None, masks.encode(mask)) for n, mask in enumerate(discs(size)))
    sample = Sample("one", data.__file__, size, regions)  # type: ignore[arg-type]
    spent: dict[str, list[float]] = defaultdict(list)
    for _ in range(arguments.rounds + 1):
        marks = [("", time.perf_counter())]

        def mark(name: str, marks: list[tuple[str, float]] = marks) -> None:
            marks.append((name, time.perf_counter()))

        prepared = refiner.prepare_pixels(sample, image)
        mark("views and prompts")
        jobs = prepared.jobs
        embeddings = refiner.backend.embed([job.pixels for job in jobs])
        mark("encode")
        prompts = [
            expand_boxes(job.prompts, job.coarse, embedding.similarity(job.coarse), settings=settings.prompts)
            for job, embedding in zip(jobs, embeddings, strict=True)
        ]
        mark("elastic boxes")
        answers = ask(
            refiner.backend,
            embeddings,
            prompts,
            jobs,
            selection="single",
            with_logits=True,
            with_candidates=False,
        )
        mark("decode")
        refiner.finish(prepared, answers)
        mark("snap, guard, run lengths")
        for (_, start), (name, end) in pairwise(marks):
            spent[name].append(1000 * (end - start))
        spent["all"].append(1000 * (marks[-1][1] - marks[0][1]))
    medians = {name: statistics.median(times[1:]) for name, times in spent.items()}  # the first round warms up
    print(f"{MASKS} masks, {arguments.precision}, {arguments.threads} threads of torch, torch {torch.__version__}\n")
    print("| stage | ms | fraction |\n|---|---|---|")
    for name, median in medians.items():
        print(f"| {name} | {median:.0f} | {median / medians['all']:.0%} |")


if __name__ == "__main__":
    main()
