"""Small data for tests of training."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from refinetool.settings import PackSettings, TrainSettings
from refinetool.train.data.pack import Pack, pack

QUICK = TrainSettings(
    steps=4,
    side=64,
    small_side=64,
    small_share=1.0,
    images_per_step=2,
    prompts_per_image=4,
    warmup_steps=2,
    save_every=2,
    validate_every=1000,
    validation_examples=2,
)
PACKING = replace(PackSettings(), max_megabytes=None)
IGNORED = 255


def paint_folder(folder: Path, *, classes: bool, count: int = 4) -> Path:
    """A data folder of two boxes in each picture, the last picture being the val list."""
    rng = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    for number in range(count):
        ids = np.zeros((90, 120), np.uint8)
        ids[15:50, 10:60] = 1
        ids[55:85, 70:110] = 1 if classes else 2
        ids[0:4] = IGNORED
        colours = rng.integers(0, 255, (3, 3), dtype=np.uint8)
        image = colours[np.where(ids == IGNORED, 0, ids)]
        Image.fromarray(image).save(folder / "images" / f"{number}.jpg")
        Image.fromarray(ids).save(folder / "masks" / f"{number}.png")
    names = [str(number) for number in range(count)]
    (folder / "split.json").write_text(json.dumps({"train": names[:-1], "val": names[-1:]}))
    if classes:
        (folder / "classes.json").write_text("{}")
    return folder


def packed_folder(folder: Path) -> Pack:
    """A pack of a painted folder."""
    data = paint_folder(folder / "data", classes=False)
    return pack([data], folder / "pack", images=None, settings=PACKING, on_progress=lambda *_: None)
