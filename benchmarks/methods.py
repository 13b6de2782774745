"""Compares methods on corrupted masks, and writes the tables of docs/benchmarks.md.

    python benchmarks/methods.py measure DATA -o rows.jsonl
    python benchmarks/methods.py ablate COARSE TRUTH --images DIR --name NAME -o tables.jsonl
    python benchmarks/methods.py page rows.jsonl docs/benchmarks.md --tables tables.jsonl

DATA is a folder of data folders. From those with `images/`, `masks/` and `split.json`, objects of the validation split
are taken and corrupted by the suites of `refinetool corrupt`; those with `annotations.json` and `coarse_*.json` are
measured as they are. Each method refines each file with `refinetool.refine_dataset`, and the output is measured like in
`refinetool eval`. Void pixels (255 in `masks/`) do not count: in VOC a band of them lies around every object, somewhere
in which its outline is. `measure` appends a line per method and file and skips existing lines, so it can be
interrupted; `page` writes the tables between the marks of the page.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from refinetool import masks
from refinetool.ablation import ablate
from refinetool.corrupt.dataset import corrupt_dataset
from refinetool.corrupt.suites import SUITES, Suite, single
from refinetool.evaluate import Report, evaluate
from refinetool.formats import Dataset, open_dataset
from refinetool.masks import components
from refinetool.records import VOID, BoolArray, Sample
from refinetool.running.run import refine_dataset
from refinetool.settings import ABLATION, METHODS, NO_GUARD, EvaluateSettings, GridSettings, RefineSettings

SEED = 2024
MIN_OBJECT_PX = 400
PER_PICTURE = 2

SUITES_MEASURED: dict[str, Suite] = {
    "superpixels (davis-like)": SUITES["davis-like"],
    "boundary": SUITES["boundary"],
    "heat map": single("heat-map"),
    "low resolution": single("blobs").with_band(0.4, 0.8),
    "weak": SUITES["weak"],
    "nearly right": single("boundary").with_band(0.95, 0.99),
}
GRIDS = ("grid-max-iou", "grid-merge")
"""Slow, since they use hundreds of points per image; measured only on the COCO files."""

GRID = GridSettings(points_per_side=16, min_predicted_iou=0.5, min_stability=0.8)
"""A quarter of the usual points, and thresholds that the embedded model reaches, which is less confident than SAM."""

VARIANTS: dict[str, RefineSettings] = {
    "embedded": METHODS["samrefiner"],
    "embedded, no guard": replace(METHODS["samrefiner"], guard=NO_GUARD),
    **{name: replace(settings, grid=GRID) for name, settings in METHODS.items() if name != "samrefiner"},
}


@dataclass(frozen=True)
class Row:
    """One method on one file. Values are in 0..1, means over objects; `gain_error` is the standard error of the mean
    gain of IoU."""

    data: str
    suite: str
    method: str
    objects: int
    coarse: float
    coarse_boundary: float | None
    refined: float
    refined_boundary: float | None
    better: float | None
    worse: float | None
    gain_error: float | None
    seconds: float
    model: str


@dataclass(frozen=True)
class Job:
    """Files with coarse masks and their ground truth."""

    data: str
    suite: str
    coarse: Path
    truth: Path
    images: Path
    format: str
    with_grids: bool
    id_maps: Path | None = None
    """The folder of the id maps, whose void pixels do not count; None if all pixels count."""


# --- data


def val_objects(folder: Path, out: Path, *, pictures: int, seed: int) -> int:
    """Write objects of a validation split as COCO JSON; returns how many. Classes are split into components."""
    stems = sorted(json.loads((folder / "split.json").read_text())["val"])
    rng = np.random.default_rng(seed)
    chosen = sorted(rng.permutation(len(stems))[:pictures].tolist())
    files = {path.stem: path for path in (folder / "images").iterdir()}
    by_class = (folder / "classes.json").is_file()
    images: list[dict[str, object]] = []
    annotations: list[dict[str, object]] = []
    for number, stem in enumerate((stems[n] for n in chosen), start=1):
        ids = np.array(Image.open(folder / "masks" / f"{stem}.png"))
        height, width = ids.shape
        images.append({"id": number, "file_name": files[stem].name, "width": width, "height": height})
        found = list(objects(ids, by_class=by_class))
        for mask in (found[n] for n in sorted(rng.permutation(len(found))[:PER_PICTURE].tolist())):
            rle = masks.encode(mask)
            x0, y0, x1, y1 = masks.bounding_box(mask) or (0, 0, 0, 0)
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": 1,
                    "iscrowd": 0,
                    "segmentation": {"size": list(rle.size), "counts": rle.counts.decode()},
                    "area": int(mask.sum()),
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                }
            )
    record = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "object"}]}
    out.write_text(json.dumps(record))
    return len(annotations)


def objects(ids: np.ndarray, *, by_class: bool) -> Iterator[BoolArray]:
    """Yield the objects of an id map, uint8 (H, W), that are neither specks nor nearly the whole picture."""
    for value in np.unique(ids):
        if value in (0, VOID):
            continue
        whole = ids == value
        parts: Sequence[BoolArray] = [whole]
        if by_class:
            found = components(whole)
            parts = [found.labels == n + 1 for n in range(len(found)) if found.areas[n] >= MIN_OBJECT_PX]
        yield from (part for part in parts if part.sum() >= MIN_OBJECT_PX and part.mean() < 0.8)


def jobs_of(data: Path, work: Path, *, pictures: int, seed: int) -> Iterator[Job]:
    """Yield everything to measure; coarse files are made in `work` when they are needed."""
    for folder in sorted(path for path in data.iterdir() if path.is_dir()):
        if (folder / "annotations.json").is_file():
            truth, images = folder / "annotations.json", folder / "images"
            for coarse in sorted(folder.glob("coarse_*.json")):
                yield Job(
                    folder.name, coarse.stem.removeprefix("coarse_"), coarse, truth, images, "coco", with_grids=True
                )
            continue
        if not (folder / "split.json").is_file():
            continue
        truth = work / f"{folder.name}.json"
        if not val_objects(folder, truth, pictures=pictures, seed=seed):
            continue
        for name, suite in SUITES_MEASURED.items():
            coarse, images = work / f"{folder.name} {name}.json", folder / "images"
            corrupt_dataset(truth, output=coarse, suite=suite, images=images, format="coco", overwrite=True)
            files = coarse, truth, images, "coco"
            yield Job(f"{folder.name} val", name, *files, with_grids=False, id_maps=folder / "masks")


# --- measuring


def measured(job: Job, method: str, settings: RefineSettings, *, model: str, checkpoint: str | None, work: Path) -> Row:
    output = work / "refined.json"
    started = time.perf_counter()
    refine_dataset(
        job.coarse,
        output=output,
        images=job.images,
        model=model,
        checkpoint=checkpoint,
        settings=settings,
        format=job.format,
        fresh=True,
        overwrite=True,
    )
    seconds = time.perf_counter() - started
    report = evaluated(output, job)
    figures = {measure.name: measure for measure in report.measures}
    iou, boundary = figures["IoU"], figures["boundary IoU"]
    assert iou.value is not None and iou.before is not None
    return Row(
        data=job.data,
        suite=job.suite,
        method=method,
        objects=report.counts["scored"],
        coarse=iou.before,
        coarse_boundary=boundary.before,
        refined=iou.value,
        refined_boundary=boundary.value,
        better=report.better,
        worse=report.worse,
        gain_error=report.gain_error,
        seconds=seconds,
        model=model,
    )


def known_pixels(sample: Sample, id_maps: Path | None) -> BoolArray:
    """Return the pixels of an image that are not void, bool (H, W)."""
    if id_maps is None:
        return np.ones(sample.size, np.bool_)
    known: BoolArray = np.array(Image.open(id_maps / f"{sample.image.stem}.png")) != VOID
    return known


@dataclass(frozen=True)
class WithVoid:
    """Ground truth whose void pixels do not count; see `evaluate.Source`."""

    truth: Dataset
    id_maps: Path | None

    @property
    def format(self) -> str:
        return self.truth.format

    def samples(self) -> Iterator[Sample]:
        for sample in self.truth.samples():
            yield replace(sample, void=masks.encode(~known_pixels(sample, self.id_maps)))


def evaluated(output: Path, job: Job) -> Report:
    prediction, truth, coarse = (
        open_dataset(path, images=job.images, format=job.format, need_images=False)
        for path in (output, job.truth, job.coarse)
    )
    return evaluate(
        prediction,
        WithVoid(truth, job.id_maps),
        coarse=coarse,
        boundary_ratio=EvaluateSettings().boundary_ratio,
        protocol="none",
    )


def measure(arguments: argparse.Namespace) -> None:
    output: Path = arguments.output
    done = {(row.data, row.suite, row.method) for row in read_rows(output)} if output.exists() else set()
    with tempfile.TemporaryDirectory() as folder, output.open("a") as lines:
        work = Path(folder)
        for job in jobs_of(arguments.data, work, pictures=arguments.pictures, seed=SEED):
            for method, settings in VARIANTS.items():
                unwanted = arguments.only and method not in arguments.only
                if unwanted or (job.data, job.suite, method) in done or (method in GRIDS and not job.with_grids):
                    continue
                row = measured(job, method, settings, model=arguments.model, checkpoint=arguments.checkpoint, work=work)
                lines.write(json.dumps(asdict(row)) + "\n")
                lines.flush()
                print(f"{row.data}, {row.suite}, {method}: {row.coarse:.3f} -> {row.refined:.3f}", flush=True)


def read_rows(path: Path) -> list[Row]:
    return [Row(**json.loads(line)) for line in path.read_text().splitlines()]


# --- ablations


def ablations(arguments: argparse.Namespace) -> None:
    """Append the tables of `refinetool ablate` for one pair of files."""
    done = read_tables(arguments.output) if arguments.output.exists() else []
    for name in arguments.tables:
        if any((table["data"], table["name"]) == (arguments.name, name) for table in done):
            continue
        (found,) = ablate(
            arguments.coarse,
            arguments.truth,
            images=arguments.images,
            tables=(name,),
            model=arguments.model,
            checkpoint=arguments.checkpoint,
            device="auto",
            precision="auto",
            head="auto",
            iou_adapter=arguments.iou_adapter,
            base=ABLATION,
            format=arguments.format,
            sizes=None,
            follow_links=False,
            mask_suffix="",
            limit=None,
            boundary_ratio=EvaluateSettings().boundary_ratio,
            on_progress=lambda _, __: None,
        )
        with arguments.output.open("a") as lines:
            lines.write(json.dumps({"data": arguments.name, **asdict(found)}) + "\n")
        print(f"{arguments.name}: {name}", flush=True)


def read_tables(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- the page


def page(arguments: argparse.Namespace) -> None:
    """Write the tables between the marks of a page; the rest of the page stays."""
    text = arguments.page.read_text()
    rows = read_rows(arguments.rows)
    lists = [row for row in rows if row.data.endswith(" val")]
    blocks = {
        "coco": per_file([row for row in rows if row not in lists]),
        "suites": per_suite(lists),
        "sets": per_file([row for row in lists if row.method != "embedded, no guard"]),
        "ablations": "\n\n".join(map(ablation_table, read_tables(arguments.tables))) if arguments.tables else None,
    }
    for name, block in blocks.items():
        if block is not None:
            text = between_marks(text, name, block)
    arguments.page.write_text(text)


def between_marks(text: str, name: str, block: str) -> str:
    """Replace the text between `<!-- name -->` and `<!-- /name -->` by a block."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, _, rest = text.partition(start)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"the page has no marks {start} and {end}")
    return f"{before}{start}\n{block}\n{end}{after}"


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def pair(iou: float, boundary: float | None) -> str:
    return f"{iou:.3f}" if boundary is None else f"{iou:.3f} / {boundary:.3f}"


