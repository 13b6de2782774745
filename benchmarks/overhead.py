"""Measures what is spent outside the model, and the gain over a plain implementation.

    python benchmarks/overhead.py share [--rounds 9] [--threads 1]
    python benchmarks/overhead.py plain [--height 1372 --width 2000 --masks 40 --passes 1] [--model sam-vit-b]

`share`: the embedded model on a photograph of 512 x 512 with 8 masks; the part of the time outside encoder and decoder.
`plain`: SAM with random weights, beside `plain.py` with the same weights, prompts of the same kinds and as many masks.
Processor seconds of one thread, which other programs disturb least.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from plain import refine_plainly
from skimage import data
from stages import discs

from refinetool import masks
from refinetool.backends.models import find_model
from refinetool.backends.sam import SamBackend
from refinetool.records import Region, Sample
from refinetool.refine import Refiner, load_refiner
from refinetool.settings import NO_GUARD, RELEASE, RefineSettings


class Stopwatch:
    """Adds up the processor time spent in methods of an object."""

    def __init__(self, target: Any, *names: str) -> None:
        self.seconds = dict.fromkeys(names, 0.0)
        for name in names:
            setattr(target, name, self._timed(getattr(target, name), name))

    def _timed(self, method: Callable[..., Any], name: str) -> Callable[..., Any]:
        def timed(*values: Any, **named: Any) -> Any:
            started = time.process_time()
            result = method(*values, **named)
            self.seconds[name] += time.process_time() - started
            return result

        return timed

    def reset(self) -> dict[str, float]:
        """Return the seconds since the last reset."""
        seconds, self.seconds = self.seconds, dict.fromkeys(self.seconds, 0.0)
        return seconds


def refine(refiner: Refiner, sample: Sample, image: np.ndarray) -> None:
    """Do everything but reading and writing files."""
    prepared = refiner.prepare_pixels(sample, image)
    refiner.finish(prepared, refiner.segment(prepared.jobs))


def sample_of(found: list[np.ndarray]) -> Sample:
    regions = tuple(Region(n, None, masks.encode(mask)) for n, mask in enumerate(found))
    return Sample("one", data.__file__, found[0].shape, regions)  # type: ignore[arg-type]


def share(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    refiner = load_refiner(
        "embedded", checkpoint=None, device="cpu", precision="fp32", settings=replace(RefineSettings(), guard=NO_GUARD)
    )
    watch = Stopwatch(refiner.backend, "_encode", "_decode")
    image = data.astronaut()
    sample = sample_of(discs(image.shape[:2]))
    shares = []
    for _ in range(arguments.rounds + 1):
        watch.reset()
        started = time.process_time()
        refine(refiner, sample, image)
        whole, inside = time.process_time() - started, sum(watch.reset().values())
        shares.append(1 - inside / whole)
    print(f"outside encoder and decoder: {statistics.median(shares[1:]):.1%} (median of {arguments.rounds})")


def plain(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    size = (arguments.height, arguments.width)
    image = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
    # The release's settings, with exact distances: its chamfer distances are there for comparison and not for speed.
    prompts = replace(RELEASE.prompts, release=False)
    settings = replace(RELEASE, passes=arguments.passes, prompts=prompts)
    refiner = load_refiner(arguments.model, checkpoint="random:0", device="cpu", precision="fp32", settings=settings)
    official = SamBackend.network(find_model(arguments.model).variant).eval()
    grown = int(arguments.masks**0.5) + 1
    centres = [((row + 0.5) / grown, (column + 0.5) / grown) for row in range(grown) for column in range(grown)]
    ys, xs = np.mgrid[: size[0], : size[1]]
    radius = 0.35 * min(size) / grown
    coarse = [np.hypot(ys - y * size[0], xs - x * size[1]) < radius for y, x in centres[: arguments.masks]]
    sample = sample_of(coarse)
    watch = Stopwatch(refiner.backend, "_encode", "_decode")
    started = time.process_time()
    refine(refiner, sample, image)
    ours, parts = time.process_time() - started, watch.reset()
    model = Stopwatch(official.image_encoder, "forward")
    decoder = Stopwatch(official.mask_decoder, "predict_masks")
    started = time.process_time()
    with torch.no_grad():
        refine_plainly(official, image, np.stack(coarse), passes=arguments.passes, at_once=arguments.at_once)
    theirs = time.process_time() - started
    theirs_parts = (model.seconds["forward"], decoder.seconds["predict_masks"])
    print(f"{arguments.model}, {size[0]} x {size[1]}, {arguments.masks} masks, {arguments.passes} passes\n")
    print("| processor seconds | encoder | decoder | other | all |\n|---|---|---|---|---|")
    for name, whole, (encoder, decoding) in (
        ("plain", theirs, theirs_parts),
        ("refinetool", ours, (parts["_encode"], parts["_decode"])),
    ):
        print(f"| {name} | {encoder:.1f} | {decoding:.1f} | {whole - encoder - decoding:.1f} | {whole:.1f} |")
    print(f"\n{theirs / ours:.2f} times as fast")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    of_share = commands.add_parser("share")
    of_share.add_argument("--rounds", type=int, default=9)
    of_share.add_argument("--threads", type=int, default=1, help="threads of torch")
    of_share.set_defaults(run=share)
    of_plain = commands.add_parser("plain")
    of_plain.add_argument("--model", default="sam-vit-b", help="a SAM")
    of_plain.add_argument("--height", type=int, default=1372)
    of_plain.add_argument("--width", type=int, default=2000)
    of_plain.add_argument("--masks", type=int, default=40)
    of_plain.add_argument("--passes", type=int, default=1)
    of_plain.add_argument("--at-once", type=int, default=20, help="masks per decoder call of the plain path")
    of_plain.set_defaults(run=plain)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
