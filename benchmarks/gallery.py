"""Draws the best and worst results of refinement: rows of image, coarse, refined and true mask.

    python benchmarks/gallery.py COARSE REFINED TRUTH --images DIR -o gallery.png

The three files hold the same annotations. The first rows are the objects that gained most IoU, the last rows those that
lost most, one per image. The picture of the model card is made with this script.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from refinetool import masks
from refinetool.formats import open_dataset
from refinetool.images import read_image
from refinetool.masks import bounding_box, iou
from refinetool.pictures import beside, draw, label, stack
from refinetool.records import BoolArray, ImageArray, Sample

TILE_PX = 240
MARGIN = 0.25
"""Margin of a tile around the object, as a fraction of the longer side of its box."""
MAX_PIXELS = 10**8


@dataclass(frozen=True)
class Change:
    """One object before and after."""

    sample: Sample
    coarse: BoolArray
    refined: BoolArray
    truth: BoolArray

    @property
    def before(self) -> float:
        return iou(self.coarse, self.truth)

    @property
    def after(self) -> float:
        return iou(self.refined, self.truth)


def changes(coarse: Path, refined: Path, truth: Path, *, images: Path) -> list[Change]:
    """Return all objects that are in all three files."""
    found = []
    files = [open_dataset(path, images=images).samples() for path in (coarse, refined, truth)]
    for samples in zip(*files, strict=True):
        known = [{region.id: region.mask for region in sample.regions} for sample in samples]
        for number in known[0]:
            rles = [masks_of.get(number) for masks_of in known]
            if all(rle is not None for rle in rles):
                before, after, right = (masks.decode(rle) for rle in rles if rle is not None)
                found.append(Change(samples[0], before, after, right))
    return found


def row(change: Change, kind: str) -> ImageArray:
    """Draw image, coarse, refined and true mask of one object."""
    height, width = change.truth.shape
    x0, y0, x1, y1 = bounding_box(change.truth | change.coarse) or (0, 0, width, height)
    side = min(max(x1 - x0, y1 - y0) * (1 + 2 * MARGIN), height, width)
    left = round(min(max(0, (x0 + x1 - side) / 2), width - side))
    top = round(min(max(0, (y0 + y1 - side) / 2), height - side))
    window = (left, top, left + int(side), top + int(side))
    pixels = read_image(change.sample.image, size=change.sample.size, max_pixels=MAX_PIXELS)
    pixels = stretched(pixels, shown=pixels[top : top + int(side), left : left + int(side)])
    nothing = np.zeros((0, height, width), np.bool_)
    titles = (kind, f"coarse {change.before:.2f}", f"refined {change.after:.2f}", "truth")
    shown = (nothing, change.coarse[None], change.refined[None], change.truth[None])
    scale = TILE_PX / int(side)
    tiles = [draw(pixels, mask, window, scale=scale, dim=0.55 if len(mask) else 1.0) for mask in shown]
    return beside([label(tile, title) for tile, title in zip(tiles, titles, strict=True)])


def title_of(change: Change) -> str:
    if change.after == change.before:
        return "unchanged"
    return "gained most" if change.after > change.before else "lost most"


def stretched(image: ImageArray, *, shown: ImageArray) -> ImageArray:
    """Brighten a dark image, so that the shown part of it uses all values."""
    brightest = max(1.0, float(np.percentile(shown, 99.5)))
    brightened: ImageArray = np.clip(image * (255 / brightest), 0, 255).astype(np.uint8)
    return brightened


def chosen(found: list[Change], *, rows: int) -> list[Change]:
    """Choose the objects that gained most and those that lost most, one per image."""
    picked: list[Change] = []
    used: set[str] = set()
    ordered = sorted(found, key=lambda change: change.before - change.after)
    for some in (ordered, ordered[::-1]):
        fresh: list[Change] = []
        for change in some:
            if len(fresh) < rows and change.sample.key not in used:
                used.add(change.sample.key)
                fresh.append(change)
        picked += fresh if some is ordered else fresh[::-1]
    return picked


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("coarse", "refined", "truth"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=3, help="rows of each kind")
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    found = changes(arguments.coarse, arguments.refined, arguments.truth, images=arguments.images)
    rows = chosen(found, rows=arguments.rows)
    titles = [title_of(change) for change in rows]
    picture = stack([row(change, title) for change, title in zip(rows, titles, strict=True)])
    Image.fromarray(picture).save(arguments.output, optimize=True)


if __name__ == "__main__":
    main()
