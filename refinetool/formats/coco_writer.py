"""Writes a new COCO file, for masks that were not read from a file."""

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from refinetool import masks
from refinetool.errors import DataError
from refinetool.formats.storage import new_file
from refinetool.records import Region, Sample


def write_coco(
    samples: Iterable[Sample],
    destination: Path,
    *,
    images: Path,
    categories: Mapping[int, str] | None = None,
    info: Mapping[str, object] | None = None,
) -> None:
    """Write samples as COCO instances, one at a time, so that they need not fit into memory.

    Images are numbered from 1 in the order of the samples. Regions keep their ids and are written as RLE; regions
    without a mask are left out. `area` and `bbox` (x, y, width, height) are computed from the pixels; regions with a
    score get it as `score`.

    Args:
        samples: Each image once; region ids must be unique over all images.
        images: The folder that file names are relative to.
        categories: Names by number. A region without a category gets the first one, `object` by default.
        info: What to write to `info` under `refinetool`.

    Raises:
        DataError: An id occurs twice, or a category has no name.
        StorageError: The file can't be written.
    """
    names = dict(categories or {1: "object"})
    listed: list[dict[str, object]] = []
    seen: set[int] = set()
    with new_file(destination) as file:
        file.write(b'{"annotations":[')
        for number, sample in enumerate(samples, start=1):
            height, width = sample.size
            path = Path(os.path.relpath(sample.image, images)).as_posix()
            listed.append({"id": number, "file_name": path, "height": height, "width": width})
            for region in sample.regions:
                if region.mask is None:
                    continue
                if region.id in seen:
                    raise DataError(f"{sample.image}: the id {region.id} occurs twice; each mask needs its own.")
                record = _annotation(region, number, names, sample)
                file.write((b",\n" if seen else b"\n") + _dump(record))
                seen.add(region.id)
        listing = [{"id": number, "name": name} for number, name in names.items()]
        file.write(b'\n],"images":' + _dump(listed) + b',"categories":' + _dump(listing))
        file.write((b',"info":' + _dump({"refinetool": info}) if info else b"") + b"}\n")


def _annotation(region: Region, image: int, names: Mapping[int, str], sample: Sample) -> dict[str, object]:
    assert region.mask is not None
    category = next(iter(names)) if region.category is None else region.category
    if category not in names:
        raise DataError(f"{sample.image}: mask {region.id} is of category {category}, which has no name; give it one.")
    found = masks.decode_crop(region.mask)
    x0, y0, x1, y1 = (0, 0, 0, 0) if found is None else found[1]
    score = {} if region.score is None else {"score": round(region.score, 4)}
    return {
        "id": region.id,
        "image_id": image,
        "category_id": category,
        "iscrowd": 0,
        "area": masks.area(region.mask),
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "segmentation": {"size": list(region.mask.size), "counts": region.mask.counts.decode("ascii")},
        **score,
    }


def _dump(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode("ascii")
