"""Draw the picture at the top of the README from a finished demo: coarse masks above, refined ones below.

refinetool demo
python docs/draw_demo.py refinetool-demo docs/images/demo.jpg
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from refinetool import masks
from refinetool.formats import open_dataset
from refinetool.images import read_sample
from refinetool.pictures import beside, draw, label, stack
from refinetool.records import ImageArray
from refinetool.settings import MAX_PIXELS

SHOWN = ("astronaut", "coffee", "coins")
HEIGHT_PX = 420
DIM = 0.45


def row(file: Path, images: Path, text: str) -> ImageArray:
    """Draw the masks of one file, a tile per photograph."""
    tiles = []
    for sample in open_dataset(file, images=images).samples():
        if sample.image.stem in SHOWN:
            image = read_sample(sample, max_pixels=MAX_PIXELS)
            height, width = sample.size
            regions = np.stack([masks.decode(region.mask) for region in sample.regions if region.mask is not None])
            tiles.append(draw(image, regions, (0, 0, width, height), scale=HEIGHT_PX / height, dim=DIM))
    return beside([label(tiles[0], text), *tiles[1:]])


if __name__ == "__main__":
    demo, out = map(Path, sys.argv[1:])
    rows = [row(demo / f"{text}.json", demo / "images", text) for text in ("coarse", "refined")]
    Image.fromarray(stack(rows)).save(out, quality=88)
