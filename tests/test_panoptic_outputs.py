"""COCO panoptic is written as a file and a folder beside it, which replace only what they may, and together."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import Command
from PIL import Image
from test_formats_panoptic import lay_out, photo
from test_storage_faults import PARTIAL, Full

from refinetool.errors import StorageError, UsageError
from refinetool.formats import open_dataset, storage
from refinetool.formats.storage import new_pair


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: `panoptic_val.json`, its PNGs, and images that have the names of the PNGs."""
    lay_out(tmp_path, suffix="png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def content(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def write_mine(path: str) -> None:
    """Write a file of the user, beside PNGs with the names of an output if it is in a folder."""
    if "/" in path:
        shutil.copytree("panoptic_val", "out")
    Path(path).parent.mkdir(exist_ok=True)
    Path(path).write_bytes(b"mine")


@pytest.mark.parametrize("name", ["refine", "corrupt"])
@pytest.mark.parametrize(
    ("mine", "arguments", "sentence"),
    [
        (None, ["images.json"], "would replace the folder with the image"),
        (None, ["images.json", "--overwrite"], "would replace the folder with the image"),
        (None, ["images.json", "--images", "images"], "would replace the image folder"),
        (None, ["panoptic_val/out.json"], "would lie within the folder of the input"),
        (None, ["out.json", "--record", "panoptic_val/1.csv"], "would lie within the folder of the input"),
        (None, ["out.json", "--record", "out/1.csv"], "would be the same file"),
        ("out/1.png", ["out.json"], "out: exists already; --overwrite"),
        ("out/notes.txt", ["out.json"], "holds notes.txt, which is not an output"),
        ("out/notes.txt", ["out.json", "--overwrite"], "holds notes.txt, which is not an output"),
        ("out/more/1.png", ["out.json", "--overwrite"], "holds more/1.png, which is not an output"),
        ("out", ["out.json", "--overwrite"], "but it is a file"),
        (None, ["noext"], "has to end in .json"),
        (None, ["out.txt"], "has to end in .json"),
    ],
)
@pytest.mark.usefixtures("here")
def test_nothing_else_is_replaced(
    command: Command, name: str, mine: str | None, arguments: list[str], sentence: str
) -> None:
    if mine:
        write_mine(mine)
    before = content(Path())
    said = command(name, "panoptic_val.json", "-o", *arguments)
    assert said.code == 2, said.err
    assert sentence in said.err
    assert said.err.count("\n") == 1
    assert content(Path()) == before


@pytest.mark.usefixtures("here")
def test_the_folder_of_the_ground_truth_is_an_input(command: Command) -> None:
    shutil.copytree("panoptic_val", "gt")
    shutil.copy("panoptic_val.json", "gt.json")
    truth = ["--truth", "gt.json", "--selection", "oracle"]
    said = command("refine", "panoptic_val.json", *truth, "-o", "out.json", "--record", "gt/1.csv")
    assert said.code == 2
    assert "would lie within the folder of the ground truth" in said.err


def test_an_earlier_folder_is_replaced_when_asked(command: Command, here: Path) -> None:
    (here / "out").mkdir()  # an empty folder is in nobody's way
    assert command("refine", "panoptic_val.json", "-o", "out.json").code == 0
    first = content(here)
    (here / "out" / "1.png").write_bytes(b"to be replaced")
    (here / "out" / "2.png").unlink()
    (here / "out.json").unlink()
    assert "exists already" in command("refine", "panoptic_val.json", "-o", "out.json").err
    said = command("refine", "panoptic_val.json", "-o", "out.json", "--overwrite")
    assert said.code == 0, said.err
    assert content(here) == first


def test_a_run_that_was_killed_between_folder_and_file_is_resumed(command: Command, here: Path) -> None:
    assert command("refine", "panoptic_val.json", "-o", "out.json").code == 0
    expected = content(here)
    for path in (here / "out").iterdir():
        path.unlink()
    (here / "out").rmdir()
    (here / "out.json").unlink()
    assert command("refine", "panoptic_val.json", "-o", "out.json", "--limit", "1").code == 0
    (here / "out.json").unlink()
    said = command("refine", "panoptic_val.json", "-o", "out.json", "--resume", "--json")
    assert said.code == 0, said.err
    assert json.loads(said.out)["reused"] == 1
    assert content(here) == expected


def test_a_folder_that_was_filled_during_the_run_is_not_replaced(here: Path) -> None:
    dataset = open_dataset(here / "panoptic_val.json")
    write_mine("out/notes.txt")
    with pytest.raises(UsageError, match=r"holds notes\.txt"):
        dataset.write(lambda _: None, here / "out.json", {})
    (here / "out" / "notes.txt").unlink()
    (here / "out" / "link").symlink_to(here / "images")
    with pytest.raises(UsageError, match="holds link"):
        dataset.write(lambda _: None, here / "out.json", {})
    shutil.rmtree("out")
    (here / "out").write_bytes(b"mine")
    with pytest.raises(StorageError, match="is a file"):
        dataset.write(lambda _: None, here / "out.json", {})
    assert (here / "out").read_bytes() == b"mine"


def test_a_full_disk_leaves_an_earlier_output_as_it_was(
    command: Command, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command("refine", "panoptic_val.json", "-o", "out.json").code == 0
    (here / "out" / "1.png").write_bytes(b"the earlier one")
    before = content(here)
    with monkeypatch.context() as patched:
        Full(f".out.json.{PARTIAL}").install(patched)
        said = command("refine", "panoptic_val.json", "-o", "out.json", "--overwrite")
    assert said.code == 1
    assert "the disk is full" in said.err
    (here / "out.json.journal.jsonl").unlink()
    assert content(here) == before


class Killed(BaseException):
    """What ends the process."""


def kill_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no file or folder be renamed or removed any more after some steps, not even to tidy up."""
    left = [steps]

    def limited(real: Callable[..., Any]) -> Callable[..., Any]:
        def act(*rest: Any, **more: Any) -> Any:
            if not left[0]:
                raise Killed
            left[0] -= 1
            return real(*rest, **more)

        return act

    for owner, name in ((Path, "rename"), (Path, "replace"), (Path, "unlink"), (storage.shutil, "rmtree")):
        monkeypatch.setattr(owner, name, limited(getattr(owner, name)))


def write_pair(folder: Path, text: str) -> None:
    with new_pair(folder / "out.json", folder / "out") as (file, pngs):
        (pngs / "1.png").write_text(text)
        file.write(text.encode())


@pytest.mark.parametrize("earlier", ["both", "file", "folder", "link", "nothing"])
@pytest.mark.parametrize("steps", range(14))
def test_a_kill_never_leaves_a_file_with_the_folder_of_another_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: int, earlier: str
) -> None:
    file, png = tmp_path / "out.json", tmp_path / "out" / "1.png"
    if earlier != "nothing":
        write_pair(tmp_path, "old")
    if earlier == "file":
        shutil.rmtree(png.parent)
    elif earlier == "folder":
        file.unlink()
    elif earlier == "link":
        png.parent.rename(tmp_path / "elsewhere")
        png.parent.symlink_to("elsewhere")
    with monkeypatch.context() as patched:
        kill_after(steps, patched)
        try:
            write_pair(tmp_path, "new")
            finished = True
        except Killed:
            finished = False
    found = (file.read_text() if file.exists() else None, png.read_text() if png.exists() else None)
    before = {"file": ("old", None), "folder": (None, "old"), "nothing": (None, None)}.get(earlier, ("old", "old"))
    assert found == ("new", "new") if finished else found[0] is None or found in (before, ("new", "new"))
    write_pair(tmp_path, "newer")
    assert (file.read_text(), png.read_text()) == ("newer", "newer")
    assert {path.name for path in tmp_path.iterdir()} <= {"out", "out.json", "elsewhere"}
    assert earlier != "link" or (tmp_path / "elsewhere" / "1.png").read_text() == "old"


def test_no_folder_of_masks_replaces_images(command: Command, tmp_path: Path) -> None:
    photo(tmp_path / "images" / "1.png")
    (tmp_path / "masks").mkdir()
    mask = np.zeros((60, 80), dtype=np.uint8)
    mask[12:35, 10:43] = 255
    Image.fromarray(mask).save(tmp_path / "masks" / "1.png")
    before = content(tmp_path)
    said = command("refine", tmp_path / "masks", "-o", tmp_path / "images", "--overwrite")
    assert said.code == 2, said.err
    assert "would replace the folder with the image" in said.err
    assert content(tmp_path) == before
