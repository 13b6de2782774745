"""From the masks of a model of yours to a refined COCO file.

    python examples/masks_to_coco.py FOLDER

FOLDER is where the photograph, `coarse.json` and `refined.json` are written.
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
    """What a model says about each image; here a square around a cat."""
    path = folder / "photos" / "cat.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    image = data.chelsea()
    Image.fromarray(image).save(path)

    found = np.zeros(image.shape[:2], dtype=np.bool_)
    found[20:280, 80:350] = True
    yield Sample("cat", path, found.shape, (Region(1, 17, masks.encode(found)),))


def main(folder: Path) -> None:
    photos = folder / "photos"
    write_coco(predictions(folder), folder / "coarse.json", images=photos, categories={17: "cat"})
    summary = refinetool.refine_dataset(folder / "coarse.json", images=photos, output=folder / "refined.json")
    print(f"{summary.refined} of {summary.masks} masks refined, {dict(summary.kept)} kept")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