def per_file(rows: Sequence[Row]) -> str:
    """Make a table with a line per file and a column per method; the best IoU of a line is bold."""
    return comparison(rows, group=lambda row: f"{row.data}, {row.suite}")


def per_suite(rows: Sequence[Row]) -> str:
    """Make a table with a line per suite over all data sets; every object counts once."""
    return comparison(rows, group=lambda row: row.suite)


def comparison(rows: Sequence[Row], *, group: Callable[[Row], str]) -> str:
    methods = [name for name in VARIANTS if any(row.method == name for row in rows)]
    lines = []
    for name in dict.fromkeys(map(group, rows)):
        here = [row for row in rows if group(row) == name]
        files = list({row.data: row for row in here}.values())
        cells = {method: mean([row for row in here if row.method == method]) for method in methods}
        best = max(found[0] for found in cells.values() if found is not None)
        coarse = pair(average(files, lambda row: row.coarse), average(files, lambda row: row.coarse_boundary))
        shown = [
            "-" if found is None else f"**{pair(*found)}**" if found[0] == best else pair(*found)
            for found in cells.values()
        ]
        first = [row for row in here if row.method == methods[0]]
        changes = [f"{average(first, change):.0%}" for change in (lambda row: row.better, lambda row: row.worse)]
        count = str(sum(row.objects for row in files))
        lines.append([name, count, coarse, shown[0], gain(first), " / ".join(changes), *shown[1:]])
    return markdown(["", "masks", "coarse", methods[0], "its gain", "better / worse", *methods[1:]], lines)


