"""Bad input, through the commands: one sentence, the right exit code, nothing lost."""

import contextlib
import errno
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import HEIGHT, WIDTH, Command, Said
from PIL import Image

from refinetool.running import run as running
from refinetool.running import runners
from refinetool.running.run import Summary


def annotation(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Damages the second annotation of `coarse.json`."""
    return rewritten(lambda record: change(record["annotations"][1]))


def image(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Damages the second image record of `coarse.json`."""
    return rewritten(lambda record: change(record["images"][1]))


def rewritten(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "coarse.json"
        record = json.loads(path.read_text())
        change(record)
        path.write_text(json.dumps(record, indent=1))

    return damage


def text(change: Callable[[str], str]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "coarse.json"
        path.write_text(change(path.read_text()))

    return damage


def pixels(write: Callable[[Path], object]) -> Callable[[Path], None]:
    """Damages the second image."""

    def damage(folder: Path) -> None:
        write(folder / "images" / "2.png")

    return damage


def huge(path: Path) -> None:
    """A PNG of a few bytes that claims 100,000 x 100,000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)


def one_sentence(said: Said) -> str:
    """The only line on stderr that is no progress."""
    lines = [line for line in said.err.splitlines() if " images/s" not in line]
    assert len(lines) == 1, said.err
    assert "Traceback" not in lines[0]
    return lines[0]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (text(lambda t: t.replace('"iscrowd": 0,', '"iscrowd": 0', 1)), ["line ", "column ", "JSON"]),
        (text(lambda t: t[:300]), ["line ", "column ", "JSON"]),
        (text(lambda _: ""), ["empty"]),
        (text(lambda _: "hello"), ["JSON"]),
        (rewritten(lambda r: r.pop("annotations")), ["annotations"]),
        (rewritten(lambda r: r.pop("images")), ["images"]),
        (annotation(lambda a: a.update(id=10)), ["10", "unique", "line "]),
        (annotation(lambda a: a.pop("id")), ["id", "line "]),
        (annotation(lambda a: a.update(image_id=77)), ["20", "77"]),
        (annotation(lambda a: a.update(category_id="box")), ["20", "category_id", "'box'"]),
        (image(lambda i: i.update(id=1)), ["1", "unique"]),
        (image(lambda i: i.update(file_name="../..")), ["'../..'", "names no file"]),
    ],
)
def test_a_broken_file_ends_the_run(
    command: Command, folder: Path, damage: Callable[[Path], None], words: list[str]
) -> None:
    damage(folder)
    said = command("refine", folder / "coarse.json", "--images", folder / "images")
    sentence = one_sentence(said)
    assert said.code == 1
    assert str(folder / "coarse.json") in sentence
    assert all(word in sentence for word in words), sentence
    assert sorted(path.name for path in folder.iterdir()) == ["coarse.json", "images"]


@pytest.mark.parametrize(
    ("damage", "reason", "words"),
    [
        (pixels(Path.unlink), "image-missing", ["no such image"]),
        (
            image(lambda i: i.update(file_name="../../2.png.jpg")),
            "image-missing",
            ["images/2.png.jpg: there is no such"],
        ),
        (pixels(lambda path: path.write_bytes(path.read_bytes()[:60])), "image-unreadable", ["can't be read"]),
        (pixels(lambda path: path.write_text("hello")), "image-unreadable", ["can't be read"]),
        (pixels(lambda path: Image.new("RGB", (70, 50)).save(path)), "size-mismatch", ["70 x 50", "80 x 60"]),
        (pixels(huge), "image-too-large", ["100,000 x 100,000"]),
    ],
)
def test_a_broken_image_keeps_its_masks_and_the_rest_is_refined(
    command: Command, folder: Path, damage: Callable[[Path], None], reason: str, words: list[str]
) -> None:
    damage(folder)
    said = command("refine", folder / "coarse.json", "--images", folder / "images", "--json")
    sentence = one_sentence(said)
    assert said.code == 1
    assert "2.png" in sentence
    assert all(word in sentence for word in words), sentence
    summary = json.loads(said.out)
    assert (summary["refined"], summary["kept"], summary["failed"]) == (2, {reason: 1}, 1)
    before = json.loads((folder / "coarse.json").read_text())["annotations"]
    after = json.loads((folder / "coarse.refined.json").read_text())["annotations"]
    assert after[1] == before[1]
    assert after[0] != before[0]


@pytest.mark.parametrize(
    ("segmentation", "fault"),
    [
        (
            {"size": [HEIGHT, WIDTH + 1], "counts": [HEIGHT * (WIDTH + 1)]},
            "its run lengths are of the size [60, 81], its image of [60, 80] (height, width).",
        ),
        ({"size": [HEIGHT, WIDTH], "counts": [10, 20]}, "its run lengths add up to 30, its image has 4800 pixels."),
        (
            {"size": [HEIGHT, WIDTH], "counts": [10, "x"]},
            "its counts are [10, 'x']; expected a text, or a list of whole",
        ),
        ({"size": [HEIGHT, WIDTH], "counts": "zzzz"}, "the run lengths 'zzzz' are not in COCO's compressed form."),
        ([[float("nan"), 1, 30, 1, 30, 30]], "a corner of its rings is not a finite number."),
        ([[1, 1, 30, 1, 30, 900]], "a corner of its rings is at 900, far outside the image of 80 x 60 pixels."),
        ([[1, 1, 30, 1, 30, 3, 5]], "one of its rings has 7 numbers; expected an even number"),
        (
            [[1, 1, 30, 1, "x", 3]],
            "its segmentation holds something other than numbers; expected rings or run lengths.",
        ),
        ([1, 1, 30, 1], "one of its rings is 1; expected a list x, y, x, y ..."),
        ([[1, 2, 3, 4]], "none of its rings has 3 corners, so they cover nothing."),
        ("a mask", "its segmentation is 'a mask'; expected rings or run lengths."),
        ([], None),
    ],
)
def test_a_broken_mask_comes_back_as_it_was(
    command: Command, folder: Path, segmentation: object, fault: str | None
) -> None:
    annotation(lambda a: a.update(segmentation=segmentation))(folder)
    said = command("refine", folder / "coarse.json", "--images", folder / "images", "--json")
    assert said.code == 0
    summary = json.loads(said.out)
    assert summary["refined"] == 2
    assert sum(summary["kept"].values()) == 1
    assert (summary["faulty"], len(summary["faults"])) == ((0, 0) if fault is None else (1, 1))
    for sentence in summary["faults"]:
        assert sentence.startswith(f"{folder / 'coarse.json'}: annotation 20: {fault}")
    before, after = (
        (folder / name).read_text().partition('"id": 20')[2].partition('"id": 30')[0]
        for name in ("coarse.json", "coarse.refined.json")
    )
    assert before == after != ""


@pytest.mark.parametrize(
    ("name", "options", "kept"),
    [("refine", [], "kept coarse"), ("refine", ["--dry-run"], "kept coarse"), ("corrupt", [], "not changed")],
)
def test_the_first_broken_masks_are_explained(
    command: Command, folder: Path, name: str, options: list[str], kept: str
) -> None:
    def spoil(record: dict[str, Any]) -> None:
        broken = {**record["annotations"][1], "segmentation": "x"}
        record["annotations"] += [{**broken, "id": 100 + number} for number in range(8)]

    rewritten(spoil)(folder)
    said = command(name, folder / "coarse.json", "--images", folder / "images", *options)
    assert said.code == 0
    told = said.out.partition(f"  8 {kept}: the mask can't be read\n")[2].splitlines()
    sentence = f"  {folder / 'coarse.json'}: annotation {{}}: its segmentation is 'x'; expected rings or run lengths."
    assert told[:6] == [*map(sentence.format, range(100, 105)), "  ... and 3 more faulty masks"]


def test_a_crowd_is_no_fault(command: Command, folder: Path) -> None:
    annotation(lambda a: a.update(segmentation="x", iscrowd=1))(folder)
    said = command("refine", folder / "coarse.json", "--images", folder / "images", "--json")
    assert json.loads(said.out)["faults"] == []
    assert json.loads(said.out)["kept"] == {"crowd": 1}


@pytest.mark.parametrize(
    "case",
    [
        (["refine", "nothing.json"], 1, ["nothing.json"]),
        (["refine", "coarse.json", "--images", "nowhere"], 1, ["nowhere"]),
        (["refine", "coarse.json", "-o", "coarse.json"], 2, ["input"]),
        (["refine", "coarse.json", "-o", "images/../coarse.json"], 2, ["input"]),
        (["refine", "coarse.json", "-o", "nowhere/out.json"], 2, ["nowhere"]),
        (["refine", "coarse.json", "-o", "images"], 2, ["folder"]),
        (["refine", "coarse.json", "-o", "there.json"], 2, ["there.json", "--overwrite"]),
        (["refine", "coarse.json", "--model", "sam-vit-bb"], 2, ["sam-vit-bb", "did you mean sam-vit-b?"]),
        (["refine", "coarse.json", "--resume", "--fresh"], 2, ["--resume", "--fresh"]),
        (["refine", "coarse.json", "--no-point", "--no-negative", "--no-box", "--no-mask"], 2, ["no prompt is left"]),
        (["refine", "coarse.json", "--view-margin", "inf"], 2, ["view.margin is inf", "finite"]),
        (["refine", "coarse.json", "--grid-min-iou", "nan"], 2, ["grid.min_predicted_iou is nan"]),
        (["adapt-iou", "coarse.json", "-o", "a", "--learning-rate", "inf"], 2, ["learning_rate is inf"]),
        (["eval", "coarse.json", "nothing.json"], 1, ["nothing.json"]),
        (["models", "fetch", "sam-3"], 2, ["sam-3"]),
        (["models", "verify", "sam-3"], 2, ["sam-3"]),
        (["demo", "."], 2, ["something other than a demo"]),
    ],
)
def test_a_command_that_cannot_be_carried_out(
    command: Command, folder: Path, case: tuple[list[str], int, list[str]]
) -> None:
    arguments, code, words = case
    (folder / "there.json").write_text("precious")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with contextlib.chdir(folder):
        said = command(*arguments)
    sentence = one_sentence(said)
    assert said.code == code
    assert said.out == ""
    assert all(word in sentence for word in words), sentence
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "arguments",
    [
        "refine",
        "refine x.json --passes 0",
        "refine x.json --min-coarse-iou 1.5",
        "refine x.json --view globe",
        "refine --no-such",
        "polish",
        "eval x.json",
    ],
)
def test_what_cannot_be_parsed_is_a_usage_error(command: Command, arguments: str) -> None:
    said = command(*arguments.split())
    assert said.code == 2
    assert "Error" in said.err
    assert "Traceback" not in said.err


def test_a_full_disk_is_one_sentence_and_nothing_is_lost(
    command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        said = command("refine", folder / "coarse.json", "--images", folder / "images")
    assert said.code == 1
    assert "disk is full" in one_sentence(said)
    assert not (folder / "coarse.refined.json").exists()
    again = command("refine", folder / "coarse.json", "--images", folder / "images", "--resume", "--json")
    assert again.code == 0
    assert json.loads(again.out)["reused"] == 3


def test_a_missing_checkpoint(command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from refinetool.refine import load_refiner

    monkeypatch.setattr(runners, "load_refiner", load_refiner)
    monkeypatch.setattr("refinetool.backends.models.pick_device", lambda _: "cpu")  # they import torch
    monkeypatch.setattr("refinetool.backends.models.pick_precision", lambda *_: "fp32")
    said = command("refine", folder / "coarse.json", "--images", folder / "images", "--checkpoint", "gone.pt")
    assert said.code == 1
    assert "gone.pt" in one_sentence(said)


def test_a_bug_keeps_its_traceback(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    def refine_dataset(*_: object, **__: object) -> Summary:
        raise ZeroDivisionError

    monkeypatch.setattr(running, "refine_dataset", refine_dataset)
    with pytest.raises(ZeroDivisionError):
        command("refine", "x.json")
