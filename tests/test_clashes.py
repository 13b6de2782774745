"""No command writes over what it reads, or over another of its outputs."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import Command

from refinetool.errors import UsageError
from refinetool.formats.storage import refuse_clashes

REFINE = ["refine", "coarse.json", "--images", "images"]
CORRUPT = ["corrupt", "coarse.json", "--images", "images"]
EVAL = ["eval", "coarse.json", "truth.json", "--coarse", "coarse.json", "--images", "images"]


@pytest.fixture
def here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The data set as the working directory, with everything that a command may read."""
    shutil.copy(folder / "coarse.json", folder / "truth.json")
    shutil.copy(folder / "coarse.json", folder / "sizes.json")
    (folder / "weights.pt").write_bytes(b"weights")
    (folder / "adapter.safetensors").write_bytes(b"adapter")
    (folder / "link.json").symlink_to("coarse.json")
    os.link(folder / "images" / "1.png", folder / "one.png")
    (folder / "link.png").symlink_to("images/2.png")
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize(
    "arguments",
    [
        [*REFINE, "--record", "coarse.json"],
        [*REFINE, "--record", "./images/../coarse.json"],
        [*REFINE, "--record", "link.json"],
        [*REFINE, "--candidates", "coarse.json"],
        [*REFINE, "--record", "images"],
        [*REFINE, "--record", "images/1.png"],
        [*REFINE, "--candidates", "one.png"],
        [*REFINE, "--record", "link.png"],
        [*REFINE, "--record", "out.csv", "--candidates", "out.csv"],
        [*REFINE, "--record", "Out.csv", "--candidates", "out.CSV"],
        [*REFINE, "-o", "out.json", "--record", "out.json"],
        [*REFINE, "-o", "out.json", "--candidates", "out.json.journal.jsonl"],
        [*REFINE, "--truth", "truth.json", "--selection", "oracle", "-o", "truth.json"],
        [*REFINE, "--truth", "truth.json", "--selection", "oracle", "--record", "truth.json"],
        [*REFINE, "--sizes", "sizes.json", "--record", "sizes.json"],
        [*REFINE, "--checkpoint", "weights.pt", "--record", "weights.pt"],
        [*REFINE, "--iou-adapter", "adapter.safetensors", "-o", "adapter.safetensors"],
        [*CORRUPT, "-o", "truth.json", "--record", "coarse.json"],
        [*CORRUPT, "--picture", "coarse.json"],
        [*CORRUPT, "--picture", "images/3.png"],
        [*CORRUPT, "--picture", "out.png", "--record", "out.png"],
        [*CORRUPT, "-o", "link.json"],
        [*EVAL, "--plot", "link.json"],
        [*EVAL, "--plot", "images/1.png"],
        [*EVAL, "--candidates", "sizes.json", "--plot", "sizes.json"],
        ["adapt-iou", "coarse.json", "--images", "images", "-o", "images/1.png"],
        ["adapt-iou", "coarse.json", "--images", "images", "--checkpoint", "weights.pt", "-o", "weights.pt"],
    ],
)
def test_what_a_command_reads_is_never_written_over(command: Command, here: Path, arguments: list[str]) -> None:
    before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file()}
    overwrite = [] if arguments[0] == "eval" else ["--overwrite"]
    said = command(*arguments, *overwrite)
    assert said.code == 2, said.err
    assert "would replace" in said.err or "would be the same file" in said.err
    assert said.err.count("\n") == 1
    assert {path: path.read_bytes() for path in here.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("output", ["", ".", "..", "images/..", "/"])
def test_an_output_needs_a_name(command: Command, here: Path, output: str) -> None:
    for arguments in ([*REFINE, "-o", output], [*CORRUPT, "-o", output], [*REFINE, "--record", output]):
        said = command(*arguments)
        assert said.code == 2
        assert said.err.count("\n") == 1, said.err
    assert not list(here.rglob("*.journal.jsonl"))


def test_an_earlier_record_is_replaced_only_when_asked(command: Command, here: Path) -> None:
    (here / "notes.csv").write_text("precious")
    said = command(*REFINE, "--record", "notes.csv")
    assert said.code == 2
    assert "--overwrite" in said.err
    assert (here / "notes.csv").read_text() == "precious"
    assert command(*REFINE, "--record", "notes.csv", "--overwrite").code == 0
    assert (here / "notes.csv").read_text().startswith("image,")


def test_masks_and_images_may_share_a_folder(command: Command, here: Path) -> None:
    shutil.copy(here / "coarse.json", here / "images" / "masks.json")
    said = command("refine", "images/masks.json", "--images", "images", "--record", "images/masks.csv")
    assert said.code == 0, said.err
    assert (here / "images" / "masks.refined.json").is_file()


@pytest.mark.parametrize(
    ("output", "source", "refused"),
    [
        ("out", "masks", False),
        ("masks/out", "masks", True),
        ("data", "data/masks", True),
        ("Masks", "masks", True),  # neither exists, and not every file system tells them apart
    ],
)
def test_folders(tmp_path: Path, output: str, source: str, refused: bool) -> None:
    def check() -> None:
        refuse_clashes({"output": tmp_path / output}, {"input": tmp_path / source})

    refuses: Callable[[], object] = check
    if refused:
        with pytest.raises(UsageError, match="output"):
            refuses()
    else:
        refuses()
