"""Fixtures for tests of whole commands: the entry point with a fake model, and a small COCO data set."""

import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from commands import HEIGHT, WIDTH, Command, Said
from fakes import BrightBackend
from PIL import Image

from refinetool import cli
from refinetool.refine import Refiner
from refinetool.running import identity, runners
from refinetool.settings import RefineSettings


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that start Ray are run by one process, one after the other: each needs most of the memory and the cores."""
    for item in items:
        if item.get_closest_marker("ray"):
            item.add_marker(pytest.mark.xdist_group("ray"))


@pytest.fixture(autouse=True, scope="session")
def interrupts() -> Iterator[None]:
    """Ctrl-C as in a terminal: a shell starts what runs in the background with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs `refinetool ARGUMENTS` in this process, with a fake model, as the entry point does."""

    def load_refiner(_: str, *, settings: RefineSettings, **__: object) -> Refiner:
        return Refiner(BrightBackend(), settings)

    monkeypatch.setattr(runners, "load_refiner", load_refiner)
    monkeypatch.setattr(identity, "pick_device", lambda _: "cpu")
    monkeypatch.setattr(identity, "pick_precision", lambda *_: "fp32")

    def run(*arguments: object) -> Said:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["refinetool", *map(str, arguments)])
        code: object = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code
        captured = capsys.readouterr()
        assert isinstance(code, int)
        return Said(code, captured.out, captured.err)

    return run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """`coarse.json` and `images`: three bright rectangles, each with a loose polygon around it."""
    (tmp_path / "images").mkdir()
    images, annotations = [], []
    for number in (1, 2, 3):
        pixels = np.full((HEIGHT, WIDTH, 3), 40, dtype=np.uint8)
        x, y = 10 + number, 12 + number
        pixels[y : y + 20, x : x + 30] = 220
        Image.fromarray(pixels).save(tmp_path / "images" / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": WIDTH, "height": HEIGHT})
        ring = [x - 1, y - 1, x + 31, y - 1, x + 31, y + 21, x - 1, y + 21]
        annotations.append(
            {"id": 10 * number, "image_id": number, "category_id": 1, "iscrowd": 0, "segmentation": [ring]}
            | {"area": 704, "bbox": [x - 1, y - 1, 32, 22]}
        )
    record = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "box"}]}
    (tmp_path / "coarse.json").write_text(json.dumps(record, indent=1))
    return tmp_path
