"""What was done to each object, and figures over many objects: how far coarse masks are from good ones, by band."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import cv2
import numpy as np

from refinetool.corrupt.goals import CorruptionInfo
from refinetool.formats.csv_table import write_table
from refinetool.formats.storage import new_file
from refinetool.masks import boundary_iou, bounding_box, iou
from refinetool.records import Mask, Region, Sample

ALL = "all"


@dataclass(frozen=True, slots=True)
class Made:
    """One coarse mask.

    image: Path of the image.
    id, category: Those of the annotation; the value of the pixels in a map.
    generator: What made it.
    low, high: The band of IoU that was asked for.
    iou, boundary_iou: With the good mask. In maps, where objects share pixels, of what was left to the object.
    reached: Whether the IoU lies in the band.
    tries: Attempts it took.
    defects: What was done, in order, joined by "+".
    trail: IoU after each step of a composition, joined by "+".
    components, holes: Connected parts (8 neighbours) of the coarse mask, and of the background it encloses.
    area, coarse_area: Pixels of the good and of the coarse mask.
    """

    image: str
    id: int
    category: int | None
    generator: str
    low: float
    high: float
    iou: float
    boundary_iou: float
    reached: bool
    tries: int
    defects: str
    trail: str
    components: int
    holes: int
    area: int
    coarse_area: int


@dataclass(frozen=True, slots=True)
class BandFigures:
    """Figures of the coarse masks of one generator and band, or of all (`generator` is `all`)."""

    generator: str
    low: float
    high: float
    count: int
    reached: float
    """Fraction whose IoU lies in the band."""
    mean_iou: float
    median_iou: float
    mean_boundary_iou: float
    mean_components: float
    mean_holes: float


def describe(
    sample: Sample, region: Region, gt: Mask, coarse: Mask, info: CorruptionInfo, *, boundary_ratio: float
) -> Made:
    """Measure one coarse mask as it is written; what it was made as may have lost pixels to others of its map."""
    overlap = iou(coarse, gt)
    components, holes = count_parts(coarse)
    return Made(
        image=str(sample.image),
        id=region.id,
        category=region.category,
        generator=info.generator,
        low=info.low,
        high=info.high,
        iou=overlap,
        boundary_iou=boundary_iou(coarse, gt, boundary_ratio),
        reached=bool(info.defects) and info.low <= overlap <= info.high and bool(coarse.any()),
        tries=info.tries,
        defects="+".join(info.defects),
        trail="+".join(f"{step:.4f}" for step in info.trail),
        components=components,
        holes=holes,
        area=int(np.count_nonzero(gt)),
        coarse_area=int(np.count_nonzero(coarse)),
    )


def count_parts(mask: Mask) -> tuple[int, int]:
    """Connected parts of a mask (8 neighbours), and of the background that it encloses (4 neighbours)."""
    box = bounding_box(mask)
    if box is None:
        return 0, 0
    x0, y0, x1, y1 = box
    framed = np.pad(mask[y0:y1, x0:x1], 1).view(np.uint8)
    parts, _ = cv2.connectedComponents(framed, connectivity=8)
    gaps, _ = cv2.connectedComponents(1 - framed, connectivity=4)
    return parts - 1, gaps - 2  # label 0 stands for what is not counted; the frame around it is no hole


def figures(made: Iterable[Made]) -> list[BandFigures]:
    """Figures by generator and band, in order of name, and over all if there is more than one."""
    groups: dict[tuple[str, float, float], list[Made]] = {}
    for each in made:
        groups.setdefault((each.generator, each.low, each.high), []).append(each)
    rows = [_figures(name, low, high, groups[name, low, high]) for name, low, high in sorted(groups)]
    if len(rows) > 1:
        everything = [each for group in groups.values() for each in group]
        low, high = min(row.low for row in rows), max(row.high for row in rows)
        rows.append(_figures(ALL, low, high, everything))
    return rows


def _figures(generator: str, low: float, high: float, made: Sequence[Made]) -> BandFigures:
    def mean(name: str) -> float:
        return float(np.mean([getattr(each, name) for each in made]))

    return BandFigures(
        generator=generator,
        low=low,
        high=high,
        count=len(made),
        reached=mean("reached"),
        mean_iou=mean("iou"),
        median_iou=float(np.median([each.iou for each in made])),
        mean_boundary_iou=mean("boundary_iou"),
        mean_components=mean("components"),
        mean_holes=mean("holes"),
    )


def write_record(made: Iterable[Made], path: Path) -> None:
    """Write one entry per coarse mask: a JSON list to `*.json`, else a CSV table.

    Raises:
        StorageError: The file can't be written.
    """
    with new_file(path) as raw:
        if path.suffix.lower() == ".json":
            raw.write(json.dumps([asdict(each) for each in made], indent=1).encode())
            return
        write_table(raw, [field.name for field in fields(Made)], (tuple(asdict(each).values()) for each in made))
