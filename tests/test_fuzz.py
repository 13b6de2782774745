"""A thousand damaged inputs, through the commands: each ends in a sentence and an exit code, and no annotation is lost.

The cases are seeded; case N is always the same. A quick sample runs by default, all of them with `-m slow`.
"""

import json
import random
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import HEIGHT, WIDTH, Command, Said
from mutations import mutate
from PIL import Image

from refinetool.errors import LONGEST_MESSAGE

CASES, QUICK = 1000, 60
LIMIT_S = 30

seeds = [seed if seed < QUICK else pytest.param(seed, marks=pytest.mark.slow) for seed in range(CASES)]


@contextmanager
def time_limit() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise TimeoutError(f"more than {LIMIT_S} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LIMIT_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def photographs(folder: Path) -> None:
    folder.mkdir(parents=True)
    for number in (1, 2, 3):
        pixels = np.full((HEIGHT, WIDTH, 3), 40, dtype=np.uint8)
        pixels[12 + number : 32 + number, 10 + number : 40 + number] = 220
        Image.fromarray(pixels).save(folder / f"{number}.png")


def coco(root: Path) -> list[object]:
    photographs(root / "images")
    images = [{"id": n, "file_name": f"{n}.png", "width": WIDTH, "height": HEIGHT} for n in (1, 2, 3)]
    annotations: list[dict[str, Any]] = []
    for n in (1, 2, 3, 3):
        x, y = 9 + n, 11 + n
        segmentation: Any = [[x, y, x + 32, y, x + 32, y + 22, x, y + 22]]
        if len(annotations) == 3:
            segmentation = {"size": [HEIGHT, WIDTH], "counts": [600, 20, 40, 20, HEIGHT * WIDTH - 680]}
        record = {"id": 10 * len(annotations) + 7, "image_id": n, "category_id": 1, "iscrowd": 0, "area": 704}
        annotations.append(record | {"bbox": [x, y, 32, 22], "segmentation": segmentation, "note": "kept"})
    document = {"info": {"year": 2026}, "images": images, "annotations": annotations, "categories": [{"id": 1}]}
    (root / "coarse.json").write_text(json.dumps(document, indent=1))
    return [root / "coarse.json", "--images", root / "images"]


def voc(root: Path) -> list[object]:
    photographs(root / "JPEGImages")
    (root / "SegmentationObject").mkdir()
    for number in (1, 2, 3):
        values = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
        values[10 + number : 34 + number, 8 + number : 42 + number] = 1
        values[50:56, 60:70] = 2
        values[0, :] = 255
        picture = Image.fromarray(values)
        picture.putpalette([shade for n in range(256) for shade in (n, 255 - n, n // 2)])
        picture.save(root / "SegmentationObject" / f"{number}.png", dpi=(72, 72))
    return [root]


def masks(root: Path) -> list[object]:
    photographs(root / "images")
    (root / "masks").mkdir()
    for number in (1, 2, 3):
        mask = Image.new("L", (WIDTH, HEIGHT))
        mask.paste(255, (8 + number, 10 + number, 42 + number, 34 + number))
        mask.save(root / "masks" / f"{number}.png")
    return [root / "masks", "--images", root / "images"]


INPUTS: dict[str, Callable[[Path], list[object]]] = {"coco": coco, "voc": voc, "masks": masks}


@pytest.mark.parametrize("seed", seeds)
def test_damaged_input_ends_in_a_sentence_and_loses_nothing(command: Command, tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    kind = rng.choice(("coco", "coco", "voc", "masks"))
    root, output = tmp_path / "in" / "data", tmp_path / "out"
    arguments = INPUTS[kind](root)
    mutate(root, rng)
    before = contents(root)
    name = rng.choice(("refine", "refine", "refine", "corrupt", "eval"))
    if name == "eval":
        arguments = [arguments[0], *arguments]
    else:
        arguments += ["-o", output, "--record", tmp_path / "record.csv"]
    with time_limit():
        said = command(name, *arguments)
    check_ending(said)
    assert contents(root) == before
    if output.exists():
        assert lost(Path(str(arguments[0])), output) == []
    elif name != "eval":
        assert said.code != 0


def check_ending(said: Said) -> None:
    assert said.code in (0, 1, 2)
    assert "Traceback" not in said.err + said.out
    assert all(character.isprintable() or character == "\n" for character in said.err + said.out)
    if said.code:
        lines = [line for line in said.err.splitlines() if " images" not in line or "images," not in line]
        assert lines, "an exit code without a sentence"
        assert max(map(len, lines)) <= LONGEST_MESSAGE


def contents(root: Path) -> dict[Path, object]:
    return {
        path: path.readlink() if path.is_symlink() else path.is_file() and path.read_bytes() for path in root.rglob("*")
    }


def lost(source: Path, output: Path) -> list[object]:
    """What the output lacks of the input, or has in another order."""
    if source.is_dir():
        missing = {path.relative_to(source) for path in pngs(source)} - {
            path.relative_to(output) for path in pngs(output)
        }
        return [path for path in missing if path.parts[0] != "JPEGImages"]
    before, after = (
        json.loads(path.read_bytes(), object_pairs_hook=stable, parse_constant=str) for path in (source, output)
    )
    return [pair for pair in zip(before, after, strict=True) if pair[0] != pair[1]]


@pytest.mark.parametrize("old", ['"id": 17', '"note": "kept"', '"image_id": 2', '"year": 2026', '"category_id": 1'])
def test_what_is_lost_is_noticed(tmp_path: Path, old: str) -> None:
    source, output = Path(str(coco(tmp_path / "in")[0])), tmp_path / "out.json"
    text = source.read_text()
    output.write_text(text.replace('"area": 704', '"area": 1'))
    assert lost(source, output) == []
    output.write_text(text.replace(old, '"x": 0', 1))
    assert (lost(source, output) == []) == ("year" in old)  # `info` is where a run is recorded


def pngs(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*.png") if path.is_file() and not path.name.startswith(".")]


CHANGES = ("segmentation", "area", "bbox")


def stable(pairs: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """An object as what refining must not change: its names in order, and their values but for the mask's."""
    return [(name, None if name in CHANGES else value) for name, value in pairs if name != "info"]
