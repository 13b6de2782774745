"""Measures images per second of training: the sampler alone, the step alone, and both together as in a run.

    python benchmarks/train_throughput.py PACK --device auto

All three are measured in turn, several times, in one process, so that their ratios are meaningful on a busy machine.
`PACK` is a folder that `refinetool train pack` wrote.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from refinetool.backends.models import pick_device
from refinetool.settings import TRAIN_ON_GPU, TrainSettings
from refinetool.train.data.examples import Example
from refinetool.train.data.pack import read_pack
from refinetool.train.data.sampler import Sampler
from refinetool.train.data.store import load_store
from refinetool.train.embedded.whole import Whole
from refinetool.train.ranks import ALONE
from refinetool.train.step import Learner
from refinetool.train.steps import drawing_thread


def measure(
    pack: Path, *, settings: TrainSettings, device: str, side: int, steps: int, rounds: int
) -> dict[str, float]:
    """Return the median images per second of each part over the rounds."""
    sampler = Sampler(load_store(read_pack(pack), "train", device=device), settings=settings, seed=0)
    learner = Learner(Whole(settings=settings).to(device), settings=settings, ranks=ALONE)
    size = settings.images_per_step

    def draw(number: int) -> Example:
        return sampler.batch(number * size + torch.arange(size), side=side)

    def learn(batch: Example) -> None:
        learner.step(batch, step=1, learning_rate=1e-6)

    with drawing_thread(device) as thread:
        held = thread.submit(draw, 0).result()
        learn(held)

        def both() -> None:
            coming = thread.submit(draw, 0)
            for number in range(steps):
                batch = coming.result()
                coming = thread.submit(draw, number + 1)
                learn(batch)
            coming.result()

        def learn_again() -> None:
            for _ in range(steps):
                learn(held)

        parts: dict[str, Callable[[], object]] = {
            "sampler": lambda: [thread.submit(draw, number).result() for number in range(steps)],
            "step": learn_again,
            "both": both,
        }
        seconds: dict[str, list[float]] = {name: [] for name in parts}
        for _ in range(rounds):
            for name, part in parts.items():
                began = time.monotonic()
                part()
                if device != "cpu":
                    torch.cuda.synchronize(device)
                seconds[name].append(time.monotonic() - began)
    return {name: steps * size / statistics.median(values) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pack", type=Path)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch", type=int, help="images per step; default: the setting for the device")
    parser.add_argument("--sides", type=int, nargs="+", default=[192, 256])
    parser.add_argument("--steps", type=int, default=5, help="steps per round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="threads of torch on a CPU")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = pick_device(arguments.device)
    settings = TrainSettings() if device == "cpu" else TRAIN_ON_GPU
    settings = replace(settings, images_per_step=arguments.batch or settings.images_per_step)
    print(f"{device}, {torch.get_num_threads()} threads, {settings.images_per_step} images per step")
    print("| side | sampler | step | both | sampler : step | both : step |\n|---|---|---|---|---|---|")
    for side in arguments.sides:
        rate = measure(
            arguments.pack, settings=settings, device=device, side=side, steps=arguments.steps, rounds=arguments.rounds
        )
        print(
            f"| {side} | {rate['sampler']:.1f} | {rate['step']:.1f} | {rate['both']:.1f} "
            f"| {rate['sampler'] / rate['step']:.2f} | {rate['both'] / rate['step']:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
