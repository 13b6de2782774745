"""Files that are damaged or made to do harm: a sentence and an exit code, never a traceback or a lost annotation."""

import json
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import HEIGHT, WIDTH, Command, Said
from PIL import Image

from refinetool.errors import LONGEST_MESSAGE, DataError, WeightsError, printable
from refinetool.evaluate.selection import open_candidates, read_candidates

DEEP = "[" * 1500 + "]" * 1500
DEEP_OBJECT = '{"a":' * 1500 + "1" + "}" * 1500


def refined(command: Command, folder: Path, *more: object) -> Said:
    return command("refine", folder / "coarse.json", "--images", folder / "images", "--json", *more)


def edit(folder: Path, old: str, new: str) -> None:
    path = folder / "coarse.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


# --- JSON


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"id": 20,', f'"id": 20, "more": {DEEP},'),
        ('"id": 20,', f'"id": 20, "segmentation": {DEEP},'),
        ('"images": [', f'"info": {DEEP_OBJECT}, "images": ['),
        ('"images": [', f'"more": {DEEP_OBJECT}, "images": ['),
        ('"images": [', f'"more": {DEEP}, "images": ['),
        ('"id": 2,', f'"id": 2, "more": {DEEP_OBJECT},'),
        ('"id": 20,', f'"id": 20, "more": {"9" * 5000},'),
    ],
)
def test_json_that_python_cannot_hold(command: Command, folder: Path, old: str, new: str) -> None:
    edit(folder, old, new)
    said = refined(command, folder)
    assert said.code == 1
    assert "levels deep" in said.err or "digits" in said.err
    assert said.err.count("\n") == 1


def test_brackets_in_texts_and_many_rings_are_not_nesting(command: Command, folder: Path) -> None:
    edit(folder, '"id": 20,', f'"id": 20, "more": {json.dumps("[" * 500)}, "rings": {json.dumps([[1]] * 500)},')
    assert refined(command, folder).code == 0


@pytest.mark.parametrize(("old", "code"), [('"area": 704', 0), ('"area": 704, "score": 1', 0), ('"category_id": 1', 1)])
def test_numbers_of_400_digits(command: Command, folder: Path, old: str, code: int) -> None:
    edit(folder, old.partition(",")[0], f"{old.rpartition(' ')[0]} {'9' * 400}")
    assert refined(command, folder).code == code
    coarse = folder / "coarse.json"
    assert command("eval", coarse, coarse, "--images", folder / "images").code == code


@pytest.mark.parametrize("name", ["a\0.png", "\ud800.png", "x" * 300 + ".png", "x/" * 2000])
def test_file_names_that_no_file_has(command: Command, folder: Path, name: str) -> None:
    edit(folder, '"2.png"', json.dumps(name))
    said = refined(command, folder)
    assert said.code == 1
    assert "is called" in said.err
    assert said.err.count("\n") == 1


def test_image_ids_may_be_any_text(command: Command, folder: Path) -> None:
    edit(folder, '"id": 2,', r'"id": "\ud800\u001b[31m",')
    edit(folder, '"image_id": 2,', r'"image_id": "\ud800\u001b[31m",')
    said = refined(command, folder, "--record", folder / "record.csv", "--candidates", folder / "c.jsonl")
    assert (said.code, json.loads(said.out)["refined"]) == (0, 3)
    assert command("corrupt", folder / "coarse.json", "--images", folder / "images").code == 0


def test_file_names_that_are_not_unicode(command: Command, folder: Path) -> None:
    masks, images = folder / "masks", folder / "images"
    masks.mkdir()
    name = os.fsdecode(b"caf\xe9")
    (images / "2.png").rename(images / f"{name}.png")
    mask = Image.new("L", (WIDTH, HEIGHT))
    mask.paste(255, (13, 13, 45, 36))
    mask.save(masks / f"{name}.png")
    said = command("refine", masks, "--images", images, "--json", "--record", folder / "r.csv")
    assert (said.code, json.loads(said.out)["refined"]) == (0, 1), said.err
    assert r"caf\udce9.png" in (folder / "r.csv").read_text()
    (images / f"{name}.png").write_bytes(b"broken")
    said = command("refine", masks, "--images", images, "--overwrite")
    assert said.code == 1
    assert r"caf\udce9" in said.err


