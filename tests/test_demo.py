"""The demo: honest polygons, pictures that are there without a network, and the path that `refine` takes."""

import json
import socket
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import Command
from PIL import Image
from pycocotools import mask as coco_masks

ASSET = json.loads(Path(str(files("refinetool").joinpath("assets", "demo", "coarse.json"))).read_text())
PHOTOGRAPHS = Path(str(files("skimage").joinpath("data")))


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the demo opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize("image", ASSET["images"], ids=lambda image: image["file_name"])
def test_photographs_are_installed_and_of_the_recorded_size(image: dict[str, Any]) -> None:
    with Image.open(PHOTOGRAPHS / image["file_name"]) as photograph:
        assert photograph.size == (image["width"], image["height"])


@pytest.mark.parametrize("annotation", ASSET["annotations"], ids=lambda annotation: f"annotation {annotation['id']}")
def test_polygons_are_loose_and_their_records_true(annotation: dict[str, Any]) -> None:
    size = next((i["height"], i["width"]) for i in ASSET["images"] if i["id"] == annotation["image_id"])
    for ring in annotation["segmentation"]:
        corners = np.array(ring).reshape(-1, 2)
        assert 4 <= len(corners) <= 14
        assert (corners >= 0).all()
        assert (corners <= size[::-1]).all()
    mask = coco_masks.merge(coco_masks.frPyObjects(annotation["segmentation"], *size))
    assert annotation["area"] == coco_masks.area(mask)
    assert annotation["bbox"] == coco_masks.toBbox(mask).tolist()


def test_demo_refines_and_draws(command: Command, tmp_path: Path, offline: None) -> None:  # noqa: ARG001 - it guards
    folder = tmp_path / "new" / "demo"
    said = command("demo", folder, "--json")
    assert said.code == 0, said.err
    told = json.loads(said.out)
    assert (told["images"], told["masks"], told["failed"]) == (5, 19, 0)
    refined = json.loads((folder / "refined.json").read_text())
    assert [a["id"] for a in refined["annotations"]] == [a["id"] for a in ASSET["annotations"]]
    assert sorted(path.name for path in folder.iterdir()) == ["before-after", "coarse.json", "images", "refined.json"]
    assert len(told["pictures"]) == len(ASSET["images"])
    for path in told["pictures"]:
        with Image.open(path) as picture:
            assert min(picture.size) > 500
            assert picture.mode == "RGB"


def test_demo_says_where_to_look_and_replaces_an_earlier_one(command: Command, tmp_path: Path) -> None:
    assert command("demo", tmp_path, "--quiet").code == 0
    (tmp_path / "refined.json").write_text("stale")
    said = command("demo", tmp_path)
    assert said.code == 0
    assert str(tmp_path / "before-after" / "chelsea.png") in said.out
    assert f"refinetool refine {tmp_path / 'coarse.json'} --images {tmp_path / 'images'}" in said.out
    assert json.loads((tmp_path / "refined.json").read_text())["annotations"]


@pytest.mark.parametrize("name", ["coarse.json", "thesis.txt"])
def test_demo_leaves_other_folders_alone(command: Command, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("precious")
    said = command("demo", tmp_path)
    assert said.code == 2
    assert str(tmp_path) in said.err
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "precious"


def test_demo_in_a_place_that_cannot_be_written(command: Command, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said = command("demo", tmp_path / "file" / "demo")
    assert said.code == 1
    assert len(said.err.splitlines()) == 1
