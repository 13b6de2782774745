"""Compares heads of a SAM 2 model, for the tables of docs/design/sam2refiner.md.

    python benchmarks/heads.py measure DATA none detail la=run/la/head.safetensors -o rows.jsonl
    python benchmarks/heads.py tables rows.jsonl
    python benchmarks/heads.py picture DATA cables/3 ecssd/0 --heads none detail all=run/head.safetensors -o heads.png

Each head is given the same objects of validation splits, in the same crops, with the same prompts: those mined from a
coarse mask (without guard and snap), the box of the ground truth, or 1, 2, 5 or 10 points drawn from it. An image is
embedded once for all prompts. `measure` appends a line per head and data set and skips existing lines.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from methods import known_pixels, val_objects
from PIL import Image

from refinetool import masks
from refinetool.backends.models import load_backend
from refinetool.corrupt.dataset import corrupt_dataset
from refinetool.corrupt.suites import SUITES
from refinetool.formats import open_dataset
from refinetool.images import read_sample
from refinetool.masks import boundary_iou, iou, tight_box
from refinetool.pictures import beside, draw, label, stack
from refinetool.prompts import excavate, expand_boxes
from refinetool.records import ImageArray, Mask, Prompts
from refinetool.settings import EvaluateSettings, RefineSettings, SuiteName
from refinetool.views import View, choose_views

SEED = 4711
FINE = ("cables", "cables_binary", "crackforest", "dsb2018_nuclei", "ccp", "car_parts")
"""Sets with thin or fine structures."""
SUITE: SuiteName = "davis-like"
CLICKS = (1, 2, 5, 10)
REFINE = RefineSettings()
TILE_PX = 200


@dataclass(frozen=True)
class Case:
    """One object: its crop, its coarse mask, its ground truth and the pixels that count, all in the frame of the
    crop."""

    pixels: ImageArray
    coarse: Mask
    truth: Mask
    known: Mask
    size: tuple[int, int]
    window: tuple[int, int, int, int]
    number: int


def cases_of(folder: Path, work: Path, *, pictures: int) -> list[Case]:
    """Return the objects of a validation split, with coarse masks."""
    truth, coarse = work / f"{folder.name}.json", work / f"{folder.name} coarse.json"
    if not val_objects(folder, truth, pictures=pictures, seed=SEED):
        return []
    images = folder / "images"
    corrupt_dataset(truth, output=coarse, suite=SUITES[SUITE], images=images, format="coco", overwrite=True)
    found: list[Case] = []
    truths = open_dataset(truth, images=images, format="coco").samples()
    for sample, true in zip(open_dataset(coarse, images=images, format="coco").samples(), truths, strict=True):
        image = read_sample(sample, max_pixels=REFINE.max_pixels)
        known = known_pixels(sample, folder / "masks")
        for given, exact in zip(sample.regions, true.regions, strict=True):
            if given.mask is None or exact.mask is None:
                continue
            guess, mask = masks.decode(given.mask), masks.decode(exact.mask)
            ((view, _),) = choose_views(
                [tight_box(guess)], [1], size=sample.size, settings=replace(REFINE.view, mode="crop")
            )
            shown = mask & covered(view, sample.size)
            if shown.any():
                crops = (view.crop_masks(guess), view.crop_masks(mask), view.crop_masks(known))
                found.append(Case(view.crop_image(image), *crops, sample.size, view.window, len(found)))
    return found


def covered(view: View, size: tuple[int, int]) -> Mask:
    return view.paste_masks(np.ones(view.size, np.bool_), size=size)


def questions(case: Case, embedding: Any) -> Iterator[tuple[str, Prompts]]:
    """Yield every kind of prompts for an object, with its name."""
    coarse, settings = case.coarse[None], REFINE.prompts
    mined = excavate(coarse, settings=settings, seeds=[(SEED, case.number)])
    yield "mined", expand_boxes(mined, coarse, embedding.similarity(coarse), settings=settings)
    nothing = np.zeros((1, 0, 2), np.float32), np.zeros((1, 0), np.int64)
    yield "box", Prompts(*nothing, np.array([tight_box(case.truth)], np.float32), None)
    rng = np.random.default_rng((SEED, case.number))
    places = rng.choice(np.argwhere(case.truth), max(CLICKS), axis=0)[:, ::-1]  # x, y
    for count in CLICKS:
        points = places[None, :count].astype(np.float32)
        yield f"{count} points", Prompts(points, np.ones((1, count), np.int64), None, None)


def measured(cases: Sequence[Case], backend: Any) -> dict[str, list[float]]:
    """Return mean IoU and boundary IoU in the crop for each kind of prompts, and the seconds taken."""
    ratio = EvaluateSettings().boundary_ratio
    found: dict[str, list[tuple[float, float]]] = {}

    def add(name: str, mask: Mask, case: Case) -> None:
        # The width of the boundary band is that of the whole image, as everywhere else.
        view = View(case.window)
        whole, truth = (view.paste_masks(one[None] & case.known, size=case.size)[0] for one in (mask, case.truth))
        found.setdefault(name, []).append((iou(whole, truth), boundary_iou(whole, truth, ratio)))

    for case in cases:
        add("coarse", case.coarse, case)
        (embedding,) = backend.embed([case.pixels])
        for name, prompts in questions(case, embedding):
            (prediction,) = backend.predict([embedding], [prompts])
            add(name, prediction.masks(np.zeros(1, np.int64))[0], case)
    return {name: [round(float(mean), 5) for mean in np.mean(values, axis=0)] for name, values in found.items()}


def load(head: str, *, model: str) -> Any:
    """Load a model with a head: a choice of `refine --head`, or NAME=FILE."""
    name, _, path = head.partition("=")
    return load_backend(model, checkpoint=None, device="cpu", precision="fp32", head=path or name)


def measure(data: Path, heads: Sequence[str], out: Path, *, model: str, pictures: int, others: int) -> None:
    done = {(row["head"], row["data"]) for row in rows_of(out)}
    folders = [path for path in sorted(data.iterdir()) if (path / "split.json").is_file()]
    with tempfile.TemporaryDirectory() as work:
        for folder in folders:
            wanted = [head for head in heads if (head.partition("=")[0], folder.name) not in done]
            if (folder / "annotations.json").is_file() or not wanted:
                continue
            cases = cases_of(folder, Path(work), pictures=pictures if folder.name in FINE else others)
            for head in wanted if cases else ():
                name = head.partition("=")[0]
                backend = load(head, model=model)
                began = time.perf_counter()
                figures = measured(cases, backend)
                row = {
                    "head": name,
                    "data": folder.name,
                    "objects": len(cases),
                    "seconds": round(time.perf_counter() - began, 1),
                    "figures": figures,
                }
                with out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(row, flush=True)


def picture(data: Path, chosen: Sequence[str], heads: Sequence[str], out: Path, *, model: str, pictures: int) -> None:
    """Draw objects, named by set and number, a row each: coarse mask, one mask per head, ground truth."""
    backends = {head.partition("=")[0]: load(head, model=model) for head in heads}
    drawn: dict[str, list[Case]] = {}
    rows: list[ImageArray] = []
    with tempfile.TemporaryDirectory() as work:
        for name in chosen:
            folder, _, number = name.partition("/")
            if folder not in drawn:
                drawn[folder] = cases_of(data / folder, Path(work), pictures=pictures)
            case = drawn[folder][int(number)]
            found = {"coarse": case.coarse}
            for head, backend in backends.items():
                (embedding,) = backend.embed([case.pixels])
                (prediction,) = backend.predict([embedding], [next(questions(case, embedding))[1]])
                found[head] = prediction.masks(np.zeros(1, np.int64))[0]
            height, width = case.truth.shape
            scale = TILE_PX / max(height, width)
            tiles = [
                draw(case.pixels, mask[None], (0, 0, width, height), scale=scale, dim=0.45)
                for mask in (*found.values(), case.truth)
            ]
            texts = [f"{head} {iou(mask, case.truth):.3f}" for head, mask in found.items()]
            rows.append(beside([label(tile, text) for tile, text in zip(tiles, (*texts, "truth"), strict=True)]))
    Image.fromarray(stack(rows)).save(out)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def tables(rows: Sequence[dict[str, Any]]) -> str:
    """Format mIoU / mBIoU by kind of prompts over the fine sets and over all, and those of mined prompts by set."""
    heads = list(dict.fromkeys(row["head"] for row in rows))
    names = list(rows[0]["figures"])
    lines: list[str] = []

    def pair(chosen: Sequence[dict[str, Any]], name: str) -> str:
        weights = [row["objects"] for row in chosen]
        one, two = np.average([row["figures"][name] for row in chosen], axis=0, weights=weights)
        return f"{one:.3f} / {two:.3f}"

    for title, fine in (("fine sets", True), ("all sets", False)):
        count = sum(row["objects"] for row in rows if row["head"] == heads[0] and (not fine or row["data"] in FINE))
        lines += [
            f"\n{title}, {count} objects\n",
            "| head | " + " | ".join(names[1:]) + " |",
            "|---" * len(names) + "|",
        ]
        for head in heads:
            mine = [row for row in rows if row["head"] == head and (not fine or row["data"] in FINE)]
            if mine:
                lines.append(f"| {head} | " + " | ".join(pair(mine, name) for name in names[1:]) + " |")
    lines += ["\nmined prompts, by set\n", "| data | objects | coarse | " + " | ".join(heads) + " |"]
    lines.append("|---" * (len(heads) + 3) + "|")
    for data in dict.fromkeys(row["data"] for row in rows):
        of_set = {row["head"]: row for row in rows if row["data"] == data}
        first = next(iter(of_set.values()))
        cells = [pair([of_set[head]], "mined") if head in of_set else "" for head in heads]
        lines.append(f"| {data} | {first['objects']} | {pair([first], 'coarse')} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("measure")
    run.add_argument("data", type=Path)
    run.add_argument("heads", nargs="+", help="a head of refine --head, or NAME=FILE")
    run.add_argument("-o", "--output", type=Path, required=True)
    run.add_argument("--model", default="embedded")
    run.add_argument("--pictures", type=int, default=40, help="pictures of each set with fine structures")
    run.add_argument("--others", type=int, default=20, help="pictures of each other set")
    show = commands.add_parser("tables")
    show.add_argument("rows", type=Path)
    paint = commands.add_parser("picture")
    paint.add_argument("data", type=Path)
    paint.add_argument("objects", nargs="+", help="SET/NUMBER")
    paint.add_argument("--heads", nargs="+", required=True)
    paint.add_argument("-o", "--output", type=Path, required=True)
    paint.add_argument("--model", default="embedded")
    paint.add_argument("--pictures", type=int, default=40)
    arguments = parser.parse_args()
    if arguments.command == "measure":
        measure(
            arguments.data,
            arguments.heads,
            arguments.output,
            model=arguments.model,
            pictures=arguments.pictures,
            others=arguments.others,
        )
    elif arguments.command == "picture":
        picture(
            arguments.data,
            arguments.objects,
            arguments.heads,
            arguments.output,
            model=arguments.model,
            pictures=arguments.pictures,
        )
    else:
        print(tables(rows_of(arguments.rows)))


if __name__ == "__main__":
    main()