@pytest.mark.parametrize(
    "line",
    [
        DEEP,
        "[]",
        '{"image": "1", "annotations": [7]}',
        '{"image": "1", "annotations": [{"id": 1, "selected": 0, "scores": [1], "candidates": [7]}]}',
        '{"image": "1", "annotations": [{"id": 1, "selected": 0, "scores": [1], "candidates": [{"size": [1, 1]}]}]}',
        '{"image": "1", "annotations": [{"id": 1, "selected": 0, "scores": [%s], "candidates": [{"size": [1, 1], '
        '"counts": "1"}]}]}' % ("9" * 400),
        '{"image": "1", "annotations": [{"id": 1, "selected": 0, "scores": [1], "candidates": [{"size": [1e999, 1], '
        '"counts": "1"}]}]}',
        '{"image": "1", "annotations": [{"id": "\xff"}]}',
    ],
)
def test_candidates_of_another_shape(tmp_path: Path, line: str) -> None:
    (tmp_path / "c.jsonl").write_bytes(line.encode("latin-1") + b"\n")
    with pytest.raises(DataError), open_candidates(tmp_path / "c.jsonl") as lines:
        found = lines.find("1")
        assert found is not None
        read_candidates(found)


def test_two_maps_of_one_image(command: Command, folder: Path) -> None:
    maps = folder / "SegmentationObject"
    maps.mkdir()
    for name in ("1.png", "1.PNG"):
        mask = Image.new("L", (WIDTH, HEIGHT))
        mask.paste(1, (11, 11, 43, 34))
        mask.save(maps / name)
    said = command("refine", maps, "--images", folder / "images")
    assert said.code == 1
    assert "is a second mask of the image" in said.err


# --- PNGs


def chunk(name: bytes, body: bytes, *, crc: int | None = None) -> bytes:
    return (
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body) if crc is None else crc)
    )


def with_chunk(extra: bytes) -> Callable[[bytes], bytes]:
    """Puts a chunk behind the header."""
    return lambda data: data[:33] + extra + data[33:]


BOMB = zlib.compress(bytes(300_000_000), 9)

DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "a byte after the end": lambda data: data + b"x",
    "a second header": with_chunk(chunk(b"IHDR", struct.pack(">IIBBBBB", 9, 9, 8, 0, 0, 0, 0))),
    "broken pHYs": with_chunk(chunk(b"pHYs", b"12")),
    "broken acTL": with_chunk(chunk(b"acTL", b"1")),
    "animation without frames": with_chunk(chunk(b"acTL", struct.pack(">II", 0, 0))),
    "broken tRNS": with_chunk(chunk(b"tRNS", b"")),
    "broken gAMA": with_chunk(chunk(b"gAMA", b"")),
    "broken iCCP": with_chunk(chunk(b"iCCP", b"x\0\0abc")),
    "broken zTXt": with_chunk(chunk(b"zTXt", b"x\0\0abc")),
    "broken eXIf": with_chunk(chunk(b"eXIf", b"MM\0*\xff\xff\xff\xff")),
    "a wrong checksum": with_chunk(chunk(b"gAMA", b"1234", crc=0)),
    "a bomb of text": with_chunk(chunk(b"zTXt", b"x\0\0" + BOMB)),
    "a bomb of pixels": lambda data: data[:33] + chunk(b"IDAT", BOMB) + chunk(b"IEND", b""),
    "broken pixels": lambda data: data[:33] + chunk(b"IDAT", b"abcdef") + chunk(b"IEND", b""),
    "no pixels": lambda data: data[:33] + chunk(b"IEND", b""),
    "no end": lambda data: data[:-12],
    "cut off": lambda data: data[:-20],
    "a chunk of 4 GB": lambda data: data[:33] + b"\xff\xff\xff\xffIDAT",
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_mask_pngs(command: Command, folder: Path, damage: Callable[[bytes], bytes]) -> None:
    masks = folder / "masks"
    masks.mkdir()
    for number in (1, 2, 3):
        mask = Image.new("L", (WIDTH, HEIGHT))
        mask.paste(255, (10 + number, 10 + number, 45 + number, 36 + number))
        mask.save(masks / f"{number}.png")
    (masks / "2.png").write_bytes(damage((masks / "2.png").read_bytes()))
    said = command("refine", masks, "--images", folder / "images", "--json", "--quiet")
    assert said.code in (0, 1)
    assert "Warning" not in said.err
    summary = json.loads(said.out)
    assert summary["refined"] + sum(summary["kept"].values()) == 3
    assert summary["refined"] >= 2
    if summary["refined"] == 2:
        assert (folder / "masks-refined" / "2.png").read_bytes() == (masks / "2.png").read_bytes()
    else:
        Image.open(folder / "masks-refined" / "2.png").load()


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
def test_damaged_images(command: Command, folder: Path, damage: Callable[[bytes], bytes]) -> None:
    (folder / "images" / "2.png").write_bytes(damage((folder / "images" / "2.png").read_bytes()))
    said = refined(command, folder)
    assert "Warning" not in said.err
    summary = json.loads(said.out)
    assert said.code == summary["failed"]
    assert summary["refined"] + sum(summary["kept"].values()) == 3
    assert len(json.loads((folder / "coarse.refined.json").read_text())["annotations"]) == 3


