"""The examples of docs/design/extending.md work as they stand there."""

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from commands import Command
from fakes import BrightBackend
from PIL import Image

import refinetool
from refinetool import masks, refine
from refinetool.backends.models import MODELS, Model
from refinetool.evaluate import evaluate
from refinetool.evaluate.evaluators import Metrics
from refinetool.formats import FORMATS, open_dataset
from refinetool.post import post_steps
from refinetool.records import BoolArray, ImageArray
from refinetool.refine import Refiner
from refinetool.settings import NO_GUARD, RefineSettings

PAGE = (Path(__file__).parent.parent / "docs" / "design" / "extending.md").read_text()
EXAMPLES = dict(re.findall(r"^```python (\S+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL))


def module_of(name: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """An example as a module that can be imported as `example`."""
    module = ModuleType("example")
    monkeypatch.setitem(sys.modules, "example", module)
    exec(compile(EXAMPLES[name], name, "exec"), module.__dict__)
    return module


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_are_short(name: str) -> None:
    assert len([line for line in EXAMPLES[name].splitlines() if line.strip()]) <= 32


def picture() -> tuple[ImageArray, BoolArray]:
    """A bright ring, and a coarse mask of it without its hole."""
    rows, columns = np.mgrid[:60, :80]
    distance = np.hypot(columns - 40, rows - 30)
    ring = (distance < 20) & (distance > 6)
    return np.where(ring[..., None], 255, 0).repeat(3, axis=2).astype(np.uint8), distance < 18


def test_a_post_step(monkeypatch: pytest.MonkeyPatch) -> None:
    example = module_of("post/holes.py", monkeypatch)
    image, coarse = picture()
    refiner = Refiner(BrightBackend(), RefineSettings(guard=NO_GUARD))
    (plain,) = refiner.refine_image(image, coarse[None])
    monkeypatch.setattr(refine, "post_steps", lambda settings: (example.fill_holes, *post_steps(settings)))
    (filled,) = refiner.refine_image(image, coarse[None])
    assert masks.has_holes(plain.mask)
    assert not masks.has_holes(filled.mask)


def test_a_format(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: Command) -> None:
    module_of("formats/npy.py", monkeypatch)
    monkeypatch.setitem(FORMATS, "npy", "example:open_npy")  # type: ignore[arg-type]
    (tmp_path / "masks").mkdir()
    image, coarse = picture()
    Image.fromarray(image).save(tmp_path / "masks" / "ring.jpg", quality=95)
    np.save(tmp_path / "masks" / "ring.npy", coarse[None])
    said = command("refine", tmp_path / "masks", "--format", "npy", "--output", tmp_path / "refined")
    assert said.code == 0, said.err
    (refined,) = np.load(tmp_path / "refined" / "ring.npy")
    assert masks.iou(refined, image[..., 0] > 128) > 0.95 > masks.iou(coarse, image[..., 0] > 128)


def test_a_metric(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    example = module_of("evaluate/area.py", monkeypatch)
    usual = Metrics.make_evaluators
    monkeypatch.setattr(Metrics, "make_evaluators", lambda self: (*usual(self), example.AreaEvaluator()))
    coarse = open_dataset(folder / "coarse.json", images=folder / "images")
    measures = {measure.name: measure.value for measure in evaluate(coarse, coarse).measures}
    assert measures["area error"] == 0
    assert measures["IoU"] == 1


def test_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    module_of("backends/tiny_sam.py", monkeypatch)
    monkeypatch.setitem(MODELS, "tiny-sam", Model("tiny-sam", "SAM, small encoder", "example:TinySamBackend", ""))
    settings = RefineSettings(guard=NO_GUARD)
    refiner = refinetool.load("tiny-sam", checkpoint="random:0", device="cpu", settings=settings)
    image, coarse = picture()
    (refined,) = refiner.refine_image(image, coarse[None])
    assert refined.mask.shape == coarse.shape
    assert refined.predicted_iou is not None
