"""Measures images and masks per second, end to end and by stage, with random weights.

    python benchmarks/throughput.py [--models sam-vit-h ...] [--batches 8] [--masks 7.4] [--images 64]
        [--size 480 640] [--device auto] [--precision auto] [--plain] [--peak-tflops 989]

End to end: images from JPEG files through `running.threads` to run lengths. By stage: each one alone, on the same
images. `of peak`: floating-point operations of the encoder, times images per second end to end, over the device's
dense bf16 peak. `--plain` also refines a few of the images with `plain.py` (SAMs only), so that gains are ratios.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from plain import refine_plainly
from torch.utils.flop_counter import FlopCounterMode

from refinetool import masks
from refinetool.backends import Embedding
from refinetool.backends.models import find_model
from refinetool.backends.sam import SamBackend
from refinetool.backends.square import SquareBackend
from refinetool.candidates import Answer
from refinetool.records import Region, Sample
from refinetool.refine import Prepared, Refiner, load_refiner
from refinetool.running.threads import in_process
from refinetool.settings import NO_GUARD, JobSettings, RefineSettings

PEAK_TFLOPS = {"NVIDIA H200": 989.0, "NVIDIA H100 80GB HBM3": 989.0, "NVIDIA A100-SXM4-80GB": 312.0}
"""Dense bf16, from the data sheets."""
PLAIN_IMAGES = 3


def make_samples(folder: Path, *, count: int, per_image: float, size: tuple[int, int]) -> list[Sample]:
    """Write smooth random photographs, with discs as coarse masks, `per_image` of them on average."""
    rng = np.random.default_rng(0)
    ys, xs = np.mgrid[: size[0], : size[1]]
    made = []
    for n in range(count):
        path = folder / f"{n}.jpg"
        small = Image.fromarray(rng.integers(0, 255, (size[0] // 8, size[1] // 8, 3), dtype=np.uint8))
        small.resize(size[::-1]).save(path, quality=90)
        discs = round((n + 1) * per_image) - round(n * per_image)
        places = rng.uniform(0.1, 0.9, (discs, 2)) * size
        found = [np.hypot(ys - y, xs - x) < rng.uniform(0.05, 0.2) * min(size) for y, x in places]
        regions = tuple(Region(k, None, masks.encode(mask)) for k, mask in enumerate(found))
        made.append(Sample(f"{n}", path, size, regions))
    return made


def seconds(call: Callable[[], object]) -> float:
    """Return the time of a call, including what the device still has to do."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def stages(refiner: Refiner, samples: Sequence[Sample]) -> dict[str, float]:
    """Return the seconds of each stage alone, over all samples."""
    prepared: list[Prepared] = []
    embeddings: list[Embedding] = []
    answers: list[Answer] = []
    times = {"prepare": seconds(lambda: prepared.extend(refiner.prepare(sample) for sample in samples))}
    jobs = [job for one in prepared for job in one.jobs]
    times["encode"] = seconds(lambda: embeddings.extend(refiner.backend.embed([job.pixels for job in jobs])))
    prompts = [job.prompts for job in jobs]
    times["decode"] = seconds(lambda: refiner.backend.predict(embeddings, prompts))
    times["all of the model"] = seconds(lambda: answers.extend(refiner.segment(jobs)))
    rest = iter(answers)
    of_samples = [(one, [next(rest) for _ in one.jobs]) for one in prepared]
    times["finish"] = seconds(lambda: [refiner.finish(one, own) for one, own in of_samples])
    return times


def measure(model: str, batch: int, samples: Sequence[Sample], arguments: argparse.Namespace) -> None:
    settings = replace(RefineSettings(), guard=NO_GUARD, image_batch=batch)
    refiner = load_refiner(
        model, checkpoint="random:0", device=arguments.device, precision=arguments.precision, settings=settings
    )
    backend = refiner.backend
    assert isinstance(backend, SquareBackend)
    warm = list(islice(cycle(samples), max(2, batch)))
    prepared = refiner.prepare(samples[0])
    with FlopCounterMode(display=False) as counter:
        backend.embed([prepared.jobs[0].pixels])
    of_view = counter.get_total_flops() / backend.image_batch
    refiner.segment([job for sample in warm for job in refiner.prepare(sample).jobs])
    threads = JobSettings().threads
    whole = seconds(lambda: list(in_process(samples, refiner, threads=threads, stopped=lambda: False)))
    by_stage = stages(refiner, samples)
    count, regions = len(samples), sum(len(sample.regions) for sample in samples)
    views = sum(len(refiner.prepare(sample).jobs) for sample in samples)
    peak = arguments.peak_tflops or PEAK_TFLOPS.get(device_name(backend.device), 0.0)
    share = f"{of_view * views / whole / peak / 1e12:.1%}" if peak else "-"
    rates = " | ".join(f"{count / spent:.2f}" for spent in by_stage.values())
    plainly = plain_rate(model, backend.device, samples) if arguments.plain else None
    ratio = "-" if plainly is None else f"{count / whole / plainly:.2f}"
    rest = f"{count / whole:.2f} | {regions / whole:.1f} | {rates} | {of_view / 1e9:.0f} | {share} | {ratio}"
    print(f"| {model} | {backend.precision} | {batch} | {rest} |", flush=True)


def plain_rate(model: str, device: torch.device, samples: Sequence[Sample]) -> float | None:
    """Return images per second of the plain path, None for models that are no SAM."""
    if not find_model(model).backend.endswith(":SamBackend"):
        return None
    network = SamBackend.network(find_model(model).variant).eval().to(device)
    few = samples[:PLAIN_IMAGES]

    def run() -> None:
        for sample in few:
            coarse = np.stack([masks.decode(region.mask) for region in sample.regions if region.mask is not None])
            refine_plainly(network, np.asarray(Image.open(sample.image)), coarse, passes=1, at_once=64)

    with torch.no_grad():
        if device.type == "cuda":
            run()
        return len(few) / seconds(run)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["sam-vit-h"])
    parser.add_argument("--batches", nargs="+", type=int, default=[8], help="views per encoder call")
    parser.add_argument("--masks", type=float, default=7.4, help="masks per image, on average")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--size", nargs=2, type=int, default=(480, 640), help="height and width of the images")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--plain", action="store_true", help="compare with a plain implementation in float32")
    parser.add_argument("--peak-tflops", type=float, help="dense bf16 peak of a device that is not in the table")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        samples = make_samples(
            Path(folder), count=arguments.images, per_image=arguments.masks, size=tuple(arguments.size)
        )
        columns = ("prepare", "encode", "decode", "all of the model", "finish")
        print(f"{arguments.images} images of {arguments.size[0]} x {arguments.size[1]}, {arguments.masks} masks each\n")
        print(
            f"| model | precision | batch | images/s | masks/s | {' | '.join(columns)} | GFLOP | of peak | vs plain |"
        )
        print("|---" * (8 + len(columns)) + "|")
        for model in arguments.models:
            for batch in arguments.batches:
                measure(model, batch, samples, arguments)


if __name__ == "__main__":
    main()