def gain(rows: Sequence[Row]) -> str:
    """Format the mean gain of IoU over the objects of all rows, and its standard error."""
    objects = sum(row.objects for row in rows)
    squares = sum((row.objects * (row.gain_error or 0.0)) ** 2 for row in rows)
    return f"{average(rows, lambda row: row.refined - row.coarse):+.3f} ± {squares**0.5 / objects:.3f}"


def mean(rows: Sequence[Row]) -> tuple[float, float] | None:
    if not rows:
        return None
    return average(rows, lambda row: row.refined), average(rows, lambda row: row.refined_boundary)


def average(rows: Sequence[Row], figure: Callable[[Row], float | None]) -> float:
    """Average a figure over objects, where each row holds the mean over its objects."""
    return sum(row.objects * (figure(row) or 0.0) for row in rows) / sum(row.objects for row in rows)


def ablation_table(table: Mapping[str, Any]) -> str:
    """Format one table of `refinetool ablate`; values are multiplied by 100."""
    if table["name"] == "split":
        rows = [[score["name"], f"{100 * score['miou']:.2f}"] for score in table["plain"]]
        return f"{table['data']}, {table['name']}:\n\n" + markdown(["", "mIoU"], rows)
    variants = [table["plain"], *([table["adapted"]] if table["adapted"] else [])]
    rows = [
        [scores[0]["name"], *(text for score in scores for text in figures_of(score))]
        for scores in zip(*variants, strict=True)
    ]
    headings = ["", "IoU", "boundary IoU", "top-1"] + (
        ["IoU, adapted", "boundary IoU, adapted", "top-1, adapted"] * (len(variants) - 1)
    )
    return f"{table['data']}, {table['name']}:\n\n" + markdown(headings, rows)


