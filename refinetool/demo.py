"""Runs refinement on example data that need no network: photographs from the scikit-image wheel, with loose polygons
drawn by hand around their objects.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
from PIL import Image

from refinetool import masks, pictures
from refinetool.errors import StorageError, UsageError
from refinetool.formats import open_dataset
from refinetool.images import read_sample
from refinetool.records import Masks, Sample
from refinetool.running.run import refine_dataset
from refinetool.running.summary import Progress, Summary
from refinetool.settings import RefineSettings

ZOOM = 3.5
"""Magnification of the second row of a picture, relative to the first."""
IMAGES, COARSE, REFINED, PICTURES = "images", "coarse.json", "refined.json", "before-after"


@dataclass(frozen=True, slots=True)
class Demo:
    """The files of a demo: the coarse and the refined file, the images, and one before/after picture per image."""

    coarse: Path
    images: Path
    refined: Path
    pictures: tuple[Path, ...]
    summary: Summary


def run_demo(
    folder: Path,
    *,
    model: str,
    checkpoint: str | None,
    device: str,
    precision: str,
    settings: RefineSettings,
    threads: int,
    on_progress: Callable[[Progress], None],
) -> Demo:
    """Write photographs and coarse polygons to a folder, refine them as `refine` does, and draw before and after.

    Args:
        folder: Created if needed. An earlier demo in it is replaced; anything else is not touched.

    Raises:
        UsageError: The folder holds something else, or there is no such model or device.
        WeightsError: The weights can't be loaded.
        StorageError: The folder can't be written.
        Interrupted: Stopped by the user.
    """
    coarse, images, refined = folder / COARSE, folder / IMAGES, folder / REFINED
    check_folder(folder)
    try:
        lay_out(folder)
        summary = refine_dataset(
            coarse,
            images=images,
            output=refined,
            model=model,
            checkpoint=checkpoint,
            device=device,
            precision=precision,
            settings=settings,
            format=None,
            sizes=None,
            limit=None,
            resume=False,
            fresh=True,
            overwrite=True,
            dry_run=False,
            threads=threads,
            on_progress=on_progress,
        )
        drawn = draw_pictures(coarse, refined, images=images, folder=folder / PICTURES, settings=settings)
    except OSError as error:
        raise StorageError(f"{folder}: the demo can't be written ({error.strerror}); name another folder") from error
    return Demo(coarse, images, refined, drawn, summary)


def check_folder(folder: Path) -> None:
    """Raise UsageError if the folder exists and is not an earlier demo's."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    ours = folder / COARSE
    if not ours.is_file() or ours.read_bytes() != _asset().read_bytes():
        raise UsageError(f"{folder}: holds something other than a demo; name another folder: refinetool demo FOLDER")


def lay_out(folder: Path) -> None:
    """Write the coarse file, and the photographs it lists."""
    images = folder / IMAGES
    images.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(_asset(), folder / COARSE)
    photographs = Path(str(files("skimage").joinpath("data")))
    for image in json.loads(_asset().read_bytes())["images"]:
        shutil.copyfile(photographs / image["file_name"], images / image["file_name"])


def draw_pictures(
    coarse: Path, refined: Path, *, images: Path, folder: Path, settings: RefineSettings
) -> tuple[Path, ...]:
    """Draw one before/after picture per image of two files with the same images and ids, in their order."""
    folder.mkdir(parents=True, exist_ok=True)
    before, after = (
        open_dataset(file, images=images, format=None, sizes=None, include_crowd=False).samples()
        for file in (coarse, refined)
    )
    drawn = []
    for loose, tight in zip(before, after, strict=True):
        image = read_sample(loose, max_pixels=settings.max_pixels)
        picture = pictures.panel(image, _stack(loose), _stack(tight), zoom=ZOOM)
        drawn.append(folder / f"{loose.image.stem}.png")
        Image.fromarray(picture).save(drawn[-1], compress_level=3)
    return tuple(drawn)


def _stack(sample: Sample) -> Masks:
    """Return the masks of a sample, bool (N, H, W); one that can't be decoded is empty."""
    nothing = np.zeros(sample.size, dtype=np.bool_)
    regions = [nothing if region.mask is None else masks.decode(region.mask) for region in sample.regions]
    return np.stack(regions) if regions else np.zeros((0, *sample.size), dtype=np.bool_)


def _asset() -> Path:
    return Path(str(files("refinetool").joinpath("assets", "demo", COARSE)))
