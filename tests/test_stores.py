"""Images and masks in an object store, here one in memory: the same output as from a folder."""

import json
import sys
from pathlib import Path

import pytest
from commands import Command
from upath import UPath

from refinetool.errors import UsageError
from refinetool.locations import is_remote, location


@pytest.fixture
def store(folder: Path) -> str:
    """The files of `folder` in a store."""
    place = UPath(f"memory://{folder.name}")
    (place / "images").mkdir(parents=True, exist_ok=True)
    for path in (folder / "images").iterdir():
        (place / "images" / path.name).write_bytes(path.read_bytes())
    (place / "coarse.json").write_bytes((folder / "coarse.json").read_bytes())
    return str(place)


def test_images_and_masks_of_a_store_are_refined_as_those_of_a_folder(
    command: Command, folder: Path, store: str
) -> None:
    assert command("refine", folder / "coarse.json", "-o", folder / "local.json").code == 0
    for coarse in (folder / "coarse.json", f"{store}/coarse.json"):
        said = command("refine", coarse, "--images", f"{store}/images", "-o", folder / "out.json", "--overwrite")
        assert (said.code, "3 of 3 masks refined" in said.out) == (0, True), said.err
        assert (folder / "out.json").read_bytes() == (folder / "local.json").read_bytes()
    assert json.loads((folder / "out.json").read_text())["annotations"][0]["area"] == 600


def test_a_run_with_a_store_is_resumed(command: Command, folder: Path, store: str) -> None:
    arguments = ("refine", folder / "coarse.json", "--images", f"{store}/images", "-o", folder / "out.json")
    command(*arguments, "--limit", 2)
    assert "2 of them from an earlier run" in command(*arguments, "--resume").out
    command(*arguments, "--limit", 2, "--overwrite")
    (UPath(store) / "images" / "1.png").write_bytes((folder / "images" / "1.png").read_bytes() + b"x")
    assert "1 of them from an earlier run" in command(*arguments, "--resume").out, "the changed image is done again"


def test_a_missing_image_of_a_store_is_told(command: Command, folder: Path, store: str) -> None:
    (UPath(store) / "images" / "2.png").unlink()
    said = command("refine", folder / "coarse.json", "--images", f"{store}/images", "-o", folder / "out.json")
    assert said.code == 1
    assert "images/2.png: there is no such image" in said.err


def test_names_can_not_lead_into_another_store(command: Command, folder: Path, store: str) -> None:
    secret = UPath("memory://secret/x.png")
    secret.parent.mkdir(parents=True, exist_ok=True)
    secret.write_bytes((folder / "images" / "1.png").read_bytes())
    record = json.loads((folder / "coarse.json").read_text())
    for name in ("memory://secret/x.png", "file:///etc/passwd", "../../secret/x.png", "/secret/x.png"):
        record["images"][0]["file_name"] = name
        (folder / "coarse.json").write_text(json.dumps(record))
        options = ["--images", f"{store}/images", "-o", folder / "out.json", "--fresh", "--overwrite", "--json"]
        said = command("refine", folder / "coarse.json", *options)
        assert said.code == 1, name
        assert json.loads(said.out)["kept"] == {"image-missing": 1}
        assert len(said.err.strip().splitlines()) <= 4, said.err


def test_outputs_are_local(command: Command, store: str) -> None:
    said = command("refine", f"{store}/coarse.json", "--images", f"{store}/images")
    assert said.code == 2
    assert "can't be written to a store; name a local path, and copy it there" in said.err


def test_what_is_missing_for_a_store_is_said(command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = command("refine", folder / "coarse.json", "--images", "s3://a/b", "-o", folder / "out.json")
    assert (said.code, "s3://a/b: the package for this store is missing (Install s3fs" in said.err) == (2, True)
    with pytest.raises(UsageError, match=r"nonsense://b: there is no such kind of store"):
        location("nonsense://b")
    monkeypatch.setitem(sys.modules, "upath", None)
    with pytest.raises(UsageError, match=r"install refinetool\[remote\]"):
        location("memory://a")


def test_other_paths_are_local() -> None:
    for text in ("a/b", "C:/x", "s3:/b", "x y://z"):
        assert location(text) == Path(text)
    assert location(None) is None
    assert location(Path("a")) == Path("a")
    assert not is_remote(Path("a"))