def figures_of(score: Mapping[str, Any]) -> tuple[str, str, str]:
    top1 = "-" if score["top1"] is None else f"{100 * score['top1']:.1f}"
    return f"{100 * score['iou']:.1f}", f"{100 * score['boundary_iou']:.1f}", top1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    measuring = commands.add_parser("measure", help="refine and measure")
    measuring.add_argument("data", type=Path)
    measuring.add_argument("--pictures", type=int, default=40, help="pictures per validation split")
    measuring.add_argument("--only", nargs="+", choices=VARIANTS, help="methods to run instead of all")
    measuring.set_defaults(run=measure)
    ablating = commands.add_parser("ablate", help="the paper's tables for one pair of files")
    ablating.add_argument("coarse", type=Path)
    ablating.add_argument("truth", type=Path)
    ablating.add_argument("--images", type=Path)
    ablating.add_argument("--format")
    ablating.add_argument("--name", required=True, help="name of the data in the page")
    ablating.add_argument("--tables", nargs="+", default=["prompts", "points", "boxes", "selection"])
    ablating.add_argument("--iou-adapter", type=Path)
    ablating.set_defaults(run=ablations)
    for command in (measuring, ablating):
        command.add_argument("-o", "--output", type=Path, required=True, help="JSON Lines file to append to")
        command.add_argument("--model", default="embedded")
        command.add_argument("--checkpoint")
    writing = commands.add_parser("page", help="write the tables into a page")
    writing.add_argument("rows", type=Path)
    writing.add_argument("page", type=Path)
    writing.add_argument("--tables", type=Path, help="file that `ablate` wrote")
    writing.set_defaults(run=page)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