# --- what is typed


@pytest.mark.parametrize(
    "arguments",
    [
        ["--checkpoint", "~nobody-of-that-name/weights.pt"],
        ["--checkpoint", f"random:{1 << 64}"],
        ["--checkpoint", f"random:{'9' * 5000}"],
        ["--checkpoint", "random:"],
        ["--seed", str(1 << 64)],
        ["--device", f"cuda:{'1' * 5000}"],
        ["--device", "cuda:"],
        ["--images", "x" * 300],
        ["-o", "x" * 300],
        ["--record", "x" * 300],
    ],
)
def test_options_out_of_range(
    command: Command, folder: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    from refinetool.backends.models import pick_device, pick_precision
    from refinetool.refine import load_refiner
    from refinetool.running import identity, runners

    monkeypatch.setattr(runners, "load_refiner", load_refiner)  # the real ones
    monkeypatch.setattr(identity, "pick_device", pick_device)
    monkeypatch.setattr(identity, "pick_precision", pick_precision)
    said = command("refine", folder / "coarse.json", "--images", folder / "images", *arguments)
    assert said.code in (1, 2)
    assert said.err
    assert "Traceback" not in said.err


# --- weights


def saved(path: Path, value: Any) -> Path:
    import torch

    torch.save(value, path)
    return path


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text", "zip", "protocol"])
def test_damaged_checkpoints(tmp_path: Path, damage: str) -> None:
    import torch

    from refinetool.backends.models import read_state

    path = saved(tmp_path / "w.pt", {"a": torch.zeros(3)})
    data = path.read_bytes()
    changed = {
        "cut": data[: len(data) // 2],
        "flipped": data.replace(b"_rebuild_tensor_v2", b"_rebuild_tensor_v9"),
        "empty": b"",
        "text": b"hello",
        "zip": b"PK\x03\x04" + bytes(100),
        "protocol": b"\x80\x02}q\x00(X\x01\x00\x00\x00aq\x01ccollections\nOrderedDict\nR.",
    }
    path.write_bytes(changed[damage])
    with pytest.raises(WeightsError):
        read_state(path)


@pytest.mark.filterwarnings(
    "ignore:torch.quantize:UserWarning", "ignore:TypedStorage:UserWarning", "ignore:.*[Ss]parse:UserWarning"
)
def test_tensors_that_are_no_weights(tmp_path: Path) -> None:
    import torch

    from refinetool.backends.models import read_state

    values: list[Any] = [
        torch.zeros(2, dtype=torch.complex64),
        torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.qint8),
        torch.zeros(2, 2).to_sparse(),
        torch.zeros(2, device="meta"),
        [1, 2],
    ]
    for value in values:
        with pytest.raises(WeightsError, match="named tensors"):
            read_state(saved(tmp_path / "w.pt", {"a": value}))
    with pytest.raises(WeightsError, match="named tensors"):
        read_state(saved(tmp_path / "w.pt", {1: torch.zeros(2)}))
    assert set(read_state(saved(tmp_path / "w.pt", {"model": {"a": torch.zeros(2)}}))) == {"a"}


def test_weights_of_another_kind_do_not_fit() -> None:
    import torch

    from refinetool.backends.models import misfit

    expected = {"a": torch.zeros(2)}
    assert misfit(expected=expected, found={"a": torch.zeros(2, dtype=torch.float16)}) is None
    assert "of another type" in (misfit(expected=expected, found={"a": torch.zeros(2, dtype=torch.int64)}) or "")


@pytest.mark.parametrize(
    "metadata",
    [
        None,
        "[]",
        "7",
        "{",
        DEEP,
        '{"format": 1}',
        '{"format": 1, "model": 7, "fingerprint": "x", "with_masks": true, "about": {}}',
        '{"format": 1, "model": "m", "fingerprint": "x", "with_masks": "yes", "about": {}}',
    ],
)
def test_adapters_of_another_shape(tmp_path: Path, metadata: str | None) -> None:
    import torch
    from safetensors.torch import save_file

    from refinetool.modules.iou_adapter import KEYS, METADATA, read_adapter

    path = tmp_path / "a.safetensors"
    factors = {KEYS[0]: torch.zeros(4, 8), KEYS[1]: torch.zeros(4, 4)}
    save_file(factors, path, metadata=None if metadata is None else {METADATA: metadata})
    with pytest.raises(WeightsError):
        read_adapter(path, model="m", fingerprint="x")


def test_damaged_lines_of_a_metrics_log_are_left_out(tmp_path: Path) -> None:
    from refinetool.train.files import read_metrics

    (tmp_path / "m.jsonl").write_bytes(f'{{"step": 1}}\n[]\n7\n{{}}\n{{"step": "x"}}\n{DEEP}\n'.encode() + b"\xff\n")
    assert read_metrics(tmp_path / "m.jsonl") == [{"step": 1}]


# --- what reaches a terminal or a spreadsheet


def test_control_characters_never_reach_the_terminal(command: Command, folder: Path) -> None:
    bell = "\x1b]0;owned\x07\x1b[2J\u202e\x9b31m\nrefinetool: all is well.png"
    (folder / "images" / bell).write_bytes(b"broken")
    edit(folder, '"2.png"', json.dumps(bell))
    for more in ([], ["--quiet"], ["--json"]):
        said = command("refine", folder / "coarse.json", "--images", folder / "images", "--overwrite", "--fresh", *more)
        assert said.code == 1
        assert all(character.isprintable() or character == "\n" for character in said.err + said.out)
        assert r"\x1b]0;owned\x07" in said.err
        assert not any(line.startswith("refinetool:") for line in said.err.splitlines())


def test_paths_of_outputs_are_printed_without_control_characters(command: Command, folder: Path) -> None:
    said = command(
        "refine", folder / "coarse.json", "--images", folder / "images", "-o", folder / "out\x1b[31m.json", "-q"
    )
    assert said.code == 0
    said = command("refine", folder / "coarse.json", "--images", folder / "images", "-o", folder / "o\x1b[31m.json")
    assert "\x1b" not in said.out + said.err


def test_messages_are_short(command: Command, folder: Path) -> None:
    edit(folder, '"category_id": 1', f'"category_id": "{"x" * 5000}"')
    said = refined(command, folder)
    assert said.code == 1
    assert len(said.err) <= LONGEST_MESSAGE + 1
    assert "coarse.json" in said.err
    assert said.err.rstrip().endswith("expected a number.")


def test_printable() -> None:
    assert printable("a ä 日 😀") == "a ä 日 😀"
    assert printable("a\tb\r\n\x00\x7f\x85\u2028\u202e\ud800") == r"a\tb\r\n\x00\x7f\x85\u2028\u202e\ud800"


@pytest.mark.parametrize("name", ["=1+1.png", "+1.png", "-1.png", "@x.png", "\tx.png"])
def test_cells_of_the_record_are_no_formulas(command: Command, folder: Path, name: str) -> None:
    (folder / "images" / "2.png").rename(folder / "images" / name)
    edit(folder, '"2.png"', json.dumps(name))
    edit(folder, '"id": 20', '"id": -20')
    import contextlib

    with contextlib.chdir(folder / "images"):
        said = command("refine", "../coarse.json", "--images", ".", "--record", "../r.csv")
    assert said.code == 0, said.err
    row = (folder / "r.csv").read_text().splitlines()[2]
    assert row.startswith(f"'{name},-20,1,")
