"""Writes the masks of your own model to a COCO file, and refines it.

    python examples/masks_to_coco.py [FOLDER]

The photograph, `coarse.json` and `refined.json` are written to FOLDER, or to `masks-to-coco`. To use your own model,
let `predictions` yield its masks.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from skimage import data

import refinetool
from refinetool import masks
from refinetool.formats.coco_writer import write_coco
from refinetool.records import Region, Sample


def predictions(folder: Path) -> Iterator[Sample]:
    """Yield a model's masks for each image; here a rough ellipse around a cup."""
    path = folder / "photos" / "coffee.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    image = data.coffee()
    Image.fromarray(image).save(path)

    height, width = image.shape[:2]
    rows, columns = np.mgrid[:height, :width]
    cup = ((columns - 340) / 190) ** 2 + ((rows - 190) / 150) ** 2 < 1
    yield Sample("coffee", path, (height, width), (Region(1, 47, masks.encode(cup)),))


def main(folder: Path) -> None:
    photos = folder / "photos"
    write_coco(predictions(folder), folder / "coarse.json", images=photos, categories={47: "cup"})
    summary = refinetool.refine_dataset(folder / "coarse.json", images=photos, output=folder / "refined.json")
    print(f"{summary.refined} of {summary.masks} masks refined, written to {summary.output}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "masks-to-coco"))
